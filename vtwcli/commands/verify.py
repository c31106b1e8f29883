"""``vtw verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtwcli import console
from vtwcli.files import document
from vtwcli.options import (
    Device,
    Dtype,
    Json,
    Quiet,
    Trust,
    Verbose,
    begin,
)

EXAMPLES = """
Examples:

  vtw export demo --layer 9 --output demo-pruned && vtw verify demo-pruned

  vtw verify pruned --base llava-hf/llava-1.5-7b-hf --json
"""


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that vtw export made.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="Base model to compare with; by default the one it names."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="Image to ask about; by default a drawing.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check an exported directory: files, loading, a smoke generation, parity with the base.

    Exit code 3 when a check fails, 4 when it is not an export.
    """
    begin(quiet, verbose)
    from vtwcli.export.verify import verify as run

    report = run(
        directory,
        base=base,
        image=image,
        device=device or "auto",
        dtype=dtype or "auto",
        max_new_tokens=max_new_tokens,
        trust_remote_code=bool(trust_remote_code),
    )
    if as_json:
        console.result_text(document(report))
    else:
        console.result_text(f"{directory}: verified")
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
            console.note(
                f"with ONNX Runtime {releases['installed']}; made with {tools or 'nothing named'}, checked with "
                f"ONNX Runtime {others}"
            )
