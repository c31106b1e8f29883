"""Writes a profile: its plots, schedules and document, and one self-contained page for people.

The page has the words, plots and tables, and images under heat maps of what is read of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.io import files
from vtwcli.io.outputs import Outputs
from vtwcli.report import pages
from vtwcli.report.analysis import HEADER, PLOTS, STAGES, explanation, plot, rows, sentences, stage_of
from vtwcli.report.plots import save_figure
from vtwcli.report.tables import html_table
from vtwcli.results.analysis import AnalysisDocument, SampleMap
from vtwcli.schedule.schedule import Schedule

if TYPE_CHECKING:
    from vtwcli.analyze import Analysis

_MAP_EDGE = 224  # pixels; the longer edge of an image under its heat maps

# ---------------------------------------------------------------------------------------------------------------
# Heat maps


def write_analysis(analysis: Analysis, outputs: Outputs) -> None:
    """Write a profile with all that goes beside it, all or nothing.

    Args:
        outputs: where ``result``, ``page``, the plots (names of ``plots``) and the ``static``, ``dynamic``
            and ``stages`` schedules go; None leaves one out. A plot's format follows its suffix (png, svg, pdf).
    """
    result = analysis.result
    with outputs.publish() as new:
        new.text("result", files.document(result))
        for name, schedule in result["schedules"].items():
            if schedule:
                new.text(name, Schedule.from_dict(schedule).to_yaml())
        for name in PLOTS:
            new.view(name, partial(_save_plot, result, name))
        new.text_view("page", lambda: page(analysis))


def _save_plot(result: AnalysisDocument, name: str, path: Path) -> None:
    save_figure(plot(result, name), path)


def heat_map(result: AnalysisDocument, shown: SampleMap, image: Any, number: int) -> Any:
    """Attention and contribution over one image at the shown layers, critical tokens outlined.

    Args:
        shown: an entry of the result's ``maps``.
        image: the PIL image.
        number: which of the sample's images it is.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    small = image.convert("RGB")
    small.thumbnail((_MAP_EDGE, _MAP_EDGE))
    wide, high = small.size
    layers, critical = shown["layers"], result["samples"][shown["sample"]]["critical"]
    figure = Figure(figsize=(1.75 * len(layers) + 0.3, 1.75 * 2 * high / wide + 0.55), layout="constrained")
    axes = figure.subplots(2, len(layers), squeeze=False)
    parts = {"attention": shown["attention"], "contribution": shown["contribution"]}
    for row, (name, amounts) in enumerate(parts.items()):
        for axis, layer, values in zip(axes[row], layers, amounts, strict=True):
            heat = spread_over(shown["boxes"], values, number, (high, wide), add=name == "attention")
            top = float(heat.max())
            axis.imshow(np.asarray(small), extent=(0, wide, high, 0))
            axis.imshow(
                heat,
                cmap="inferno",
                vmin=0,
                alpha=0.25 + 0.6 * heat / top if top else 0.25,
                extent=(0, wide, high, 0),
            )
            for token in critical[layer]:
                box = shown["boxes"][token]
                if box is not None and box[0] == number:
                    _, left, up, right, down = box
                    axis.add_patch(
                        Rectangle(
                            (left * wide, up * high), (right - left) * wide, (down - up) * high,
                            fill=False, ec="#00E5FF", lw=0.9,
                        )
                    )  # fmt: skip
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"layer {layer}, {stage_of(result, layer)}", fontsize=8)
        axes[row][0].set_ylabel(name, fontsize=8)
    return figure


def spread_over(
    boxes: Sequence[Sequence[float] | None],
    values: Sequence[float],
    number: int,
    size: tuple[int, int],
    add: bool,
) -> Any:
    """Token values as a picture of ``size`` (height, width).

    Args:
        boxes: of each token [image, left, top, right, bottom] in shares, or None.
        number: the image that is drawn.
        add: values are amounts, spread over their boxes and added where boxes overlap; else the largest counts.
    """
    import numpy as np

    high, wide = size
    picture = np.zeros(size)
    for box, value in zip(boxes, values, strict=True):
        if box is None or box[0] != number:
            continue
        _, left, up, right, down = box
        # at least one pixel, also where tokens are smaller than that
        rows_ = slice(round(up * high), max(round(down * high), round(up * high) + 1))
        columns = slice(round(left * wide), max(round(right * wide), round(left * wide) + 1))
        if add:
            picture[rows_, columns] += value / max((right - left) * (down - up) * high * wide, 1e-12)
        else:
            picture[rows_, columns] = np.maximum(picture[rows_, columns], value)
    return picture


