"""What the graphs' runtime raises, as the errors of vtw: it travels without this package and has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vtwcli import errors, ort


@contextmanager
def as_vtw_errors() -> Iterator[None]:
    """Around, or as a decorator of, what runs graphs: their errors become those with vtw's exit codes.

    Raises:
        UsageError: inputs that do not fit the model, or a device that is not there.
        NotFoundError: an export that is missing or broken, or logits that are not finite.
    """
    try:
        yield
    except ort.UsageError as error:
        raise errors.UsageError(str(error)) from error
    except ort.OnnxError as error:
        raise errors.NotFoundError(str(error)) from error
