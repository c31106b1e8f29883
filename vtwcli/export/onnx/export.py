"""Export to ONNX graphs that are split where the visual tokens leave.

A directory with ``vision_encoder``, ``embed_tokens`` and the decoder in one or two graphs, a manifest that says how
to drive them, the processor's files, a parity report, and a script that runs it all without this package.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtwcli import __version__
from vtwcli.data.sample import Sample
from vtwcli.errors import UsageError
from vtwcli.export.directory.manifest import CARD, file_entries, save_json
from vtwcli.export.directory.publish import check_target, publish
from vtwcli.export.directory.source import own_files, source_of
from vtwcli.export.onnx.companions import onnx_card, write_companions
from vtwcli.export.onnx.failures import as_vtw_errors
from vtwcli.export.onnx.source import Source
from vtwcli.io import console
from vtwcli.machine.libraries import quiet_libraries, versions
from vtwcli.machine.memory import memory_available
from vtwcli.models.checkpoint import COMPANIONS, Checkpoint
from vtwcli.models.dtypes import LONG, name_of, torch_type
from vtwcli.models.families import placeholder_ids
from vtwcli.models.loading import LoadedModel, load, memory_needed
from vtwcli.ort import FORMAT, FORMAT_VERSION, MANIFEST, OnnxModel
from vtwcli.schedule import words
from vtwcli.schedule.schedule import Schedule

if TYPE_CHECKING:
    from vtwcli.export.onnx.graphs import Graph, Port

OPSETS = range(18, 25)
FUSED_OPSET = 23  # the first with Attention and RMSNormalization as single operators
QUANTIZERS = ("int8", "int4")
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
PARITY = "parity.json"


def export_onnx(
    model: LoadedModel | Checkpoint,
    schedule: Schedule | Mapping[str, Any] | int,
    output: Path,
    *,
    dtype: str = "fp32",
    opset: int = 20,
    merged: bool = False,
    quantize: str | None = None,
    samples: Sequence[Sample] | None = None,
    steps: int = 16,
    force: bool = False,
) -> dict[str, Any]:
    """Write a model with its schedule as ONNX graphs, and prove that they compute what torch computes.

    The weights go from the checkpoint's files to the graphs' files one tensor at a time, quantized ones unpacked. The
    parity check runs the
    model in float32: a ``LoadedModel`` in float32 is used as it is; otherwise it is loaded where it fits, and where
    it does not, the graphs are compared with it layer by layer.

    Args:
        model: what to export.
        schedule: static, without ``mute``.
        output: directory to make; nothing is there before everything is checked.
        dtype: ``fp32`` or ``fp16``, of weights and activations.
        opset: 18 to 24; from 23 on attention and norms are single operators.
        merged: one decoder graph with the removal of visual tokens inside, instead of two.
        quantize: ``int8`` or ``int4`` weights of the decoder.
        samples: for the parity check; None takes synthetic ones.
        steps: new tokens per sample in the parity check.
        force: replace an existing directory.

    Returns:
        The report: ``output``, ``withdrawal_layer``, ``bytes``, ``graphs``, ``parity``, ``seconds``.

    Raises:
        UsageError: options or a schedule that cannot be exported.
        GateError: the graphs differ from torch; nothing is left.
        NotFoundError: weights or processor cannot be read.
    """
    check_options(dtype, opset, quantize)
    check_target(output, force, source_of(model))
    source, plan = opened(model, schedule)
    cuts, frozen = removals(plan, source.depth), frozen_layers(plan, source.depth)
    began = time.perf_counter()
    with publish(output, force, source_of(model)) as folder:
        manifest = write_graphs(source, cuts, folder, dtype=dtype, opset=opset, merged=merged, frozen=frozen)
        manifest["schedule"] = plan.to_dict()
        write_companions(source, manifest, folder)
        written = time.perf_counter()
        report = check(source, plan, folder, manifest, samples, steps, quantize)
        save_json(folder / PARITY, report)
        manifest["tested"] = {"onnxruntime": [manifest["versions"]["onnxruntime"]]}
        (folder / CARD).write_text(onnx_card(output.absolute().name, manifest), encoding="utf-8")
        manifest["files"] = file_entries(folder)
        save_json(folder / MANIFEST, manifest)
    return report_of(output, manifest, report, began, written)


def opened(
    model: LoadedModel | Checkpoint, schedule: Schedule | Mapping[str, Any] | int
) -> tuple[Source, Schedule]:
    """A model to export graphs of, and its schedule, refused before long work where they do not go together."""
    source = Source.of(model)
    if source.checkpoint is not None:
        own_files(source.checkpoint, COMPANIONS)  # what is refused must not take the time of an export
        quantization = source.checkpoint.quantization
        if quantization is not None and quantization.activations:
            console.warn(
                f"{source.name} quantizes activations too; its weights are unpacked exactly, and the graphs leave "
                "activations as they are"
            )
    plan = as_schedule(schedule)
    plan.check_depth(source.depth, source.family.first_withdrawal)
    return source, plan


def report_of(
    output: Path, manifest: Mapping[str, Any], parity: Mapping[str, Any], began: float, written: float
) -> dict[str, Any]:
    """What an export says of itself; ``began`` and ``written`` are readings of the clock of ``time.perf_counter``."""
    return {
        "output": str(output),
        "withdrawal_layer": manifest["withdrawal_layer"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "graphs": [graph["file"] for graph in manifest["graphs"]],
        "parity": parity,
        "seconds": {"export": written - began, "parity": time.perf_counter() - written},
    }


def as_schedule(schedule: Schedule | Mapping[str, Any] | int) -> Schedule:
    """A schedule from its canonical form, or from a withdrawal layer."""
    if isinstance(schedule, Schedule):
        return schedule
    return Schedule.withdraw_at(schedule) if isinstance(schedule, int) else Schedule.from_dict(dict(schedule))


def removals(schedule: Schedule, depth: int) -> list[dict[str, Any]]:
    """The actions at which the graphs are cut, in canonical form; those that start at layer L never do.

    Raises:
        UsageError: the schedule is dynamic or has actions that graphs cannot have.
    """
    actions = schedule.plain()
    for word in words.used(actions):
        if not word.fixed and word.onnx is not None:
            raise UsageError(*word.onnx)
    kept = [action for action in actions if action["at"] < depth]
    for word in words.used(kept):
        if word.onnx is not None:
            raise UsageError(*word.onnx)
    kept = [action for action in kept if action["action"] != "freeze"]
    layers = [action["at"] for action in kept]
    if len(set(layers)) < len(layers):
        raise UsageError("two actions at one layer cannot be exported to ONNX", "give them different layers")
    return kept


def frozen_layers(schedule: Schedule, depth: int) -> list[int]:
    """The layers in which visual tokens are there and not updated."""
    plain = schedule.plain()
    end = next((action["at"] for action in plain if action["action"] == "withdraw"), depth)
    return [d for d, still in enumerate(schedule.frozen_layers(depth)) if still and d < end]


def write_graphs(
    source: Source,
    cuts: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    dtype: str,
    opset: int,
    merged: bool,
    frozen: Sequence[int] = (),
) -> dict[str, Any]:
    """Write the graphs and return what a manifest says of them; see ``export_onnx``."""
    from vtwcli.export.onnx import graphs as onnx_graphs
    from vtwcli.export.onnx import trace as onnx_trace

    with tracing(source, torch_type(LONG[dtype]), opset) as (model, mode, names):
        graphs = onnx_graphs.all_graphs(model, source.family, cuts, merged, torch_type(LONG[dtype]), frozen)
        with console.progress("export", total=len(graphs)) as task:
            for graph in graphs:
                task.update(graph.role)
                onnx_trace.write(graph, mode, names, source.read, opset, folder)
                task.advance()
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "producer": f"vtwcli {__version__}",
        # not by the names of distributions, of which ONNX Runtime has several
        "versions": versions() | {name: import_module(name).__version__ for name in LIBRARIES},
        "model": {
            "name": source.public_name,
            "revision": source.revision,
            "model_type": source.family.model_type,
        },
        "withdrawal_layer": next((cut["at"] for cut in cuts if cut["action"] == "withdraw"), None),
        "dtype": dtype,
        "opset": opset,
        "merged": merged,
        "quantize": None,
        "graphs": [graph_entry(graph) for graph in graphs],
        "text": {
            "layers": source.depth,
            "max_length": onnx_graphs.max_length(source.config.get_text_config()),
        },
        "vision": vision_entry(source),
        "positions": "grid" if onnx_graphs.VISION[source.family.model_type].arrange == "patches" else "count",
        "tokens": {
            "placeholder_ids": list(placeholder_ids(source.family, source.config)),
            "eos_ids": [],
            "pad_id": 0,
        },
    }


@contextmanager
def tracing(
    source: Source, dtype: torch.dtype, opset: int
) -> Iterator[tuple[Any, Any, dict[int, list[str]]]]:
    """Yield a model's skeleton ready to be traced, the mode of its fake parameters, and their names by id."""
    from vtwcli.export.onnx import modules as onnx_modules
    from vtwcli.export.onnx import trace as onnx_trace

    model = source.skeleton(dtype)
    model.get_submodule(source.family.text_model).config._attn_implementation = onnx_modules.ATTENTION
    mode = onnx_trace.fake_parameters(model)  # before the wrappers, which hold some parameters themselves
    names = onnx_trace.parameter_names(model)
    attention = onnx_modules.fused_attention if opset >= FUSED_OPSET else onnx_modules.attention
    with onnx_modules.exportable_attention(attention), quiet_libraries():
        yield model, mode, names


