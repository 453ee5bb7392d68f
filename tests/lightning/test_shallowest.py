"""Shallowest: the search for the fewest evaluations in a Trainer."""

import contextlib
import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from launched import on_two_ranks
from learners import Learner, annuli, loader, make_node, trainer
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import Shallowest
from torchdyn_mintime.lightning.apart import metrics_apart


class Rings(Learner):
    """Passes a span of 20 steps of its own, which the search sets aside."""

    def __init__(self, hook=None):
        node = make_node(3, 32)
        super().__init__(node, torch.linspace(0, 1, 21), lambda p: torch.optim.Adam(p, 0.03), classes=2, hook=hook)


def fit(module, callback, epochs, n=128, path=None):
    run = trainer(epochs, callback)
    run.fit(module, loader(annuli(n), n), ckpt_path=path, weights_only=True if path else None)
    return run


def test_the_fewest_evaluations_are_found_and_stay():
    torch.manual_seed(0)
    module, callback = Rings(), Shallowest(target=0.1, solver_tol=0.2)
    fit(module, callback, 300, n=64)
    assert callback.verdict is not None and callback.verdict.feasible
    assert callback.verdict.best.evaluations <= 4
    assert "training_step" not in vars(module) and "log" not in vars(module)
    module.model(torch.randn(4, 3), module.t_span)
    assert module.model.nfe == callback.verdict.best.evaluations
    assert module.model.t_f.requires_grad
    other = Rings()
    tm.wrap(other).load_state_dict(module.state_dict())
    assert other.model.pinned
    copied = copy.deepcopy(module)
    assert copied.training_step.__self__ is copied and copied.log.__self__ is copied


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_search_that_fails_again_and_again_ends():
    def fail(learner, batch_idx):
        calls.append(batch_idx)
        raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")

    calls, callback = [], Shallowest(target=0.1)
    fit(Rings(fail), callback, 40, n=16)
    assert len(calls) == 5 and not callback.verdict.feasible  # 4, 8, 16, 32 and 64 steps
    assert [trial.steps for trial in callback.verdict.trials] == [4, 8, 16, 32, 64]


class Stumbling(Rings):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1:
            return None
        if self.current_epoch == 2:
            raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")
        return {"loss": super().training_step(batch, batch_idx)}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_failed_solve_is_gone_back_from_and_a_step_without_loss_is_passed_over():
    torch.manual_seed(0)
    module, callback = Stumbling(), Shallowest(target=0.05, solver_tol=0.2)
    fit(module, callback, 5)
    assert callback.verdict.iterations == 3 and callback.search.state_dict()["stage"]["drops"] == 1


class Refusing(Rings):
    """Returns no loss at the reference in the fifth epoch."""

    epochs = ()

    def training_step(self, batch, batch_idx):
        self.epochs = (*self.epochs, self.current_epoch)
        loss = super().training_step(batch, batch_idx)
        return None if self.epochs[-2:] == (4, 4) else loss


def test_a_step_without_loss_at_the_reference_is_a_loss_that_exploded():
    torch.manual_seed(0)
    module, callback = Refusing(), Shallowest(target=0.05, solver_tol=0.2)
    fit(module, callback, 6)
    assert callback.verdict.iterations == 6 and callback.search.state_dict()["stage"]["drops"] == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


