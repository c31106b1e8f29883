"""Many candidates on the same samples, in one pass over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vtwcli.data.sample import Sample
from vtwcli.errors import UsageError
from vtwcli.io.console import Task
from vtwcli.measure.answers import Answer, followed_answers, forced_answer, reference_answers
from vtwcli.measure.samples import swept
from vtwcli.models.inputs import Encoded, UnusableSampleError, visual_mask
from vtwcli.models.loading import LoadedModel
from vtwcli.runtime import PruningError
from vtwcli.runtime.plan import Plan
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule
from vtwcli.schedule.words import kept_count
from vtwcli.sweep.layers import LayerSource
from vtwcli.sweep.schedules import follow, plan_of, why_not
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


def walked(
    loaded: LoadedModel, source: LayerSource, encoded: Sequence[Encoded], asked: Sequence[Intervention]
) -> Iterator[range]:
    """Samples whose streams of interventions walk together."""
    size = loaded.model.config.get_text_config().hidden_size * loaded.dtype.itemsize
    frozen = sum(one.kind == "freeze" for one in asked)
    rows = [len(asked) * one.suffix + frozen * int(one.visual.sum()) for one in encoded]
    return together(source, [size * count for count in rows])


class Named(Protocol):
    """A schedule with a name, as candidates and variants are."""

    @property
    def name(self) -> str: ...
    @property
    def schedule(self) -> Schedule: ...


class Many:
    """Candidates that one pass over the layers of a model can follow.

    Attributes:
        plans: theirs, by their places among all candidates.

    Raises:
        UsageError: a candidate that cannot be executed on streamed layers.
    """

    def __init__(self, loaded: LoadedModel, source: LayerSource, candidates: Sequence[Named]) -> None:
        self.loaded, self.source = loaded, source
        self.plans: dict[int, Plan] = {}
        for c, one in enumerate(candidates):
            try:
                plan = plan_of(one.schedule, source.depth, loaded.family)
            except PruningError as error:
                if source.together:
                    raise UsageError(f"schedule {one.name}: {error}") from None
                continue  # the runtime will say so too
            reason = why_not(plan, loaded.layers)
            if reason is None:
                self.plans[c] = plan
            elif source.together:
                raise UsageError(
                    f"schedule {one.name}: {reason[0]} when layers are streamed",
                    f"{reason[1]}, or leave out --stream",
                )
        self._schedules = [candidates[c].schedule for c in self.plans]

    def along(
        self,
        samples: Sequence[Sample],
        batch: dict[str, Tensor],
        full: Sequence[Answer],
        progress: Task | None = None,
    ) -> dict[int, list[Answer]]:
        """What candidates say along the full model's answers, by candidate; the missing ones are the runtime's.

        So is a prompt that ends in an image, whose last row is one that nobody reads, and an answer that reaches
        beyond the model's longest sequence.

        Args:
            samples: what was answered.
            batch: their prompts as inputs.
            full: the answers.
        """
        ends = visual_mask(batch["input_ids"][:, -1], self.loaded.placeholder_ids)
        if not self.plans or bool(ends.any()):
            return {}
        try:
            encoded = swept(self.loaded, samples, [torch.tensor(one.ids, dtype=torch.long) for one in full])
        except UnusableSampleError:
            return {}
        rows = self._follow(*encoded, progress)
        return {c: list(column) for c, column in zip(self.plans, zip(*rows, strict=True), strict=True)}

    def along_references(
        self, samples: Sequence[Sample], max_new_tokens: int, progress: Task | None = None
    ) -> list[list[Answer]]:
        """By sample what each candidate says along its reference, behind what the full model counts as saying."""
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
