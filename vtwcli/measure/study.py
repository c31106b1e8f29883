"""A study: one model, the samples that it is asked, the options of the command, and what the time went into."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vtwcli.data.drawing import sample_content
from vtwcli.data.sample import Sample
from vtwcli.data.sources import DataMix
from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.judge import policies
from vtwcli.judge.flops import TextShape
from vtwcli.machine import distributed
from vtwcli.measure.answers import Answer, reference_answers
from vtwcli.measure.batches import by_length
from vtwcli.measure.candidates import Tried, tried
from vtwcli.measure.promised import check_loss
from vtwcli.measure.samples import Given, SampleOptions, check_model, load_model, read_samples, settled, swept
from vtwcli.measure.streamed import streamed_answers
from vtwcli.methods.method import Candidate, Shape
from vtwcli.models.generation import generate_batches
from vtwcli.models.inputs import Encoded
from vtwcli.models.loading import LoadedModel, fits
from vtwcli.recipe.recipe import ModelSection
from vtwcli.results.document import ModelRecord, Origin, RunRecord
from vtwcli.results.provenance import model_of, origin_of, provenance_of, run_of
from vtwcli.results.resume import key_of
from vtwcli.sweep.layers import LayerSource, Resident, takes_masks
from vtwcli.sweep.schedules import plan_of, why_not
from vtwcli.sweep.streaming import Streamed
from vtwcli.sweep.sweep import SweepItem


class AnswerOptions(SampleOptions, Protocol):
    """The options that choosing samples and answering them needs."""

    @property
    def longest(self) -> int:
        """Tokens of the longest answer where no task says otherwise."""

    @property
    def batch_size(self) -> int | None:
        """Samples answered at once."""


class SweepOptions(AnswerOptions, Protocol):
    """The options that decide which positions a sweep compares; calibration and analysis have them."""

    @property
    def min_layer(self) -> int | None:
        """First candidate for K."""

    @property
    def positions(self) -> str:
        """``first`` or ``answer``."""

    @property
    def answers(self) -> str:
        """``auto``, ``generated`` or ``reference``."""


STREAMED = "layers are streamed: schedules are compared along the samples' reference answers"

Options = TypeVar("Options", bound=SampleOptions, covariant=True)


@dataclass(frozen=True)
class Study(Generic[Options]):
    """What calibrate, analyze and budget have in common from their first line to their last.

    Attributes:
        loaded: the model with its processor; without weights where it is streamed.
        mix: the samples and where they come from.
        options: the command's section.
        streamed: whether layers are read from disk one at a time.
        timing: seconds by part, of this process; ``part`` adds to it.
    """

    loaded: LoadedModel
    mix: DataMix
    options: Options
    streamed: bool
    timing: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)
    _full: dict[tuple[int, int], Answer] = field(default_factory=dict, init=False)

    @classmethod
    def open(cls, model: ModelSection, data: Sequence[DataSpec], options: Given) -> Study[Given]:
        """Look at the model, read the samples, then load the model: what is wrong is said before it takes long.

        Args:
            model: which model, and where it runs.
            data: sources of samples; by default the model's own.
            options: the command's section.

        Raises:
            NotFoundError: model or data missing or unreadable, or visual tokens cannot leave the family.
            UsageError: options that contradict the model.
        """
        began = time.perf_counter()
        check_model(model)
        mix = read_samples(model, data, options)
        streamed = _streams(model)
        loaded = load_model(model, weights=not streamed)
        study = Study(loaded, mix, settled(options, mix.samples), streamed, _began=began)
        study.timing["load"] = time.perf_counter() - began
        return study

    def check_sweep(self: Study[SweepOptions]) -> None:
        """Refuse options that contradict the model.

        Raises:
            UsageError: no candidate layer is left, or streamed layers are to answer.
        """
        check_loss(self.options, self.streamed)
        options, depth = self.options, self.source.depth
        if options.min_layer is not None and options.min_layer >= depth:
            raise UsageError(
                f"--min-layer: {options.min_layer} leaves no candidate, the model has layers 0..{depth - 1}"
            )

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples of all sources, in order."""
        return self.mix.samples

    @cached_property
    def source(self) -> LayerSource:
        """The model as layers, for the sweep."""
        return Streamed(self.loaded) if self.streamed else Resident(self.loaded.model, self.loaded.family)

    @property
    def shape(self) -> Shape:
        """What methods need to know of the model; one whose layers are streamed has no scores of its vision tower."""
        shape = Shape.of(self.loaded.family, self.loaded.model.config)
        return replace(shape, tower=None) if self.streamed else shape

    def of(self, places: Sequence[int]) -> Study[Options]:
        """The same study of these samples alone."""
        samples = tuple(self.mix.samples[place] for place in places)
        prints = tuple(self.mix.fingerprints[place] for place in places)
        return replace(self, mix=replace(self.mix, samples=samples, fingerprints=prints))

    def least(self, min_layer: int | None) -> int:
        """The first layer that may be K: as asked, by default of the depth, never before the family allows."""
        depth, first = self.shape.depth, self.shape.first_withdrawal
        return max(policies.default_min_layer(depth) if min_layer is None else min_layer, first)

    @cached_property
    def text(self) -> TextShape:
        """The sizes that FLOPs are counted from."""
        return TextShape.from_config(self.loaded.model.config)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a part of the work."""
        begun = time.perf_counter()
        yield
        self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - begun

    def batches(self: Study[AnswerOptions], tokens: int) -> list[list[int]]:
        """Places of the samples that are answered together; all processes must ask, see ``batches.by_length``."""
        with self.part("answers"):
            return by_length(self.loaded, self.samples, tokens, self.options.batch_size)

    @cached_property
    def _parts(self: Study[SweepOptions]) -> list[list[int]]:
        """Samples that stay together on one process: those that are answered together."""
        if self._whose == "generated":
            return self.batches(self.options.longest)
        return [[place] for place in range(len(self.samples))]

    @property
    def _whose(self: Study[SweepOptions]) -> str | None:
        """Whose answers are forced: ``generated`` or ``reference``; None compares the first position only."""
        if self.options.positions == "first":
            return None
        if self.options.answers == "auto":
            return "reference" if self.streamed else "generated"
        return self.options.answers

    def share(self: Study[SweepOptions]) -> list[int]:
        """Places of this process's samples; all processes must ask before they go to work."""
        return sorted(place for _, part in distributed.share(self._parts) for place in part)

    def contents(self: Study[SweepOptions]) -> list[str]:
        """By place, a digest of what the sample's kept entry depends on.

        In float32 that is the sample; in shorter types its answer depends on those that it is generated with.
        """
        found = [sample_content(sample) for sample in self.samples]
        if self.loaded.dtype == torch.float32:
            return found
        return [
            found[place] if len(part) == 1 else key_of(found[place], [found[other] for other in part])
            for place, part in sorted((place, part) for part in self._parts for place in part)
        ]

    def encode(self: Study[SweepOptions], mine: Sequence[int]) -> tuple[list[Encoded], list[SweepItem]]:
        """The samples at these places as the sweep's items, each with the answer that is forced."""
        samples = [self.samples[place] for place in mine]
        with self.part("answers"):
            answers = self._answers(mine)
        return swept(self.loaded, samples, answers)

    def _answers(self: Study[SweepOptions], mine: Sequence[int]) -> list[Tensor | None]:
        """The answer tokens to force behind each prompt; None compares the first position only."""
        samples, longest = [self.samples[place] for place in mine], self.options.longest
        if self._whose is None or not samples:
            return [None] * len(samples)
        if self._whose == "reference":
            return reference_answers(self.loaded, samples, longest)
        parts = [
            part for part in self._parts if set(part) & set(mine)
        ]  # whole ones, whatever is known already
        batches = [[self.samples[place] for place in part] for part in parts]
        if isinstance(self.source, Streamed):
            answers = streamed_answers(self.loaded, self.source, batches, longest)
        else:
            answers = generate_batches(self.loaded, batches, longest)
        found = {
            place: ids
            for part, rows in zip(parts, answers, strict=True)
            for place, (_, ids) in zip(part, rows, strict=True)
        }
        return [found[place] for place in mine]

    def streamable(self, candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, list[str]]]:
        """The candidates that streamed layers can try, and why the methods of the others cannot."""
        possible, without = [], dict[str, list[str]]()
        for one in candidates:
            plan = plan_of(one.schedule, self.shape.depth, self.loaded.family)
            reason = why_not(plan, self.loaded.layers)
            if reason is None:
                possible.append(one)
            elif one.method not in without.setdefault(reason[0], []):
                without[reason[0]].append(one.method)
        return possible, without

    def try_(
        self: Study[AnswerOptions],
        candidates: Sequence[Candidate],
        max_new_tokens: int,
        *,
        free: bool = False,
        lenient: bool = False,
    ) -> Tried:
        """Force every candidate along the full model's own answers; see ``candidates.tried``."""
        batches = self.batches(max_new_tokens)
        with self.part("schedules"):
            source = self.source if takes_masks(self.loaded.model, self.loaded.family) else None
            return tried(
                self.loaded,
                source,
                candidates,
                self.samples,
                max_new_tokens,
                batches,
                free=free,
                lenient=lenient,
                known=self._full,
            )

    def provenance(self, **found: Any) -> dict[str, Any]:
        """Where a schedule of this study comes from."""
        return provenance_of(self.loaded, self.mix, **found)

    def model(self) -> ModelRecord:
        """What documents say of the model."""
        return model_of(self.loaded)

    def origin(self, seed: int) -> Origin:
        """What documents end with."""
        return origin_of(self.mix, seed)

    def run(self) -> RunRecord:
        """The record of what differs between equal runs; the time ends here."""
        self.timing["total"] = time.perf_counter() - self._began
        return run_of(self.loaded, self.timing)


def _streams(model: ModelSection) -> bool:
    """Whether layers are read from disk: as asked, else where the model does not fit into memory."""
    if model.stream is not None:
        return model.stream
    where = distributed.local_device(model.device)
    if fits(model.name, where, model.dtype, trust_remote_code=model.trust_remote_code):
        return False
    console.note(f"{model.name} does not fit into memory; its layers are read one at a time")
    return True
