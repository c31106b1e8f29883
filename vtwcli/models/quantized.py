"""Quantized weights: which libraries made them, how their parts are found on disk, and what can be done with them.

A model with quantized weights is loaded by transformers' own quantizers. What reads the files without them (shapes,
streaming, ONNX) sees each weight by its own name and size, as a ``PackedTensor``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from vtwcli.errors import NotFoundError
from vtwcli.models import parts
from vtwcli.models.packed import PackedTensor, Weight
from vtwcli.models.parts import Settings, Tensors, groups, weight_settings

_CPU_ROWS = 32  # outputs of a layer that bitsandbytes takes at a time
_EXTRA = "pip install 'vtwcli[quant]'"


@dataclass(frozen=True)
class Method:
    """A library's way to store weights.

    Attributes:
        name: ``quant_method`` in config.json.
        modules: the packages that transformers loads it with.
        install: the command that installs them.
        find: stored tensors by name and the settings -> the weights that are packed among them.
        sealed: why nothing but the library unpacks its weights; None: vtw does.
        keeps: whether the loaded model holds its weights packed.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    find: Callable[[Tensors, Settings], Iterator[PackedTensor]]
    sealed: str | None = None
    keeps: bool = True


@dataclass(frozen=True)
class Quantization:
    """How the weights of one model are quantized.

    Attributes:
        method: the library's way.
        settings: ``quantization_config`` in config.json.
    """

    method: Method
    settings: Settings

    @property
    def scheme(self) -> str:
        """In a few words, such as ``compressed-tensors pack-quantized 4-bit``."""
        settings = self.settings
        if self.method.name == "bitsandbytes":
            kind = str(settings.get("bnb_4bit_quant_type", "fp4")) if _is_four_bit(settings) else "int8"
        elif self.method.name == "torchao":
            kind = str((settings.get("quant_type") or {}).get("default", {}).get("_type", ""))
        elif self.method.name == "compressed-tensors":
            bits = sorted({str(weights.get("num_bits", 8)) for weights in weight_settings(settings)})
            kind = f"{settings.get('format', '')} {' and '.join(bits)}-bit"
        else:
            kind = f"{settings.get('bits')}-bit"
        return f"{self.method.name} {kind}".strip()

    @property
    def sealed(self) -> str | None:
        """Why the weights can be unpacked by their library alone; None: they can be unpacked here."""
        if self.method.sealed is not None:
            return self.method.sealed
        settings = self.settings
        if self.method.name == "compressed-tensors":
            formats = {settings.get("format")} | {group.get("format") for group in groups(settings)}
            formats -= {None, "mixed-precision", "dense", *parts.COMPRESSED}
            if formats:
                return f"the format {sorted(map(str, formats))[0]} is unpacked by compressed-tensors alone"
            if (
                settings.get("transform_config")
                or (settings.get("sparsity_config") or {}).get("format", "dense") != "dense"
            ):
                return "its weights are transformed or sparse besides, which compressed-tensors alone undoes"
            if any(weights.get("dynamic") for weights in weight_settings(settings)):
                return "its weights are quantized while it runs"
        if self.method.name == "gptq":
            stored = settings.get("checkpoint_format", "gptq")
            if stored not in ("gptq", "gptq_v2") or settings.get("bits") not in (2, 4, 8):
                return (
                    f"GPTQ's format {stored} with {settings.get('bits')} bits is unpacked by gptqmodel alone"
                )
        if self.method.name == "awq":
            version = str(settings.get("version", settings.get("format", "gemm"))).lower()
            if version != "gemm" or settings.get("bits", settings.get("w_bit", 4)) != 4:
                return f"AWQ's version {version} with {settings.get('bits', 4)} bits is unpacked by gptqmodel alone"
        return None

    @property
    def activations(self) -> bool:
        """Whether inputs or outputs of layers are quantized too, while the model runs."""
        kinds = ("input_activations", "output_activations")
        return any(group.get(kind) for group in groups(self.settings) for kind in kinds)

    @property
    def missing(self) -> list[str]:
        """The packages that transformers needs for these weights and that are not installed."""
        return [module for module in self.method.modules if find_spec(module) is None]

    @property
    def unreadable(self) -> bool:
        """Whether transformers cannot load the weights: it gives packed zero points other shapes."""
        formats = {self.settings.get("format"), *(group.get("format") for group in groups(self.settings))}
        return "pack-quantized" in formats and not all(
            weights.get("symmetric", True) for weights in weight_settings(self.settings)
        )

    @property
    def needs_values(self) -> bool:
        """Whether loading looks at what the weights hold, so that it cannot be tried without memory for them."""
        return self.method.name == "bitsandbytes" and _is_four_bit(self.settings)

    @property
    def unpacked(self) -> bool:
        """Whether the weights are unpacked when the model is loaded here, since transformers could not load them: GPTQ
        and AWQ without their library, and what is ``unreadable``."""
        if self.sealed is not None or self.activations:
            return False
        return bool(self.missing) if self.method.name in ("gptq", "awq") else self.unreadable

    @property
    def keeps(self) -> bool:
        """Whether the loaded model holds its weights packed."""
        return self.method.keeps and not self.unpacked

    def sparing(self, layers: Collection[str]) -> dict[str, Any]:
        """The settings, told which linear layers are stored as they are.

        compressed-tensors names those that it leaves alone as the model was called when it was quantized;
        transformers may call them otherwise by now, and would have no weights for them.

        Args:
            layers: names of linear layers in the model whose weights are not packed.

        Raises:
            NotFoundError: what it names is no pattern.
        """
        settings = dict(self.settings)
        if self.method.name == "compressed-tensors":
            known = [str(entry) for entry in settings.get("ignore") or []]
            exact = {entry for entry in known if not entry.startswith("re:")}
            try:
                patterns = [re.compile(entry[3:]) for entry in known if entry.startswith("re:")]
            except re.error as error:
                raise NotFoundError(f"ignore of the quantization_config is no pattern: {error}") from error
            more = [name for name in layers if name not in exact and not any(p.match(name) for p in patterns)]
            settings["ignore"] = [*known, *sorted(more)]
        return settings

    def check_library(self, name: str) -> None:
        """Say what is missing to load the model ``name``.

        Raises:
            NotFoundError: a package is not installed.
        """
        if missing := self.missing:
            raise NotFoundError(
                f"the weights of {name!r} are quantized by {self.method.name}, and {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not installed",
                self.method.install,
            )

    def logical(self, tensors: Tensors) -> dict[str, Weight]:
        """Stored tensors with those that belong to one weight put together under its name.

        Raises:
            NotFoundError: parts of a weight are missing or do not fit each other.
        """
        found: dict[str, Weight] = dict(tensors)
        for weight in self.method.find(tensors, self.settings):
            for part in weight.stored:
                found.pop(part.key, None)
            found[weight.key] = weight
        return found


