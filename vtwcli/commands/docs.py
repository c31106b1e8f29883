"""``vtw docs``."""

from __future__ import annotations

import re
import sys
from typing import Any

from vtwcli.commands.flags import argument, flags
from vtwcli.docs import PAGES, contents, page
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.io.documents import nearest

EXAMPLES = """
Examples:

  vtw docs

  vtw docs methods

  vtw docs data > data.md

What to try first:  vtw calibrate demo
"""

_MANY = 6  # columns of a table that is not squeezed into a terminal
_PICTURE = re.compile(r"^!\[([^]]*)\]\([^)]*\)$", re.MULTILINE)
_TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)
_LINK = re.compile(r"\[([^]]*)\]\((\w+)\.md(?:#[^)]*)?\)")


@flags(argument("page", str, "[PAGE]", "Which page; without it they are listed.", None))
def command(**given: Any) -> None:
    """Show the documentation: how things are chosen, measured, exported, and how to extend them.

    In a terminal a page is laid out; in a pipe it is the Markdown that
    it is written in.
    """
    name = given["page"]
    if name is None:
        _list()
        return
    if name not in PAGES:
        close = nearest(name, PAGES)
        hint = f"did you mean {close!r}?" if close else f"one of {', '.join(PAGES)}"
        raise UsageError(f"there is no page {name!r}", hint)
    text = page(name)
    if not sys.stdout.isatty():
        console.result_text(text)
        return
    from rich.markdown import Markdown

    console.result(Markdown(for_terminal(text, console.stdout().width), hyperlinks=False))


def for_terminal(text: str, width: int) -> str:
    """A page as a terminal can show it: no pictures, commands in place of links, wide tables as lists."""
    text = _LINK.sub(r"\1 (`vtw docs \2`)", _PICTURE.sub(r"*(picture: \1)*", text))
    return _TABLE.sub(lambda found: _narrow(found[0], width), text)


def _narrow(table: str, width: int) -> str:
    """A table, or the list of its rows where it has many columns and is wider than the terminal."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    head, _, *body = rows
    if len(head) < _MANY or max(map(len, table.splitlines())) <= width:
        return table
    lines = []
    for first, *others in body:
        said = (f"{name}: {cell}" for name, cell in zip(head[1:], others, strict=True) if cell)
        lines.append(f"- **{first}**: {'; '.join(said)}")
    return "\n".join(lines) + "\n"


def _list() -> None:
    from rich.table import Table

    view = Table(box=None, pad_edge=False, show_header=False)
    view.add_column(no_wrap=True, style="bold")
    view.add_column(overflow="fold")
    for name, told in contents().items():
        view.add_row(name, told)
    console.result(view)
    console.result("\nvtw docs PAGE shows one.")
