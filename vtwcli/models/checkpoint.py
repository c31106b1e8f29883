"""Where a model's files are and what is in them, found out without reading any weights.

``resolve`` turns what a user typed into a ``Checkpoint``: a local directory, its config, its family row, and an
index of its safetensors files made from their headers alone. Loading, layer streaming and export start from it.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtwcli.errors import NotFoundError, first_line
from vtwcli.io import console, files
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.broken_torchvision import hide_if_broken
from vtwcli.models.families import FAMILIES, Family, family_of, placeholder_ids, supported
from vtwcli.models.jsonfiles import CONFIG, GENERATION, check_sizes, numbers, read_json
from vtwcli.models.stored import DOWNLOAD_AGAIN, StoredTensor, read_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files that travel with every copy of the weights."""
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", *LEGAL)
"""Files beside the weights that a model needs: config, tokenizer, processor, chat template, licence."""
_CONFIG_FILES = [*COMPANIONS, "README.md"]
_INDEX = ".safetensors.index.json"
_MANY = 100_000  # layers, of anything; no model has a hundredth of it
_COUNTS = re.compile(r"layer|depth|block|stage|num_labels", re.IGNORECASE)  # settings that are counted up to
_SIZES = re.compile(r"size|num_|heads|channels|dim|expert|depth", re.IGNORECASE)
_NO_BUFFER_BYTES = 1 << 30  # of tables that are computed from the config; real ones take a few MiB


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
        entry = self.entry
        if not entry.is_file():
            raise _no_weights(self.path, self.name)
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(_index(entry).values())) or [entry.name]:
            found |= read_header(self.path / file).tensors
        return found

    @property
    def entry(self) -> Path:
        """The single weight file or the index of the shards: what the config names, else what is there."""
        return _weights_entry(self.path, self.config, self.name)

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
            if tensor.dtype is not None and tensor.dtype.is_floating_point:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    def skeleton(self, dtype: torch.dtype | None = None, attn: str | None = None) -> PreTrainedModel:
        """The model with its parameters on the meta device and its non-persistent buffers real (rotary tables...).

        Takes no memory to speak of; tied parameters are tied.
        """
        from transformers import GenerationConfig

        model = self._bare(dtype, attn)
        # Buffers that no checkpoint holds are computed from the config. from_pretrained does the same after loading.
        for owner, leaf, buffer in _computed_buffers(model):
            owner._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        with quiet_libraries():
            model.initialize_weights()
            if (self.path / GENERATION).exists():
                model.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)
        return model.eval()

    def _bare(self, dtype: torch.dtype | None = None, attn: str | None = None) -> PreTrainedModel:
        """The model with all tensors on the meta device: it takes no memory, whatever sizes the config gives.

        Raises:
            NotFoundError: the config describes no model, or one of far more parameters than the weights hold.
        """
        from transformers import AutoModelForImageTextToText

        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if attn is not None:
            options["attn_implementation"] = attn
        try:
            with quiet_libraries(), warnings.catch_warnings(), _bounded(self), torch.device("meta"):
                warnings.simplefilter("ignore")  # torch's, about tensors without elements
                model = AutoModelForImageTextToText.from_config(
                    deepcopy(self.config), dtype=dtype or self.dtype, **options
                )
        except NotFoundError:
            raise
        except Exception as error:  # there is no telling what unusual settings make transformers raise
            if attn not in (None, "eager"):  # may be what is wrong; eager attention is everywhere
                raise
            raise NotFoundError(
                f"{self.path / CONFIG} describes no model that can be built{self._settings(_is_odd)}: "
                f"{first_line(error)}"
            ) from error
        size = sum(buffer.nbytes for _, _, buffer in _computed_buffers(model))
        if size > _NO_BUFFER_BYTES:
            large = self._settings(lambda _, value: value >= 10**4)
            raise NotFoundError(
                f"{self.path / CONFIG} asks for tables of {size / 1e9:,.1f} GB beside the weights{large}"
            )
        return model

    def check(self) -> None:
        """Compare the config with the headers of the weights before anything large happens; allocates nothing.

        A model with code of its own may do with its weights what it likes: only its headers are read.

        Raises:
            NotFoundError: as ``tensors`` and ``key_map``, or a config that describes no model.
        """
        _ = self.tensors
        if not (self.trust_remote_code and hasattr(self.config, "auto_map")):
            _ = self.key_map

    def _settings(self, which: Callable[[str, int], object]) -> str:
        """The settings of config.json that ``which`` takes, in brackets, to be put into an error."""
        return _named(self._raw, which)

    @cached_property
    def _raw(self) -> dict[str, Any]:
        try:
            return read_json(self.path / CONFIG)
        except (NotFoundError, FileNotFoundError):
            return {}

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

        model = self._bare(attn="eager")
        wanted = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        prefix = model.base_model_prefix
        mapped: dict[str, StoredTensor] = {}
        groups: dict[str, list[tuple[str, StoredTensor]]] = {}  # first tensor it gives -> (pattern, source)
        # in transformers' order, in which it puts fused tensors together and takes the first of several
        for key in sorted(self.tensors, key=dot_natural_key):
            tensor = self.tensors[key]
            name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], prefix, wanted)
            if name not in wanted:
                continue
            if tensor.dtype is None:
                raise NotFoundError(
                    f"weight file {tensor.file}: {key!r} is of type {tensor.kind}, which torch does not have"
                )
            if pattern is not None:
                groups.setdefault(name, []).append((pattern, tensor))
            else:
                mapped.setdefault(name, tensor)
        conversions: dict[str, Conversion] = {}
        shapes = {name: tensor.shape for name, tensor in mapped.items()}
        for name, group in groups.items():
            converter = next(c for c in converters if group[0][0] in c.source_patterns)
            conversion = Conversion(
                tuple(tensor for _, tensor in group), _converting(converter, model, name, group)
            )
            try:
                made = conversion.convert([torch.empty(t.shape, device="meta") for t in conversion.sources])
            except Exception as error:  # whatever a converter stumbles over in tensors of other shapes
                raise NotFoundError(
                    f"the weights of {self.name!r} do not fit {self.path / CONFIG}: {name!r}: {first_line(error)}",
                    DOWNLOAD_AGAIN,
                ) from error
            conversions |= dict.fromkeys(made, conversion)
            shapes |= {target: tuple(tensor.shape) for target, tensor in made.items()}
        for name, shape in shapes.items():
            if name in wanted and tuple(wanted[name].shape) != shape:
                other = set(wanted[name].shape) - set(shape)
                named = self._settings(lambda name, value: _SIZES.search(name) and value in other)  # noqa: B023 - called at once
                raise NotFoundError(
                    f"the weights of {self.name!r} do not fit {self.path / CONFIG}: {name!r} is {list(shape)} on disk "
                    f"and {list(wanted[name].shape)} in the model{named}",
                    "config.json and the weights come from different models",
                )
        missing = _missing(model, shapes)
        if missing:
            number = int(next(iter(re.findall(r"\.(\d+)\.", missing[0])), _MANY))
            above = self._settings(lambda name, value: _COUNTS.search(name) and value > number)
            raise NotFoundError(
                f"the weights of {self.name!r} are incomplete: {len(missing)} of {len(wanted)} tensors of "
                f"{self.path / CONFIG} are missing, first {missing[0]!r}{above}",
                DOWNLOAD_AGAIN,
            )
        return mapped, conversions


