"""Reads YAML and JSON documents into pydantic models and says precisely what is wrong with them.

One message names the file, line, column and key, and the nearest known key where a key is unknown. YAML is 1.2:
``1e-3`` is a number and a duplicate key is an error.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vtwcli.errors import UsageError
from vtwcli.io.files import regular
from vtwcli.io.nesting import DEEPEST, Location, MisshapenError, TooDeepError, check_size

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
_LARGE = 50_000  # characters; larger JSON is read by the fast reader, which keeps no line numbers
_MOST_YAML = 200_000  # characters; the YAML reader takes seconds for them
_MOST_BYTES = 256 << 20
_MOST_VALUES = 100_000  # that aliases may stand for, besides what is written out
_LARGEST = 2**63 - 1


class InvalidDocument(UsageError):
    """A document that is not what it should be; ``problems`` are all that were found, in the order of the document."""

    def __init__(self, problems: Sequence[UsageError]) -> None:
        first, *others = self.problems = list(problems)
        hint = first.hint
        if others:
            count = f"{len(others)} more problem{'s' if len(others) > 1 else ''} in this document"
            hint = f"{hint} {count}" if hint else count
        super().__init__(first.message, hint)


def all_problems(error: UsageError) -> Sequence[UsageError]:
    """Each thing that is wrong with a document, of the error that reading it raised."""
    return error.problems if isinstance(error, InvalidDocument) else [error]


def read(path: Path, kind: str) -> Any:
    """The document at ``path`` as ruamel's round-trip data, which remembers lines.

    Args:
        kind: what the document is, for messages ("recipe", "schedule").

    Raises:
        UsageError: unreadable file, or text that is not YAML, with line and column.
    """
    try:
        with regular(path).open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise UsageError(f"{path}: cannot read the {kind}: it is larger than {_MOST_BYTES >> 20} MiB")
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:  # a name may be one that no file can have
        not_text = isinstance(error, UnicodeDecodeError)
        reason = "not UTF-8 text" if not_text else getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot read the {kind}: {reason}") from None
    return parse(text, str(path), kind)


def parse(text: str, name: str, kind: str) -> Any:
    """Like ``read``, for text that is at hand already; ``name`` stands for the file in messages."""
    if len(text) > _LARGE and text.lstrip()[:1] in ("{", "["):
        try:
            return parse_json(text, name)
        except ValueError as error:  # of what is not too long for it YAML tells the line
            if len(text) > _MOST_YAML:
                raise UsageError(f"{name}: not valid JSON: {error}") from None
    hint = f"the {kind} must be one YAML document"
    try:
        node = _yaml(text, name, hint)
    except RecursionError:
        raise UsageError(f"{name}: {TooDeepError()}", hint) from None
    _check_size(node, name, _MOST_VALUES + len(text))
    return node


def parse_json(text: str, name: str) -> Any:
    """JSON without line numbers.

    Raises:
        ValueError: not JSON, or a key is there twice.
        UsageError: too deep, or a number that is too large.
    """
    try:
        node = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise UsageError(f"{name}: {TooDeepError()}") from None
    _check_size(node, name, len(text))
    return node


def _yaml(text: str, name: str, hint: str) -> Any:
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > _MOST_YAML:
        raise UsageError(
            f"{name}: YAML of {len(text):,} characters is too long, {_MOST_YAML:,} are taken", hint
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor that is used again is fine
            _check_aliases(text, name)
            return _reader().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = " ".join((error.problem or "not valid YAML").split())
        raise UsageError(f"{place}: {problem}", hint) from None
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name}: not valid YAML: {reason}", hint) from None
    except (AttributeError, TypeError, KeyError, IndexError):  # the reader's own trouble with odd documents
        raise UsageError(f"{name}: not valid YAML: a key, an anchor or a tag cannot be read", hint) from None


def _reader() -> Any:
    """ruamel's reader, which stops where brackets go too deep: its time grows with the square of their number."""
    from ruamel.yaml import YAML
    from ruamel.yaml.scanner import RoundTripScanner

    class Scanner(RoundTripScanner):
        def fetch_flow_collection_start(self, *given: Any, **named: Any) -> None:
            if len(self.flow_context) > DEEPEST:
                raise RecursionError
            super().fetch_flow_collection_start(*given, **named)

    yaml = YAML(typ="rt")
    yaml.Scanner = Scanner
    return yaml


