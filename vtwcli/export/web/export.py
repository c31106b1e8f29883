"""Export to a directory that transformers.js runs unchanged, with the visual tokens leaving inside the decoder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vtwcli import __version__
from vtwcli.data.sample import Sample
from vtwcli.export.directory.manifest import file_entries, save_json
from vtwcli.export.directory.publish import check_target, publish
from vtwcli.export.directory.source import source_of
from vtwcli.export.onnx import export as onnx
from vtwcli.export.onnx.source import Source
from vtwcli.export.web.graphs import DECODER
from vtwcli.export.web.kind import FOLDER, FORMAT, FORMAT_VERSION, MANIFEST, SUFFIXES
from vtwcli.io import console
from vtwcli.machine.libraries import versions
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.dtypes import LONG, torch_type
from vtwcli.models.families import placeholder_ids
from vtwcli.models.loading import LoadedModel
from vtwcli.schedule.schedule import Schedule


def export_web(
    model: LoadedModel | Checkpoint,
    schedule: Schedule | Mapping[str, Any] | int,
    output: Path,
    *,
    dtype: str = "fp32",
    opset: int = 20,
    quantize: str | None = None,
    samples: Sequence[Sample] | None = None,
    steps: int = 16,
    force: bool = False,
) -> dict[str, Any]:
    """Write a model with its schedule for transformers.js, and prove that the graphs compute what torch computes.

    Args:
        model: what to export.
        schedule: static, without ``mute``, and nothing leaves in front of layer 1.
        output: directory to make; nothing is there before everything is checked.
        dtype: ``fp32`` or ``fp16``, of weights and activations.
        opset: 18 to 24.
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
    from vtwcli.export.web.files import of_the_library
    from vtwcli.export.web.page import write_page
    from vtwcli.export.web.parity import check
    from vtwcli.export.web.settings import check_config, write_config, write_settings

    onnx.check_options(dtype, opset, quantize)
    check_target(output, force, source_of(model))
    source, plan = onnx.opened(model, schedule)
    check_config(source)
    began = time.perf_counter()
    with publish(output, force, source_of(model)) as folder:
        manifest = write_graphs(source, plan, folder, dtype=dtype, opset=opset)
        manifest["tokens"] |= write_settings(source, folder)
        written = time.perf_counter()
        report = check(source, plan, folder, manifest, samples, steps, quantize)
        save_json(folder / onnx.PARITY, report)
        write_config(source, folder, of_the_library(folder, manifest))
        manifest["tested"] = {"onnxruntime": [manifest["versions"]["onnxruntime"]]}
        write_page(output.absolute().name, folder, manifest)
        manifest["files"] = file_entries(folder)
        save_json(folder / MANIFEST, manifest)
    return onnx.report_of(output, manifest, report, began, written)


def write_graphs(source: Source, plan: Schedule, folder: Path, *, dtype: str, opset: int) -> dict[str, Any]:
    """Write the graphs and return what a manifest says of them; see ``export_web``."""
    from vtwcli.export.onnx import graphs as onnx_graphs
    from vtwcli.export.onnx.trace import ready
    from vtwcli.export.web.files import save
    from vtwcli.export.web.graphs import all_graphs, stages_of
    from vtwcli.export.web.marker import add_front

    kind, text = torch_type(LONG[dtype]), source.config.get_text_config()
    cuts, frozen = onnx.removals(plan, source.depth), onnx.frozen_layers(plan, source.depth)
    stages = stages_of(source.depth, cuts, frozen)
    (folder / FOLDER).mkdir()
    entries = []
    with onnx.tracing(source, kind, opset) as (model, mode, names):
        graphs = all_graphs(model, source.family, stages, kind, frozen)
        with console.progress("export", total=len(graphs)) as task:
            for graph in graphs:
                task.update(graph.role)
                traced = ready(graph, mode, names, source.read, opset)
                if graph.role == DECODER:
                    add_front(traced, stages, text.hidden_size)
                file = f"{FOLDER}/{graph.role}{SUFFIXES[dtype]}.onnx"
                save(traced, folder / file)
                entries.append({"role": graph.role, "file": file, "dtype": dtype})
                task.advance()
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "producer": f"vtwcli {__version__}",
        "versions": versions() | {name: import_module(name).__version__ for name in onnx.LIBRARIES},
        "model": {
            "name": source.public_name,
            "revision": source.revision,
            "model_type": source.family.model_type,
        },
        "schedule": plan.to_dict(),
        "withdrawal_layer": next((cut["at"] for cut in cuts if cut["action"] == "withdraw"), None),
        "dtype": dtype,
        "opset": opset,
        "quantize": None,
        "graphs": entries,
        "text": {"layers": source.depth, "max_length": onnx_graphs.max_length(text)},
        "vision": onnx.vision_entry(source),
        "positions": "grid" if onnx_graphs.VISION[source.family.model_type].arrange == "patches" else "count",
        "tokens": {"placeholder_ids": list(placeholder_ids(source.family, source.config))},
    }
