"""The types of numbers, by the names that the command line, safetensors files and ONNX graphs have for them.

torch's types are named here and looked up where they are asked for, so that nothing loads torch for the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtwcli.errors import UsageError

if TYPE_CHECKING:
    import torch

RUN = ("float32", "bfloat16", "float16")
"""What models run in and are converted to."""
FLOATS = ("float64", *RUN)
"""What is converted."""
SHORT = {"float32": "fp32", "float16": "fp16"}
"""What ONNX graphs run in, and how their manifests call it."""
LONG = {short: name for name, short in SHORT.items()}
STORED: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
"""The types of safetensors: bits of a value, and torch's name, where torch holds one value of it on its own."""


def torch_type(name: str) -> torch.dtype:
    """torch's type of a name, such as ``float32``."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def name_of(dtype: torch.dtype) -> str:
    """The name of torch's type."""
    return str(dtype).removeprefix("torch.")


def stored_name(dtype: torch.dtype) -> str:
    """What safetensors files call torch's type."""
    return next(kind for kind, (_, name) in STORED.items() if name == name_of(dtype))


def asked(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type that ``--dtype`` asks for, one of ``RUN``; None for ``auto``.

    Raises:
        UsageError: another word.
    """
    if dtype is None or dtype == "auto":
        return None
    if not isinstance(dtype, str):
        return dtype
    if dtype not in RUN:
        raise UsageError(f"{dtype!r} is not a dtype", f"use auto, {', '.join(RUN)}")
    return torch_type(dtype)
