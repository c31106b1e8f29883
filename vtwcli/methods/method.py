"""The seam between published methods and the rest: what a method is, what it asks of a model, what it then tries.

A method is one file in this folder with one class, named once in ``METHODS``. It builds schedules and nothing else;
calibration, comparison, evaluation, export, recipes and reports know it through this class alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from vtwcli.io.section import Section
from vtwcli.methods.published import layer_of
from vtwcli.models.families import Family, tower_depth, tower_of
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule


@dataclass(frozen=True)
class Shape:
    """What a method needs to know of a model.

    Attributes:
        depth: number of decoder layers L.
        first_withdrawal: the first layer at which the family's visual tokens may leave.
        tower: what scores of the vision tower look at: its ``class token``, or the attention that patches
            ``received``; None: there are none.
        tower_depth: number of the tower's layers; None: not known, so published layers are taken as they are.
        axes: whether positions count time, rows and columns of an image apart, so that nobody can say how they
            close up.
    """

    depth: int
    first_withdrawal: int = 0
    tower: str | None = "class token"
    tower_depth: int | None = None
    axes: bool = False

    @classmethod
    def of(cls, family: Family, config: Any) -> Shape:
        """Read off a model's config, top-level."""
        text = config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        axes = "mrope_section" in rope
        tower, layers = tower_of(family, config), tower_depth(config)
        return cls(text.num_hidden_layers, family.first_withdrawal, tower, layers, axes)


@dataclass(frozen=True)
class Candidate:
    """A schedule that may be chosen.

    Attributes:
        name: for tables and plots.
        method: the method it belongs to.
        schedule: what the runtime executes.
        parameters: what the method made it from.
    """

    name: str
    method: str
    schedule: Schedule
    parameters: dict[str, Any] = field(default_factory=dict)


class Trial(NamedTuple):
    """What came of a candidate.

    Attributes:
        candidate: what was tried.
        harm: KL of its worst task, or of all samples together where the policy asks for that.
        cost: its prefill's operations, of the full model's.
        holds: whether the policy lets one go further from here: it is accepted; of a budget, it is closer to the full
            model than the best one within.
    """

    candidate: Candidate
    harm: float
    cost: float
    holds: bool


class Style(NamedTuple):
    """How a method's candidates are drawn: a colour, matplotlib's marker, and the words of the legend."""

    colour: str
    marker: str
    label: str


@dataclass(frozen=True)
class Grid:
    """What a comparison varies.

    Attributes:
        ratios: shares of visual tokens that subsets keep.
        keep_layer: layer at which subsets are chosen; one at which the family's visual tokens may leave.
        thresholds: norms of contribution to try.
        seed: of random subsets.
    """

    ratios: Sequence[float]
    keep_layer: int
    thresholds: Sequence[float]
    seed: int


@dataclass(frozen=True)
class Alone:
    """What the sweep and the full model's last row said of one sample with vision.

    Attributes:
        task: its task.
        kl: for each intervention asked for, nats.
        read: the share of the last row's attention that goes to visual tokens, mean over heads, [L].
    """

    task: str
    kl: Sequence[float]
    read: Sequence[float]


@dataclass(frozen=True)
class Answers:
    """What the sweep and the last row of the full model said to a method's questions, over samples with vision.

    Attributes:
        kl: mean over samples for each intervention asked for, nats.
        by_task: the same for each task.
        contribution: ||c_i||_2 of visual tokens in all layers of all samples, or their quantiles.
        lost: what attention loses in each layer with 0, 1, .., 100 % of visual tokens gone, mean over samples, where
            the method asks for it; see ``sweep.lost``.
        eta: the KL threshold in nats.
        worst_task: whether the worst task's curve decides, and not the mean.
        samples: each of them alone.
    """

    kl: Sequence[float]
    by_task: Mapping[str, Sequence[float]]
    contribution: Sequence[float]
    eta: float
    worst_task: bool
    lost: Sequence[Sequence[float]] = ()
    samples: Sequence[Alone] = ()