# ---------------------------------------------------------------------------------------------------------------
# The page


def page(analysis: Analysis) -> str:
    """One self-contained page: stages in words, plots, the table, schedules, and samples with their heat maps."""
    result = analysis.result
    title = f"{result['model']['name']}: what its layers do with vision"
    body = [
        f"<h1>{pages.text(title)}</h1>",
        "<ul>" + "".join(f"<li>{pages.text(line)}</li>" for line in sentences(result)) + "</ul>",
        *(pages.picture(partial(plot, result, name), name) for name in PLOTS),
        "<h2>By layer</h2>",
        html_table(HEADER, rows(result)),
        f"<p>{pages.text(explanation(result))}</p>",
        "<h2>By task</h2>",
        html_table(
            ["task", "samples", "shallow", "middle", "deep"],
            [
                [task, str(row["samples"]), *(_span(row[name]) for name in STAGES)]
                for task, row in result["stages"]["tasks"].items()
            ],
        ),
    ]
    for words, schedule in (
        ("Proposed schedule", result["schedules"].get("stages") or result["schedules"]["static"]),
        ("The same by each sample's own contributions", result["schedules"]["dynamic"]),
    ):
        if schedule:
            lean = {key: value for key, value in schedule.items() if key != "provenance"}
            body.append(f"<h2>{words}</h2><pre>{pages.text(Schedule.from_dict(lean).to_yaml())}</pre>")
    maps = {shown["sample"]: shown for shown in result["maps"]}
    chosen = list(maps) or list(range(min(len(result["samples"]), result["options"]["maps"])))
    if chosen:
        body.append("<h2>Samples</h2>")
    if maps:
        body.append(
            "<p>Attention and contribution of each visual token to the last token; outlined: critical tokens.</p>"
        )
    body += [_article(analysis, i, maps.get(i)) for i in chosen]
    return pages.page(title, _STYLE, body)


def _article(analysis: Analysis, number: int, shown: SampleMap | None) -> str:
    result, row = analysis.result, analysis.result["samples"][number]
    rule = "no layer chooses tokens"
    if row["filter"] is not None:
        end = "to the end" if row["exit"] is None else f"none from layer {row['exit']}"
        rule = f"critical tokens only from layer {row['filter']} ({row['kept']} of them), {end}"
    facts = [
        ("task", row["task"]),
        ("question", row["question"]),
        ("tokens", f"{row['prefix']} + {row['visual']} visual + {row['suffix']}"),
        ("VisiPruner", rule),
    ]
    parts = [pages.facts(facts)]
    for i, image in enumerate(analysis.samples[number].images):
        if shown is not None:
            parts.append(
                pages.picture(partial(heat_map, result, shown, image, i), f"heat maps of image {i + 1}")
            )
    if row["lens"]:
        header = ["layer", *(f"{i + 1}." for i in range(len(row["lens"][0])))]
        lens = [
            [str(d), *(f"{_visible(str(token))} {share:.0%}" for token, share in layer)]
            for d, layer in enumerate(row["lens"])
        ]
        parts.append(
            f"<details><summary>Logit lens of the last row</summary>{html_table(header, lens)}</details>"
        )
    return f"<article>{''.join(parts)}</article>"


def _visible(token: str) -> str:
    """A token with its blanks shown."""
    return token.replace(" ", "␣").replace("\n", "⏎") or "∅"


def _span(part: Sequence[int]) -> str:
    first, behind = part
    return "-" if behind <= first else str(first) if behind == first + 1 else f"{first}-{behind - 1}"


_STYLE = """
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid light-dark(#ddd, #444) }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0 }
article { padding: .8rem 0; border-bottom: 1px solid light-dark(#ddd, #444) }
pre { background: light-dark(#f6f6f6, #262626); padding: .8rem; overflow-x: auto }
"""
