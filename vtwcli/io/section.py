"""The base of the documents that people write."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_before_validator_function


class Section(BaseModel):
    """Base of the documents that people write.

    Unknown keys are errors and values never change; true and false are no numbers; a text is one that a file's name
    and a program's argument can hold.
    """

    # schemas are built on first use: help pages read the fields only
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: CoreSchema = _stricter(handler(source), cls)
        return schema


def _stricter(schema: Any, cls: type[BaseModel]) -> Any:
    """A schema of pydantic with a look at the values of its numbers and texts before they are read."""
    if isinstance(schema, list):
        return [_stricter(one, cls) for one in schema]
    if not isinstance(schema, dict) or schema.get("cls", cls) is not cls:
        return schema  # another class has seen to itself
    if schema.get("type") in ("int", "float") or 1 in schema.get("expected", ()):
        return no_info_before_validator_function(_no_truth, schema)
    if schema.get("type") == "str":
        return no_info_before_validator_function(_no_strange_text, schema)
    return {key: one if key == "metadata" else _stricter(one, cls) for key, one in schema.items()}


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _no_strange_text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            strange = "\0" in value
            value.encode("utf-8", "surrogateescape")  # as the system gives names that are not UTF-8
        except UnicodeEncodeError:
            strange = True
        if strange:
            raise ValueError("holds a null character or half of one")
    return value
