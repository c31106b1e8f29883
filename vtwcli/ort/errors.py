"""What goes wrong with exported graphs. Each is a ``ValueError`` and told in one line."""

from __future__ import annotations


class OnnxError(ValueError):
    """Base of the others."""


class UsageError(OnnxError):
    """Inputs that do not fit the model, or a device that is not there."""


class NotFoundError(OnnxError):
    """An export, or a part of it, that is missing or broken."""


class NotFinite(NotFoundError):
    """Logits that are NaN or infinite.

    Attributes:
        row: of the batch.
        what: what they are, without the row.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row} of the batch: {what}")
        self.row, self.what = row, what
