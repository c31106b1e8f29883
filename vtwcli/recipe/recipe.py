"""What a user may ask for: every option with its type, its check and its one default."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from vtwcli.data.spec import DataSpec, is_path
from vtwcli.errors import UsageError
from vtwcli.io.section import Section
from vtwcli.methods import METHODS
from vtwcli.methods.method import Method
from vtwcli.methods.visipruner import Rule
from vtwcli.recipe.analysis import AnalyzeSection
from vtwcli.recipe.evaluation import EvalSection
from vtwcli.recipe.exports import ExportSection
from vtwcli.recipe.fields import (
    BATCH_SIZE,
    LONGEST,
    Answering,
    Answers,
    Limit,
    Loss,
    MethodName,
    Positions,
    SkipBad,
)
from vtwcli.recipe.gates import GatesSection
from vtwcli.recipe.search import SearchSection


class ModelSection(Section):
    """Which model, where it runs and in which precision."""

    name: str = Field("demo", description="local directory, Hub id with optional @revision, or demo")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto, float32, bfloat16 or float16"
    )
    attn: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="attention implementation: sdpa, eager or flash_attention_2"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    stream: bool | None = Field(
        None, description="read one layer at a time from disk; by default only when the model does not fit"
    )


Policy = Literal["paper", "sustained", "quantile", "agreement", "worst-task", "budget", "guarantee"]


class CalibrateSection(Answering):
    """How K, or VisiPruner's boundary and thresholds, are found."""

    method: Calibrated = Field(
        "vtw",
        description="; ".join(f"{name}: {one.finds}" for name, one in METHODS.items() if one.finds),
    )
    limit: Limit = 20
    eta: float = Field(
        0.003,
        gt=0,
        description="largest KL that is accepted, in nats: how far what is said next may move; 0 is not at all",
    )
    min_layer: int | None = Field(
        None, ge=0, description="lowest layer that may become K; by default 5 for 16 layers and more, else 1"
    )
    policy: Policy = Field(
        "worst-task", description="paper, sustained, quantile, agreement, worst-task, budget or guarantee"
    )
    positions: Positions = "answer"
    answers: Answers = "auto"
    max_new_tokens: int | None = Field(None, ge=1, description=LONGEST.format(48))
    batch_size: int | None = Field(None, ge=1, description=BATCH_SIZE)
    quantile: float = Field(
        0.95,
        gt=0,
        le=1,
        description="policy quantile: share of samples whose KL must stay within eta; 0.95 is 19 of 20",
    )
    agreement: float = Field(
        0.98,
        gt=0,
        le=1,
        description="policy agreement: least share of tokens that must stay the most likely ones",
    )
    budget: float = Field(
        0.6, gt=0, le=1, description="policy budget: largest cost, as a share of the full model's"
    )
    budget_of: Literal["flops", "kv"] = Field(
        "flops", description="policy budget: what is counted, flops (arithmetic of the prompt) or kv (cache)"
    )
    risk: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="policy guarantee: largest mean loss promised of each task on inputs like the samples",
    )
    confidence: float = Field(
        0.95, gt=0, lt=1, description="policy guarantee: how sure; at 0.95 one promise of 20 may be wrong"
    )
    loss: Loss = Field(
        "tokens",
        description="policy guarantee, what a sample loses: tokens, the share of its answer's tokens that change; "
        "answer, 1 if any does; kl, 1 if its mean KL exceeds eta; metric, how much the task's metric drops",
    )
    bootstrap: int = Field(
        1000, ge=0, description="how often samples are redrawn to tell the 95 % interval of K; 0 for none"
    )
    seed: int = Field(
        0, ge=0, description="which samples are drawn, and redrawn; the same seed gives the same result"
    )
    skip_bad: SkipBad = False
    resume: bool = Field(
        False, description="go on with the samples that were finished before an interruption"
    )

    def recorded(self) -> dict[str, Any]:
        """What result documents say of it: what a promise needs only where one is given."""
        unused = () if self.policy == "guarantee" else ("risk", "confidence", "loss")
        return self.model_dump(mode="json", exclude={"resume", *unused})

    def how(self) -> dict[str, Any]:
        """How its schedule was found, for the schedule's provenance."""
        promised = ("risk", "confidence", "loss") if self.policy == "guarantee" else ()
        return {name: getattr(self, name) for name in ("policy", "eta", "positions", *promised)}


