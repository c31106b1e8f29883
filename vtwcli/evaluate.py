"""Evaluation: what a schedule costs in quality and saves in work, full and pruned on the same samples in one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtwcli import console, distributed, judge
from vtwcli.calibrate import check_model, read_samples, versions
from vtwcli.costs import Variant, latencies, prefill_cache_bytes
from vtwcli.data import metrics
from vtwcli.data.sample import Sample
from vtwcli.data.sources import DataMix
from vtwcli.errors import UsageError
from vtwcli.flops import CONVENTIONS, DEFAULT_CONVENTION, TextShape, kv_bytes, prefill_cost
from vtwcli.models.inputs import encode_batch, end_ids, plain_generation
from vtwcli.models.loading import LoadedModel, load
from vtwcli.recipe import DataSpec, EvalSection, ModelSection
from vtwcli.runtime import PruningError, pruned
from vtwcli.schedule import Schedule
from vtwcli.sweep import peak_memory

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Answer:
    """What one variant of the model says to one sample, plain values only.

    Attributes:
        text: the greedy answer.
        ids: its tokens, up to and with the end token.
        kl: KL(P_pruned ‖ P_full) in nats at each position of the full model's answer, [R]; zeros for the full model.
        agree: whether the most likely token there is the full model's, [R].
        visual_per_layer: visual tokens present in each layer.
        text_tokens: other tokens of the prompt.
    """

    text: str
    ids: list[int]
    kl: list[float]
    agree: list[bool]
    visual_per_layer: list[int]
    text_tokens: int


def evaluate(
    model: ModelSection,
    schedules: Sequence[tuple[str, Schedule]],
    data: Sequence[DataSpec] = (),
    options: EvalSection = EvalSection(),
    *,
    calibration: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Sequence[Sample]]:
    """Compare the full model with one or several schedules.

    Args:
        model: which model, and where it runs; layers are not streamed here.
        schedules: names and schedules.
        data: sources of samples, as for ``calibrate``; the demo source reads its test split.
        options: sample counts, timing, gates.
        calibration: the result document of the calibration, to warn when its samples are judged on again.

    Returns:
        The result document and the samples in its order. The document holds plain JSON values: ``tasks`` (per task
        the metric, the full model's ``mean``, and per schedule ``mean``, ``difference``, ``interval`` and McNemar's
        test), ``schedules`` (per schedule ``kl_first``, ``kl_answer``, ``top1_agreement``, ``exact_sequences``,
        ``worst_task``, ``cost``), ``samples`` with all
        answers, ``gates``, ``data``, ``versions``, ``seed`` and ``run``.

    Raises:
        NotFoundError: model or data missing or unreadable.
        UsageError: no schedule, a schedule that does not fit the model, or twice the same name.
    """
    began = time.perf_counter()
    if not schedules:
        raise UsageError(
            "nothing to compare with the full model", "give --schedule FILE, --layer K or --layers"
        )
    if len({name for name, _ in schedules}) != len(schedules):
        raise UsageError("two schedules have the same name")
    check_model(model)
    mix = read_samples(model, [_test_split(spec) for spec in data or _default(model)], options)
    _warn_if_calibrated_on(mix, calibration)
    with console.progress(f"loading {model.name}"):
        loaded = load(
            model.name,
            device=distributed.local_device(model.device),
            dtype=model.dtype,
            attn=model.attn,
            trust_remote_code=model.trust_remote_code,
        )
    timing = {"load": time.perf_counter() - began}
    answers = distributed.gathered(partial(_all_answers, loaded, schedules, mix.samples, options, timing))
    costs = _costs(loaded, schedules, mix.samples, answers, options, timing)
    result = _result(loaded, schedules, mix, answers, costs, options)
    timing["total"] = time.perf_counter() - began
    result["run"] = {
        "seconds": {name: round(value, 3) for name, value in timing.items()},
        "latency": costs["latency"],
        "peak_memory_bytes": peak_memory(),
        "processes": distributed.size(),
        "device": str(loaded.device),
    }
    return result, mix.samples


def _default(model: ModelSection) -> list[DataSpec]:
    from vtwcli.data.tasks import default_mix

    return [DataSpec(source="demo")] if model.name == "demo" else list(default_mix())


def _test_split(spec: DataSpec) -> DataSpec:
    """The demo source calibrates on one split and is judged on the other."""
    return spec.model_copy(update={"split": "test"}) if spec.source == "demo" and spec.split is None else spec


def _warn_if_calibrated_on(mix: DataMix, calibration: dict[str, Any] | None) -> None:
    seen = {sample.get("fingerprint") for sample in (calibration or {}).get("samples", ())}
    met = len(seen & set(mix.fingerprints))
    if met:
        console.warn(f"{met} of {len(mix.samples)} samples were calibrated on; judge on others")


def _variant(loaded: LoadedModel, schedule: Schedule | None) -> Any:
    return nullcontext() if schedule is None else pruned(loaded.model, schedule)


def _all_answers(
    loaded: LoadedModel,
    schedules: Sequence[tuple[str, Schedule]],
    samples: Sequence[Sample],
    options: EvalSection,
    timing: dict[str, float],
) -> dict[int, list[Answer]]:
    """For each of this rank's samples the full model's answer and then each schedule's."""
    began = time.perf_counter()
    mine = distributed.share(samples)
    done: dict[int, list[Answer]] = {}
    with console.progress("answers", total=len(mine)) as bar, plain_generation(loaded):
        for at in range(0, len(mine), options.batch_size):
            part = mine[at : at + options.batch_size]
            batch = encode_batch(loaded, [sample for _, sample in part])
            for (place, _), answers in zip(
                part, _batch_answers(loaded, schedules, batch, options), strict=True
            ):
                done[place] = answers
            bar.advance(len(part))
    timing["answers"] = time.perf_counter() - began
    return done


