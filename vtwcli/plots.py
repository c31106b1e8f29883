"""What all plots share: colours, figures that need no display, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli import files
from vtwcli.outputs import MARK

# colours that stay apart for colour-blind readers and in print
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#6B6B6B", "#009E73"


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
        files.write(path, lambda temporary: figure.savefig(temporary, dpi=150, metadata=metadata))
