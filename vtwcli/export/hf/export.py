"""Export to a Hugging Face directory that loads pruned wherever transformers is."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from vtwcli import __version__
from vtwcli.errors import GateError, NotFoundError, UsageError, first_line
from vtwcli.export.directory.card import Subject, front_matter, model_card, of_schedule
from vtwcli.export.directory.manifest import (
    CARD,
    MANIFEST,
    read_manifest,
    save_json,
    save_settings,
    write_manifest,
)
from vtwcli.export.directory.own_code import drop_code_map, without_code_map
from vtwcli.export.directory.publish import check_target, publish
from vtwcli.export.directory.source import own_files, source_of
from vtwcli.export.hf.generation import clean_files, sentences
from vtwcli.export.hf.remote import MODELING, auto_map, remote_code
from vtwcli.export.hf.weights import check_finite, place_weights
from vtwcli.io import console
from vtwcli.machine.libraries import quiet_libraries, quiet_quantizers, versions
from vtwcli.machine.releases import tested
from vtwcli.models.checkpoint import COMPANIONS, Checkpoint
from vtwcli.models.dtypes import asked, name_of
from vtwcli.models.families import Family
from vtwcli.models.hub import resolve
from vtwcli.models.jsonfiles import CONFIG, read_json
from vtwcli.models.quantized import quantization_of
from vtwcli.models.requirements import processor_packages
from vtwcli.results.calibration import Calibration
from vtwcli.results.evaluation import Evaluation
from vtwcli.schedule.schedule import Schedule
from vtwcli.schedule.words import GUIDE, used

CALIBRATION, PICTURE, RECIPE = "calibration.json", "calibration.png", "recipe.yaml"

_NOT_COPIED = {"config.json", "trainer_state.json", MANIFEST, CALIBRATION}


def export_hf(
    model: str | Checkpoint,
    schedule: Schedule,
    output: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    calibration: Calibration | None = None,
    evaluation: Evaluation | None = None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Write a model directory with ``schedule`` baked in.

    ``AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)`` loads it pruned, without this
    package; without the flag it loads as the plain model. Weights are read once to see that they are finite, then
    linked or copied as they are, or converted, a few MiB at a time; they are never loaded.

    Args:
        model: a directory, Hub id or ``demo``, or what ``resolve`` made of it.
        schedule: what to bake in, static or dynamic.
        output: the directory to make; nothing is there before everything is.
        dtype: ``float32``, ``bfloat16`` or ``float16`` to convert the floating-point weights; None leaves them.
        force: replace an existing directory, and allow ``model`` to be an export (its schedule is replaced).
        calibration: the calibration result that the schedule comes from, for the record and the card.
        evaluation: a result of ``evaluate`` that this schedule is among, for the card. It is not kept itself: its
            questions and answers may not be for everybody.
        recipe: text of the recipe, kept word for word.

    Returns:
        The manifest, as written into the directory.

    Raises:
        UsageError: a schedule or type that does not fit the model, or an output that would be overwritten.
        NotFoundError: the model cannot be found or read, its weights are not finite, or nothing can be withdrawn
            from its family.
        GateError: transformers would not find every weight under the exported class.
        VtwError: the file system refuses.
    """
    check_target(output, force, source_of(model))
    wanted = asked(dtype)
    if isinstance(
        model, str
    ):  # before the weights, for which the class is built, with whatever that wants installed
        _check_family(resolve(model, weights=False).family)
    checkpoint = resolve(model) if isinstance(model, str) else model
    _check_source(checkpoint, force)
    _check_schedule(checkpoint, schedule, calibration)
    if evaluation is not None:
        of_schedule(evaluation, schedule)
    family = checkpoint.family
    code = remote_code(family)
    earlier = _earlier(checkpoint)
    with publish(output, force, source_of(checkpoint)) as folder:
        weights = place_weights(checkpoint, folder, wanted)
        kind = name_of(wanted if wanted and weights == "converted" else checkpoint.dtype)
        quantized = checkpoint.quantization
        _copy_companions(checkpoint, folder)
        config = _config(checkpoint, schedule, wanted if weights == "converted" else None)
        changed = clean_files(folder, config, schedule)
        for sentence in sentences(changed):
            console.warn(sentence)
        save_settings(folder / "config.json", config)
        for name, text in code.items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_record(folder, calibration, recipe)
        if earlier is not None and earlier["weights"] == "converted":
            weights = "converted"  # told of the base model, not of the export in between
        base, revision = _base(checkpoint, earlier)
        subject = Subject(
            name=output.absolute().name,
            base=base,
            revision=revision,
            on_hub=revision is not None,
            family=family,
            config=checkpoint.config,
            schedule=schedule,
            weights=weights,
            dtype=kind,
            front=front_matter(checkpoint.path / CARD),
            changed=sentences(changed),
            packages=processor_packages(family, folder),
            adapter_of=checkpoint.adapter_of,
        )
        picture = PICTURE if (folder / PICTURE).exists() else None
        card = model_card(subject, calibration, evaluation, picture)
        (folder / CARD).write_text(card, encoding="utf-8")
        _check_loading(folder, family, code, config)
        check_finite(checkpoint)
        return write_manifest(
            folder,
            {
                "producer": f"vtwcli {__version__}",
                "versions": versions(),
                "tested": {"transformers": tested()},
                "model": {"name": base, "revision": revision, "model_type": family.model_type},
                "schedule": schedule.to_dict(),
                "weights": weights,
                "dtype": kind,
                **({} if quantized is None else {"quantization": quantized.scheme}),
                "changed": changed,
            },
        )


