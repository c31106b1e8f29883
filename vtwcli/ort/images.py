"""From what a processor returns to the features of images in the order of their placeholders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import UsageError

Inputs = Mapping[str, np.ndarray]
"""What a processor returns, by name."""

Encode = Callable[[Inputs], Mapping[str, Any]]
"""Runs the vision encoder."""


def image_features(inputs: Inputs, vision: Mapping[str, Any], encode: Encode) -> np.ndarray | None:
    """The features of all images, in the order of their placeholders [rows, D]; None without images.

    Args:
        inputs: what the model's processor returns; ``image_features`` among them are taken as they are.
        vision: how a manifest describes the model's vision.
        encode: runs the vision encoder.

    Raises:
        UsageError: a video among the inputs.
    """
    if inputs.get("image_features") is not None:
        return inputs["image_features"]
    if any("video" in name for name in inputs):
        raise UsageError("exported graphs take images, no videos")
    if inputs.get("pixel_values") is None:
        return None
    return _ARRANGE[vision["arrange"]](inputs, vision, encode)


def _rows(inputs: Inputs, vision: Mapping[str, Any], encode: Encode) -> np.ndarray:
    """LLaVA: every image has the same number of features."""
    features = encode({"pixel_values": inputs["pixel_values"]})["image_features"].numpy()
    return features.reshape(-1, features.shape[-1])


def _tiles(inputs: Inputs, vision: Mapping[str, Any], encode: Encode) -> np.ndarray:
    """Idefics3 and SmolVLM: [B, n, 3, H, W] tiles; those that are all zero only fill up the batch."""
    pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[2:])
    real = (pixels != 0).any((1, 2, 3))
    size = vision["patch_size"]
    given = inputs.get(
        "pixel_attention_mask", np.ones((*inputs["pixel_values"].shape[:2], *pixels.shape[2:]))
    )
    mask = given.reshape(-1, *given.shape[2:])[real] != 0
    count, high, wide = mask.shape
    patches = mask.reshape(count, high // size, size, wide // size, size).any((2, 4))
    feeds = {"pixel_values": pixels[real], "patch_attention_mask": patches}
    features = encode(feeds)["image_features"].numpy()
    return features.reshape(-1, features.shape[-1])


def _patches(inputs: Inputs, vision: Mapping[str, Any], encode: Encode) -> np.ndarray:
    """Qwen2-VL and Qwen2.5-VL: packed patches, run image by image so that attention stays small."""
    out, start = [], 0
    for grid in inputs["image_grid_thw"].tolist():
        stop = start + math.prod(grid)
        feeds = {"pixel_values": inputs["pixel_values"][start:stop], **patch_feeds(grid, vision)}
        out.append(encode(feeds)["image_features"].numpy())
        start = stop
    return np.concatenate(out)


def patch_feeds(grid: Sequence[int], vision: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Where the patches of one image are and which of them see each other.

    Args:
        grid: time, rows, columns in patches.
        vision: ``spatial_merge_size`` m, and for towers with windows ``window``, their side in merged patches.
    """
    t, h, w = grid
    m = vision["spatial_merge_size"]
    rows, columns = (
        np.indices((h, w)).reshape(2, h // m, m, w // m, m).transpose(0, 1, 3, 2, 4).reshape(2, -1)
    )
    feeds = {
        "patch_positions": np.tile(np.stack([rows, columns], 1), (t, 1)),
        "segments": np.repeat(np.arange(t), h * w),
    }
    if vision.get("window"):
        size = vision["window"]
        time, high, wide = np.indices((t, h // m, w // m)).reshape(3, -1)
        across = -(-(w // m) // size)
        down = -(-(h // m) // size)
        window = (time * down + high // size) * across + wide // size
        order = np.argsort(window, kind="stable")
        feeds |= {"window_index": order, "windows": np.repeat(window[order], m * m)}
        # Patches stand in window order, frames one after the other: the segments stay as they are.
    return feeds


def _anyres(inputs: Inputs, vision: Mapping[str, Any], encode: Encode) -> np.ndarray:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image and its tiles, [N, n, 3, H, W] padded along n."""
    sizes = inputs["image_sizes"].tolist()
    single = inputs.get("batch_num_images")
    cut = [True] * len(sizes)
    if single is not None:  # OneVision cuts an image into tiles only where it is the only one of its prompt
        cut = [n == 1 for n in single.reshape(-1).tolist() for _ in range(n)]
    tile = vision["image_size"]
    resolutions = [best_resolution(size, vision["grid_pinpoints"]) for size in sizes]
    counts = [
        1 + (high // tile) * (wide // tile) if c else 1
        for (high, wide), c in zip(resolutions, cut, strict=True)
    ]
    pixels = inputs["pixel_values"]
    if pixels.ndim == 5:
        pixels = np.concatenate([image[:n] for image, n in zip(pixels, counts, strict=True)])
    out = encode({"pixel_values": pixels})
    features, newline = out["image_features"].numpy(), out["image_newline"].numpy()
    starts = np.cumsum([0, *counts])
    packed = [
        pack(features[a:b], size, resolution, newline, vision)
        for a, b, size, resolution in zip(starts, starts[1:], sizes, resolutions, strict=False)
    ]
    return np.concatenate(packed)


def best_resolution(size: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The grid (height, width) that keeps most of an image's pixels and, among equals, wastes least."""
    high, wide = size

    def score(grid: Sequence[int]) -> tuple[int, int]:
        scale = min(grid[1] / wide, grid[0] / high)
        used = min(int(wide * scale) * int(high * scale), wide * high)
        return used, used - grid[0] * grid[1]

    best = max(pinpoints, key=score)
    return int(best[0]), int(best[1])


def pack(
    features: np.ndarray,
    size: Sequence[int],
    resolution: tuple[int, int],
    newline: np.ndarray,
    vision: Mapping[str, Any],
) -> np.ndarray:
    """One image's features in reading order [rows, D]: the whole image, then the tiles without their padding,
    with the new-line vector behind each line.

    Args:
        features: of the whole image and its tiles [n, T, D].
        size: the image's height and width.
        resolution: height and width of the grid of tiles.
        newline: [D].
        vision: ``image_size`` and ``patch_size`` of the tower; ``max_tiles``, where larger images are scaled down.
    """
    if len(features) == 1:
        return np.concatenate([features[0], newline[None]])
    side = vision["image_size"] // vision["patch_size"]
    down, across = resolution[0] // vision["image_size"], resolution[1] // vision["image_size"]
    grid = features[1:].reshape(down, across, side, side, -1).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(down * side, across * side, -1)
    high, wide = grid.shape[:2]
    if size[1] / size[0] > wide / high:
        edge = (high - int(round(size[0] * (wide / size[1]), 7))) // 2
        grid = grid[edge : high - edge]
    else:
        edge = (wide - int(round(size[1] * (high / size[0]), 7))) // 2
        grid = grid[:, edge : wide - edge]
    if vision.get("max_tiles"):
        ratio = math.sqrt(grid.shape[0] * grid.shape[1] / (vision["max_tiles"] * side**2))
        if ratio > 1.1:
            grid = shrink(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    lines = np.broadcast_to(newline, (grid.shape[0], 1, grid.shape[2]))
    grid = np.concatenate([grid, lines.astype(grid.dtype)], 1)
    return np.concatenate([features[0], grid.reshape(-1, grid.shape[-1])])


def shrink(grid: np.ndarray, high: int, wide: int) -> np.ndarray:
    """Bilinear interpolation of [H, W, D] to [high, wide, D], pixel centres at one half, edges repeated."""

    def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
        low = np.minimum(place.astype(np.int64), old - 1)
        return low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32)

    top, bottom, down = taps(grid.shape[0], high)
    left, right, across = taps(grid.shape[1], wide)
    values = grid.astype(np.float32)
    down, across = down[:, None, None], across[None, :, None]
    upper = values[top][:, left] * (1 - across) + values[top][:, right] * across
    lower = values[bottom][:, left] * (1 - across) + values[bottom][:, right] * across
    return (upper * (1 - down) + lower * down).astype(grid.dtype)


_ARRANGE: dict[str, Callable[[Inputs, Mapping[str, Any], Encode], np.ndarray]] = {
    "rows": _rows,
    "tiles": _tiles,
    "patches": _patches,
    "anyres": _anyres,
}
