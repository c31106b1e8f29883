"""vtwcli: find, judge and ship the withdrawal of visual tokens from multimodal LLMs.

Models and the runtime, imported on first use so that ``import vtwcli`` costs nothing. Each subcommand is a function
of the same name in the module of the same name: ``from vtwcli.calibrate import calibrate``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "vtwcli.models.loading",
    "load_data": "vtwcli.data.sources",
    "Schedule": "vtwcli.schedule.schedule",
    "curve": "vtwcli.measure.curve",
    "pruned": "vtwcli.runtime",
    "apply": "vtwcli.runtime",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vtwcli' has no attribute {name!r}")
