"""``vtw verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.commands.flags import JSON, TRUST, WORDS, argument, fields, flag, flags
from vtwcli.commands.options import begin
from vtwcli.io import console
from vtwcli.io.files import document
from vtwcli.recipe.recipe import EvalSection, ModelSection
from vtwcli.recipe.settings import section_of

EXAMPLES = """
Examples:

  vtw export demo --layer 9 --output demo-pruned && vtw verify demo-pruned

  vtw verify pruned --base llava-hf/llava-1.5-7b-hf --json
"""


@flags(
    argument("directory", Path, "DIR", "Directory that vtw export made."),
    flag("base", str, "Base model to compare with; by default the one it names.", metavar="MODEL"),
    flag("image", Path, "Image to ask about; by default a drawing.", metavar="FILE"),
    flag("max_new_tokens", int, "Tokens to generate.", min=1, default=16),
    fields(EvalSection, "backend"),
    fields(ModelSection, "device", "dtype"),
    TRUST,
    JSON,
    WORDS,
)
def command(**given: Any) -> None:
    """Check an exported directory: files, loading, a smoke generation, parity with the base.

    Exit code 3 when a check fails, 4 when it is not an export.
    """
    begin(given)
    backend = section_of(EvalSection, {"backend": given["backend"]}, EvalSection()).backend
    from vtwcli.export.formats import verify

    report = verify(
        given["directory"],
        base=given["base"],
        image=given["image"],
        device=given["device"] or "auto",
        dtype=given["dtype"] or "auto",
        max_new_tokens=given["max_new_tokens"],
        backend=backend,
        trust_remote_code=bool(given["trust_remote_code"]),
    )
    if given["json"]:
        console.result_text(document(report))
        return
    console.result_text(f"{given['directory']}: verified")
    if releases := report.get("transformers"):
        others = ", ".join(releases["tested"]) or "no release named"
        console.note(
            f"with transformers {releases['installed']}; exported with {releases['exported_with']}, its code "
            f"tested with {others}"
        )
    if releases := report.get("onnxruntime"):
        made = report["made_with"]
        others = ", ".join(releases["tested"]) or "no release named"
        tools = ", ".join(
            f"{name} {made[name]}" for name in ("transformers", "torch", "onnx") if name in made
        )
        engine = (
            f"OpenVINO {report['openvino']['installed']}"
            if "openvino" in report
            else (f"ONNX Runtime {releases['installed']}")
        )
        console.note(
            f"with {engine}; made with {tools or 'nothing named'}, checked with ONNX Runtime {others}"
        )
