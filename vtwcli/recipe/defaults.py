"""What is read where neither a recipe nor a command names data."""

from __future__ import annotations

from pathlib import Path

from vtwcli.data.spec import DataSpec
from vtwcli.data.tasks import DEFAULT_MIX
from vtwcli.export.directory.manifest import exported_from


def default_data(model: str) -> list[DataSpec]:
    """What is read for a model when nothing else is asked for: one source per task of the mix.

    The demo data for the demo model and what was exported from it, else ``DEFAULT_MIX`` from the Hub.
    """
    demo = model == "demo" or exported_from(Path(model)) == "demo"
    return [DataSpec(source=name) for name in (("demo",) if demo else DEFAULT_MIX)]
