"""The schedule: which visual tokens exist and are read at each layer.

Calibration, analysis or a person writes one, the runtime executes one, export bakes one in, eval judges one. It is an
ordered list of actions with the layer at which each begins; between two actions nothing changes. The canonical JSON
form (``to_dict``) is what lands in an exported model's config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from vtwcli.errors import UsageError
from vtwcli.io import documents
from vtwcli.io.section import Section
from vtwcli.schedule import rules, words
from vtwcli.schedule.short import expanded


@dataclass(frozen=True)
class OneOf:
    """Marks a text that is one of a slot's words."""

    slot: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(words.words(self.slot)))


def _key(part: str, name: str) -> Any:
    """A field with the default and the bounds of a schedule's key."""
    key = rules.KEYS[part][name]
    return Field(key.default, ge=key.least, le=key.most)


Start = Annotated[int, _key("withdraw", "at")] | Literal["auto"]


class _Part(Section):
    """Named as its keys are in ``rules.KEYS``, whose rules it keeps."""

    @model_validator(mode="after")
    def _rules(self) -> _Part:
        rules.check_rules(type(self).__name__.lower(), vars(self))
        return self


class When(_Part):
    """A condition on the running sample, over the last row's contributions c_i and output o of a layer.

    Attributes:
        cosine_below: holds at a layer where some visual token's cos(o - c_i, o) is below this value.
        cosine_above: holds at a layer where every present visual token's cosine is at least this value.
        attention_below: holds at a layer where the last row's attention to all present visual tokens together, mean
            over heads, is below this value.
        layers: how many layers must satisfy the condition.
        consecutive: the layers must follow each other; the published VisiPruner code counts them in total.
    """

    cosine_below: float | None = _key("when", "cosine_below")
    cosine_above: float | None = _key("when", "cosine_above")
    attention_below: float | None = _key("when", "attention_below")
    layers: int = _key("when", "layers")
    consecutive: bool = _key("when", "consecutive")


class Select(_Part):
    """Which visual tokens ``keep`` keeps: a score, then a ratio, a count or a threshold.

    Attributes:
        score: ``contribution`` (norm of the last row's per-token contribution), ``attention`` (last row, mean over
            heads), ``self_cross`` (all rows, see ``words``), ``change`` (by the layer before), ``duplication`` (the
            least like a few pivots), ``random`` (seeded), ``uniform`` (every n-th), ``guided`` (a second model's), or
            one of the vision tower's, for each image.
        ratio: share of the visual tokens, rounded up.
        count: number of visual tokens; a row with fewer keeps all.
        share: of the visual tokens that the prompt brought, however many are left; rounded down.
        above: keep the tokens whose score exceeds this value.
        found: true: as many as the score's own rule finds, where it has one.
        seed: of the random score.
        rows: whose attention is asked: that of the ``last`` row, of ``text`` behind the image, of ``visual`` rows or
            of ``all``.
        layer: where a measured score is taken: in the layer ``before`` that in which tokens leave, or ``here``, in
            that layer as it sees the rows that enter it.
        heads: how many heads count: those with the most attention from these rows to visual tokens; by default all.
        level: whether weights are divided by what rotary embedding alone makes of the distance.
        parameters: of the score, by name; ``rules.KEYS`` has them under its name.
    """

    score: Annotated[str, OneOf("score")]
    ratio: float | None = _key("select", "ratio")
    count: int | None = _key("select", "count")
    share: float | None = _key("select", "share")
    above: float | None = _key("select", "above")
    found: bool | None = _key("select", "found")
    seed: int = _key("select", "seed")
    rows: Annotated[str, OneOf("rows")] = _key("select", "rows")
    layer: Annotated[str, OneOf("layer")] = _key("select", "layer")
    heads: int | None = _key("select", "heads")
    level: bool = _key("select", "level")
    parameters: dict[str, Any] | None = _key("select", "parameters")


