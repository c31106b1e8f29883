"""One export function for all formats, as the command line and recipes call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.recipe import ExportSection, ModelSection
from vtwcli.schedule import Schedule

_HF_DTYPES = {"auto": None, "fp32": "float32", "fp16": "float16"}
_ONNX_DTYPES = {"auto": "fp32", "float32": "fp32", "float16": "fp16"}


def export(
    model: ModelSection,
    schedule: Schedule,
    output: Path,
    options: ExportSection,
    *,
    force: bool = False,
    calibration: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Write a model with its schedule baked in, in the format of ``options``.

    Args:
        model: what to export.
        schedule: what to bake in.
        output: directory to make; nothing is there before everything is.
        options: format, type, and so on.
        force: replace an existing directory.
        calibration, evaluation, recipe: for the record of a Hugging Face directory, as in ``export_hf``.

    Returns:
        The manifest of a Hugging Face directory, or the report of an ONNX export.

    Raises:
        UsageError, NotFoundError, GateError, VtwError: as ``export_hf`` and ``export_onnx``.
    """
    if options.format == "onnx":
        from vtwcli.export.onnx import export_onnx
        from vtwcli.models.checkpoint import resolve

        return export_onnx(
            resolve(model.name, trust_remote_code=model.trust_remote_code),
            schedule,
            output,
            dtype=_ONNX_DTYPES.get(options.dtype, options.dtype),
            opset=options.opset,
            merged=options.merged,
            quantize=options.quantize,
            force=force,
        )
    from vtwcli.export.hf import export_hf

    return export_hf(
        model.name,
        schedule,
        output,
        dtype=_HF_DTYPES.get(options.dtype, options.dtype),
        force=force,
        calibration=calibration,
        evaluation=evaluation,
        recipe=recipe,
    )