@torch.no_grad()
def _batch_answers(
    loaded: LoadedModel,
    schedules: Sequence[tuple[str, Schedule]],
    batch: dict[str, Tensor],
    options: EvalSection,
) -> list[list[Answer]]:
    """Per row of the batch the answers of the full model and of each schedule."""
    width, rows = batch["input_ids"].shape[1], len(batch["input_ids"])
    texts = [int(x) for x in _text_counts(loaded, batch)]
    depth = len(loaded.layers)
    visual = [int(m) - t for m, t in zip(batch["attention_mask"].sum(1), texts, strict=True)]
    out = _generate(loaded, batch, options.max_new_tokens)
    full_ids = [_ended(loaded, row) for row in out.sequences[:, width:].tolist()]
    full = torch.stack(out.logits, dim=1)  # [B, R, V]
    found = [
        [_answer(loaded, ids, [0.0] * len(ids), [True] * len(ids), [v] * depth, t)]
        for ids, v, t in zip(full_ids, visual, texts, strict=True)
    ]
    for name, schedule in schedules:
        try:
            with pruned(loaded.model, schedule) as handle:
                free = _generate(loaded, batch, options.max_new_tokens)
                trace = handle.trace
                forced = torch.stack(
                    _generate(loaded, batch, full.shape[1], out.sequences[:, width:]).logits, dim=1
                )
        except PruningError as error:
            raise UsageError(f"schedule {name}: {error}") from None
        for b in range(rows):
            length = len(full_ids[b])
            p, q = forced[b, :length].double().log_softmax(-1), full[b, :length].double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1).tolist()
            agree = (p.argmax(-1) == q.argmax(-1)).tolist()
            ids = _ended(loaded, free.sequences[b, width:].tolist())
            layers = [visual[b]] * depth if trace is None else trace.samples[b]["visual_per_layer"]
            found[b].append(_answer(loaded, ids, kl, agree, [int(n) for n in layers], texts[b]))
    return found


def _generate(
    loaded: LoadedModel, batch: dict[str, Tensor], tokens: int, forced: Tensor | None = None
) -> Any:
    """Greedy generation with the raw logits of each step; ``forced`` [B, R] replaces the choice of each token."""
    width = batch["input_ids"].shape[1]

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        assert forced is not None
        wanted = forced[:, ids.shape[1] - width, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)

    extra: dict[str, Any] = {}
    if forced is not None:
        extra = {"logits_processor": [force], "min_new_tokens": tokens}
    return loaded.model.generate(
        **batch,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **extra,
    )


