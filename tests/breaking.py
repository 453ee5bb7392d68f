"""Trainings that break: what the tests of the experiments put in the place of a driver or a term of the loss."""

import math

import torch

from torchdyn_mintime.experiments.methods import Driver


class Spoiled(Driver):
    """Leaves weights that are NaN after the second iteration."""

    def after_step(self, loss):
        if len(self.run.history.loss) > 1:
            with torch.no_grad():
                next(self.run.model.node.vf.parameters()).fill_(math.nan)
        return ""


def steep(model, settings):
    """A term that is 0, and from the second iteration on of an infinite slope."""
    return lambda step: (model.node.t_f - model.node.t_f.item()).sqrt() if step.iteration else 0.0
