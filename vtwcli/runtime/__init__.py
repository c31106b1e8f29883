"""Executes a schedule on a transformers model; exported models carry the other files of this folder, see ``pruning``.

from vtwcli.runtime import pruned

with pruned(model, 16):  # or a Schedule, or its dict
    model.generate(**inputs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vtwcli.models.families import family_of, placeholder_ids
from vtwcli.runtime import pruning
from vtwcli.runtime.cache import PrunedLayer, entries
from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.pruning import Pruning, remove
from vtwcli.runtime.trace import ActionTrace, LayerTrace, SampleTrace, Trace
from vtwcli.schedule.rules import in_front
from vtwcli.schedule.schedule import Keep, Schedule, Withdraw

__all__ = [
    "ActionTrace", "LayerTrace", "PrunedLayer", "Pruning", "PruningError", "SampleTrace", "Trace", "apply",
    "entries", "layout_of", "pruned", "remove",
]  # fmt: skip

AnySchedule = Schedule | Mapping[str, Any] | int


def layout_of(config: Any) -> dict[str, Any]:
    """Where a family keeps its parts, as ``pruning`` wants it and as an exported config carries it.

    Args:
        config: the transformers config of the whole model.

    Raises:
        NotFoundError: no row of the family table has the config's ``model_type``.
    """
    family = family_of(config)
    return {
        "text_model": family.text_model,
        "placeholder_ids": list(placeholder_ids(family, config)),
        "first_withdrawal": family.first_withdrawal,
    }


def apply(model: torch.nn.Module, schedule: AnySchedule) -> Pruning:
    """Run ``schedule`` on every call of ``model`` from now on; ``remove`` undoes it.

    Args:
        model: a stock transformers model of a supported family.
        schedule: a ``Schedule``, its plain dict, or a withdrawal layer.

    Raises:
        NotFoundError: the family is not supported.
        UsageError: the schedule is malformed or does not fit the model's depth.
        PruningError: the schedule cannot be executed on this model.
    """
    if isinstance(schedule, int):
        schedule = Schedule.withdraw_at(schedule)
    elif not isinstance(schedule, Schedule):
        schedule = Schedule.from_dict(dict(schedule))
    config: Any = model.config
    family, layout = family_of(config), layout_of(config)
    depth = config.get_text_config().num_hidden_layers
    schedule.check_depth(depth, layout["first_withdrawal"])
    if family.no_withdraw and any(isinstance(action, Withdraw | Keep) for action in schedule.actions):
        raise PruningError(f"{family.title}: visual tokens cannot leave: {family.no_withdraw}")
    if family.no_tower and any(in_front(action) for action in schedule.plain()):
        raise PruningError(f"{family.title}: no scores of the vision tower: {family.no_tower}")
    return pruning.apply(model, schedule.to_dict(), layout)


@contextmanager
def pruned(model: torch.nn.Module, schedule: AnySchedule) -> Iterator[Pruning]:
    """Run ``schedule`` on ``model`` inside a ``with`` block; arguments and errors as ``apply``.

    Yields the ``Pruning``; its ``trace`` tells what happened to the last prompt. Every hook is gone afterwards,
    also after an exception.
    """
    yielded = apply(model, schedule)
    try:
        yield yielded
    finally:
        remove(model)
