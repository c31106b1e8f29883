"""Proves that an exported ONNX directory is whole, runs, and computes what the base model computes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtwcli.data.sample import Sample
from vtwcli.errors import GateError, NotFoundError, UsageError, VtwError, first_line, typed_line
from vtwcli.export.directory.manifest import at_hand, check_files, file_totals, read_manifest
from vtwcli.export.directory.own_code import read_own_code
from vtwcli.export.onnx.companions import scripts
from vtwcli.export.onnx.failures import as_vtw_errors
from vtwcli.io import console
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.config import read_config
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import encode
from vtwcli.models.loading import LoadedModel, choose_device
from vtwcli.models.processor import load_processor
from vtwcli.ort import FORMAT, OnnxModel, has_device
from vtwcli.schedule.schedule import Schedule


def verify_onnx(
    directory: Path,
    sample: Sample,
    *,
    base: str | None,
    device: str,
    dtype: str,
    steps: int,
    backend: str = "onnx",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check a directory of ONNX graphs, from its digests to what they generate.

    In order: every file against the manifest; every graph by the ONNX checker, and its inputs and outputs against
    the manifest; a greedy answer about an image; that visual tokens are gone where the schedule says so; and, where
    the base model is at hand, that tokens and logits are torch's in float32, as in the export. OpenVINO's are else
    compared with ONNX Runtime's, which the export compared. Quantized graphs are measured, not judged.

    Args:
        directory: what ``export_onnx`` made.
        sample: what to ask.
        base: the base model; by default the one in the manifest, if it is on this machine.
        device: where the graphs run; ``auto`` is CUDA where the backend has it.
        dtype: ``auto`` or ``float32``.
        steps: length of the answer.
        backend: what runs the graphs, ``onnx`` or ``openvino``.

    Returns:
        The report: ``directory``, ``model``, ``schedule``, ``files``, ``graphs``, ``smoke``, ``compared_with`` (None
        without a base), ``parity`` (of this comparison, else the one that the export kept), ``onnxruntime`` (the
        release ``installed``, and those ``tested`` at export; of OpenVINO only what is installed, under ``openvino``),
        ``made_with`` (versions) and ``device``.

    Raises:
        GateError: a check failed; the message says which.
        NotFoundError: not an export, or it or the base cannot be read.
        UsageError: a base of another family, or a type that graphs are not compared in.
    """
    if dtype not in ("auto", "float32"):
        raise UsageError("ONNX graphs are compared with torch in float32", "leave out --dtype")
    manifest = read_manifest(directory, FORMAT)
    with as_vtw_errors():
        auto = "cuda" if has_device("cuda", backend) else "cpu"
        place = auto if device == "auto" else choose_device(device).type
        exported = OnnxModel(directory, place, backend=backend)
    files = check_files(directory, manifest)
    if not trust_remote_code:  # none of it runs here, but it is not to be called verified either
        read_own_code(directory, scripts(), {})
    for graph in manifest["graphs"]:
        check_graph(directory, graph)
    schedule = Schedule.from_dict(manifest["schedule"], "the manifest's schedule")
    with running(directory):
        smoke = _smoke(exported, schedule, sample, steps)
    name = base or at_hand(manifest["model"])
    if name is None:
        console.note(
            f"the base model {manifest['model']['name']} is not here to compare with; name it with --base"
        )
    exported.release()
    with running(directory):
        parity = _parity(exported, manifest, schedule, sample, name, steps)
    return {
        "directory": str(directory),
        "model": manifest["model"],
        "schedule": manifest["schedule"],
        "files": {**file_totals(manifest), **files},
        "graphs": [graph["file"] for graph in manifest["graphs"]],
        **_engines(exported, manifest),
        "made_with": manifest.get("versions", {}),
        "smoke": smoke,
        "compared_with": name,
        "parity": parity,
        "device": exported.device,
    }


