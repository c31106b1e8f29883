"""Is the export the model? Generation over the graphs compared with the torch runtime, value by value.

The tokens of the torch run are forced upon the graphs, so that every step has the same context and one flipped token
does not hide what comes after it. Greedy tokens are identical if and only if every step's first choices are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vtwcli.errors import GateError, NotFoundError
from vtwcli.io import console
from vtwcli.judge.kl import HINT, check_generation, distance, log_probabilities, sample_name
from vtwcli.models.families import family_of
from vtwcli.ort import NotFinite, OnnxModel

RELATIVE_TOLERANCE = 2e-4
"""fp32: largest difference of a logit, as a share of the largest logit (at least 1)."""

TORCH = "torch float32"
"""What the graphs are compared with, unless something else is said."""

HALF_KL = 1e-2
"""fp16: largest mean KL in nats."""


class Driven(Protocol):
    """What runs graphs: a prompt, then token by token."""

    def prefill(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
        """Logits behind each row's last token [B, V], and the state to go on with."""

    def step(self, tokens: np.ndarray, state: Any) -> np.ndarray:
        """Run one more token of each row, [B]; the logits behind it, [B, V]."""


@torch.no_grad()
def torch_steps(
    model: Any,
    schedule: Mapping[str, Any] | None,
    inputs: Mapping[str, Tensor],
    steps: int,
    names: Sequence[str] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, n] of the torch runtime and the logits they were chosen from [B, n, V].

    Args:
        model: the stock model.
        schedule: in canonical form, or None for the full model.
        inputs: left-padded model inputs.
        steps: n.
        names: of the rows' samples, for messages.

    Raises:
        NotFoundError: logits that are not finite; names the sample, the layer and the type.
    """
    from transformers import GenerationConfig

    from vtwcli.runtime import pruned

    pad = model.generation_config.pad_token_id
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0 if pad is None else pad)
    before = model.generation_config
    model.generation_config = config  # the checkpoint's own may carry penalties and end tokens
    try:
        with pruned(model, schedule) if schedule is not None else nullcontext():
            run = partial(model.generate, **inputs, output_logits=True, return_dict_in_generate=True)
            out = run()
            logits = torch.stack(out.logits, 1)
            layers = model.get_submodule(family_of(model.config).text_model).layers
            mask = inputs.get("attention_mask")
            check_generation(logits, [steps] * len(logits), names, layers, run, mask, model.dtype)
    finally:
        model.generation_config = before
    return out.sequences[:, -steps:].cpu().numpy(), logits.float().cpu().numpy()


def arrays(inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Model inputs as the graphs' runtime takes them: on the CPU, pixels in float32."""
    return {
        name: (value.float() if value.is_floating_point() else value).cpu().numpy()
        for name, value in inputs.items()
    }


def onnx_steps(
    exported: Driven, inputs: Mapping[str, Any], tokens: np.ndarray, names: Sequence[str] = ()
) -> np.ndarray:
    """The graphs' logits [B, n, V] before each of the forced ``tokens`` [B, n].

    Args:
        exported: the graphs.
        inputs: model inputs as torch tensors.
        tokens: what the reference chose.
        names: of the rows' samples, for messages.

    Raises:
        NotFoundError: logits that are not finite; names the sample.
    """
    try:
        logits, state = exported.prefill(arrays(inputs))
        columns = [logits]
        for t in range(tokens.shape[1] - 1):
            columns.append(exported.step(tokens[:, t], state))
    except NotFinite as error:
        raise NotFoundError(f"{sample_name(names, error.row)}: {error.what}", HINT) from error
    return np.stack(columns, 1)


