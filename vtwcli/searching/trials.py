"""Trials: schedules measured on samples, unit by unit; an interrupted search goes on from those that are done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vtwcli.errors import UsageError
from vtwcli.io.console import Task
from vtwcli.judge.flops import TextShape
from vtwcli.machine import distributed
from vtwcli.measure.answers import Answer
from vtwcli.measure.batches import by_length
from vtwcli.measure.candidates import Tried, described, tried
from vtwcli.measure.study import Study
from vtwcli.methods.method import Candidate
from vtwcli.recipe.search import SearchSection
from vtwcli.results.comparison import TriedRow
from vtwcli.results.resume import Store
from vtwcli.sweep.layers import takes_masks

PACK = 128
"""Candidates that are measured together, unless layers are streamed."""
UNITS = 1 << 14
"""More units than a search has."""


class Trials:
    """What was measured so far.

    Args:
        study: the model and its samples; streamed layers measure everything of one call in one pass.
        known: what an interrupted search measured, by the unit's number.
        keep: keeps one more.
        bar: counts layers of samples, and schedules that the runtime runs on a batch.

    Attributes:
        refused: why candidates cannot be executed, by name.
        spent: seconds that units took, those of the interrupted search among them.
    """

    def __init__(self, study: Study[SearchSection], known: Mapping[int, Any], keep: Store, bar: Task) -> None:
        self.study, self.bar = study, bar
        self.refused: dict[str, str] = {}
        self.spent = 0.0
        self._known, self._keep, self._unit = known, keep, 0
        self._full: dict[int, Answer] = {}
        self._rows: dict[str, dict[int, Answer]] = {}
        masks = takes_masks(study.loaded.model, study.loaded.family)
        self.source = study.source if masks else None

    def measure(
        self,
        candidates: Sequence[Candidate],
        places: Sequence[int],
        until: float | None = None,
        *,
        whole: bool = False,
    ) -> bool:
        """Measure candidates on the samples at these places, as far as they are not measured there.

        Args:
            until: no further unit is begun once so many seconds are spent; the first always is.
            whole: a pack of candidates that is begun is measured on all samples.

        Returns:
            Whether all is measured.
        """
        missing = [
            (one, [place for place in places if place not in self._rows.get(one.name, {})])
            for one in candidates
            if one.name not in self.refused
        ]
        groups: dict[tuple[int, ...], list[Candidate]] = {}
        for one, absent in missing:
            if absent:
                groups.setdefault(tuple(absent), []).append(one)
        for wanted, mine in groups.items():
            size = len(mine) if self.study.streamed else PACK
            packs = [mine[at : at + size] for at in range(0, len(mine), size)]
            pieces = list(self._pieces(wanted))
            for pack in packs:
                for number, piece in enumerate(pieces):
                    late = until is not None and self.spent >= until
                    if late and self._unit and not (whole and number):
                        return False
                    self._measure(pack, piece)
        return True

    def row(self, candidate: Candidate, places: Sequence[int], shape: TextShape) -> Measured:
        """A candidate's row over the samples at these places, on all of which it was measured."""
        return measured(candidate, 0, self.tried([candidate], places), shape)

    def tried(self, candidates: Sequence[Candidate], places: Sequence[int]) -> Tried:
        """What came of candidates at these places."""
        rows = [[self._rows[one.name][place] for place in places] for one in candidates]
        return Tried([self.study.samples[p] for p in places], [self._full[p] for p in places], rows)

    def done(self, candidate: Candidate, places: Sequence[int]) -> bool:
        """Whether a candidate was measured on all of these samples."""
        return set(places) <= self._rows.get(candidate.name, {}).keys()

    def _pieces(self, places: Sequence[int]) -> Iterator[list[list[int]]]:
        """Batches that are a unit: one for each process; of streamed layers all."""
        options, loaded = self.study.options, self.study.loaded
        samples = [self.study.samples[place] for place in places]
        batches = by_length(loaded, samples, options.longest, options.batch_size)
        named = [[places[number] for number in batch] for batch in batches]
        step = len(named) if self.study.streamed else distributed.size()
        for at in range(0, len(named), step):
            yield named[at : at + step]

    def _measure(self, pack: Sequence[Candidate], piece: Sequence[Sequence[int]]) -> None:
        number = self._unit
        self._unit += 1
        places = [place for batch in piece for place in batch]
        entry = self._known.get(number)
        if entry is None:
            began = time.perf_counter()
            entry = self._entry(pack, piece, places)
            seconds = time.perf_counter() - began
            entry["seconds"] = distributed.gathered(lambda: {distributed.rank(): seconds})[0]
            if distributed.is_main() and number < UNITS:
                self._keep(number, entry)
        else:
            self.bar.advance(len(places) * len(self.study.loaded.layers))
        self.spent += entry["seconds"]
        self.refused |= entry["refused"]
        for place, said in zip(places, entry["full"], strict=True):
            self._full[place] = Answer(**said)
        for name, row in entry["rows"].items():
            self._rows.setdefault(name, {}).update(
                (place, Answer(**said)) for place, said in zip(places, row, strict=True)
            )

    def _entry(
        self, pack: Sequence[Candidate], piece: Sequence[Sequence[int]], places: Sequence[int]
    ) -> dict[str, Any]:
        study, order = self.study, {place: number for number, place in enumerate(places)}
        samples = [study.samples[place] for place in places]
        batches = [[order[place] for place in batch] for batch in piece]
        longest = study.options.longest
        with study.part("schedules"):
            try:
                found = tried(
                    *(study.loaded, self.source, pack, samples, longest, batches), lenient=True, bar=self.bar
                )
            except UsageError as error:  # not one of them can be executed
                why = {one.name: error.message for one in pack}
                return {"full": [], "rows": {}, "refused": why} | self._asked(samples, batches)
        rows = {
            one.name: [asdict(said) for said in found.rows[number]]
            for number, one in enumerate(pack)
            if number not in found.refused
        }
        why = {pack[number].name: words for number, words in found.refused.items()}
        return {"full": [asdict(said) for said in found.full], "rows": rows, "refused": why}

    def _asked(self, samples: Sequence[Any], batches: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The full model's answers alone."""
        longest = self.study.options.longest
        found = tried(self.study.loaded, self.source, [], samples, longest, batches, bar=self.bar)
        return {"full": [asdict(said) for said in found.full]}


class Measured(TriedRow):
    """A candidate's row with the share of tokens that stay the most likely ones in the worst task."""

    worst_agreement: float


def measured(candidate: Candidate, number: int, found: Tried, shape: TextShape) -> Measured:
    """The row of a candidate."""
    agreement = found.by_task(found.agreement(number))
    worst = float(np.min(list(agreement.values())))
    return {**described(candidate, number, found, shape), "worst_agreement": worst}
