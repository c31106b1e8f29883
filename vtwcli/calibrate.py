"""Calibration: KL curves over the withdrawal layer, the layer K they give, and its schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vtwcli.data.drawing import sample_content
from vtwcli.data.sample import Sample
from vtwcli.data.sources import DataMix
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError
from vtwcli.io import console
from vtwcli.judge import policies
from vtwcli.judge import statistics as judge
from vtwcli.judge.flops import (
    CONVENTIONS,
    DEFAULT_CONVENTION,
    TextShape,
    prefill_cost,
    tokens_with_withdrawal,
)
from vtwcli.machine import distributed
from vtwcli.machine.libraries import versions
from vtwcli.measure import visipruner as calibrate_visipruner
from vtwcli.measure.preparation import check_model, check_options, open_model, prepare, read_samples
from vtwcli.models.inputs import Encoded
from vtwcli.models.loading import LoadedModel
from vtwcli.recipe.recipe import CalibrateSection, ModelSection, Policy, ScheduleSection
from vtwcli.results.provenance import model_of, provenance_of, run_of
from vtwcli.results.resume import Keep, kept, key_of, stamp
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import LayerSource
from vtwcli.sweep.sweep import Intervention, ItemResult, naive, sweep

FORMAT_VERSION = 1
WIDE_INTERVAL = 2  # layers; a wider interval of K means too few samples


@dataclass(frozen=True)
class Measured:
    """One sample's part of a calibration, plain numbers only, so that ranks and interrupted runs can pass it on.

    Attributes:
        kl: nats by layer and compared position, [L][R].
        agree: top-1 agreement with the full model by layer and position, [L][R].
        prefix, visual, suffix: token counts of the prompt.
    """

    kl: list[list[float]]
    agree: list[list[bool]]
    prefix: int
    visual: int
    suffix: int


def calibrate(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: CalibrateSection = CalibrateSection(),
    *,
    state: Path | None = None,
    rule: ScheduleSection = ScheduleSection(),
) -> dict[str, Any]:
    """Find the withdrawal layer K of a model, or VisiPruner's boundary and thresholds (``options.method``).

    Args:
        model: which model, and where it runs.
        data: sources of samples; by default the demo data for ``demo`` and a small mix of public tasks otherwise.
        options: policy, threshold, positions and so on.
        state: file that keeps finished samples across an interruption (``options.resume``).
        rule: VisiPruner's parameters that are not searched; see ``calibrate_visipruner``, also for its document.

    Returns:
        The result document, plain JSON values: ``withdrawal_layer`` (int or None), ``num_layers``, ``policy``,
        ``eta``, ``min_layer``, ``positions``, ``kl`` (``mean`` [L]; ``samples`` [S][L], each the mean over its
        positions; ``positions`` [S][L][R]) in nats, ``agreement`` (``mean``, ``samples``), ``tasks``, ``policies``
        (K by each policy), ``interval``, ``compromise``, ``cost``, ``schedule`` (canonical form or None), ``model``,
        ``data``, ``samples``, ``versions``, ``seed`` and ``run``. Only ``run`` differs between equal runs.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that contradict each other or the model.
    """
    if options.method == "visipruner":
        return calibrate_visipruner.calibrate(model, data, options, rule)
    started = time.perf_counter()
    check_model(model)
    mix = read_samples(model, data, options)
    loaded, source = open_model(model)
    check_options(options, source)
    timing = {"load": time.perf_counter() - started}
    samples = list(mix.samples)

    def work(known: dict[int, Any], keep: Keep) -> dict[int, Measured]:
        mine = distributed.share(samples)
        done = {place: Measured(**known[place]) for place, _ in mine if place in known}
        missing = [(place, sample) for place, sample in mine if place not in done]
        for place, measured in measure(loaded, source, missing, options, timing):
            done[place] = measured
            keep(place, vars(measured))
        return done

    with kept(state, _key(loaded, source, options), [sample_content(one) for one in samples]) as finished:
        measured = distributed.gathered(partial(work, *finished))
    result = assemble(loaded, source, mix, options, measured)
    timing["total"] = time.perf_counter() - started
    result["run"] = run_of(loaded, timing, streamed=source.together)
    return result


def measure(
    loaded: LoadedModel,
    source: LayerSource,
    samples: Sequence[tuple[int, Sample]],
    options: CalibrateSection,
    timing: dict[str, float],
) -> Iterator[tuple[int, Measured]]:
    """KL and agreement of withdrawal at every layer for each (place, sample), as they are finished.

    ``timing`` gains the seconds of answering and of the sweep.
    """
    encoded, items = prepare(loaded, source, [sample for _, sample in samples], options, timing)
    interventions = [Intervention("withdraw", k) for k in range(source.depth)]
    begun = time.perf_counter()
    finished: list[ItemResult] = []
    total = len(items) * source.depth
    with console.progress(f"{source.depth} layers x {len(items)} samples", total) as bar:
        if loaded.family.no_sweep:
            console.note(f"{loaded.family.title}: one full run per layer, because {loaded.family.no_sweep}")
            search: Callable[..., Any] = naive
        else:
            search = sweep
        if source.together:
            finished = search(source, items, interventions, progress=bar)
        for number, item in enumerate(items):
            if source.together:
                outcome = finished[number]
            else:
                outcome = search(source, [item], interventions, progress=bar)[0]
            place, prompt = samples[number][0], encoded[number]
            yield place, measured_of(outcome, prompt)
    timing["sweep"] = time.perf_counter() - begun


def measured_of(outcome: ItemResult, prompt: Encoded) -> Measured:
    """A sample's part of a calibration from its result for withdrawal at layers 0..L-1."""
    visual = int(prompt.visual[: prompt.prompt_length].sum())
    prefix = int(prompt.visual.int().argmax()) if visual else 0
    return Measured(
        kl=[[float(f"{value:.9g}") for value in row] for row in outcome.kl.tolist()],
        agree=outcome.agree.tolist(),
        prefix=prefix,
        visual=visual,
        suffix=prompt.prompt_length - visual - prefix,
    )