class OneArgument(Rings):
    """Lightning passes the number of the batch only to a step that takes it."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


def test_a_step_that_takes_the_batch_alone_is_called_so():
    torch.manual_seed(0)
    callback = Shallowest(target=1.0, solver_tol=10.0)
    fit(OneArgument(), callback, 5)
    assert callback.verdict.feasible


def test_the_module_is_as_it_was_after_an_error():
    def fail(learner, batch_idx):
        assert not learner.model.t_f.requires_grad
        raise KeyError("a fault of the user's own")

    module = Rings(fail)
    with pytest.raises(KeyError):
        fit(module, Shallowest(target=0.1), 1)
    assert "training_step" not in vars(module) and module.model.t_f.requires_grad


def without_seconds(verdict):
    for trial in verdict.trials:
        trial.seconds = 0.0
    return verdict


class Saving(pl.Callback):
    """Writes a checkpoint where the search is at a depth."""

    def __init__(self, path, label, iterations):
        self.path, self.at = path, (label, iterations)

    def on_train_epoch_end(self, trainer, pl_module):
        (search,) = (c.search for c in trainer.callbacks if isinstance(c, Shallowest))
        if (search.trials[-1].label, search.trials[-1].iterations) == self.at:
            self.epoch = trainer.current_epoch
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("label", "iterations"), [("4 x rk4", 12), ("learned-3", 2)])
def test_a_search_goes_on_from_its_checkpoint(label, iterations, tmp_path):
    def fitted(path=None, *callbacks):
        torch.manual_seed(1)
        module, callback = Rings(), Shallowest(target=0.3, solver_tol=0.1)
        data = loader(annuli(32), 32)
        weights = True if path else None
        trainer(110, callback, *callbacks).fit(module, data, ckpt_path=path, weights_only=weights)
        return module, callback

    saving = Saving(tmp_path / "c.ckpt", label, iterations)
    whole, searched = fitted(None, saving)
    second, resumed = fitted(saving.path)
    assert without_seconds(resumed.verdict) == without_seconds(searched.verdict)
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b), name


def test_gradients_are_clipped_where_the_optimizer_uses_them():
    """Lightning computes the gradients inside of the optimizer's step."""

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.sub_(group["lr"] * p.grad)
            return loss

    class Steep(Rings):
        def training_step(self, batch, batch_idx):
            return 1e3 * super().training_step(batch, batch_idx)

    norms, module = [], Steep()
    module.optimizer = lambda p: Spy(p, 1e-6)
    fit(module, Shallowest(target=0.1), 6)
    assert len(norms) == 6 and norms == pytest.approx([2.0] * 6)


def test_a_learned_solver_is_stepped_by_the_gradients_of_its_own_batch():
    """In the first epoch at learned solvers, the coefficients and the weights are stepped by the same backward."""

    class Watch(pl.Callback):
        def on_after_backward(self, run, learner):
            solver = learner.model.solver
            if isinstance(solver, tm.LearnableSolver) and not gradients:
                gradients.append(solver.free.grad.clone())
                before.append(solver.free.detach().clone())

        def on_train_batch_end(self, run, learner, *_):
            if gradients and not moved:
                moved.append(learner.model.solver.free.detach() - before[0])
                run.should_stop = True

    torch.manual_seed(1)
    gradients, before, moved = [], [], []
    trainer(110, Watch(), Shallowest(target=0.3, solver_tol=0.1)).fit(Rings(), loader(annuli(32), 32))
    # Adam's first step is against the sign of the gradient.
    assert torch.equal(moved[0].sign(), -gradients[0].sign()) and moved[0].abs().max() > 0


def test_what_it_cannot_train_is_refused():
    class ByHand(Rings):
        automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="ByHand optimizes by hand .* in a plain loop"):
        fit(ByHand(), Shallowest(target=0.1), 1)
    for average in (pl.callbacks.EMAWeightAveraging(), pl.callbacks.StochasticWeightAveraging(0.1)):
        module = Rings()
        with pytest.raises(MisconfigurationException, match=f"{type(average).__name__} averages the weights"):
            trainer(1, average, Shallowest(target=0.1)).fit(module, loader(annuli(16), 16))
        assert module.model.t_f.requires_grad


def test_a_stream_of_batches_is_searched_as_their_list_is():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*annuli(32), strict=True))

    found = []
    for data in (Stream(), torch.utils.data.TensorDataset(*annuli(32))):
        torch.manual_seed(1)
        callback = Shallowest(target=0.3, solver_tol=0.2, solvers=[])
        trainer(150, callback).fit(Rings(), torch.utils.data.DataLoader(data, batch_size=32))
        found.append(callback.verdict.best.evaluations if callback.verdict.feasible else None)
    assert found[0] == found[1] is not None


class Counting(Rings):
    """Counts its samples and its accuracy by metrics."""

    def __init__(self):
        super().__init__()
        self.rows, self.right = (
            torchmetrics.SumMetric(),
            torchmetrics.classification.MulticlassAccuracy(2, average="micro"),
        )

    def training_step(self, batch, batch_idx):
        self.rows(len(batch[0]))
        self.log("rows", self.rows, on_epoch=True, on_step=False)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch):
        x, y = batch
        self.right(self.model(x, self.t_span.to(x))[1][-1][:, :2], y)
        self.log("right", self.right)


