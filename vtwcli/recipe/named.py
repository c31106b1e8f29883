"""The section that names a schedule: a file, a layer, or a method with its parameters."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from vtwcli.io.section import Section
from vtwcli.methods import METHODS
from vtwcli.methods.method import Method
from vtwcli.methods.visipruner import Rule

if TYPE_CHECKING:
    MethodName: TypeAlias = str
    Calibrated: TypeAlias = str
else:
    MethodName = Literal[tuple(METHODS)]
    Calibrated = Literal[tuple(name for name, one in METHODS.items() if one.finds)]


class _Named(Section):
    file: str | None = Field(None, description="schedule or calibration result")
    layer: int | None = Field(None, ge=0, description="withdraw at this layer")
    method: MethodName | None = Field(None, description=", ".join(METHODS))


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
