"""Export and verify for all formats, as the command line and recipes call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.data.sample import Sample
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.models.dtypes import LONG, SHORT
from vtwcli.recipe.exports import ExportSection
from vtwcli.recipe.recipe import ModelSection
from vtwcli.results.calibration import Calibration
from vtwcli.results.evaluation import Evaluation
from vtwcli.schedule.schedule import Schedule


def export(
    model: ModelSection,
    schedule: Schedule,
    output: Path,
    options: ExportSection,
    *,
    force: bool = False,
    calibration: Calibration | None = None,
    evaluation: Evaluation | None = None,
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
        The manifest of a Hugging Face directory, or the report of an export of graphs.

    Raises:
        UsageError, NotFoundError, GateError, VtwError: as ``export_hf``, ``export_onnx`` and ``export_web``.
    """
    if options.format != "hf":
        from vtwcli.models.hub import resolve

        resolved = resolve(model.name, trust_remote_code=model.trust_remote_code)
        graphs: dict[str, Any] = {
            "dtype": SHORT.get("float32" if options.dtype == "auto" else options.dtype, options.dtype),
            "opset": options.opset,
            "quantize": options.quantize,
            "force": force,
        }
        if options.format == "transformers.js":
            from vtwcli.export.web.export import export_web

            return export_web(resolved, schedule, output, **graphs)
        from vtwcli.export.onnx.export import export_onnx

        return export_onnx(resolved, schedule, output, merged=options.merged, **graphs)
    from vtwcli.export.hf.export import export_hf

    return export_hf(
        model.name,
        schedule,
        output,
        dtype=LONG.get(options.dtype, options.dtype),
        force=force,
        calibration=calibration,
        evaluation=evaluation,
        recipe=recipe,
    )


def verify(
    directory: Path,
    *,
    base: str | None = None,
    image: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 16,
    backend: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check an exported directory, whatever its format, from its digests to what it generates.

    Args:
        directory: what ``export`` made.
        base: the base model; by default the one in the manifest, if it is on this machine.
        image: what to ask about; by default a drawn scene.
        device: as for ``load``.
        dtype: as for ``load``.
        max_new_tokens: length of the answer.
        backend: what runs ONNX graphs, ``onnx`` (ONNX Runtime, also for ``auto``) or ``openvino``.
        trust_remote_code: run the directory's code also where it is not this tool's own, byte for byte.

    Returns:
        The report of ``verify_hf``, ``verify_onnx`` or ``verify_web``.

    Raises:
        GateError: a check failed; the message says which.
        NotFoundError: not an export, or it or the base cannot be read.
        UsageError: some code in the directory is not this tool's, and is not trusted; then nothing of it ran. Or a
            backend that is not installed, or of a directory without ONNX graphs.
    """
    from vtwcli import ort
    from vtwcli.export.directory.manifest import read_manifest
    from vtwcli.export.web.kind import is_web_export

    sample = sample_of(image)
    graphs, web = ort.is_export(directory), is_web_export(directory)
    if not graphs and not web:
        if backend not in ("auto", "torch"):
            raise UsageError(f"{directory} is not a directory of ONNX graphs", "leave out --backend")
        read_manifest(directory)  # says what is missing before torch is imported
    if web:
        if backend != "auto":
            raise UsageError(f"{directory} is run as transformers.js runs it", "leave out --backend")
        from vtwcli.export.web.verify import verify_web

        return verify_web(directory, sample, base=base, device=device, dtype=dtype, steps=max_new_tokens)
    if graphs:
        if backend == "torch":
            raise UsageError(
                f"{directory} holds ONNX graphs, which torch does not run", "leave out --backend"
            )
        from vtwcli.export.onnx.verify import verify_onnx

        return verify_onnx(
            directory,
            sample,
            base=base,
            device=device,
            dtype=dtype,
            steps=max_new_tokens,
            backend="onnx" if backend == "auto" else backend,
            trust_remote_code=trust_remote_code,
        )
    from vtwcli.export.hf.verify import verify_hf

    return verify_hf(
        directory,
        sample,
        base=base,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
    )


def sample_of(image: Path | None) -> Sample:
    """What an export is asked: about an image, or about a drawn scene."""
    from vtwcli.data.cells import BadRow
    from vtwcli.data.images import decode_image

    if image is None:
        from vtwcli.data.scenes import examples

        example = next(examples("eval", 1, tasks=("caption",)))
        return Sample("a drawn scene", "smoke", (example.image,), example.question)
    try:
        return Sample(str(image), "smoke", (decode_image(str(image), "image", None),), "Describe the image.")
    except BadRow as error:
        raise NotFoundError(f"{image}: {error}") from error
