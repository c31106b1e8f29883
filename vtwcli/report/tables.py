"""Tables of plain text: for the terminal, in Markdown, and in HTML."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vtwcli.io.text import markdown
from vtwcli.report import pages

if TYPE_CHECKING:
    from rich import table

Table = tuple[list[str], list[list[str]]]
"""A header and rows, as text."""


def amount(value: float, unit: str) -> str:
    """A number with a decimal prefix, three digits."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def terminal_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Collection[str],
    styles: Iterable[str] = (),
    wrap: bool = False,
) -> table.Table:
    """A table for the terminal.

    Args:
        header: a name for each column.
        rows: their cells.
        left: columns whose text stands at the left; the others hold numbers.
        styles: of each row, where rows have one.
        wrap: cells may break where the terminal is too narrow.
    """
    from rich.table import Table as Drawn

    drawn = Drawn(box=None, pad_edge=False, header_style="bold")
    for name in header:
        drawn.add_column(name, justify="left" if name in left else "right", no_wrap=not wrap)
    given = iter(styles)
    for row in rows:
        drawn.add_row(*row, style=next(given, None))
    return drawn


def fitting_columns(
    header: Sequence[str], rows: Sequence[Mapping[str, str]], spare: Iterable[str], width: int
) -> list[str]:
    """The columns that a terminal has room for without breaking a cell.

    Args:
        rows: cells by column.
        spare: columns that may go, the first of them first.
        width: characters of a line.
    """
    wide = {name: max(len(name), *(len(row[name]) for row in rows)) + 2 for name in header}
    kept = list(header)
    for name in spare:
        if sum(wide[one] for one in kept) - 2 <= width:
            break
        kept.remove(name)
    return kept


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table in Markdown; with ``numbers`` the columns behind the first are to the right."""
    lines = [[markdown(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---", *["---:" if numbers else "---"] * (len(header) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of a page."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{pages.text(value)}</{tag}>" for value in values) + "</tr>"

    lines = cells("th", header) + "".join(cells("td", row) for row in rows)
    return f'<div class="wide"><table>{lines}</table></div>'