def _check_aliases(text: str, name: str) -> None:
    """Refuse an alias inside of what it names, which the reader would turn into nothing."""
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

    if "&" not in text or "*" not in text:
        return
    inside: list[str | None] = []
    for event in _reader().parse(text):
        if isinstance(event, CollectionStartEvent):
            inside.append(event.anchor)
        elif isinstance(event, CollectionEndEvent):
            inside.pop()
        elif isinstance(event, AliasEvent) and event.anchor in inside:
            mark = event.start_mark
            raise UsageError(
                f"{name}:{mark.line + 1}:{mark.column + 1}: *{event.anchor} lies in what it names"
            )


def _check_size(node: Any, name: str, most: int) -> None:
    """Refuse what is too large, with the place and the key.

    Raises:
        UsageError: see above.
    """
    try:
        check_size(node, most, _LARGEST)
    except MisshapenError as error:
        key = ".".join(str(part) for part in error.path) or "document"
        raise UsageError(f"{name}{position(error.path, node)}: {key}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
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
        InvalidDocument: what is wrong, with its place.
    """
    return check(node, model.model_validate, name, kind, model.model_json_schema, origins)


def check(
    node: Any,
    validated: Callable[[Any], T],
    name: str,
    kind: str,
    schema: Callable[[], dict[str, Any]] = dict,
    origins: Mapping[str, str] | None = None,
) -> T:
    """Like ``validate``, by any of pydantic's validators.

    Args:
        validated: makes of plain data what is asked for, or raises pydantic's error.
        schema: what keys there are, where others are errors.
    """
    if not isinstance(node, dict):
        found = "an empty file" if node is None else type(plain(node)).__name__
        raise UsageError(f"{name}: a {kind} must be a mapping of keys to values, not {found}")
    try:
        return validated(plain(node))
    except ValidationError as error:
        raise InvalidDocument(_problems(error, node, schema, name, origins or {})) from None


def load(path: Path, model: type[Model], kind: str) -> Model:
    """Read and validate the document at ``path``."""
    return validate(read(path, kind), model, str(path), kind)


def _problems(
    error: ValidationError,
    node: Any,
    schema: Callable[[], dict[str, Any]],
    name: str,
    origins: Mapping[str, str],
) -> list[UsageError]:
    """A validation's errors as messages, in the order of the document; one for each place."""
    found: dict[Location, tuple[tuple[int, ...], UsageError]] = {}
    for one in error.errors(include_url=False):
        location, message, hint = _described(one, node, schema)
        key = ".".join(str(part) for part in location) or "document"
        origin = origins.get(key)
        where = origin or f"{name}{position(location, node)}"
        at = () if origin else tuple(int(part) for part in position(location, node).split(":")[1:])
        found.setdefault(location, (at, UsageError(f"{where}: {key}: {message}", hint)))
    return [problem for _, problem in sorted(found.values(), key=lambda entry: entry[0])]


def _described(one: Any, node: Any, schema: Callable[[], dict[str, Any]]) -> tuple[Location, str, str | None]:
    """Of one of a validation's errors the place in the document, the message and the hint."""
    context = one.get("ctx", {})  # a check of a section as a whole says which key below it is meant
    value = context.get("given", one["input"])
    location = (*one["loc"], *context.get("below", ()))
    location = _in_document(location, node, one["type"] in ("extra_forbidden", "missing"))
    if one["type"] == "extra_forbidden":
        near = nearest(str(location[-1]), _known_keys(schema(), location[:-1]))
        return location, f"unknown key {str(location[-1])!r}", f"did you mean {near!r}?" if near else None
    if one["type"] == "missing":
        return location, "this key is required", None
    if one["type"] == "union_tag_not_found":
        return location, f"the key {one['ctx']['discriminator']} is required", None
    if one["type"] == "union_tag_invalid":
        tag = one["ctx"]["discriminator"].strip("'")
        message = f"unknown {tag} {one['ctx']['tag']!r}, must be one of {one['ctx']['expected_tags']}"
        return (*location, tag), message, None
    message = one["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    message = message[:1].lower() + message[1:]
    if isinstance(value, str | int | float | bool):
        message += f", got {_short(value)}"
    return location, message, None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text):,} characters)"


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


def position(location: Location, document: Any) -> str:
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


def _known_keys(schema: dict[str, Any], location: Location) -> list[str]:
    """Every key that a JSON schema allows in the mapping at ``location``."""
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
