"""What is compared with the full model: schedules that torch runs, or exported ONNX graphs, under the same calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vtwcli import ort
from vtwcli.data.sample import Sample
from vtwcli.errors import UsageError
from vtwcli.export.directory.manifest import at_hand, read_manifest
from vtwcli.export.hf.export import CALIBRATION, baked_schedule
from vtwcli.machine import distributed
from vtwcli.machine.libraries import versions
from vtwcli.measure import costs
from vtwcli.measure.answers import Answer, Full, compared, schedule_answers
from vtwcli.measure.guide import Guides, guide_of, split
from vtwcli.measure.many import Many
from vtwcli.measure.samples import check_model, load_model
from vtwcli.models.dtypes import LONG, torch_type
from vtwcli.models.generation import plain_generation
from vtwcli.models.inputs import encode_batch
from vtwcli.models.loading import LoadedModel, choose_device
from vtwcli.recipe.recipe import EvalSection, ModelSection
from vtwcli.results.calibration import Calibration
from vtwcli.results.reading import read_calibration
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import Resident, takes_masks

if TYPE_CHECKING:
    from vtwcli.ort import OnnxModel

EXPORTED = "exported"  # the name of the schedule that comes with a directory
FULL = "full"  # the full model's own name among them

Batch = dict[str, Tensor]


class Variant(Protocol):
    """One thing that is compared with the full model.

    Attributes:
        name: in tables and documents.
        schedule: what it runs.
        inputs: the model whose processor and types its batches are made with.
        dtype: of its KV cache.
        folder: where its files are.
    """

    @property
    def name(self) -> str: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def inputs(self) -> LoadedModel: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def folder(self) -> Path: ...

    def answers(
        self, batch: Batch, full: Full, max_new_tokens: int, along: Sequence[Answer] | None = None
    ) -> list[Answer]:
        """What it says to a batch, by row, compared with the full model; ``along``: what ``engine_of`` found."""

    def generation_times(self, batch: Batch, tokens: int) -> tuple[float, float]:
        """Wall-clock seconds until the first of ``tokens`` tokens a row is known, and until the last is."""

    def cache_bytes(self, batch: Batch, tokens: int = 1) -> int:
        """Bytes of the keys and values that are held when the last of ``tokens`` tokens is known."""


@dataclass(frozen=True)
class Scheduled:
    """A model under a schedule, run by torch; where the schedule has no action, the model as it is.

    ``guides`` are the models that choose its tokens, where the schedule has one.
    """

    name: str
    schedule: Schedule
    inputs: LoadedModel
    guides: Guides | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    @property
    def folder(self) -> Path:
        return self.inputs.path

    def answers(
        self, batch: Batch, full: Full, max_new_tokens: int, along: Sequence[Answer] | None = None
    ) -> list[Answer]:
        with plain_generation(self.inputs):
            return schedule_answers(
                self.inputs, self.name, self.schedule, batch, full, max_new_tokens, along=along
            )

    def generation_times(self, batch: Batch, tokens: int) -> tuple[float, float]:
        with self._running(batch) as inputs, plain_generation(self.inputs):
            return costs.generation_times(self.inputs, inputs, tokens)

    def cache_bytes(self, batch: Batch, tokens: int = 1) -> int:
        with self._running(batch) as inputs, plain_generation(self.inputs):
            return costs.cache_bytes(self.inputs, inputs, tokens)

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[Batch]:
        inputs, given = split(batch)
        if not self.schedule.actions:
            yield inputs
            return
        with pruned(self.inputs.model, self.schedule) as handle:
            handle.given = given
            yield inputs


@dataclass(frozen=True)
class Graphs:
    """Exported ONNX graphs, with the schedule that is built into them; inputs come from the full model's processor."""

    name: str
    schedule: Schedule
    inputs: LoadedModel
    exported: OnnxModel

    @property
    def backend(self) -> str:
        """What runs them, ``onnx`` or ``openvino``."""
        return self.exported.backend

    @property
    def dtype(self) -> torch.dtype:
        return torch_type(LONG[self.exported.manifest["dtype"]])

    @property
    def folder(self) -> Path:
        return self.exported.directory

    def answers(
        self, batch: Batch, full: Full, max_new_tokens: int, along: Sequence[Answer] | None = None
    ) -> list[Answer]:
        from vtwcli.measure.graphs import forced_logits, generated

        forced = forced_logits(self.exported, batch, full.tokens, full.names)
        said = generated(self.exported, batch, max_new_tokens)
        found = compared(self.inputs, full, forced, said)
        return [
            replace(
                one,
                visual_per_layer=self.schedule.visual_per_layer(
                    len(one.visual_per_layer), one.visual_per_layer[0]
                ),
                frozen=self.schedule.frozen_layers(len(one.visual_per_layer)),
            )
            for one in found
        ]

    def generation_times(self, batch: Batch, tokens: int) -> tuple[float, float]:
        from vtwcli.measure.graphs import generation_times

        return generation_times(self.exported, batch, tokens)

    def cache_bytes(self, batch: Batch, tokens: int = 1) -> int:
        from vtwcli.measure.graphs import cache_bytes

        return cache_bytes(self.exported, batch, tokens)


