"""Views of a search: terminal table, sentence and plot; reads result documents, computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vtwcli.io import files, text
from vtwcli.io.outputs import Outputs
from vtwcli.methods import METHODS
from vtwcli.report.guarantee import percent, promise_words, risk_words
from vtwcli.report.plots import GREEN, ORANGE, save_figure
from vtwcli.report.tables import markdown_table, terminal_table
from vtwcli.results.search import FoundRow, Search
from vtwcli.schedule.schedule import Schedule

if TYPE_CHECKING:
    from rich.console import Group

COLUMNS = ("FLOPs", "KV", "worst KL", "worst top-1")
_GOALS = {
    "max_flops": "FLOPs at most {:.3g}%",
    "max_kv": "KV cache at most {:.3g}%",
    "max_kl": "worst task's KL at most {:.3g}",
    "min_agreement": "worst task's top-1 at least {:.3g}%",
}


def write_search(result: Search, outputs: Outputs) -> None:
    """Write a search, its picture and the best schedule, all or nothing.

    Args:
        outputs: where ``plot``, ``schedule`` and ``result`` go; None leaves one out.
    """
    with outputs.publish() as new:
        new.text("result", files.document(result))
        if result["schedule"] is not None:
            new.text("schedule", Schedule.from_dict(result["schedule"]).to_yaml())
        if result["candidates"]:
            new.view("plot", lambda path: plot_search(result, path))


def search_view(result: Search) -> Group:
    """The terminal view: the front and the best, the cheapest first."""
    from rich.console import Group
    from rich.text import Text

    held = _held(result)
    shown = [row for row in result["candidates"] if row["pareto"] or row["name"] == result["best"]]
    rows, styles = [], []
    for row in sorted(shown, key=lambda row: (flops(result, row), row["worst_kl"])):
        best = row["name"] == result["best"]
        mark = "promised" if row["name"] in held else "meets the goal" if row["meets"] else ""
        rows.append([*cells(result, row), f"<- {mark}" if best else mark])
        styles.append("bold green" if best else "" if row["meets"] else "dim")
    table = terminal_table(["schedule", *COLUMNS, ""], rows, ["schedule", ""], styles)
    return Group(table, Text(""), Text(search_sentence(result)))


def _held(result: Search) -> set[str]:
    """Names of the schedules for which the promise holds."""
    tested = result["guarantee"]["tested"] if "guarantee" in result else []
    return {one["candidate"] for one in tested if one["holds"]}


def search_sentence(result: Search) -> str:
    """How it was searched, what was found, and what is promised of it."""
    first, samples = result["rungs"][0], result["tasks"].values()
    words = (
        f"Halved from {first['schedules']} schedules on {first['samples']} samples to {len(result['candidates'])} on "
        f"{result['rungs'][-1]['samples']}{', where the time was up' if result['stopped'] else ''}; these are on "
        f"{sum(one['samples'] for one in samples)} others. FLOPs ({result['cost']['convention']}) of the prefill and "
        f"KV cache as shares of the full model's at {result['cost']['visual_tokens']:.0f} visual + "
        f"{result['cost']['text_tokens']:.0f} text tokens."
    )
    return f"{words} {search_line(result)}{promise_words(result) if result['promised'] else ''}"


def search_line(result: Search) -> str:
    """What was found, and what is promised of it, in a line."""
    best = next((row for row in result["candidates"] if row["name"] == result["best"]), None)
    if best is None:
        return f"No schedule meets the goal ({goal_words(result)})."
    cost = f"{100 * flops(result, best):.1f} % of the FLOPs"
    if "max_kv" in result["goals"]:
        cost += f", {100 * best['kv_ratio']:.1f} % of the KV cache"
    found = f"{best['name']}: {cost}; "
    sure, loss = percent(result["options"]["confidence"]), risk_words(result, result["guarantee"])
    if result["promised"]:
        return f"{found}with {sure} confidence {loss}, in every task."
    asked = percent(result["options"]["risk"])
    proven = 1.0 if result["proven"] is None else result["proven"]
    said = risk_words(result, {**result["guarantee"], "risk": round(proven, 4)})
    return f"{found}not promised for a risk of {asked}; with {sure} confidence {said}, in every task."


def goal_words(result: Search) -> str:
    """The goals in words."""
    shares = {name: 1 if name == "max_kl" else 100 for name in _GOALS}
    return ", ".join(_GOALS[name].format(shares[name] * value) for name, value in result["goals"].items())


def shortfall(result: Search) -> tuple[str, str] | None:
    """Why what was found is not what was asked for, and what to do about it; None where it is."""
    if result["best"] is None:
        near = min(result["candidates"], key=lambda row: row["worst_kl"], default=None)
        said = (
            ""
            if near is None
            else f"; the closest, {near['name']}, has {flops(result, near):.1%} of the FLOPs, "
            f"{near['kv_ratio']:.1%} of the KV cache, worst KL {near['worst_kl']:.2e}, worst top-1 "
            f"{near['worst_agreement']:.1%}"
        )
        return f"no schedule meets the goal ({goal_words(result)}){said}", "a wider goal, or more --trials"
    if not result["promised"]:
        return (
            f"the promise cannot be given. {search_line(result)}",
            "a larger --risk, more samples (--limit), or a wider goal",
        )
    return None


def markdown(result: Search) -> str:
    """The front in Markdown, for a job's summary page."""
    rows = {row["name"]: row for row in result["candidates"]}
    front = [cells(result, rows[name]) for name in result["pareto"]]
    parts = [
        f"## {text.markdown(result['model']['name'])}: the best schedule within a goal",
        markdown_table(["schedule", *COLUMNS], front),
        text.paragraph(search_sentence(result)),
    ]
    return "\n\n".join(parts) + "\n"


