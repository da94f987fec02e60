"""What a user can cause, and the exit code each has on the command line.

Every message says what was wanted, what was found (file, row, column), and the next command. Raised once, never logged and raised.
"""


class CurateError(Exception):
    """Something failed that the user can do something about. Exit code 1."""

    exit_code = 1


class UsageError(CurateError):
    """Wrong use of a command, or a wrong recipe. Exit code 2."""

    exit_code = 2


class ValidationError(CurateError):
    """Rows that are not what their kind needs: names file, row, column, and what was found."""


class ModelError(CurateError):
    """A model, tokenizer or checkpoint that cannot be read or used."""


class BrokenCheckpoint(ModelError):
    """A checkpoint whose files are missing, cut short or unreadable: of a run, it can be left out (models.on_broken_checkpoint)."""


class OtherLayout(BrokenCheckpoint):
    """A folder that holds training state or weights in another format: whole, perhaps, but nothing that is loaded as it is."""


class EngineError(CurateError):
    """A sampling engine or server that cannot start, cannot serve this model, or died."""


class StoreError(CurateError):
    """A store that is locked, damaged, full, or of another version."""
