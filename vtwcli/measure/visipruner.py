"""VisiPruner's calibration: the shallow boundary from one sweep, the thresholds from real runs.

1. Boundary. For each layer d the sweep mutes text's reading of vision in layers 0..d. The boundary S is the first d at
   which this costs more than eta: the layers before it can be muted together.
2. Thresholds. The last row's contributions in the full model say what sizes occur: their quantiles are the thresholds
   of contribution that are tried, because the published 0.2 is a size of one model's values. Tried are S, half of it
   and 0, and several thresholds of the cosine around the published one.
3. Choice. The runtime runs every combination on the samples. Of those that the policy accepts the cheapest is taken;
   of those within a budget, the one closest to the full model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vtwcli.data.sample import Sample
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.judge.flops import TextShape
from vtwcli.machine import distributed
from vtwcli.machine.libraries import versions
from vtwcli.measure.candidates import Candidate, described, flops_of, pareto, token_counts, tried
from vtwcli.measure.preparation import check_model, check_options, open_model, prepare, read_samples
from vtwcli.methods import visipruner
from vtwcli.models.loading import LoadedModel
from vtwcli.recipe.recipe import CalibrateSection, ModelSection, ScheduleSection
from vtwcli.results.provenance import model_of, provenance_of, run_of
from vtwcli.sweep.layers import LayerSource
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.sweep import Intervention, sweep

FORMAT_VERSION = 1
LAYER_THRESHOLDS = (
    0.999,
    0.995,
    0.98,
    0.9,
)  # the published one, a stricter one that filters earlier, and laxer ones
QUANTILES = (0.5, 0.75, 0.9)  # of contribution; with the published threshold four sizes are tried
_SINK_RATIO = 10.0  # the probe wants one; sinks are not looked at here
_BATCH = 8


def calibrate(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: CalibrateSection = CalibrateSection(),
    rule: ScheduleSection = ScheduleSection(),
) -> dict[str, Any]:
    """Find VisiPruner's shallow boundary and thresholds for a model.

    Args:
        model: which model, and where it runs; layers are not streamed here.
        data: sources of samples, as for VTW's calibration.
        options: policy, eta, budget and so on. ``paper`` and ``sustained`` accept a mean KL up to eta, ``worst-task``
            wants it of every task, ``quantile`` of a high quantile over samples, ``agreement`` a top-1 agreement.
        rule: the parameters that are not searched: ``exit_threshold``, ``exit_layers``, ``consecutive``, ``layer0``;
            its ``tokens_threshold`` is tried with the others.

    Returns:
        The result document, plain JSON values: ``method``, ``schedule`` (canonical form or None),
        ``shallow_mid_layer``, ``layer_threshold`` and ``tokens_threshold`` (those chosen, or None), ``boundary``
        (``layer`` S; ``kl`` of muting layers 0..d for each d, the mean, and ``tasks``), ``candidates`` (a row each,
        see ``candidates.described``, with ``accepted`` and ``pareto``), ``pareto``, ``chosen`` and ``compromise``
        (names), ``policy``, ``eta``, ``cost``, ``tasks``, ``model``, ``data``, ``samples``, ``versions``, ``seed``
        and ``run``.
        Only ``run`` differs between equal runs. ``withdrawal_layer`` is None: each sample has its own.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that contradict each other or the model.
    """
    began = time.perf_counter()
    if options.resume:
        raise UsageError("--resume does not go with --method visipruner")
    check_model(model)
    if model.stream:
        raise UsageError(
            "--method visipruner runs the whole model and cannot stream it", "leave out --stream"
        )
    if options.answers == "reference":
        raise UsageError("--method visipruner compares along the model's own answers", "leave out --answers")
    mix = read_samples(model, data, options)
    loaded, source = open_model(model.model_copy(update={"stream": False}))
    check_options(options, source)
    timing = {"load": time.perf_counter() - began}
    depth, least = source.depth, max(0, loaded.family.first_withdrawal - 2)
    if depth < least + 3:
        raise UsageError(f"VisiPruner needs at least {least + 3} layers, the model has {depth}")
    seen = measured(loaded, source, mix.samples, options, timing)
    mean, by_task = boundary_curves(seen, mix.samples)
    boundary = shallow_boundary(mean, by_task, options)
    pooled = np.concatenate([one["sizes"] for one in seen])
    sizes = sorted({rule.tokens_threshold, *(float(f"{x:.3g}") for x in np.quantile(pooled, QUANTILES))})
    fixed: dict[str, Any] = rule.model_dump(
        include={"exit_threshold", "exit_layers", "consecutive", "layer0"}
    )
    candidates = [
        _candidate(fixed, shallow_mid_layer=shallow, layer_threshold=layer, tokens_threshold=size)
        for shallow in sorted({min(max(one, least), depth - 3) for one in (0, boundary // 2, boundary)})
        for layer in LAYER_THRESHOLDS
        for size in sizes
    ]
    begun = time.perf_counter()
    longest = 1 if options.positions == "first" else options.max_new_tokens
    found = tried(loaded, candidates, mix.samples, longest, _BATCH)
    timing["schedules"] = time.perf_counter() - begun
    shape = TextShape.from_config(loaded.model.config)
    rows = [described(one, number, found, shape) for number, one in enumerate(candidates)]
    front = pareto(rows)
    for number, row in enumerate(rows):
        row["pareto"] = row["name"] in front
        row["quantile_kl"] = float(np.quantile(found.kl(number), options.quantile))
        row["accepted"] = accepted(row, options)
    chosen = choice(rows, options)
    parameters = {} if chosen is None else chosen["parameters"]
    schedule = None
    if chosen is not None:
        how = {"policy": options.policy, "eta": options.eta, "positions": options.positions}
        provenance = provenance_of(loaded, mix, **how)
        schedule = visipruner.schedule(**fixed, **parameters, **provenance).to_dict()
    timing["total"] = time.perf_counter() - began
    return {
        "format": "vtw-calibration",
        "format_version": FORMAT_VERSION,
        "method": "visipruner",
        "model": model_of(loaded),
        "num_layers": depth,
        "withdrawal_layer": None,
        "shallow_mid_layer": parameters.get("shallow_mid_layer"),
        "layer_threshold": parameters.get("layer_threshold"),
        "tokens_threshold": parameters.get("tokens_threshold"),
        "chosen": None if chosen is None else chosen["name"],
        "compromise": min(rows, key=lambda row: (row["worst_kl"], flops_of(row)))["name"],
        "policy": options.policy,
        "eta": options.eta,
        "positions": options.positions,
        "options": options.model_dump(mode="json", exclude={"resume"}),
        "rule": fixed,
        "boundary": {
            "layer": boundary,
            "kl": mean.tolist(),
            "tasks": {task: curve.tolist() for task, curve in by_task.items()},
        },
        "candidates": rows,
        "pareto": front,
        "cost": token_counts(found),
        "tasks": {task: {"samples": found.tasks.count(task)} for task in dict.fromkeys(found.tasks)},
        "schedule": schedule,
        "samples": [
            {"id": sample.id, "fingerprint": fingerprint, "task": sample.task}
            for sample, fingerprint in zip(mix.samples, mix.fingerprints, strict=True)
        ],
        "data": list(mix.sources),
        "skipped": mix.skipped,
        "seed": options.seed,
        "versions": versions(),
        "run": run_of(loaded, timing, streamed=source.together),
    }


def measured(
    loaded: LoadedModel,
    source: LayerSource,
    samples: Sequence[Sample],
    options: CalibrateSection,
    timing: dict[str, float],
) -> list[dict[str, Any]]:
    """What the sweep says of each sample: ``kl`` [L] of muting layers 0..d, and sizes of contribution.

    Returns:
        Per sample ``visual`` (number of visual tokens), ``kl`` (nats, mean over positions) and ``sizes``: the 0, 1,
        .., 100 % quantiles of ||c_i||_2 over visual tokens and layers of the full model.
    """

    def work() -> dict[int, dict[str, Any]]:
        mine = distributed.share(samples)
        _, items = prepare(loaded, source, [sample for _, sample in mine], options, timing)
        mutes = [Intervention("mute", 0, d + 1) for d in range(source.depth)]
        begun = time.perf_counter()
        done = {}
        with console.progress(
            f"{source.depth} layers x {len(items)} samples", len(items) * source.depth
        ) as bar:
            for (place, _), item in zip(mine, items, strict=True):
                probe = LastRowProbe(_SINK_RATIO)
                [outcome] = sweep(source, [item], mutes, probes=[probe], progress=bar)
                sizes = torch.cat([row.contribution for row in probe.found[0, 0]]).double()
                done[place] = {
                    "visual": outcome.visual,
                    "kl": outcome.kl.mean(1).tolist(),
                    "sizes": np.quantile(sizes, np.linspace(0, 1, 101)).tolist() if len(sizes) else [],
                }
        timing["sweep"] = time.perf_counter() - begun
        return done

    return distributed.gathered(work)


def boundary_curves(
    seen: Sequence[dict[str, Any]], samples: Sequence[Sample]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """KL of muting text's reading of vision in layers 0..d, [L]: mean over samples with vision, and by task."""
    rows = [(one["kl"], sample.task) for one, sample in zip(seen, samples, strict=True) if one["visual"]]
    if not rows:
        raise NotFoundError("no sample has a visual token, so there is nothing to prune", "add images")
    kl, tasks = np.array([one for one, _ in rows]), np.array([task for _, task in rows])
    return kl.mean(0), {task: kl[tasks == task].mean(0) for task in dict.fromkeys(tasks.tolist())}