def graph_entry(graph: Graph) -> dict[str, Any]:
    """A graph in a manifest."""

    def port(port: Port) -> dict[str, Any]:
        return {
            "name": port.name,
            "dtype": name_of(port.dtype),
            "shape": list(port.dims),
        }

    return {
        "role": graph.role,
        "file": f"{graph.role}.onnx",
        "layers": list(graph.layers) if graph.layers is not None else None,
        "removal": graph.removal,
        "inputs": [port(p) for p in graph.inputs],
        "outputs": [port(p) for p in graph.outputs],
    }


def vision_entry(source: Source) -> dict[str, Any]:
    """What the runtime must know to put the features of images in order."""
    from vtwcli.export.onnx.graphs import VISION

    config, vision = source.config, source.config.vision_config
    entry: dict[str, Any] = {"arrange": VISION[source.family.model_type].arrange}
    for name in ("image_size", "patch_size", "spatial_merge_size"):
        if isinstance(value := getattr(vision, name, None), int):
            entry[name] = value
    if (window := getattr(vision, "window_size", None)) is not None:
        entry["window"] = window // vision.spatial_merge_size // vision.patch_size
    if entry["arrange"] == "anyres":
        entry["grid_pinpoints"] = [list(pair) for pair in config.image_grid_pinpoints]
        ratio = getattr(config, "vision_aspect_ratio", None)
        entry["max_tiles"] = int(ratio.removeprefix("anyres_max_")) if ratio else None
    return entry


