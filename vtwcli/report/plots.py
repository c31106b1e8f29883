"""What all plots share: colours, figures that need no display, and how they are saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from vtwcli.io import files
from vtwcli.io.outputs import MARK
from vtwcli.io.text import one_line

# colours that stay apart for colour-blind readers and in print
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#6B6B6B", "#009E73"


_MOST_CHARACTERS = 100  # about as many as a figure is wide


def new_figure() -> tuple[Any, Any]:
    """A figure that needs no display and leaves pyplot's global state alone."""
    figure, [axis] = new_panels(1)
    return figure, axis


def new_panels(count: int) -> tuple[Any, Any]:
    """A figure of panels above one another, which share the horizontal axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 1.2 + 3.2 * count), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", lw=0.5)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in one step, with no date inside, so that equal results give equal files."""
    from matplotlib import rc_context

    metadata = {
        ".png": {"Software": MARK},
        ".svg": {"Creator": MARK, "Date": None},
        ".pdf": {"Creator": MARK, "CreationDate": None},
    }.get(path.suffix)
    with rc_context({"svg.hashsalt": MARK}):
        files.write(path, lambda temporary: draw(figure, temporary, dpi=150, metadata=metadata))


def draw(figure: Any, target: Any, **options: Any) -> None:
    """``figure.savefig`` with text drawn as it is, whatever model names and tasks are like, and without warnings."""
    from matplotlib.text import Text

    axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)]
    numbers = {id(axis.get_offset_text()) for axis in axes}  # of an axis: matplotlib writes those itself
    numbers |= {id(label) for axis in axes for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(lambda one: isinstance(one, Text) and id(one) not in numbers):
        text.set_parse_math(False)
        text.set_text(_drawable(text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(target, **options)


def _drawable(text: Any) -> str:
    """What a text says, in characters that its font has: ``<U+4F60>`` for others; a long text is cut."""
    from matplotlib.font_manager import findfont, get_font

    wanted = one_line(text.get_text())
    font = get_font(findfont(text.get_fontproperties()))
    drawn = "".join(one if font.get_char_index(ord(one)) else f"<U+{ord(one):04X}>" for one in wanted)
    return drawn if len(drawn) <= _MOST_CHARACTERS else f"{drawn[: _MOST_CHARACTERS - 1]}…"