def shallow_boundary(
    mean: NDArray[np.float64], by_task: dict[str, NDArray[np.float64]], options: CalibrateSection
) -> int:
    """S: the first layer that cannot be muted together with all before it; 0 where not even layer 0 can.

    The mean KL decides, under the policy ``worst-task`` that of the worst task.
    """
    curve = np.max(list(by_task.values()), axis=0) if options.policy == "worst-task" else mean
    costly = np.flatnonzero(curve > options.eta)
    return int(costly[0]) if len(costly) else len(curve)


def accepted(row: dict[str, Any], options: CalibrateSection) -> bool:
    """Whether a candidate's row satisfies the policy."""
    if options.policy == "budget":
        cost = row["kv_ratio"] if options.budget_of == "kv" else flops_of(row)
        return bool(cost <= options.budget)
    if options.policy == "agreement":
        return bool(row["agreement"] >= options.agreement)
    kl = {"worst-task": row["worst_kl"], "quantile": row["quantile_kl"]}.get(options.policy, row["kl"])
    return bool(kl <= options.eta)


def choice(rows: Sequence[dict[str, Any]], options: CalibrateSection) -> dict[str, Any] | None:
    """The cheapest accepted row, of equals the closest; under ``budget`` the closest, of equals the cheapest."""
    good = [row for row in rows if row["accepted"]]
    if options.policy == "budget":
        return min(good, key=lambda row: (row["kl"], flops_of(row)), default=None)
    return min(good, key=lambda row: (flops_of(row), row["kl"]), default=None)


def _candidate(fixed: dict[str, Any], **varied: Any) -> Candidate:
    name = "S={shallow_mid_layer} cos={layer_threshold:g} t={tokens_threshold:g}".format(**varied)
    return Candidate(name, "visipruner", visipruner.schedule(**fixed, **varied), varied)
