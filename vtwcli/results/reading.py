"""Reads result files that other commands wrote, and says which key is wrong where a file is not what it should be."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, TypeAdapter
from pydantic_core import SchemaValidator

from vtwcli.io import documents
from vtwcli.results import calibration, evaluation, search
from vtwcli.results.calibration import (
    CalibratedOn,
    Calibration,
    SearchedCalibration,
    VtwCalibration,
    is_searched,
)
from vtwcli.results.document import UNCHECKED
from vtwcli.results.evaluation import Evaluation


def read_calibration(path: Path | None) -> Calibration | None:
    """The result document of ``vtw calibrate``; None without a path.

    Raises:
        UsageError: unreadable, or not such a document; names file and key.
    """
    if path is None:
        return None
    return _calibration(documents.read(path, "calibration result"), path)


def calibration_in(path: Path) -> Calibration | CalibratedOn | None:
    """The result of a calibration or a search in a file that may as well hold a schedule; None if it does.

    Raises:
        UsageError: unreadable, or a result that is not valid.
    """
    node = documents.read(path, "schedule")
    if isinstance(node, dict) and node.get("format") == search.FORMAT:
        return cast(CalibratedOn, _checked(node, path, search.Search, "result of a search"))
    return _calibration(node, path) if isinstance(node, dict) and "format" in node else None


def read_evaluation(path: Path | None) -> Evaluation | None:
    """The result document of ``vtw eval``; None without a path.

    Raises:
        UsageError: unreadable, or not such a document; names file and key.
    """
    if path is None:
        return None
    node = documents.read(path, "evaluation result")
    found = cast(Evaluation, _checked(node, path, Evaluation, "evaluation result"))
    for name, row in found["schedules"].items():
        _check_schedule(row["schedule"], f"{path}: schedules.{name}")
    return found


def _calibration(node: Any, path: Path) -> Calibration:
    kind: Any = SearchedCalibration if isinstance(node, dict) and is_searched(node) else VtwCalibration
    found = cast(Calibration, _checked(node, path, kind, "calibration result"))
    if found["schedule"] is not None:
        _check_schedule(found["schedule"], f"{path}: schedule")
    return found


def _checked(node: Any, path: Path, kind: Any, words: str) -> Any:
    documents.check(node, _validator(kind).validate_python, str(path), words)
    return documents.plain(node)


def _check_schedule(schedule: dict[str, Any], name: str) -> None:
    from vtwcli.schedule.schedule import Schedule

    Schedule.from_dict(schedule, name)


_WHOLE: dict[Any, Any] = {
    VtwCalibration: calibration.fits_together,
    Evaluation: evaluation.fits_together,
}


@cache
def _validator(kind: Any) -> SchemaValidator:
    """What checks a document of a kind: every key that is not ``Unchecked``, then the document as a whole."""
    whole = Annotated[kind, AfterValidator(_WHOLE.get(kind, lambda document: document))]
    return SchemaValidator(_checked_keys(TypeAdapter(whole).core_schema))


def _checked_keys(schema: Any) -> Any:
    """A schema of pydantic without the keys of TypedDicts that are ``Unchecked``."""
    if isinstance(schema, list):
        return [_checked_keys(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "typed-dict":
        fields = schema["fields"].items()
        checked = {
            key: field for key, field in fields if UNCHECKED not in field["schema"].get("metadata", ())
        }
        schema = {**schema, "fields": checked}
    return {key: _checked_keys(value) for key, value in schema.items()}
