"""Evaluation: what a schedule costs in quality and saves in work, full and pruned on the same samples in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from vtwcli.data import metrics
from vtwcli.data.drawing import sample_content
from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.data.sources import DataMix
from vtwcli.data.spec import DataSpec
from vtwcli.io import console, files
from vtwcli.judge import gates
from vtwcli.judge import statistics as judge
from vtwcli.judge.flops import CONVENTIONS, DEFAULT_CONVENTION, TextShape, kv_bytes
from vtwcli.judge.guarantee import Promise
from vtwcli.machine import distributed
from vtwcli.machine.memory import peak_memory
from vtwcli.measure.answers import Answer, flops_ratio, full_answers, kv_ratio, spent
from vtwcli.measure.batches import by_length
from vtwcli.measure.guide import folder_of, guide_of
from vtwcli.measure.promised import changed_tokens, check_enough
from vtwcli.measure.samples import read_samples, settled
from vtwcli.measure.timing import Costs, measured_costs
from vtwcli.measure.variants import (
    FULL,
    Graphs,
    Variant,
    batches_of,
    choose,
    engine_of,
    open_variants,
    reader_of,
    versions_of,
)
from vtwcli.models.dtypes import name_of
from vtwcli.models.generation import plain_generation
from vtwcli.models.loading import LoadedModel
from vtwcli.recipe.defaults import default_data
from vtwcli.recipe.recipe import EvalSection, GatesSection, ModelSection
from vtwcli.results.calibration import CalibratedOn, Calibration
from vtwcli.results.evaluation import (
    FORMAT,
    FORMAT_VERSION,
    EvaluatedCost,
    EvaluatedModel,
    EvaluatedSchedule,
    EvaluatedTask,
    Evaluation,
    Score,
    TraceLine,
)
from vtwcli.results.provenance import run_of, template_date
from vtwcli.results.resume import Store, kept, key_of, stamp
from vtwcli.schedule.schedule import Schedule


def evaluate(
    model: ModelSection,
    schedules: Sequence[tuple[str, Schedule]] = (),
    data: Sequence[DataSpec] = (),
    options: EvalSection = EvalSection(),
    *,
    limits: GatesSection = GatesSection(),
    promise: Promise | None = None,
    calibration: Calibration | CalibratedOn | None = None,
    trace: Path | Callable[[str], object] | None = None,
    state: Path | None = None,
) -> tuple[Evaluation, Sequence[Sample]]:
    """Compare the full model with one or several schedules.

    Args:
        model: a stock model, or a directory that ``vtw export`` made: a Hugging Face one, whose weights are run by
            this package's runtime, or one of ONNX graphs. Layers are not streamed here.
        schedules: names and schedules; none takes the one that an exported directory carries.
        data: sources of samples, as for ``calibrate``; the demo source reads its test split.
        options: sample counts, timing, ``backend``, and ``baseline``, the full model where it is not the model itself.
        limits: gates, judged at the end (``gates``).
        promise: what the gate ``risk`` shall prove when the document is judged later; by default that of ``limits``.
        calibration: the result document of the calibration; its samples are left out. By default the one in an
            exported directory, if that is where the schedule comes from.
        trace: file, or function, that gets a JSON line per sample and schedule: which tokens were kept, where, and
            what it cost.
        state: file that keeps finished samples across an interruption.

    Returns:
        The result document, plain JSON values, and the samples in its order.

    Raises:
        NotFoundError: model or data missing or unreadable, or all samples were calibrated on.
        UsageError: nothing to compare, or what cannot be compared: a schedule that does not fit the model, a
            baseline of another family, twice the same name. Or too few samples for the gate ``risk``.
    """
    began = time.perf_counter()
    schedules, carried = choose(model, schedules, options)
    specs = [_test_split(spec) for spec in data or default_data(model.name)]
    mix = read_samples(
        model, specs, options, _calibrated_on(calibration or carried), reader=reader_of(model, options)
    )
    options, promise = settled(options, mix.samples), promise or gates.promise_of(limits)
    if promise is not None:
        check_enough(mix, promise, "the gate risk")
    full, variants = open_variants(model, schedules, options)
    _warn_if_calibrated_on(mix, variants)
    timing = {"load": time.perf_counter() - began}
    batches = by_length(full, mix.samples, options.longest, options.batch_size)
    with kept(state, _key(full, variants, options), _contents(mix.samples, batches)) as finished:
        answers = distributed.gathered(
            partial(_all_answers, full, variants, mix.samples, batches, options, timing, *finished)
        )
    if trace is not None and distributed.is_main():
        lines = _trace(full, variants, mix.samples, answers)
        trace(lines) if callable(trace) else files.write_text(trace, lines)
    peak = peak_memory()  # before the costs, whose measuring sets the record back
    costs = measured_costs(full, variants, mix.samples, answers, options, timing)
    about, proof = _model(model, full, variants), promise is not None
    result = _result(about, full, variants, mix, answers, costs, options, limits, proof)
    timing["total"] = time.perf_counter() - began
    run = run_of(full, timing)
    run["peak_memory_bytes"] = {
        name: max(size, run["peak_memory_bytes"][name]) for name, size in peak.items()
    }
    result["run"] = {**run, "latency": costs.latency, "memory": costs.memory}
    if costs.left_out:
        result["run"]["batches_left_out"] = costs.left_out
    return result, mix.samples


def _test_split(spec: DataSpec) -> DataSpec:
    """The demo source calibrates on one split and is judged on the other."""
    return spec.model_copy(update={"split": "test"}) if spec.source == "demo" and spec.split is None else spec


def _calibrated_on(calibration: Calibration | CalibratedOn | None) -> set[str]:
    """Fingerprints of a calibration's samples."""
    samples = calibration["samples"] if calibration else ()
    return {fingerprint for sample in samples if (fingerprint := sample.get("fingerprint"))}