def baked_schedule(config: Any) -> Schedule | None:
    """The schedule in an exported model's config; None for any other model.

    Args:
        config: a transformers config.

    Raises:
        UsageError: there is one, but it is not valid.
    """
    entry = getattr(config, "vtw", None)
    if entry is None:
        return None
    data = entry.get("schedule") if isinstance(entry, dict) else entry
    return Schedule.from_dict(data, "config.json, vtw.schedule")


def _check_family(family: Family) -> None:
    """Refuse one from which nothing can be withdrawn."""
    if family.no_withdraw:
        raise NotFoundError(f"{family.title}: visual tokens cannot be withdrawn: {family.no_withdraw}")


def _check_source(checkpoint: Checkpoint, force: bool) -> None:
    """Refuse what would not give a faithful copy."""
    if checkpoint.trust_remote_code:
        raise UsageError(
            f"{checkpoint.name!r} is to run its own code, and an export runs transformers' class",
            "leave out --trust-remote-code",
        )
    if checkpoint.quantization is not None and checkpoint.quantization.unreadable:
        raise NotFoundError(
            f"transformers does not load {checkpoint.name!r}: it gives its packed zero points another shape",
            "export it to ONNX, or use a checkpoint with symmetric weights",
        )
    _check_family(checkpoint.family)
    if (checkpoint.path / "adapter_config.json").exists():
        raise UsageError(
            f"{checkpoint.name!r} has an adapter beside its weights",
            "merge the adapter into the weights first",
        )
    if getattr(checkpoint.config, "vtw", None) is not None and not force:
        raise UsageError(
            f"{checkpoint.name!r} has a schedule baked in already",
            "export the base model, or --force a new schedule",
        )


def _check_schedule(checkpoint: Checkpoint, schedule: Schedule, calibration: Calibration | None) -> None:
    """Try the schedule on the model's skeleton, so that a bad one fails before anything is written."""
    from vtwcli.runtime import PruningError, apply

    for word in used(schedule.plain()):
        if word.needs == GUIDE and word.onnx is not None:
            raise UsageError(*word.onnx)
    depth = checkpoint.config.get_text_config().num_hidden_layers
    layers = depth if calibration is None else calibration.get("num_layers")
    if layers != depth:
        raise UsageError(
            f"the calibration is of a model with {layers} layers, but {checkpoint.name!r} has {depth}"
        )
    try:
        apply(checkpoint.skeleton(), schedule)
    except PruningError as error:
        raise UsageError(f"the schedule cannot be executed: {error}") from error


