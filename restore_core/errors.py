"""Every exception that this project raises on purpose. Anything else that escapes is a bug and keeps its traceback."""

from typing import Literal

ErrorClass = Literal[
    "not_an_image",
    "truncated",
    "too_large",
    "unsupported",
    "decode",
    "out_of_memory",
    "model",
    "encode",
    "read",
    "write",
    "vanished",
    "denied",
]
"""The closed list of reasons in the ledger's `error` column."""


class UsageError(Exception):
    """An option or input that cannot work. One line: the option, its value, and what to do. Exit code 2."""


class ItemError(Exception):
    """One object could not be handled; it becomes a `failed` row of the ledger and the job goes on.

    Attributes:
        error: one of `ErrorClass`.
        message: what happened, one line, without secrets.
        others_too: others would fail like it, since the storage or the way to it does.
    """

    def __init__(self, error: ErrorClass, message: str, *, others_too: bool = False) -> None:
        super().__init__(f"{error}: {message}")
        self.error: ErrorClass = error
        self.message = message
        self.others_too = others_too

    def __reduce__(
        self,
    ) -> tuple[type, tuple[str, str]]:  # Exception's own pickling would call __init__ with one argument
        return ItemError, (self.error, self.message)


class StorageError(OSError):
    """The storage as a whole (not one object) cannot be used: no such bucket, no credentials, no permission."""


class DivergedError(ArithmeticError):
    """The training loss is no longer a finite number."""