def _engines(exported: OnnxModel, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What ran the graphs, and with what the export was checked."""
    tested = {"tested": manifest.get("tested", {}).get("onnxruntime", [])}
    installed = {"installed": exported.engine.version}
    if exported.backend == "onnx":
        return {"onnxruntime": installed | tested}
    return {exported.engine.package: installed, "onnxruntime": tested}


@contextmanager
def running(directory: Path) -> Iterator[None]:
    """Tell of graphs that do not do what the manifest says, whatever they raise for it."""
    try:
        with as_vtw_errors():
            yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise GateError(
            f"{directory}: the graphs do not run as the manifest says: {typed_line(error)}"
        ) from error


def check_graph(directory: Path, graph: Mapping[str, Any]) -> None:
    """The ONNX checker, and the names of inputs and outputs."""
    import onnx

    from vtwcli.export.onnx.trace import check_file

    path = directory / graph["file"]
    try:
        check_file(path)
    except VtwError as error:
        raise GateError(f"{directory}: {error}") from error
    found = onnx.load(path, load_external_data=False).graph
    for ports, values in ((graph["inputs"], found.input), (graph["outputs"], found.output)):
        names, wanted = [value.name for value in values], [port["name"] for port in ports]
        if names != wanted:
            other = sorted(set(names) ^ set(wanted)) or ["their order"]
            raise GateError(f"{path} has other inputs or outputs than the manifest says: {other[0]}")


def _smoke(exported: OnnxModel, schedule: Schedule, sample: Sample, steps: int) -> dict[str, Any]:
    """One greedy answer, and what the caches hold afterwards."""
    from vtwcli.export.onnx.parity import arrays

    loaded = frame(exported.directory)
    encoded = encode(loaded, sample)
    visual = int(encoded.visual.sum())
    text = encoded.prompt_length - visual
    logits, state = exported.prefill(arrays(encoded.inputs))
    tokens = [int(logits[0].argmax())]
    while len(tokens) < steps and tokens[-1] not in exported.manifest["tokens"]["eos_ids"]:
        logits = exported.step(logits.argmax(-1), state)
        tokens.append(int(logits[0].argmax()))
    present = schedule.visual_per_layer(exported.manifest["text"]["layers"], visual)
    entries, held = state.cache_lengths(), len(tokens) - 1  # the last token was not fed back
    for layer, (have, left) in enumerate(zip(entries, present, strict=True)):
        if have != text + left + held:
            raise GateError(
                f"layer {layer} holds {have} entries in its KV cache, not {text} text, {held} generated and {left} "
                "visual tokens"
            )
    return {
        "image": sample.id,
        "prompt": sample.prompt,
        "answer": loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        "tokens": tokens,
        "text_tokens": text,
        "visual_tokens": visual,
        "visual_per_layer": present,
        "cache_entries": entries,
    }


def frame(directory: Path) -> LoadedModel:
    """The directory's processor and config around a model without weights, to encode samples with."""
    config, family = read_config(directory, str(directory))
    checkpoint = Checkpoint(str(directory), directory, None, config, family, False)
    model = checkpoint.skeleton(torch.float32)
    place = torch.device("cpu")
    return LoadedModel(
        model, load_processor(checkpoint), family, str(directory), None, directory, place, torch.float32
    )


def _parity(
    exported: OnnxModel,
    manifest: dict[str, Any],
    schedule: Schedule,
    sample: Sample,
    name: str | None,
    steps: int,
) -> dict[str, Any]:
    """The comparison with the base; without one that with ONNX Runtime, and of that itself what the export found."""
    from vtwcli.export.onnx import export as onnx

    directory = exported.directory
    if name is None and exported.backend != "onnx":
        return _against_onnx_runtime(exported, sample, steps)
    if name is None:
        file = directory / onnx.PARITY
        try:
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise NotFoundError(f"{file} cannot be read: {first_line(error)}") from error
        return kept
    source = onnx.Source.of(resolve(name))
    wanted = manifest["model"]["model_type"]
    if source.family.model_type != wanted:
        raise UsageError(f"{name!r} is not of the family {wanted!r}")
    return onnx.check(source, schedule, directory, manifest, [sample], steps, None, exported.backend)


def _against_onnx_runtime(exported: OnnxModel, sample: Sample, steps: int) -> dict[str, Any]:
    """The graphs compared with themselves in ONNX Runtime, along its own greedy tokens."""
    from vtwcli.export.onnx import parity as onnx_parity

    inputs = encode(frame(exported.directory), sample).inputs
    known = OnnxModel(exported.directory)
    logits, state = known.prefill(onnx_parity.arrays(inputs))
    columns = [logits]
    while len(columns) < steps:
        columns.append(known.step(columns[-1].argmax(-1), state))
    found = np.stack(columns, 1)
    known.release()
    result = onnx_parity.measure(exported, [onnx_parity.Reference(inputs, found.argmax(-1), found)])
    reference = f"{known.engine.name} {known.engine.version}"
    onnx_parity.judge(result, exported.manifest, exported, reference)
    facts = {"reference": reference, "samples": 1, "steps": steps, **onnx_parity.engine_named(exported)}
    return {"method": "generation", **facts, **result}