def _converting(
    converter: Any, model: PreTrainedModel, name: str, group: list[tuple[str, StoredTensor]]
) -> Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]:
    """The function of a ``Conversion``; converters collect their sources, so each call works on a copy."""

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
def _bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """Stop the building of a model that has far more parameters than the checkpoint's files hold.

    Every layer is a Python object, also without memory for its weights: thousands of millions of them never end.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    try:
        stored = len(checkpoint.tensors)
        limit = 1_000 + 10 * stored  # one stored tensor may be split in the model: q, k, v; gate, up
    except NotFoundError:  # files without weights, such as an export to ONNX
        stored, limit = 0, 50_000
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            many = checkpoint._settings(lambda name, value: value > max(stored, 100) and _SIZES.search(name))
            raise NotFoundError(
                f"{checkpoint.path / CONFIG} describes a model of more than {limit:,} tensors{many}; the weights of "
                f"{checkpoint.name!r} hold {stored:,}"
            )

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _named(raw: dict[str, Any], which: Callable[[str, int], object]) -> str:
    """The settings of a config that ``which`` takes, in brackets, the three largest; empty where there are none."""
    found = sorted((-value, name) for name, value in numbers(raw) if which(name, value))
    return f" ({', '.join(f'{name} is {-value}' for value, name in found[:3])})" if found else ""


def _is_odd(name: str, value: int) -> bool:
    """Whether a setting is a size that no model has."""
    return _SIZES.search(name) is not None and not 0 < value < 10**9


def _computed_buffers(model: PreTrainedModel) -> list[tuple[Any, str, torch.Tensor]]:
    """Owner, name and value of the buffers that no checkpoint holds: rotary tables, position ids..."""
    found = []
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._non_persistent_buffers_set:
            found.append((module, leaf, buffer))
    return found


def _weights_entry(path: Path, config: Any, name: str) -> Path:
    """The single weight file or the index of the shards: what the config names, else what is there."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        if (
            not isinstance(named, str)
            or Path(named).name != named
            or not named.endswith((".safetensors", _INDEX))
        ):
            raise NotFoundError(f"the config of {name!r} names {named!r} as its weights, which is not loaded")
        return path / named
    index = path / f"model{_INDEX}"
    single = path / "model.safetensors"
    return index if index.is_file() and not single.is_file() else single


