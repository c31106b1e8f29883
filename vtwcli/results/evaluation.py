"""The result document of ``vtw eval``.

S samples, R positions of the full model's answer, C conventions of ``judge.flops``; KL in nats, times in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypedDict

from vtwcli.results.document import (
    STRICT,
    Count,
    Dated,
    Depth,
    Files,
    Origin,
    Pair,
    RunRecord,
    TokenCounts,
    Unchecked,
    has_convention,
)

FORMAT: Final = "vtw-evaluation"
FORMAT_VERSION: Final = 1
EVALUATION = Files(FORMAT, "evaluation", {"markdown": ".md", "page": ".html", "plot": ".png"})


class EvaluatedModel(Dated):
    """What was evaluated, and the full model that it was compared with."""

    name: str
    """As the user gave it: a stock model or an exported directory."""
    revision: Unchecked[str | None]
    """The Hub commit; None for a directory."""
    family: Unchecked[str]
    """transformers' ``model_type``."""
    dtype: Unchecked[str]
    """That schedules ran in."""
    backend: Unchecked[str]
    """``torch``, or of ONNX graphs ``onnx`` (ONNX Runtime) or ``openvino``."""
    baseline: Unchecked[str]
    """The full model's name."""
    baseline_dtype: Unchecked[str]
    """That it ran in."""


class Score(TypedDict):
    """A metric over the samples of a task that have references."""

    mean: float
    precision: NotRequired[Unchecked[float]]
    """Of POPE's "yes"."""
    recall: NotRequired[Unchecked[float]]
    """As above."""
    f1: NotRequired[Unchecked[float]]
    """As above."""
    yes_ratio: NotRequired[Unchecked[float]]
    """Share of "yes" among the answers, POPE; of the references where its metric is ``pope_exact``."""
    perception: NotRequired[Unchecked[float]]
    """MME's, at most 2,000; sums over the categories of which samples have both questions of a picture."""
    cognition: NotRequired[Unchecked[float]]
    """As above, at most 800."""
    bleu_1: NotRequired[Unchecked[float]]
    """Of captions, beside CIDEr."""
    bleu_2: NotRequired[Unchecked[float]]
    """As above."""
    bleu_3: NotRequired[Unchecked[float]]
    """As above."""
    bleu_4: NotRequired[Unchecked[float]]
    """As above."""
    rouge_l: NotRequired[Unchecked[float]]
    """As above."""


class Difference(TypedDict):
    """Scores of a schedule against the full model's, sample by sample."""

    difference: float
    """Mean of pruned - full."""
    interval: Pair | None
    """95 %, by paired bootstrap; None without resamples or where samples are too few."""


class McNemar(TypedDict):
    """McNemar's exact test of right or wrong."""

    only_full: Unchecked[int]
    """Samples that only the full model gets right."""
    only_pruned: Unchecked[int]
    """Samples that only the schedule gets right."""
    p: float
    """Two-sided."""


class ComparedScore(Score, Difference):
    """A schedule's metric on a task."""

    mcnemar: McNemar | None
    """None for CIDEr, whose scores have no line between right and wrong."""


class EvaluatedTask(TypedDict):
    """One task."""

    samples: Unchecked[int]
    judged: Count
    """Samples with references."""
    metric: str
    full: NotRequired[Score]
    """The full model's; absent where no sample has a reference, as ``schedules`` is."""
    schedules: NotRequired[dict[str, ComparedScore]]


class KvBytes(TypedDict):
    """Bytes of keys and values behind one prompt."""

    measured: Unchecked[int]
    """Read off the tensors."""
    computed: Unchecked[int]
    """From the number of entries."""
    full_measured: float
    full_computed: Unchecked[int]


class EvaluatedCost(TokenCounts):
    """What the prompts' prefill costs, mean over samples."""

    flops: Unchecked[dict[str, float]]
    """[C]."""
    flops_full: dict[str, float]
    """The full model's, [C]."""
    flops_ratio: dict[str, Annotated[float, Field(gt=0, le=1)]]
    """Of all prompts, relative to the full model's, [C]."""
    kv_ratio: float
    """Entries of the KV cache behind all prompts, relative to the full model's."""
    kv_bytes: KvBytes