def choose(
    model: ModelSection, schedules: Sequence[tuple[str, Schedule]], options: EvalSection
) -> tuple[list[tuple[str, Schedule]], Calibration | None]:
    """What to compare with the full model, found out before data and weights are read.

    Args:
        model: a stock model, an exported directory, or a directory of ONNX graphs.
        schedules: names and schedules that were asked for.
        options: ``backend``.

    Returns:
        The schedules, those of an exported directory where none were asked for; and the calibration result that an
        exported directory carries along with them.

    Raises:
        NotFoundError: the model is missing or unreadable, or nothing can leave it.
        UsageError: nothing to compare, a name that is taken, or another backend than the directory is for, or one
            that is not installed.
    """
    if ort.is_export(model.name):
        if options.backend == "torch":
            raise UsageError(
                f"{model.name} holds ONNX graphs, which torch does not run", "leave out --backend"
            )
        if schedules:
            raise UsageError(
                f"{model.name} holds ONNX graphs, which run the schedule they were exported with",
                "leave out --schedule, --layer and --method, or evaluate the base model",
            )
        from vtwcli.measure.graphs import check_backend

        check_backend(backend_of(options))
        exported = read_manifest(Path(model.name), ort.FORMAT)
        return [(EXPORTED, Schedule.from_dict(exported.get("schedule"), "the manifest's schedule"))], None
    if options.backend in ort.BACKENDS:
        raise UsageError(
            f"{model.name} is not a directory of ONNX graphs",
            f"make one: vtw export {model.name} --layer K --format onnx --output DIR",
        )
    checkpoint, carried, named = check_model(model), None, list(schedules)
    if not named and (baked := baked_schedule(checkpoint.config)) is not None:
        named = [(EXPORTED, baked)]
        file = checkpoint.path / CALIBRATION
        carried = read_calibration(file) if file.exists() else None
    if not named:
        raise UsageError(
            "nothing to compare with the full model", "give --schedule FILE, --layer K or --layers"
        )
    for _, schedule in named:
        guide_of(schedule)
    if len({name for name, _ in named}) != len(named):
        raise UsageError("two schedules have the same name")
    if any(name == FULL for name, _ in named):
        raise UsageError(f"a schedule cannot be called {FULL!r}, as the full model is", "rename its file")
    return named, carried


def backend_of(options: EvalSection) -> str:
    """What runs ONNX graphs, ``onnx`` where nothing else was asked for."""
    return "onnx" if options.backend == "auto" else options.backend


def reader_of(model: ModelSection, options: EvalSection) -> str:
    """The name of the model whose processor makes the inputs; of ONNX graphs the full model's.

    Raises:
        UsageError: ONNX graphs whose base model is not here.
    """
    if not ort.is_export(model.name):
        return model.name
    base = read_manifest(Path(model.name), ort.FORMAT)["model"]
    name = options.baseline or at_hand(base)
    if name is None:
        raise _no_base(base["name"])
    return name


def _no_base(name: str) -> UsageError:
    return UsageError(f"the base model {name!r} is not here to compare with", "name it with --baseline MODEL")


