"""Views of an analysis: terminal table and plots; the page that holds everything is in ``analysis_page``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtwcli.judge.flops import DEFAULT_CONVENTION
from vtwcli.report.plots import BLUE, GREEN, GREY, ORANGE, new_figure
from vtwcli.report.tables import terminal_table
from vtwcli.results.analysis import AnalysisDocument, Quartiles, Spread, Stage, Together

if TYPE_CHECKING:
    from rich.console import Group


SKY, YELLOW, PINK = "#56B4E9", "#E69F00", "#CC79A7"
STAGES: dict[Stage, str] = {"shallow": SKY, "middle": YELLOW, "deep": GREEN}
_CURVES = {  # what the KL plot shows, from the strongest intervention to the weakest
    "knockout_until": ("text blind in all layers up to here", ORANGE, "-"),
    "withdrawal": ("no visual tokens from here on (= text blind from here on)", BLUE, "-"),
    "knockout_window": ("text blind in a window of {window} layers", PINK, "--"),
    "knockout_layer": ("text blind in this layer alone", PINK, "-"),
    "layer_update": ("visual tokens not updated in this layer", GREY, ":"),
}


# ---------------------------------------------------------------------------------------------------------------
# Words and the terminal


def stage_of(result: AnalysisDocument, layer: int) -> str:
    """The stage that a layer belongs to."""
    return next(name for name in STAGES if result["stages"][name][0] <= layer < result["stages"][name][1])


def sentences(result: AnalysisDocument) -> list[str]:
    """One sentence for each stage and one for VisiPruner's boundaries."""
    lines = [f"{name.capitalize()}, {text}." for name, text in result["stages"]["sentences"].items()]
    rule, count = result["visipruner"], len(result["samples"])

    def where(part: Quartiles, verb: str) -> str:
        if part["quartiles"] is None:
            return f"none of {count} samples {verb}"
        low, median, high = part["quartiles"]
        never = f", {part['without']} of {count} never" if part["without"] else ""
        return f"{verb} from layer {median:g} on (quartiles {low:g} and {high:g}{never})"

    text = (
        f"VisiPruner's rule behind layer {rule['shallow']}: {where(rule['filter'], 'critical tokens only')}; "
    )
    text += where(rule["exit"], "no visual token")
    if rule["kept"]["quartiles"]:
        text += f"; {rule['kept']['quartiles'][1]:g} critical tokens in the median sample"
    lines.append(text + ".")
    if "together" in result:
        lines.append(_together(result, result["together"]))
    return lines


def _together(result: AnalysisDocument, rows: Together) -> str:
    """The schedule that is proposed in place of plain withdrawal, and what to do with it."""
    both, plain = rows["stages"], rows["withdrawal"]
    model = result["model"]["name"]
    return (
        f"Proposed, {both['name']}: visual tokens not updated in these layers, withdrawn at K: FLOPs "
        f"{both['flops_ratio'][DEFAULT_CONVENTION]:.1%} of full, withdrawal alone "
        f"{plain['flops_ratio'][DEFAULT_CONVENTION]:.1%}; worst task {both['worst_kl']:.2g} nats. "
        f"vtw calibrate {model} --method stages looks for more of them and other K."
    )


HEADER = ["layer", "stage", "vision", "entropy", "critical", "alone", "up to", "from", "update"]


def rows(result: AnalysisDocument) -> list[list[str]]:
    """The table: one row per layer, as text; KL in nats."""
    mean = {name: row["mean"] for name, row in result["measures"].items()}

    def nats(name: str, layer: int) -> str:
        return f"{mean[name][layer]:.1e}" if name in mean else "-"

    return [
        [
            str(d),
            stage_of(result, d),
            f"{mean['attention_visual'][d]:.1%}",
            f"{mean['entropy'][d]:.2f}",
            f"{mean['critical'][d]:.1f}",
            *(nats(name, d) for name in ("knockout_layer", "knockout_until", "withdrawal", "layer_update")),
        ]
        for d in range(result["num_layers"])
    ]


