"""Views of methods at equal cost: the table that papers print, best in bold, and KL against tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vtwcli.io import text
from vtwcli.methods import METHODS
from vtwcli.report.plots import save_figure
from vtwcli.report.tables import markdown_table
from vtwcli.results.comparison import Budget, ComparedRow

if TYPE_CHECKING:
    from rich.table import Table

Cell = tuple[str, bool]
"""What stands in a cell, and whether it is the best of its block."""


def header(result: Budget) -> list[str]:
    """The columns: the method, its cost, its distance from the full model, then every task's metric."""
    return ["method", "tokens", "FLOPs", "KL (nats)", "worst task", "top-1", *(result.get("scores") or {})]


def blocks(result: Budget) -> Iterator[tuple[float, list[list[Cell]]]]:
    """By number of tokens, the most first: a line for each method."""
    targets = sorted({row["tokens"] for row in result["candidates"]}, reverse=True)
    for target in targets:
        rows = [row for row in result["candidates"] if row["tokens"] == target]
        yield target, _lines(result, rows)


def _lines(result: Budget, rows: list[ComparedRow]) -> list[list[Cell]]:
    tasks = list(result.get("scores") or {})
    convention = result["cost"]["convention"]
    # by column its values, whether less is better, and how they are written
    columns = [
        ([row["kl"] for row in rows], True, "{:.2e}"),
        ([row["worst_kl"] for row in rows], True, "{:.2e}"),
        ([row["agreement"] for row in rows], False, "{:.1%}"),
        *(([row["scores"][task] for row in rows], False, "{:.1%}") for task in tasks),
    ]
    lines: list[list[Cell]] = []
    for number, row in enumerate(rows):
        average = sum(row["visual_tokens"]) / len(row["visual_tokens"])
        line = [(row["method"], False), (f"{average:.1f}", False)]
        line.append((f"{row['flops_ratio'][convention]:.1%}", False))
        for values, less, form in columns:
            best = min(values) if less else max(values)
            line.append((form.format(values[number]), values[number] == best and len(rows) > 1))
        lines.append(line)
    return lines


def full_line(result: Budget) -> list[str]:
    """The full model's own line."""
    scores = [f"{one['value']:.1%}" for one in (result.get("scores") or {}).values()]
    return ["full model", f"{result['cost']['visual_tokens']:.1f}", "100.0%", "0", "0", "100.0%", *scores]


def equal_table(result: Budget) -> Table:
    """The terminal's table, the best of each block in bold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header(result):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    table.add_row(*full_line(result), style="dim")
    for _, lines in blocks(result):
        table.add_section()
        for line in lines:
            table.add_row(*(Text(cell, "bold" if best else "") for cell, best in line))
        table.add_row()
    return table


def equal_sentence(result: Budget) -> str:
    """How the numbers are counted, and who is missing."""
    samples = sum(task["samples"] for task in result["tasks"].values())
    convention = result["cost"]["convention"]
    words = [
        f"{len(result['candidates'])} schedules on {samples} samples, the best of each block in bold. tokens: visual "
        f"tokens that enter a layer, mean over layers and samples. FLOPs ({convention}) of the prefill relative to "
        "the full model's."
    ]
    if result.get("scores"):
        named = {one["metric"] for one in result["scores"].values()}
        words.append(f"Tasks ({', '.join(sorted(named))}) are scored on each schedule's own answers.")
    missing: dict[tuple[str, str], list[str]] = {}
    for left in result.get("left_out") or ():
        at = ", ".join(f"{target:g}" for target in left["tokens"])
        missing.setdefault((at, left["why"]), []).append(left["method"])
    words += [f"Not there at {at}: {', '.join(names)}; {why}." for (at, why), names in missing.items()]
    return " ".join(words)


def equal_markdown(result: Budget) -> str:
    """The table in Markdown."""
    rows = [full_line(result)]
    for _, lines in blocks(result):
        rows += [[f"{cell} (best)" if best else cell for cell, best in line] for line in lines]
    return "\n\n".join([markdown_table(header(result), rows), text.paragraph(equal_sentence(result))])


def plot_equal(result: Budget, path: Path) -> None:
    """KL (log) against the average number of visual tokens, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 6.2), layout="constrained")
    axis = figure.subplots()
    rows = result["candidates"]
    floor = max(min((row["kl"] for row in rows if row["kl"] > 0), default=1e-6), 1e-9)
    for method in dict.fromkeys(row["method"] for row in rows):
        colour, marker, label = METHODS[method].style
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["tokens"])
        counts = [sum(row["visual_tokens"]) / len(row["visual_tokens"]) for row in mine]
        axis.plot(
            counts,
            [max(row["kl"], floor) for row in mine],
            marker=marker,
            color=colour,
            ms=6,
            lw=0.9,
            label=label,
        )
    axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#DDDDDD", lw=0.5)
    axis.margins(x=0.06, y=0.08)
    axis.set_xlabel(f"visual tokens a layer holds on average (of {result['cost']['visual_tokens']:.4g})")
    axis.set_ylabel("KL(pruned ‖ full), nats")
    axis.set_title(f"{result['model']['name']}: methods at equal cost", fontsize=11, loc="left")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, path)
