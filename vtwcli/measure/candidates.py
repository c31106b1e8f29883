"""Schedules tried on the same samples: how far each is from the full model, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.io.console import Task
from vtwcli.judge.flops import CONVENTIONS, DEFAULT_CONVENTION, TextShape
from vtwcli.machine import distributed
from vtwcli.measure.answers import (
    Answer,
    flops_ratio,
    full_answers,
    kv_ratio,
    schedule_answers,
)
from vtwcli.measure.guide import Guides
from vtwcli.measure.many import Many
from vtwcli.methods.method import Candidate
from vtwcli.models.generation import plain_generation
from vtwcli.models.inputs import encode_batch
from vtwcli.models.loading import LoadedModel
from vtwcli.results.comparison import ComparedRow, TaskCount, TriedRow
from vtwcli.results.document import TokenCounts
from vtwcli.sweep.layers import LayerSource


@dataclass(frozen=True)
class Tried:
    """What came of the candidates on the samples that have visual tokens.

    Attributes:
        samples: those samples.
        full: the full model's answers, [S].
        rows: each candidate's answers along the full model's, [C][S]; empty for those that are refused.
        refused: why candidates cannot be executed on this model, by their numbers.
    """

    samples: list[Sample]
    full: list[Answer]
    rows: list[list[Answer]]
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The task of each sample."""
        return [sample.task for sample in self.samples]

    @property
    def counts(self) -> dict[str, TaskCount]:
        """Number of samples by task, in order of appearance."""
        return {task: {"samples": self.tasks.count(task)} for task in dict.fromkeys(self.tasks)}

    def kl(self, candidate: int) -> NDArray[np.float64]:
        """Each sample's KL in nats, mean over answer positions, [S]."""
        return np.array([np.mean(answer.kl) for answer in self.rows[candidate]])

    def agreement(self, candidate: int) -> NDArray[np.float64]:
        """Each sample's share of answer positions whose most likely token is the full model's, [S]."""
        return np.array([np.mean(answer.agree) for answer in self.rows[candidate]])

    def with_(self, other: Tried) -> Tried:
        """These candidates and others behind them, on the same samples."""
        refused = {len(self.rows) + c: why for c, why in other.refused.items()}
        return replace(self, rows=[*self.rows, *other.rows], refused=self.refused | refused)

    def by_task(self, values: NDArray[np.float64]) -> dict[str, float]:
        """Mean of values [S] by task, in order of appearance."""
        names = np.array(self.tasks)
        return {task: float(values[names == task].mean()) for task in dict.fromkeys(self.tasks)}


def tried(
    loaded: LoadedModel,
    source: LayerSource | None,
    candidates: Sequence[Candidate],
    samples: Sequence[Sample],
    max_new_tokens: int,
    batches: Sequence[Sequence[int]],
    *,
    free: bool = False,
    lenient: bool = False,
    known: dict[tuple[int, int], Answer] | None = None,
    bar: Task | None = None,
) -> Tried:
    """Force every candidate along the full model's own greedy answers; with several processes each takes its share.

    Args:
        max_new_tokens: longest answer where no task says otherwise.
        batches: places of the samples that are answered together, see ``measure.batches``.
        free: let every schedule answer by itself too; not where layers are streamed.
        lenient: go on without candidates that cannot be executed, see ``Tried.refused``.
        bar: counts what is done, a layer of a sample or a schedule of a batch each; None: a bar of its own.
        source: the model as layers, so that one pass over them serves all candidates; None: the runtime executes
            them one by one, as it does those that a pass does not know. Streamed layers cannot generate: there the
            samples' references are the answers.
        known: this process's full answers by place and ``max_new_tokens``, to be used again; those found are added.

    Raises:
        NotFoundError: no sample has a visual token.
        UsageError: a candidate that cannot be executed on this model, or, if ``lenient``, none that can.
    """
    work = partial(_mine, loaded, source, candidates, samples, max_new_tokens, batches, free, known, bar)
    found = distributed.gathered(work)
    refused = {c: row[1 + c] for row in found for c in range(len(candidates)) if isinstance(row[1 + c], str)}
    if refused and (not lenient or len(refused) == len(candidates)):
        raise UsageError(next(iter(refused.values())))
    seeing = [i for i, row in enumerate(found) if row[0].visual_per_layer[0]]
    if not seeing:
        raise NotFoundError("no sample has a visual token, so there is nothing to prune", "add images")
    if len(seeing) < len(samples):
        console.warn(f"{len(samples) - len(seeing)} samples have no visual token; they do not count")
    return Tried(
        [samples[i] for i in seeing],
        [found[i][0] for i in seeing],
        [[] if c in refused else [found[i][1 + c] for i in seeing] for c in range(len(candidates))],
        refused,
    )


