"""Rows that hold a conversation: OpenAI's messages, and the turns of LLaVA's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from vtwcli.data.cells import IMAGE_MARK, BadRow, Row, missing, shown
from vtwcli.io import console

COLUMNS = ("messages", "conversations", "conversation")
"""Where a conversation stands."""

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
}
_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")


@dataclass(frozen=True)
class Exchange:
    """The first question of a conversation, and what is answered.

    Attributes:
        question: the text, with a mark ``<image>`` where an image stands.
        answer: text, or None where nobody answers.
        system: text of the turns before it, or None.
        images: what the parts of the question hold themselves; None for one that stands in a column of the row.
        marks: how many images all questions of the conversation name.
    """

    question: str
    answer: str | None
    system: str | None
    images: tuple[Any, ...]
    marks: int

    def pictures(self, beside: Sequence[Any]) -> list[Any]:
        """The question's images, of which ``beside`` stand in a column of the row, in order.

        Raises:
            BadRow: another number than the question names.
        """
        named = self.question.count(IMAGE_MARK)
        if self.images:
            rest = iter(beside)
            found = [next(rest, None) if image is None else image for image in self.images]
            if any(image is None for image in found):
                raise BadRow(f"the question has {named} images, but there are {len(beside)} beside it")
            return found
        # those of later questions stand behind
        return list(beside[:named]) if named and self.marks == len(beside) else list(beside)


def exchange(row: Row, given: str | None) -> Exchange | None:
    """The first exchange of a row's conversation; None for a row that has none.

    Args:
        given: name of the column, if it is named; a row with a column ``question`` is none otherwise.

    Raises:
        BadRow: a conversation that cannot be read, or without a question.
    """
    names = [given] if given else [] if "question" in row else COLUMNS
    name = next((one for one in names if one in row), None)
    turns = None if name is None else _turns(row[name])
    if name is None or turns is None:
        return None
    if not any(role == "user" for role, _ in turns):
        raise BadRow(f"column {name!r} has no turn of the user")
    began = [role for role, _ in turns].index("user")
    system = [_said(content, name)[0] for role, content in turns[:began] if role == "system"]
    ended = next((i for i in range(began, len(turns)) if turns[i][0] != "user"), len(turns))
    questions = [_said(content, name) for _, content in turns[began:ended]]
    answer = None
    if ended < len(turns) and turns[ended][0] == "assistant":
        answer = _said(turns[ended][1], name)[0]
    later = [_said(content, name)[0] for role, content in turns[ended:] if role == "user"]
    if later:
        _warn_of_turns()
    question = "\n".join(text for text, _ in questions)
    marks = question.count(IMAGE_MARK) + sum(text.count(IMAGE_MARK) for text in later)
    if (
        _is_llavas(row[name]) and question.count(IMAGE_MARK) == 1
    ):  # which LLaVA puts in front, wherever it stands
        question = f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, '').strip()}"
    images = tuple(image for _, some in questions for image in some)
    return Exchange(question, answer, "\n".join(system) or None, images, marks)


@cache
def _warn_of_turns() -> None:
    console.warn("some conversations have several questions: the first one and its answer are taken")


def _is_llavas(value: Any) -> bool:
    turns = json.loads(value) if isinstance(value, str) else value
    return any("from" in turn for turn in turns)


def _turns(value: Any) -> list[tuple[str, Any]] | None:
    """Role and content of each turn; None for a cell that is no conversation."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not value:
        return None
    found = []
    for turn in value:
        role = turn.get("role") or turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str):
            return None
        content = turn.get("content")
        found.append((_ROLES.get(role, role), turn.get("value") if content is None else content))
    return found


def _said(content: Any, column: str) -> tuple[str, list[Any]]:
    """A turn's text with marks for its images, and the images of its parts; None for one that is elsewhere.

    Raises:
        BadRow: it holds something else.
    """
    if isinstance(content, str):
        return content, []
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadRow(f"column {column!r} has a turn without text")
    pieces: list[str] = []
    images: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or kind in _TEXTS or (kind is None and part.get("text")):
            text = part if isinstance(part, str) else part.get("text") or part.get("content") or ""
            pieces.append("\n" * bool(pieces and pieces[-1] != IMAGE_MARK) + str(text))
        elif kind in _IMAGES:
            pieces.append(IMAGE_MARK)
            images.append(_image(part))
        else:
            raise BadRow(f"column {column!r} has a part of the type {shown(kind)}: text and images are read")
    return "".join(pieces), images


def _image(part: dict[str, Any]) -> Any:
    """What stands for an image in a part; None where it is in a column of the row."""
    for name in ("image", "image_url", "url", "path", "base64"):
        value = part.get(name)
        if isinstance(value, dict) and not missing(value.get("url")):
            value = value["url"]
        if not missing(value):
            return value.removeprefix("file://") if isinstance(value, str) else value
    return None
