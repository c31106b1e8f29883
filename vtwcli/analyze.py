"""The three-stage profile: which layers carry vision along, which fuse it with text, which no longer need it.

One sweep over the layers gives every KL curve, and last-row probes beside it give the rest. Cost per sample, with
c(n) the cost of n rows in one layer, S the prompt, Q the text behind the first image and V the visual tokens: a plain
forward, L·c(S); the curves of withdrawal and of the three knock-outs, each Σ(L-k)·c(Q); the layers' updates, the
dearest, Σ(L-k)·c(V+Q).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from vtwcli.calibrate import assemble
from vtwcli.data.sample import Sample
from vtwcli.data.sources import DataMix
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.judge import stages
from vtwcli.judge.kl import is_distribution, not_finite
from vtwcli.machine import distributed
from vtwcli.measure.candidates import described, flops_of
from vtwcli.measure.many import walked
from vtwcli.measure.profile import Profile, interventions, map_of, profile_of
from vtwcli.measure.study import Study
from vtwcli.methods import visipruner
from vtwcli.methods.stages import Stages
from vtwcli.recipe.recipe import AnalyzeSection, CalibrateSection, ModelSection
from vtwcli.results.analysis import (
    FORMAT,
    FORMAT_VERSION,
    AnalysisDocument,
    Quartiles,
    Ranges,
    Spread,
)
from vtwcli.results.calibration import VtwCalibration
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.sweep import sweep

_SHARED = ("limit", "seed", "skip_bad", "positions", "answers", "max_new_tokens", "batch_size")

# each measure of the document, one number per layer, and what it is
MEASURES = {
    "withdrawal": "KL when visual tokens are withdrawn from this layer on (VTW, arXiv 2405.05803), which is also the "
    "KL when text does not read vision from here on",
    "knockout_layer": "KL when text does not read vision in this layer alone",
    "knockout_window": "KL when text does not read vision in this layer and the next of the window",
    "knockout_until": "KL when text does not read vision in all layers up to and with this one",
    "layer_update": "KL when this layer's update of visual tokens is removed (ShortV, arXiv 2504.00502)",
    "attention_prefix": "attention of the last token on text before the first image, mean over heads",
    "attention_visual": "attention of the last token on visual tokens",
    "attention_suffix": "attention of the last token on text behind the first visual token",
    "attention_first": "attention of the last token on the first visual token alone",
    "entropy": "entropy of the last token's attention over visual tokens, nats, mean over heads",
    "value_norm": "L1 norm of visual tokens' value vectors, sinks apart",
    "value_norm_sinks": "L1 norm of the sinks' value vectors",
    "sinks": "number of visual tokens with sink_ratio times the average visual token's attention",
    "minimum_cosine": "smallest cos(o - c_i, o) of a visual token (VisiPruner, arXiv 2510.17205)",
    "critical": "number of visual tokens whose contribution ||c_i||_2 exceeds tokens_threshold",
    "lens_agreement": "share of samples whose logit lens already names the full model's next token",
}


class Analysis(NamedTuple):
    """What ``analyze`` gives.

    Attributes:
        result: the profile.
        samples: those it counts, in its order, for their images.
        calibration: the result document of ``calibrate`` from the same sweep, where it was asked for.
    """

    result: AnalysisDocument
    samples: list[Sample]
    calibration: VtwCalibration | None


def shares_sweep(options: AnalyzeSection, calibration: CalibrateSection) -> bool:
    """Whether both sections ask about the same samples and positions, so that one sweep serves both.

    A calibration that is to be resumable, searches for VisiPruner's parameters or gives a promise runs by itself.
    """
    if calibration.resume or calibration.method != "vtw" or calibration.policy == "guarantee":
        return False
    return all(getattr(options, name) == getattr(calibration, name) for name in _SHARED)


def analyze(
    model: ModelSection,
    data: Sequence[DataSpec] = (),
    options: AnalyzeSection = AnalyzeSection(),
    *,
    calibration: CalibrateSection | None = None,
) -> Analysis:
    """Profile a model's layers by what they do with vision.

    Args:
        model: which model, and where it runs.
        data: sources of samples, as for ``calibrate``.
        options: what is measured and shown.
        calibration: also give the result of ``calibrate`` with these options; ``shares_sweep`` must hold.

    Returns:
        The result document, plain JSON values; samples without visual tokens do not count and are left out. All
        thresholds but ``tokens_threshold`` can be changed on the document: ``judge.stages.boundaries`` and
        ``visipruner.filter_and_exit`` take what it holds.

    Raises:
        NotFoundError: model or data missing or unreadable, or no sample has a visual token.
        UsageError: options that contradict each other or the model.
    """
    if calibration is not None and not shares_sweep(options, calibration):
        raise UsageError(
            "analyze and calibrate cannot share one sweep with these options",
            f"equal {', '.join(_SHARED)}, and neither resume, another method than vtw nor the policy guarantee",
        )
    study = Study.open(model, data, options)
    study.check_sweep()
    shown = _shown(study.mix, options.maps)
    layers = _map_layers(options, study.shape.depth)

    mine = study.share()

    def work() -> dict[int, Profile]:
        return dict(_measure(study, mine, shown, layers))

    profiles = distributed.gathered(work)
    result, samples = _result(study, profiles, layers)
    _propose(study, result)
    both = None
    if calibration is not None:
        both = assemble(study, [one.calibration for one in profiles], calibration)
    result["run"] = {**study.run(), "streamed": study.streamed}
    if both is not None:
        both["run"] = result["run"]
    return Analysis(result, samples, both)


def _measure(
    study: Study[AnalyzeSection],
    mine: Sequence[int],
    shown: set[int],
    map_layers: Sequence[int],
) -> Iterator[tuple[int, Profile]]:
    """The profiles of the samples at ``mine``, with their places."""
    loaded, source, options = study.loaded, study.source, study.options
    encoded, items = study.encode(mine)
    freeze = not source.together if options.freeze is None else options.freeze
    if options.freeze is None and not freeze:
        console.note("layers are streamed: what their updates give is left out; --freeze measures it")
    curves = interventions(source.depth, min(options.window, source.depth), freeze)
    wanted = list(dict.fromkeys(one for curve in curves.values() for one in curve))
    places = {name: [wanted.index(one) for one in curve] for name, curve in curves.items()}
    total = len(items) * source.depth
    with study.part("sweep"), console.progress(f"{source.depth} layers x {len(items)} samples", total) as bar:
        for part in walked(loaded, source, encoded, wanted):
            probe = LastRowProbe(options.sink_ratio)
            outcomes = sweep(source, [items[i] for i in part], wanted, probes=[probe], progress=bar)
            with source.head() as head:
                for number, i in enumerate(part):
                    place, sample = mine[i], study.samples[mine[i]]
                    rows, outcome = probe.found[number, 0], outcomes[number]
                    lens = head(torch.stack([row.out for row in rows])) if options.lens else None
                    if lens is not None and not bool((sound := is_distribution(lens)).all()):
                        where = f"the logit lens of layer {int(sound.int().argmin())} is"
                        raise not_finite(items[i].name, where, loaded.dtype)
                    one = profile_of(loaded, outcome, encoded[i], rows, lens, places, options)
                    if place in shown:
                        one = replace(one, map=map_of(loaded, sample, encoded[i], rows, map_layers))
                    yield place, one


def _shown(mix: DataMix, count: int) -> set[int]:
    """Places of the samples that are shown with their images: the first of each task, then the second, and so on."""
    turns: dict[str, int] = {}
    order = []
    for place, sample in enumerate(mix.samples):
        if sample.images:
            turns[sample.task] = turns.get(sample.task, 0) + 1
            order.append((turns[sample.task], place))
    return {place for _, place in sorted(order)[:count]}


def _map_layers(options: AnalyzeSection, depth: int) -> list[int]:
    if options.map_layers is None:
        return sorted({round(i * (depth - 1) / 5) for i in range(6)})
    for layer in options.map_layers:
        if not 0 <= layer < depth:
            raise UsageError(f"--map-layers: there is no layer {layer}, the model has layers 0..{depth - 1}")
    return sorted(set(options.map_layers))


def _result(
    study: Study[AnalyzeSection], profiles: Sequence[Profile], map_layers: Sequence[int]
) -> tuple[AnalysisDocument, list[Sample]]:
    """The document without ``run``, and the samples that count."""
    mix, options = study.mix, study.options
    places = [i for i, one in enumerate(profiles) if one.calibration.visual]
    if not places:
        raise NotFoundError(
            "no sample has a visual token, so there is nothing to analyze", "add samples with images"
        )
    if len(places) < len(profiles) and distributed.is_main():
        console.warn(f"{len(profiles) - len(places)} samples have no visual token; they do not count")
    samples, seeing = [mix.samples[i] for i in places], [profiles[i] for i in places]
    columns = {"withdrawal": [np.mean(one.calibration.kl, axis=1).tolist() for one in seeing]}
    for name in MEASURES:
        rows = [one.curves.get(name) or one.layers.get(name) for one in seeing]
        if rows[0] is not None:
            columns[name] = rows
    measures = {name: _spread(rows) for name, rows in columns.items()}
    measures["withdrawal"]["positions"] = [one.calibration.kl for one in seeing]
    for name in seeing[0].positions:
        measures[name]["positions"] = [one.positions[name] for one in seeing]
    least = study.least(options.min_layer)
    tasks = [sample.task for sample in samples]

    def of_task(name: str, task: str) -> list[float]:
        rows = [row for row, one in zip(columns[name], tasks, strict=True) if one == task]
        return [float(x) for x in np.mean(rows, axis=0)]

    def curve(name: str) -> list[float]:
        return [x for x in measures[name]["mean"] if x is not None]  # these are measured in every layer

    found, by_task = stages.boundaries(
        np.array(columns["knockout_until"]), np.array(columns["withdrawal"]), tasks, options.eta, least
    )
    rules = (options.layer_threshold, options.exit_threshold, options.exit_layers)
    ends = [
        visipruner.filter_and_exit(
            one.layers["minimum_cosine"], one.layers["critical"], one.kept_minimum, len(found.shallow), *rules
        )
        for one in seeing
    ]
    kept = [
        None if f is None else one.layers["critical"][f - 1] for one, (f, _) in zip(seeing, ends, strict=True)
    ]
    provenance = study.provenance(eta=options.eta, positions=options.positions)
    rule = visipruner.VisiPruner.of(options)
    dynamic = visipruner.behind(len(found.shallow), study.shape, rule, provenance)
    result: AnalysisDocument = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": study.model(),
        "num_layers": study.shape.depth,
        "eta": options.eta,
        "positions": options.positions,
        "min_layer": least,
        "options": options.model_dump(mode="json"),
        "stages": {
            **_ranges(found),
            "sentences": stages.sentences(
                found,
                curve("knockout_until"),
                curve("knockout_layer"),
                curve("withdrawal"),
                curve("critical"),
                options.eta,
            ),
            "tasks": {
                task: {
                    "samples": tasks.count(task),
                    **_ranges(one),
                    "knockout_until": of_task("knockout_until", task),
                    "withdrawal": of_task("withdrawal", task),
                }
                for task, one in by_task.items()
            },
        },
        "visipruner": {
            "shallow": len(found.shallow),
            "filter": _middle([f for f, _ in ends]),
            "exit": _middle([e for _, e in ends]),
            "kept": _middle(kept),
        },
        "schedules": {
            "static": stages.static_schedule(found, provenance).to_dict(),
            "dynamic": dynamic.to_dict() if dynamic else None,
        },
        "measures": {
            name: {"what": MEASURES[name], **measures[name]} for name in MEASURES if name in measures
        },
        "samples": [
            {
                "id": sample.id,
                "fingerprint": mix.fingerprints[place],
                "task": sample.task,
                "question": sample.prompt,
                "prefix": one.calibration.prefix,
                "visual": one.calibration.visual,
                "suffix": one.calibration.suffix,
                "filter": end[0],
                "exit": end[1],
                "kept": count,
                "critical": one.critical,
                "kept_cosine": one.kept_minimum,
                "lens": [[list(token) for token in layer] for layer in one.lens],
            }
            for place, sample, one, end, count in zip(places, samples, seeing, ends, kept, strict=True)
        ],
        "maps": [{"sample": i, **one.map} for i, one in enumerate(seeing) if one.map],
        "map_layers": list(map_layers),
        **study.origin(options.seed),
    }
    return result, samples


def _propose(study: Study[AnalyzeSection], result: AnalysisDocument) -> None:
    """Look for frozen layers in front of the deep stage that withdrawal may be put behind, measured together."""
    k, update = result["stages"]["deep"][0], result["measures"].get("layer_update")
    result["schedules"]["stages"] = None
    if study.streamed or update is None or not 0 < k < result["num_layers"]:
        return
    tried = Stages.before(k, [x for x in update["mean"] if x is not None])
    try:
        found = study.try_(tried, 1 if study.options.positions == "first" else study.options.longest)
    except UsageError:  # nothing can be frozen in this model
        return
    rows = [described(one, number, found, study.text) for number, one in enumerate(tried)]
    [plain] = [row for row in rows if not row["parameters"]["layers"]]
    good = [row for row in rows if row["worst_kl"] <= study.options.eta]
    best = min(good, key=flops_of, default=plain)
    if best is not plain:
        found_by = study.provenance(eta=study.options.eta, positions=study.options.positions)
        schedule = Schedule.from_dict(best["schedule"])
        provenance = {**schedule.provenance, **found_by}
        result["schedules"]["stages"] = schedule.model_copy(update={"provenance": provenance}).to_dict()
        result["together"] = {"stages": best, "withdrawal": plain}


def _ranges(found: stages.Stages) -> Ranges:
    shallow, middle, deep = ([part.start, part.stop] for part in (found.shallow, found.middle, found.last))
    return {"shallow": shallow, "middle": middle, "deep": deep}


def _spread(rows: Sequence[Sequence[float | None]]) -> Spread:
    """Mean and standard deviation over samples by layer, without those that have nothing to measure there."""
    values = np.array(rows, dtype=float)
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    mean = np.where(there, values, 0).sum(axis=0) / np.maximum(count, 1)
    std = np.sqrt(np.where(there, (values - mean) ** 2, 0).sum(axis=0) / np.maximum(count, 1))

    def known(numbers: np.ndarray) -> list[float | None]:
        return [x if n else None for x, n in zip(numbers.tolist(), count, strict=True)]

    return {"mean": known(mean), "std": known(std), "samples": [list(row) for row in rows]}


def _middle(values: Sequence[int | None]) -> Quartiles:
    """Quartiles over the samples that have a value, and how many have none."""
    there = [value for value in values if value is not None]
    quartiles = [float(x) for x in np.quantile(there, (0.25, 0.5, 0.75))] if there else None
    return {"quartiles": quartiles, "without": len(values) - len(there)}
