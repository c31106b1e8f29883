"""Next-token distributions and how far two are apart, and the refusal of what is not a number.

A NaN compares false with everything and an infinite value swallows the rest, so either would pass for a verdict. They
are looked for where numbers come from: in hidden states behind each layer, and in logits before they are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import NotFoundError

HINT = "use --dtype bfloat16 or float32: float16 ends at 65504; where it is the same in float32, the weights are broken"


def is_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; makes no copy of ``x``."""
    return not x.numel() or all(bool(bound.isfinite()) for bound in x.aminmax())


def not_finite(whose: str, where: str, dtype: torch.dtype) -> NotFoundError:
    """The error for numbers that are not finite.

    Args:
        whose: the sample.
        where: what gave them.
        dtype: that it was computed in.
    """
    name = str(dtype).removeprefix("torch.")
    return NotFoundError(f"{whose}: {where} not finite in {name} (NaN or infinity)", HINT)


def sample_name(names: Sequence[str], row: int) -> str:
    """What a batch's row is called in messages: its sample's id, where ``names`` are given."""
    return f"sample {names[row]!r}" if names else f"row {row} of the batch"


def check_hidden(hidden: Tensor, read: Tensor, whose: str, where: str) -> None:
    """Refuse hidden states with a row that is read and not finite.

    Args:
        hidden: [..., D].
        read: which rows count, bool, broadcast to [...]; padding may hold anything.
        whose, where: as for ``not_finite``.

    Raises:
        NotFoundError: naming them.
    """
    if not is_finite(hidden) and not bool((hidden.isfinite().all(-1) | ~read).all()):
        raise not_finite(whose, where, hidden.dtype)


def is_distribution(logits: Tensor) -> Tensor:
    """Whether a softmax of ``logits`` [..., V] is a distribution, bool [...].

    -inf is a token that the model never gives; NaN, +inf and nothing but -inf are errors.
    """
    return logits.amax(-1).isfinite()


def log_probabilities(logits: Tensor, whose: str, where: str = "the logits are") -> Tensor:
    """ln P in float64 of logits [..., V], on the CPU where a device has no float64.

    Raises:
        NotFoundError: they give no distribution, see ``is_distribution``.
    """
    if not bool(is_distribution(logits).all()):
        raise not_finite(whose, where, logits.dtype)
    return (logits.cpu() if logits.device.type == "mps" else logits).double().log_softmax(-1)


def divergence(p: Tensor, q: Tensor, whose: str) -> Tensor:
    """KL(P ‖ Q) in nats, [...], of log-probabilities [..., V]; a token with P = 0 adds nothing.

    Raises:
        NotFoundError: it is infinite, because P gives a token that Q rules out.
    """
    share = p.exp()
    kl = torch.where(share == 0, 0.0, share * (p - q)).sum(-1)
    if not is_finite(kl):
        raise NotFoundError(
            f"{whose}: the KL to the full model is infinite: it rules out a token (logit -inf) that the pruned model "
            "gives",
            HINT,
        )
    return kl


def distance(logits: Tensor, full: Tensor, whose: str) -> tuple[Tensor, Tensor]:
    """How far a variant's next-token distributions are from the full model's.

    Args:
        logits: the variant's, [..., V].
        full: the full model's ``log_probabilities``, [..., V].
        whose: as for ``not_finite``.

    Returns:
        KL(P_variant ‖ P_full) in nats, float64 [...], and whether the most likely token is the same, bool [...].

    Raises:
        NotFoundError: logits that give no distribution, or a KL that is infinite.
    """
    variant = log_probabilities(logits, whose)
    full = full.to(variant.device)
    return divergence(variant, full, whose), variant.argmax(-1) == full.argmax(-1)


def check_generation(
    logits: Tensor,
    lengths: Sequence[int],
    names: Sequence[str],
    layers: Sequence[nn.Module],
    again: Callable[[], Any],
    mask: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Refuse a generation with logits that are not finite.

    Args:
        logits: of each step, [B, R, V].
        lengths: how many of a row's steps count.
        names: see ``sample_name``.
        layers: the decoder layers.
        again: repeats the generation, to find the layer.
        mask: the prompts' attention mask [B, S].
        dtype: that the model computes in.

    Raises:
        NotFoundError: naming the sample, the layer and the type.
    """
    sound = is_distribution(logits).tolist()
    for row, length in enumerate(lengths):
        if not all(sound[row][:length]):
            layer = _first_layer(layers, again, row, mask)
            where = "the logits are" if layer is None else f"the output of layer {layer} is"
            raise not_finite(sample_name(names, row), where, dtype)


def _first_layer(
    layers: Sequence[nn.Module], again: Callable[[], Any], row: int, mask: Tensor | None
) -> int | None:
    """The first layer behind which one row of a batch is not finite; None where all are.

    Where a padded row's tokens are no longer those of the mask, because some have left or it is a later step, only
    the last one is looked at.
    """
    found: list[int] = []
    given = None if mask is None else mask[row].bool().cpu()

    def watch(d: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            hidden = (out[0] if isinstance(out, tuple) else out)[row]
            if given is not None and not given.all():
                hidden = hidden[given.to(hidden.device)] if len(given) == len(hidden) else hidden[-1:]
            if not is_finite(hidden):
                found.append(d)

        return hook

    handles = [layer.register_forward_hook(watch(d)) for d, layer in enumerate(layers)]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