class EvaluatedSchedule(TypedDict):
    """One schedule over all samples, compared along the full model's answers."""

    schedule: dict[str, Any]
    """In canonical form."""
    kl_first: float
    """KL(pruned ‖ full) of the first position, mean over samples."""
    kl_answer: float
    """Mean over an answer's positions, then over samples."""
    top1_agreement: float
    """Share of positions whose most likely token is the full model's, mean over samples."""
    exact_sequences: float
    """Share of samples whose greedy answer is the full model's."""
    first_divergence: float | None
    """Mean position at which the other answers part; None where all are equal."""
    worst_task: str | None
    """The one with the largest drop; None where no sample has a reference."""
    worst_difference: float | None
    """Its ``difference``."""
    cost: Annotated[EvaluatedCost, AfterValidator(has_convention)]
    losses: NotRequired[dict[str, list[float]]]
    """Share of the answer's tokens whose first choice changes, of each distinct sample with visual tokens, by task;
    there for the gate ``risk``."""


GateName = Literal["max_drop", "max_kl", "min_agreement", "max_flops", "risk"]


class Gate(TypedDict):
    """A gate that was asked for, and what came of it."""

    schedule: str
    gate: GateName
    task: str | None
    """The worst one, for ``max_drop`` and ``risk``."""
    found: float | None
    """None where nothing was measured; of ``risk`` the smallest that the task's samples prove."""
    allowed: float
    passed: bool
    confidence: NotRequired[float]
    """Of ``risk``."""
    samples: NotRequired[Count]
    """Of ``risk``: distinct ones of the task."""


class Time(TypedDict):
    """Seconds of several repeats."""

    median: Annotated[float, Field(gt=0)]
    iqr: Pair
    """First and third quartile."""


class TimePerToken(TypedDict):
    """Seconds of several repeats."""

    median: Annotated[float, Field(ge=0)]
    """A difference of two times, which noise may eat up."""
    iqr: Pair
    """First and third quartile."""


class Rate(TypedDict):
    """Tokens a second, all rows of a batch together, of several repeats."""

    median: Annotated[float, Field(gt=0)]
    iqr: Pair
    """First and third quartile."""


class SpeedUp(TypedDict):
    """The full model's time over a schedule's; see ``judge.statistics.speed_up``."""

    ratio: Annotated[float, Field(gt=0)]
    """Median over the rounds."""
    interval: Pair | None
    """95 %; None where rounds are too few."""


class BatchTiming(TypedDict):
    """Answers of one length to a batch; see ``measure.timing``."""

    batch: Depth
    """Prompts at once."""
    tokens_per_second: Rate
    """Of the whole generation, prompts included."""
    decode_tokens_per_second: Rate
    """Behind the first token of each row."""
    cache_bytes: Count
    """Of keys and values behind prompts and answers, when there are most of them."""
    speed_up: NotRequired[SpeedUp]
    """Of the whole generation; not of the full model, nor where another engine than the full model's ran."""
    decode_speed_up: NotRequired[SpeedUp]
    """Behind the first token, as above."""


class Latency(TypedDict):
    """Of one prompt at a time; see ``measure.timing``."""

    ttft: Time
    """To the first token."""
    tpot: TimePerToken
    """For each further one."""
    speed_up: NotRequired[SpeedUp]
    """Of ``ttft``; not of the full model, nor where another engine than the full model's ran."""
    batches: NotRequired[list[BatchTiming]]
    """By size."""


class Memory(TypedDict):
    """Peak bytes of a prefill above what was held before; None where it cannot be measured."""

    device: NotRequired[float | None]
    """Allocated by torch on a CUDA device."""
    resident: NotRequired[float | None]
    """Of the process."""


