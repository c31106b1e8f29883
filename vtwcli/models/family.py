"""What is told of a family of models: where it keeps its parts, and what may be done with it."""

from __future__ import annotations

from dataclasses import dataclass


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
        vision: attribute paths of everything needed to turn pixels into visual tokens: modules or parameters.
        beside: attribute paths of what reads neither images nor text, such as audio encoders.
        placeholders: config attributes that hold the ids of visual tokens in ``input_ids``. Separators whose
            embedding is text (row breaks, image start and end) are text tokens and stay.
        video: whether videos have visual tokens too.
        first_withdrawal: the first layer at which withdrawal is exact (above 0 where early layers add vision again).
        deepstack: dotted config attribute with the list of vision layers that feed the first text layers; where
            it is set, ``family_of`` gives its length as ``first_withdrawal``.
        injected: config attributes with the text layers in front of which the model adds vision again, as a list of
            numbers or of pairs that end in one; ``family_of`` then gives the last of them as ``first_withdrawal``.
        injected: tuple[str, ...] = ()
    answer_token_type: what ``token_type_ids`` hold for answer tokens, as ``generate`` continues them.
        prompt: the prompt of checkpoints that come without a chat template; ``{images}`` are the placeholders.
        placeholder_apart: whether the model takes the image placeholder out of ``input_ids`` before they are embedded,
            so that its id may lie outside the embedding.
        no_withdraw: reason why withdrawal is refused, or None.
        no_onnx: reason why there is no ONNX export, or None.
        no_tower: reason why scores of its vision tower are refused, or None.
        caveat: a sentence for the table of families.
    """

    model_type: str
    title: str
    example: str
    architecture: str
    text_model: str = "model.language_model"
    head: str = "lm_head"
    vision: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector")
    beside: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ("image_token_id",)
    video: bool = False
    first_withdrawal: int = 0
    deepstack: str | None = None
    injected: tuple[str, ...] = ()
    answer_token_type: int = 0
    prompt: str | None = None
    placeholder_apart: bool = False
    no_withdraw: str | None = None
    no_onnx: str | None = None
    no_tower: str | None = None
    caveat: str = ""
