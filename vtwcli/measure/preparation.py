"""What a command does before it measures: opens the model, reads the samples, encodes them for the sweep."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import Protocol

import torch

from vtwcli.data.sample import Sample
from vtwcli.data.sources import DataMix, default_data, load_data
from vtwcli.data.spec import DataSpec
from vtwcli.data.tasks import BadRow
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.machine import distributed
from vtwcli.models.checkpoint import Checkpoint, resolve
from vtwcli.models.inputs import Encoded, UnusableSampleError, answer_ids, encode, end_ids, generate_answers
from vtwcli.models.loading import LoadedModel, fits, load
from vtwcli.recipe.recipe import ModelSection
from vtwcli.sweep.layers import LayerSource, Resident
from vtwcli.sweep.streaming import Streamed
from vtwcli.sweep.sweep import SweepItem


def load_model(model: ModelSection, *, weights: bool = True) -> LoadedModel:
    """The model with its processor on this process's device; see ``models.loading.load``."""
    with console.progress(f"loading {model.name}"):
        loaded = load(
            model.name,
            device=distributed.local_device(model.device),
            dtype=model.dtype,
            attn=model.attn,
            trust_remote_code=model.trust_remote_code,
            weights=weights,
        )
    ends, rows = end_ids(loaded), loaded.embedding_rows
    if ends and not any(0 <= token < rows for token in ends) and distributed.is_main():
        console.warn(
            f"the end tokens of {model.name} ({', '.join(map(str, ends))}, in generation_config.json or config.json) "
            f"lie outside the embedding (ids 0..{rows - 1}), so no answer ever ends by itself"
        )
    return loaded


def open_model(model: ModelSection) -> tuple[LoadedModel, LayerSource]:
    """The model with its processor and its layers, resident, or streamed where asked for or where it does not fit."""
    where = distributed.local_device(model.device)
    streamed = model.stream
    if streamed is None:
        streamed = not fits(model.name, where, model.dtype, trust_remote_code=model.trust_remote_code)
        if streamed:
            console.note(f"{model.name} does not fit into memory; its layers are read one at a time")
    loaded = load_model(model, weights=not streamed)
    return loaded, Streamed(loaded) if streamed else Resident(loaded.model, loaded.family)


def check_model(model: ModelSection) -> Checkpoint:
    """Refuse a model that cannot work before data and weights are read; its files without the weights.

    Raises:
        NotFoundError: missing, unsupported, or of a family whose visual tokens cannot leave.
    """
    checkpoint = resolve(model.name, trust_remote_code=model.trust_remote_code, weights=False)
    family = checkpoint.family
    if family.no_withdraw:
        raise NotFoundError(f"{family.title}: visual tokens cannot be withdrawn: {family.no_withdraw}")
    return checkpoint


class SampleOptions(Protocol):
    """The options that choosing samples needs; the sections of several commands have them."""

    @property
    def limit(self) -> int:
        """Samples per task."""

    @property
    def seed(self) -> int:
        """Of the choice."""

    @property
    def skip_bad(self) -> bool:
        """Whether unreadable samples are skipped and counted."""


def read_samples(
    model: ModelSection,
    data: Sequence[DataSpec],
    options: SampleOptions,
    exclude: Collection[str] = (),
    reader: str | None = None,
) -> DataMix:
    """The samples of a command: its data sources, or the model's default ones, without those to ``exclude``.

    Where bad samples are skipped, so are those that the model cannot be asked (too long, refused by its processor).

    Args:
        model: the model; what it reads is tried with its processor.
        data: the sources.
        options: how many samples, and whether bad ones are skipped.
        exclude: fingerprints of samples that must not come up.
        reader: name of the model whose processor makes the inputs, where that is another one.
    """
    specs = list(data) or default_data(model.name)
    check = None
    if options.skip_bad:
        # the skeleton is enough: nothing is computed
        tried = model.model_copy(update={"name": reader or model.name, "device": "cpu", "attn": None})
        answers = getattr(options, "answers", None)
        forced = answers == "reference" or (answers == "auto" and bool(model.stream))
        check = partial(_check_usable, load_model(tried, weights=False), options, forced)
    mix = load_data(
        specs,
        limit=options.limit,
        seed=options.seed,
        skip_bad=options.skip_bad,
        exclude=exclude,
        check=check,
    )
    if mix.skipped:
        console.warn(f"skipped {mix.skipped} unreadable samples")
    if duplicates := sum(source["duplicates"] for source in mix.sources):
        rows = "1 row equals another" if duplicates == 1 else f"{duplicates} rows equal others"
        console.warn(f"{rows} in image, question, answer and task; equal rows count once")
    return mix


