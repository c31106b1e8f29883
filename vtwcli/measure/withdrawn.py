"""What withdrawal at every layer does to one sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vtwcli.models.inputs import Encoded
from vtwcli.sweep.sweep import ItemResult


@dataclass(frozen=True)
class Measured:
    """One sample's part of a calibration, plain numbers only, so that ranks and interrupted runs can pass it on.

    Attributes:
        kl: nats by layer and compared position, [L][R].
        agree: top-1 agreement with the full model by layer and position, [L][R].
        prefix, visual, suffix: token counts of the prompt.
    """

    kl: list[list[float]]
    agree: list[list[bool]]
    prefix: int
    visual: int
    suffix: int


def measured_of(outcome: ItemResult, prompt: Encoded) -> Measured:
    """A sample's part of a calibration from its result for withdrawal at layers 0..L-1."""
    visual = int(prompt.visual[: prompt.prompt_length].sum())
    prefix = int(prompt.visual.int().argmax()) if visual else 0
    return Measured(
        kl=[exact(row) for row in outcome.kl.tolist()],
        agree=outcome.agree.tolist(),
        prefix=prefix,
        visual=visual,
        suffix=prompt.prompt_length - visual - prefix,
    )


def exact(numbers: Iterable[float]) -> list[float]:
    """Nine digits of each number, which tell all 32-bit numbers apart."""
    return [float(f"{number:.9g}") for number in numbers]
