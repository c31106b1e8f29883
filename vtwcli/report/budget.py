"""Views of a comparison of methods: terminal table, sentence and plot; reads result documents, computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.io import files, text
from vtwcli.io.outputs import Outputs
from vtwcli.methods import METHODS
from vtwcli.report.equal import equal_markdown, equal_sentence, equal_table, plot_equal
from vtwcli.report.plots import GREEN, save_figure
from vtwcli.report.tables import markdown_table, terminal_table
from vtwcli.results.calibration import SearchedCalibration
from vtwcli.results.comparison import Budget, TriedRow
from vtwcli.schedule.schedule import Schedule

if TYPE_CHECKING:
    from rich.console import Group


def write_budget(result: Budget, outputs: Outputs) -> None:
    """Write a comparison, its picture and the schedule of the best within the budget, all or nothing.

    Args:
        result: the document of ``budget``.
        outputs: where ``plot``, ``schedule`` and ``result`` go; None leaves one out.
    """
    with outputs.publish() as new:
        new.text("result", files.document(result))
        if result["best"]:
            new.text("schedule", _best(result).to_yaml())
        new.view("plot", lambda path: plot_budget(result, path))


def _best(result: Budget) -> Schedule:
    """The schedule within the budget, with where it comes from."""
    best = next(row for row in result["candidates"] if row["name"] == result["best"])
    schedule = Schedule.from_dict(best["schedule"])
    provenance = {
        **schedule.provenance,
        "model": result["model"]["name"],
        "revision": result["model"]["revision"],
        "budget": result["max_flops"],
        "data": [source["fingerprint"] for source in result["data"]],
        "vtwcli": result["versions"]["vtwcli"],
    }
    return schedule.model_copy(update={"provenance": provenance})


def budget_view(result: Budget) -> Group:
    """The terminal view: every schedule, the cheapest first, with the Pareto front marked."""
    from rich.console import Group
    from rich.text import Text

    if result["options"].get("tokens"):
        words = " ".join([equal_sentence(result), *_within(result)])
        return Group(equal_table(result), Text(words))
    rows, styles = [], []
    for row in sorted(result["candidates"], key=lambda row: (flops(result, row), row["kl"])):
        best = row["name"] == result["best"]
        mark = "*" if row["pareto"] else " "
        rows.append([*cells(result, row), f"{mark} best" if best else mark])
        styles.append("bold green" if best else "" if row["pareto"] else "dim")
    table = terminal_table(["schedule", *COLUMNS, ""], rows, ["schedule", ""], styles)
    return Group(table, Text(""), Text(budget_sentence(result)))


def budget_sentence(result: Budget) -> str:
    """What the table says in words: the front, and the best schedule within the budget."""
    cost, samples = result["cost"], sum(task["samples"] for task in result["tasks"].values())
    words = (
        f"{len(result['candidates'])} schedules on {samples} samples; * marks the Pareto front: no other schedule is "
        f"both cheaper and closer to the full model. FLOPs ({cost['convention']}) of the prefill and "
        f"KV cache as shares of the full model's at {cost['visual_tokens']:.0f} visual + "
        f"{cost['text_tokens']:.0f} text tokens."
    )
    return " ".join([words, *_within(result)])


def budget_line(result: Budget) -> str:
    """What came out, in a line."""
    count = f"{len(result['candidates'])} schedules, {len(result['pareto'])} of them on the Pareto front."
    return " ".join([count, *_within(result)])


def _within(result: Budget) -> list[str]:
    """A sentence on what fits into the budget, if there is a budget."""
    if result["max_flops"] is None:
        return []
    if result["best"] is None:
        return [f"None costs at most {100 * result['max_flops']:.3g}%."]
    best = next(row for row in result["candidates"] if row["name"] == result["best"])
    return [
        f"Best within {100 * result['max_flops']:.3g}%: {best['name']}, KL {best['kl']:.2e}, "
        f"FLOPs {flops(result, best):.1%}."
    ]


def shortfall(result: Budget) -> str | None:
    """That there is a budget, and no schedule fits into it; None otherwise."""
    if result["max_flops"] is None or result["best"] is not None:
        return None
    return f"no schedule costs at most {100 * result['max_flops']:.3g}% of the full model's prefill FLOPs"


def markdown(result: Budget) -> str:
    """The Pareto front in Markdown, for a job's summary page."""
    title = f"## {text.markdown(result['model']['name'])}: methods compared"
    if result["options"].get("tokens"):
        return f"{title}\n\n{equal_markdown(result)}\n"
    rows = {row["name"]: row for row in result["candidates"]}
    front = [cells(result, rows[name]) for name in result["pareto"]]
    parts = [
        title,
        markdown_table(["schedule", *COLUMNS], front),
        text.paragraph(
            f"The Pareto front of {len(rows)} schedules; prefill FLOPs ({result['cost']['convention']}) and KV cache "
            "as shares of the full model's."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plot_budget(result: Budget, path: Path) -> None:
    """KL (log) and top-1 agreement against prefill FLOPs, one point a schedule, the Pareto front joined and named."""
    if result["options"].get("tokens"):
        plot_equal(result, path)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 7.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    rows = result["candidates"]
    floor = max(min((row["kl"] for row in rows if row["kl"] > 0), default=1e-6), 1e-9)
    for method in dict.fromkeys(row["method"] for row in rows):
        colour, marker, label = METHODS[method].style
        mine = [row for row in rows if row["method"] == method]
        cost = [100 * flops(result, row) for row in mine]
        kl = [max(row["kl"], floor) for row in mine]
        upper.plot(cost, kl, marker, color=colour, ms=6, ls="", label=label)
        lower.plot(cost, [100 * row["agreement"] for row in mine], marker, color=colour, ms=6, ls="")
    front = [next(row for row in rows if row["name"] == name) for name in result["pareto"]]
    points = [(100 * flops(result, row), max(row["kl"], floor)) for row in front]
    upper.plot(*zip(*points, strict=True), color="black", lw=1, alpha=0.6, zorder=0, label="Pareto front")
    upper.set_yscale("log")
    _name_points(upper, points, [row["name"] for row in front])
    if result["max_flops"] is not None:
        for axis in (upper, lower):
            axis.axvline(100 * result["max_flops"], color=GREEN, ls="--", lw=1)
        upper.plot([], [], color=GREEN, ls="--", lw=1, label=f"budget {100 * result['max_flops']:.3g}%")
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", lw=0.5)
        axis.margins(x=0.06, y=0.08)
    upper.set_ylabel("KL(pruned ‖ full), nats")
    lower.set_ylabel("top-1 agreement, %")
    lower.set_xlabel(f"prefill FLOPs, % of the full model ({result['cost']['convention']})")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    upper.set_title(f"{result['model']['name']}: quality against cost", fontsize=11, loc="left")
    save_figure(figure, path)


def _name_points(axis: Any, points: list[tuple[float, float]], names: list[str]) -> None:
    """Names on the empty side of a falling line, left below it; one that would overlap the last is left out."""
    from math import log10

    low, high = (log10(value) for value in axis.get_ylim())
    left, right = axis.get_xlim()
    last: tuple[float, float] | None = None
    for (x, y), name in zip(points, names, strict=True):
        here = ((x - left) / (right - left), (log10(y) - low) / (high - low))
        if last is not None and abs(here[0] - last[0]) < 0.16 and abs(here[1] - last[1]) < 0.035:
            continue
        where = {"xytext": (-4, -3), "textcoords": "offset points", "ha": "right", "va": "top"}
        axis.annotate(name, (x, y), fontsize=7, **where)
        last = here


COLUMNS = ("FLOPs", "KV", "KL (nats)", "worst task", "top-1")


def cells(result: Budget | SearchedCalibration, row: TriedRow) -> list[str]:
    """A candidate's name and, under ``COLUMNS``, its numbers."""
    return [
        row["name"],
        f"{flops(result, row):.1%}",
        f"{row['kv_ratio']:.1%}",
        f"{row['kl']:.2e}",
        f"{row['worst_kl']:.2e}",
        f"{row['agreement']:.1%}",
    ]


def flops(result: Budget | SearchedCalibration, row: TriedRow) -> float:
    """A candidate's prefill FLOPs relative to the full model's, by the document's convention."""
    return float(row["flops_ratio"][result["cost"]["convention"]])
