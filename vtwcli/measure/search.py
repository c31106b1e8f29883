"""A calibration by candidates: a sweep answers what the method asks, the runtime runs what it then proposes.

Of the candidates that the policy accepts the cheapest is taken; of those within a budget, the one closest to the full
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from vtwcli.data.sample import Sample
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.machine import distributed
from vtwcli.measure.candidates import described, flops_of, pareto, token_counts
from vtwcli.measure.samples import check_model
from vtwcli.measure.study import Study
from vtwcli.methods import METHODS
from vtwcli.methods.method import Answers
from vtwcli.recipe.recipe import CalibrateSection, ModelSection
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.sweep import sweep

FORMAT_VERSION = 1
_SINK_RATIO = 10.0  # the probe wants one; sinks are not looked at here
_BATCH = 8


def search(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: CalibrateSection = CalibrateSection(),
    rule: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Find the parameters of a method (``options.method``) for a model.

    Args:
        model: which model, and where it runs; layers are not streamed here.
        data: sources of samples, as for VTW's calibration.
        options: policy, eta, budget and so on. ``paper`` and ``sustained`` accept a mean KL up to eta, ``worst-task``
            wants it of every task, ``quantile`` of a high quantile over samples, ``agreement`` a top-1 agreement.
        rule: parameters that are not searched, of the recipe's schedule section.

    Returns:
        The result document, plain JSON values: ``method``, ``schedule`` (canonical form or None),
        the method's ``searched`` parameters (those chosen, or None), its ``findings``, ``candidates`` (a row each,
        see ``candidates.described``, with ``accepted`` and ``pareto``), ``pareto``, ``chosen`` and ``compromise``
        (names), ``policy``, ``eta``, ``cost``, ``tasks``, ``model``, ``data``, ``samples``, ``versions``, ``seed``
        and ``run``.
        Only ``run`` differs between equal runs. ``withdrawal_layer`` is None: each sample has its own.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that contradict each other or the model.
    """
    method = METHODS[options.method]
    if options.resume:
        raise UsageError(f"--resume does not go with --method {method.key}")
    check_model(model)
    if model.stream:
        raise UsageError(
            f"--method {method.key} runs the whole model and cannot stream it", "leave out --stream"
        )
    if options.answers == "reference":
        raise UsageError(
            f"--method {method.key} compares along the model's own answers", "leave out --answers"
        )
    study = Study.open(model, data, options, whole=True)
    study.check_sweep()
    mix = study.mix
    seen = measured(study, method.ask(study.shape))
    answers = answered(seen, mix.samples, options)
    candidates = method.candidates(study.shape, answers, rule)
    longest = 1 if options.positions == "first" else options.max_new_tokens
    found = study.try_(candidates, longest, _BATCH)
    rows = [described(one, number, found, study.text) for number, one in enumerate(candidates)]
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
        provenance = study.provenance(**how)
        [one] = [one for one in candidates if one.name == chosen["name"]]
        schedule = one.schedule.model_copy(
            update={"provenance": {**one.schedule.provenance, **provenance}}
        ).to_dict()
    return {
        "format": "vtw-calibration",
        "format_version": FORMAT_VERSION,
        "method": method.key,
        "model": study.model(),
        "num_layers": study.shape.depth,
        "withdrawal_layer": None,
        **{name: parameters.get(name) for name in method.searched},
        "chosen": None if chosen is None else chosen["name"],
        "compromise": min(rows, key=lambda row: (row["worst_kl"], flops_of(row)))["name"],
        "policy": options.policy,
        "eta": options.eta,
        "positions": options.positions,
        "options": options.model_dump(mode="json", exclude={"resume"}),
        "rule": {key: value for key, value in rule.items() if key not in method.searched},
        **method.findings(answers),
        "candidates": rows,
        "pareto": front,
        "cost": token_counts(found),
        "tasks": {task: {"samples": found.tasks.count(task)} for task in dict.fromkeys(found.tasks)},
        "schedule": schedule,
        "samples": [
            {"id": sample.id, "fingerprint": fingerprint, "task": sample.task}
            for sample, fingerprint in zip(mix.samples, mix.fingerprints, strict=True)
        ],
        **study.data(options.seed),
        "run": study.run(streamed=False),
    }


def measured(study: Study[CalibrateSection], asked: Sequence[Intervention]) -> list[dict[str, Any]]:
    """What the sweep says of each sample: ``kl`` of every intervention asked for, and sizes of contribution.

    Returns:
        Per sample ``visual`` (number of visual tokens), ``kl`` (nats, mean over positions) and ``sizes``: the 0, 1,
        .., 100 % quantiles of ||c_i||_2 over visual tokens and layers of the full model.
    """

    def work() -> dict[int, dict[str, Any]]:
        mine = distributed.share(study.samples)
        _, items = study.encode([sample for _, sample in mine])
        source, done = study.source, {}
        words = f"{source.depth} layers x {len(items)} samples"
        with study.part("sweep"), console.progress(words, len(items) * source.depth) as bar:
            for (place, _), item in zip(mine, items, strict=True):
                probe = LastRowProbe(_SINK_RATIO)
                [outcome] = sweep(source, [item], list(asked), probes=[probe], progress=bar)
                sizes = torch.cat([row.contribution for row in probe.found[0, 0]]).double()
                done[place] = {
                    "visual": outcome.visual,
                    "kl": outcome.kl.mean(1).tolist(),
                    "sizes": np.quantile(sizes, np.linspace(0, 1, 101)).tolist() if len(sizes) else [],
                }
        return done

    return distributed.gathered(work)


def answered(seen: Sequence[dict[str, Any]], samples: Sequence[Sample], options: CalibrateSection) -> Answers:
    """What a method is told: of the samples with vision the mean of every curve, and sizes of contribution.

    Raises:
        NotFoundError: no sample has a visual token.
    """
    rows = [(one["kl"], sample.task) for one, sample in zip(seen, samples, strict=True) if one["visual"]]
    if not rows:
        raise NotFoundError("no sample has a visual token, so there is nothing to prune", "add images")
    kl, tasks = np.array([one for one, _ in rows]), np.array([task for _, task in rows])
    return Answers(
        kl=kl.mean(0).tolist(),
        by_task={task: kl[tasks == task].mean(0).tolist() for task in dict.fromkeys(tasks.tolist())},
        contribution=np.concatenate([one["sizes"] for one in seen]).tolist(),
        eta=options.eta,
        worst_task=options.policy == "worst-task",
    )


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
