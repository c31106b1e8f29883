"""Fields that several sections of a recipe have, each with its check and its words."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

BATCH_SIZE = "samples answered at once; by default 8, fewer where memory is short"
Limit = Annotated[int, Field(ge=1, description="samples per task")]
Positions = Annotated[
    Literal["first", "answer"],
    Field(description="first: the next token after the prompt; answer: every token of the answer"),
]
Answers = Annotated[
    Literal["auto", "generated", "reference"],
    Field(
        description="whose answer is teacher-forced: the full model's own greedy one, or the reference; "
        "auto is generated, and reference when layers are streamed"
    ),
]
SkipBad = Annotated[bool, Field(description="skip unreadable samples and count them")]
Loss = Literal["tokens", "answer", "kl", "metric"]
