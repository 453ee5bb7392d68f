"""The paper's tables and figures as commands, each with its controls.

| file | holds |
|---|---|
| ``names`` | what ``--help`` says of each task and method |
| ``datasets`` | the data sets |
| ``models`` | the networks: a NeuralODE with what comes before and after it |
| ``context`` | how a model is trained, and what its training shows of itself |
| ``methods`` | by which method a model is trained, and who decides the depth |
| ``results`` | medians, ranges and ratios; printing and writing of tables |
| ``measure`` | how a trained model is judged, and how that is shown |
| ``tasks`` | on what a model is trained: data, network and published settings |
| ``training`` | the training loop |
| ``store`` | finished and unfinished runs on disk |
| ``comparison`` | one task with its rows and controls, as tables and runs need it |
| ``figures`` | the paper's figures, by number, and what any trained classifier or flow looks like |
| ``tables`` | the paper's tables, by number, and those of the command ``run`` |
| ``demo`` | the command of this name |
| ``compress`` | the command of this name |

A file imports only those above it.
"""

__all__ = ["MissingData", "UsageError"]


class UsageError(ValueError):
    """A request that cannot be carried out. The message says what is wrong and what to do."""


class MissingData(RuntimeError):
    """A data set is not at hand; the message says how to get it."""
