"""One sample's profile: the numbers of a document that come from one walk through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtwcli.data.sample import Sample
from vtwcli.io import console
from vtwcli.measure.withdrawn import Measured, exact, measured_of
from vtwcli.models.geometry import token_boxes
from vtwcli.models.inputs import Encoded
from vtwcli.models.loading import LoadedModel
from vtwcli.recipe.recipe import AnalyzeSection
from vtwcli.results.analysis import TokenMap
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.probes import LastRow
from vtwcli.sweep.sweep import ItemResult


@dataclass(frozen=True)
class Profile:
    """One sample's part, plain numbers only, so that processes can pass it on.

    Attributes:
        calibration: withdrawal at every layer.
        curves: the KL curves but withdrawal's, each the mean over compared positions, by name [L].
        positions: the same by compared position, [L][R].
        layers: the last row's measures, by layer; None where there is nothing to measure.
        critical: critical tokens of each layer, counted among the sample's visual tokens.
        kept_minimum: [L][L], see ``visipruner.filter_and_exit``.
        lens: most likely tokens of each layer's last row, with their probabilities, [L][N].
        map: attention and contribution at the shown layers with the tokens' boxes, for shown samples.
    """

    calibration: Measured
    curves: dict[str, list[float]]
    positions: dict[str, list[list[float]]]
    layers: dict[str, list[Any]]
    critical: list[list[int]]
    kept_minimum: list[list[float]]
    lens: list[list[tuple[str, float]]]
    map: TokenMap | None = None


def interventions(depth: int, window: int, freeze: bool) -> dict[str, list[Intervention]]:
    """By curve, what is tried at each layer."""
    layers = range(depth)
    found = {
        "withdrawal": [Intervention("withdraw", d) for d in layers],
        "knockout_layer": [Intervention("mute", d, d + 1) for d in layers],
        "knockout_window": [Intervention("mute", d, d + window) for d in range(depth - window + 1)],
        "knockout_until": [Intervention("mute", 0, d + 1) for d in layers],
    }
    if freeze:
        found["layer_update"] = [Intervention("freeze", d, d + 1) for d in layers]
    return found


def profile_of(
    loaded: LoadedModel,
    outcome: ItemResult,
    prompt: Encoded,
    rows: Sequence[LastRow],
    lens: Tensor | None,
    curves: dict[str, list[int]],
    options: AnalyzeSection,
) -> Profile:
    """One sample's numbers.

    Args:
        lens: logits of each layer's last row, [L, V].
        curves: by name, the places of its interventions in the outcome.
    """
    depth = len(rows)
    first = replace(outcome, kl=outcome.kl[:depth], agree=outcome.agree[:depth])
    if not outcome.visual:
        return Profile(measured_of(first, prompt), {}, {}, {}, [], [], [])
    critical = [(row.contribution > options.tokens_threshold).nonzero()[:, 0] for row in rows]
    cosine = torch.stack([row.cosine for row in rows])
    layers: dict[str, list[Any]] = {
        f"attention_{name}": [_short(row.masses[name]) for row in rows] for name in rows[0].masses
    }
    layers["entropy"] = [_short(row.entropy) for row in rows]
    layers["value_norm"] = [_mean(row.value_norms[~row.sinks]) for row in rows]
    layers["value_norm_sinks"] = [_mean(row.value_norms[row.sinks]) for row in rows]
    layers["sinks"] = [int(row.sinks.sum()) for row in rows]
    layers["minimum_cosine"] = exact(cosine.amin(1))
    layers["critical"] = [len(tokens) for tokens in critical]
    words: list[list[tuple[str, float]]] = []
    if lens is not None:
        layers["lens_agreement"] = (lens.argmax(-1).cpu() == outcome.top1[0]).float().tolist()
        top = lens.cpu().double().softmax(-1).topk(min(options.lens, lens.shape[1]))
        decode = loaded.processor.tokenizer.decode
        words = [
            [(decode([token]), _short(p)) for token, p in zip(tokens, shares, strict=True)]
            for tokens, shares in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
    kl = {name: outcome.kl[places] for name, places in curves.items() if name != "withdrawal"}
    return Profile(
        calibration=measured_of(first, prompt),
        curves={name: [_short(x) for x in curve.mean(1).tolist()] for name, curve in kl.items()},
        positions={name: [exact(row) for row in curve.tolist()] for name, curve in kl.items()},
        layers=layers,
        critical=[tokens.tolist() for tokens in critical],
        kept_minimum=[
            exact(cosine[:, tokens].amin(1).tolist()) if len(tokens) else [] for tokens in critical
        ],
        lens=words,
    )


def map_of(
    loaded: LoadedModel, sample: Sample, prompt: Encoded, rows: Sequence[LastRow], layers: Sequence[int]
) -> TokenMap | None:
    """Attention and contribution of every visual token at the shown layers; None where its place is not known."""
    visual = len(rows[0].attention)
    boxes = token_boxes(loaded, sample.images, prompt.inputs, visual)
    if boxes is None:
        console.note(
            f"{loaded.family.title}: where tokens lie in the image is not known; no heat map of {sample.id}"
        )
        return None
    return {
        "layers": list(layers),
        "attention": [[_short(x) for x in rows[d].attention.tolist()] for d in layers],
        "contribution": [[_short(x) for x in rows[d].contribution.tolist()] for d in layers],
        "boxes": [None if box is None else [image, *(round(x, 6) for x in box)] for image, box in boxes],
    }


def _short(x: float) -> float:
    """Six digits: what a 32-bit forward knows, and no more."""
    return float(f"{x:.6g}")


def _mean(x: Tensor) -> float | None:
    return _short(float(x.mean())) if len(x) else None
