"""What a command does before it measures: looks at the model, reads the samples that it can be asked, loads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from vtwcli.data.cells import BadRow
from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.data.sources import DataMix, load_data
from vtwcli.data.spec import DataSpec
from vtwcli.data.tasks import TASKS
from vtwcli.errors import NotFoundError
from vtwcli.io import console
from vtwcli.machine import distributed
from vtwcli.measure.promised import check_samples
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import Encoded, UnusableSampleError, answer_ids, encode, end_ids
from vtwcli.models.loading import LoadedModel, load
from vtwcli.recipe.defaults import default_data
from vtwcli.recipe.recipe import ModelSection
from vtwcli.sweep.sweep import SweepItem


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


Given = TypeVar("Given", bound=SampleOptions)


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

    Raises:
        NotFoundError, UsageError: data missing or unreadable; or too few samples for what is to be promised.
    """
    specs = list(data) or default_data(model.name)
    model_type = None
    if any(TASKS[spec.source].by_model for spec in specs if spec.source in TASKS):
        asked = resolve(reader or model.name, trust_remote_code=model.trust_remote_code, weights=False)
        model_type = asked.family.model_type
    answered = getattr(options, "positions", "answer") == "answer"
    own_lengths = answered and getattr(options, "max_new_tokens", 1) is None
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
        model_type=model_type,
        own_lengths=own_lengths,
    )
    if mix.skipped:
        console.warn(f"skipped {mix.skipped} unreadable samples")
    if duplicates := sum(source["duplicates"] for source in mix.sources):
        rows = "1 row equals another" if duplicates == 1 else f"{duplicates} rows equal others"
        console.warn(f"{rows} in image, question, answer and task; equal rows count once")
    check_samples(mix, options)
    return mix


def settled(options: Given, samples: Sequence[Sample]) -> Given:
    """The options with the longest answer as a number, where it is the same for all samples."""
    section: Any = options
    if getattr(section, "max_new_tokens", 1) is not None or any(sample.longest for sample in samples):
        return options
    found: Given = section.model_copy(update={"max_new_tokens": section.longest})
    return found


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
            longest = answer_tokens([sample], getattr(options, "longest", 1)) - 1
            if forced and sample.references:
                longest = min(longest, len(answer_ids(loaded, sample.references[0])) - 1)
        encode(loaded, sample, torch.zeros(longest, dtype=torch.long) if longest else None)
    except UnusableSampleError as error:
        raise BadRow(error.message, error.hint) from None


def swept(
    loaded: LoadedModel, samples: Sequence[Sample], answers: Sequence[torch.Tensor | None]
) -> tuple[list[Encoded], list[SweepItem]]:
    """Samples as the sweep's items, each with the answer that is forced; None compares the first position only."""
    # the last answer token is compared but never read, so it is not part of the input
    encoded = [
        encode(loaded, sample, None if ids is None else ids[:-1])
        for sample, ids in zip(samples, answers, strict=True)
    ]
    items = [
        SweepItem(one.inputs, one.rows, name=f"sample {sample.id!r}")
        for one, sample in zip(encoded, samples, strict=True)
    ]
    return encoded, items