class EvaluationRun(RunRecord):
    """What was measured on this machine; None without timing."""

    latency: NotRequired[dict[str, Latency] | None]
    """By schedule and ``full``."""
    memory: NotRequired[dict[str, Memory | None] | None]
    """By schedule and ``full``; not of ONNX graphs."""
    batches_left_out: NotRequired[list[Depth]]
    """Sizes that were to be timed and do not fit in memory."""


class PrunedAnswer(TypedDict):
    """What a schedule says to a sample."""

    answer: str
    kl: list[float]
    """[R]."""
    first_divergence: int | None
    """The first token that is not the full model's; None where all are equal."""


class EvaluatedSample(TypedDict):
    """A sample with all answers."""

    id: str
    task: str
    question: str
    references: list[str]
    full: str
    """The full model's answer."""
    pruned: dict[str, PrunedAnswer]
    """By schedule."""
    scores: list[float | None]
    """By the task's metric: the full model's, then each schedule's; None without references."""


class ActionTaken(TypedDict):
    """What a ``withdraw`` or ``keep`` action of a schedule did to a sample."""

    action: str
    layer: int | None
    """At which it started; None if it did not."""
    kept: NotRequired[list[int] | None]
    """Of ``keep``: the tokens that stayed, counted among the sample's visual tokens."""


class Spent(TypedDict):
    """What a schedule did to a sample, and what the prompt's prefill cost."""

    visual_tokens: int
    text_tokens: int
    actions: list[ActionTaken]
    visual_per_layer: list[int]
    """[L]."""
    convention: str
    """Of the FLOPs."""
    flops: int
    full_flops: int
    kv_bytes: int
    """Computed."""
    full_kv_bytes: int


class TraceLine(Spent):
    """A line of the trace, which is not part of the document."""

    id: str
    """The sample's."""
    task: str
    schedule: str


@with_config(STRICT)
class Evaluation(Origin):
    """What schedules cost and save. Nothing but ``run`` differs between equal runs."""

    model: EvaluatedModel
    format: Literal["vtw-evaluation"]
    format_version: NotRequired[Literal[1]]
    num_layers: Unchecked[int]
    options: Unchecked[dict[str, Any]]
    """The command's section."""
    tasks: dict[str, EvaluatedTask]
    schedules: Annotated[
        dict[str, Annotated[EvaluatedSchedule, AfterValidator(_is_whole)]], Field(min_length=1)
    ]
    samples: Unchecked[list[EvaluatedSample]]
    """[S]."""
    left_out: Unchecked[int]
    """Samples that came up and were calibrated on."""
    gates: list[Gate]
    run: NotRequired[EvaluationRun]


def _is_whole(row: EvaluatedSchedule) -> EvaluatedSchedule:
    if "actions" not in row["schedule"]:
        raise ValueError("schedule has no actions")
    if (row["worst_task"] is None) != (row["worst_difference"] is None):
        raise ValueError("worst_task and worst_difference go together")
    return row


def fits_together(document: Evaluation) -> Evaluation:
    """What no single key tells: every schedule is wherever schedules are compared.

    Raises:
        ValueError: names the key.
    """
    schedules = document["schedules"].keys()
    for task, row in document["tasks"].items():
        if "schedules" in row and ("full" not in row or row["schedules"].keys() != schedules):
            raise ValueError(f"tasks.{task}: not all of the schedules are in it, or the full model is not")
    latency = document.get("run", {}).get("latency")
    if latency and (missing := {"full", *schedules} - latency.keys()):
        raise ValueError(f"run.latency has no {min(missing)}")
    for name, timed in (latency or {}).items():
        sizes = batch_sizes(timed)
        if sizes != sorted(set(sizes)) or (latency and sizes != batch_sizes(latency["full"])):
            raise ValueError(
                f"run.latency.{name}.batches: not each size once, in order, as for the full model"
            )
    return document


def batch_sizes(timed: Latency) -> list[int]:
    """The batches that a variant was timed at; none in a document that knows no batches."""
    return [row["batch"] for row in timed.get("batches", ())]
