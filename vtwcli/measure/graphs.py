"""What exported ONNX graphs say to a batch of the base model's inputs, and what that costs; ``evaluate`` calls it.

B is the number of rows of a batch, R the number of generated tokens, V the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vtwcli.export.directory.manifest import at_hand
from vtwcli.export.onnx.failures import as_vtw_errors
from vtwcli.export.onnx.parity import arrays, onnx_steps
from vtwcli.io import console
from vtwcli.ort import OnnxModel, engine, has_device


@as_vtw_errors()
def open_exported(directory: str | Path, device: torch.device, backend: str = "onnx") -> OnnxModel:
    """An exported directory on a device, or on the CPU where the backend lacks it; with as many threads as torch.

    Raises:
        NotFoundError: no export to ONNX.
        UsageError: a backend that is not installed.
    """
    place = device.type
    if not has_device(place, backend):
        console.note(f"this {engine(backend).name} has no device {place!r}: the graphs run on the CPU")
        place = "cpu"
    return OnnxModel(directory, place, threads=torch.get_num_threads(), backend=backend)


@as_vtw_errors()
def check_backend(backend: str) -> None:
    """Refuse a backend that is not installed.

    Raises:
        UsageError: it is not.
    """
    engine(backend)


def base_of(exported: OnnxModel) -> str | None:
    """What to load as the full model: the base, if it is on this machine."""
    return at_hand(exported.manifest["model"])


@as_vtw_errors()
def generated(
    exported: OnnxModel,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
    eos_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Greedy answers, a row each; behind an answer's end the padding token.

    Args:
        exported: the graphs.
        batch: inputs of the base model, padded on either side.
        max_new_tokens: longest answer.
        eos_ids: tokens that end an answer; None takes the export's own.
    """
    tokens = exported.generate(arrays(batch), max_new_tokens, eos_ids=eos_ids)
    return [[int(token) for token in row] for row in tokens]


@as_vtw_errors()
def forced_logits(
    exported: OnnxModel, batch: Mapping[str, Tensor], tokens: Tensor, names: Sequence[str] = ()
) -> Tensor:
    """Raw logits [B, R, V], float32, from which each of the full model's ``tokens`` [B, R] would be chosen."""
    return torch.from_numpy(onnx_steps(exported, batch, tokens.cpu().numpy(), names))


@as_vtw_errors()
def generation_times(exported: OnnxModel, batch: Mapping[str, Tensor], tokens: int) -> tuple[float, float]:
    """Wall-clock seconds from pixels and ids to the first of ``tokens`` tokens a row, and to the last."""
    inputs = arrays(batch)
    moments: list[float] = []
    began = time.perf_counter()
    exported.generate(inputs, tokens, eos_ids=[], on_token=lambda _: moments.append(time.perf_counter()))
    return moments[0] - began, time.perf_counter() - began


@as_vtw_errors()
def cache_bytes(exported: OnnxModel, batch: Mapping[str, Tensor], tokens: int = 1) -> int:
    """Bytes of the keys and values that are held when the last of ``tokens`` tokens is known, as of ``costs``."""
    logits, state = exported.prefill(arrays(batch))
    for _ in range(tokens - 1):
        logits = exported.step(logits.argmax(-1), state)
    return state.cache_bytes()
