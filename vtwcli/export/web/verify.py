"""Proves that a directory for transformers.js is whole, runs, and computes what the base model computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtwcli.data.sample import Sample
from vtwcli.errors import GateError, NotFoundError, UsageError, VtwError, first_line
from vtwcli.export.directory.manifest import at_hand, check_files, file_totals, read_manifest
from vtwcli.export.onnx.export import PARITY
from vtwcli.export.onnx.parity import arrays
from vtwcli.export.onnx.source import Source
from vtwcli.export.onnx.trace import check_file
from vtwcli.export.onnx.verify import frame, running
from vtwcli.export.web.kind import FORMAT
from vtwcli.export.web.model import WebModel, as_the_library
from vtwcli.export.web.parity import check, lengths_wanted
from vtwcli.io import console
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import encode
from vtwcli.schedule.schedule import Schedule


def verify_web(
    directory: Path, sample: Sample, *, base: str | None, device: str, dtype: str, steps: int
) -> dict[str, Any]:
    """Check a directory for transformers.js, driven from Python as that library drives it.

    In order: every file against the manifest; every graph by the ONNX checker; a greedy answer about an image; that
    visual tokens are gone where the schedule says so; and, where the base model is at hand, that tokens and logits are
    torch's in float32. Quantized graphs are measured, not judged.

    Args:
        directory: what ``export_web`` made.
        sample: what to ask.
        base: the base model; by default the one in the manifest, if it is on this machine.
        device: ``auto`` or ``cpu``.
        dtype: ``auto`` or ``float32``.
        steps: length of the answer.

    Returns:
        The report, as that of ``verify_onnx``.

    Raises:
        GateError: a check failed; the message says which.
        NotFoundError: not an export, or it or the base cannot be read.
        UsageError: a base of another family, or a device or type that they are not compared in.
    """
    import onnxruntime

    if dtype not in ("auto", "float32"):
        raise UsageError("graphs are compared with torch in float32", "leave out --dtype")
    if device not in ("auto", "cpu"):
        raise UsageError("graphs for transformers.js are checked on the CPU", "leave out --device")
    manifest = read_manifest(directory, FORMAT)
    files = check_files(directory, manifest)
    for graph in manifest["graphs"]:
        try:
            check_file(directory / graph["file"])
        except VtwError as error:
            raise GateError(f"{directory}: {error}") from error
    schedule = Schedule.from_dict(manifest["schedule"], "the manifest's schedule")
    with running(directory):
        smoke = _smoke(directory, manifest, schedule, sample, steps)
    name = base or at_hand(manifest["model"])
    if name is None:
        console.note(
            f"the base model {manifest['model']['name']} is not here to compare with; name it with --base"
        )
    with running(directory):
        parity = _parity(directory, manifest, schedule, sample, name, steps)
    return {
        "directory": str(directory),
        "model": manifest["model"],
        "schedule": manifest["schedule"],
        "files": {**file_totals(manifest), **files},
        "graphs": [graph["file"] for graph in manifest["graphs"]],
        "onnxruntime": {
            "installed": onnxruntime.__version__,
            "tested": manifest.get("tested", {}).get("onnxruntime", []),
        },
        "made_with": manifest.get("versions", {}),
        "smoke": smoke,
        "compared_with": name,
        "parity": parity,
        "device": "cpu",
    }


def _smoke(
    directory: Path, manifest: Mapping[str, Any], schedule: Schedule, sample: Sample, steps: int
) -> dict[str, Any]:
    """One greedy answer, and what the caches hold afterwards."""
    loaded, exported = frame(directory), WebModel(directory, manifest)
    encoded = encode(loaded, sample)
    inputs = as_the_library(encoded.inputs, manifest)
    wanted, visual = lengths_wanted(inputs, schedule, manifest)
    logits, state = exported.prefill(arrays(inputs))
    tokens = [int(logits[0].argmax())]
    while len(tokens) < steps and tokens[-1] not in manifest["tokens"]["eos_ids"]:
        logits = exported.step(logits.argmax(-1), state)
        tokens.append(int(logits[0].argmax()))
    entries, held = state.cache_lengths(), len(tokens) - 1  # the last token was not fed back
    for layer, (have, want) in enumerate(zip(entries, wanted, strict=True)):
        if have != want + held:
            raise GateError(f"layer {layer} holds {have} entries in its KV cache, not {want + held}")
    return {
        "image": sample.id,
        "prompt": sample.prompt,
        "answer": loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        "tokens": tokens,
        "text_tokens": inputs["input_ids"].shape[1] - visual,
        "visual_tokens": visual,
        "visual_per_layer": schedule.visual_per_layer(manifest["text"]["layers"], visual),
        "cache_entries": entries,
    }


def _parity(
    directory: Path,
    manifest: dict[str, Any],
    schedule: Schedule,
    sample: Sample,
    name: str | None,
    steps: int,
) -> dict[str, Any]:
    """The comparison with the base; without one what the export found."""
    if name is None:
        file = directory / PARITY
        try:
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise NotFoundError(f"{file} cannot be read: {first_line(error)}") from error
        return kept
    source = Source.of(resolve(name))
    wanted = manifest["model"]["model_type"]
    if source.family.model_type != wanted:
        raise UsageError(f"{name!r} is not of the family {wanted!r}")
    return check(source, schedule, directory, manifest, [sample], steps, None)
