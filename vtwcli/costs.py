"""What a run costs: latency of prefill and decode apart, KV-cache bytes, memory; measured, not computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import median, quantiles
from typing import Any

import torch

from vtwcli.models.inputs import plain_generation
from vtwcli.models.loading import LoadedModel

Variant = Callable[[], AbstractContextManager[Any]]


@torch.no_grad()
def latencies(
    loaded: LoadedModel,
    batches: Sequence[dict[str, torch.Tensor]],
    variants: dict[str, Variant],
    repeats: int,
    tokens: int,
) -> dict[str, dict[str, Any]]:
    """TTFT and TPOT of each variant, warm and interleaved.

    TTFT is the wall-clock time of generating one token from inputs on the device (vision tower, prefill, head); TPOT
    is the additional time per token of generating ``tokens`` more. Each repeat runs every variant once on the same
    batch, in turn, so that drifts of the machine meet all of them.

    Args:
        batches: model inputs; repeats go round them.
        variants: context managers under which the model runs, by name.
        repeats: counted runs of each variant, behind one warm-up.
        tokens: further tokens of the TPOT run.

    Returns:
        Per variant ``ttft`` and ``tpot``, each with ``median`` and ``iqr`` (first and third quartile) in seconds.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"ttft": [], "tpot": []} for name in variants}
    with plain_generation(loaded):
        for repeat in range(-1, repeats):
            batch = batches[repeat % len(batches)]
            for name, variant in variants.items():
                with variant():
                    first = _generation_time(loaded, batch, 1)
                    more = _generation_time(loaded, batch, 1 + tokens)
                if repeat >= 0:
                    found[name]["ttft"].append(first)
                    found[name]["tpot"].append(max(0.0, more - first) / tokens)
    return {name: {kind: _spread(values) for kind, values in row.items()} for name, row in found.items()}


def _generation_time(loaded: LoadedModel, batch: dict[str, torch.Tensor], tokens: int) -> float:
    _wait(loaded.device)
    began = time.perf_counter()
    loaded.model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    _wait(loaded.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    quartiles = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "iqr": [quartiles[0], quartiles[2]]}


@torch.no_grad()
def prefill_cache_bytes(loaded: LoadedModel, batch: dict[str, torch.Tensor], variant: Variant) -> int:
    """Bytes of the keys and values that the cache holds after the prompt, read off its tensors."""
    with variant(), plain_generation(loaded):
        out = loaded.model.generate(**batch, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    tensors = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