@pytest.mark.filterwarnings("ignore:right was .* counts as worse")
def test_a_metric_object_counts_each_sample_once_in_training_and_in_a_look():
    class Rows(pl.Callback):
        def on_train_epoch_end(self, run, learner):
            rows.append(run.callback_metrics["rows"].item())

    rows, looked = [], []
    torch.manual_seed(0)
    module, callback, kept = Counting(), Shallowest(target=0.6, monitor="right", mode="max", budget=2.0), annuli(40)
    measure = callback._validated

    def validated(run, learner):
        value = measure(run, learner)
        with torch.no_grad():
            wanted = (learner.model(kept[0], learner.t_span)[1][-1][:, :2].argmax(1) == kept[1]).float().mean().item()
        looked.append((-value, wanted))
        return value

    callback._validated = validated
    trainer(1000, Rows(), callback).fit(module, loader(annuli(64), 16), [loader(kept, 16)])
    assert set(rows[:-1]) == {64.0} and len(looked) > 1
    assert [a for a, _ in looked] == pytest.approx([b for _, b in looked])


@pytest.mark.filterwarnings("ignore:right was .* counts as worse")
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_validation_metric_is_looked_at_in_the_precision_of_the_trainer(precision):
    torch.manual_seed(0)
    options = dict(solvers=[], solver_tol=10.0, budget=1.0)  # half of the budget is late enough to settle
    module, callback = Counting(), Shallowest(target=0.0, monitor="right", mode="max", **options)
    run = trainer(1000, callback, precision=precision)
    run.fit(module, loader(annuli(32), 32), loader(annuli(32), 16))
    assert callback.verdict.feasible


def test_of_several_validation_loaders_the_named_one_is_looked_at_as_far_as_the_trainer_does():
    class Two(Rings):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            seen.append((dataloader_idx, batch_idx))
            self.log("val", float(dataloader_idx))

    options = dict(solvers=[], solver_tol=10.0, budget=1.0)
    seen, callback = [], Shallowest(target=1.0, monitor="val/dataloader_idx_1", **options)
    run = trainer(1000, callback, limit_val_batches=2, num_sanity_val_steps=0, check_val_every_n_epoch=1000)
    run.fit(Two(), loader(annuli(32), 32), [loader(annuli(16), 4), loader(annuli(16), 4)])
    assert set(seen) == {(0, 0), (0, 1), (1, 0), (1, 1)} and callback.verdict.best.loss == 1.0


class Watched(Rings):
    """Logs its accuracy and loss on other data."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x, self.t_span)[1][-1][:, :2]
        self.log("accuracy", (logits.argmax(1) == y).float().mean())
        self.log_dict({"val_loss": torch.nn.functional.cross_entropy(logits, y)})


@pytest.mark.parametrize(("monitor", "mode", "target"), [("val_loss", "min", 0.4), ("accuracy", "max", 0.8)])
def test_a_validation_metric_is_kept_in_the_place_of_the_training_loss(monitor, mode, target):
    torch.manual_seed(0)
    module = Watched()
    callback = Shallowest(target=target, monitor=monitor, mode=mode, solver_tol=0.3, solvers=[])
    run, kept = trainer(600, callback), annuli(48)
    run.fit(module, loader(annuli(64), 64), loader(kept, 16))
    verdict = callback.verdict
    assert verdict.feasible and verdict.best.evaluations <= 16
    sign = -1 if mode == "max" else 1
    assert verdict.target == sign * target and verdict.best.loss <= sign * target
    with torch.no_grad():
        logits = module.model(kept[0])[1][-1][:, :2]
    own = (
        (logits.argmax(1) == kept[1]).float().mean()
        if mode == "max"
        else torch.nn.functional.cross_entropy(logits, kept[1])
    )
    assert f"{monitor} {sign * verdict.best.loss:.4g} and" in str(verdict) and f"(target {target:g})" in str(verdict)
    # The mean of three batches is that of all samples, to rounding.
    assert sign * own.item() == pytest.approx(verdict.best.loss, abs=1e-5)


def test_a_metric_that_is_not_logged_is_named():
    module = Watched()
    with pytest.raises(MisconfigurationException, match="monitor='val_los' was not logged by validation_step"):
        trainer(1, Shallowest(monitor="val_los")).fit(module, loader(annuli(16), 16), loader(annuli(16), 16))
    assert "log" not in vars(module) and module.model.t_f.requires_grad
    with pytest.raises(ValueError, match="mode must be 'min' or 'max'; got 'most'"):
        Shallowest(monitor="accuracy", mode="most")


class Reducing(Rings):
    """Logs figures of each sample's loss in all the ways that a Trainer takes. Its batches begin with what is no tensor."""

    def __init__(self):
        super().__init__()
        self.optimizer = lambda p: torch.optim.SGD(p, 0.0)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [["a name"], *batch] if len(batch) == 2 and not self.trainer.training else batch

    def validation_step(self, batch, batch_idx):
        *_, x, y = batch
        losses = torch.nn.functional.cross_entropy(self.model(x)[1][-1][:, :2], y, reduction="none")
        mean, size = losses.mean(), 50 if batch_idx == 0 else 3
        self.log("mean", mean)
        self.log("mean by place", mean, False, None, None, None, "AVG")
        self.log("weighted", mean, batch_size=size)
        self.log_dict(dictionary={"weighted in a dict": mean, "besides": 0.0}, reduce_fx=torch.mean, batch_size=size)
        self.log("max", losses.max(), reduce_fx="max", batch_size=size)
        self.log("min", losses.min(), reduce_fx=torch.min)
        self.log("sum", losses.sum(), reduce_fx=sum)
        for value in (losses.max(), losses.min()):
            self.log("twice in a step", value)


