"""Where a model's files are and what is in them, found out without reading any weights.

``resolve`` turns what a user typed into a ``Checkpoint``: a local directory, its config, its family row, and an
index of its safetensors files made from their headers alone. Loading, layer streaming and export start from it.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtwcli import console, files
from vtwcli.errors import NotFoundError
from vtwcli.models.families import FAMILIES, Family, family_of, supported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The data types of safetensors headers that a supported checkpoint may hold."""

LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files that travel with every copy of the weights."""
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", *LEGAL)
"""Files beside the weights that a model needs: config, tokenizer, processor, chat template, licence."""
_CONFIG_FILES = [*COMPANIONS, "README.md"]
_INDEX = ".safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_DOWNLOAD_AGAIN = "copy or download the model again"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
        file: the safetensors file.
        key: the tensor's name in that file.
        dtype: as stored.
        shape: as stored.
        start: offset of its first byte, from the beginning of the file.
        nbytes: length in bytes.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """How some of the model's tensors come from stored ones: fused experts, split projections, transposes.

    Attributes:
        sources: the stored tensors, in the order in which ``convert`` takes them.
        convert: tensors read from ``sources`` -> {name in the model: tensor}.
    """

    sources: tuple[StoredTensor, ...]
    convert: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A model's files on this machine.

    Attributes:
        name: what the user asked for.
        path: the directory that holds the files.
        revision: the Hub commit, or None for a directory.
        config: the transformers config.
        family: its row of the family table.
        trust_remote_code: whether code that comes with the files may run.
    """

    name: str
    path: Path
    revision: str | None
    config: PretrainedConfig
    family: Family
    trust_remote_code: bool = False

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name on disk, from the headers of all files.

        Raises:
            NotFoundError: no safetensors weights, a missing shard, or a truncated or corrupt file.
        """
        entry = _weights_entry(self.path, self.config, self.name)
        if not entry.exists():
            raise _no_weights(self.path, self.name)
        listed = _index(entry)
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(listed.values())) or [entry.name]:
            found |= read_header(self.path / file)
        absent = sorted(listed.keys() - found.keys())
        if absent:
            raise NotFoundError(
                f"the weights of {self.name!r} are incomplete: the index lists {len(absent)} tensors that no file "
                f"holds, first {absent[0]!r} in {listed[absent[0]]}",
                _DOWNLOAD_AGAIN,
            )
        return found

    @property
    def weight_map(self) -> dict[str, str]:
        """Name on disk -> file name, as in a ``model.safetensors.index.json``."""
        return {key: tensor.file.name for key, tensor in self.tensors.items()}

    @cached_property
    def total_bytes(self) -> int:
        """Size of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def total_elements(self) -> int:
        """Number of values in all stored tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The floating-point type in which most of the weights are stored."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype.is_floating_point:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    def skeleton(self, dtype: torch.dtype | None = None, attn: str | None = None) -> PreTrainedModel:
        """The model with its parameters on the meta device and its non-persistent buffers real (rotary tables...).

        Takes no memory to speak of; tied parameters are tied.
        """
        from transformers import AutoModelForImageTextToText, GenerationConfig

        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if attn is not None:
            options["attn_implementation"] = attn
        with quiet_libraries(), torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(self.config, dtype=dtype or self.dtype, **options)
        # Buffers that no checkpoint holds are computed from the config. from_pretrained does the same after loading.
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        with quiet_libraries():
            model.initialize_weights()
            if (self.path / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)
        return model.eval()

    @property
    def key_map(self) -> dict[str, StoredTensor]:
        """Name in the model -> stored tensor, for every tensor that is stored as the model holds it.

        Checkpoints on disk often carry older names (``language_model.model.layers.0...``). The renaming is
        transformers' own, so it is the one that ``from_pretrained`` uses. What is not in the map is in
        ``conversions``, or tied to a parameter that is in one of the two.

        Raises:
            NotFoundError: a parameter of the model has no stored tensor, or one of another shape.
        """
        return self._origins[0]

    @property
    def conversions(self) -> dict[str, Conversion]:
        """Name in the model -> how it is computed, for tensors that are stored fused, split or transposed.

        Empty for most families. A conversion stands under the name of each tensor that it gives.
        """
        return self._origins[1]

    @cached_property
    def _origins(self) -> tuple[dict[str, StoredTensor], dict[str, Conversion]]:
        """Follows transformers' ``convert_and_load_state_dict_in_model`` without reading weights."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        model = self.skeleton()
        wanted = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        prefix = model.base_model_prefix
        mapped: dict[str, StoredTensor] = {}
        groups: dict[str, list[tuple[str, StoredTensor]]] = {}  # first tensor it gives -> (pattern, source)
        # in transformers' order, in which it puts fused tensors together
        for key in sorted(self.tensors, key=dot_natural_key):
            tensor = self.tensors[key]
            name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], prefix, wanted)
            if name in wanted and pattern is not None:
                groups.setdefault(name, []).append((pattern, tensor))
            elif name in wanted:
                mapped[name] = tensor
        conversions: dict[str, Conversion] = {}
        shapes = {name: tensor.shape for name, tensor in mapped.items()}
        for name, group in groups.items():
            converter = next(c for c in converters if group[0][0] in c.source_patterns)
            conversion = Conversion(
                tuple(tensor for _, tensor in group), _converting(converter, model, name, group)
            )
            try:
                made = conversion.convert([torch.empty(t.shape, device="meta") for t in conversion.sources])
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                raise NotFoundError(
                    f"the weights of {self.name!r} do not fit its config: {name!r}: {first_line(error)}",
                    _DOWNLOAD_AGAIN,
                ) from error
            conversions |= dict.fromkeys(made, conversion)
            shapes |= {target: tuple(tensor.shape) for target, tensor in made.items()}
        for name, shape in shapes.items():
            if name in wanted and tuple(wanted[name].shape) != shape:
                raise NotFoundError(
                    f"the weights of {self.name!r} do not fit its config: {name!r} is {list(shape)} on disk and "
                    f"{list(wanted[name].shape)} in the model",
                    "config.json and the weights come from different models",
                )
        missing = _missing(model, shapes)
        if missing:
            raise NotFoundError(
                f"the weights of {self.name!r} are incomplete: {len(missing)} of {len(wanted)} tensors are "
                f"missing, first {missing[0]!r}",
                _DOWNLOAD_AGAIN,
            )
        return mapped, conversions