def explanation(result: AnalysisDocument) -> str:
    """What the table's columns mean."""
    return (
        "vision: attention of the last token on visual tokens; entropy: of that attention, in nats; critical: visual "
        f"tokens whose contribution exceeds {result['options']['tokens_threshold']:g}. KL in nats when text does not "
        "read vision in this layer alone, in all up to it, in all from it on (which is withdrawal), and when the "
        f"layer's update of visual tokens is removed; {result['positions']} positions, means over "
        f"{len(result['samples'])} samples."
    )


def analysis_view(result: AnalysisDocument) -> Group:
    """The terminal view: the profile by layer and the stages in words."""
    from rich.console import Group
    from rich.text import Text

    styles, layers = {"shallow": "cyan", "middle": "", "deep": "green"}, rows(result)
    table = terminal_table(HEADER, layers, left=["stage"], styles=[styles[row[1]] for row in layers])
    lines = [Text(line) for line in (*sentences(result), explanation(result))]
    return Group(table, Text(""), *lines)


# ---------------------------------------------------------------------------------------------------------------
# Plots


PLOTS = ("kl", "attention", "tokens", "values")


def plot(result: AnalysisDocument, name: str) -> Any:
    """One of the four pictures of ``PLOTS``, as a figure."""
    draw = {"kl": _kl_plot, "attention": _attention_plot, "tokens": _tokens_plot, "values": _values_plot}
    return draw[name](result)


def _begin(result: AnalysisDocument, title: str, ylabel: str) -> tuple[Any, Any]:
    """A figure with the stages shaded and named."""
    figure, axis = new_figure()
    for name, colour in STAGES.items():
        first, behind = result["stages"][name]
        if behind > first:
            axis.axvspan(first - 0.5, behind - 0.5, color=colour, alpha=0.1, lw=0)
            axis.text(
                (first + behind - 1) / 2,
                1.01,
                name,
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
                color=GREY,
            )
    axis.set_xlim(-0.5, result["num_layers"] - 0.5)
    axis.set_xlabel("layer")
    axis.set_ylabel(ylabel)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(f"{result['model']['name']}: {title}", fontsize=11, loc="left", pad=18)
    return figure, axis


def _legend(axis: Any, *more: Any, columns: int = 3) -> None:
    handles = [handle for one in (axis, *more) for handle in one.get_legend_handles_labels()[0]]
    axis.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=columns,
        frameon=False,
        fontsize=8,
    )


def _second(axis: Any, label: str) -> Any:
    second = axis.twinx()
    second.set_ylabel(label, color=GREY)
    second.spines["top"].set_visible(False)
    return second


def _numbers(values: Sequence[float | None]) -> Any:
    import numpy as np

    return np.array(values, dtype=float)


def _band(axis: Any, row: Spread, colour: str, floor: float = 0.0) -> None:
    """The spread over samples, where there are some: 10 to 90 % of them."""
    import numpy as np

    samples = np.array(row["samples"], dtype=float)
    there = ~np.isnan(samples).all(axis=0)
    if not there.any():  # for example sinks, where no sample has one
        return
    low, high = np.full((2, samples.shape[1]), np.nan)
    low[there], high[there] = np.nanquantile(samples[:, there], (0.1, 0.9), axis=0)
    axis.fill_between(
        np.arange(samples.shape[1]),
        np.maximum(low, floor),
        np.maximum(high, floor),
        color=colour,
        alpha=0.15,
        lw=0,
    )


