"""The frame of a self-contained HTML page, and what pages have in common."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from vtwcli.io.outputs import GENERATOR
from vtwcli.io.text import visible

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{generator}
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
  color: light-dark(#222, #ddd); background: light-dark(#fff, #181818); overflow-wrap: anywhere }}
h1 {{ line-height: 1.2 }}
.wide {{ overflow-x: auto }}
.wide td, .wide th {{ overflow-wrap: normal; white-space: nowrap }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
.plot {{ max-width: 100%; height: auto; display: block; margin: 1rem 0 }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; margin: 0; min-width: 0 }}
dt {{ color: light-dark(#6b6b6b, #9a9a9a) }} dd {{ margin: 0; white-space: pre-wrap }}
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


def picture(make: Callable[[], Any], words: str) -> str:
    """A figure as an element of a page; a sentence where it cannot be drawn.

    Args:
        make: makes the figure.
        words: what it shows, for those who do not see it.
    """
    from vtwcli.report.plots import draw

    buffer = BytesIO()
    try:
        draw(make(), buffer, format="png", dpi=120, metadata={"Software": None})
    except Exception as error:  # drawing raises whatever data leads it to; the page has more to say
        return f"<p>{text(words)}: this picture cannot be drawn ({type(error).__name__})</p>"
    return f'<img class="plot" alt="{text(words)}" src="{png_uri(buffer.getvalue())}">'


def facts(values: Sequence[tuple[str, str]]) -> str:
    """What is known of a sample, by name."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in values) + "</dl>"
