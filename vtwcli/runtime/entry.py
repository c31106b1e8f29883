"""What the arguments of a model's call tell: where the visual tokens are, and whether the schedule goes with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vtwcli.runtime.contract import PruningError, brings_vision, given_cache
from vtwcli.runtime.plan import Plan
from vtwcli.runtime.rows import Tensor


def visual_tokens(given: Mapping[str, Any], placeholders: Iterable[int]) -> Tensor | None:
    """Which tokens are visual [B, S]; None if none is. A placeholder id without vision inputs is text."""
    ids = given.get("input_ids")
    if ids is None:
        if given.get("inputs_embeds") is None:
            return None
        raise PruningError(
            "inputs_embeds do not tell where the images are; pass input_ids with the vision inputs"
        )
    if not brings_vision(given):
        return None
    visual = torch.isin(ids, torch.tensor(tuple(placeholders), device=ids.device))
    return visual if bool(visual.any()) else None


def check_labels(plan: Plan, given: Mapping[str, Any], placeholders: Iterable[int]) -> None:
    """Hold a call's labels, and the number of logits that it wants, against the schedule.

    Raises:
        PruningError: they do not go together.
    """
    labels, keep = given.get("labels"), given.get("logits_to_keep")
    measured = any(a.measured or a.at is None for a in plan.leaving)
    guessed = measured and isinstance(keep, int) and keep > 1 and given_cache(given) is not None
    if guessed and visual_tokens(given, placeholders) is not None:
        raise PruningError(
            "assisted decoding puts guessed tokens behind the prompt, so its last row is not known; "
            "generate without an assistant under a schedule with measured scores or 'auto'"
        )
    if labels is None or not plan.leaving:
        return
    visual = visual_tokens(given, placeholders)
    if visual is not None and bool(((labels[:, 1:] != -100) & visual[:, :-1].to(labels.device)).any()):
        raise PruningError(
            "a label is predicted from a visual token, which the schedule may remove; set the labels of "
            "visual tokens and of the first token behind them to -100"
        )
