"""Reads YAML and JSON documents into pydantic models and says precisely what is wrong with them.

One message names the file, line, column and key, and the nearest known key where a key is unknown. YAML is 1.2:
``1e-3`` is a number and a duplicate key is an error.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vtwcli.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)
_LARGE = 50_000  # characters; larger JSON is read by the fast reader, which keeps no line numbers
Location = tuple[str | int, ...]


class Section(BaseModel):
    """Base of the documents that people write: unknown keys are errors and values never change."""

    # schemas are built on first use: help pages read the fields only
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


def read(path: Path, kind: str) -> Any:
    """The document at ``path`` as ruamel's round-trip data, which remembers lines.

    Args:
        kind: what the document is, for messages ("recipe", "schedule").

    Raises:
        UsageError: unreadable file, or text that is not YAML, with line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"{path}: cannot read the {kind}: {reason}") from None
    return parse(text, str(path), kind)


def parse(text: str, name: str, kind: str) -> Any:
    """Like ``read``, for text that is at hand already; ``name`` stands for the file in messages."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > _LARGE and text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            pass  # YAML tells the line
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor that is used again is fine
            return YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = " ".join((error.problem or "not valid YAML").split())
        raise UsageError(f"{place}: {problem}", f"the {kind} must be one YAML document") from None
    except (YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{name}: not valid YAML: {reason}", f"the {kind} must be one YAML document"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def plain(node: Any) -> Any:
    """Round-trip data as plain dicts, lists, strings and numbers."""
    if isinstance(node, dict):
        return {plain(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    if node is None:
        return None
    # ruamel keeps booleans with an anchor as its own integer type; dates and tagged values are text here
    return bool(node) if type(node).__name__ == "ScalarBoolean" else str(getattr(node, "value", node))


def validate(
    node: Any, model: type[Model], name: str, kind: str, origins: Mapping[str, str] | None = None
) -> Model:
    """Validate round-trip data against ``model``.

    Args:
        name: stands for the document in messages.
        origins: dotted keys whose values did not come from the document, and where they did come from.

    Raises:
        UsageError: the first thing that is wrong, with its place; others are counted.
    """
    if not isinstance(node, dict):
        found = "an empty file" if node is None else type(plain(node)).__name__
        raise UsageError(f"{name}: a {kind} must be a mapping of keys to values, not {found}")
    try:
        return model.model_validate(plain(node))
    except ValidationError as error:
        raise UsageError(*describe(error, node, model, name, origins or {})) from None


def load(path: Path, model: type[Model], kind: str) -> Model:
    """Read and validate the document at ``path``."""
    return validate(read(path, kind), model, str(path), kind)


def describe(
    error: ValidationError, node: Any, model: type[BaseModel], name: str, origins: Mapping[str, str]
) -> tuple[str, str | None]:
    """Message and hint for the first of a validation's errors."""
    first, *others = error.errors(include_url=False)
    names_a_key = first["type"] in ("extra_forbidden", "missing")
    location = _in_document(first["loc"], node, names_a_key)
    key = ".".join(str(part) for part in location) or "document"
    hint = None
    if first["type"] == "extra_forbidden":
        near = nearest(str(location[-1]), _known_keys(model, location[:-1]))
        message = f"unknown key {str(location[-1])!r}"
        hint = f"did you mean {near!r}?" if near else None
    elif first["type"] == "missing":
        message = "this key is required"
    elif first["type"] == "union_tag_not_found":
        message = f"the key {first['ctx']['discriminator']} is required"
    elif first["type"] == "union_tag_invalid":
        tag = first["ctx"]["discriminator"].strip("'")
        message = f"unknown {tag} {first['ctx']['tag']!r}, must be one of {first['ctx']['expected_tags']}"
        location = (*location, tag)
        key = ".".join(str(part) for part in location)
    else:
        message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
        message = message[:1].lower() + message[1:]
        if isinstance(first["input"], str | int | float | bool):
            message += f", got {first['input']!r}"
    if others:
        count = f"{len(others)} more problem{'s' if len(others) > 1 else ''} in this document"
        hint = f"{hint} {count}" if hint else count
    place = origins.get(key) or f"{name}{_place(location, node)}"
    return f"{place}: {key}: {message}", hint


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like ``word``, or None when nothing is close."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _in_document(location: Location, node: Any, names_a_key: bool) -> Location:
    """Drop the parts that pydantic adds for unions: whatever the document does not hold.

    The last part stays where the error is about a key that is missing (``names_a_key``).
    """
    kept: list[str | int] = []
    for i, part in enumerate(location):
        inside = (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if inside:
            kept.append(part)
            node = node[part]
        elif names_a_key and i == len(location) - 1 and isinstance(node, dict):
            kept.append(part)
    return tuple(kept)


def _place(location: Location, document: Any) -> str:
    """``:line:column`` of the deepest part of ``location`` that exists in the document."""
    place, node = "", document
    for part in location:
        try:
            marks: Any = getattr(node, "lc", None)  # only ruamel's own mappings and lists remember lines
            line, column = marks.key(part) if isinstance(node, dict) else marks.item(part)
            place = f":{line + 1}:{column + 1}"
        except (KeyError, IndexError, AttributeError, TypeError):
            pass  # a part that was not in the text, such as a missing key or a list that was wrapped
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            break
    return place


def _known_keys(model: type[BaseModel], location: Location) -> list[str]:
    """Every key that the schema of ``model`` allows in the mapping at ``location``."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})

    def branches(part: Any) -> list[dict[str, Any]]:
        if "$ref" in part:
            return branches(definitions[part["$ref"].rsplit("/", 1)[1]])
        found = [part]
        for union in ("anyOf", "oneOf", "allOf"):
            for option in part.get(union, ()):
                found += branches(option)
        return found

    places = branches(schema)
    for step in location:
        deeper = []
        for place in places:
            inner = place.get("items") if isinstance(step, int) else place.get("properties", {}).get(step)
            if isinstance(inner, dict):
                deeper += branches(inner)
        places = deeper
    return sorted({key for place in places for key in place.get("properties", {})})


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain values as a YAML document for people."""
    from io import StringIO

    from ruamel.yaml import YAML

    out = StringIO()
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 110
    yaml.dump(data, out)
    return out.getvalue()
