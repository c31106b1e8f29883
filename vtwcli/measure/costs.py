"""What a run costs: latency of prefill and decode apart, KV-cache bytes, memory; measured, not computed."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from vtwcli.models.generation import cache_of
from vtwcli.models.loading import LoadedModel
from vtwcli.results.evaluation import Memory


@torch.no_grad()
def generation_times(loaded: LoadedModel, batch: dict[str, torch.Tensor], tokens: int) -> tuple[float, float]:
    """Wall-clock seconds of generating exactly ``tokens`` tokens a row: until the first ones are known, and in all."""
    first: list[float] = []

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not first:
            _wait(loaded.device)
            first.append(time.perf_counter())
        return scores

    _wait(loaded.device)
    began = time.perf_counter()
    loaded.model.generate(
        **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, logits_processor=[watch]
    )
    _wait(loaded.device)
    return first[0] - began, time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def cache_bytes(loaded: LoadedModel, batch: dict[str, torch.Tensor], tokens: int = 1) -> int:
    """Bytes of the keys and values that the cache holds when the last of ``tokens`` tokens is known.

    They are read off its tensors. The cache only grows, so it never holds more before; with one token they are those
    of the prompts.
    """
    out = loaded.model.generate(
        **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, return_dict_in_generate=True
    )
    layers = [part for layer in cache_of(out).layers for part in (layer, getattr(layer, "aside", None))]
    tensors = [x for layer in layers if layer is not None for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def peak_of(work: Callable[[], object], device: torch.device) -> Memory:
    """Peak memory of ``work`` in bytes, above what was held before it; of the process where Linux tells."""
    gc.collect()
    cuda = device.type == "cuda"
    held = 0
    if cuda:
        _wait(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    resident = _reset_resident_peak()
    work()
    _wait(device)
    peak = _status("VmHWM") if resident is not None else None
    return {
        "device": torch.cuda.max_memory_allocated(device) - held if cuda else None,
        "resident": peak - resident if peak is not None and resident is not None else None,
    }


def _reset_resident_peak() -> int | None:
    """Bring the kernel's record of the highest resident size down to the present one, and return that."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed earlier would hide what is taken now
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """A size from Linux's account of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
    except (OSError, StopIteration, ValueError):
        return None