def _warn_if_calibrated_on(mix: DataMix, variants: Sequence[Variant]) -> None:
    """A schedule knows the samples it was calibrated on by one digest for each source only."""
    drawn = {record["fingerprint"] for record in mix.sources}
    for variant in variants:
        if drawn & set(variant.schedule.provenance.get("data") or ()):
            console.warn(
                f"schedule {variant.name} was calibrated on these very samples; judge on others: another --seed, "
                "or --calibration FILE, which leaves them out"
            )


def _contents(samples: Sequence[Sample], batches: Sequence[Sequence[int]]) -> list[str]:
    """What each sample's answers depend on: its batch, because padding changes the last digits, and its row in it."""
    found = [""] * len(samples)
    for places in batches:
        digest = key_of([sample_content(samples[place]) for place in places])
        for row, place in enumerate(places):
            found[place] = f"{digest}:{row}"
    return found


def _key(full: LoadedModel, variants: Sequence[Variant], options: EvalSection) -> str:
    """What kept samples depend on besides what is in their batch."""
    attention = full.config.get_text_config()._attn_implementation
    model = (full.name, full.revision, str(full.dtype), full.device.type, attention, stamp(full.path))
    own = [(variant.folder, str(variant.dtype), stamp(variant.folder)) for variant in variants[:1]]
    guides = sorted({name for variant in variants if (name := guide_of(variant.schedule))})
    own += [(folder := folder_of(name, full), "guide", stamp(folder)) for name in guides]
    named = [(variant.name, type(variant).__name__, variant.schedule.to_dict()) for variant in variants]
    shaping = options.model_dump(include={"max_new_tokens"})
    return key_of("evaluation", model, own, named, shaping, versions_of(variants))