def assemble(
    loaded: LoadedModel,
    source: LayerSource,
    mix: DataMix,
    options: CalibrateSection,
    measured: Sequence[Measured],
) -> dict[str, Any]:
    """The result document of ``calibrate`` without ``run``.

    Args:
        measured: of every sample of the mix, in its order.
    """
    depth = source.depth
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
    cost = _cost(loaded, measured, depth)
    least = max(
        policies.default_min_layer(depth) if options.min_layer is None else options.min_layer,
        loaded.family.first_withdrawal,
    )

    def rule(policy: Policy) -> policies.Rule:
        relative = cost["kv_ratio"] if options.budget_of == "kv" else cost["flops_ratio"][DEFAULT_CONVENTION]
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
    k = policies.choose(chosen, used, used_agree, tasks)
    interval = policies.bootstrap(chosen, used, used_agree, tasks, options.bootstrap, options.seed)
    if options.bootstrap and distributed.is_main():
        _warn_if_uncertain(interval, tasks, options.policy)
    best = policies.compromise(chosen, used, tasks)
    by_task = policies.per_task(rule("sustained"), used, tasks)
    names = np.asarray(tasks)
    at = depth if k is None else k
    schedule = None
    if k is not None:
        found = {"policy": options.policy, "eta": options.eta, "positions": options.positions}
        provenance = provenance_of(loaded, mix, **found)
        schedule = Schedule.withdraw_at(k, **provenance).to_dict()
    return {
        "format": "vtw-calibration",
        "format_version": FORMAT_VERSION,
        "model": model_of(loaded),
        "num_layers": depth,
        "withdrawal_layer": k,
        "interval": list(interval) if interval else None,
        "policy": options.policy,
        "eta": options.eta,
        "positions": options.positions,
        "min_layer": least,
        "options": options.model_dump(mode="json", exclude={"resume"}),
        "policies": {name: policies.choose(rule(name), used, used_agree, tasks) for name in get_args(Policy)},
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
        "cost": {
            "convention": DEFAULT_CONVENTION,
            "visual_tokens": cost["visual_tokens"],
            "text_tokens": cost["text_tokens"],
            "flops_ratio": {name: cost["flops_ratio"][name][at] for name in CONVENTIONS},
            "kv_ratio": cost["kv_ratio"][at],
        },
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
        "data": list(mix.sources),
        "skipped": mix.skipped,
        "seed": options.seed,
        "versions": versions(),
    }


def _cost(loaded: LoadedModel, measured: Sequence[Measured], depth: int) -> dict[str, Any]:
    """Cost of the prompts' prefill with withdrawal at k = 0..L relative to the full model's, over all samples."""
    shape = TextShape.from_config(loaded.model.config)
    counts = [(one.prefix + one.suffix, one.visual) for one in measured]

    def total(k: int, convention: Any) -> int:
        return sum(prefill_cost(shape, tokens_with_withdrawal(depth, t, v, k), convention) for t, v in counts)

    def entries(k: int) -> int:
        return sum(sum(tokens_with_withdrawal(depth, t, v, k)) for t, v in counts)

    layers = range(depth + 1)
    return {
        "flops_ratio": {name: [total(k, name) / total(depth, name) for k in layers] for name in CONVENTIONS},
        "kv_ratio": [entries(k) / entries(depth) for k in layers],
        "text_tokens": sum(t for t, _ in counts) / len(counts),
        "visual_tokens": sum(v for _, v in counts) / len(counts),
    }


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


def _key(loaded: LoadedModel, source: LayerSource, options: CalibrateSection) -> str:
    """What kept samples depend on besides their own content."""
    shaping = options.model_dump(include={"positions", "answers", "max_new_tokens"})
    model = (loaded.name, loaded.revision, str(loaded.dtype), stamp(loaded.path))
    how = (loaded.device.type, source.together, source.eager)
    return key_of("calibration", model, how, shaping, versions())
