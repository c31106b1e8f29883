"""Views of VisiPruner's calibration: terminal table, sentence and plot; reads result documents, computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vtwcli.report.budget import COLUMNS, cells, flops
from vtwcli.report.guarantee import promise_words, rule_words
from vtwcli.report.plots import BLUE, GREEN, ORANGE, save_figure
from vtwcli.report.tables import terminal_table
from vtwcli.results.calibration import SearchedCalibration

if TYPE_CHECKING:
    from rich.console import Group


def visipruner_view(result: SearchedCalibration) -> Group:
    """The terminal view of VisiPruner's calibration: the boundary's curve, the front's candidates, the choice."""
    from rich.console import Group
    from rich.text import Text

    boundary, rows, styles = result["boundary"], [], []
    for layer, value in enumerate(boundary["kl"]):
        worst = max(one[layer] for one in boundary["tasks"].values())
        mark = "<- boundary: too much" if layer == boundary["layer"] else ""
        rows.append([f"0..{layer}", f"{value:.2e}", f"{worst:.2e}", mark])
        styles.append("dim" if layer > boundary["layer"] else "")
    curve = terminal_table(["muted layers", "mean KL (nats)", "worst task", ""], rows, [""], styles)
    shown = [row for row in result["candidates"] if row["pareto"] or row["name"] == result["chosen"]]
    rows, styles = [], []
    for row in sorted(shown, key=lambda row: (flops(result, row), row["kl"])):
        chosen = row["name"] == result["chosen"]
        mark = "<- chosen" if chosen else "accepted" if row["accepted"] else ""
        rows.append([*cells(result, row), mark])
        styles.append("bold green" if chosen else "")
    table = terminal_table(["candidate", *COLUMNS, ""], rows, ["candidate", ""], styles)
    count = len(result["candidates"])
    front = Text(f"The Pareto front of {count} candidates (S boundary, cos and t thresholds):")
    return Group(curve, Text(""), front, table, Text(""), Text(visipruner_sentence(result)))


def visipruner_sentence(result: SearchedCalibration) -> str:
    """One line: the chosen parameters and what they save, or that no candidate qualifies."""
    rule, promise = rule_words(result), promise_words(result)
    wanted = result["chosen"] or result["compromise"]
    row = next(row for row in result["candidates"] if row["name"] == wanted)
    closeness = f"mean KL {row['kl']:.2e}, worst task {row['worst_kl']:.2e}"
    if result["chosen"] is None:
        return f"No candidate qualifies ({rule}).{promise} Closest: {wanted}, {closeness}."
    cost = result["cost"]
    return (
        f"VisiPruner with shallow boundary {result['shallow_mid_layer']}, layer threshold "
        f"{result['layer_threshold']:g}, tokens threshold {result['tokens_threshold']:g} ({rule}): {closeness}; "
        f"prefill FLOPs {flops(result, row):.1%} of full ({cost['convention']}, {cost['visual_tokens']:.0f} visual + "
        f"{cost['text_tokens']:.0f} text tokens), KV cache {row['kv_ratio']:.1%}.{promise}"
    )


def plot_visipruner(result: SearchedCalibration, path: Path) -> None:
    """Left the KL of muting layers 0..d with the boundary; right every candidate's KL against its FLOPs."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    boundary, eta = result["boundary"], result["eta"]
    floor = min(eta / 100, 1e-5)  # of what a logarithmic axis can show
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
    rows = result["candidates"]
    for shallow, marker in zip(
        sorted({row["parameters"]["shallow_mid_layer"] for row in rows}), "osD", strict=False
    ):
        mine = [row for row in rows if row["parameters"]["shallow_mid_layer"] == shallow]
        points = [100 * flops(result, row) for row in mine], [max(row["kl"], floor) for row in mine]
        right.plot(*points, marker, color=ORANGE, ms=5, ls="", alpha=0.7, label=f"boundary {shallow}")
    front = [next(row for row in rows if row["name"] == name) for name in result["pareto"]]
    points = [100 * flops(result, row) for row in front], [max(row["kl"], floor) for row in front]
    right.plot(*points, color="black", lw=1, alpha=0.6, zorder=0, label="Pareto front")
    if result["chosen"]:
        row = next(row for row in rows if row["name"] == result["chosen"])
        at = (100 * flops(result, row), max(row["kl"], floor))
        right.plot(*at, "o", mfc="none", mec=GREEN, mew=2, ms=12, ls="", label=f"chosen: {row['name']}")
    right.set_xlabel(f"prefill FLOPs, % of the full model ({result['cost']['convention']})")
    right.set_title("candidates", fontsize=10, loc="left")
    for axis in (left, right):
        axis.axhline(eta, color=ORANGE, ls="--", lw=1.2, label=f"eta = {eta:g}" if axis is left else None)
        axis.set_yscale("log")
        axis.set_ylabel("KL(pruned ‖ full), nats")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", lw=0.5)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"{result['model']['name']}: VisiPruner's calibration", fontsize=11, x=0.02, ha="left")
    save_figure(figure, path)
