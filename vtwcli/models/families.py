"""The family table: one row per ``model_type`` that the tool understands.

A row says where things live inside the stock transformers model and which assumptions hold, so that no other
module knows a family by name. Torch-free: the command line reads it for help and error messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtwcli.errors import NotFoundError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, and what may be done with it.

    Attributes:
        model_type: ``config.model_type`` of its checkpoints.
        title: name for people.
        example: a public checkpoint.
        architecture: class name in transformers.
        text_model: attribute path from the top-level model to the text model, which has ``embed_tokens``,
            ``layers``, ``norm`` and ``rotary_emb``.
        head: attribute path of the output projection.
        vision: attribute paths of everything needed to turn pixels into visual tokens.
        placeholders: config attributes that hold the ids of visual tokens in ``input_ids``.
        first_withdrawal: the first layer at which withdrawal is exact (above 0 where early layers add vision again).
        no_withdraw: reason why withdrawal is refused, or None.
        no_sweep: reason why the one-pass sweep is not exact and the naive search runs instead, or None.
        no_onnx: reason why there is no ONNX export, or None.
        caveat: a sentence for the table of families.
    """

    model_type: str
    title: str
    example: str
    architecture: str
    text_model: str = "model.language_model"
    head: str = "lm_head"
    vision: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector")
    placeholders: tuple[str, ...] = ("image_token_id",)
    first_withdrawal: int = 0
    no_withdraw: str | None = None
    no_sweep: str | None = None
    no_onnx: str | None = None
    caveat: str = ""


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llava", "LLaVA-1.5", "llava-hf/llava-1.5-7b-hf", "LlavaForConditionalGeneration"),
    )
}


def family_of(config: Any) -> Family:
    """The row for a transformers config.

    Raises:
        NotFoundError: no row has the config's ``model_type``; the message lists those that do.
    """
    model_type = getattr(config, "model_type", None)
    row = FAMILIES.get(str(model_type))
    if row is None:
        raise NotFoundError(
            f"model type {model_type!r} is not a supported vision-language family",
            f"supported: {', '.join(sorted(FAMILIES))}; the README says how to add a family",
        )
    return row


def placeholder_ids(family: Family, config: Any) -> tuple[int, ...]:
    """The token ids that stand for visual tokens in ``input_ids``."""
    ids = (getattr(config, name, None) for name in family.placeholders)
    return tuple(int(i) for i in ids if i is not None)