def compare(reference: np.ndarray, logits: np.ndarray, whose: str = "the graphs") -> dict[str, Any]:
    """How far logits [..., V] are from a reference; ``whose`` they are, for messages.

    Returns:
        ``positions``; ``agreement``, the share of positions with the same first choice; ``max_logit_difference``;
        ``max_logit``; ``mean_kl`` and ``max_kl``, KL(P_onnx || P_torch) in nats, from float64.
    """
    kl, same = distance(
        torch.from_numpy(logits), log_probabilities(torch.from_numpy(reference), whose), whose
    )
    ruled_out = logits == reference  # both -inf, whose difference is no number
    difference = np.subtract(logits, reference, out=np.zeros_like(reference), where=~ruled_out)
    return {
        "positions": same.numel(),
        "agreement": float(same.double().mean()),
        "max_logit_difference": float(np.abs(difference).max()),
        "max_logit": float(np.abs(reference[np.isfinite(reference)]).max()),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
    }


def merge(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of ``compare`` for several batches."""
    weights = np.array([result["positions"] for result in results], dtype=float)
    weights /= weights.sum()
    worst = {name: max(r[name] for r in results) for name in ("max_logit_difference", "max_logit", "max_kl")}
    mean = {name: float(np.dot(weights, [r[name] for r in results])) for name in ("agreement", "mean_kl")}
    return {"positions": sum(r["positions"] for r in results), **mean, **worst}


@dataclass(frozen=True)
class Reference:
    """What torch computed for one batch.

    Attributes:
        inputs: model inputs.
        tokens: greedy tokens [B, n].
        logits: from which they were chosen [B, n, V].
        names: of the rows' samples, for messages.
    """

    inputs: Mapping[str, Tensor]
    tokens: np.ndarray
    logits: np.ndarray
    names: Sequence[str] = ()


def measure(exported: Driven, references: Sequence[Reference]) -> dict[str, Any]:
    """How far the graphs are from torch on some batches; see ``compare``.

    Raises:
        GateError: logits of the graphs that are not finite.
    """
    try:
        return merge(
            [compare(r.logits, onnx_steps(exported, r.inputs, r.tokens, r.names)) for r in references]
        )
    except NotFoundError as error:
        raise GateError(f"parity failed: {error.message}", error.hint) from error


def engine_named(exported: OnnxModel) -> dict[str, str]:
    """``engine`` for a report: what ran the graphs and its release, where that is not ONNX Runtime."""
    engine = exported.engine
    return {} if exported.backend == "onnx" else {"engine": f"{engine.name} {engine.version}"}


def judge(
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    exported: OnnxModel | None = None,
    reference: str = TORCH,
) -> None:
    """Say how far graphs are from a reference, and hold them to it (``gate``); quantized ones are only measured.

    Raises:
        GateError: as ``gate``.
    """
    inside = ""
    if exported is not None and exported.backend != "onnx":
        inside = f" in {exported.engine.name}"
    console.note(
        f"{manifest['quantize'] or manifest['dtype']} graphs{inside} against {reference}: {result['agreement']:.1%} of "
        f"{result['positions']} tokens agree, logits differ by up to {result['max_logit_difference']:.1e}, mean KL "
        f"{max(0.0, result['mean_kl']):.1e} nats"
    )
    if manifest["quantize"] is None:
        gate(result, manifest["dtype"], reference)


def gate(result: Mapping[str, Any], dtype: str, reference: str = TORCH) -> None:
    """Refuse an export that is not the model.

    Raises:
        GateError: fp32: another first choice, or a logit further off than ``RELATIVE_TOLERANCE``; fp16: a mean KL
            above ``HALF_KL``. Values that are not numbers fail too.
    """
    whose = reference.removesuffix(" float32")
    hint = "the graphs do not compute what the model computes; nothing was written"
    if dtype == "fp32":
        allowed = RELATIVE_TOLERANCE * max(1.0, result["max_logit"])
        if not (result["agreement"] == 1.0 and result["max_logit_difference"] <= allowed):
            raise GateError(
                f"parity failed: {result['agreement']:.2%} of {result['positions']} tokens agree with {whose}, logits "
                f"differ by up to {result['max_logit_difference']:.2g} (allowed {allowed:.2g})",
                hint,
            )
    elif not result["mean_kl"] <= HALF_KL:
        raise GateError(
            f"parity failed: mean KL to {whose} {result['mean_kl']:.2g} nats (allowed {HALF_KL:.2g})", hint
        )