def _mine(
    loaded: LoadedModel,
    source: LayerSource | None,
    candidates: Sequence[Candidate],
    samples: Sequence[Sample],
    max_new_tokens: int,
    batches: Sequence[Sequence[int]],
    free: bool,
    known: dict[tuple[int, int], Answer] | None,
    shown: Task | None,
) -> dict[int, list[Any]]:
    """By place of this process's samples: the full model's answer, then each candidate's, or why it has none."""
    mine = [places for _, places in distributed.share(batches)]
    count = sum(map(len, mine))
    many = None if source is None else Many(loaded, source, candidates)
    guides = Guides(loaded, max_new_tokens)
    depth, plans = len(loaded.layers), {} if many is None else many.plans
    alone = len(candidates) - (0 if free else len(plans))
    total = count * (depth if plans else 0) + len(mine) * alone
    words = f"{len(candidates)} schedules x {depth} layers x {count} samples"
    own = console.progress(words, total) if shown is None else nullcontext(shown)
    with own as bar, plain_generation(loaded):
        if many is not None and many.source.together:
            flat = [place for part in mine for place in part]
            rows = many.along_references([samples[place] for place in flat], max_new_tokens, bar)
            return dict(zip(flat, rows, strict=True))
        done: dict[int, list[Any]] = {}
        refused: dict[int, str] = {}
        heard = {} if known is None else known
        for places in mine:
            part = [samples[place] for place in places]
            batch = encode_batch(loaded, part)
            tokens = answer_tokens(part, max_new_tokens)
            told = [heard[place, tokens] for place in places if (place, tokens) in heard]
            columns: dict[int, list[Answer]] = {}
            if many is not None and not free and alone == 0 and len(told) == len(part):
                columns = many.along(part, batch, told, bar)
            if len(columns) == len(candidates):
                for b, place in enumerate(places):
                    done[place] = [told[b], *(columns[c][b] for c in range(len(candidates)))]
                continue
            full = full_answers(loaded, batch, tokens, [sample.id for sample in part])
            heard |= {(p, tokens): one for p, one in zip(places, full.answers, strict=True)}
            columns = {} if many is None else many.along(part, batch, full.answers, bar)
            for c, one in enumerate(candidates):
                if c in columns and not free:
                    continue
                along = columns.get(c)
                try:
                    if c not in refused:
                        columns[c] = schedule_answers(
                            loaded,
                            one.name,
                            one.schedule,
                            guides.beside(batch, part, one.schedule),
                            full,
                            tokens,
                            free=free,
                            along=along,
                        )
                except UsageError as error:
                    refused[c] = error.message
                bar.advance()
            for b, place in enumerate(places):
                said = (refused.get(c) or columns[c][b] for c in range(len(candidates)))
                done[place] = [full.answers[b], *said]
        return done


def compared(
    candidates: Sequence[Candidate], found: Tried, shape: TextShape
) -> tuple[list[ComparedRow], list[str]]:
    """The candidates' rows of a result document, plain JSON values, and the names of the front."""
    rows = [described(one, number, found, shape) for number, one in enumerate(candidates)]
    front = pareto(rows)
    return [{**row, "pareto": row["name"] in front} for row in rows], front


def described(candidate: Candidate, number: int, found: Tried, shape: TextShape) -> TriedRow:
    """A candidate's row."""
    mine, kl = found.rows[number], found.kl(number)
    by_task = found.by_task(kl)
    return {
        "name": candidate.name,
        "method": candidate.method,
        "parameters": candidate.parameters,
        "kl": float(kl.mean()),
        "kl_by_task": by_task,
        "worst_kl": max(by_task.values()),
        "agreement": float(found.agreement(number).mean()),
        "flops_ratio": {c: flops_ratio(shape, mine, found.full, c) for c in CONVENTIONS},
        "kv_ratio": kv_ratio(shape, mine, found.full),
        "visual_tokens": [float(n) for n in np.mean([answer.visual_per_layer for answer in mine], axis=0)],
        "schedule": candidate.schedule.to_dict(),
    }


def flops_of(row: TriedRow) -> float:
    """What a row's schedule costs: its prefill's FLOPs by the default convention, relative to the full model's."""
    return row["flops_ratio"][DEFAULT_CONVENTION]


Row = TypeVar("Row", bound=TriedRow)


def pareto(
    rows: Sequence[Row],
    cost: Callable[[Row], float] = flops_of,
    far: Callable[[Row], float] = lambda row: row["kl"],
) -> list[str]:
    """Names of the rows than which no other is both closer to the full model and cheaper, cheapest first.

    Of equal rows the first counts.
    """
    front, best = [], float("inf")
    for row in sorted(rows, key=lambda row: (cost(row), far(row))):
        if far(row) < best:
            front.append(row["name"])
            best = far(row)
    return front


def token_counts(found: Tried) -> TokenCounts:
    """What ratios refer to: the convention, and the mean numbers of visual and text tokens of a prompt."""
    return {
        "convention": DEFAULT_CONVENTION,
        "visual_tokens": float(np.mean([answer.visual_per_layer[0] for answer in found.full])),
        "text_tokens": float(np.mean([answer.text_tokens for answer in found.full])),
    }
