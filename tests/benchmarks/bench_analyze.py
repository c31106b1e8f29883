"""What the last-row measures of an analysis cost. Run by hand; prints two Markdown tables.

    python tests/benchmarks/bench_analyze.py [--width 1024] [--layers 16] [--suffix 64] [--repeat 5] [--threads 1]
    python tests/benchmarks/bench_analyze.py --whole

The second form times whole analyses, with all interventions, against a calibration's sweep.

Time, interleaved, CPU seconds: a plain forward; all last-row measures (a sweep without interventions, with the
probe); the same numbers' raw material as the library offers it, ``output_attentions=True`` on eager attention. Memory
over the sequence's length, each in a process of its own on Linux: how far the peak rises above what was resident
before. All layers share one layer's weights, which changes no amount of work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_sweep
import shapes
import torch

from vtwcli.analyze import interventions
from vtwcli.models.families import FAMILIES
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.sweep import SweepItem, sweep


def build(options: argparse.Namespace, attn: str) -> torch.nn.Module:
    """A model of the wanted width whose layers are one and the same."""
    heads = options.width // 64
    shape = shapes.Shape(options.layers, options.width, int(2.75 * options.width), heads, 1, 32)
    model = bench_sweep.build(shape, options.layers, torch.float32, "cpu")
    model.model.language_model.config._attn_implementation = attn
    return model


def several(prefix: int, images: int, suffix: int) -> dict:
    """One prompt with ``images`` images of 576 tokens each."""
    one = shapes.inputs(prefix, suffix, torch.float32)
    ids, pixels = one["input_ids"], one["pixel_values"]
    middle = ids[:, prefix : prefix + shapes.IMAGE_TOKENS].repeat(1, images)
    ids = torch.cat([ids[:, :prefix], middle, ids[:, prefix + shapes.IMAGE_TOKENS :]], 1)
    return {"input_ids": ids, "pixel_values": pixels.repeat(images, 1, 1, 1)}


def probed(model: torch.nn.Module, inputs: dict, measure: bool = True) -> list:
    """All last-row measures of the prompt; without ``measure`` the sweep alone."""
    probe = LastRowProbe(5.0)
    rows = torch.tensor([[inputs["input_ids"].shape[1] - 1]])
    item = SweepItem(inputs, rows)
    sweep(Resident(model, FAMILIES["llava"]), [item], [], probes=[probe] if measure else [])
    return probe.found[0, 0]


@torch.no_grad()
def returned(model: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    """The last rows of the attention that the library returns."""
    out = model(**inputs, use_cache=False, logits_to_keep=1, output_attentions=True)
    return [layer[0, :, -1] for layer in out.attentions]


@torch.no_grad()
def plain(model: torch.nn.Module, inputs: dict) -> None:
    """A forward pass as it is."""
    model(**inputs, use_cache=False, logits_to_keep=1)


def grown(options: argparse.Namespace, images: int, kind: str) -> int:
    """Bytes by which the peak grows; run in a process of its own."""
    model = build(options, "eager" if kind == "returned" else "sdpa")
    job = {"plain": plain, "probed": probed, "returned": returned}[kind]
    job(model, several(2, 1, 2))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    job(model, several(bench_sweep.PREFIX, images, options.suffix))
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at most (VmHWM)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def whole(options: argparse.Namespace) -> None:
    """Print what the interventions of an analysis cost, for one sample and its first position."""
    model = build(options, "sdpa")
    inputs = several(bench_sweep.PREFIX, 1, options.suffix)
    item = SweepItem(inputs, torch.tensor([[inputs["input_ids"].shape[1] - 1]]))
    curves = interventions(options.layers, 3, True)
    tried = {
        "calibration (withdrawal at every layer)": ["withdrawal"],
        "analysis without --freeze": [name for name in curves if name != "layer_update"],
        "analysis": list(curves),
    }

    def job(names: list[str], measure: bool) -> object:
        wanted = list(dict.fromkeys(one for name in names for one in curves[name]))
        probes = [LastRowProbe(5.0)] if measure else []
        return sweep(Resident(model, FAMILIES["llava"]), [item], wanted, probes=probes)

    jobs: list[Callable[[], object]] = [lambda: plain(model, inputs)]
    jobs += [partial(job, names, title != next(iter(tried))) for title, names in tried.items()]
    jobs[0]()
    seconds, _ = bench_sweep.measure(jobs, options.repeat, "cpu")
    print("| | CPU seconds | plain forwards |\n|---|---|---|")
    for title, taken in zip(["plain forward", *tried], seconds, strict=True):
        print(f"| {title} | {taken:.2f} | {taken / seconds[0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--suffix", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument(
        "--memory-layers", type=int, default=4, help="returned attention needs that many S x S"
    )
    parser.add_argument("--whole", action="store_true", help="time all interventions of an analysis instead")
    parser.add_argument("--grown", nargs=2, metavar=("IMAGES", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.grown:
        print(grown(options, int(options.grown[0]), options.grown[1]))
        return
    if options.whole:
        whole(options)
        return
    fused, eager = build(options, "sdpa"), build(options, "eager")
    inputs = several(bench_sweep.PREFIX, 1, options.suffix)
    jobs = [
        lambda: plain(fused, inputs),
        lambda: probed(fused, inputs, measure=False),
        lambda: probed(fused, inputs),
        lambda: returned(eager, inputs),
    ]
    jobs[0]()
    (t_plain, t_sweep, t_probed, t_returned), (_, _, measured, rows) = bench_sweep.measure(
        jobs, options.repeat, "cpu"
    )
    seen = slice(bench_sweep.PREFIX, bench_sweep.PREFIX + shapes.IMAGE_TOKENS)
    for layer, row in zip(measured, rows, strict=True):
        torch.testing.assert_close(layer.attention, row[:, seen].mean(0), rtol=1e-2, atol=1e-5)
    length = inputs["input_ids"].shape[1]
    print(
        f"Width {options.width}, {options.layers} layers, {length} tokens, {options.threads} thread, CPU seconds.\n"
    )
    print("| | seconds | of a plain forward |\n|---|---|---|")
    for name, seconds in (
        ("plain forward, sdpa", t_plain),
        ("sweep without interventions", t_sweep),
        ("the same with all last-row measures", t_probed),
        ("output_attentions=True, eager", t_returned),
    ):
        print(f"| {name} | {seconds:.2f} | {seconds / t_plain:.2f}x |", flush=True)
    if options.images:
        print("\n| tokens | plain forward, MB | measures, MB | output_attentions=True, MB |")
        print("|---|---|---|---|")
    for images in options.images:
        tokens = bench_sweep.PREFIX + images * shapes.IMAGE_TOKENS + options.suffix
        grew = []
        for kind in ("plain", "probed", "returned"):
            same = ["--width", options.width, "--layers", options.memory_layers, "--suffix", options.suffix]
            command = [sys.executable, __file__, *map(str, same), "--grown", str(images), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            grew.append(json.loads(done.stdout) / 1e6)
        print(f"| {tokens} | " + " | ".join(f"{x:.0f}" for x in grew) + " |", flush=True)


if __name__ == "__main__":
    main()
