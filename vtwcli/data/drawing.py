"""A seeded choice of samples from a stream of rows, without holding or decoding the others."""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import fields

from vtwcli.data.sample import Sample

_NEWER = ("system", "longest")  # where they say nothing, digests are those of earlier versions


def sample_fingerprint(sample: Sample) -> str:
    """SHA-256 of what a sample says: prompt, references, system turn, and its images' places,
    sizes and RGB pixels; not its id."""
    digest = hashlib.sha256()
    for part in (sample.prompt, *sample.references):
        digest.update(f"{len(part)}:{part}".encode("utf-8", "surrogatepass"))
    if sample.places:
        digest.update(f"places:{sample.places}".encode())
    if sample.system:
        digest.update(f"system:{sample.system}".encode("utf-8", "surrogatepass"))
    for image in sample.images:
        digest.update(str(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def sample_content(sample: Sample, fingerprint: str | None = None) -> str:
    """SHA-256 of all there is to a sample but its id: also its task, its metric, choices and further columns.

    Args:
        fingerprint: ``sample_fingerprint`` of it, if it is known already.
    """
    others = {one.name for one in fields(sample)} - {"id", "images", "prompt", "references"}
    values = {name: getattr(sample, name) for name in others}
    said = {name: value for name, value in values.items() if name not in _NEWER or value is not None}
    rest = json.dumps(said, sort_keys=True, default=repr)
    return hashlib.sha256(f"{fingerprint or sample_fingerprint(sample)}:{rest}".encode()).hexdigest()


def ranges(places: Sequence[int]) -> str:
    """Row numbers in a few characters: ``0-19,40``."""
    runs: list[list[int]] = []
    for place in sorted(places):
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class Drawing:
    """Draws samples while rows stream by: per task the ``limit`` rows with the smallest keys are kept.

    Keys are random for a shuffled draw, which makes it uniform over the rows seen, and row numbers otherwise. A row
    that is equal to a kept one in everything (image, question, answers, task) says nothing new, so it counts once.
    A row is only decoded once its key is small enough, about ``limit * (1 + log(rows / limit))`` times.
    """

    def __init__(
        self,
        limit: int | None,
        seed: int,
        *,
        first: bool = False,
        exclude: Collection[str] = (),
        known: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            limit: samples per task, or None for all.
            seed: of the random keys.
            first: take the first rows instead.
            exclude: fingerprints of samples that are passed over.
            known: what other sources have given already, content (``sample_content``) to id.
        """
        self.limit, self.seed, self.exclude = limit, seed, frozenset(exclude)
        self.kept: dict[str, list[tuple[float, int, str, Sample]]] = {}  # a heap each, largest key first
        self.excluded = 0  # samples passed over so far
        self.duplicates = 0  # rows that are equal to one that is kept, and count once
        self._contents = dict(known or {})  # of what is kept, to its id
        self._first = first
        self._random = random.Random(seed)
        self._groups: dict[Hashable, float] = {}

    @property
    def full(self) -> bool:
        """Whether no later row can come in, given that all rows are of one task."""
        limit = self.limit
        return self._first and limit is not None and any(len(kept) >= limit for kept in self.kept.values())

    def offer(self, place: int, task: str, make: Callable[[], Sample], group: Hashable = None) -> None:
        """Consider one row; ``make`` decodes it. Rows of one group, unless that is None, are drawn together."""
        key = float(place) if self._first else self._random.random()
        if group is not None and not self._first:
            key = self._groups.setdefault((task, group), key)
        kept = self.kept.setdefault(task, [])
        crowded = self.limit is not None and len(kept) >= self.limit
        if crowded and -kept[0][0] <= key:
            return
        sample = make()
        fingerprint = sample_fingerprint(sample)
        if fingerprint in self.exclude:
            self.excluded += 1
            return
        content = sample_content(sample, fingerprint)
        if self._contents.get(content, sample.id) != sample.id:  # the same row twice is for the mix to refuse
            self.duplicates += 1
            return
        if crowded:
            _, _, gone, other = kept[0]
            del self._contents[sample_content(other, gone)]
        self._contents[content] = sample.id
        (heapq.heapreplace if crowded else heapq.heappush)(kept, (-key, -place, fingerprint, sample))

    def chosen(self) -> list[tuple[int, str, Sample]]:
        """(row number, fingerprint, sample) of the kept rows in reading order."""
        found = [
            (-place, content, sample) for kept in self.kept.values() for _, place, content, sample in kept
        ]
        return sorted(found, key=lambda entry: entry[0])
