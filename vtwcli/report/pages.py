"""The frame of a self-contained HTML page, and what pages have in common."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from vtwcli.io.outputs import GENERATOR
from vtwcli.io.text import visible

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{generator}
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; margin: 0 }}
dt {{ color: #6b6b6b }} dd {{ margin: 0; white-space: pre-wrap }}
{style}
</style></head><body>
{body}
</body></html>
"""


def text(value: str) -> str:
    """Text from data and models as text of a page."""
    return html.escape(visible(value))


def page(title: str, style: str, body: Sequence[str]) -> str:
    """One page without anything from elsewhere.

    Args:
        title: plain text.
        style: rules of its own.
        body: pieces of HTML.
    """
    return _PAGE.format(title=text(title), generator=GENERATOR, style=style.strip(), body="\n".join(body))


def png_uri(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def facts(values: Sequence[tuple[str, str]]) -> str:
    """What is known of a sample, by name."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in values) + "</dl>"