@as_vtw_errors()
def check(
    source: Source,
    schedule: Schedule,
    folder: Path,
    manifest: dict[str, Any],
    samples: Sequence[Sample] | None,
    steps: int,
    quantize: str | None,
    backend: str = "onnx",
) -> dict[str, Any]:
    """Compare the written graphs with torch; see ``onnx_parity`` and, for large models, ``onnx_layers``.

    Quantization comes after the comparison that must hold, and is measured by a second one. Graphs that are
    quantized already are only measured.

    Args:
        source: the model.
        schedule: what the graphs execute.
        folder: where they are.
        manifest: of them; gets ``quantize``.
        samples: questions; None takes ``synthetic_samples``.
        steps: new tokens per sample.
        quantize: ``int8`` or ``int4``, to be done here; None leaves the graphs as they are.
        backend: what runs the graphs.

    Raises:
        GateError: they differ.
        UsageError: the model does not fit in memory, and the check cannot do without it.
    """
    from vtwcli.export.onnx import layers as onnx_layers
    from vtwcli.export.onnx import parity as onnx_parity
    from vtwcli.export.onnx import quantize as quantizers
    from vtwcli.models.inputs import encode_batch

    chosen = list(samples) if samples is not None else synthetic_samples()
    cuts, loaded = removals(schedule, source.depth), source.loaded
    exported = OnnxModel(folder, backend=backend)
    facts = {"reference": onnx_parity.TORCH, "samples": len(chosen), "steps": steps}
    facts |= onnx_parity.engine_named(exported)
    if loaded is None:
        assert source.checkpoint is not None
        path, trust = str(source.checkpoint.path), source.checkpoint.trust_remote_code
        needed = memory_needed(source.checkpoint, torch.float32, unpacked=True)
        whole = needed * 2 <= memory_available(torch.device("cpu"))
        if not whole:
            _check_layers_will_do(schedule.plain(), quantize)
            console.note("the model does not fit in memory: comparing layer by layer")
        loaded = load(
            path, device="cpu", dtype="float32", trust_remote_code=trust, weights=whole, unpacked=True
        )
        if not whole:
            layer = cuts[0]["at"] if cuts else None
            result = onnx_layers.parity(loaded, layer, exported, chosen, steps)
            onnx_parity.judge(result, manifest, exported)
            return {"method": "layer by layer", **facts, **result}
    plan = schedule.to_dict() if cuts or frozen_layers(schedule, source.depth) else None
    references = []
    for at in range(0, len(chosen), 4):
        part = chosen[at : at + 4]
        names, inputs = [sample.id for sample in part], encode_batch(loaded, part)
        wanted = onnx_parity.torch_steps(loaded.model, plan, inputs, steps, names)
        references.append(onnx_parity.Reference(inputs, *wanted, names))
    result = onnx_parity.measure(exported, references)
    onnx_parity.judge(result, manifest, exported)
    report = {"method": "generation", **facts, **result}
    if quantize is not None:
        exported.release()
        for graph in exported.decoders:
            quantizers.quantize(folder / graph["file"], quantize)
        manifest["quantize"] = quantize
        exported = OnnxModel(folder)
        result = onnx_parity.measure(exported, references)
        onnx_parity.judge(result, manifest, exported)
        report["quantized"] = {"kind": quantize, **result}
    return report