def _kl_plot(result: AnalysisDocument) -> Any:
    import numpy as np

    figure, axis = _begin(result, "what it costs when text does not read vision", "KL(changed ‖ full), nats")
    floor = min(result["eta"] / 100, 1e-5)
    _band(axis, result["measures"]["withdrawal"], BLUE, floor)
    for name, (label, colour, style) in _CURVES.items():
        if name not in result["measures"]:
            continue
        mean = np.maximum(_numbers(result["measures"][name]["mean"]), floor)
        window = result["num_layers"] - len(mean) + 1
        axis.plot(
            np.arange(len(mean)) + (window - 1) / 2,
            mean,
            style,
            color=colour,
            marker="o",
            ms=3,
            lw=1.4,
            label=label.format(window=window),
        )
    axis.axhline(result["eta"], color=GREY, ls="--", lw=1, label=f"eta = {result['eta']:g}")
    axis.set_yscale("log")
    axis.set_ylim(bottom=floor)
    _legend(axis, columns=2)
    return figure


def _attention_plot(result: AnalysisDocument) -> Any:
    import numpy as np

    figure, axis = _begin(result, "where the last token looks", "attention, mean over heads")
    mean = {name: _numbers(row["mean"]) for name, row in result["measures"].items()}
    layers, bottom = np.arange(result["num_layers"]), np.zeros(result["num_layers"])
    first = mean["attention_first"]
    parts = [
        ("text before the image", mean["attention_prefix"], GREY),
        ("first visual token", first, ORANGE),
        ("other visual tokens", mean["attention_visual"] - first, BLUE),
        ("text behind the image", mean["attention_suffix"], "#C9C9C9"),
    ]
    for label, height, colour in parts:
        axis.bar(layers, height, 0.8, bottom, color=colour, label=label)
        bottom = bottom + height
    axis.set_ylim(0, 1)
    axis.grid(False)
    second = _second(axis, "entropy over visual tokens, nats")
    second.plot(layers, mean["entropy"], color="black", lw=1.2, ls=":", marker=".", label="entropy")
    second.set_ylim(bottom=0)
    _legend(axis, second)
    return figure


def _tokens_plot(result: AnalysisDocument) -> Any:
    import numpy as np

    figure, axis = _begin(result, "critical visual tokens", "tokens whose contribution is critical")
    layers = np.arange(result["num_layers"])
    measures = result["measures"]
    _band(axis, measures["critical"], BLUE)
    axis.plot(
        layers, _numbers(measures["critical"]["mean"]), color=BLUE, marker="o", ms=4, label="critical tokens"
    )
    axis.set_ylim(bottom=0)
    rule = result["visipruner"]
    for name, part, colour in (("filter", rule["filter"], GREEN), ("exit", rule["exit"], ORANGE)):
        if part["quartiles"]:
            at = part["quartiles"][1]
            axis.axvline(at, color=colour, lw=1.4, label=f"VisiPruner's {name}, median: {at:g}")
    second = _second(axis, "smallest cos(o - c, o) of a visual token")
    second.plot(
        layers, _numbers(measures["minimum_cosine"]["mean"]), color=GREY, lw=1, ls=":", marker=".",
        label="smallest cosine",
    )  # fmt: skip
    second.set_ylim(top=1)
    _legend(axis, second, columns=2)
    return figure


def _values_plot(result: AnalysisDocument) -> Any:
    import numpy as np

    figure, axis = _begin(result, "what visual tokens have to say", "L1 norm of value vectors")
    layers = np.arange(result["num_layers"])
    measures = result["measures"]
    for name, label, colour in (("value_norm", "visual tokens", BLUE), ("value_norm_sinks", "sinks", ORANGE)):
        _band(axis, measures[name], colour)
        axis.plot(layers, _numbers(measures[name]["mean"]), color=colour, marker="o", ms=4, label=label)
    axis.set_ylim(bottom=0)
    ratio = result["options"]["sink_ratio"]
    second = _second(axis, "sinks per sample")
    second.plot(
        layers, _numbers(measures["sinks"]["mean"]), color=GREY, lw=1, ls=":", marker=".",
        label=f"tokens with {ratio:g}x the average attention",
    )  # fmt: skip
    second.set_ylim(bottom=0)
    _legend(axis, second)
    return figure
