"""The KL curve of a live model on tensors at hand: no sections, no files, no data sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vtwcli.errors import NotFoundError
from vtwcli.judge import policies
from vtwcli.models.families import family_of
from vtwcli.recipe.recipe import CalibrateSection, Policy
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.sweep import SweepItem, sweep

_DEFAULTS = CalibrateSection()


@dataclass(frozen=True, eq=False)
class Curve:
    """What withdrawing visual tokens at each layer changes.

    Attributes:
        layer: K by the policy, or None where no layer qualifies.
        kl: KL(P_pruned ‖ P_full) in nats by sample and withdrawal layer, mean over the compared positions, [N, L].
        agreement: share of compared positions whose most likely token is the full model's, [N, L].
        positions: KL by sample, layer and compared position, [N][L, R].
    """

    layer: int | None
    kl: NDArray[np.float64]
    agreement: NDArray[np.float64]
    positions: list[NDArray[np.float64]]

    @property
    def mean(self) -> NDArray[np.float64]:
        """KL by withdrawal layer, mean over samples, [L]."""
        return self.kl.mean(axis=0)

    @property
    def schedule(self) -> Schedule | None:
        """Withdrawal at ``layer``; None where no layer qualifies."""
        return None if self.layer is None else Schedule.withdraw_at(self.layer)


def curve(
    model: torch.nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    answers: int = 0,
    eta: float = _DEFAULTS.eta,
    policy: Policy = "sustained",
    min_layer: int | None = None,
) -> Curve:
    """Find K for a model that is loaded already, in one pass over its layers (VTW, arXiv 2405.05803).

    Args:
        model: a stock transformers model of a supported family, in evaluation mode, with sdpa or eager attention.
        inputs: what its processor returns, one batch or several, with either padding; prompts, or prompts with
            the same number of answer tokens behind each.
        answers: number of answer tokens at the end of every row. The positions compared are those that predict
            them and the token behind; with 0 the next token behind the prompt.
        eta: KL threshold in nats.
        policy: as for ``vtw calibrate``, but ``budget``, ``worst-task`` and ``guarantee``, which need
            more than tensors.
        min_layer: first candidate; by default 5 for 16 layers and more, else 1.

    Raises:
        NotFoundError: the family is not supported, or no row has a visual token.
        UsageError: a row without text behind its image, or a family that cannot be swept.
        ValueError: a policy that needs tasks or costs, or more answer tokens than a row has.
    """
    if policy in ("budget", "worst-task", "guarantee"):
        raise ValueError(f"policy {policy!r} needs costs or tasks; use vtwcli.calibrate")
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    source = Resident(model, family_of(model.config))
    interventions = [Intervention("withdraw", k) for k in range(source.depth)]
    items = [SweepItem(batch, compared(batch, answers)) for batch in batches]
    found = [one for one in sweep(source, items, interventions) if one.visual]
    if not found:
        raise NotFoundError("no row has a visual token, so there is nothing to withdraw", "add images")
    kl = np.stack([one.kl.mean(1).cpu().numpy() for one in found])
    agree = np.stack([one.agree.double().mean(1).cpu().numpy() for one in found])
    default = policies.default_min_layer(source.depth)
    least = max(default if min_layer is None else min_layer, source.family.first_withdrawal)
    rule = policies.Rule(policy, eta, least, _DEFAULTS.quantile, _DEFAULTS.agreement)
    layer = policies.choose(rule, kl, agree, [""] * len(found))
    return Curve(layer, kl, agree, [one.kl.cpu().numpy() for one in found])


def compared(batch: Mapping[str, Any], answers: int = 0) -> torch.Tensor:
    """The last ``answers`` + 1 positions of every row that are not padding, [B, answers + 1]."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask
    if int(real.sum(1).min()) <= answers:
        raise ValueError(f"answers is {answers}, and the shortest row has {int(real.sum(1).min())} tokens")
    place = torch.arange(ids.shape[1], device=ids.device)
    last = (real.bool() * (place + 1)).argmax(1)
    return last[:, None] + torch.arange(-answers, 1, device=ids.device)
