"""Result documents as runs of an experiment tracker, where its library is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vtwcli.errors import UsageError, VtwError, typed_line
from vtwcli.machine.libraries import quiet_libraries

TRACKERS = ("trackio", "wandb", "tensorboard")
PROJECT = "vtwcli"
_NOT_NUMBERS = ("options", "versions", "samples", "maps", "data", "skipped", "schedule")


def check_tracker(name: str) -> None:
    """Refuse, before long work, a tracker that is not known or not installed.

    Raises:
        UsageError: it is not.
    """
    if name not in TRACKERS:
        raise UsageError(f"--track: {name!r} is not a tracker", f"one of {', '.join(TRACKERS)}")
    if find_spec(name) is None:
        raise UsageError(f"--track {name}: it is not installed", f"pip install {name}")


def track(tracker: str, document: Mapping[str, Any]) -> None:
    """Log a result as one run: its numbers, and its curves with the layer as the step.

    wandb and trackio take their project from ``WANDB_PROJECT`` and ``TRACKIO_PROJECT`` where these are set;
    tensorboard writes below ``runs``, or where ``TENSORBOARD_LOGDIR`` says.

    Args:
        tracker: one of ``TRACKERS``.
        document: of calibrate, analyze, budget or eval.

    Raises:
        VtwError: the tracker's library fails.
    """
    kind = str(document["format"]).removeprefix("vtw-")
    model = str(document["model"]["name"]).rstrip("/").rsplit("/", 1)[-1]
    name, numbers, curves = f"{kind} {model}", dict(scalars(document)), dict(series(document))
    try:
        with quiet_libraries(), redirect_stdout(sys.stderr):  # results alone go to stdout
            if tracker == "tensorboard":
                _to_tensorboard(name, numbers, curves)
            else:
                _to_service(tracker, name, document, numbers, curves)
    except Exception as error:  # a library of its own, which reaches for servers of its own
        raise VtwError(f"--track {tracker}: {typed_line(error)}", "the result itself is written") from error


def scalars(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a document that stands alone, by its keys joined with ``/``."""
    for key, value in document.items():
        if not prefix and key in _NOT_NUMBERS:
            continue
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def series(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[float | None]]]:
    """Every list of numbers of a document (most run over the layers), by its keys joined with ``/``."""
    for key, value in document.items():
        if not prefix and key in _NOT_NUMBERS:
            continue
        if isinstance(value, Mapping):
            yield from series(value, f"{prefix}{key}/")
        elif _is_curve(value):
            yield f"{prefix}{key}", value


def _is_curve(value: object) -> bool:
    if not isinstance(value, list) or len(value) < 3 or not any(isinstance(one, float) for one in value):
        return False
    return all(one is None or isinstance(one, int | float) for one in value)


def _to_tensorboard(name: str, numbers: dict[str, float], curves: dict[str, list[float | None]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    folder = os.environ.get("TENSORBOARD_LOGDIR", "runs")
    with SummaryWriter(os.path.join(folder, name.replace(" ", "-"))) as writer:  # noqa: PTH118
        for key, value in numbers.items():
            writer.add_scalar(key, value)
        for key, values in curves.items():
            for step, one in enumerate(values):
                if one is not None:
                    writer.add_scalar(key, one, step)


def _to_service(
    tracker: str,
    name: str,
    document: Mapping[str, Any],
    numbers: dict[str, float],
    curves: dict[str, list[float | None]],
) -> None:
    module = import_module(tracker)
    project = os.environ.get(f"{tracker.upper()}_PROJECT", PROJECT)
    options = {"model": document["model"]["name"], **document.get("options", {})}
    module.init(project=project, name=name, config=options)
    for step in range(max(map(len, curves.values()), default=0)):
        here = {key: values[step] for key, values in curves.items() if step < len(values)}
        module.log({key: one for key, one in here.items() if one is not None}, step=step)
    module.log(numbers)
    module.finish()
