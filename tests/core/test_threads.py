"""Several threads train one model whose field keeps the control or the time on its modules."""

import threading

import pytest
import torch
from learners import make_node
from torch import nn
from torchdyn.nn import DataControl, DepthCat

import torchdyn_mintime as tm
from torchdyn_mintime.core import field, untraced
from torchdyn_mintime.core.lock import Lock, alone_in_backward

SPAN = torch.linspace(0, 1, 4, dtype=torch.float64)


class Meeting(nn.Module):
    """Stops the thread of a backward within it, until ``solved``; with ``in_solve`` it starts in the middle of a solve."""

    def __init__(self):
        super().__init__()
        self.threads = [None]  # in a list: a backward puts attributes back as they were in its solve
        self.begun, self.solved = threading.Event(), threading.Event()
        self.in_solve, self.calls = False, 0

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(self.wait)  # under autograd
        self.wait()  # under the others, which evaluate the field again
        self.calls += self.in_solve
        if self.calls == 4:  # at another time than t0
            self.calls += 1
            self.threads[0].start()
            self.begun.wait(0.3)  # it waits for the solve to end, else it has set the modules by now
        return x

    def wait(self, _=None):
        if threading.current_thread() is self.threads[0]:
            self.begun.set()
            self.solved.wait(60)


def trained_by_two(keeper, **options):
    """A span, the thread of a backward, what that has found, the state of another solve, and what each gets alone."""
    torch.manual_seed(0)
    meeting, width = Meeting(), 4 if isinstance(keeper, DataControl) else 3
    field = nn.Sequential(meeting, keeper, nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 2))
    node = make_node(field=field, sensitivity=options.get("sensitivity", "autograd")).double()
    span = tm.LearnableSpan(node, SPAN, checkpoint="checkpoint" in options)
    mine, other = torch.randn(2, 5, 2, dtype=torch.float64)
    parameters, found = list(span.parameters()), []

    def loss_of(x):
        return span(x)[1][-1].square().sum()

    alone, end = torch.autograd.grad(loss_of(other), parameters), span(mine)[1][-1].detach()
    loss = loss_of(other)
    meeting.threads[0] = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, parameters)))
    return span, meeting, found, mine, alone, end


@pytest.mark.parametrize("keeper", [DataControl(), DepthCat(1)], ids=["control", "time"])
def test_a_backward_in_the_middle_of_another_threads_solve_leaves_it_alone(keeper):
    span, meeting, found, mine, alone, end = trained_by_two(keeper)
    meeting.in_solve = True
    assert torch.equal(span(mine)[1][-1], end)
    meeting.solved.set()
    meeting.threads[0].join(60)
    assert len(found) == len(alone) and all(map(torch.equal, found, alone))


@pytest.mark.parametrize("options", [{"sensitivity": "adjoint"}, {"checkpoint": True}], ids=str)
def test_a_solve_waits_for_the_backward_of_another_thread_that_evaluates_the_field(options):
    span, meeting, found, mine, alone, end = trained_by_two(DataControl(), **options)
    meeting.threads[0].start()
    assert meeting.begun.wait(10)
    threading.Timer(0.3, meeting.solved.set).start()
    assert torch.equal(span(mine)[1][-1], end)
    meeting.threads[0].join(60)
    assert len(found) == len(alone) and all(map(torch.equal, found, alone))


def test_fits_to_one_field_in_several_threads_wait_for_one_another():
    """Each holds the field in float64, in which the others must not find it."""
    node, x = make_node(width=8).float(), torch.randn(64, 2)
    types, errors = [p.dtype for p in node.parameters()], {}

    def fit(key):
        errors[key] = tm.fit_solver(node, x, evaluations=2, inverse=key % 2 == 1, progress=False).error.rms

    threads = [threading.Thread(target=fit, args=(key,)) for key in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    fit(4)
    fit(5)
    assert [errors.get(key) for key in range(4)] == [errors[4], errors[5]] * 2
    assert [p.dtype for p in node.parameters()] == types


def test_a_backward_on_a_gpu_does_not_wait():
    lock, held, done = Lock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    try:
        with pytest.raises(RuntimeError, match="another thread"), alone_in_backward(lock, on_cpu=False):
            pass
    finally:
        done.set()
        other.join(60)
    with alone_in_backward(lock, on_cpu=False):
        pass


@pytest.mark.parametrize("keeper", [DataControl(), DepthCat(1)], ids=["control", "time"])
def test_a_backward_on_a_gpu_of_what_was_made_beside_the_solve_goes_on(keeper, monkeypatch):
    """As fits of solvers and penalties differentiate; the thread of a GPU is played by another thread of the processor."""
    monkeypatch.setattr(field, "alone_in_backward", lambda alone, _, *hold: alone_in_backward(alone, False, *hold))
    span, _, _, mine, _, _ = trained_by_two(keeper)
    z, found, refused = mine.clone().requires_grad_(), [], []

    def differentiate(value, into):
        try:
            into.append(torch.autograd.grad(value, z, retain_graph=True)[0])
        except RuntimeError as error:
            into.append(str(error))

    def on_the_device(value, into):
        other = threading.Thread(target=differentiate, args=(value, into))
        other.start()
        other.join(60)

    span(mine)
    bound = span.last.bound
    with untraced(bound):
        value = bound.function(torch.tensor(0.5), z).sum()
        on_the_device(value, found)
    differentiate(value, found)
    assert torch.equal(*found)
    with untraced(bound):  # another one, perhaps of another thread
        on_the_device(value, refused)
    assert "met a solve of another thread" in refused[0]