def _all_answers(
    full: LoadedModel,
    variants: Sequence[Variant],
    samples: Sequence[Sample],
    batches: Sequence[Sequence[int]],
    options: EvalSection,
    timing: dict[str, float],
    known: dict[int, Any],
    keep: Store,
) -> dict[int, list[Answer]]:
    """For each sample of this rank's batches the full model's answer and then each variant's.

    Batches are dealt to ranks, not samples, so that their padding does not depend on the number of processes.
    """
    began = time.perf_counter()
    mine = distributed.share(batches)
    engine = engine_of(full, variants)
    done: dict[int, list[Answer]] = {}
    with console.progress("answers", total=sum(len(part) for _, part in mine)) as bar:
        for _, part in mine:
            if all(place in known for place in part):
                done |= {place: [Answer(**answer) for answer in known[place]] for place in part}
            else:
                drawn = [samples[place] for place in part]
                inputs, tokens = batches_of(full, variants, drawn), answer_tokens(drawn, options.longest)
                with plain_generation(full):
                    names = [sample.id for sample in drawn]
                    whole = full_answers(full, inputs[0], tokens, names)
                along = {} if engine is None else engine.along(drawn, inputs[0], whole.answers)
                columns = [whole.answers] + [
                    variant.answers(batch, whole, tokens, along.get(number))
                    for number, (variant, batch) in enumerate(zip(variants, inputs[1:], strict=True))
                ]
                for place, *row in zip(part, *columns, strict=True):
                    done[place] = row
                    keep(place, [vars(answer) for answer in row])
            bar.advance(len(part))
    timing["answers"] = time.perf_counter() - began
    return done


def _trace(
    full: LoadedModel,
    variants: Sequence[Variant],
    samples: Sequence[Sample],
    answers: Sequence[Sequence[Answer]],
) -> str:
    """What each schedule did to each sample, a JSON document a line."""
    shape, size = TextShape.from_config(full.model.config), full.dtype.itemsize
    lines = []
    for sample, (whole, *rows) in zip(samples, answers, strict=True):
        for variant, answer in zip(variants, rows, strict=True):
            line: TraceLine = {
                "id": sample.id,
                "task": sample.task,
                "schedule": variant.name,
                **spent(shape, answer, whole, size),
            }
            lines.append(files.document(line, indent=None))
    return "".join(lines)


def _model(model: ModelSection, full: LoadedModel, variants: Sequence[Variant]) -> EvaluatedModel:
    """What was evaluated, and the full model it was compared with."""
    own = variants[0]
    return {
        "name": model.name,
        "revision": own.inputs.revision,
        "family": full.family.model_type,
        "dtype": name_of(own.dtype),
        "backend": own.backend if isinstance(own, Graphs) else "torch",
        "baseline": full.name,
        "baseline_dtype": name_of(full.dtype),
        **template_date(full),
    }


def _result(
    model: EvaluatedModel,
    full: LoadedModel,
    variants: Sequence[Variant],
    mix: DataMix,
    answers: Sequence[Sequence[Answer]],
    costs: Costs,
    options: EvalSection,
    limits: GatesSection,
    proof: bool,
) -> Evaluation:
    """The document without ``run``; ``proof``: with each sample's loss."""
    tasks = list(dict.fromkeys(sample.task for sample in mix.samples))
    by_task = {task: [i for i, sample in enumerate(mix.samples) if sample.task == task] for task in tasks}
    table, scores = {}, np.full((len(mix.samples), 1 + len(variants)), np.nan)
    for task, rows in by_task.items():
        table[task] = _task(mix.samples, rows, answers, variants, options, scores)
    few = [f"{name}: {row['judged']}" for name, row in table.items() if 0 < row["judged"] < judge.FEWEST]
    if few and options.bootstrap and distributed.is_main():
        console.warn(
            f"too few distinct samples for a 95 % interval of the difference ({', '.join(few)}); it takes "
            f"{judge.FEWEST} of each task, with a larger --limit or more data"
        )
    schedules = {
        variant.name: _schedule_row(full, number, variant, table, answers, costs)
        for number, variant in enumerate(variants, 1)
    }
    if proof:
        for number, one in enumerate(schedules.values(), 1):
            one["losses"] = changed_tokens(mix.samples, answers, number)
    return {
        "model": model,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "num_layers": len(full.layers),
        "options": options.model_dump(mode="json", exclude={"resume"}),
        "tasks": table,
        "schedules": schedules,
        "samples": [
            {
                "id": sample.id,
                "task": sample.task,
                "question": sample.prompt,
                "references": list(sample.references),
                "full": row[0].text,
                "pruned": {
                    variant.name: {
                        "answer": answer.text,
                        "kl": answer.kl,
                        "first_divergence": judge.first_divergence(row[0].ids, answer.ids),
                    }
                    for variant, answer in zip(variants, row[1:], strict=True)
                },
                "scores": [None if np.isnan(x) else float(x) for x in scores[i]],
            }
            for i, (sample, row) in enumerate(zip(mix.samples, answers, strict=True))
        ],
        "data": list(mix.sources),
        "skipped": mix.skipped,
        "left_out": mix.excluded,
        "seed": options.seed,
        "versions": versions_of(variants),
        "gates": gates.check(schedules, limits),
    }