def _ended(loaded: LoadedModel, ids: list[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    ends = set(end_ids(loaded))
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _text_counts(loaded: LoadedModel, batch: dict[str, Tensor]) -> Tensor:
    visual = torch.isin(
        batch["input_ids"], torch.tensor(loaded.placeholder_ids, device=batch["input_ids"].device)
    )
    return (batch["attention_mask"].bool() & ~visual).sum(1)


def _answer(
    loaded: LoadedModel, ids: list[int], kl: list[float], agree: list[bool], layers: list[int], text: int
) -> Answer:
    said = loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(said, ids, [float(f"{x:.9g}") for x in kl], agree, layers, text)


def _costs(
    loaded: LoadedModel,
    schedules: Sequence[tuple[str, Schedule]],
    samples: Sequence[Sample],
    answers: Sequence[Sequence[Answer]],
    options: EvalSection,
    timing: dict[str, float],
) -> dict[str, Any]:
    """Latencies (``latency``, None without timing) and cache bytes (``cache``) by variant, full first."""
    names = ["full", *(name for name, _ in schedules)]
    variants: dict[str, Variant] = {
        name: partial(_variant, loaded, schedule)
        for name, schedule in zip(names, [None, *(schedule for _, schedule in schedules)], strict=True)
    }
    seeing = [i for i, row in enumerate(answers) if row[0].visual_per_layer[0]] or [0]
    chosen = [encode_batch(loaded, [samples[i]]) for i in seeing[:2]]
    cache = {name: prefill_cache_bytes(loaded, chosen[0], variant) for name, variant in variants.items()}
    measured = None
    if options.timing and distributed.is_main():
        began = time.perf_counter()
        console.note("timing prefill and decode")
        measured = latencies(loaded, chosen, variants, options.repeats, options.timing_tokens)
        timing["latency"] = time.perf_counter() - began
    return {"latency": measured, "cache": cache, "cache_sample": seeing[0]}


def _result(
    loaded: LoadedModel,
    schedules: Sequence[tuple[str, Schedule]],
    mix: DataMix,
    answers: Sequence[Sequence[Answer]],
    costs: dict[str, Any],
    options: EvalSection,
) -> dict[str, Any]:
    tasks = list(dict.fromkeys(sample.task for sample in mix.samples))
    by_task = {task: [i for i, sample in enumerate(mix.samples) if sample.task == task] for task in tasks}
    table, scores = {}, np.full((len(mix.samples), 1 + len(schedules)), np.nan)
    for task, rows in by_task.items():
        table[task] = _task(mix.samples, rows, answers, schedules, options, scores)
    documents = {
        name: _schedule_row(loaded, s, name, schedule, table, answers, costs)
        for s, (name, schedule) in enumerate(schedules, 1)
    }
    return {
        "format": "vtw-evaluation",
        "format_version": FORMAT_VERSION,
        "model": {
            "name": loaded.name,
            "revision": loaded.revision,
            "family": loaded.family.model_type,
            "dtype": str(loaded.dtype).removeprefix("torch."),
        },
        "num_layers": len(loaded.layers),
        "options": options.model_dump(mode="json"),
        "tasks": table,
        "schedules": documents,
        "gates": _gates(documents, options),
        "samples": [
            {
                "id": sample.id,
                "task": sample.task,
                "question": sample.prompt,
                "references": list(sample.references),
                "full": row[0].text,
                "pruned": {
                    name: {
                        "answer": answer.text,
                        "kl": answer.kl,
                        "first_divergence": judge.first_divergence(row[0].ids, answer.ids),
                    }
                    for (name, _), answer in zip(schedules, row[1:], strict=True)
                },
                "scores": [None if np.isnan(x) else float(x) for x in scores[i]],
            }
            for i, (sample, row) in enumerate(zip(mix.samples, answers, strict=True))
        ],
        "data": list(mix.sources),
        "skipped": mix.skipped,
        "seed": options.seed,
        "versions": versions(),
    }


def _task(
    samples: Sequence[Sample],
    rows: Sequence[int],
    answers: Sequence[Sequence[Answer]],
    schedules: Sequence[tuple[str, Schedule]],
    options: EvalSection,
    scores: np.ndarray,
) -> dict[str, Any]:
    """One task's row: the metric of every variant; without references only counts. Fills ``scores``."""
    judged = [i for i in rows if samples[i].references]
    row: dict[str, Any] = {"samples": len(rows), "judged": len(judged), "metric": samples[rows[0]].metric}
    if not judged:
        return row
    mine = [samples[i] for i in judged]

    def column(variant: int) -> tuple[list[float], dict[str, float]]:
        said = [answers[i][variant].text for i in judged]
        values = metrics.scores(row["metric"], said, mine)
        scores[judged, variant] = values
        return values, metrics.aggregate(row["metric"], said, mine)

    full, row["full"] = column(0)
    row["schedules"] = {}
    for number, (name, _) in enumerate(schedules, 1):
        values, summary = column(number)
        row["schedules"][name] = {
            **summary,
            **judge.paired_difference(full, values, options.bootstrap, options.seed),
            "mcnemar": judge.mcnemar(full, values),
        }
    return row


def _schedule_row(
    loaded: LoadedModel,
    number: int,
    name: str,
    schedule: Schedule,
    table: dict[str, Any],
    answers: Sequence[Sequence[Answer]],
    costs: dict[str, Any],
) -> dict[str, Any]:
    """One schedule over all samples: agreement with the full model, worst task, predicted and measured cost."""
    mine = [row[number] for row in answers]
    whole = [row[0] for row in answers]
    drops = {task: row["schedules"][name]["difference"] for task, row in table.items() if "schedules" in row}
    shape = TextShape.from_config(loaded.model.config)

    def tokens(answer: Answer) -> list[int]:
        return [answer.text_tokens + visual for visual in answer.visual_per_layer]

    def total(rows: Sequence[Answer], convention: Any) -> int:
        return sum(prefill_cost(shape, tokens(row), convention) for row in rows)

    sample = costs["cache_sample"]
    size = loaded.dtype.itemsize
    cost: dict[str, Any] = {
        "convention": DEFAULT_CONVENTION,
        "visual_tokens": sum(row.visual_per_layer[0] for row in whole) / len(whole),
        "text_tokens": sum(row.text_tokens for row in whole) / len(whole),
        "flops_ratio": {c: total(mine, c) / total(whole, c) for c in CONVENTIONS},
        "kv_ratio": sum(sum(tokens(row)) for row in mine) / sum(sum(tokens(row)) for row in whole),
        "kv_bytes": {
            "measured": costs["cache"][name],
            "computed": kv_bytes(shape, tokens(mine[sample]), size),
            "full_measured": costs["cache"]["full"],
            "full_computed": kv_bytes(shape, tokens(whole[sample]), size),
        },
    }
    return {
        "schedule": schedule.to_dict(),
        "kl_first": float(np.mean([row.kl[0] for row in mine])),
        "kl_answer": float(np.mean([np.mean(row.kl) for row in mine])),
        "top1_agreement": float(np.mean([np.mean(row.agree) for row in mine])),
        "exact_sequences": float(
            np.mean([row.ids == full.ids for row, full in zip(mine, whole, strict=True)])
        ),
        "worst_task": min(drops, key=lambda task: drops[task]) if drops else None,
        "worst_difference": min(drops.values()) if drops else None,
        "cost": cost,
    }


def _gates(documents: dict[str, Any], options: EvalSection) -> list[dict[str, Any]]:
    """Each gate that was asked for, by schedule: what was found, what is allowed, and whether it passes."""
    found = []
    for name, row in documents.items():
        if options.max_drop is not None and row["worst_difference"] is not None:
            drop = max(0.0, -row["worst_difference"])
            gate = {"gate": "max_drop", "task": row["worst_task"], "found": drop, "allowed": options.max_drop}
            found.append({"schedule": name, **gate, "passed": drop <= options.max_drop})
        if options.max_kl is not None:
            gate = {"gate": "max_kl", "task": None, "found": row["kl_answer"], "allowed": options.max_kl}
            found.append({"schedule": name, **gate, "passed": row["kl_answer"] <= options.max_kl})
    return found
