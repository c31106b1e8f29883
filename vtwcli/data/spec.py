"""A data source of the mix as a user names it, in a recipe or on the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from vtwcli.errors import UsageError
from vtwcli.io.documents import nearest
from vtwcli.io.section import Section


class Columns(Section):
    """Names of a data source's columns; None means the usual names, or the task row's own."""

    image: str | None = Field(
        default=None, description="image: a path, bytes or an image; by default image or file_name"
    )
    question: str | None = Field(default=None, description="question text; by default question")
    answer: str | None = Field(
        default=None, description="accepted answer or answers; by default answer or answers"
    )
    choices: str | None = Field(default=None, description="list of options; by default choices, if present")
    task: str | None = Field(default=None, description="task name of each row; by default task, if present")


class DataSpec(Section):
    """One data source of the mix and how to read it.

    ``source`` is ``demo``, a built-in task (``scienceqa``, ``gqa``, ...), a local directory or file, or the
    name of a data set on the Hub, in this order; write ``./demo`` for a directory of that name.
    """

    source: str = Field(description="demo, a built-in task, a local path or a Hub data set")
    task: str | None = Field(
        default=None, description="name of the task in the mix; by default the source's own"
    )
    tasks: tuple[str, ...] | None = Field(default=None, description="take only these tasks of the source")
    split: str | None = Field(default=None, description="split to read")
    config: str | None = Field(default=None, description="configuration of a Hub data set")
    revision: str | None = Field(default=None, description="branch, tag or commit of a Hub data set")
    path: str | None = Field(default=None, description="local copy of a built-in task's data set")
    folder: str | None = Field(
        default=None, description="where relative paths of pictures begin; by default beside the file of rows"
    )
    limit: int | None = Field(default=None, ge=1, description="samples per task")
    order: Literal["shuffle", "first"] = Field(
        default="shuffle",
        description="shuffle: a seeded draw; first: the first rows, as published searches do",
    )
    prompt: str | None = Field(default=None, description="template with {question}, {choices} or any column")
    system: str | None = Field(
        default=None, description="text of a system turn, for templates that send none of their own"
    )
    image: Literal["pad"] | None = Field(
        default=None,
        description="pad: pictures are made square with bars of CLIP's mean colour, as LLaVA-1.5 saw them",
    )
    metric: str | None = Field(default=None, description="metric that judges the answers")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="longest answer in tokens, where the command names none"
    )
    columns: Columns = Columns()

    @field_validator("source")
    @classmethod
    def _has_source(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a data source needs a name or a path")
        return value

    @field_validator("image", mode="before")
    @classmethod
    def _is_no_column(cls, value: Any) -> Any:
        if value not in (None, "pad"):
            raise ValueError(f"{value!r} is not pad; a column is named with columns.image")
        return value

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_tasks(cls, value: Any) -> Any:
        return tuple(value.split("+")) if isinstance(value, str) else value

    def written(self, **columns: str) -> str:
        """The command line's form; ``columns`` name further ones."""
        values = self.model_dump(exclude_defaults=True, exclude={"source", "columns"})
        named = self.columns.model_dump(exclude_none=True) | columns
        values |= {f"columns.{role}": name for role, name in named.items()}
        texts = {key: "+".join(value) if key == "tasks" else str(value) for key, value in values.items()}
        keys = ",".join(f"{key}={text}".replace("\n", "\\n") for key, text in texts.items())
        return f"{self.source}:{keys}" if keys else self.source

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """Read the command line's form ``SOURCE[:key=value,...]``.

        Keys are this class's fields and ``columns.NAME``; ``tasks`` takes names joined by ``+``; ``\\n`` in a
        prompt or a system turn is a line break. A comma begins a new key only if ``key=`` follows it, so that prompts
        may hold commas. Text that is an existing path is a path, whatever characters it holds.

        Raises:
            UsageError: unknown or repeated keys, values of the wrong type, or no source.
        """
        source, options = text, ""
        if not is_path(text):
            match = re.match(r"(.+?):(?=[\w.]+=)(.*)$", text, flags=re.DOTALL)
            if match:
                source, options = match.groups()
            elif ":" in text:
                rest = text.split(":", 1)[1]
                raise UsageError(
                    f"data source {text!r}: {rest!r} is not KEY=VALUE", f"known keys: {_KEYS_TEXT}"
                )
        values: dict[str, Any] = {"source": source}
        columns: dict[str, str] = {}
        for item in re.split(r",(?=[\w.]+=)", options) if options else ():
            key, value = item.split("=", 1)
            if key not in _KEYS:
                close = nearest(key, _KEYS)
                hint = f"did you mean {close!r}?" if close else f"known keys: {_KEYS_TEXT}"
                raise UsageError(f"data source {text!r}: unknown key {key!r}", hint)
            target, name = (columns, key[len("columns.") :]) if key.startswith("columns.") else (values, key)
            if name in target:
                raise UsageError(f"data source {text!r}: key {key!r} is given twice")
            target[name] = value.replace("\\n", "\n") if key in ("prompt", "system") else value
        try:
            return cls(**values, columns=Columns(**columns))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"data source {text!r}: {where}: {reason}") from None


def is_path(text: str) -> bool:
    """Whether something on disk has this name."""
    try:
        return Path(text).exists()
    except OSError:  # a prompt can be longer than a file name may be
        return False


def source_names(specs: Sequence[DataSpec], built_in: Collection[str]) -> list[str]:
    """What the ids of samples call each source of a mix, the same on every machine.

    A local path goes by its last part, or by as many as tell it from the other sources; any other source by its own
    name.

    Args:
        built_in: names of sources that are no paths, whatever is on disk.
    """
    paths = {
        spec.source: Path(os.path.normpath(Path(spec.source).expanduser().absolute())).parts
        for spec in specs
        if spec.source not in built_in and is_path(str(Path(spec.source).expanduser()))
    }
    every = {paths.get(spec.source, tuple(spec.source.split("/"))) for spec in specs}

    def name(source: str) -> str:
        own = paths.get(source, ())
        tails = (own[-n:] for n in range(1, len(own)))
        told = (tail for tail in tails if all(other[-len(tail) :] != tail for other in every - {own}))
        return "/".join(next(told, own[1:])) or source

    return [name(spec.source) for spec in specs]


_KEYS = tuple(
    [name for name in DataSpec.model_fields if name not in ("source", "columns")]
    + [f"columns.{name}" for name in Columns.model_fields]
)
_KEYS_TEXT = ", ".join(_KEYS)
