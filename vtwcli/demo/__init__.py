"""The demo: a small trained LLaVA model, the generator of its data and its training script."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def model_dir() -> Path:
    """The directory of the shipped model, as ``from_pretrained`` takes it."""
    return Path(str(files(__name__) / "model"))