def _earlier(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The manifest of a model that is an export itself."""
    baked = getattr(checkpoint.config, "vtw", None) is not None
    return read_manifest(checkpoint.path) if baked and (checkpoint.path / MANIFEST).exists() else None


def _base(checkpoint: Checkpoint, earlier: dict[str, Any] | None) -> tuple[str, str | None]:
    """Name and Hub commit of the base model; of a local path the last part, of an export its own base."""
    if earlier is not None:
        return earlier["model"]["name"], earlier["model"]["revision"]
    if checkpoint.revision is not None:
        return checkpoint.name.partition("@")[0], checkpoint.revision
    return ("demo" if checkpoint.name == "demo" else checkpoint.path.name), None


def _copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, processor, chat template, generation config, licence."""
    for file in own_files(checkpoint, COMPANIONS):
        if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
            if file.name.endswith("config.json"):
                without_code_map(folder / file.name)


def _config(checkpoint: Checkpoint, schedule: Schedule, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base model's config.json with the schedule; every other key stays as it was written."""
    import transformers

    from vtwcli.runtime import layout_of
    from vtwcli.runtime.loading import settings_of

    config: dict[str, Any] = read_json(checkpoint.path / CONFIG)
    if dtype is not None:
        _set_dtype(config, name_of(dtype))
    config["architectures"] = [checkpoint.family.architecture]
    # A code map of the base model would send transformers to code that it has a class for, and that is not copied.
    drop_code_map(config)
    if checkpoint.quantization is not None:
        config["quantization_config"] = checkpoint.sparing_quantization()
    config["auto_map"] = auto_map(checkpoint.family)
    config["vtw"] = {
        "schedule": schedule.to_dict(),
        "layout": layout_of(checkpoint.config),
        "version": __version__,
        "transformers": transformers.__version__,
        "config": settings_of(checkpoint.config),
    }
    return config


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Name the type of the weights at the top, and wherever else the config names one."""
    old = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[old] = name
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, name)


def _write_record(folder: Path, calibration: Calibration | None, recipe: str | None) -> None:
    """The documents that the export comes from."""
    if calibration is not None:
        from vtwcli.report.calibration import plot_calibration

        save_json(folder / CALIBRATION, calibration)
        with console.not_worth_failing(f"{PICTURE}: cannot be drawn, and the model is exported without it"):
            plot_calibration(calibration, folder / PICTURE)
    if recipe is not None:
        (folder / RECIPE).write_text(recipe, encoding="utf-8")


def _check_loading(folder: Path, family: Family, code: dict[str, str], config: dict[str, Any]) -> None:
    """Load structure and names, no values: the exported class must find what transformers' own class finds.

    Some checkpoints hold a few tensors that nobody uses; ``config`` is told of them, so that no others are ignored.
    """
    import transformers

    quantization = quantization_of(config.get("quantization_config"), str(folder))
    if quantization is not None and quantization.needs_values:
        return
    if quantization is not None and quantization.missing:
        console.warn(
            f"not loaded to see that all weights are found: {' and '.join(quantization.missing)} would be needed for "
            f"{quantization.scheme}"
        )
        return
    quiet = quiet_quantizers() if quantization is not None else nullcontext()
    with exported_class(family, code) as exported, quiet_libraries(), quiet:
        options: dict[str, Any] = {
            "device_map": "meta",
            "output_loading_info": True,
            "local_files_only": True,
        }
        try:
            _, plain = getattr(transformers, family.architecture).from_pretrained(folder, **options)
            for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
                if bad := sorted(map(str, plain[kind])):
                    raise GateError(
                        f"the exported model would load with {len(bad)} {kind.replace('_', ' ')}, first {bad[0]}",
                        "the base checkpoint is incomplete, or this version of transformers renames its weights "
                        "otherwise",
                    )
            if plain["unexpected_keys"]:
                config["vtw"]["unused"] = sorted(map(str, plain["unexpected_keys"]))
                save_json(folder / "config.json", config)
            exported.from_pretrained(folder, **options)
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise GateError(f"the exported model does not load: {first_line(error)}") from error


@contextmanager
def exported_class(family: Family, code: dict[str, str]) -> Iterator[Any]:
    """The model class of an export, imported apart from transformers' cache of remote code."""
    name = "vtwcli_exported"
    with tempfile.TemporaryDirectory(prefix="vtw-code-") as place:
        for file, text in code.items():
            (Path(place) / file).write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(
            name, Path(place) / MODELING, submodule_search_locations=[place]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            yield getattr(module, family.architecture)
        finally:
            for imported in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[imported]
