"""The errors that reach a user, each with its exit code.

0 done; 1 unexpected failure; 2 usage or invalid recipe; 3 a quality gate failed;
4 model or data not found or unreadable; 130 interrupted; 143 terminated.
"""


class VtwError(Exception):
    """A failure told in one line: what is wrong (``message``) and what to do about it (``hint``)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(VtwError):
    """Wrong options, an invalid recipe or schedule, or an output that would be overwritten."""

    exit_code = 2


class GateError(VtwError):
    """The work was done and its result written, but the result is not good enough."""

    exit_code = 3


class NotFoundError(VtwError):
    """A model or data set that is missing, unreachable, unreadable or unsupported."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next where it ends in a colon; its type where there is no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def typed_line(error: BaseException) -> str:
    """An error's type and its ``first_line``; the type alone where there is no text."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"
