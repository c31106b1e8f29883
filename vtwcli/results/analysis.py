"""The result document of ``vtw analyze``.

S samples with visual tokens (others are left out), L layers, N tokens of the logit lens, V visual tokens of a sample,
M shown layers; KL in nats, numbers with six digits.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NotRequired

from typing_extensions import TypedDict

from vtwcli.results.comparison import TriedRow
from vtwcli.results.document import Files, ModelRecord, Origin, SweepRun

FORMAT: Final = "vtw-analysis"
FORMAT_VERSION: Final = 1
ANALYSIS = Files(
    FORMAT,
    "analysis",
    {
        "page": ".html",
        "static": ".static.yaml",
        "dynamic": ".dynamic.yaml",
        "stages": ".stages.yaml",
        "kl": ".kl.png",
        "attention": ".attention.png",
        "tokens": ".tokens.png",
        "values": ".values.png",
    },
)


Stage = Literal["shallow", "middle", "deep"]


class Spread(TypedDict):
    """A measure over samples by layer; None where there is nothing to measure."""

    mean: list[float | None]
    """[L]; L - window + 1 entries for ``knockout_window``."""
    std: list[float | None]
    """Standard deviation, as ``mean``."""
    samples: list[list[float | None]]
    """[S][L]."""
    positions: NotRequired[list[list[list[float]]]]
    """Of a KL, by compared position, [S][L][R]."""


class Measure(Spread):
    """A measure, and what it is in words."""

    what: str


class Ranges(TypedDict):
    """The stages as [first layer, the one behind the last]."""

    shallow: list[int]
    middle: list[int]
    deep: list[int]


class TaskStages(Ranges):
    """The stages of one task by itself."""

    samples: int
    knockout_until: list[float]
    """Mean over its samples, [L], as the measure of this name."""
    withdrawal: list[float]
    """As above."""


class StagesRecord(Ranges):
    """The stages of all samples together."""

    sentences: dict[str, str]
    """What each stage means."""
    tasks: dict[str, TaskStages]


class Quartiles(TypedDict):
    """A number that each sample has, or has not."""

    quartiles: list[float] | None
    """25, 50 and 75 %; None where no sample has it."""
    without: int
    """Samples that have none."""


class Rule(TypedDict):
    """VisiPruner's boundaries, see ``methods.visipruner.filter_and_exit``."""

    shallow: int
    """Number of shallow layers."""
    filter: Quartiles
    """First layer with critical tokens only."""
    exit: Quartiles
    """First layer without visual tokens."""
    kept: Quartiles
    """Number of critical tokens."""


class Proposed(TypedDict):
    """Schedules in canonical form."""

    static: dict[str, Any]
    """Text does not read vision in the shallow layers, and there is none in the deep ones."""
    dynamic: dict[str, Any] | None
    """VisiPruner's rule behind the shallow layers; None where they leave no room for it."""
    stages: NotRequired[dict[str, Any] | None]
    """Visual tokens are frozen in some layers and then withdrawn, at less than withdrawal alone takes; None where no
    such schedule stays at or under eta in every task, the layers' updates were not measured, or layers are streamed."""


class Together(TypedDict):
    """What frozen layers and withdrawal behind them cost, measured as one."""

    stages: TriedRow
    withdrawal: TriedRow
    """Withdrawal at the same layer by itself."""


class AnalyzedSample(TypedDict):
    """A sample, and what VisiPruner's rule says of it."""

    id: str
    fingerprint: str
    """Of its content."""
    task: str
    question: str
    prefix: int
    """Text tokens before the first visual one."""
    visual: int
    """Visual tokens, V."""
    suffix: int
    """Text tokens behind the first visual one."""
    filter: int | None
    """First layer with critical tokens only; None where no layer chooses them."""
    exit: int | None
    """First layer without visual tokens; None where there is none."""
    kept: int | None
    """Number of critical tokens; None without ``filter``."""
    critical: list[list[int]]
    """The critical tokens of each layer, counted among the sample's visual tokens."""
    kept_cosine: NotRequired[list[list[float]]]
    """[L][L]: of the critical tokens of each layer, the smallest cosine in each layer; empty where none is critical."""
    lens: list[list[list[str | float]]]
    """[L][N] of most likely token and probability, of the last row; empty where it was not asked for."""


class TokenMap(TypedDict):
    """What the last token reads of each visual token of a sample at the shown layers."""

    layers: list[int]
    """[M]."""
    attention: list[list[float]]
    """[M][V], mean over heads."""
    contribution: list[list[float]]
    """[M][V], ||c_i||_2."""
    boxes: list[list[float] | None]
    """[V] of image, left, top, right, bottom in shares of the image; None where a token has no place in one."""


class SampleMap(TokenMap):
    """The map of one sample."""

    sample: int
    """Its place in ``samples``."""


class AnalysisDocument(Origin):
    """What each layer does with vision. Nothing but ``run`` differs between equal runs."""

    format: Literal["vtw-analysis"]
    format_version: Literal[1]
    model: ModelRecord
    num_layers: int
    """L."""
    eta: float
    """Threshold, nats."""
    positions: str
    """``first`` or ``answer``."""
    min_layer: int
    """First candidate for the withdrawal layer."""
    options: dict[str, Any]
    """The command's section."""
    stages: StagesRecord
    visipruner: Rule
    schedules: Proposed
    together: NotRequired[Together]
    """Of the proposed ``stages``."""
    measures: dict[str, Measure]
    """By names of ``analyze.MEASURES``."""
    samples: list[AnalyzedSample]
    """[S]."""
    maps: list[SampleMap]
    """Of the shown samples, where tokens' places are known."""
    map_layers: list[int]
    """[M]."""
    run: NotRequired[SweepRun]
