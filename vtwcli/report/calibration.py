"""Views of a calibration: terminal table, sentence and plot; reads result documents, computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.io import files
from vtwcli.io.outputs import Outputs
from vtwcli.report import candidates
from vtwcli.report.guarantee import brief, promise_words, rule_words
from vtwcli.report.plots import BLUE, GREEN, GREY, ORANGE, new_figure, save_figure
from vtwcli.report.tables import terminal_table
from vtwcli.results.calibration import Calibration, VtwCalibration, is_searched
from vtwcli.schedule.schedule import Schedule

if TYPE_CHECKING:
    from rich.console import Group

_BAR = 28  # width of the terminal chart in characters


def write_calibration(result: Calibration, outputs: Outputs) -> None:
    """Write a result, its schedule and its picture, all or nothing.

    Args:
        result: the document of ``calibrate``.
        outputs: where ``plot``, ``schedule`` and ``result`` go; None leaves one out.
    """
    with outputs.publish() as new:
        new.text("result", files.document(result))
        if result["schedule"]:
            new.text("schedule", Schedule.from_dict(result["schedule"]).to_yaml())
        new.view("plot", lambda path: plot_calibration(result, path))


def calibration_view(result: Calibration) -> Group:
    """The terminal view of a calibration: the curve as bars, the chosen K and what it saves."""
    if is_searched(result):
        return candidates.searched_view(result)
    from rich.console import Group
    from rich.text import Text

    k, eta = result["withdrawal_layer"], result["eta"]
    mean, agree = result["kl"]["mean"], result["agreement"]["mean"]
    rows, styles = [], []
    for layer, value in enumerate(mean):
        early = layer < result["min_layer"]
        marks = ["<- K"] * (layer == k) + ["not a candidate"] * early
        bar = _bar(value, mean, eta)
        rows.append([str(layer), f"{value:.2e}", bar, f"{agree[layer]:.1%}", " ".join(marks)])
        styles.append("bold green" if layer == k else "dim" if early else "")
    scale = "log scale, | is eta"
    header = ["layer", "mean KL (nats)", scale, "top-1", ""]
    table = terminal_table(header, rows, left=[scale, ""], styles=styles, wrap=True)
    return Group(table, Text(""), Text(calibration_sentence(result)), *_more_lines(result))


def calibration_sentence(result: Calibration) -> str:
    """One line: the chosen K and what it saves, or that no layer qualifies."""
    if is_searched(result):
        return candidates.searched_sentence(result)
    k, layers = result["withdrawal_layer"], result["num_layers"]
    rule, promise = rule_words(result), promise_words(result)
    if k is None:
        best = result["compromise"]
        closest = f"Best compromise: layer {best['layer']}, mean KL {best['kl']:.2e}."
        return f"No layer qualifies ({rule}).{promise} {closest}"
    cost = result["cost"]
    interval = result["interval"]
    spread = f", 95 % interval {interval[0]}..{interval[1]}" if interval else ""
    ratio = cost["flops_ratio"][cost["convention"]]
    return (
        f"K = {k} of {layers} layers ({rule}{spread}): prefill FLOPs {ratio:.1%} of full "
        f"{candidates.at_tokens(cost)}, KV cache {cost['kv_ratio']:.1%}.{promise}"
    )


def _more_lines(result: VtwCalibration) -> list[Any]:
    """K of each task, and what may be saved in front of K."""
    from rich.text import Text

    lines, cost = [], result["cost"]
    if len(result["tasks"]) > 1:
        parts = [
            f"{task} {'none' if row['withdrawal_layer'] is None else row['withdrawal_layer']}"
            for task, row in result["tasks"].items()
        ]
        lines.append("By task (sustained): " + ", ".join(parts))
    if result["withdrawal_layer"] and "frozen_ratio" in cost:
        least = cost["frozen_ratio"][cost["convention"]]
        lines.append(
            f"Freezing visual tokens in layers before K may save more, down to {least:.1%} at best: "
            f"vtw calibrate {result['model']['name']} --method stages"
        )
    return [Text(line) for line in lines]


def _bar(value: float, values: list[float], eta: float) -> str:
    """A bar on a log scale that spans all values and eta, with eta marked."""
    from math import log10

    def log(x: float) -> float:
        return log10(max(x, 1e-9))

    low = min(log(eta) - 1, *(log(v) for v in values))
    high = max(log(eta), *(log(v) for v in values))
    filled = round((log(value) - low) / (high - low) * _BAR)
    mark = min(_BAR - 1, round((log(eta) - low) / (high - low) * _BAR))
    cells = ["█" if i < filled else " " for i in range(_BAR)]
    cells[mark] = "|"
    return "".join(cells)


def plot_calibration(result: Calibration, path: Path) -> None:
    """Log-scale KL by layer with its spread over samples, eta, K with its interval, and top-1 agreement.

    The format follows the suffix of ``path`` (png, svg, pdf).
    """
    if is_searched(result):
        candidates.plot_searched(result, path)
        return
    import numpy as np

    figure, axis = new_figure()
    layers = np.arange(result["num_layers"])
    floor = min(result["eta"] / 100, 1e-5)
    samples = np.asarray(
        [row for row, s in zip(result["kl"]["samples"], result["samples"], strict=True) if s["visual"]]
    )
    mean = np.maximum(result["kl"]["mean"], floor)
    low, high = np.maximum(np.quantile(samples, (0.1, 0.9), axis=0), floor)
    axis.fill_between(layers, low, high, color=BLUE, alpha=0.15, lw=0, label="10-90 % of samples")
    if len(result["tasks"]) > 1:
        ends = {task: max(row["kl"][-1], floor) for task, row in result["tasks"].items()}
        for row in result["tasks"].values():
            axis.plot(layers, np.maximum(row["kl"], floor), color=BLUE, lw=0.7, alpha=0.45)
        # labels stand above one another where curves end together, a twentieth of the axis apart
        step = (max(mean.max(), high.max()) / floor) ** 0.05
        lowest = floor / step**0.4
        for task in sorted(ends, key=lambda name: ends[name]):
            lowest = max(ends[task], lowest * step)
            axis.text(layers[-1] + 0.2, lowest, task, fontsize=7, color=BLUE, va="center")
        axis.set_xlim(-0.5, layers[-1] + 0.14 * len(layers))
    axis.plot(layers, mean, color=BLUE, marker="o", ms=4, label="mean KL")
    axis.axhline(result["eta"], color=ORANGE, ls="--", lw=1.2, label=f"eta = {result['eta']:g}")
    if result["interval"]:
        axis.axvspan(
            result["interval"][0] - 0.25, result["interval"][1] + 0.25, color=GREEN, alpha=0.15, lw=0
        )
    if result["withdrawal_layer"] is not None:
        k = result["withdrawal_layer"]
        label = f"K = {k}"
        if result["interval"]:
            label += f" (95 %: {result['interval'][0]}..{result['interval'][1]})"
        axis.axvline(k, color=GREEN, lw=1.6, label=label + brief(result))
    axis.set_yscale("log")
    axis.set_ylim(bottom=floor)
    axis.set_xlabel("visual tokens withdrawn at layer")
    axis.set_ylabel("KL(pruned ‖ full), nats")
    axis.xaxis.get_major_locator().set_params(integer=True)
    second = axis.twinx()
    second.plot(
        layers, result["agreement"]["mean"], color=GREY, lw=1, ls=":", marker=".", label="top-1 agreement"
    )
    second.set_ylim(0, 1.02)
    second.set_ylabel("top-1 agreement with the full model", color=GREY)
    second.spines["top"].set_visible(False)
    handles = [*axis.get_legend_handles_labels()[0], *second.get_legend_handles_labels()[0]]
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=8
    )
    axis.set_title(
        f"{result['model']['name']}: what withdrawing visual tokens changes", fontsize=11, loc="left"
    )
    save_figure(figure, path)