@pytest.mark.parametrize(
    "monitor",
    ["mean", "mean by place", "weighted", "weighted in a dict", "max", "min", "sum", "twice in a step"],
)
def test_the_metric_is_the_number_that_the_trainer_holds(monitor):
    torch.manual_seed(0)
    callback, looked = Shallowest(target=0.1, monitor=monitor), []
    measure = callback._validated
    callback._validated = lambda run, learner: looked.append(measure(run, learner)) or looked[-1]
    run = trainer(1, callback, num_sanity_val_steps=0)
    run.fit(Reducing(), loader(annuli(16), 16), loader(annuli(10), 4))  # a last batch of two
    assert looked == [pytest.approx(run.callback_metrics[monitor].item(), rel=1e-6)]


@pytest.mark.parametrize("reduce_fx", ["median", torch.median])
def test_a_metric_that_no_trainer_takes_is_named(reduce_fx):
    class Median(Rings):
        def validation_step(self, batch, batch_idx):
            self.log("val", self.loss(*batch), reduce_fx=reduce_fx)

    run, data = trainer(1, Shallowest(monitor="val"), num_sanity_val_steps=0), loader(annuli(8), 8)
    with pytest.raises(
        MisconfigurationException, match="'val' is logged with reduce_fx=.*median.*; Lightning takes 'mean'"
    ):
        run.fit(Median(), data, data)


class Collecting(Rings):
    """Keeps what its steps find in lists and a dict until the end of the epoch, as Lightning's guide does."""

    def __init__(self):
        super().__init__()
        self.trained, self.validated, self.of_loader, self.last, self.counts = [], [], {0: []}, {}, []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch_idx)
        self.of_loader[0].append(batch_idx)
        self.last[batch_idx] = self.global_step
        self.log("val", self.loss(*batch))

    def on_validation_epoch_end(self):
        self.end(self.validated, self.of_loader[0], self.last)

    def on_train_epoch_end(self):
        self.end(self.trained)

    def end(self, *found):
        for mine in found:
            self.counts.append(list(mine))
            mine.clear()


def test_what_steps_collect_for_the_end_of_the_epoch_is_of_each_batch_once():
    torch.manual_seed(0)
    module, callback = Collecting(), Shallowest(target=0.1, monitor="val")
    run = trainer(4, callback, num_sanity_val_steps=0)
    run.fit(module, loader(annuli(16), 4), loader(annuli(16), 4))
    assert module.counts == [[0, 1, 2, 3]] * 16 and len(module.losses) == 16


def test_without_a_target_the_loss_settles():
    torch.manual_seed(0)
    module, callback = Rings(), Shallowest(slack=0.5, solvers=[], budget=1.0)  # half of it is late enough to settle
    fit(module, callback, 1000, n=32)
    assert callback.verdict.feasible and callback.verdict.target == callback.search.target > 0


