"""Update, read, leave beside plain withdrawal, under the same policy. Run by hand; prints Markdown tables.

    python tests/benchmarks/bench_stages.py demo [MODEL ...] [--data SPEC ...] [--limit 20] [--policy worst-task]
    python tests/benchmarks/bench_stages.py --time [--layers 8] [--suffix 20] [--repeat 7] [--dtype bfloat16]

For each model both methods are calibrated on the same samples; the table is of as many others, which had no part in
either choice. "At its KL" is the cheapest of the candidates that, on the calibration's samples, are as close to the
full model as what withdrawal's own calibration chose, in the mean and in the worst task; "as cheap" is the
withdrawal whose cost is nearest to that of ``stages``.

``--time`` takes the prefill of layers of a 7B model with random weights (each has its own memory) over 35 text tokens,
576 visual ones and ``suffix`` more: full, withdrawn, frozen and withdrawn, in one process taking turns, on one thread;
CPU time, medians of the ratios within a round, beside the ratio of operations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import shapes
import torch
from bench_schedules import PREFIX, build

from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.judge.flops import TextShape, prefill_cost
from vtwcli.measure.candidates import compared, flops_of
from vtwcli.measure.study import Study
from vtwcli.methods.method import Candidate
from vtwcli.methods.stages import Stages
from vtwcli.recipe.recipe import CalibrateSection, ModelSection
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule


def chosen(model: ModelSection, data: list, options: dict[str, Any]) -> tuple[list[Candidate], set[str]]:
    """What is compared, and the fingerprints of the samples that chose it."""
    plain = calibrate(model, data, CalibrateSection(**options))
    both = calibrate(model, data, CalibrateSection(method="stages", **options))
    k = plain["withdrawal_layer"]
    if k is None or both["chosen"] is None:
        raise SystemExit(f"{model.name}: no layer or no candidate qualifies")
    rows = {row["name"]: row for row in both["candidates"]}
    mean, worst = plain["kl"]["mean"][k], max(task["kl"][k] for task in plain["tasks"].values())
    close = [row for row in rows.values() if row["kl"] <= mean and row["worst_kl"] <= worst]
    found = [Candidate(f"withdrawal, K = {k}", "vtw", Schedule.withdraw_at(k)), _of("", rows[both["chosen"]])]
    if close:
        found.append(_of("at its KL: ", min(close, key=flops_of)))
    cheap = flops_of(rows[both["chosen"]])
    alone = [row for row in rows.values() if not row["parameters"]["layers"]]
    depth = both["num_layers"]
    known = {row["parameters"]["withdraw"]: flops_of(row) for row in alone}
    (a, left), (b, right) = sorted(known.items())[0], sorted(known.items())[-1]
    slope = (right - left) / (b - a)  # every layer costs the same
    near = min(range(1, depth), key=lambda layer: abs(left + slope * (layer - a) - cheap))
    found.append(Candidate(f"as cheap: withdrawal, K = {near}", "vtw", Schedule.withdraw_at(near)))
    return found, {one["fingerprint"] for one in both["samples"]}


def _of(words: str, row: Any) -> Candidate:
    return Candidate(words + row["name"], "stages", Schedule.from_dict(row["schedule"]))


def quality(options: argparse.Namespace) -> None:
    """The table of the models' samples that chose nothing."""
    data = [DataSpec.parse(one) for one in options.data]
    print("| model | schedule | FLOPs | of withdrawal's | KV | mean KL | worst task | top-1 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.models:
        model = ModelSection(name=name)
        given = {"policy": options.policy, "eta": options.eta, "limit": options.limit, "bootstrap": 0}
        tried, used = chosen(model, data, given)
        study = Study.open(model, data, CalibrateSection(limit=options.limit, seed=1))
        fresh = [place for place, print_ in enumerate(study.mix.fingerprints) if print_ not in used]
        found = study.of(fresh).try_(tried, study.options.longest)
        rows, _ = compared(tried, found, study.text)
        base = flops_of(rows[0])
        for row in rows:
            print(
                f"| {name} | {row['name']} | {flops_of(row):.1%} | {flops_of(row) / base:.2f}x "
                f"| {row['kv_ratio']:.1%} | {row['kl']:.2e} | {row['worst_kl']:.2e} | {row['agreement']:.1%} |",
                flush=True,
            )
        print(f"\n{name}: {len(found.samples)} samples of {len(found.counts)} tasks.\n", flush=True)


@torch.no_grad()
def timed(options: argparse.Namespace) -> None:
    """The table of the prefill's time."""
    torch.set_num_threads(1)
    dtype, depth = getattr(torch, options.dtype), options.layers
    model = build(shapes.SHAPES["7b"]._replace(layers=depth), dtype)
    inputs = shapes.inputs(PREFIX, options.suffix, dtype)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    first, k = depth // 4, 3 * depth // 4
    some = [Stages(layers=range(first, end), withdraw=end) for end in (k, depth - 1)]
    schedules = {"full": None, f"withdrawal, K = {k}": Schedule.withdraw_at(k)}
    schedules |= {one.label(): one.schedule() for one in some}
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    for number in range(options.repeat + 1):
        for name, schedule in schedules.items():
            with nullcontext() if schedule is None else pruned(model, schedule):
                began = time.process_time()
                model(**inputs, use_cache=True, logits_to_keep=1)
                seconds[name] += [time.process_time() - began] * (number > 0)
    shape, text = TextShape.from_config(model.config), PREFIX + options.suffix

    def operations(schedule: Schedule | None) -> int:
        schedule = schedule or Schedule()
        present = schedule.visual_per_layer(depth, shapes.IMAGE_TOKENS)
        still = schedule.frozen_layers(depth)
        frozen = [n * stays for n, stays in zip(present, still, strict=True)]
        return prefill_cost(shape, [text + n for n in present], frozen_per_layer=frozen)

    full = statistics.median(seconds["full"])
    print(
        f"{depth} layers of width 4096 and MLP 11008, {options.dtype}, one thread, {text} text and "
        f"{shapes.IMAGE_TOKENS} visual tokens; full: {full:.2f} s.\n"
    )
    print("| schedule | operations | prefill time | spread | time / operations |")
    print("|---|---|---|---|---|")
    for name, schedule in schedules.items():
        ratios = sorted(mine / base for mine, base in zip(seconds[name], seconds["full"], strict=True))
        took, cost = statistics.median(ratios), operations(schedule) / operations(None)
        print(
            f"| {name} | {cost:.1%} | {took:.1%} | {ratios[0]:.1%}-{ratios[-1]:.1%} | {took / cost:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--limit", type=int, default=20, help="samples of each task, of either kind")
    parser.add_argument("--policy", default="worst-task")
    parser.add_argument("--eta", type=float, default=0.003, help="nats that the policy allows")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--suffix", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    if options.models:
        quality(options)
    if options.time:
        timed(options)


if __name__ == "__main__":
    main()
