"""Ask an exported vision-language model about a picture.

    python run_onnx.py --image cat.jpg "What is in the picture?"

Needs onnxruntime (or, with ``--backend openvino``, openvino), numpy, tokenizers and Pillow, and the files beside it:
the graphs, ``vtw_ort``, ``vtw_pixels.py``, the manifest, ``tokenizer.json`` and ``processor_config.json``. One picture
or none; the arithmetic is that of the model's own image processor in its Pillow form.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from vtw_ort import BACKENDS, OnnxModel, UsageError, best_resolution
from vtw_pixels import PictureError, check_resized, read_picture

HERE = Path(__file__).resolve().parent
MAX_SIDE = 4096  # of Idefics3


def resize(image: Image.Image, high: int, wide: int, settings: Mapping[str, Any]) -> Image.Image:
    """The image at another size, with the processor's own filter."""
    return image.resize((wide, high), Image.Resampling(settings.get("resample", 3)))


def array(image: Image.Image, settings: Mapping[str, Any]) -> np.ndarray:
    """Scaled and normalised pixels [3, H, W]."""
    pixels = np.asarray(image).astype(np.float64)
    if settings.get("do_rescale", True):
        pixels = (pixels * settings.get("rescale_factor", 1 / 255)).astype(np.float32)
    if settings.get("do_normalize", True):
        mean, std = np.array(settings["image_mean"]), np.array(settings["image_std"])
        pixels = (pixels - mean.astype(pixels.dtype)) / std.astype(pixels.dtype)
    return pixels.transpose(2, 0, 1).astype(np.float32)