def cells(result: Search, row: FoundRow) -> list[str]:
    """A schedule's name and, under ``COLUMNS``, its numbers."""
    return [
        row["name"],
        f"{flops(result, row):.1%}",
        f"{row['kv_ratio']:.1%}",
        f"{row['worst_kl']:.2e}",
        f"{row['worst_agreement']:.1%}",
    ]


def flops(result: Search, row: FoundRow) -> float:
    """Prefill FLOPs relative to the full model's, by the document's convention."""
    return float(row["flops_ratio"][result["cost"]["convention"]])


def plot_search(result: Search, path: Path) -> None:
    """The worst task's KL (log) against prefill FLOPs or KV cache, the front joined, the goals dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    axis = figure.subplots()
    kv = "max_kv" in result["goals"] and "max_flops" not in result["goals"]
    rows = sorted(result["candidates"], key=lambda row: row["kv_ratio"] if kv else flops(result, row))
    floor = max(min((row["worst_kl"] for row in rows if row["worst_kl"] > 0), default=1e-6), 1e-9)

    def point(row: FoundRow) -> tuple[float, float]:
        return 100 * (row["kv_ratio"] if kv else flops(result, row)), max(row["worst_kl"], floor)

    for method in dict.fromkeys(row["method"] for row in rows):
        known = METHODS.get(method)
        style = (
            (known.style.colour, known.style.marker, known.style.label) if known else (ORANGE, "s", method)
        )
        mine = [point(row) for row in rows if row["method"] == method]
        axis.plot(*zip(*mine, strict=True), style[1], color=style[0], ms=6, ls="", label=style[2])
    front = [point(row) for row in rows if row["pareto"]]
    axis.plot(*zip(*front, strict=True), color="black", lw=1, alpha=0.6, zorder=0, label="Pareto front")
    for row in rows:
        if row["name"] == result["best"]:
            axis.plot(
                *point(row), "o", mfc="none", mec=GREEN, ms=13, mew=1.5, ls="", label=f"best: {row['name']}"
            )
    cost = result["goals"].get("max_kv" if kv else "max_flops")
    if cost is not None:
        axis.axvline(100 * cost, color=GREEN, ls="--", lw=1)
    if "max_kl" in result["goals"]:
        axis.axhline(result["goals"]["max_kl"], color=GREEN, ls="--", lw=1)
    axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#DDDDDD", lw=0.5)
    axis.set_ylabel("worst task's KL(pruned ‖ full), nats")
    what = "KV cache" if kv else f"prefill FLOPs ({result['cost']['convention']})"
    axis.set_xlabel(f"{what}, % of the full model's")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axis.set_title(f"{result['model']['name']}: the best schedule within a goal", fontsize=11, loc="left")
    save_figure(figure, path)
