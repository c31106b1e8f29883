"""Many candidates on the same samples, in one pass over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vtwcli.data.sample import Sample
from vtwcli.errors import UsageError
from vtwcli.io.console import Task
from vtwcli.measure.answers import Answer, followed_answers, forced_answer, reference_answers
from vtwcli.measure.samples import swept
from vtwcli.methods.method import Candidate
from vtwcli.models.inputs import Encoded
from vtwcli.models.loading import LoadedModel
from vtwcli.runtime import PruningError
from vtwcli.runtime.plan import Plan
from vtwcli.schedule.words import kept_count
from vtwcli.sweep.layers import LayerSource
from vtwcli.sweep.schedules import follow, plan_of, unknown
from vtwcli.sweep.sweep import SweepItem

_STREAM_BYTES = 2 << 30  # of hidden states that walk together when layers are streamed


def together(source: LayerSource, needed: Sequence[int]) -> Iterator[range]:
    """Samples that walk together: one, or when layers are streamed as many as keep the streams within bounds.

    Args:
        needed: bytes of each sample's streams.
    """
    start, room = 0, _STREAM_BYTES
    for i, one in enumerate(needed):
        if i > start and (not source.together or one > room):
            yield range(start, i)
            start, room = i, _STREAM_BYTES
        room -= one
    if len(needed) > start:
        yield range(start, len(needed))


class Many:
    """Candidates that one pass over the layers of a model can follow.

    Attributes:
        plans: theirs, by their places among all candidates.

    Raises:
        UsageError: a candidate that cannot be executed on this model, or only on one that is not streamed.
    """

    def __init__(self, loaded: LoadedModel, source: LayerSource, candidates: Sequence[Candidate]) -> None:
        self.loaded, self.source = loaded, source
        self.plans: dict[int, Plan] = {}
        for c, one in enumerate(candidates):
            try:
                plan = plan_of(one.schedule, source.depth, loaded.family)
            except PruningError as error:
                raise UsageError(f"schedule {one.name}: {error}") from None
            reason = unknown(plan, loaded.layers)
            if reason is None:
                self.plans[c] = plan
            elif source.together:
                raise UsageError(
                    f"schedule {one.name}: {reason[0]} when layers are streamed",
                    f"{reason[1]}, or leave out --stream",
                )
        self._schedules = [candidates[c].schedule for c in self.plans]

    def along(
        self, samples: Sequence[Sample], full: Sequence[Answer], progress: Task | None = None
    ) -> list[list[Answer]]:
        """What each candidate says to each sample along the full model's answers; by sample."""
        ids = [torch.tensor(one.ids, dtype=torch.long) for one in full]
        return self._follow(*swept(self.loaded, samples, ids), progress)

    def along_references(
        self, samples: Sequence[Sample], max_new_tokens: int, progress: Task | None = None
    ) -> list[list[Answer]]:
        """As ``along``, with the samples' references as the answers; the full model's stands before the others."""
        ids = reference_answers(self.loaded, samples, max_new_tokens)
        encoded, items = swept(self.loaded, samples, ids)
        rows = self._follow(encoded, items, progress)
        full = [forced_answer(self.loaded, *pair) for pair in zip(encoded, ids, strict=True)]
        return [[one, *row] for one, row in zip(full, rows, strict=True)]

    def _follow(
        self, encoded: Sequence[Encoded], items: Sequence[SweepItem], progress: Task | None
    ) -> list[list[Answer]]:
        rows = []
        for part in together(self.source, [self._needed(one) for one in encoded]):
            found = follow(
                self.source, [items[i] for i in part], list(self.plans.values()), progress=progress
            )
            rows += [followed_answers(one, self._schedules) for one in found]
        return rows

    def _needed(self, encoded: Encoded) -> int:
        """Bytes of the hidden states of all states of a sample, at most."""
        visual = int(encoded.visual.sum())
        size = self.loaded.model.config.get_text_config().hidden_size * self.loaded.dtype.itemsize
        return size * sum(encoded.suffix + _changed(plan, visual) for plan in self.plans.values())


def _changed(plan: Plan, visual: int) -> int:
    """How many of a sample's visual tokens exist and are no longer the full model's, at most."""
    if plan.freezes or any(mute.readers != "text" for mute in plan.mutes):
        return visual
    keeps = [action.select for action in plan.leaving if action.action == "keep"]
    if not keeps:
        return 0
    return visual if keeps[0].get("above") is not None else kept_count(keeps[0], visual)
