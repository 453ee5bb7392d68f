"""The paper's tables and figures as commands, each with its controls.

| file | holds |
|---|---|
| ``names`` | the names of tasks and methods, with the line that ``--help`` prints for each |
| ``datasets`` | the data sets |
| ``models`` | the networks: a NeuralODE with the layers around it |
| ``context`` | the settings of a training, and its history |
| ``methods`` | the methods of training, and the drivers that decide the depth |
| ``results`` | medians, ranges and ratios; printing and writing of tables |
| ``measure`` | the figures of a trained model, and how they are shown |
| ``tasks`` | the tasks: data, network and published settings |
| ``training`` | the training loop |
| ``store`` | finished and unfinished runs on disk |
| ``comparison`` | the runs of one task, with its rows and controls |
| ``figures`` | the paper's figures, by number, and pictures of any trained classifier or flow |
| ``tables`` | the paper's tables, by number, and those of the command ``run`` |
| ``samplers`` | the task ``sampler-moons`` of the command ``run`` |
| ``demo`` | the command ``demo`` |
| ``compress`` | the command ``compress`` |

A file imports only files above it.
"""

__all__ = ["MissingData", "UsageError"]


class UsageError(ValueError):
    """A request that cannot be carried out. The message says what is wrong and what to do."""


class MissingData(RuntimeError):
    """A data set is not there, or damaged. The message says how to get it."""
