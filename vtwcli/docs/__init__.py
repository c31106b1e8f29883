"""The pages of documentation beside this file, in Markdown; ``vtw docs`` shows them.

A page is ``NAME.md``, named once in ``PAGES``; its first line, ``# NAME: what it tells``, is its line in the list.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
PAGES = (
    "policies",
    "search",
    "analyze",
    "eval",
    "methods",
    "families",
    "data",
    "export",
    "onnx",
    "recipes",
    "python",
    "lmms",
    "performance",
    "internals",
    "safety",
)
"""Every page, in the order of the list."""


def page(name: str) -> str:
    """The text of a page, one of ``PAGES``."""
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def contents() -> dict[str, str]:
    """What each page tells, in one line."""
    return {name: page(name).partition("\n")[0].partition(": ")[2] for name in PAGES}