def _converting(
    converter: Any, model: PreTrainedModel, name: str, group: list[tuple[str, StoredTensor]]
) -> Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]:
    """The function of a ``Conversion``; converters collect their sources, so each call works on a copy."""
    from copy import deepcopy

    def convert(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        own = deepcopy(converter)
        for (pattern, stored), tensor in zip(group, tensors, strict=True):
            own.add_tensor(name, stored.key, pattern, tensor)
        made = own.convert(name, model=model, config=model.config)
        return {target: x[0] if isinstance(x, list) else x for target, x in made.items()}

    return convert


def _missing(model: PreTrainedModel, found: Iterable[str]) -> list[str]:
    """Names of the state dict that are neither stored nor tied to something stored."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    held = set(found)
    for target, source in tied.items():
        if target in held or source in held:
            held |= {target, source}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return sorted(
        name for name in model.state_dict() if name not in held and not any(p.search(name) for p in ignored)
    )


@contextmanager
def quiet_libraries(bars: bool = False) -> Iterator[None]:
    """Hold back the warnings of transformers and huggingface_hub unless ``--verbose``; errors come through.

    Transformers does not ask on the terminal whether a directory's code may run: --trust-remote-code has said it.

    Args:
        bars: leave their progress bars on.
    """
    from huggingface_hub.utils import logging as hub
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    if console.settings.verbose:
        yield
        return
    level, hub_level = logging.get_verbosity(), hub.get_verbosity()
    hide = logging.is_progress_bar_enabled() and not bars
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if hide:
            logging.enable_progress_bar()


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against its length; reads the header only.

    Format: 8 bytes little-endian length n, n bytes of JSON, then the data, without gaps.

    Raises:
        NotFoundError: the file is missing, truncated, or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise ValueError("no safetensors header")
            text = stream.read(length)
        if len(text) < length:
            raise ValueError("the header is cut short")
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {}
        end = 0
        for key, entry in header.items():
            dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if dtype is None:
                raise ValueError(f"{key!r} has the unknown type {entry['dtype']}")
            if not 0 <= start <= stop or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the size of {key!r} does not match its shape")
            tensors[key] = StoredTensor(file, key, dtype, shape, 8 + length + start, stop - start)
            end = max(end, stop)
    except FileNotFoundError as error:
        raise NotFoundError(f"weight file {file} is missing", _DOWNLOAD_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotFoundError(f"weight file {file} is corrupt: {error}", _DOWNLOAD_AGAIN) from error
    if size != 8 + length + end:
        raise NotFoundError(
            f"weight file {file} is {'truncated' if size < 8 + length + end else 'corrupt'}: "
            f"{size:,} bytes instead of {8 + length + end:,}",
            _DOWNLOAD_AGAIN,
        )
    return tensors


def _weights_entry(path: Path, config: Any, name: str) -> Path:
    """The single weight file or the index of the shards: what the config names, else what is there."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        if Path(named).name != named or not named.endswith((".safetensors", _INDEX)):
            raise NotFoundError(f"the config of {name!r} names {named!r} as its weights, which is not loaded")
        return path / named
    index = path / f"model{_INDEX}"
    single = path / "model.safetensors"
    return index if index.exists() and not single.exists() else single


def _index(entry: Path) -> dict[str, str]:
    """The weight map of a sharded checkpoint, name on disk -> file name; empty for a single file."""
    if not entry.name.endswith(_INDEX):
        return {}
    try:
        weight_map = json.loads(entry.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or any(Path(file).name != file for file in weight_map.values()):
            raise ValueError("the weight map is empty or points outside the directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotFoundError(f"weight index {entry} is unreadable: {error}", _DOWNLOAD_AGAIN) from error
    return weight_map


def _no_weights(path: Path, name: str) -> NotFoundError:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickles:
        return NotFoundError(
            f"{name!r} has its weights only as pickle ({pickles[0]}), which can run code and is not loaded",
            "convert it to safetensors: load it with transformers in a safe place and call save_pretrained",
        )
    return NotFoundError(
        f"{name!r} has no weights in safetensors format",
        "expected model.safetensors, or model.safetensors.index.json and its shards",
    )


def read_config(path: Path, name: str, trust_remote_code: bool = False) -> tuple[PretrainedConfig, Family]:
    """The config of a model directory and its family row.

    Raises:
        NotFoundError: no config, an unreadable one, not a vision-language model, or an unsupported family.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    except FileNotFoundError as error:
        raise NotFoundError(f"{name!r} is not a model directory: it has no config.json") from error
    except (OSError, ValueError, AttributeError) as error:
        raise NotFoundError(f"{file} is not a readable model config: {error}", _DOWNLOAD_AGAIN) from error
    if model_type not in FAMILIES:
        if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise NotFoundError(
                f"{name!r} is of the family {model_type!r}, which is not supported", supported()
            )
        raise NotFoundError(
            f"{name!r} is not a vision-language model that transformers knows: its model type is {model_type!r}",
            supported(),
        )
    family = FAMILIES[model_type]
    if architectures and family.architecture not in architectures and not trust_remote_code:
        raise NotFoundError(
            f"{name!r} was saved for {architectures[0]}, not for transformers' {family.architecture}",
            f"use a checkpoint in transformers' format, for example {family.example}",
        )
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method", "unknown method")
        raise NotFoundError(
            f"the weights of {name!r} are quantized ({method}), which is not supported",
            "use the checkpoint from which it was quantized",
        )
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # there is no telling what a broken config makes transformers raise
        raise NotFoundError(f"{file} is not a valid {model_type} config: {first_line(error)}") from error
    return config, family_of(config)


def resolve(name: str, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Find a model's files, downloading from the Hub what is needed and not there.

    Args:
        name: a directory, a Hub id with an optional ``@revision``, or ``demo`` (use ``./demo`` for a directory of
            that name).
        trust_remote_code: whether code that comes with the model may run. An exported directory's own code never
            does: it would prune a model that is to be measured whole, and transformers' class is all it needs.
        weights: also fetch and check the weight files; without, config and processor files only.

    Raises:
        NotFoundError: for every reason why there is nothing to work with; message and hint say which.
    """
    path, revision = _locate(name, [*_CONFIG_FILES, "*.py"] if trust_remote_code else _CONFIG_FILES)
    config, family = read_config(path, name, trust_remote_code)
    trusted = trust_remote_code and getattr(config, "vtw", None) is None
    checkpoint = Checkpoint(name, path, revision, config, family, trusted)
    if weights:
        if revision is not None:
            _fetch_weights(checkpoint)
        _ = checkpoint.tensors  # headers are read and checked here, before anything large happens
    return checkpoint


def _locate(name: str, patterns: list[str]) -> tuple[Path, str | None]:
    """The local directory of a model with the files of ``patterns``, and the Hub commit if it has one."""
    if name == "demo":
        from vtwcli.demo import model_dir

        return Path(model_dir()), None
    path = Path(name).expanduser()
    if name and path.is_dir():
        _check_regular(path)
        return path.resolve(), None
    if path.is_file():
        raise NotFoundError(f"{name!r} is a file; a model is a directory", f"try {str(path.parent)!r}")
    repo, _, revision = name.partition("@")
    if not name or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo, re.ASCII) or name.startswith((".", "~")):
        raise NotFoundError(
            f"there is no directory {name!r}",
            "a model is a local directory, a Hub id such as llava-hf/llava-1.5-7b-hf, or demo",
        )
    folder = _snapshot(name, repo, revision or None, patterns)
    return folder, folder.name


def _check_regular(folder: Path) -> None:
    """Refuse a directory with a pipe or a device in it, for which a library that opens it would wait.

    Raises:
        NotFoundError: names it.
    """
    try:
        for file in [*folder.iterdir(), *folder.glob("*/*.jinja")]:
            if file.exists():  # a link that leads nowhere is for whoever needs it to complain about
                files.regular(file)
    except files.IrregularError as error:
        raise NotFoundError(f"{file}: cannot be read: {error}") from None
    except OSError as error:
        raise NotFoundError(f"{folder}: cannot be read: {error.strerror}") from None


def _fetch_weights(checkpoint: Checkpoint) -> None:
    """Download the weight files that the (already present) index names, or the single file."""
    from huggingface_hub import constants

    entry = _weights_entry(checkpoint.path, checkpoint.config, checkpoint.name)
    wanted = sorted(set(_index(entry).values())) or [entry.name]
    if all((checkpoint.path / file).exists() for file in wanted):
        return
    if constants.HF_HUB_OFFLINE:
        raise NotFoundError(
            f"the weights of {checkpoint.name!r} are not on this machine, and HF_HUB_OFFLINE forbids fetching them",
            "unset HF_HUB_OFFLINE",
        )
    _snapshot(checkpoint.name, checkpoint.name.partition("@")[0], checkpoint.revision, wanted)


def _snapshot(name: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a Hub repository's top level, from the local cache or the Hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        with quiet_libraries(bars=sys.stderr.isatty() and not console.settings.quiet):
            folder = snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        return Path(folder)
    except errors.GatedRepoError as error:
        raise NotFoundError(
            f"the model {repo!r} is gated",
            f"ask for access on its page on the Hub, then log in with: hf auth login ({_status(error)})",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"the model {repo!r} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"there is no directory and no public model {repo!r} on the Hub",
            f"check the spelling; for a private model log in with: hf auth login ({_status(error)})",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(name, error) from error
    except errors.HFValidationError as error:
        raise NotFoundError(f"{name!r} is neither a directory nor a Hub id", first_line(error)) from error
    except errors.HfHubHTTPError as error:
        raise NotFoundError(f"the Hub refused {repo!r}: {_status(error)}", first_line(error)) from error
    except Exception as error:  # a transfer that breaks off; the classes belong to the network library
        raise NotFoundError(f"could not fetch {repo!r}: {first_line(error)}") from error


def _unreachable(name: str, error: Exception) -> NotFoundError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return NotFoundError(
            f"the model {name!r} is not on this machine, and HF_HUB_OFFLINE forbids fetching it",
            "unset HF_HUB_OFFLINE, or give a local directory",
        )
    return NotFoundError(
        f"the model {name!r} is not on this machine, and the Hub cannot be reached",
        f"check the network and HF_ENDPOINT, or give a local directory ({first_line(error.__cause__ or error)})",
    )


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