def quantization_of(settings: Any, name: str) -> Quantization | None:
    """How a model is quantized, by ``quantization_config`` of its config.json; None where there is none.

    Args:
        settings: what stands there.
        name: of the model, for messages.

    Raises:
        NotFoundError: a method that is not supported, or settings that describe none.
    """
    if settings is None:
        return None
    if not isinstance(settings, dict):  # transformers' own, once a model is loaded
        settings = settings.to_dict() if hasattr(settings, "to_dict") else {}
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in METHODS:
        raise NotFoundError(
            f"the weights of {name!r} are quantized ({method or 'unknown method'}), which is not supported",
            f"use the checkpoint from which it was quantized, or one by {', '.join(METHODS)}",
        )
    if method == "compressed-tensors":
        try:
            groups(settings), weight_settings(settings)
        except (TypeError, ValueError, AttributeError, KeyError):
            raise NotFoundError(f"the quantization_config of {name!r} describes no layers") from None
        if settings.get("kv_cache_scheme"):
            raise NotFoundError(
                f"{name!r} quantizes its KV cache (kv_cache_scheme), which is not supported",
                "use the checkpoint from which it was quantized, or one with weights alone",
            )
    return Quantization(METHODS[method], settings)


def make_ready(model: Any) -> None:
    """What a loaded model needs before layers of it run by themselves, and wherever it runs.

    compressed-tensors unpacks weights when the model runs as a whole for the first time: here it does so at once. On
    CPUs with bfloat16 instructions bitsandbytes repacks four-bit weights for kernels that take whole blocks only, and
    stops at a layer of other sizes: such a layer keeps the kernels of other CPUs.
    """
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state = module.weight.quant_state
            if state.shape[0] % _CPU_ROWS or state.shape[1] % state.blocksize:
                module.support_avx512bf16_for_cpu = False


def quantize_activations(model: Any, quantization: Quantization, settings: Mapping[str, Any]) -> None:
    """Let the layers of a skeleton quantize what they are given, as compressed-tensors does; weights stay as they are.

    Args:
        model: the skeleton.
        quantization: of its checkpoint.
        settings: of that, with the layers that are left alone by their names in the model.

    Raises:
        NotFoundError: the library is not installed.
    """
    if not quantization.activations:
        return
    quantization.check_library("the model")
    from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config
    from transformers.utils.quantization_config import CompressedTensorsConfig

    apply_quantization_config(
        model, CompressedTensorsConfig(**settings).quantization_config, show_progress=False
    )
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            for name in [name for name in module._parameters if name.startswith("weight_")]:
                delattr(module, name)
            module.quantization_status = QuantizationStatus.DECOMPRESSED


def _is_four_bit(settings: Settings) -> bool:
    return bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))


METHODS = {
    method.name: method
    for method in (
        Method(
            "bitsandbytes",
            ("bitsandbytes",),
            _EXTRA,
            parts.bitsandbytes,
            "only bitsandbytes' own kernels unpack its weights",
        ),
        Method("compressed-tensors", ("compressed_tensors",), _EXTRA, parts.compressed, keeps=False),
        Method(
            "torchao",
            ("torchao",),
            _EXTRA,
            parts.torchao,
            "torchao keeps its weights as tensors of its own types, which only it unpacks",
        ),
        Method("gptq", ("gptqmodel", "optimum"), "pip install gptqmodel optimum", parts.gptq),
        Method("awq", ("gptqmodel",), "pip install gptqmodel", parts.awq),
    )
}
"""By ``quant_method``."""
