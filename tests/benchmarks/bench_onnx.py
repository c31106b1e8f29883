"""Speed of exported graphs: full against split, ONNX Runtime against torch. Run by hand; prints Markdown tables.

    python tests/benchmarks/bench_onnx.py [--layers 16] [--width 1024] [--cut 8] [--images 1] [--threads 1]

A LLaVA-shaped model of random float32 weights with a tiny vision tower, 64 text tokens and 576 visual tokens an image.
Every variant prefills the prompt and then decodes; rounds are interleaved and the median is shown. "FLOPs" is the
ratio that the text model's arithmetic predicts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shapes
import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vtwcli.export.onnx import export
from vtwcli.models.families import family_of
from vtwcli.models.loading import LoadedModel
from vtwcli.ort import OnnxModel
from vtwcli.runtime import pruned

TEXT = 64
DECODED = 16


def flops(options: argparse.Namespace, tokens: int) -> float:
    """Floating-point operations of one layer over ``tokens`` tokens."""
    return 2 * tokens * (4 * options.width + 3 * options.mlp) * options.width + 4 * tokens**2 * options.width


def prompt(images: int) -> dict[str, torch.Tensor]:
    """64 text tokens around the images' placeholders."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, shapes.IMAGE_ID, (TEXT,), generator=generator)
    visual = torch.full((images * shapes.IMAGE_TOKENS,), shapes.IMAGE_ID)
    ids = torch.cat([text[: TEXT // 2], visual, text[TEXT // 2 :]])[None]
    pixels = torch.randn(images, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def torch_run(model: torch.nn.Module, cut: int | None, inputs: dict) -> Callable[[], tuple[float, float]]:
    """Seconds of prefill and of one decode step of the torch runtime."""

    def steps() -> tuple[float, float]:
        began = time.perf_counter()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        mask, cache = inputs["attention_mask"], out.past_key_values
        for _ in range(DECODED):
            mask = torch.cat([mask, mask[:, :1]], 1)
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
        return prefilled - began, (time.perf_counter() - prefilled) / DECODED

    @torch.no_grad()
    def run() -> tuple[float, float]:
        if cut is None:
            return steps()
        with pruned(model, cut):
            return steps()

    return run


def onnx_run(graphs: OnnxModel, inputs: dict) -> Callable[[], tuple[float, float]]:
    """Seconds of prefill and of one decode step of exported graphs."""
    arrays = {name: value.numpy() for name, value in inputs.items()}

    def run() -> tuple[float, float]:
        began = time.perf_counter()
        logits, state = graphs.prefill(arrays)
        prefilled = time.perf_counter()
        for _ in range(DECODED):
            logits = graphs.step(logits.argmax(-1), state)
        return prefilled - began, (time.perf_counter() - prefilled) / DECODED

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--cut", type=int, default=8)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layout = shapes.config(
        shapes.Shape(options.layers, options.width, options.mlp, options.width // 64, 1, 32)
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(layout, dtype=torch.float32).eval()
    place = (Path(), torch.device("cpu"), torch.float32)
    source = export.Source.of(LoadedModel(model, None, family_of(layout), "random", None, *place))
    inputs = prompt(options.images)
    runs = {
        ("torch", False): torch_run(model, None, inputs),
        ("torch", True): torch_run(model, options.cut, inputs),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, opset, merged in (("opset 20", 20, False), ("opset 23", 23, False), ("merged", 20, True)):
            for cut in (False, True) if not merged else (True,):
                folder = Path(scratch) / f"{name} {cut}"
                folder.mkdir()
                cuts = [{"at": options.cut, "action": "withdraw"}] if cut else []
                manifest = export.write_graphs(source, cuts, folder, dtype="fp32", opset=opset, merged=merged)
                (folder / "manifest.json").write_text(json.dumps(manifest))
                graphs = OnnxModel(folder, threads=options.threads)
                runs[f"ONNX Runtime, {name}", cut] = onnx_run(graphs, inputs)
        seconds: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in runs}
        for run in runs.values():
            run()  # sessions are made on first use
        for _ in range(options.repeat):
            for key, run in runs.items():
                seconds[key].append(run())
    tokens = TEXT + options.images * shapes.IMAGE_TOKENS
    share = options.cut / options.layers
    ideal = share + (1 - share) * flops(options, TEXT) / flops(options, tokens)
    print(
        f"{options.layers} layers x {options.width}, K = {options.cut}, {TEXT} text and {tokens - TEXT} visual tokens, "
        f"{options.threads} thread(s), median of {options.repeat}\n"
    )
    print("| | prefill full, ms | prefill split, ms | ratio | decode full, ms | decode split, ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(key[0] for key in runs):
        split = medians(seconds[name, True])
        # the merged graph of the full model is the single decoder
        full = medians(seconds.get((name, False)) or seconds["ONNX Runtime, opset 20", False])
        cells = []
        for i in range(2):
            cells += [f"{full[i]:.1f}", f"{split[i]:.1f}", f"{split[i] / full[i]:.3f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"| FLOPs | | | {ideal:.3f} | | | |")


def medians(samples: list[tuple[float, float]]) -> np.ndarray:
    """Median prefill and decode step in milliseconds."""
    return np.median(np.array(samples), 0) * 1000


if __name__ == "__main__":
    main()
