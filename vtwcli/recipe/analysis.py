"""What a profile of a model's layers measures and shows."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from vtwcli.recipe.fields import BATCH_SIZE, LONGEST, Answering, Answers, Limit, Positions, SkipBad


class AnalyzeSection(Answering):
    """What a profile measures and shows."""

    limit: Limit = 20
    eta: float = Field(
        0.003, gt=0, description="KL in nats up to which vision counts as not needed; it bounds the stages"
    )
    min_layer: int | None = Field(
        None,
        ge=0,
        description="lowest layer at which the deep stage may begin; by default 5 for 16 layers and more, else 1",
    )
    window: int = Field(3, ge=1, description="how many layers in a row are kept from reading vision at once")
    freeze: bool | None = Field(
        None,
        description="measure also what each layer's own work on visual tokens gives: with L layers, about L/2 full "
        "passes a sample more; by default unless layers are streamed",
    )
    positions: Positions = "answer"
    answers: Answers = "auto"
    max_new_tokens: int | None = Field(None, ge=1, description=LONGEST.format(48))
    batch_size: int | None = Field(None, ge=1, description=BATCH_SIZE)
    lens: int = Field(
        3,
        ge=0,
        description="how many words are shown that each layer would say if it were the last; 0 for none",
    )
    maps: int = Field(
        4, ge=0, description="how many samples are shown with heat maps of where the last token looks"
    )
    map_layers: tuple[int, ...] | None = Field(
        None, description="layers of the heat maps, e.g. 0,4,8; by default six over the whole depth"
    )
    sink_ratio: float = Field(
        5.0, gt=1, description="a sink gets this many times the attention of the average visual token"
    )
    tokens_threshold: float = Field(
        0.2,
        ge=0,
        description="a visual token is critical if it adds more than this (a norm) to what the last token reads",
    )
    layer_threshold: float = Field(
        0.995,
        ge=-1,
        le=1,
        description="VisiPruner: the first layer whose attention output turns without some single visual token (cosine "
        "below this) chooses the tokens",
    )
    exit_threshold: float = Field(
        0.999,
        ge=-1,
        le=1,
        description="VisiPruner: layers whose output hardly turns without any of these (cosine at least this) count "
        "towards the exit",
    )
    exit_layers: int = Field(
        2, ge=1, description="VisiPruner: after how many such layers all visual tokens leave"
    )
    seed: int = Field(0, ge=0, description="which samples are drawn; the same seed gives the same result")
    skip_bad: SkipBad = False

    @field_validator("map_layers", mode="before")
    @classmethod
    def _split_layers(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value