def open_variants(
    model: ModelSection, schedules: Sequence[tuple[str, Schedule]], options: EvalSection
) -> tuple[LoadedModel, list[Variant]]:
    """The full model, and what is compared with it.

    The full model is ``options.baseline`` where that is given. Else it is the model itself, for an exported Hugging
    Face directory its own weights without the schedule, for ONNX graphs the base model that their manifest names.

    Args:
        model: as for ``choose``.
        schedules: what ``choose`` gave.
        options: ``baseline``.

    Raises:
        NotFoundError: a model is missing or unreadable.
        UsageError: a baseline of another family, or none for ONNX graphs whose base model is not here; or a backend
            that is not installed.
    """
    if ort.is_export(model.name):
        return _open_graphs(model, schedules, options)
    own = _load(model, model.name)
    full = own if options.baseline in (None, model.name) else _load(model, options.baseline)
    _check_family(full, own.family.model_type, model.name)
    guides = Guides(own, options.longest)
    return full, [Scheduled(name, schedule, own, guides) for name, schedule in schedules]


def _open_graphs(
    model: ModelSection, schedules: Sequence[tuple[str, Schedule]], options: EvalSection
) -> tuple[LoadedModel, list[Variant]]:
    from vtwcli.measure.graphs import base_of, open_exported

    device = choose_device(distributed.local_device(model.device))
    exported = open_exported(model.name, device, backend_of(options))
    base = options.baseline or base_of(exported)
    if base is None:
        raise _no_base(exported.manifest["model"]["name"])
    full = _load(model, base)
    _check_family(full, exported.manifest["model"]["model_type"], model.name)
    return full, [Graphs(name, schedule, full, exported) for name, schedule in schedules]


def _load(model: ModelSection, name: str) -> LoadedModel:
    return load_model(model.model_copy(update={"name": name}))


def _check_family(full: LoadedModel, family: str, name: str) -> None:
    if full.family.model_type != family:
        raise UsageError(
            f"{full.name} is of the family {full.family.model_type!r}, but {name} is of {family!r}",
            "the baseline is the model that the other was made from",
        )


def _check_same_prompts(full: LoadedModel, variant: Variant, mine: Batch, theirs: Batch) -> None:
    """Refuse variants that read other tokens than the full model: their answers cannot be compared by token.

    Raises:
        UsageError: token ids differ.
    """
    if not torch.equal(mine["input_ids"].cpu(), theirs["input_ids"].cpu()):
        raise UsageError(
            f"{full.name} and {variant.inputs.name} read the same prompt as different tokens",
            "the baseline is the model that the other was made from",
        )


def engine_of(full: LoadedModel, variants: Sequence[Variant]) -> Many | None:
    """One pass over the layers that follows the variants along the full model's answers.

    None where they are not schedules of the full model's own weights, or its attention takes no masks.

    Raises:
        UsageError: a schedule that cannot be executed on this model.
    """
    if not all(isinstance(one, Scheduled) and one.inputs is full for one in variants):
        return None
    if not takes_masks(full.model, full.family):
        return None
    return Many(full, Resident(full.model, full.family), variants)


def batches_of(full: LoadedModel, variants: Sequence[Variant], samples: Sequence[Sample]) -> list[Batch]:
    """The samples as inputs of the full model and then of each variant; models that are the same share theirs.

    Those of a schedule with a guide have its scores beside them, which ``guide.split`` takes off.
    """
    made = {id(full): encode_batch(full, samples)}
    for variant in variants:
        if id(variant.inputs) not in made:
            made[id(variant.inputs)] = encode_batch(variant.inputs, samples)
            _check_same_prompts(full, variant, made[id(full)], made[id(variant.inputs)])
    found = [made[id(full)]]
    for variant in variants:
        batch, guides = made[id(variant.inputs)], getattr(variant, "guides", None)
        found.append(batch if guides is None else guides.beside(batch, samples, variant.schedule))
    return found


def versions_of(variants: Sequence[Variant]) -> dict[str, str]:
    """Versions of the libraries, and of what runs graphs where that is not ONNX Runtime."""
    engines = {one.exported.engine for one in variants if isinstance(one, Graphs) and one.backend != "onnx"}
    return versions() | {engine.package: engine.version for engine in engines}