if TYPE_CHECKING:
    Calibrated: TypeAlias = str
else:
    Calibrated = Literal[tuple(name for name, one in METHODS.items() if one.finds)]


class _Named(Section):
    file: str | None = Field(None, description="schedule or calibration result")
    layer: int | None = Field(None, ge=0, description="withdraw at this layer")
    method: MethodName | None = Field(None, description=", ".join(METHODS))
    guide: str | None = Field(None, description="SGL: the model that answers first, a name or directory")


# VisiPruner's parameters may stand here without naming it: for its calibration, and for a comparison
class ScheduleSection(Rule, _Named):
    """Which schedule to run: a file, a withdrawal layer, or a method with its parameters."""

    model_config = ConfigDict(extra="allow")  # what other methods want; checked below

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """With the parameters of every method, and no other key."""
        schema: dict[str, Any] = handler.resolve_ref_schema(handler(core))
        for method in METHODS.values():
            for key, one in method.model_json_schema().get("properties", {}).items():
                words = f"{method.title}: {one['description']}"
                schema["properties"].setdefault(key, {**one, "description": words})
        schema["additionalProperties"] = False
        return schema

    @property
    def names_one(self) -> bool:
        """Whether a schedule is named, and not only parameters."""
        return (self.file, self.layer, self.method) != (None, None, None)

    def chosen(self) -> Method | None:
        """The method that is named, with its parameters; ``layer`` alone is VTW."""
        name = self.method or ("vtw" if self.layer is not None else None)
        return None if name is None else METHODS[name].of(self)

    def rule(self) -> dict[str, Any]:
        """VisiPruner's parameters, for its calibration and for comparisons."""
        return self.model_dump(mode="json", include=set(Rule.model_fields))

    @model_validator(mode="after")
    def _one_choice(self) -> ScheduleSection:
        own: Collection[str] = METHODS[self.method].model_fields if self.method else ()
        named = [name for name in ("file", "layer", "method") if getattr(self, name) is not None]
        if len(named) > 1 and not (named == ["layer", "method"] and "layer" in own):
            raise ValueError(f"give one of file, layer and method, not {' and '.join(named)}")
        if self.method == "vtw" and self.layer is None:
            raise ValueError("method vtw needs a layer")
        if self.guide is not None and self.method and "guide" not in own:
            raise ValueError(f"method {self.method} has no guide")
        for key in self.model_extra or ():
            if key not in own:
                raise PydanticCustomError("extra_forbidden", "unknown key", {"below": (key,)})
        try:
            self.chosen()
        except ValidationError as error:
            first = error.errors()[0]
            context = {"text": first["msg"], "below": first["loc"], "given": first["input"]}
            raise PydanticCustomError(first["type"], "{text}", context) from None
        return self


