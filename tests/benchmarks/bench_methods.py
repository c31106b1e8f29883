"""Real prefill and decode time against FLOPs, by method and keep ratio. Run by hand; prints a Markdown table.

    python tests/benchmarks/bench_methods.py [--layers 16] [--width 768] [--repeat 5] [--threads 1] [--device cuda]
        [--only freeze]

A LLaVA-shaped model with random weights, 576 visual tokens, 35 text tokens before and 29 behind them. The vision tower
is small and runs in all variants alike. All variants take turns on the same prompt, in one process; medians. Prefill
is one forward of the prompt into an empty cache, decode the mean of the steps behind it. Time is that of the process on
a CPU, of the wall on a GPU. FLOPs (convention ``flops``) and KV entries are those of the tokens that the runtime's
trace reports; the last column is the prefill's time over them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import shapes
import torch

from vtwcli.judge.flops import TextShape, prefill_cost
from vtwcli.methods.visipruner import VisiPruner
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Freeze, Keep, Mute, Schedule, Select, Withdraw

PREFIX, SUFFIX = 35, 29
STEPS = 8


def build(layers: int, width: int, device: str) -> torch.nn.Module:
    """The model; only the text model has a real size."""
    shape = shapes.Shape(layers, width, -(-width * 8 // 3 // 64) * 64, width // 64, 1, 32)
    torch.manual_seed(0)
    model = shapes.AutoModelForImageTextToText.from_config(shapes.config(shape), dtype=torch.float32)
    return model.to(device).eval()


def keep(at: int, score: Any, ratio: float) -> Schedule:
    return Schedule(actions=(Keep(at=at, action="keep", select=Select(score=score, ratio=ratio)),))


def threshold_for(model: torch.nn.Module, inputs: dict, share: float, **rule: Any) -> float:
    """The threshold of contribution with which VisiPruner keeps about ``share`` of this model's visual tokens."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        with (
            torch.no_grad(),
            pruned(model, VisiPruner(tokens_threshold=middle, **rule).schedule()) as running,
        ):
            model(**inputs, use_cache=False, logits_to_keep=1)
        [sample] = running.trace.samples
        kept = sample.actions[0].kept
        if kept is None:
            raise SystemExit("the rule never chooses tokens on this model")
        low, high = (middle, high) if len(kept) > share * 576 else (low, middle)
    return high


def variants(model: torch.nn.Module, inputs: dict, depth: int) -> dict[str, Schedule | None]:
    """The schedules by name; None is the full model."""
    found: dict[str, Schedule | None] = {"full": None}
    for k in (depth // 4, depth // 2, depth * 3 // 4):
        found[f"VTW K={k}"] = Schedule.withdraw_at(k)
    for ratio in (0.5, 0.25, 0.1):
        for score in ("attention", "contribution", "random"):
            found[f"keep {ratio:.0%} by {score} at 2"] = keep(2, score, ratio)
    # random weights contribute evenly, so the cosine chooses at once; the exit never comes, or as soon as it can
    shallow = round(depth * 6 / 32)
    rule: dict[str, Any] = {"shallow_mid_layer": shallow, "layer_threshold": 1.0}
    for share in (0.25, 0.1):
        size = threshold_for(model, inputs, share, exit_threshold=1.0, **rule)
        found[f"VisiPruner S={shallow}, keeps {share:.0%}, no exit"] = VisiPruner(
            tokens_threshold=size, exit_threshold=1.0, **rule
        ).schedule()
    found[f"VisiPruner S={shallow}, keeps 10%, exits at once"] = VisiPruner(
        tokens_threshold=size, exit_threshold=-1.0, **rule
    ).schedule()
    half = depth // 2
    found[f"mute 0..{half - 1}, renormalised"] = Schedule(actions=(Mute(at=0, until=half, action="mute"),))
    found[f"mute 0..{half - 1} to zero"] = Schedule(
        actions=(Mute(at=0, until=half, action="mute", sink="zero"),)
    )
    found[f"freeze {half}..{depth - 1}"] = Schedule(actions=(Freeze(at=half, until=depth, action="freeze"),))
    quarter = depth // 4
    found[f"freeze {quarter}..{3 * quarter - 1}, VTW K={3 * quarter}"] = Schedule(
        actions=(
            Freeze(at=quarter, until=3 * quarter, action="freeze"),
            Withdraw(at=3 * quarter, action="withdraw"),
        )
    )
    return found


@torch.no_grad()
def timed(model: torch.nn.Module, inputs: dict, schedule: Schedule | None) -> tuple[float, float, list[int]]:
    """Seconds of the prefill and of one decode step, and the visual tokens present in each layer."""

    def now() -> float:
        if not inputs["input_ids"].is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    with nullcontext() if schedule is None else pruned(model, schedule) as running:
        began = now()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        prefill = now() - began
        present = None if running is None else running.trace.samples[0].visual_per_layer
        length = inputs["input_ids"].shape[1]
        began = now()
        for step in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            position = torch.tensor([[length + step]], device=token.device)
            out = model(
                input_ids=token, past_key_values=out.past_key_values, position_ids=position, use_cache=True
            )
        decode = (now() - began) / STEPS
    return prefill, decode, present


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="part of the names of the schedules to run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options.layers, options.width, options.device)
    shape = TextShape.from_config(model.config)
    inputs = shapes.inputs(PREFIX, SUFFIX, torch.float32, options.device)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    chosen = {
        name: schedule
        for name, schedule in variants(model, inputs, options.layers).items()
        if name == "full" or options.only in name
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    tokens = {}
    for repeat in range(-1, options.repeat):
        for name, schedule in chosen.items():
            prefill, decode, present = timed(model, inputs, schedule)
            present = [shapes.IMAGE_TOKENS] * options.layers if present is None else present
            tokens[name] = [PREFIX + SUFFIX + int(n) for n in present]
            if repeat >= 0:
                seconds[name].append((prefill, decode))
    middle = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in seconds.items()
    }
    full = middle["full"]
    print(
        f"{options.layers} layers x {options.width}, float32, {options.device}, {options.threads} threads; full: "
        f"prefill {full[0]:.2f} s, decode {full[1] * 1e3:.0f} ms a token. All else relative to it.\n"
    )
    print("| schedule | FLOPs | prefill time | KV entries | decode time | prefill time / FLOPs |")
    print("|---|---|---|---|---|---|")
    for name, (prefill, decode) in middle.items():
        schedule = chosen[name] or Schedule()
        still = zip(tokens[name], schedule.frozen_layers(options.layers), strict=True)
        frozen = [(n - PREFIX - SUFFIX) * stays for n, stays in still]
        cost = prefill_cost(shape, tokens[name], frozen_per_layer=frozen) / prefill_cost(
            shape, tokens["full"]
        )
        entries = sum(tokens[name]) / sum(tokens["full"])
        print(
            f"| {name} | {cost:.1%} | {prefill / full[0]:.1%} | {entries:.1%} | {decode / full[1]:.1%} "
            f"| {prefill / full[0] / cost:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
