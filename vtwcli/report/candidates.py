"""Views of a calibration by candidates: terminal table, sentence and plot; reads result documents, computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.judge.flops import DEFAULT_CONVENTION
from vtwcli.methods import METHODS
from vtwcli.report import exits
from vtwcli.report.budget import COLUMNS, cells, flops
from vtwcli.report.guarantee import brief, promise_words, rule_words
from vtwcli.report.plots import BLUE, GREEN, ORANGE, save_figure
from vtwcli.report.tables import terminal_table
from vtwcli.results.calibration import SearchedCalibration, SearchedRow

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def searched_view(result: SearchedCalibration) -> Group:
    """The terminal view: of VisiPruner the boundary's curve, the front's candidates, the choice."""
    from rich.console import Group
    from rich.text import Text

    curve = [_curve(result), Text("")] if "boundary" in result else []
    rows, styles = [], []
    shown = [row for row in result["candidates"] if row["pareto"] or row["name"] == result["chosen"]]
    for row in sorted(shown, key=lambda row: (flops(result, row), row["kl"])):
        chosen = row["name"] == result["chosen"]
        mark = "<- chosen" if chosen else "accepted" if row["accepted"] else ""
        rows.append([*cells(result, row), mark])
        styles.append("bold green" if chosen else "")
    table = terminal_table(["candidate", *COLUMNS, ""], rows, ["candidate", ""], styles)
    count = len(result["candidates"])
    legend = " (S boundary, cos and t thresholds)" if "boundary" in result else ""
    front = Text(f"The Pareto front of {count} candidates{legend}:")
    leaving: list[RenderableType] = [Text(""), exits.table(result["exits"])] if "exits" in result else []
    return Group(*curve, front, table, *leaving, Text(""), Text(searched_sentence(result)))


def _curve(result: SearchedCalibration) -> Any:
    boundary, rows, styles = result["boundary"], [], []
    for layer, value in enumerate(boundary["kl"]):
        worst = max(one[layer] for one in boundary["tasks"].values())
        mark = "<- boundary: too much" if layer == boundary["layer"] else ""
        rows.append([f"0..{layer}", f"{value:.2e}", f"{worst:.2e}", mark])
        styles.append("dim" if layer > boundary["layer"] else "")
    return terminal_table(["muted layers", "mean KL (nats)", "worst task", ""], rows, [""], styles)


def searched_sentence(result: SearchedCalibration) -> str:
    """One line: the chosen parameters and what they save, or that no candidate qualifies."""
    rule, promise = rule_words(result), promise_words(result)
    wanted = result["chosen"] or result["compromise"]
    row = next(row for row in result["candidates"] if row["name"] == wanted)
    closeness = f"mean KL {row['kl']:.2e}, worst task {row['worst_kl']:.2e}"
    if result["chosen"] is None:
        return f"No candidate qualifies ({rule}).{promise} Closest: {wanted}, {closeness}."
    cost = result["cost"]
    if "boundary" in result:
        found = (
            f"shallow boundary {result['shallow_mid_layer']}, layer threshold {result['layer_threshold']:g}, "
            f"tokens threshold {result['tokens_threshold']:g}"
        )
    else:
        found = ", ".join(f"{name} {_said(value)}" for name, value in result["parameters"].items())
    return (
        f"{METHODS[result['method']].title} with {found} ({rule}): {closeness}; "
        f"prefill FLOPs {flops(result, row):.1%} of full {at_tokens(cost)}, "
        f"KV cache {row['kv_ratio']:.1%}{_alone(result, row)}.{exits.sentence(result)}{promise}"
    )


def at_tokens(cost: Mapping[str, Any]) -> str:
    """At which numbers of tokens work was counted, and how where it is not the usual way."""
    convention = cost["convention"]
    counted = "" if convention == DEFAULT_CONVENTION else f" (counted as {convention})"
    return f"at {cost['visual_tokens']:.0f} visual + {cost['text_tokens']:.0f} text tokens{counted}"


def _alone(result: SearchedCalibration, chosen: SearchedRow) -> str:
    """Of layers that are frozen and then left, what the best withdrawal of the same candidates takes by itself."""
    plain = [row for row in result["candidates"] if row["accepted"] and row["parameters"].get("layers") == []]
    best = min(plain, key=lambda row: flops(result, row), default=chosen)
    if best is chosen:
        return ""
    k = best["parameters"]["withdraw"]
    return f"; withdrawal alone, K = {k}: FLOPs {flops(result, best):.1%}, KV cache {best['kv_ratio']:.1%}"


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def plot_searched(result: SearchedCalibration, path: Path) -> None:
    """Every candidate's KL against its FLOPs; left of it, of VisiPruner the KL of muting layers 0..d with the
    boundary, of ShortV and ``stages`` that of freezing each layer, with the choice's borders, of an exit the share of
    samples that leaves at each layer."""
    from matplotlib.figure import Figure

    findings, eta = result.get("findings", {}), result["eta"]
    two = "boundary" in result or "contribution" in findings or "exits" in result
    figure = Figure(figsize=(10 if two else 5.6, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if two else 1, squeeze=False)[0]
    floor = min(eta / 100, 1e-5)  # of what a logarithmic axis can show
    if "boundary" in result:
        _plot_boundary(result, axes[0], floor)
    elif "exits" in result:
        exits.plot(result, axes[0])
    elif two:
        layers = range(len(findings["contribution"]))
        axes[0].bar(
            layers, [max(one, floor) for one in findings["contribution"]], color=BLUE, label="mean KL"
        )
        chosen = result["parameters"]
        for number, layer in enumerate(chosen.get("layers") or ()):
            axes[0].axvspan(
                layer - 0.5, layer + 0.5, color=GREEN, alpha=0.15, lw=0, label=None if number else "frozen"
            )
        if (leave := chosen.get("withdraw")) is not None:
            curve = [max(one, floor) for one in findings["withdrawal"]]
            axes[0].plot(curve, color="black", marker="o", ms=3, lw=1, label="withdrawal at this layer")
            axes[0].axvline(leave - 0.5, color=GREEN, lw=1.6, label=f"withdrawn at {leave}")
        axes[0].set_xlabel("visual tokens not updated in layer")
        axes[0].set_title("contribution of layers", fontsize=10, loc="left")
    _plot_candidates(result, axes[-1], floor)
    in_nats = axes[1:] if "exits" in result else axes
    for axis in in_nats:
        axis.axhline(
            eta, color=ORANGE, ls="--", lw=1.2, label=f"eta = {eta:g}" if axis is in_nats[0] else None
        )
        axis.set_yscale("log")
        axis.set_ylabel("KL(pruned ‖ full), nats")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", lw=0.5)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=8)
    title = f"{result['model']['name']}: {METHODS[result['method']].title}'s calibration"
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    save_figure(figure, path)


def _plot_boundary(result: SearchedCalibration, left: Any, floor: float) -> None:
    import numpy as np

    boundary = result["boundary"]
    layers = np.arange(len(boundary["kl"]))
    if len(boundary["tasks"]) > 1:
        for number, curve in enumerate(boundary["tasks"].values()):
            label = "each task" if number == 0 else None
            left.plot(layers, np.maximum(curve, floor), color=BLUE, lw=0.7, alpha=0.5, label=label)
    left.plot(layers, np.maximum(boundary["kl"], floor), color=BLUE, marker="o", ms=4, label="mean KL")
    left.axvline(boundary["layer"] - 0.5, color=GREEN, lw=1.6, label=f"boundary {boundary['layer']}")
    left.set_xlabel("text does not read vision in layers 0..d")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_title("shallow boundary", fontsize=10, loc="left")


def _plot_candidates(result: SearchedCalibration, right: Any, floor: float) -> None:
    rows = result["candidates"]
    groups: dict[str, list[SearchedRow]] = {}
    for row in rows:
        shallow = row["parameters"].get("shallow_mid_layer")
        groups.setdefault("candidates" if shallow is None else f"boundary {shallow}", []).append(row)
    order = sorted(groups, key=lambda name: groups[name][0]["parameters"].get("shallow_mid_layer", 0))
    for name, marker in zip(order, "osD", strict=False):
        mine = groups[name]
        points = [100 * flops(result, row) for row in mine], [max(row["kl"], floor) for row in mine]
        right.plot(*points, marker, color=ORANGE, ms=5, ls="", alpha=0.7, label=name)
    front = [next(row for row in rows if row["name"] == name) for name in result["pareto"]]
    points = [100 * flops(result, row) for row in front], [max(row["kl"], floor) for row in front]
    right.plot(*points, color="black", lw=1, alpha=0.6, zorder=0, label="Pareto front")
    if result["chosen"]:
        row = next(row for row in rows if row["name"] == result["chosen"])
        at = (100 * flops(result, row), max(row["kl"], floor))
        right.plot(
            *at,
            "o",
            mfc="none",
            mec=GREEN,
            mew=2,
            ms=12,
            ls="",
            label=f"chosen: {row['name']}{brief(result)}",
        )
    right.set_xlabel(f"prefill FLOPs, % of the full model ({result['cost']['convention']})")
    right.set_title("candidates", fontsize=10, loc="left")
