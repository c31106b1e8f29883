"""What is on disk of a model, mapped to the model, found out without reading any weights.

A ``Checkpoint`` is a local directory, its config, its family row, and an index of its safetensors files made from
their headers alone. Loading, layer streaming and export start from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtwcli.errors import NotFoundError
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.config import ConfigFile
from vtwcli.models.families import Family
from vtwcli.models.jsonfiles import GENERATION, read_json
from vtwcli.models.mapping import Conversion, origins
from vtwcli.models.packed import PackedTensor, Weight
from vtwcli.models.quantized import Quantization, quantization_of
from vtwcli.models.skeleton import bare_model, computed_buffers
from vtwcli.models.stored import DOWNLOAD_AGAIN, StoredTensor, read_header

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files that travel with every copy of the weights."""
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", *LEGAL)
"""Files beside the weights that a model needs: config, tokenizer, processor, chat template, licence."""
_INDEX = ".safetensors.index.json"


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
        adapter_of: the model that an adapter of this name was merged into; None for any other.
    """

    name: str
    path: Path
    revision: str | None
    config: PretrainedConfig
    family: Family
    trust_remote_code: bool = False
    adapter_of: str | None = None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name on disk, from the headers of all files.

        Raises:
            NotFoundError: no safetensors weights, a missing shard, or a truncated or corrupt file.
        """
        if not self.entry.is_file():
            raise _no_weights(self.path, self.name)
        found: dict[str, StoredTensor] = {}
        for file in self.shards:
            found |= read_header(self.path / file).tensors
        return found

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the weights are quantized, or None."""
        return quantization_of(getattr(self.config, "quantization_config", None), self.name)

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """``tensors``, with those that make up one quantized weight put together under the weight's name.

        Raises:
            NotFoundError: as ``tensors``, or parts of a weight that are missing or do not fit.
        """
        return dict(self.tensors) if self.quantization is None else self.quantization.logical(self.tensors)

    @property
    def entry(self) -> Path:
        """The single weight file or the index of the shards: what the config names, else what is there."""
        return _weights_entry(self.path, self.config, self.name)

    @property
    def shards(self) -> list[str]:
        """Names of the weight files: those that the index lists, or the single one; they need not be there."""
        return sorted(set(_index(self.entry).values())) or [self.entry.name]

    @cached_property
    def total_bytes(self) -> int:
        """Size of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def total_elements(self) -> int:
        """Number of values in all weights, quantized ones by their own shapes."""
        return sum(math.prod(tensor.shape) for tensor in self.weights.values())

    def bytes_in(self, dtype: torch.dtype, unpacked: bool = False) -> int:
        """Size of all weights once they are loaded in ``dtype``; what stays packed, unless it is to be ``unpacked``, as
        it is stored."""
        keeps = self.quantization is not None and self.quantization.keeps and not unpacked
        return sum(
            weight.nbytes
            if keeps and isinstance(weight, PackedTensor)
            else math.prod(weight.shape) * dtype.itemsize
            for weight in self.weights.values()
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The floating-point type in which most of the weights are stored, quantized ones apart."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.weights.values():
            if isinstance(tensor, PackedTensor):
                continue
            if tensor.dtype is not None and tensor.dtype.is_floating_point:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    def sparing_quantization(self) -> dict[str, Any]:
        """``quantization_config`` for config.json, as transformers needs it to leave alone what is not quantized; empty
        where nothing is.

        Raises:
            NotFoundError: as ``key_map``.
        """
        if self.quantization is None:
            return {}
        packed = {name for name, weight in self.key_map.items() if isinstance(weight, PackedTensor)}
        modules = self.skeleton().named_modules()
        linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
        return self.quantization.sparing([name for name in linear if f"{name}.weight" not in packed])

    def skeleton(self, dtype: torch.dtype | None = None, attn: str | None = None) -> PreTrainedModel:
        """The model with its parameters on the meta device and its non-persistent buffers real (rotary tables...).

        Takes no memory to speak of; tied parameters are tied.

        Raises:
            NotFoundError: as ``bare_model``.
        """
        from transformers import GenerationConfig

        model = self._bare(dtype, attn)
        # Buffers that no checkpoint holds are computed from the config. from_pretrained does the same after loading.
        for owner, leaf, buffer in computed_buffers(model):
            owner._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        with quiet_libraries():
            model.initialize_weights()
            if (self.path / GENERATION).exists():
                model.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)
        return model.eval()

    def _bare(self, dtype: torch.dtype | None = None, attn: str | None = None) -> PreTrainedModel:
        try:
            stored = len(self.weights)
        except NotFoundError:
            stored = None
        return bare_model(
            self.config,
            dtype or self.dtype,
            attn,
            self.trust_remote_code,
            name=self.name,
            file=ConfigFile.of(self.path),
            stored=stored,
        )

    def check(self) -> None:
        """Compare the config with the headers of the weights before anything large happens; allocates nothing.

        A model with code of its own may do with its weights what it likes: only its headers are read.

        Raises:
            NotFoundError: as ``tensors`` and ``key_map``, or a config that describes no model.
        """
        _ = self.tensors
        if not (self.trust_remote_code and hasattr(self.config, "auto_map")):
            _ = self.key_map

    @property
    def key_map(self) -> dict[str, Weight]:
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

    def origins_in(self, model: PreTrainedModel) -> tuple[dict[str, Weight], dict[str, Conversion]]:
        """As ``key_map`` and ``conversions``, for a skeleton that holds more than the config says.

        Raises:
            NotFoundError: as ``key_map``.
        """
        return origins(model, self.weights, self.name, ConfigFile.of(self.path))

    @cached_property
    def _origins(self) -> tuple[dict[str, Weight], dict[str, Conversion]]:
        return self.origins_in(self._bare(attn="eager"))


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
