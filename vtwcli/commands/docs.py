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

_PICTURE = re.compile(r"^!\[([^]]*)\]\([^)]*\)$", re.MULTILINE)
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

    text = _LINK.sub(r"\1 (`vtw docs \2`)", _PICTURE.sub(r"*(picture: \1)*", text))
    console.result(Markdown(text, hyperlinks=False))


def _list() -> None:
    from rich.table import Table

    view = Table(box=None, pad_edge=False, show_header=False)
    view.add_column(no_wrap=True, style="bold")
    view.add_column(overflow="fold")
    for name, told in contents().items():
        view.add_row(name, told)
    console.result(view)
    console.result("\nvtw docs PAGE shows one.")
