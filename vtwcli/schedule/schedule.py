"""The schedule: which visual tokens exist and are read at each layer.

Calibration, analysis or a person writes one, the runtime executes one, export bakes one in, eval judges one. It is an
ordered list of actions with the layer at which each begins; between two actions nothing changes. The canonical JSON
form (``to_dict``) is what lands in an exported model's config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vtwcli.errors import UsageError
from vtwcli.io import documents
from vtwcli.io.section import Section

FORMAT_VERSION: Literal[1] = 1

Start = Annotated[int, Field(ge=0)] | Literal["auto"]


class When(Section):
    """A condition on the running sample, over the last row's contributions c_i and output o of a layer.

    Attributes:
        cosine_below: holds at a layer where some visual token's cos(o - c_i, o) is below this value.
        cosine_above: holds at a layer where every present visual token's cosine is at least this value.
        layers: how many layers must satisfy the condition.
        consecutive: the layers must follow each other; the published VisiPruner code counts them in total.
    """

    cosine_below: float | None = Field(None, ge=-1, le=1)
    cosine_above: float | None = Field(None, ge=-1, le=1)
    layers: int = Field(1, ge=1)
    consecutive: bool = False

    @model_validator(mode="after")
    def _one_condition(self) -> When:
        if (self.cosine_below is None) == (self.cosine_above is None):
            raise ValueError("give exactly one of cosine_below and cosine_above")
        return self


class Select(Section):
    """Which visual tokens ``keep`` keeps: a score, then a ratio, a count or a threshold.

    Attributes:
        score: ``contribution`` (norm of the last row's per-token contribution), ``attention`` (last row, mean over
            heads), ``random`` (seeded) or ``uniform`` (every n-th).
        ratio: share of the visual tokens, rounded up.
        count: number of visual tokens; a row with fewer keeps all.
        above: keep the tokens whose score exceeds this value.
        seed: of the random score.
    """

    score: Literal["contribution", "attention", "random", "uniform"]
    ratio: float | None = Field(None, ge=0, le=1)
    count: int | None = Field(None, ge=0)
    above: float | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _one_amount(self) -> Select:
        given = [name for name in ("ratio", "count", "above") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of ratio, count and above")
        if self.above is not None and self.score in ("random", "uniform"):
            raise ValueError(f"score {self.score} has no threshold; give ratio or count")
        return self


class _Starting(Section):
    """An action that starts at a fixed layer or, for each sample, one layer behind that in which a condition holds.

    Attributes:
        at: the layer, or ``auto``.
        after: ``when`` is looked at in the layers behind this one; by default in all. It is always looked at only
            once every ``withdraw`` and ``keep`` above has started; one below with a fixed layer makes it void.
        when: the condition of ``auto``.
    """

    at: Start
    after: int | None = Field(None, ge=0)
    when: When | None = None

    @model_validator(mode="after")
    def _auto_has_condition(self) -> _Starting:
        if self.at == "auto" and self.when is None:
            raise ValueError("'at: auto' needs a condition under 'when'")
        if self.at != "auto" and (self.when is not None or self.after is not None):
            raise ValueError("'when' and 'after' go with 'at: auto' only")
        return self


class Withdraw(_Starting):
    """From this layer on there are no visual tokens."""

    action: Literal["withdraw"]


class Keep(_Starting):
    """From this layer on only the selected visual tokens exist."""

    action: Literal["keep"]
    select: Select


class _Range(Section):
    at: int = Field(ge=0)
    until: int = Field(ge=1)

    @model_validator(mode="after")
    def _not_empty(self) -> _Range:
        if self.until <= self.at:
            raise ValueError(
                f"'until' ({self.until}) must be above 'at' ({self.at}); it is the first layer without"
            )
        return self


class Mute(_Range):
    """Text rows do not read visual columns in layers at..until-1; the visual tokens live on.

    Attributes:
        sink: where the attention mass goes: ``renormalise`` (masked before the softmax), ``first`` (summed onto the
            first visual token) or ``zero`` (set to zero after the softmax, as VisiPruner's code does).
        readers: whose reading is muted; VisiPruner's layer 0 also mutes visual rows.
        columns: all visual columns, or the first half of them (VisiPruner's 13b form).
        during: ``all``, or only the ``prefill``: then tokens behind the prompt read as usual, as in VisiPruner's code.
    """

    action: Literal["mute"]
    sink: Literal["renormalise", "first", "zero"] = "renormalise"
    readers: Literal["text", "visual", "all"] = "text"
    columns: Literal["all", "first_half"] = "all"
    during: Literal["all", "prefill"] = "all"


class Freeze(_Range):
    """Visual rows are not updated in layers at..until-1; they still serve as keys and values."""

    action: Literal["freeze"]


Action = Annotated[Withdraw | Keep | Mute | Freeze, Field(discriminator="action")]


class Schedule(Section):
    """What happens to visual tokens at each layer, with its provenance.

    Attributes:
        format_version: of the canonical form.
        actions: in order of their start layers.
        provenance: model id and revision, the calibration that produced it, tool version.
    """

    format_version: Literal[1] = FORMAT_VERSION
    actions: tuple[Action, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _schedule_key(cls, data: Any) -> Any:
        # a recipe calls the list "schedule"; a file may too
        if isinstance(data, Mapping) and "schedule" in data and "actions" not in data:
            data = dict(data)
            data["actions"] = data.pop("schedule")
        return data

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        last, withdrawn = 0, None
        for number, action in enumerate(self.actions, 1):
            if withdrawn is not None:
                raise ValueError(
                    f"action {number} ({action.action}) comes after the withdrawal of all visual tokens"
                )
            start = getattr(action, "after", None) if action.at == "auto" else action.at
            if isinstance(start, int):
                if start < last:
                    raise ValueError(
                        f"action {number} ({action.action}) starts at {start}, before the one above it"
                    )
                last = start
            if isinstance(action, Withdraw):
                withdrawn = number
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
        """Read a schedule from YAML or JSON, or out of a calibration result.

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
        if isinstance(node, dict) and isinstance(node.get("schedule"), dict):  # a calibration result
            node = node["schedule"]
        if isinstance(node, dict) and "schedule" in node and "actions" not in node:
            node["actions"] = node.pop("schedule")
        return documents.validate(node, cls, str(path), "schedule")

    @property
    def is_static(self) -> bool:
        """Whether the layer and number of tokens of every action are known before a sample is seen."""
        return all(
            action.at != "auto" and not (isinstance(action, Keep) and action.select.above is not None)
            for action in self.actions
        )

    def check_depth(self, layers: int, first_withdrawal: int = 0) -> None:
        """Validate against a model.

        Args:
            layers: number of decoder layers L; a start at L means "never".
            first_withdrawal: the first layer at which the family's visual tokens may leave.

        Raises:
            UsageError: an action lies outside the model.
        """
        earliest = 0
        for number, action in enumerate(self.actions, 1):
            bounds = [
                ("at", action.at),
                ("until", getattr(action, "until", 0)),
                ("after", getattr(action, "after", 0)),
            ]
            for name, value in bounds:
                if isinstance(value, int) and value > layers:
                    raise UsageError(
                        f"schedule action {number} ({action.action}): {name} is {value}, "
                        f"but the model has {layers} layers (0..{layers - 1})"
                    )
            if isinstance(action, Withdraw | Keep):
                # the first condition is looked at one layer behind 'after', and holds from the next layer on
                start = (
                    (-1 if action.after is None else action.after) + 2 if action.at == "auto" else action.at
                )
                earliest = max(earliest, start)
                if earliest < first_withdrawal:
                    raise UsageError(
                        f"schedule action {number} ({action.action}) starts at layer {earliest}, but this family "
                        f"still adds vision in layers 0..{first_withdrawal - 1}",
                        f"start at {first_withdrawal} or later",
                    )

    def visual_per_layer(self, layers: int, visual: int) -> list[int]:
        """Number of visual tokens present in each layer for a sample that has ``visual`` of them.

        Raises:
            UsageError: the schedule is dynamic, so the numbers are known only after a run.
        """
        if not self.is_static:
            raise UsageError("a dynamic schedule has no fixed token counts", "run it and read its trace")
        counts, present = [], visual
        for layer in range(layers):
            for action in self.actions:
                if action.at != layer:
                    continue
                if isinstance(action, Withdraw):
                    present = 0
                elif isinstance(action, Keep):
                    present = kept_count(action.select, present)
            counts.append(present)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """The canonical form: plain JSON values, only the keys that say something."""
        data: dict[str, Any] = {
            "format_version": self.format_version,
            "actions": [_lean(action) for action in self.actions],
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


def kept_count(select: Select, present: int) -> int:
    """How many of ``present`` tokens a ratio or a count keeps (a ratio rounds up)."""
    if select.count is not None:
        return min(select.count, present)
    if select.ratio is not None:
        return min(present, -int(-select.ratio * present // 1))
    raise UsageError("a threshold keeps a number of tokens that depends on the sample")


def _lean(action: Section) -> dict[str, Any]:
    """An action without the keys that hold their defaults; ``at`` and ``action`` first."""
    full = action.model_dump(exclude_defaults=True)
    ordered = {"at": full.pop("at"), **({"until": full.pop("until")} if "until" in full else {})}
    return {**ordered, "action": full.pop("action"), **full}
