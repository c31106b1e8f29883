"""The model card and the page of an exported directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtwcli.export.directory.manifest import CARD
from vtwcli.io import text
from vtwcli.schedule import Schedule
from vtwcli.schedule.sentences import describe


def write_page(name: str, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``README.md`` and ``index.html``."""
    (folder / CARD).write_text(card(name, manifest), encoding="utf-8")


def card(name: str, manifest: Mapping[str, Any]) -> str:
    """The model card: what the directory is, what made it, with what it was checked.

    Args:
        name: of the directory.
        manifest: complete but for ``files``.
    """
    model, made, layers = manifest["model"], manifest["versions"], manifest["text"]["layers"]
    base = text.code(model["name"]) + (
        f" at revision {text.code(model['revision'])}" if model["revision"] else ""
    )
    actions = Schedule.from_dict(manifest["schedule"]).actions
    libraries = ", ".join(
        f"{library} {made[library]}" for library in ("transformers", "torch", "onnx", "onnxscript")
    )
    return f"""---
library_name: transformers.js
---

# {text.markdown(name)}

{base} for transformers.js, with a visual token schedule baked in.

{chr(10).join(f"- {describe(action, layers)}" for action in actions) or "Nothing is pruned."}
"""
