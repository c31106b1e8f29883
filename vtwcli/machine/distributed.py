"""Several processes for one command: samples are split over ranks, results are gathered on all of them.

Start with ``accelerate launch -m vtwcli calibrate ...`` or ``torchrun -m vtwcli calibrate ...``; without a launcher
there is one process and nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vtwcli.errors import UsageError, VtwError, first_line

T = TypeVar("T")
_LAUNCHER = "a launcher such as torchrun sets it; without one, unset it"


def rank() -> int:
    """This process's number, 0 without a launcher.

    Raises:
        UsageError: a launcher's variables that do not fit together.
    """
    number, count = _variable("RANK", 0), size()
    if number >= count:
        raise UsageError(f"RANK is {number}, but WORLD_SIZE is {count}", _LAUNCHER)
    return number


def size() -> int:
    """Number of processes of this run."""
    return _variable("WORLD_SIZE", 1, least=1)


def local_size() -> int:
    """Number of processes of this run on this machine."""
    return _variable("LOCAL_WORLD_SIZE", 1, least=1)


def _variable(name: str, default: int, least: int = 0) -> int:
    """A number that a launcher gives."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UsageError(
            f"the environment variable {name} is {text!r}, not a number from {least} on", _LAUNCHER
        )
    return int(text)


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def local_device(device: str) -> str:
    """The device of this rank: with several CUDA devices and ``auto`` or ``cuda``, one each."""
    if size() > 1 and device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return f"cuda:{_variable('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    return device


def share(items: Sequence[T]) -> list[tuple[int, T]]:
    """This rank's items with their places in the whole list, dealt round-robin."""
    return [(i, item) for i, item in enumerate(items) if i % size() == rank()]


def gathered(work: Callable[[], dict[int, Any]]) -> list[Any]:
    """Run ``work`` on every rank and return all results in the order of their places, the same on every rank.

    A failure on one rank ends all of them with its message instead of leaving the others waiting.

    Raises:
        VtwError: another process failed or died.
    """
    if size() == 1:
        done = work()
        return [done[i] for i in sorted(done)]
    from torch import distributed

    _start()  # before the work, so that a rank that dies during it is noticed
    outcome: tuple[str, Any]
    failure: BaseException | None = None
    try:
        outcome = ("ok", work())
    except Exception as error:
        failure, outcome = error, ("failed", str(error) or type(error).__name__)
    outcomes: list[Any] = [None] * size()
    try:
        distributed.all_gather_object(outcomes, outcome)
    except RuntimeError:  # gloo reports a vanished peer only by its own low-level texts
        raise VtwError(
            f"process {rank()}: another process of this run died before it delivered its results",
            "look at the output above for its reason; memory is the usual one",
        ) from failure
    if failure is not None:
        raise failure
    for other, (state, value) in enumerate(outcomes):
        if state == "failed":
            raise VtwError(f"process {other} failed: {value}")
    merged = {place: value for _, part in outcomes for place, value in part.items()}
    return [merged[i] for i in sorted(merged)]


def _start() -> None:
    from torch import distributed

    if not distributed.is_initialized():
        try:
            distributed.init_process_group("gloo")  # results are small Python objects, also beside CUDA work
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f"the {size()} processes of this run do not find each other: {first_line(error)}", _LAUNCHER
            ) from error


def finish() -> None:
    """Wait for the process that writes, then leave; a launcher may end the run as soon as one process is gone."""
    if size() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
