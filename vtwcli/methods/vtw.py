"""VTW: every visual token leaves at one layer (arXiv 2405.05803)."""

from __future__ import annotations

from typing import Any

from vtwcli.schedule.schedule import Schedule


def schedule(layer: int, **provenance: Any) -> Schedule:
    """Withdraw all visual tokens at ``layer``; ``vtw calibrate`` finds it."""
    return Schedule.withdraw_at(layer, **provenance)
