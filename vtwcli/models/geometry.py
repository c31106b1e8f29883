"""Which part of the image each visual token stands for, where a family's way from pixels to tokens is known.

A box is (left, top, right, bottom) in shares of the image's width and height. Tokens that stand for no place (class
tokens, row breaks) have None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, isqrt, sqrt
from typing import Any

from vtwcli.models.loading import LoadedModel

Box = tuple[float, float, float, float]
Size = tuple[int, int]  # height, width

_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def token_boxes(
    loaded: LoadedModel, images: Sequence[Any], inputs: Mapping[str, Any], visual: int
) -> list[tuple[int, Box | None]] | None:
    """The image and the box of each visual token of one prompt, in order.

    Args:
        loaded: model and processor.
        images: the prompt's images, as PIL images.
        inputs: the model inputs that the processor made of them.
        visual: number of visual tokens.

    Returns:
        None where the family's mapping is not known, or does not give as many tokens as there are.
    """
    mapping = _MAPPINGS.get(loaded.family.model_type)
    if mapping is None or not images:
        return None
    found: list[tuple[int, Box | None]] = []
    for number, image in enumerate(images):
        size = (image.height, image.width)
        boxes = mapping(loaded, number, size, inputs, visual // len(images))
        if boxes is None:
            return None
        found += [(number, box) for box in boxes]
    return found if len(found) == visual else None


def grid(area: Box, rows: int, columns: int) -> list[Box | None]:
    """``area`` of the image cut into equal cells, row by row; what lies outside the image is cut off."""
    left, top, right, bottom = area
    high, wide = (bottom - top) / rows, (right - left) / columns
    cells = [
        (left + c * wide, top + r * high, left + (c + 1) * wide, top + (r + 1) * high)
        for r in range(rows)
        for c in range(columns)
    ]
    return [_inside(cell) for cell in cells]


def _inside(box: Box) -> Box | None:
    left, top, right, bottom = (min(max(x, 0.0), 1.0) for x in box)
    return (left, top, right, bottom) if right - left > 1e-9 and bottom - top > 1e-9 else None


def _square(
    loaded: LoadedModel, number: int, size: Size, inputs: Mapping[str, Any], tokens: int
) -> list[Box | None] | None:
    """One square grid over what the image processor takes of the image; a class token may stand in front."""
    if "image_sizes" in inputs:  # a Pixtral tower
        return _any_shape(loaded, number, size, inputs, tokens)
    extra = 0 if isqrt(tokens) ** 2 == tokens else 1
    side = isqrt(tokens - extra)
    area = _seen(loaded.processor.image_processor, size)
    if side * side + extra != tokens or area is None:
        return None
    return [None] * extra + grid(area, side, side)


def _seen(processor: Any, size: Size) -> Box | None:
    """The part of an image that a CLIP-like processor shows its tower, beyond the image where it pads."""
    high, wide = size
    if getattr(processor, "do_pan_and_scan", False):
        return None
    if getattr(processor, "do_pad", False):  # to a square around the image
        side = max(high, wide)
        over, beside = (side - high) // 2 / high, (side - wide) // 2 / wide
        return -beside, -over, side / wide - beside, side / high - over
    edge = _entry(processor.size, "shortest_edge")
    if edge is None or not processor.do_resize:
        return _WHOLE
    short, long = min(size), max(size)
    resized = int(edge * long / short)
    new_high, new_wide = (edge, resized) if high == short else (resized, edge)
    if not getattr(processor, "do_center_crop", False):
        return _WHOLE
    crop_high, crop_wide = _entry(processor.crop_size, "height"), _entry(processor.crop_size, "width")
    top, left = (new_high - crop_high) // 2, (new_wide - crop_wide) // 2
    return left / new_wide, top / new_high, (left + crop_wide) / new_wide, (top + crop_high) / new_high


def _entry(size: Any, name: str) -> Any:
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _any_shape(
    loaded: LoadedModel, number: int, size: Size, inputs: Mapping[str, Any], tokens: int
) -> list[Box | None] | None:
    """Pixtral's grid: the image in its own shape, row by row; the breaks behind the rows are text."""
    config = loaded.model.config
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    high, wide = inputs["image_sizes"][number].tolist()
    return grid(_WHOLE, high // patch, wide // patch)


def _packed(
    loaded: LoadedModel, number: int, size: Size, inputs: Mapping[str, Any], tokens: int
) -> list[Box | None] | None:
    """Qwen's grid: the image squeezed to a multiple of the merged patch, row by row."""
    frames, rows, columns = inputs["image_grid_thw"][number].tolist()
    merge = loaded.processor.image_processor.merge_size
    return grid(_WHOLE, rows // merge, columns // merge) * frames


def _tiled(
    loaded: LoadedModel, number: int, size: Size, inputs: Mapping[str, Any], tokens: int
) -> list[Box | None] | None:
    """LLaVA-NeXT's any resolution: the whole image squeezed to a square, then the image at the best resolution, cut
    into tiles that are put together again, without the rows and columns of padding, a row break behind each row.

    LLaVA-OneVision shrinks what is larger than its largest number of tiles, and takes several images whole.
    """
    from transformers.image_processing_utils import select_best_resolution

    vision = loaded.model.config.vision_config
    side = vision.image_size // vision.patch_size
    whole = grid(_WHOLE, side, side)
    if tokens == side * side + 1:
        return [*whole, None]
    best = select_best_resolution(size, loaded.model.config.image_grid_pinpoints)
    patch = vision.patch_size
    canvas = (best[0] // patch, best[1] // patch)
    scale = min(best[0] / size[0], best[1] / size[1])
    # pixels of the image on the canvas, and where it begins
    pixels = [min(ceil(x * scale), limit) for x, limit in zip(size, best, strict=True)]
    begin = [(limit - x) // 2 for x, limit in zip(pixels, best, strict=True)]
    kept = list(canvas)
    axis = 0 if size[1] / size[0] > canvas[1] / canvas[0] else 1
    fitted = int(round(size[axis] * (canvas[1 - axis] / size[1 - axis]), 7))
    cut = (canvas[axis] - fitted) // 2
    kept[axis] -= 2 * cut
    start = [0, 0]
    start[axis] = cut
    top, left = ((start[i] * patch - begin[i]) / pixels[i] for i in (0, 1))
    bottom, right = (((start[i] + kept[i]) * patch - begin[i]) / pixels[i] for i in (0, 1))
    ratio = getattr(loaded.model.config, "vision_aspect_ratio", None)
    if ratio:
        shrink = sqrt(kept[0] * kept[1] / (int(ratio.removeprefix("anyres_max_")) * side**2))
        if shrink > 1.1:
            kept = [int(x // shrink) for x in kept]
    cells = grid((left, top, right, bottom), *kept)
    rows = [[*cells[r * kept[1] : (r + 1) * kept[1]], None] for r in range(kept[0])]
    return [*whole, *(box for row in rows for box in row)]


_MAPPINGS: dict[str, Callable[..., list[Box | None] | None]] = {
    "llava": _square,
    "vipllava": _square,
    "paligemma": _square,
    "gemma3": _square,
    "mistral3": _any_shape,
    "lighton_ocr": _any_shape,
    "qwen2_vl": _packed,
    "qwen2_5_vl": _packed,
    "qwen3_vl": _packed,
    "qwen3_vl_moe": _packed,
    "llava_next": _tiled,
    "llava_onevision": _tiled,
}
