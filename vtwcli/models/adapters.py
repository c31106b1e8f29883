"""Adapters that were trained with peft: merged into their base model, once, as a model directory like any other.

The merged directory lies in the Hub's cache folder, under a name that its files and the base model's give. All that
works with files works with it: streaming, exports, fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vtwcli.errors import NotFoundError, first_line
from vtwcli.io import console, files, staging
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.machine.memory import memory_available
from vtwcli.models.checkpoint import COMPANIONS, Checkpoint
from vtwcli.models.jsonfiles import ADAPTER, CONFIG, read_json
from vtwcli.models.stored import read_header

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_OVERHEAD = (
    1.2  # the adapter, and the product of its matrices for one layer at a time, beside the base's weights
)
_CARD = "README.md"
_DORA = ".lora_magnitude_vector"  # in files without the name of the one parameter that it has


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model; one that has both is a model.

    Trainers may leave a config.json beside an adapter, but never a model's weights.
    """
    if not (path / ADAPTER).is_file():
        return False
    alone = (path / ADAPTER_WEIGHTS).is_file() and not any(path.glob("model*.safetensors*"))
    return alone or not (path / CONFIG).is_file()


def base_of(path: Path, name: str) -> str:
    """The name of the model that an adapter was trained on, with the revision that it gives.

    Raises:
        NotFoundError: adapter_config.json cannot be read, or does not say.
    """
    settings = read_json(path / ADAPTER)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise NotFoundError(
            f"{name!r} is an adapter, and its {ADAPTER} does not say of which model",
            f"write the model's name or directory there as base_model_name_or_path: {path / ADAPTER}",
        )
    return (
        f"{base}@{revision}" if isinstance(revision, str) and revision and not Path(base).is_dir() else base
    )


def merged(path: Path, name: str, revision: str | None, base: Checkpoint) -> Checkpoint:
    """The checkpoint of an adapter and its base model put together; made where it is not there yet.

    Args:
        path: the adapter's directory, weights included.
        name: what the user asked for.
        revision: the adapter's Hub commit, or None.
        base: the model that it was trained on.

    Raises:
        NotFoundError: there is no peft, not the memory, or the adapter does not fit the model.
    """
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise NotFoundError(
            f"the adapter {name!r} has no {ADAPTER_WEIGHTS}"
            + (
                f"; {_PICKLE} is pickle, which can run code and is not loaded"
                if (path / _PICKLE).is_file()
                else ""
            ),
            f"save it again with a peft that writes {ADAPTER_WEIGHTS}",
        )
    target = _place(path, base)
    if not target.is_dir():
        _make(path, name, base, target)
    return replace(
        base, name=name, path=target, revision=revision, trust_remote_code=False, adapter_of=base.name
    )


def _place(path: Path, base: Checkpoint) -> Path:
    """Where the merged directory lies; another file of either of the two leads elsewhere."""
    from huggingface_hub import constants

    sha256 = hashlib.sha256()
    for file in (path / ADAPTER, path / ADAPTER_WEIGHTS):
        with files.regular(file).open("rb") as stream:
            sha256.update(hashlib.file_digest(stream, "sha256").digest())
    for folder in (path, base.path):
        for file in sorted(folder.iterdir()):
            if file.is_file():
                facts = file.stat()
                sha256.update(json.dumps([file.name, facts.st_size, facts.st_mtime_ns]).encode())
    return Path(constants.HF_HOME) / "vtwcli" / "merged" / sha256.hexdigest()[:16] / path.name


def _make(path: Path, name: str, base: Checkpoint, target: Path) -> None:
    if find_spec("peft") is None:
        raise NotFoundError(
            f"{name!r} is an adapter of {base.name!r}, and merging the two needs peft, which is not installed",
            "pip install peft; or give a directory in which they are merged: merge_and_unload() and save_pretrained() "
            "of peft",
        )
    needed, free = int(base.total_bytes * _OVERHEAD), memory_available(torch.device("cpu"))
    if needed > free:
        raise NotFoundError(
            f"not enough memory to merge the adapter {name!r} into {base.name!r}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free",
            "merge the two on a larger machine: merge_and_unload() and save_pretrained() of peft",
        )
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about what is checked here
            model = _model(path, base)
    except NotFoundError:
        raise
    except (
        Exception
    ) as error:  # there is no telling what an adapter of another model makes the libraries raise
        raise NotFoundError(
            f"the adapter {name!r} cannot be merged into {base.name!r}: {first_line(error)}",
            f"base_model_name_or_path in {path / ADAPTER} names the model that it was trained on",
        ) from error
    try:
        with staging.staged(target) as new:
            made = new / target.name
            with quiet_libraries():
                model.save_pretrained(made)
            for folder, mark in ((base.path, CONFIG), (path, ADAPTER)):
                _copy(folder, mark, made)
            settings = read_json(made / CONFIG)
            if settings.pop("transformers_weights", None) is not None:
                (made / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            if (base.path / _CARD).is_file():
                shutil.copyfile(base.path / _CARD, made / _CARD)
            replace(base, name=name, path=made).check()
            staging.rename_new(made, target)
    except FileExistsError:  # another process was faster
        return
    except OSError as error:
        raise files.cannot_write(target, error) from error
    console.note(f"merged the adapter {name!r} into {base.name!r}: {target}")


def _copy(folder: Path, mark: str, made: Path) -> None:
    """Copy what lies beside weights; links lead no further than those of the Hub's cache, where ``mark`` lies."""
    within = [folder.resolve(), (folder / mark).resolve().parent]
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            if file.name.endswith(".index.json") or file.name == ADAPTER:
                continue
            if file.name == CONFIG != mark:  # beside an adapter it may be anything
                continue
            if file.is_file() and any(file.resolve().is_relative_to(inside) for inside in within):
                shutil.copyfile(file, made / file.name)


def _model(path: Path, base: Checkpoint) -> Any:
    """The base model with the adapter's changes in its own weights.

    Raises:
        NotFoundError: not all of the adapter finds its place, or it changes weights that are one in two places.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(
        base.path, dtype=base.dtype, local_files_only=True, use_safetensors=True
    )
    names = vars(model).get(
        "_weight_conversions"
    )  # those of the base model's files; loading an adapter forgets them
    weights = {
        f"{key}.weight" if key.endswith(_DORA) else key: tensor.read()
        for key, tensor in read_header(path / ADAPTER_WEIGHTS).tensors.items()
    }
    found = model.load_adapter(
        str(path), adapter_state_dict=weights, adapter_kwargs={"local_files_only": True}
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if strangers := sorted(map(str, getattr(found, kind, None) or ())):
            raise ValueError(f"{len(strangers)} {kind.replace('_', ' ')}, first {strangers[0]}")
    wrapped = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    outer = _outermost([name for name, module in model.named_modules() if isinstance(module, wrapped)])
    tied = {key.rpartition(".")[0] for pair in (model.all_tied_weights_keys or {}).items() for key in pair}
    for name in outer:
        if name in tied:
            raise ValueError(f"it changes {name}, whose weight is tied to another's")
        module = model.get_submodule(name)
        if hasattr(module, "unload_and_optionally_merge_module"):
            whole = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            whole = module.get_base_layer()
        model.set_submodule(name, whole)
    model._hf_peft_config_loaded = False  # else only the adapter would be saved
    model._weight_conversions = names
    return model


def _outermost(names: Sequence[str]) -> list[str]:
    """Names of modules that lie in no other of them."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
