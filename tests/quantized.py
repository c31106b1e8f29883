"""Tiny models whose weights are quantized by the libraries that do it, or packed by hand where a library is missing.

``make(kind, folder, target)`` writes the model of ``folder`` quantized into ``target``. The kinds of ``LIBRARY`` name
the package that a test needs; those of GPTQ and AWQ are packed here, number by number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

LIBRARY = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "w4a16": "compressed_tensors",
    "w4a16-zero": "compressed_tensors",
    "w8a8": "compressed_tensors",
    "fp8": "compressed_tensors",
    "fp8-static": "compressed_tensors",
    "torchao": "torchao",
}
PACKED = ("gptq", "gptq-order", "awq")
"""Packed by hand."""
UNPACKED = ("w4a16", "w4a16-zero", "w8a8", "fp8", "fp8-static", *PACKED)
"""Those whose weights vtw unpacks."""
SEALED = ("nf4", "int8", "torchao")
GROUP = 16


def make(kind: str, folder: Path, target: Path) -> Path:
    """The model of ``folder``, quantized, in ``target``; skips the test where the library is missing."""
    if kind in LIBRARY:
        pytest.importorskip(LIBRARY[kind])
    shutil.copytree(folder, target)
    if kind in PACKED:
        _pack(kind, target)
        return target
    if LIBRARY[kind] == "compressed_tensors":
        _compress(kind, folder, target)
    else:
        options = {"quantization_config": _library_config(kind), "device_map": {"": "cpu"}}
        AutoModelForImageTextToText.from_pretrained(folder, **options).save_pretrained(target)
    return target


def _library_config(kind: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _compress(kind: str, folder: Path, target: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    four = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    rows: dict[str, Any] = {"num_bits": 8, "strategy": "channel"}
    each: dict[str, Any] = {"num_bits": 8, "strategy": "token", "dynamic": True}
    whole: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    weights, inputs = {
        "w4a16": (four, None),
        "w4a16-zero": (four | {"symmetric": False}, None),
        "w8a8": (rows, each),
        "fp8": (rows | {"type": "float"}, each | {"type": "float"}),
        "fp8-static": (whole, whole),
    }[kind]
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )
    ignore = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=ignore, quantization_status="frozen"
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        values = module.weight.detach()
        if weights["strategy"] == "group":
            values = values.unflatten(-1, (-1, GROUP))
        elif weights["strategy"] == "tensor":
            values = values.reshape(1, -1)
        low, high = values.amin(-1), values.amax(-1)
        found = calculate_qparams(low, high, module.quantization_scheme.weights)
        for name, value in zip(("weight_scale", "weight_zero_point"), found, strict=True):
            if (held := getattr(module, name, None)) is not None:
                held.data = value.reshape(held.shape).to(held.dtype)
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))


def _pack(kind: str, target: Path) -> None:
    """Weights of the text model in four bits, as GPTQ (with or without an order of its own) or AWQ store them."""
    tensors = load_file(target / "model.safetensors")
    torch.manual_seed(0)
    for key in [
        key for key in tensors if ".layers." in key and "_proj.weight" in key and "vision" not in key
    ]:
        weight = tensors.pop(key).T  # [inputs, outputs]
        order = torch.arange(len(weight)) // GROUP
        if kind == "gptq-order":
            order = order[torch.randperm(len(weight))]
        numbers, zeros, scales = _quantized(weight, order)
        owner = key.removesuffix("weight")
        if kind == "awq":
            tensors |= {f"{owner}qweight": _awq_words(numbers), f"{owner}qzeros": _awq_words(zeros)}
        else:
            tensors |= {
                f"{owner}qweight": _words(numbers.T).T.contiguous(),
                f"{owner}qzeros": _words((zeros - 1) % 16),
                f"{owner}g_idx": order.to(torch.int32),
            }
        tensors[f"{owner}scales"] = scales.half()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
    if kind == "awq":
        settings = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "version": "gemm",
            "zero_point": True,
        }
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def _quantized(weight: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [inputs, outputs], zero points and scales [groups, outputs]."""
    groups = [weight[order == group] for group in range(int(order.max()) + 1)]
    low, high = (torch.stack([f(group, 0).values for group in groups]) for f in (torch.min, torch.max))
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (weight / scales[order] + zeros[order]).round().clamp(0, 15)
    return numbers.int(), zeros.int(), scales


def _words(numbers: torch.Tensor, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours of four bits in one word; the k-th lies in place ``places[k]``."""
    rows = []
    for row in numbers.tolist():
        words = []
        for at in range(0, len(row), 8):
            word = sum(value << (4 * place) for value, place in zip(row[at : at + 8], places, strict=True))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def _awq_words(numbers: torch.Tensor) -> torch.Tensor:
    """As AutoAWQ packs: place i of a word holds neighbour ``(0, 2, 4, 6, 1, 3, 5, 7)[i]``."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return _words(numbers, tuple(order.index(k) for k in range(8)))