def square(image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """The image in the middle of a square of the mean colour."""
    colour = tuple(int(x * 255) for x in settings["image_mean"])
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def sized(image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """Resized to the processor's size and cropped around the middle."""
    size, crop = settings["size"], settings.get("crop_size")
    if settings.get("do_resize", True):
        if "shortest_edge" in size:
            edge = size["shortest_edge"]
            check_resized(image.width, image.height, edge)
            long = int(edge * max(image.size) / min(image.size))
            high, wide = (edge, long) if image.width > image.height else (long, edge)
        else:
            high, wide = size["height"], size["width"]
        image = resize(image, high, wide, settings)
    if settings.get("do_center_crop") and crop:
        top, left = (image.height - crop["height"]) // 2, (image.width - crop["width"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    return image


def rows(image: Image.Image, settings: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA: one picture of the tower's size."""
    if settings.get("do_pad") and settings.get("image_processor_type", "").startswith("LlavaImage"):
        image = square(image, settings)
    return {"pixel_values": array(sized(image, settings), settings)[None]}


def anyres(image: Image.Image, settings: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA-NeXT and LLaVA-OneVision: the whole picture, and its tiles at the best resolution."""
    size, crop = settings["size"], settings.get("crop_size")
    base = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
    tile = crop["height"] if crop else base[0]
    high, wide = best_resolution((image.height, image.width), settings["image_grid_pinpoints"])
    across, down = wide / image.width, high / image.height
    if across < down:
        new_wide, new_high = wide, min(math.ceil(image.height * across), high)
    else:
        new_high, new_wide = high, min(math.ceil(image.width * down), wide)
    canvas = Image.new("RGB", (wide, high))
    canvas.paste(
        resize(image, new_high, new_wide, settings), ((wide - new_wide) // 2, (high - new_high) // 2)
    )
    parts = [resize(image, *base, settings)]
    for top in range(0, high, tile):
        parts += [canvas.crop((left, top, left + tile, top + tile)) for left in range(0, wide, tile)]
    pixels = np.stack([array(sized(part, settings), settings) for part in parts])
    return {"pixel_values": pixels[None], "image_sizes": np.array([[image.height, image.width]])}


def patches(image: Image.Image, settings: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen2-VL and Qwen2.5-VL: patches of the picture at about its own size, merged ones together."""
    side, merge, frames = settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]
    least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    factor = side * merge
    high, wide = (round(n / factor) * factor for n in (image.height, image.width))
    if high * wide > most:
        shrink = math.sqrt(image.height * image.width / most)
        high, wide = (
            max(factor, math.floor(n / shrink / factor) * factor) for n in (image.height, image.width)
        )
    elif high * wide < least:
        grow = math.sqrt(least / (image.height * image.width))
        high, wide = (math.ceil(n * grow / factor) * factor for n in (image.height, image.width))
    pixels = array(resize(image, high, wide, settings), settings)
    blocks = pixels.reshape(3, high // factor, merge, side, wide // factor, merge, side)
    blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    flat = np.repeat(blocks, frames, 5).reshape(high * wide // side**2, -1)
    return {"pixel_values": flat, "image_grid_thw": np.array([[1, high // side, wide // side]])}


def tiles(image: Image.Image, settings: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Idefics3 and SmolVLM: tiles of the enlarged picture, and behind them the whole."""
    most, tile = settings["size"]["longest_edge"], settings["max_image_size"]["longest_edge"]
    ratio = image.width / image.height
    if image.width >= image.height:
        high, wide = int(most / ratio), most
        high += high % 2
    else:
        high, wide = most, int(most * ratio)
        wide += wide % 2
    ratio = wide / high
    if wide >= high and wide > MAX_SIDE:
        high, wide = int(MAX_SIDE / ratio), MAX_SIDE
    elif high > MAX_SIDE:
        high, wide = MAX_SIDE, int(MAX_SIDE * ratio)
    image = resize(image, max(high, 1), max(wide, 1), settings)
    down = across = 0
    parts = []
    if settings.get("do_image_splitting", True):
        ratio = image.width / image.height
        if image.width >= image.height:
            wide = math.ceil(image.width / tile) * tile
            high = math.ceil(int(wide / ratio) / tile) * tile
        else:
            high = math.ceil(image.height / tile) * tile
            wide = math.ceil(int(high * ratio) / tile) * tile
        image = resize(image, high, wide, settings)
        if high > tile or wide > tile:
            down, across = high // tile, wide // tile
            for top in range(0, high, tile):
                parts += [image.crop((left, top, left + tile, top + tile)) for left in range(0, wide, tile)]
    parts.append(resize(image, tile, tile, settings))
    pixels = np.stack([array(part, settings) for part in parts])
    return {"pixel_values": pixels[None], "grid": (down, across)}


def tile_text(token: str, count: int, grid: tuple[int, int]) -> str:
    """What stands for a picture in Idefics3's and SmolVLM's prompts, ``count`` placeholders for each tile."""
    edge, many = "<fake_token_around_image>", token * count
    whole = f"{edge}<global-img>{many}{edge}"
    if not grid[0]:
        return whole
    lines = (
        "".join(f"{edge}<row_{r + 1}_col_{c + 1}>{many}" for c in range(grid[1])) for r in range(grid[0])
    )
    return "\n".join(lines) + f"\n\n{whole}"


PROCESS = {"rows": rows, "anyres": anyres, "patches": patches, "tiles": tiles}


def prepare(
    model: OnnxModel, tokenizer: Tokenizer, question: str, image: Image.Image | None
) -> dict[str, np.ndarray]:
    """Model inputs for one question about an RGB picture."""
    manifest, inputs = model.manifest, {}
    if manifest.get("prompt") is None:
        sys.exit("this model has no chat template, so its prompt is not known")
    tokens, arrange = manifest["tokens"], manifest["vision"]["arrange"]
    if tokens["image"] and tokens["image"] in question:
        raise UsageError(f"the question contains {tokens['image']}, which stands for a picture")
    text = manifest["prompt"]["text" if image is None else "image"].replace("{question}", question)
    count = 1
    if image is not None:
        settings = json.loads((HERE / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
        inputs = PROCESS[arrange](image, settings, manifest["vision"])
        grid = inputs.pop("grid", None)
        inputs["image_features"] = features = model.features(inputs)
        count = len(features)
        if arrange == "tiles":
            place = tile_text(tokens["image"], count // inputs["pixel_values"].shape[1], grid)
            text, count = text.replace(tokens["image"], place), 1
    bos = tokens["bos"]
    ids = tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos))).ids
    spread = [i for i in ids for _ in range(count if i in tokens["placeholder_ids"] else 1)]
    return {**inputs, "input_ids": np.array([spread])}


def main() -> None:
    """Read the command line, print the answer."""
    parser = argparse.ArgumentParser(description="Ask an exported vision-language model about a picture.")
    parser.add_argument("question")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="onnx", choices=BACKENDS, help="onnx is ONNX Runtime")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = OnnxModel(HERE, options.device, backend=options.backend)
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    image = None
    if options.image:
        try:
            image, left_out = read_picture(options.image)
        except PictureError as error:
            sys.exit(f"error: {options.image}: {error}")
        for what in left_out:
            sys.stderr.write(f"warning: {options.image}: {what}\n")
    answer = model.generate(
        prepare(model, tokenizer, options.question, image),
        options.max_new_tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or 1.0,
        seed=options.seed,
    )
    sys.stdout.write(tokenizer.decode(answer[0].tolist(), skip_special_tokens=True).strip() + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
