"""Calibration: KL curves over the withdrawal layer, the layer K they give, and its schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError
from vtwcli.io import console
from vtwcli.judge import policies
from vtwcli.judge import statistics as judge
from vtwcli.judge.flops import (
    CONVENTIONS,
    DEFAULT_CONVENTION,
    Convention,
    TextShape,
    kv_bytes,
    prefill_cost,
    tokens_with_withdrawal,
)
from vtwcli.machine import distributed
from vtwcli.machine.libraries import versions
from vtwcli.measure import guaranteed
from vtwcli.measure.promised import promise_of
from vtwcli.measure.search import search
from vtwcli.measure.study import Study
from vtwcli.measure.withdrawn import Measured, measured_of
from vtwcli.methods import METHODS
from vtwcli.recipe.recipe import CalibrateSection, ModelSection, Policy, ScheduleSection
from vtwcli.results.calibration import FORMAT, FORMAT_VERSION, Calibration, Cost, VtwCalibration
from vtwcli.results.resume import Store, kept, key_of, stamp
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.sweep import sweep

WIDE_INTERVAL = 2  # layers; a wider interval of K means too few samples


def calibrate(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: CalibrateSection = CalibrateSection(),
    *,
    state: Path | None = None,
    rule: ScheduleSection = ScheduleSection(),
) -> Calibration:
    """Find the withdrawal layer K of a model, or VisiPruner's boundary and thresholds (``options.method``).

    Args:
        model: which model, and where it runs.
        data: sources of samples; by default the demo data for ``demo`` and a small mix of public tasks otherwise.
        options: policy, threshold, positions and so on.
        state: file that keeps finished samples across an interruption (``options.resume``).
        rule: VisiPruner's parameters that are not searched; see ``measure.search``.

    Returns:
        The result document, plain JSON values.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that contradict each other or the model.
    """
    if METHODS[options.method].searched:
        return search(model, data, options, rule.rule())
    study = Study.open(model, data, options)
    study.check_sweep()
    mine = study.share()

    def work(known: dict[int, Any], keep: Store) -> dict[int, Measured]:
        done = {place: Measured(**known[place]) for place in mine if place in known}
        for place, measured in measure(study, [place for place in mine if place not in done]):
            done[place] = measured
            keep(place, vars(measured))
        return done

    with kept(state, _key(study), study.contents()) as finished:
        measured = distributed.gathered(partial(work, *finished))
    result = assemble(study, measured)
    result["run"] = {**study.run(), "streamed": study.streamed}
    return result


def measure(study: Study[CalibrateSection], mine: Sequence[int]) -> Iterator[tuple[int, Measured]]:
    """KL and agreement of withdrawal at every layer for the samples at ``mine``, as they are finished."""
    encoded, items = study.encode(mine)
    source, asked = study.source, METHODS["vtw"].ask(study.shape)
    total = len(items) * source.depth
    with study.part("sweep"), console.progress(f"{source.depth} layers x {len(items)} samples", total) as bar:
        parts = [items] if study.streamed else [[item] for item in items]
        outcomes = (one for part in parts for one in sweep(source, part, asked, progress=bar))
        for place, prompt, outcome in zip(mine, encoded, outcomes, strict=True):
            yield place, measured_of(outcome, prompt)


def assemble(
    study: Study[Any], measured: Sequence[Measured], options: CalibrateSection | None = None
) -> VtwCalibration:
    """The result document of ``calibrate`` without ``run``.

    Args:
        measured: of every sample of the study, in its order.
        options: of the calibration, where the study is another command's.
    """
    options = options or study.options
    depth, mix = study.shape.depth, study.mix
    kl = np.array([np.mean(one.kl, axis=1) for one in measured])
    agree = np.array([np.mean(one.agree, axis=1) for one in measured])
    seeing = np.array([one.visual > 0 for one in measured])
    if not seeing.any():
        raise NotFoundError(
            "no sample has a visual token, so there is nothing to withdraw", "add samples with images"
        )
    if not seeing.all():
        console.warn(f"{int((~seeing).sum())} samples have no visual token; they do not count")
    used, used_agree = kl[seeing], agree[seeing]
    tasks = [sample.task for sample, sees in zip(mix.samples, seeing, strict=True) if sees]
    costs = _costs(study.text, measured, depth)
    least = study.least(options.min_layer)

    def rule(policy: Policy) -> policies.Rule:
        kv = options.budget_of == "kv"
        relative = [one["kv_ratio"] if kv else one["flops_ratio"][DEFAULT_CONVENTION] for one in costs]
        return policies.Rule(
            policy,
            options.eta,
            least,
            options.quantile,
            options.agreement,
            options.budget,
            tuple(relative[:depth]),
        )

    chosen = rule(options.policy)
    promise, promised = promise_of(options), None
    if promise is None:
        k = policies.choose(chosen, used, used_agree, tasks)
    else:
        k, promised = guaranteed.of_layers(study, promise, least, kl, agree, seeing)
    interval = policies.bootstrap(chosen, used, used_agree, tasks, options.bootstrap, options.seed)
    if options.bootstrap and promise is None and distributed.is_main():
        _warn_if_uncertain(interval, tasks, options.policy)
    best = policies.compromise(chosen, used, tasks)
    by_task = policies.per_task(rule("sustained"), used, tasks)
    names = np.asarray(tasks)
    schedule = None
    if k is not None:
        schedule = Schedule.withdraw_at(k, **study.provenance(**options.how())).to_dict()
    by_policy: dict[str, int | None] = {
        name: policies.choose(rule(name), used, used_agree, tasks) for name in policies.OF_CURVES
    }
    document: VtwCalibration = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": study.model(),
        "num_layers": depth,
        "withdrawal_layer": k,
        "interval": list(interval) if interval else None,
        "policy": options.policy,
        "eta": options.eta,
        "positions": options.positions,
        "min_layer": least,
        "options": options.recorded(),
        "policies": by_policy if promise is None else by_policy | {"guarantee": k},
        "compromise": {"layer": best, "kl": float(used.mean(axis=0)[best])},
        "tasks": {
            task: {
                "samples": int((names == task).sum()),
                "withdrawal_layer": by_task[task],
                "kl": used[names == task].mean(axis=0).tolist(),
                "agreement": used_agree[names == task].mean(axis=0).tolist(),
            }
            for task in by_task
        },
        "kl": {
            "mean": used.mean(axis=0).tolist(),
            "samples": kl.tolist(),
            "positions": [one.kl for one in measured],
        },
        "agreement": {"mean": used_agree.mean(axis=0).tolist(), "samples": agree.tolist()},
        "cost": costs[depth if k is None else k],
        "schedule": schedule,
        "samples": [
            {
                "id": sample.id,
                "fingerprint": fingerprint,
                "task": sample.task,
                "prefix": one.prefix,
                "visual": one.visual,
                "suffix": one.suffix,
                "positions": len(one.kl[0]),
            }
            for sample, fingerprint, one in zip(mix.samples, mix.fingerprints, measured, strict=True)
        ],
        **study.origin(options.seed),
    }
    if promised is not None:
        document["guarantee"] = promised
    return document


def _costs(shape: TextShape, measured: Sequence[Measured], depth: int) -> list[Cost]:
    """Cost of the prompts' prefill with withdrawal at k = 0..L relative to the full model's, over all samples."""
    counts = [(one.prefix + one.suffix, one.visual) for one in measured]

    def total(k: int, convention: Convention) -> int:
        return sum(prefill_cost(shape, tokens_with_withdrawal(depth, t, v, k), convention) for t, v in counts)

    def entries(k: int) -> int:
        return sum(kv_bytes(shape, tokens_with_withdrawal(depth, t, v, k), 1) for t, v in counts)

    return [
        {
            "convention": DEFAULT_CONVENTION,
            "visual_tokens": sum(v for _, v in counts) / len(counts),
            "text_tokens": sum(t for t, _ in counts) / len(counts),
            "flops_ratio": {name: total(k, name) / total(depth, name) for name in CONVENTIONS},
            "kv_ratio": entries(k) / entries(depth),
        }
        for k in range(depth + 1)
    ]


def _warn_if_uncertain(interval: tuple[int, int] | None, tasks: Sequence[str], policy: Policy) -> None:
    """Say so where there are too few samples for an interval, or it is wide."""
    count = "1 sample leaves" if len(tasks) == 1 else f"{len(tasks)} samples leave"
    if interval is None:
        names = list(dict.fromkeys(tasks))
        few = ", ".join(f"{task}: {tasks.count(task)}" for task in names)
        each = policy == "worst-task"
        needed = f"{judge.FEWEST} of each task" if each else len(names) + judge.FEWEST - 1
        console.warn(
            f"{count} K uncertain: too few distinct samples for a 95 % interval ({few}); it takes {needed}, with a "
            "larger --limit or more data"
        )
    elif interval[1] - interval[0] > WIDE_INTERVAL:
        console.warn(
            f"{count} K uncertain (95 % interval {interval[0]}..{interval[1]}); a larger --limit narrows it"
        )


def _key(study: Study[CalibrateSection]) -> str:
    """What kept samples depend on besides their own content."""
    loaded = study.loaded
    shaping = study.options.model_dump(include={"positions", "answers", "max_new_tokens"})
    model = (loaded.name, loaded.revision, str(loaded.dtype), stamp(loaded.path))
    how = (loaded.device.type, study.streamed, study.source.eager)
    return key_of("calibration", model, how, shaping, versions())
