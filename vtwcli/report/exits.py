"""Views of an exit of each sample's own: table, sentence and plot; reads result documents, computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtwcli.report.plots import BLUE, GREEN, ORANGE
from vtwcli.report.tables import terminal_table
from vtwcli.results.calibration import Exits, SearchedCalibration

if TYPE_CHECKING:
    from rich.table import Table


def table(exits: Exits) -> Table:
    """By layer the share of samples that leaves there, and of those that could."""
    rows, styles = [], []
    depth, fixed = len(exits["leave"]) - 1, exits["fixed"]
    for layer, (leave, label) in enumerate(zip(exits["leave"], exits["labels"], strict=True)):
        here = fixed is not None and fixed["layer"] == layer
        if not (leave or label or here):
            continue
        name = "never" if layer == depth else str(layer)
        rows.append([name, f"{leave:.1%}", f"{label:.1%}", "<- fixed K of this policy" if here else ""])
        styles.append("bold green" if leave else "")
    return terminal_table(["layer", "samples leave", "own KL stays under eta"], rows, [""], styles)


def sentence(result: SearchedCalibration) -> str:
    """Where samples leave and what that saves beside the fixed layer; empty where no exit was chosen."""
    exits = result.get("exits")
    if exits is None:
        return ""
    leave, convention = exits["leave"], result["cost"]["convention"]
    tested = "on the samples that tested it" if "guarantee" in result else "on these samples"
    words = (
        f" Samples leave at layer {exits['mean_layer']:.3g} of {len(leave) - 1} on average, {leave[-1]:.1%} of them "
        "never"
    )
    fixed, mine = exits["fixed"], exits["chosen"]
    if fixed is None:
        return f"{words}; among fixed layers none qualifies {tested}."
    k = fixed["layer"]
    if leave[k] == 1:
        return f" All samples leave at layer {k}, the fixed K of the same policy {tested}: attention adds nothing."
    return (
        f"{words}; {sum(leave[:k]):.1%} before and {sum(leave[k + 1 :]):.1%} behind the fixed K = {k} of the same "
        f"policy. FLOPs {mine['flops_ratio'][convention]:.1%} and KV cache {mine['kv_ratio']:.1%} against "
        f"{fixed['flops_ratio'][convention]:.1%} and {fixed['kv_ratio']:.1%} of K, {tested}."
    )


def plot(result: SearchedCalibration, axis: Any) -> None:
    """Bars of the share of samples that leaves at each layer, over those that could, with the fixed layer."""
    exits = result["exits"]
    depth, fixed = len(exits["leave"]) - 1, exits["fixed"]
    layers = range(depth + 1)
    percent = [[100 * share for share in exits[key]] for key in ("labels", "leave")]
    axis.set_axisbelow(True)
    axis.bar(layers, percent[0], width=0.9, color=BLUE, alpha=0.25, label="own KL stays under eta")
    axis.bar(layers, percent[1], width=0.5, color=GREEN, label="leave")
    if fixed is not None:
        axis.axvline(fixed["layer"], color=ORANGE, ls="--", lw=1.6, label=f"fixed K = {fixed['layer']}")
    step = max(1, -(-depth // 12))
    shown = list(range(0, depth, step))
    axis.set_xticks([*shown, depth], [*map(str, shown), "never"])
    axis.set_ylabel("% of samples")
    axis.set_xlabel("visual tokens leave at layer")
    axis.set_title("where samples leave", fontsize=10, loc="left")
