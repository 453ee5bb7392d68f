"""What the command line shows as a message alone; every other error is a defect and keeps its traceback."""

__all__ = ["UsageError"]


class UsageError(ValueError):
    """A request that cannot be carried out. The message says what is wrong and what to do."""