def _check_usable(loaded: LoadedModel, options: SampleOptions, forced: bool, sample: Sample) -> None:
    """Encode a sample as the command will, with the longest answer that may follow it.

    Args:
        loaded: the model's skeleton and its processor.
        options: the command's section.
        forced: whether the answer is the sample's reference.
        sample: what is tried.

    Raises:
        BadRow: that cannot be done.
    """
    longest = 0
    try:
        if getattr(options, "positions", "first") == "answer":
            longest = int(getattr(options, "max_new_tokens", 1)) - 1
            if forced and sample.references:
                longest = min(longest, len(answer_ids(loaded, sample.references[0])) - 1)
        encode(loaded, sample, torch.zeros(longest, dtype=torch.long) if longest else None)
    except UnusableSampleError as error:
        raise BadRow(error.message, error.hint) from None


class SweepOptions(Protocol):
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

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""


def check_options(options: SweepOptions, source: LayerSource) -> None:
    """Refuse options that contradict the model.

    Raises:
        UsageError: no candidate layer is left, or a streamed model would have to generate.
    """
    if options.min_layer is not None and options.min_layer >= source.depth:
        raise UsageError(
            f"--min-layer: {options.min_layer} leaves no candidate, the model has layers 0..{source.depth - 1}"
        )
    if options.positions == "answer" and options.answers == "generated" and source.together:
        raise UsageError(
            "--answers generated: a streamed model would be read from disk once for every token",
            "use --answers reference or --positions first",
        )


def prepare(
    loaded: LoadedModel,
    source: LayerSource,
    samples: Sequence[Sample],
    options: SweepOptions,
    timing: dict[str, float],
) -> tuple[list[Encoded], list[SweepItem]]:
    """The samples as the sweep's items, each with the answer that is forced; ``timing`` gains its seconds."""
    begun = time.perf_counter()
    answers = _answers(loaded, source, samples, options)
    timing["answers"] = time.perf_counter() - begun
    # the last answer token is compared but never read, so it is not part of the input
    encoded = [
        encode(loaded, sample, None if ids is None else ids[:-1])
        for sample, ids in zip(samples, answers, strict=True)
    ]
    items = [
        SweepItem(one.inputs, _rows(one), name=f"sample {sample.id!r}")
        for one, sample in zip(encoded, samples, strict=True)
    ]
    return encoded, items


def _answers(
    loaded: LoadedModel, source: LayerSource, samples: Sequence[Sample], options: SweepOptions
) -> list[torch.Tensor | None]:
    """The answer tokens to force behind each prompt; None compares the first position only."""
    if options.positions == "first" or not samples:
        return [None] * len(samples)
    kind = options.answers
    if kind == "auto":
        kind = "reference" if source.together else "generated"
    if kind == "generated":
        return [ids for _, ids in generate_answers(loaded, samples, options.max_new_tokens)]
    without = sum(not sample.references for sample in samples)
    if without:
        console.warn(f"{without} samples have no reference answer; only their first position is compared")
    forced = [_forced(loaded, sample) for sample in samples]
    return [None if ids is None else ids[: options.max_new_tokens] for ids in forced]


def _forced(loaded: LoadedModel, sample: Sample) -> torch.Tensor | None:
    if not sample.references:
        return None
    try:
        return answer_ids(loaded, sample.references[0])
    except UnusableSampleError as error:
        raise UnusableSampleError(f"sample {sample.id!r}: {error.message}", error.hint) from None


def _rows(encoded: Encoded) -> torch.Tensor:
    """Positions whose next token is compared, [1, R]: the prompt's last and those of the answer behind it."""
    return torch.arange(encoded.prompt_length - 1, encoded.inputs["input_ids"].shape[1])[None]