def _task(
    samples: Sequence[Sample],
    rows: Sequence[int],
    answers: Sequence[Sequence[Answer]],
    variants: Sequence[Variant],
    options: EvalSection,
    scores: np.ndarray,
) -> EvaluatedTask:
    """One task's row: the metric of every variant; without references only counts. Fills ``scores``."""
    judged = [i for i in rows if samples[i].references]
    row: EvaluatedTask = {"samples": len(rows), "judged": len(judged), "metric": samples[rows[0]].metric}
    if not judged:
        return row
    mine = [samples[i] for i in judged]

    def column(variant: int) -> tuple[list[float], Score]:
        said = [answers[i][variant].text for i in judged]
        values = metrics.scores(row["metric"], said, mine)
        scores[judged, variant] = values
        return values, cast(Score, metrics.aggregate(row["metric"], said, mine))

    full, row["full"] = column(0)
    row["schedules"] = {}
    for number, variant in enumerate(variants, 1):
        values, summary = column(number)
        row["schedules"][variant.name] = {
            **summary,
            **judge.paired_difference(full, values, options.bootstrap, options.seed),
            "mcnemar": None if row["metric"] == "cider" else judge.mcnemar(full, values),
        }
    return row


def _schedule_row(
    full: LoadedModel,
    number: int,
    variant: Variant,
    table: Mapping[str, EvaluatedTask],
    answers: Sequence[Sequence[Answer]],
    costs: Costs,
) -> EvaluatedSchedule:
    """One schedule over all samples: agreement with the full model, worst task, predicted and measured cost."""
    name = variant.name
    mine = [row[number] for row in answers]
    whole = [row[0] for row in answers]
    drops = {task: row["schedules"][name]["difference"] for task, row in table.items() if "schedules" in row}
    shape = TextShape.from_config(full.model.config)

    def mean_flops(rows: Sequence[Answer]) -> dict[str, float]:
        return {c: sum(row.prefill_cost(shape, c) for row in rows) / len(rows) for c in CONVENTIONS}

    cost: EvaluatedCost = {
        "convention": DEFAULT_CONVENTION,
        "visual_tokens": sum(row.visual_per_layer[0] for row in whole) / len(whole),
        "text_tokens": sum(row.text_tokens for row in whole) / len(whole),
        "flops": mean_flops(mine),
        "flops_full": mean_flops(whole),
        "flops_ratio": {c: flops_ratio(shape, mine, whole, c) for c in CONVENTIONS},
        "kv_ratio": kv_ratio(shape, mine, whole),
        "kv_bytes": {
            "measured": costs.cache[name],
            "computed": kv_bytes(shape, mine[costs.sample].tokens_per_layer, variant.dtype.itemsize),
            "full_measured": costs.cache[FULL],
            "full_computed": kv_bytes(shape, whole[costs.sample].tokens_per_layer, full.dtype.itemsize),
        },
    }
    apart = [judge.first_divergence(one.ids, row.ids) for one, row in zip(whole, mine, strict=True)]
    places = [place for place in apart if place is not None]
    return {
        "schedule": variant.schedule.to_dict(),
        "kl_first": float(np.mean([row.kl[0] for row in mine])),
        "kl_answer": float(np.mean([np.mean(row.kl) for row in mine])),
        "top1_agreement": float(np.mean([np.mean(row.agree) for row in mine])),
        "exact_sequences": 1 - len(places) / len(mine),
        "first_divergence": float(np.mean(places)) if places else None,
        "worst_task": min(drops, key=lambda task: drops[task]) if drops else None,
        "worst_difference": min(drops.values()) if drops else None,
        "cost": cost,
    }