def test_a_second_fit_with_the_same_callback_is_as_a_first_one():
    found, callback = [], Shallowest(target=0.3, solver_tol=0.2)
    for _ in range(2):
        torch.manual_seed(0)
        module = Rings()
        fit(module, callback, 60, n=32)
        found.append((without_seconds(callback.verdict), [p.detach().clone() for p in module.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    fit(module, callback, 60, n=32)  # on the model that it has found, too
    assert callback.verdict.feasible


def test_ctrl_c_gives_back_the_best_model_so_far():
    def stop(learner, batch_idx):
        if len(callback.search.trials) == 3:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    callback = Shallowest(target=0.3, solver_tol=0.2)
    module = Rings(stop)
    # Lightning ends the process, in newer versions.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        fit(module, callback, 400, n=32)
    assert callback.verdict.feasible and "training_step" not in vars(module) and module.model.t_f.requires_grad
    module.model(torch.randn(4, 3))
    assert module.model.nfe == callback.verdict.best.evaluations == 8


def test_a_search_that_has_ended_is_not_started_again(tmp_path):
    torch.manual_seed(0)
    module, callback = Rings(), Shallowest(target=0.5, solver_tol=0.5, solvers=[])
    run = fit(module, callback, 1500)
    assert callback.verdict.feasible
    run.save_checkpoint(tmp_path / "c.ckpt")
    again, other = Rings(), Shallowest(target=0.5, solver_tol=0.5, solvers=[])
    fit(again, other, 1500, path=tmp_path / "c.ckpt")
    assert without_seconds(other.verdict) == without_seconds(callback.verdict)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_two_processes_search_alike_and_learned_solvers_take_the_mean_of_their_gradients(tmp_path):
    first, second = on_two_ranks(Path(__file__).with_name("search_on_ranks.py"), tmp_path, timeout=300)
    assert first["found"] == second["found"] and first["found"][0]
    assert first["seen"] == second["seen"] and len({label for label, *_ in first["seen"]}) > 2
    assert len(first["gradients"]) == len(second["gradients"]) > 5
    for (a, mean), (b, other) in zip(first["gradients"], second["gradients"], strict=True):
        assert mean == other and a != b  # each process has other data
        for x, y, z in zip(a, b, mean, strict=True):
            # The means are taken in the gradients' own type, of float64 or float32.
            torch.testing.assert_close((torch.tensor(x) + torch.tensor(y)) / 2, torch.tensor(z), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_failed_solve_lowers_the_learning_rate_though_it_fails_inside_the_optimizers_step():
    class Failing(Rings):
        def training_step(self, batch, batch_idx):
            if self.current_epoch in (30, 31):
                raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")
            return super().training_step(batch, batch_idx)

    class Rates(pl.Callback):
        def on_train_batch_end(self, run, *_):
            rates.append(run.optimizers[0].param_groups[0]["lr"])

    rates = []
    torch.manual_seed(0)
    run = trainer(33, Rates(), Shallowest(target=1e-6))
    run.fit(Failing(), loader(annuli(16), 16))
    assert rates[29:33] == pytest.approx([0.03, 0.009, 0.0027, 0.0027])
    assert run.optimizers[0].param_groups[0]["lr"] == 0.03  # given back


def test_looks_are_in_the_precision_of_the_trainer():
    class Seen(Rings):
        def training_step(self, batch, batch_idx):
            seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return super().training_step(batch, batch_idx)

    seen = set()
    trainer(12, Shallowest(target=5.0), precision="bf16-mixed").fit(Seen(), loader(annuli(16), 16))
    assert seen == {(True, True), (False, True)}


def test_a_look_goes_through_the_validation_as_the_trainer_does():
    """Streams, loaders that are gone through together, and what a LightningDataModule does to batches."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*annuli(8), strict=True))

    class Together(Rings):
        def validation_step(self, batch, batch_idx):
            seen.append((sorted(batch), batch_idx, batch["a"][0].mean().item()))
            self.log("val", self.loss(*batch["a"]))

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(annuli(16), 16)

        def val_dataloader(self):
            stream = torch.utils.data.DataLoader(Stream(), batch_size=4)
            return CombinedLoader({"a": loader(annuli(12), 4), "b": stream}, "min_size")

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch if isinstance(batch, list) else {**batch, "a": [batch["a"][0] * 0 + 7, batch["a"][1]]}

    seen, callback = [], Shallowest(target=1.0, monitor="val")
    trainer(1, callback, num_sanity_val_steps=0, limit_val_batches=1).fit(Together(), datamodule=Data())
    assert seen[0] == seen[-1] == (["a", "b"], 0, 7.0) and len(seen) == 2  # before the training, and the Trainer's own


def test_wrapped_metrics_are_kept_apart_too():
    class Many(Counting):
        def __init__(self):
            super().__init__()
            self.classes = torchmetrics.ClasswiseWrapper(
                torchmetrics.classification.MulticlassAccuracy(2, average=None)
            )
            self.two = torchmetrics.SumMetric() + torchmetrics.SumMetric()
            self.listed = torchmetrics.CatMetric()

    module = Many()
    module.classes.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    module.two.update(1.5)
    module.listed.update(torch.tensor([1.0, 2.0]))
    before = module.classes.compute(), module.two.compute(), module.listed.compute().tolist()
    with metrics_apart(module):
        module.classes.update(torch.tensor([1, 1]), torch.tensor([0, 0]))
        module.two.update(3.0)
        module.listed.update(torch.tensor([3.0]))
        assert module.two.compute() == 6.0 and module.listed.compute().tolist() == 3.0
    for metric in (module.classes, module.two, module.listed):
        metric._computed = None  # what is counted, not what was computed before
    assert (module.classes.compute(), module.two.compute(), module.listed.compute().tolist()) == before


def test_the_gradients_of_learned_solvers_are_unscaled_as_those_of_the_weights():
    """Of gradients that are scaled by 1,024 an optimizer without momentum would take other steps."""

    def moved(scaled):
        torch.manual_seed(1)
        module, seen = Rings(), []
        module.optimizer = lambda p: torch.optim.SGD(p, 0.03)

        class Watch(pl.Callback):
            def on_before_optimizer_step(self, run, learner, optimizer):
                if isinstance(learner.model.solver, tm.LearnableSolver):
                    seen.append(learner.model.solver.free.grad.clone())
                    run.should_stop = True

        callback = Shallowest(target=0.4, solver_tol=0.2)
        plugins = [Scaled()] if scaled else []
        run = trainer(300, callback, Watch(), plugins=plugins)
        run.fit(module, loader(annuli(32), 32))
        return seen[0]

    class Scaled(pl.plugins.MixedPrecision):
        """The scaler alone, without autocast, so that the two trainings are the same."""

        def __init__(self):
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6))

        def forward_context(self):
            return contextlib.nullcontext()

    torch.testing.assert_close(moved(True), moved(False), rtol=1e-4, atol=1e-6)


def test_the_length_of_a_streams_pass_is_in_the_checkpoint(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*annuli(32), strict=True))

    class Passes(pl.Callback):
        def on_train_batch_end(self, run, *_):
            (callback,) = (c for c in run.callbacks if isinstance(c, Shallowest))
            seen.append(callback.search.batches_seen_together)

    seen, data = [], torch.utils.data.DataLoader(Stream(), batch_size=16)
    run = trainer(2, Shallowest(target=1e-6), Passes())
    run.fit(Rings(), data)
    run.save_checkpoint(tmp_path / "c")
    trainer(3, Shallowest(target=1e-6), Passes()).fit(Rings(), data, ckpt_path=tmp_path / "c", weights_only=True)
    assert seen == [1000, 1000, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.03, 2),  # of two steps, after which it raises
        lambda o: {"scheduler": torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.01 * i), "interval": "step"},
    ],
)
def test_learning_rate_schedulers_rest_while_it_searches(schedule):
    class Scheduled(Rings):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)}

    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx):
            rates.append(run.optimizers[0].param_groups[0]["lr"])

    torch.manual_seed(0)
    module, callback = Scheduled(), Shallowest(target=0.1)
    run = trainer(5, callback)
    run.callbacks.append(Watch())
    with pytest.warns(UserWarning, match="does not step"):
        run.fit(module, loader(annuli(64), 64))
    assert rates == pytest.approx([0.03] * 5)
    assert [config.frequency for config in run.lr_scheduler_configs] == [1]
