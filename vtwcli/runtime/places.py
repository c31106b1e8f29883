"""Where in its image each visual token lies, for what asks for neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch

from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.rows import Tensor

_SQUARE = ("llava", "vipllava", "paligemma", "gemma3")
"""Model types whose images, or crops, are squares of tokens, row by row."""
_REFUSED = (
    "the schedule asks for neighbours of visual tokens, which is known of square images (LLaVA, PaliGemma, Gemma 3) "
    "and of Qwen's grids only; leave out 'columns: beyond'"
)


def places(visual: Tensor, given: Mapping[str, Any], config: Any) -> Tensor:
    """Image, row and column of each visual token, [B, S, 3]; -1 for all others.

    Args:
        visual: which tokens are visual, [B, S].
        given: the model's inputs, or what ``generate`` made of them: it runs the vision tower beforehand.
        config: the model's.

    Raises:
        PruningError: a model or inputs of which no grid is known.
    """
    total = int(visual.sum())
    found, tower = None, getattr(config, "vision_config", None)
    counts = _counts(given, total)
    axes: Any = given.get("position_ids")
    if not any(given.get(name) is not None for name in ("pixel_values_videos", "video_grid_thw")):
        if given.get("image_grid_thw") is not None:
            found = _grids(given["image_grid_thw"].tolist(), int(getattr(tower, "spatial_merge_size", 1)))
        elif counts and hasattr(tower, "spatial_merge_size") and getattr(axes, "ndim", 0) == 3:
            found = _from_positions(axes[-3:].permute(1, 2, 0)[visual], counts)
        elif counts and getattr(config, "model_type", None) in _SQUARE:
            square = all(isqrt(n) ** 2 == n for n in counts)
            if square and getattr(tower, "model_type", None) != "pixtral":
                found = torch.cat([_grid(i, isqrt(n), isqrt(n)) for i, n in enumerate(counts)])
    if found is None or len(found) != total:
        raise PruningError(_REFUSED)
    out = torch.full((*visual.shape, 3), -1, device=visual.device)
    out[visual] = found.to(visual.device)
    return out


def _counts(given: Mapping[str, Any], total: int) -> list[int]:
    """How many tokens each image has; empty where that is not known."""
    pixels, encoded = given.get("pixel_values"), given.get("mm_encoder_outputs")
    features = None
    if isinstance(encoded, Mapping) and set(encoded) == {"image"}:
        features = getattr(encoded["image"], "pooler_output", None)
    if isinstance(pixels, torch.Tensor) and pixels.ndim == 4:
        return [total // len(pixels)] * len(pixels)
    if isinstance(features, torch.Tensor):
        return [features.shape[1]] * len(features) if features.ndim == 3 else []
    return [len(one) for one in features] if isinstance(features, list | tuple) else []


def _grids(grids: Sequence[Sequence[int]], merge: int) -> Tensor:
    """Places by Qwen's grids of patches, several of which are one token; each frame is an image of its own."""
    sizes = [(high // merge, wide // merge) for frames, high, wide in grids for _ in range(frames)]
    return torch.cat([_grid(number, *size) for number, size in enumerate(sizes)])


def _from_positions(axes: Tensor, counts: Sequence[int]) -> Tensor | None:
    """Places by positions in time, row and column [V, 3] that count on through the prompt."""
    if sum(counts) != len(axes):
        return None
    parts = [part - part.amin(0) for part in axes.split(list(counts))]
    far = len(axes)
    return torch.cat([part + torch.tensor([far * i, 0, 0]).to(part) for i, part in enumerate(parts)])


def _grid(number: int, high: int, wide: int) -> Tensor:
    """The places of one image's tokens, row by row, [high * wide, 3]."""
    return torch.cartesian_prod(torch.tensor([number]), torch.arange(high), torch.arange(wide))


def near(reader: Tensor, column: Tensor, steps: int) -> Tensor:
    """Which columns [B, T, 3] are at most so many steps, in both directions of the grid, from which rows [B, Q, 3]:
    bool [B, Q, T]."""
    apart = (reader[:, :, None] - column[:, None]).abs()
    there = (reader[:, :, None, 0] >= 0) & (apart[..., 0] == 0)
    return there & (apart[..., 1:] <= steps).all(-1)
