"""The model card and the page of an exported directory."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtwcli.export.directory.manifest import CARD
from vtwcli.io import text
from vtwcli.report import pages
from vtwcli.schedule import Schedule
from vtwcli.schedule.sentences import describe

PAGE = "index.html"
LIBRARY = "4.3.1"
"""The release of transformers.js that the page loads, with which exports are tested."""


def write_page(name: str, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``README.md`` and ``index.html``.

    Args:
        name: of the directory.
        folder: where it is made.
        manifest: complete but for ``files``.
    """
    (folder / CARD).write_text(_card(name, manifest), encoding="utf-8")
    frame = string.Template(Path(__file__).with_name(PAGE).read_text(encoding="utf-8"))
    said = "\n".join(f"<p>{pages.text(sentence)}</p>" for sentence in _sentences(manifest))
    page = frame.substitute(title=pages.text(name), sentences=said, library=LIBRARY)
    (folder / PAGE).write_text(page, encoding="utf-8")


def _sentences(manifest: Mapping[str, Any]) -> list[str]:
    actions = Schedule.from_dict(manifest["schedule"]).actions
    return [describe(action, manifest["text"]["layers"]) for action in actions] or ["Nothing is pruned."]


def _card(name: str, manifest: Mapping[str, Any]) -> str:
    """What the directory is, what made it, with what it was checked."""
    model, made = manifest["model"], manifest["versions"]
    base = text.code(model["name"]) + (
        f" at revision {text.code(model['revision'])}" if model["revision"] else ""
    )
    libraries = ", ".join(
        f"{library} {made[library]}" for library in ("transformers", "torch", "onnx", "onnxscript")
    )
    return f"""---
library_name: transformers.js
pipeline_tag: image-text-to-text
---

# {text.markdown(name)}

{base} for transformers.js, with a visual token schedule baked in.

{chr(10).join(f"- {sentence}" for sentence in _sentences(manifest))}

transformers.js loads this directory as any other model, and needs no change: the embeddings have one channel more,
which marks visual tokens, and the decoder drops them where the schedule says. `index.html` asks it about a picture; it
wants a server, such as `python -m http.server`, and loads transformers.js {LIBRARY} from a CDN. Rows of a batch must
have equally many tokens, and equally many visual ones; the decoder refuses other batches. A direct call of the model
returns the logits of the last token alone.

Made by {manifest["producer"]} with {libraries}, and checked against torch with ONNX Runtime
{", ".join(manifest["tested"]["onnxruntime"])} (`parity.json`). `manifest.json` holds the digest of every file;
`vtw verify .` checks them.
"""
