"""The one shape in which questions about images travel through the tool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One question about zero or more images.

    Attributes:
        id: source, split and row, the same on every machine, for example ``"rows.jsonl:17"``.
        task: name of the task in the mix; curves, metrics and policies group by it.
        images: RGB images in the order in which the prompt shows them.
        places: how many characters of the prompt stand before each image, ascending; empty where all images come
            before the prompt.
        prompt: text of the user's turn, without image placeholders or chat markup.
        references: accepted answers; empty where none is known.
        metric: key of the metric that judges an answer (``vtwcli.data.metrics``).
        choices: texts of a multiple-choice question's options, else empty.
        meta: further columns that the metric reads; ``own`` where no published rule says how to judge.
        system: text of a system turn before the user's; None sends none.
        longest: tokens of its longest answer; None where its task says nothing.
    """

    id: str
    task: str
    images: tuple[Image, ...]
    prompt: str
    references: tuple[str, ...] = ()
    metric: str = "exact_match"
    choices: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    places: tuple[int, ...] = ()
    system: str | None = None
    longest: int | None = None


def answer_tokens(samples: Iterable[Sample], otherwise: int) -> int:
    """The longest answer, in tokens, of samples that are answered together; ``otherwise`` where a task says nothing."""
    return max((sample.longest or otherwise for sample in samples), default=otherwise)
