"""What result documents are made of: how their keys are declared, and the parts that several of them have.

A document is one TypedDict: mypy checks it where it is written, ``reading`` where it comes from a file. Whoever adds a
key to a document that files hold already makes it ``NotRequired``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict

# strict: what passes is used as it stands in the file; what the type does not name may be there
STRICT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
UNCHECKED = "unchecked"
"""What the schema of a key that reading does not look at says in its metadata."""


class _Unchecked:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.any_schema(metadata={UNCHECKED: True})


T = TypeVar("T")
Unchecked = Annotated[T, _Unchecked()]
"""A key that is always written and that reading does not look at: in a file it may be missing and be anything."""

Count = Annotated[int, Field(ge=0)]
Depth = Annotated[int, Field(ge=1)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


@dataclass(frozen=True)
class Files:
    """The files of a result: its document and what lies beside it.

    Attributes:
        format: that the document names.
        name: of the document, without its suffix.
        beside: suffixes of the other files, by the name under which their writer knows them.
    """

    format: str
    name: str
    beside: Mapping[str, str]

    def named(self) -> dict[str, str]:
        """The names of all of them, the document as ``result``, where nobody names them otherwise."""
        return {key: self.name + suffix for key, suffix in {"result": ".json", **self.beside}.items()}


class Relative(TypedDict):
    """What a schedule costs in the prompts' prefill, relative to the full model."""

    flops_ratio: dict[str, float]
    """By convention."""
    kv_ratio: float
    """Entries of the KV cache."""


class Dated(TypedDict):
    """Of a model whose chat template asks for today's date."""

    template_date: NotRequired[Unchecked[str]]
    """What it was told."""


class ModelRecord(Dated):
    """Which model it was."""

    name: str
    """As the user gave it: a directory, a Hub id or ``demo``."""
    revision: Unchecked[str | None]
    """The Hub commit; None for a directory."""
    family: Unchecked[str]
    """transformers' ``model_type``."""
    architecture: Unchecked[str]
    """The model's class in transformers."""
    dtype: Unchecked[str]
    """That it ran in, as torch calls it."""


class RunRecord(TypedDict):
    """What differs between equal runs."""

    seconds: Unchecked[dict[str, float]]
    """By part of the work, and ``total``."""
    peak_memory_bytes: Unchecked[dict[str, int]]
    """See ``machine.memory.peak_memory``."""
    processes: Unchecked[int]
    """How many shared the work."""
    device: Unchecked[str]
    """That it ran on, as torch calls it."""


class SweepRun(RunRecord):
    """The run of a sweep over the layers."""

    streamed: Unchecked[bool]
    """Whether layers were read from disk one at a time."""


class Origin(TypedDict):
    """What documents end with: where their numbers come from."""

    data: Unchecked[list[dict[str, Any]]]
    """A record of each source, see ``data.sources.DataMix``."""
    skipped: Unchecked[int]
    """Unreadable rows that were left out."""
    seed: Unchecked[int]
    """Of every draw."""
    versions: Unchecked[dict[str, str]]
    """Of the tool, of Python and of the libraries that numbers depend on."""


class TokenCounts(TypedDict):
    """What ratios of cost refer to."""

    convention: str
    """The one that is shown, of ``judge.flops``."""
    visual_tokens: float
    """Of a prompt, mean."""
    text_tokens: float
    """Of a prompt, mean."""


def has_convention(cost: Any) -> Any:
    """A cost whose tables have an entry for its convention.

    Raises:
        ValueError: names the table that has none.
    """
    for table in ("flops_ratio", "flops_full"):
        if table in cost and cost["convention"] not in cost[table]:
            raise ValueError(f"{table} has no entry for the convention {cost['convention']!r}")
    return cost