def _index(entry: Path) -> dict[str, str]:
    """The weight map of a sharded checkpoint, name on disk -> file name; empty for a single file.

    It may list what no file holds, such as a head that is tied: what counts is what the files hold.
    """
    if not entry.name.endswith(_INDEX):
        return {}
    try:
        content = read_json(entry)
    except FileNotFoundError as error:
        raise NotFoundError(f"weight index {entry} is missing", DOWNLOAD_AGAIN) from error
    weight_map: dict[str, str] | None = content.get("weight_map")
    reason = None
    if not isinstance(weight_map, dict) or not weight_map:
        reason = "it has no weight_map"
    elif not all(isinstance(file, str) and file and Path(file).name == file for file in weight_map.values()):
        reason = "its weight_map names something else than files beside it"
    elif not isinstance(content.get("metadata"), dict):
        reason = "it has no metadata, for which transformers asks"
    if reason is not None or weight_map is None:
        raise NotFoundError(f"weight index {entry} cannot be used: {reason}", DOWNLOAD_AGAIN)
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

    hide_if_broken()
    file = path / CONFIG
    try:
        raw = read_json(file)
    except FileNotFoundError as error:
        raise NotFoundError(f"{name!r} is not a model directory: it has no config.json") from error
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    named = (
        [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    )
    for setting, value in numbers(raw):
        if value > _MANY and _COUNTS.search(setting):  # transformers would make a list of so many
            raise NotFoundError(f"{file}: {setting} is {value}, which is more than any model has")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if str(model_type) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise NotFoundError(
                f"{name!r} is of the family {model_type!r}, which is not supported", supported()
            )
        raise NotFoundError(
            f"{name!r} is not a vision-language model that transformers knows: its model type is {model_type!r}",
            supported(),
        )
    family = FAMILIES[model_type]
    if named and family.architecture not in named and not trust_remote_code:
        raise NotFoundError(
            f"{name!r} was saved for {named[0]}, not for transformers' {family.architecture}",
            f"use a checkpoint in transformers' format, for example {family.example}",
        )
    if "quantization_config" in raw:
        settings = raw["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise NotFoundError(
            f"the weights of {name!r} are quantized ({method or 'unknown method'}), which is not supported",
            "use the checkpoint from which it was quantized",
        )
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        family, depth = family_of(config), config.get_text_config().num_hidden_layers
        if depth < 1 or any(not 0 <= i < 2**31 for i in placeholder_ids(family, config)):
            raise ValueError(f"{depth} layers, placeholders {placeholder_ids(family, config)}")
        return config, family
    except Exception as error:  # there is no telling what a broken config makes transformers raise
        raise NotFoundError(
            f"{file} is not a valid {model_type} config{_named(raw, _is_odd)}: {first_line(error)}"
        ) from error


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
    hide_if_broken()
    path, revision = _locate(name, [*_CONFIG_FILES, "*.py"] if trust_remote_code else _CONFIG_FILES)
    check_sizes(path)
    config, family = read_config(path, name, trust_remote_code)
    trusted = trust_remote_code and getattr(config, "vtw", None) is None
    checkpoint = Checkpoint(name, path, revision, config, family, trusted)
    if weights:
        if revision is not None:
            _fetch_weights(checkpoint)
        checkpoint.check()
    return checkpoint


def _locate(name: str, patterns: list[str]) -> tuple[Path, str | None]:
    """The local directory of a model with the files of ``patterns``, and the Hub commit if it has one."""
    if name == "demo":
        from vtwcli.io.files import demo_model

        return demo_model(), None
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