class BudgetSection(Answering):
    """Which schedules of all methods are compared, and the budget."""

    otherwise: ClassVar[int] = 32

    limit: Limit = 10
    max_flops: float | None = Field(
        None,
        gt=0,
        description="the budget: largest share of the full model's arithmetic for the prompt; the best schedule within "
        "it is written",
    )
    methods: tuple[MethodName, ...] = Field(
        tuple(METHODS), min_length=1, description="what is compared; vtw methods lists them"
    )
    ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.5, 0.25, 0.1),
        min_length=1,
        description="shares of visual tokens to keep, for methods that keep a part",
    )
    tokens: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        min_length=1,
        description="compare at equal cost: how many visual tokens a layer holds on average, e.g. 192,128,64",
    )
    keep_layer: int = Field(
        2, ge=1, description="layer from which on controls and kept parts hold fewer tokens"
    )
    thresholds: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.05, 0.1, 0.2, 0.4, 0.8),
        min_length=1,
        description="VisiPruner: values of its tokens threshold to try",
    )
    max_new_tokens: int | None = Field(None, ge=1, description=LONGEST.format(32))
    batch_size: int | None = Field(None, ge=1, description=BATCH_SIZE)
    seed: int = Field(
        0, ge=0, description="which samples are drawn, and which tokens the random control keeps"
    )
    skip_bad: SkipBad = False

    @field_validator("methods", "ratios", "tokens", "thresholds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


STEPS = ("calibrate", "analyze", "budget", "search", "eval", "export")
"""The sections that are steps of a run, in order; what each does stands in ``pipeline.steps``."""


_ASKED = ("system", "prompt", "image")
_PLAIN = (*_ASKED, "data", "output")  # what of a recipe is no section


def _short_source(value: Any) -> Any:
    """The command line's form of a data source, ``gqa:limit=3``."""
    try:
        return DataSpec.parse(value) if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(str(error)) from None


class Recipe(Section):
    """One file from model to verified artefact; every part has a default.

    A list under ``data`` holds data sources, each a mapping or the command line's short form. ``vtw run`` runs the
    steps (``calibrate``, ``analyze``, ``budget``, ``search``, ``eval``, ``export``) whose sections are there, be they
    empty.
    """

    model: ModelSection = ModelSection()
    system: str | None = Field(
        None, description="system turn of every source under data that has none of its own"
    )
    prompt: str | None = Field(
        None, description="prompt template of every source under data that has none of its own"
    )
    image: Literal["pad"] | None = Field(
        None, description="pad makes the pictures of every source under data square"
    )
    data: tuple[Annotated[DataSpec, BeforeValidator(_short_source)], ...] = ()
    calibrate: CalibrateSection = CalibrateSection()
    analyze: AnalyzeSection = AnalyzeSection()
    schedule: ScheduleSection = ScheduleSection()
    budget: BudgetSection = BudgetSection()
    search: SearchSection = SearchSection()
    eval: EvalSection = EvalSection()
    gates: GatesSection = GatesSection()
    export: ExportSection = ExportSection()
    output: str | None = Field(None, description="directory of a run's results; by default vtw-run-NAME")

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: Any) -> Any:
        """A section with nothing in it (``eval:``) is there, with its defaults."""
        if not isinstance(value, dict):
            return value
        return {
            key: {} if one is None and key in cls.model_fields and key not in _PLAIN else one
            for key, one in value.items()
            if one is not None or key != "data"
        }

    def sources(self, given: Sequence[DataSpec] = ()) -> list[DataSpec]:
        """The data sources that are given, or else the recipe's, asked as the recipe says.

        Raises:
            UsageError: the recipe says how to ask, and there are none.
        """
        asked = {name: one for name in _ASKED if (one := getattr(self, name)) is not None}
        specs = list(given or self.data)
        if asked and not specs:
            raise UsageError(
                f"{next(iter(asked))} goes with data", "name the sources under data, or with --data"
            )
        return [
            spec.model_copy(update={name: one for name, one in asked.items() if getattr(spec, name) is None})
            for spec in specs
        ]

    def asked(self) -> Recipe:
        """The same recipe with what it says of asking in its sources.

        Raises:
            UsageError: as ``sources``.
        """
        sources = tuple(self.sources())
        return self.model_copy(update={**dict.fromkeys(_ASKED), "data": sources}) if sources else self

    @field_validator("model", mode="before")
    @classmethod
    def _short_model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def relative_to(self, folder: Path) -> Recipe:
        """The same recipe with paths as seen from the working directory; in its file they are relative to it.

        The output may be still to make; of the others those that exist beside the file are paths.
        """

        def seen(name: str) -> str:
            inside = str(folder / name)
            return inside if is_path(inside) and not Path(name).is_absolute() else name

        found = self.with_paths(seen)
        output = None if self.output is None else str(folder / self.output)
        return found.model_copy(update={"output": output}) if output else found

    def with_paths(self, change: Callable[[str], str]) -> Recipe:
        """The same recipe with ``change`` applied to whatever may be a path on this machine, but for the output.

        ``demo`` and the names of built-in tasks never are.
        """
        from vtwcli.data.tasks import TASKS  # no help page needs them

        def changed(section: Section, field: str, *names: str) -> Section:
            value = getattr(section, field)
            unset = value is None or value in ("", *names)
            return section if unset else section.model_copy(update={field: change(value)})

        parts: dict[str, Any] = {
            "model": changed(self.model, "name", "demo"),
            "data": tuple(
                changed(changed(changed(spec, "source", "demo", *TASKS), "path"), "folder")
                for spec in self.data
            ),
            "schedule": changed(changed(self.schedule, "file"), "guide", "demo"),
            "eval": changed(self.eval, "baseline", "demo"),
        }
        return self.model_copy(update={name: parts[name] for name in parts if name in self.model_fields_set})
