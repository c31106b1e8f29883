"""The graphs, driven as transformers.js drives them, against the torch runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtwcli.data.sample import Sample
from vtwcli.errors import GateError, UsageError
from vtwcli.export.onnx import export as onnx
from vtwcli.export.onnx import parity as onnx_parity
from vtwcli.export.onnx.failures import as_vtw_errors
from vtwcli.export.onnx.source import Source
from vtwcli.export.web.files import quantized
from vtwcli.export.web.model import WebModel, as_the_library
from vtwcli.machine.memory import memory_available
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load, memory_needed
from vtwcli.schedule.schedule import Schedule


@as_vtw_errors()
def check(
    source: Source,
    schedule: Schedule,
    folder: Path,
    manifest: dict[str, Any],
    samples: Sequence[Sample] | None,
    steps: int,
    quantize: str | None,
) -> dict[str, Any]:
    """Compare graphs with the torch runtime in float32, one sample at a time, and quantize if asked.

    Args:
        source: the model.
        schedule: what the graphs execute.
        folder: where they are.
        manifest: of them; says of the quantized decoder if there is one then.
        samples: questions; None takes ``synthetic_samples``.
        steps: new tokens per sample.
        quantize: ``int8`` or ``int4``, to be done here.

    Returns:
        ``method``, ``reference``, ``samples``, ``steps``, the numbers of ``onnx.parity.compare``, and ``quantized``.

    Raises:
        GateError: tokens, logits or lengths of caches differ.
        UsageError: the model does not fit in memory.
    """
    chosen = list(samples) if samples is not None else onnx.synthetic_samples()
    loaded = source.loaded
    if loaded is None:
        assert source.checkpoint is not None
        if memory_needed(source.checkpoint, torch.float32) * 2 > memory_available(torch.device("cpu")):
            raise UsageError(
                "the export compares with torch, for which the model does not fit in memory",
                "a model for browsers is smaller",
            )
        path, trust = str(source.checkpoint.path), source.checkpoint.trust_remote_code
        loaded = load(path, device="cpu", dtype="float32", trust_remote_code=trust)
    plan = schedule.to_dict() if schedule.actions else None
    references = []
    for sample in chosen:
        inputs = as_the_library(encode(loaded, sample).inputs, manifest)
        wanted = onnx_parity.torch_steps(loaded.model, plan, inputs, steps, [sample.id])
        references.append(onnx_parity.Reference(inputs, *wanted, [sample.id]))
    result = measure(WebModel(folder, manifest), references, schedule, manifest)
    onnx_parity.judge(result, manifest)
    facts = {"reference": "torch float32", "samples": len(chosen), "steps": steps}
    report = {"method": "generation", **facts, **result}
    if quantize is not None:
        quantized(folder, manifest, quantize)
        result = measure(WebModel(folder, manifest), references, schedule, manifest)
        onnx_parity.judge(result, {**manifest, "quantize": quantize})
        report["quantized"] = {"kind": quantize, **result}
    return report


def measure(
    exported: WebModel,
    references: Sequence[onnx_parity.Reference],
    schedule: Schedule,
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """How far the graphs are from torch; the caches' lengths must be what the schedule says.

    Raises:
        GateError: they are not, or logits are not finite.
    """
    for reference in references:
        wanted, _ = lengths_wanted(reference.inputs, schedule, manifest)
        _, state = exported.prefill(onnx_parity.arrays(reference.inputs))
        if (held := state.cache_lengths()) != wanted:
            layer = next(i for i, (a, b) in enumerate(zip(held, wanted, strict=True)) if a != b)
            raise GateError(
                f"parity failed: layer {layer} holds {held[layer]} entries in its KV cache, not {wanted[layer]}"
            )
    return onnx_parity.measure(exported, references)


def lengths_wanted(
    inputs: Mapping[str, Any], schedule: Schedule, manifest: Mapping[str, Any]
) -> tuple[list[int], int]:
    """What each layer's cache holds behind one prompt by the schedule, and how many visual tokens the prompt has."""
    ids = np.asarray(inputs["input_ids"])[0]
    visual = int(np.isin(ids, manifest["tokens"]["placeholder_ids"]).sum())
    left = schedule.visual_per_layer(manifest["text"]["layers"], visual)
    return [len(ids) - visual + n for n in left], visual
