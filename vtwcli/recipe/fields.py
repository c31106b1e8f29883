"""Fields that several sections of a recipe have, each with its check and its words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from vtwcli.io.section import Section
from vtwcli.methods import METHODS

BATCH_SIZE = "samples answered at once; by default 8, fewer where memory is short"
LONGEST = "longest answer, in tokens; by default the task's own, else {}"
Limit = Annotated[int, Field(ge=1, description="samples of each task")]
Positions = Annotated[
    Literal["first", "answer"],
    Field(
        description="where KL is measured: first, at the token behind the prompt; answer, at each token of the answer"
    ),
]
Answers = Annotated[
    Literal["auto", "generated", "reference"],
    Field(
        description="along whose answer: generated, the full model's own, or reference, the data's; auto is "
        "generated, and reference when layers are streamed"
    ),
]
SkipBad = Annotated[bool, Field(description="leave out rows that cannot be used, and count them")]
Loss = Literal["tokens", "answer", "kl", "metric"]

if TYPE_CHECKING:
    MethodName: TypeAlias = str
else:
    MethodName = Literal[tuple(METHODS)]


class Answering(Section):
    """A section under which models answer; its field ``max_new_tokens`` may be left to the samples' tasks.

    Attributes:
        otherwise: tokens of the longest answer where neither says so.
    """

    otherwise: ClassVar[int] = 48

    if TYPE_CHECKING:
        max_new_tokens: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest answer where no task says otherwise."""
        return self.max_new_tokens or self.otherwise