class Rest(_Part):
    """What becomes of the tokens that ``keep`` does not keep.

    Attributes:
        merge: ``cluster``: the best of them are merged into means, which stand behind the kept ones.
        share: of them, to be merged; rounded down, and one more.
        into: clusters for each of these; rounded down, and one more.
        seed: of the noise that tells equal densities apart.
    """

    merge: Annotated[str, OneOf("merge")]
    share: float = _key("rest", "share")
    into: float = _key("rest", "into")
    seed: int = _key("rest", "seed")


class _Starting(_Part):
    """An action that starts at a fixed layer or, for each sample, one layer behind that in which a condition holds.

    Attributes:
        at: the layer, or ``auto``.
        after: ``when`` is looked at in the layers behind this one; by default in all. It is always looked at only
            once every ``withdraw`` and ``keep`` above has started; one below with a fixed layer makes it void.
        when: the condition of ``auto``.
    """

    at: Start
    after: int | None = _key("withdraw", "after")
    when: When | None = None


class Withdraw(_Starting):
    """From this layer on there are no visual tokens."""

    action: Literal["withdraw"]


class Keep(_Starting):
    """From this layer on only the selected visual tokens exist.

    Attributes:
        rest: what becomes of the others; by default they are dropped.
        positions: ``original`` ones stay, or rows are numbered anew behind the removal (``compact``).
        every: do so not in the prompt but behind each so many tokens of the answer, in the cache.
    """

    action: Literal["keep"]
    select: Select
    positions: Annotated[str, OneOf("positions")] = _key("keep", "positions")
    rest: Rest | None = None
    every: int | None = _key("keep", "every")


class _Range(_Part):
    at: int = _key("freeze", "at")
    until: int = _key("freeze", "until")


class Mute(_Range):
    """Text rows do not read visual columns in layers at..until-1; the visual tokens live on.

    Attributes:
        sink: where the attention mass goes: ``renormalise`` (masked before the softmax), ``first`` (summed onto the
            first visual token) or ``zero`` (set to zero after the softmax, as VisiPruner's code does).
        readers: whose reading is muted; VisiPruner's layer 0 also mutes visual rows.
        columns: all visual columns, the first half of them (VisiPruner's 13b form), or those ``beyond`` some steps in
            the grid of the reader's image (YOPO).
        steps: of ``beyond``.
        both_ways: whether what is nearer is read even where it comes later.
        during: ``all``, or only the ``prefill``: then tokens behind the prompt read as usual, as in VisiPruner's code.
    """

    action: Literal["mute"]
    sink: Annotated[str, OneOf("sink")] = _key("mute", "sink")
    readers: Annotated[str, OneOf("readers")] = _key("mute", "readers")
    columns: Annotated[str, OneOf("columns")] = _key("mute", "columns")
    during: Annotated[str, OneOf("during")] = _key("mute", "during")
    steps: int = _key("mute", "steps")
    both_ways: bool = _key("mute", "both_ways")


class Freeze(_Range):
    """Visual rows are not updated in layers at..until-1; they still serve as keys and values."""

    action: Literal["freeze"]


Action = Annotated[Withdraw | Keep | Mute | Freeze, Field(discriminator="action")]


