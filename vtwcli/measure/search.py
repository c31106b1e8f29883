"""A calibration by candidates: a sweep answers what the method asks, the runtime runs what it then proposes.

Of the candidates that the policy accepts the cheapest is taken; of those within a budget, the one closest to the full
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import numpy as np
import torch

from vtwcli.data.sample import Sample
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.machine import distributed
from vtwcli.measure.accepted import choice, grown, judged
from vtwcli.measure.candidates import compared, flops_of, token_counts
from vtwcli.measure.exits import Beside
from vtwcli.measure.guaranteed import of_candidates
from vtwcli.measure.many import walked
from vtwcli.measure.promised import halved, promise_of
from vtwcli.measure.study import STREAMED, Study
from vtwcli.methods import METHODS
from vtwcli.methods.method import Alone, Answers, Candidate, Method
from vtwcli.recipe.recipe import CalibrateSection, ModelSection
from vtwcli.results.calibration import (
    FORMAT,
    FORMAT_VERSION,
    SearchedCalibration,
    with_own_keys,
)
from vtwcli.sweep.lost import LostProbe
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.sweep import sweep
from vtwcli.sweep.views import Probe

_SINK_RATIO = 10.0  # the probe wants one; sinks are not looked at here


def search(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: CalibrateSection = CalibrateSection(),
    rule: Mapping[str, Any] = MappingProxyType({}),
) -> SearchedCalibration:
    """Find the parameters of a method (``options.method``) for a model.

    Args:
        model: which model, and where it runs; streamed layers are compared along reference answers.
        data: sources of samples, as for VTW's calibration.
        options: policy, eta, budget and so on. ``paper`` and ``sustained`` accept a mean KL up to eta, ``worst-task``
            wants it of every task, ``quantile`` of a high quantile over samples, ``agreement`` a top-1 agreement.
            ``guarantee`` makes candidates and their front on half of the samples, and tests that front on the others,
            from its dearest candidate to its cheapest.
        rule: parameters that are not searched, of the recipe's schedule section.

    Returns:
        The result document, plain JSON values, with the method's ``searched`` parameters (those chosen, or None)
        and its ``findings``.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that contradict each other or the model.
    """
    method = METHODS[options.method]
    if options.resume:
        raise UsageError(f"--resume does not go with --method {method.key}")
    if options.answers == "reference" and not model.stream:
        raise UsageError(
            f"--method {method.key} compares along the model's own answers", "leave out --answers"
        )
    study = Study.open(model, data, options)
    if study.streamed and options.answers == "generated" and options.positions == "answer":
        raise UsageError(
            f"--method {method.key} compares along the samples' reference answers when layers are streamed",
            "leave out --answers",
        )
    study.check_sweep()
    if study.streamed:
        console.note(STREAMED)
    mix = study.mix
    promise, ordering, testing, ordered = promise_of(options), study, study, list[Candidate]()
    if promise is not None:  # what makes and orders the candidates must not test them
        ordering, testing = map(study.of, halved(mix.samples, options.seed))
    seen = measured(ordering, method)
    answers = answered(seen, ordering.samples, options)
    candidates = method.candidates(study.shape, answers, rule)
    longest = 1 if options.positions == "first" else options.longest
    beside = Beside.run(ordering, candidates, longest) if method.leaves_alone else None
    found = beside.found if beside else ordering.try_(candidates, longest)
    candidates, found = grown(ordering, candidates, found, longest)
    tried, front = compared(candidates, found, study.text)
    rows = [judged(row, found.kl(number), options) for number, row in enumerate(tried)]
    counts, promised = found.counts, None
    if promise is not None:
        by_name = {one.name: one for one in candidates}
        ordered = method.safest_first([by_name[name] for name in front])
        beside = Beside.run(testing, ordered, longest) if beside else None
        promised = of_candidates(testing, promise, ordered, longest, beside.found if beside else None)
        promised["ordered_on"] = {task: one["samples"] for task, one in counts.items()}
        held = {one["candidate"] for one in promised["tested"] if one["holds"]}
        rows = [{**row, "accepted": row["name"] in held} for row in rows]
        counts = {
            task: {"samples": promised["ordered_on"].get(task, 0) + promised["samples"].get(task, 0)}
            for task in promised["ordered_on"] | promised["samples"]
        }
    chosen = choice(rows, options)
    schedule = None
    if chosen is not None:
        provenance = study.provenance(**options.how())
        [one] = [one for one in candidates if one.name == chosen["name"]]
        schedule = one.schedule.model_copy(
            update={"provenance": {**one.schedule.provenance, **provenance}}
        ).to_dict()
    document: SearchedCalibration = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": method.key,
        "model": study.model(),
        "num_layers": study.shape.depth,
        "withdrawal_layer": None,
        "chosen": None if chosen is None else chosen["name"],
        "compromise": min(rows, key=lambda row: (row["worst_kl"], flops_of(row)))["name"],
        "policy": options.policy,
        "eta": options.eta,
        "positions": options.positions,
        "options": options.recorded(),
        "rule": {
            key: value
            for key, value in rule.items()
            if key in method.model_fields and key not in method.searched
        },
        "candidates": rows,
        "pareto": front,
        "cost": token_counts(found),
        "tasks": counts,
        "schedule": schedule,
        "samples": [
            {"id": sample.id, "fingerprint": fingerprint, "task": sample.task}
            for sample, fingerprint in zip(mix.samples, mix.fingerprints, strict=True)
        ],
        **study.origin(options.seed),
        "run": {**study.run(), "streamed": study.streamed},
    }
    if promised is not None:
        document["guarantee"] = promised
    if beside and chosen is not None:
        names = [one.name for one in (candidates if promise is None else ordered)]
        document["exits"] = beside.exits(names.index(chosen["name"]), promise, longest)
    parameters = {} if chosen is None else chosen["parameters"]
    searched = {name: parameters.get(name) for name in method.searched}
    findings = method.findings(answers)
    if method.key != "visipruner":  # whose keys are older than those for all methods
        searched, findings = {"parameters": searched}, {"findings": findings}
    return with_own_keys(document, {"withdrawal_layer": searched, "rule": findings})


class Seen(TypedDict):
    """What the sweep says of a sample.

    Attributes:
        visual: number of visual tokens.
        kl: of every intervention asked for, mean over positions or that of the first, nats.
        sizes: the 0, 1, .., 100 % quantiles of ||c_i||_2 over visual tokens and layers of the full model.
        lost: of each layer, see ``sweep.lost``; empty where nobody asks.
        read: the share of the last row's attention that goes to visual tokens in each layer.
    """

    visual: int
    kl: list[float]
    sizes: list[float]
    lost: list[list[float]]
    read: list[float]


def measured(study: Study[CalibrateSection], method: type[Method]) -> list[Seen]:
    """What the sweep says of each sample to a method's questions."""
    asked, mine = method.ask(study.shape), study.share()

    def work() -> dict[int, Seen]:
        encoded, items = study.encode(mine)
        source, done = study.source, dict[int, Seen]()
        words = f"{source.depth} layers x {len(items)} samples"
        with study.part("sweep"), console.progress(words, len(items) * source.depth) as bar:
            for part in walked(study.loaded, source, encoded, asked):
                probe, losses = LastRowProbe(_SINK_RATIO), LostProbe()
                probes: list[Probe] = [probe, losses] if method.lost else [probe]
                outcomes = sweep(source, [items[i] for i in part], asked, probes=probes, progress=bar)
                for number, (i, outcome) in enumerate(zip(part, outcomes, strict=True)):
                    sizes = torch.cat([row.contribution for row in probe.found[number, 0]]).double()
                    done[mine[i]] = {
                        "visual": outcome.visual,
                        "kl": (outcome.kl[:, 0] if method.at_prompt else outcome.kl.mean(1)).tolist(),
                        "sizes": np.quantile(sizes, np.linspace(0, 1, 101)).tolist() if len(sizes) else [],
                        "lost": [layer.tolist() for layer in losses.found[number, 0]],
                        "read": [float(row.attention.sum()) for row in probe.found[number, 0]],
                    }
        return done

    return distributed.gathered(work)


def answered(seen: Sequence[Seen], samples: Sequence[Sample], options: CalibrateSection) -> Answers:
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
        worst_task=options.policy in ("worst-task", "guarantee"),
        lost=np.mean([one["lost"] for one in seen if one["visual"]], axis=0).tolist(),
        samples=[
            Alone(sample.task, one["kl"], one["read"])
            for one, sample in zip(seen, samples, strict=True)
            if one["visual"]
        ],
    )