class Method(Section):
    """A method's parameters, each with its bounds, its help and its one default, and the schedule they make.

    Class attributes:
        key: the name that options, recipes and documents use.
        title: its name for people.
        paper: where it was published; None for a control, and where that was not verified.
        finds: what a calibration of it finds, in words; None where there is nothing to find.
        searched: parameters that a calibration finds by running candidates; none where the sweep tells all.
        lost: whether it asks what attention loses.
        at_prompt: whether the sweep answers it at the prompt's last row alone, and not over the whole answer.
        leaves_alone: whether each sample's visual tokens leave at a layer of its own, all at once; a calibration then
            says where, beside the fixed layer of the same policy.
        guided: whether a second model chooses, named by the parameter ``guide``; a comparison takes it from ``base``.
        style: how it is drawn.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None
    finds: ClassVar[str | None] = None
    searched: ClassVar[tuple[str, ...]] = ()
    lost: ClassVar[bool] = False
    at_prompt: ClassVar[bool] = False
    leaves_alone: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    style: ClassVar[Style]

    @classmethod
    def of(cls, values: Iterable[tuple[str, Any]]) -> Self:
        """The method with those of ``values`` that are its parameters and hold something."""
        return cls(**{key: value for key, value in values if key in cls.model_fields and value is not None})

    def fitted(self, model: Shape) -> Self:
        """These parameters; those that were not given and are published for another depth, scaled to the model."""
        return self

    def schedule(self, **provenance: Any) -> Schedule:
        """The schedule that these parameters make."""
        raise NotImplementedError

    def label(self) -> str:
        """The schedule's name in results."""
        return self.key

    @classmethod
    def refused(cls, model: Shape) -> str | None:
        """Why the method does not go with a model; None where it does."""
        return None

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """What a comparison of methods tries.

        Args:
            base: parameters of the recipe's schedule section, which the method may keep fixed.
        """
        return []

    @classmethod
    def at_share(cls, model: Shape, share: float) -> Method | None:
        """The method set so that a layer holds ``share`` of the visual tokens, on average over all layers.

        This is how papers compare methods: 192, 128 or 64 of 576 tokens are a third, two ninths and a ninth. None
        where no setting of the method comes to that.
        """
        return None

    @classmethod
    def ask(cls, model: Shape) -> list[Intervention]:
        """What one sweep shall answer before candidates are made."""
        return []

    @classmethod
    def findings(cls, found: Answers) -> dict[str, Any]:
        """What the sweep's answers say by themselves, for the result document; plain JSON values."""
        return {}

    @classmethod
    def candidates(cls, model: Shape, found: Answers, base: Mapping[str, Any]) -> list[Candidate]:
        """What a calibration tries, given the sweep's answers; ``base`` as for ``compared``."""
        return []

    @classmethod
    def further(cls, model: Shape, tried: Sequence[Trial]) -> list[Candidate]:
        """What a calibration tries next, given what came of all before; none ends it."""
        return []

    @classmethod
    def safest_first(cls, front: Sequence[Candidate]) -> list[Candidate]:
        """The order in which a guarantee tests the candidates of a front, given the cheapest first."""
        return list(reversed(front))


Made = TypeVar("Made", bound=Method)
_MANY, _LEAST = 10_000, 1e-4  # tokens of a prompt, so that rounding plays no part; the smallest setting


def share_behind(share: float, at: int, until: int, depth: int) -> float | None:
    """The share to keep in layers at..until-1 for an average of ``share``, with all in front and none behind.

    None where no share does.
    """
    kept = (share * depth - at) / (until - at) if until > at else 0.0
    return round(kept, 9) if 0 < kept <= 1 else None


def early(model: Shape) -> int:
    """Where tokens are chosen early on: layer 2 of 32 in a model of this depth, or the first that its family allows."""
    return max(layer_of(2, model.depth), model.first_withdrawal, 1)


def fit_share(build: Callable[[float], Made], model: Shape, share: float) -> Made | None:
    """The method ``build(x)``, x in 0..1, whose schedule has an average ``share`` of the visual tokens in its layers.

    Args:
        build: more of x must not mean fewer tokens.

    Returns:
        The closest from below; None where even the least is above, or the most more than a hundredth below.
    """

    def average(method: Method) -> float:
        return sum(method.schedule().visual_per_layer(model.depth, _MANY)) / (model.depth * _MANY)

    low, high = _LEAST, 1.0
    if average(build(low)) > share or average(build(high)) < share - 0.01:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        if average(build(middle)) <= share:
            low = middle
        else:
            high = middle
    return build(low)
