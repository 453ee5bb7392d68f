"""Weights shared out over two processes (gloo, CPU), times whole: the same training as DistributedDataParallel's."""

import json

import pytest
import torch
from launched import on_two_ranks
from torch import nn
from trust import shards

import torchdyn_mintime as tm
from torchdyn_mintime.core.shards import error_of_shards

CALLBACKS = [*shards.CALLBACKS, "resumed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each rank left what it saw, from one launch for all tests."""
    folder = tmp_path_factory.mktemp("shards")
    on_two_ranks(shards.__file__, folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def assert_same(sharded, whole, near):
    assert len(sharded) == len(whole) >= 4
    for a, b in zip(sharded, whole, strict=True):
        assert a == pytest.approx(b, abs=near)


@pytest.mark.parametrize("name", shards.MODELS)
@pytest.mark.parametrize("kind", shards.PLAIN[1:])
def test_a_loop_of_ones_own_trains_as_with_ddp(seen, kind, name):
    """In float64, with an accumulation of two backwards and a learned t0: sums in another order alone."""
    for rank in seen:
        assert_same(rank[kind][name], rank["ddp"][name], 1e-9)
    *_, (_, t_f, t0, _) = seen[0]["ddp"][name]
    assert t_f < 0.95 and t0 > 0.05, "the times hardly moved"


@pytest.mark.parametrize("kind", shards.PLAIN)
def test_a_training_saved_by_torchs_own_way_goes_on_as_if_it_had_not_been_interrupted(seen, kind):
    for rank in seen:
        assert_same(rank[f"{kind}, interrupted"], rank[kind]["a learned solver"], 1e-12)


@pytest.mark.parametrize("kind", shards.PLAIN[1:])
def test_a_use_that_finds_parts_of_weights_says_so(seen, kind):
    for rank in seen:
        said = rank["words"][kind]
        assert said.keys() == {"trajectory", "fit_solver", "search", "adjoint", "checkpoint"}
        for name in ("trajectory", "fit_solver"):
            assert "shared out over processes" in said[name] and "in that forward" in said[name], name
        assert "needs whole weights" in said["search"]
        assert "sensitivity='autograd'" in said["adjoint"] and "checkpoint=False" in said["checkpoint"]


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("strategy", ["ModelParallelStrategy", "FSDPStrategy"])
def test_lightnings_strategies_train_as_with_ddp(seen, strategy, callback):
    for rank in seen:
        if (strategy, callback) == ("FSDPStrategy", "resumed"):
            # On the CPU torch 2.14 saves Adam's exp_avg_sq in the place of exp_avg, of any model.
            # So the first loss alone is equal.
            assert rank["FSDPStrategy, resumed"][0] == pytest.approx(rank["ddp, resumed"][0], abs=1e-5)
            continue
        # FSDPStrategy turns the module into float32.
        assert_same(rank[f"{strategy}, {callback}"], rank[f"ddp, {callback}"], 1e-9 if "Model" in strategy else 1e-5)
    assert seen[0][f"ddp, {callback}"][-1][0] != 1.0


@pytest.mark.parametrize("strategy", ["ddp", "ModelParallelStrategy", "FSDPStrategy"])
def test_a_whole_checkpoint_loads_into_a_module_of_one_process(folder, strategy):
    learner = shards.Sharded()
    tm.wrap(learner)
    learner.load_state_dict(torch.load(folder / f"{strategy}.ckpt", weights_only=True)["state_dict"])
    assert 0.5 < learner.model.t_f.item() < 1.0


def test_a_frozen_time_is_averaged_once_it_is_free_and_nothing_changes_in_one_process():
    span = tm.LearnableSpan(shards.make_node(seed=0), shards.SPAN)
    span.t_f.requires_grad_(False)
    assert tm.replicate_times(span) == tm.replicate_times(span) == {span.t_f}
    assert not span.t_f.requires_grad
    span.t_f.requires_grad_()
    span(torch.ones(2, 2))[1][-1].sum().backward()
    gradient = span.t_f.grad.clone()
    plain = tm.LearnableSpan(shards.make_node(seed=0), shards.SPAN)
    plain(torch.ones(2, 2))[1][-1].sum().backward()
    assert torch.equal(gradient, plain.t_f.grad)
    with pytest.raises(ValueError, match="no LearnableSpan"):
        tm.replicate_times(torch.nn.Linear(2, 2))


def test_an_error_in_a_field_without_parameters_of_its_own_keeps_its_words():
    """As in a forward under ``use_orig_params=False``, in which the layers have tensors in the place of parameters."""
    layer = nn.Tanh()
    layer._is_fsdp_managed_module = True
    assert error_of_shards(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), [layer]) is None
    layer.part = nn.Parameter(torch.zeros(3))
    assert "shared out" in str(error_of_shards(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), [layer]))
