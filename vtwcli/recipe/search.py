"""What a search for the best schedule looks for, and how long."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from vtwcli.methods import METHODS
from vtwcli.recipe.fields import BATCH_SIZE, LONGEST, Answering, Limit, Loss, MethodName, SkipBad

GOALS = ("max_flops", "max_kv", "max_kl", "min_agreement")


class SearchSection(Answering):
    """The best schedule of all methods and their combinations within a goal, with a promise."""

    otherwise: ClassVar[int] = 32

    limit: Limit = 300
    max_flops: float | None = Field(
        None, gt=0, description="goal: at most this share of the full model's arithmetic for the prompt"
    )
    max_kv: float | None = Field(
        None, gt=0, description="goal: at most this share of the full model's KV cache behind the prompt"
    )
    max_kl: float | None = Field(
        None, gt=0, description="goal: at most this mean KL in nats, in the worst task"
    )
    min_agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="goal: at least this share of tokens stays the most likely, in the worst task",
    )
    methods: tuple[MethodName, ...] = Field(
        tuple(METHODS), min_length=1, description="whose schedules are tried beside combinations"
    )
    trials: int = Field(
        400, ge=1, description="how many schedules are tried, by halving: many on few samples, few on many"
    )
    minutes: float | None = Field(
        None, gt=0, description="look no longer than this; what is best by then is chosen from and tested"
    )
    risk: float = Field(
        0.02, gt=0, lt=1, description="largest mean loss promised of each task on inputs like the samples"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="of the promise: at 0.95 one of 20 may be wrong")
    loss: Loss = Field(
        "tokens",
        description="what a sample loses: tokens, the share of its answer's tokens that change; answer, 1 if any "
        "does; kl, 1 if its mean KL exceeds eta; metric, how much the task's metric drops",
    )
    eta: float = Field(0.003, gt=0, description="loss kl: the KL in nats above which a sample is lost")
    max_new_tokens: int | None = Field(None, ge=1, description=LONGEST.format(32))
    batch_size: int | None = Field(None, ge=1, description=BATCH_SIZE)
    seed: int = Field(
        0, ge=0, description="which samples are drawn, their three parts, and which schedules are tried"
    )
    skip_bad: SkipBad = False
    resume: bool = Field(False, description="go on with what was measured before an interruption")

    # what a calibration with a promise may be asked, and a search always is
    policy: ClassVar[str] = "guarantee"
    method: ClassVar[str] = "search"
    positions: ClassVar[str] = "answer"
    asking: ClassVar[str] = "the promise of a search"

    @field_validator("methods", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @property
    def goals(self) -> dict[str, float]:
        """The goals that are given."""
        return {name: getattr(self, name) for name in GOALS if getattr(self, name) is not None}

    @property
    def closest(self) -> bool:
        """Whether the closest schedule within the goals is wanted; else the cheapest."""
        return self.max_flops is not None or self.max_kv is not None

    def recorded(self) -> dict[str, Any]:
        """What result documents say of it."""
        return self.model_dump(mode="json", exclude={"resume"})