def _check_layers_will_do(actions: Sequence[Mapping[str, Any]], quantize: str | None) -> None:
    if other := next((a["action"] for a in actions if a["action"] != "withdraw"), None):
        raise UsageError(
            f"a schedule with {other} is checked by generation, for which the model does not fit in memory",
            "use a schedule of withdraw",
        )
    if quantize is not None:
        raise UsageError(
            "the quantizers need the model in memory, and it does not fit", "leave out --quantize"
        )


def synthetic_samples() -> list[Sample]:
    """Two questions of different length about noise of different shape, and one without an image."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)

    def noise(high: int, wide: int) -> Image.Image:
        blocks = random.integers(0, 256, (high // 16, wide // 16, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((wide, high), Image.Resampling.BICUBIC)

    return [
        Sample("square", "synthetic", (noise(336, 336),), "What is in the picture?"),
        Sample(
            "wide", "synthetic", (noise(240, 480),), "Describe the colours that you see, one after the other."
        ),
        Sample("text", "synthetic", (), "How many days has a week?"),
    ]


def check_options(dtype: str, opset: int, quantize: str | None) -> None:
    """Refuse what no export has.

    Raises:
        UsageError: a package that is missing, or a type, opset or quantization that there is not.
    """
    absent = [name for name in LIBRARIES if find_spec(name) is None]
    if absent:
        raise UsageError(
            f"export to ONNX needs the package {absent[0]}", "install it with: pip install 'vtwcli[onnx]'"
        )
    if dtype not in LONG:
        raise UsageError(f"{dtype!r} is no export type", f"use {' or '.join(LONG)}")
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not supported", f"use {OPSETS[0]} to {OPSETS[-1]}")
    if quantize is not None and quantize not in QUANTIZERS:
        raise UsageError(f"{quantize!r} is no quantization", f"use {' or '.join(QUANTIZERS)}")
    if quantize is not None and dtype != "fp32":
        raise UsageError("quantization starts from fp32", "leave out --dtype")
