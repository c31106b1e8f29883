"""What a run costs: latency of prefill and decode apart, KV-cache bytes, memory; measured, not computed."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles

import torch

from vtwcli.models.generation import cache_of
from vtwcli.models.loading import LoadedModel
from vtwcli.results.evaluation import Latency, Memory, Time

Timer = Callable[[int], float]
"""Seconds of generating so many tokens from one prompt."""


def latencies(prompts: Sequence[Mapping[str, Timer]], repeats: int, tokens: int) -> dict[str, Latency]:
    """TTFT and TPOT of each variant, warm and interleaved.

    TTFT is the wall-clock time of generating one token from inputs on the device (vision tower, prefill, head); TPOT
    is the additional time per token of generating ``tokens`` more. Each repeat runs every variant once on the same
    prompt, in turn, so that drifts of the machine meet all of them.

    Args:
        prompts: for each prompt the variants by name; repeats go round the prompts.
        repeats: counted runs of each variant, behind one warm-up.
        tokens: further tokens of the TPOT run.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"ttft": [], "tpot": []} for name in prompts[0]}
    for repeat in range(-1, repeats):
        for name, timer in prompts[repeat % len(prompts)].items():
            first, more = timer(1), timer(1 + tokens)
            if repeat >= 0:
                found[name]["ttft"].append(first)
                found[name]["tpot"].append(max(0.0, more - first) / tokens)
    return {name: {"ttft": _spread(row["ttft"]), "tpot": _spread(row["tpot"])} for name, row in found.items()}


@torch.no_grad()
def generation_time(loaded: LoadedModel, batch: dict[str, torch.Tensor], tokens: int) -> float:
    """Wall-clock seconds of generating exactly ``tokens`` tokens."""
    _wait(loaded.device)
    began = time.perf_counter()
    loaded.model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    _wait(loaded.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: Sequence[float]) -> Time:
    quartiles = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "iqr": [quartiles[0], quartiles[2]]}


@torch.no_grad()
def cache_bytes(loaded: LoadedModel, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the keys and values that the cache holds after the prompt, read off its tensors."""
    out = loaded.model.generate(**batch, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    tensors = [x for layer in cache_of(out).layers for x in (layer.keys, layer.values)]
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