class Schedule(Section):
    """What happens to visual tokens at each layer, with its provenance.

    Attributes:
        format_version: of the canonical form: the oldest that can say it.
        actions: in order of their start layers.
        provenance: model id and revision, the calibration that produced it, tool version.
    """

    format_version: Literal[1, 2] = 1
    actions: tuple[Action, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _schedule_key(cls, data: Any) -> Any:
        # a recipe calls the list "schedule"; a file may too
        if isinstance(data, Mapping) and "schedule" in data and "actions" not in data:
            data = dict(data)
            data["actions"] = data.pop("schedule")
        if isinstance(data, Mapping) and "actions" in data:
            data = {**data, "actions": expanded(data["actions"])}
        return data

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        actions = self.plain()
        rules.check_order(actions)
        if "format_version" in self.model_fields_set:
            rules.check_version(self.format_version, actions)
        object.__setattr__(self, "format_version", words.version_of(actions))
        return self

    @classmethod
    def withdraw_at(cls, k: int, **provenance: Any) -> Schedule:
        """The schedule of VTW: every visual token leaves at layer ``k``."""
        return cls(actions=(Withdraw(at=k, action="withdraw"),), provenance=provenance)

    @classmethod
    def from_dict(cls, data: Any, name: str = "schedule") -> Schedule:
        """Validate a plain dict or a list of actions.

        Raises:
            UsageError: with the key that is wrong.
        """
        return documents.validate(
            {"actions": data} if isinstance(data, list) else data, cls, name, "schedule"
        )

    @classmethod
    def from_file(cls, path: Path) -> Schedule:
        """Read a schedule from YAML or JSON, or out of the result of a calibration or a search.

        Raises:
            UsageError: with file, line, column and key.
        """
        node = documents.read(path, "schedule")
        if isinstance(node, list):
            node = {"actions": node}
        if isinstance(node, dict) and node.get("format") == "vtw-calibration" and not node.get("schedule"):
            raise UsageError(
                f"{path}: nothing qualified in this calibration, so it has no schedule",
                "calibrate with another policy or threshold, or name a layer",
            )
        if isinstance(node, dict) and node.get("format") == "vtw-search" and not node.get("schedule"):
            raise UsageError(
                f"{path}: nothing met the goals of this search, so it has no schedule",
                "search with wider goals",
            )
        if isinstance(node, dict) and isinstance(node.get("schedule"), dict):  # of a calibration or a search
            node = node["schedule"]
        if isinstance(node, dict) and "schedule" in node and "actions" not in node:
            node["actions"] = node.pop("schedule")
        return documents.validate(node, cls, str(path), "schedule")

    @property
    def is_static(self) -> bool:
        """Whether the layer and number of tokens of every action are known before a sample is seen."""
        return words.is_fixed(self.plain())

    def check_depth(self, layers: int, first_withdrawal: int = 0) -> None:
        """Validate against a model.

        Args:
            layers: number of decoder layers L; a start at L means "never".
            first_withdrawal: the first layer at which the family's visual tokens may leave.

        Raises:
            UsageError: an action lies outside the model.
        """
        try:
            rules.check_depth(self.plain(), layers, first_withdrawal)
        except words.ScheduleError as error:
            raise UsageError(error.message, error.hint) from None

    def visual_per_layer(self, layers: int, visual: int) -> list[int]:
        """Number of visual tokens present in each layer for a sample that has ``visual`` of them.

        Raises:
            UsageError: the schedule is dynamic, so the numbers are known only after a run.
        """
        try:
            return words.visual_per_layer(self.plain(), layers, visual)
        except words.ScheduleError as error:
            raise UsageError(error.message, error.hint) from None

    def frozen_layers(self, layers: int) -> list[bool]:
        """Whether the visual tokens of each layer are not updated."""
        return words.frozen_layers(self.plain(), layers)

    def plain(self) -> list[dict[str, Any]]:
        """The actions in canonical form, as ``words`` takes them."""
        return [_lean(action) for action in self.actions]

    def to_dict(self) -> dict[str, Any]:
        """The canonical form: plain JSON values, only the keys that say something."""
        data: dict[str, Any] = {
            "format_version": self.format_version,
            "actions": self.plain(),
        }
        if self.provenance:
            data["provenance"] = self.provenance
        return data

    def to_yaml(self) -> str:
        """The form for people; ``from_file`` reads it back to an equal schedule."""
        from ruamel.yaml.comments import CommentedMap

        data = self.to_dict()
        actions = []
        for action in data["actions"]:
            flow = CommentedMap(action)
            flow.fa.set_flow_style()
            actions.append(flow)
        data["actions"] = actions
        return documents.to_yaml(data)


def _lean(action: Section) -> dict[str, Any]:
    """An action without the keys that hold their defaults; ``at`` and ``action`` first."""
    full = action.model_dump(exclude_defaults=True)
    ordered = {"at": full.pop("at"), **({"until": full.pop("until")} if "until" in full else {})}
    return {**ordered, "action": full.pop("action"), **full}
