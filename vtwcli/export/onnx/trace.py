"""From a wrapped module to an ONNX file, without ever holding the model's weights.

The structure is traced with fake parameters. While the graph is simplified its weights are inputs, so that nothing
tries to compute with them. Then each becomes a tensor that is read, converted and written when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vtwcli import __version__
from vtwcli.errors import NotFoundError, UsageError, VtwError, first_line
from vtwcli.export.onnx.graphs import Graph
from vtwcli.judge.kl import HINT, is_finite
from vtwcli.machine.libraries import quiet_exporters
from vtwcli.models.dtypes import name_of

Read = Callable[[Sequence[str]], Tensor]
"""Names of a parameter in the model (several where it is tied) -> its values, in any floating-point type."""

_SMALL = 1024  # bytes; smaller tensors stay inside the .onnx file


def fake_parameters(model: nn.Module) -> FakeTensorMode:
    """Replace a skeleton's meta parameters by fake ones on the CPU, tied ones by the same.

    Buffers stay as they are: they are small, real, and become constants of the graphs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is None:
                    continue
                if id(old) not in made:
                    empty = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(old)]
    return mode


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """id of each parameter -> its names in the model; tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def trace(graph: Graph, mode: FakeTensorMode, opset: int) -> ir.Model:
    """The graph as ONNX, with the parameters still fake.

    Raises:
        VtwError: torch cannot export the module, or fixed a dimension that must stay dynamic.
    """
    size = _Sizes(graph)
    outputs = (*graph.outputs, *graph.taps)
    with mode, torch.no_grad(), quiet_exporters():
        examples = tuple(
            torch.zeros([size(dim) for dim in port.dims], dtype=port.dtype) for port in graph.inputs
        )
        dynamic = tuple(
            {axis: torch.export.Dim.AUTO for axis, dim in enumerate(port.dims) if isinstance(dim, str)}
            for port in graph.inputs
        )
        try:
            program = torch.export.export(
                graph.module.eval(), examples, dynamic_shapes=(dynamic,), strict=False
            )
            exported = torch.onnx.export(
                program,
                (),
                None,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=[port.name for port in graph.inputs],
                output_names=[port.name for port in outputs],
            )
        except Exception as error:
            raise VtwError(f"{graph.role}: torch cannot export it: {first_line(error)}") from error
    assert exported is not None
    model = exported.model
    for port, value in zip(
        (*graph.inputs, *outputs), (*model.graph.inputs, *model.graph.outputs), strict=True
    ):
        assert value.shape is not None
        if value.name != port.name:
            raise VtwError(f"{graph.role}: {port.name} became {value.name}")
        fixed = [dim if isinstance(dim, int) else None for dim in value.shape]
        for dim, traced in zip(port.dims, fixed, strict=True):
            if dim != traced and (traced is not None) and (isinstance(dim, int) or port in graph.inputs):
                raise VtwError(f"{graph.role}: torch fixed {dim} of {port.name} at {traced}")
        value.shape = ir.Shape(
            [dim if traced is None else traced for dim, traced in zip(port.dims, fixed, strict=True)]
        )
    return model


class _Sizes:
    """Example sizes for named dimensions: different ones, none of them 0 or 1, which torch would take for fixed."""

    _CHOICES = (2, 5, 3, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79)

    def __init__(self, graph: Graph) -> None:
        self.scale = graph.scale
        self.chosen: dict[str, int] = {}

    def __call__(self, dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        if " + " in dim:
            return sum(self(part) for part in dim.split(" + "))
        if dim in self.scale:
            base, factor = self.scale[dim]
            return self(base) * factor
        return self.chosen.setdefault(dim, self._CHOICES[len(self.chosen)])


def simplify(model: ir.Model, weights: Mapping[str, Any]) -> None:
    """Fold and merge what needs no weights, in place.

    Args:
        model: a traced graph.
        weights: the names of its initializers that are parameters; for the time being they become inputs, so that
            nothing computes with their values.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    graph = model.graph
    held = [graph.initializers.pop(name) for name in weights]
    for value in held:
        value.const_value = None
    graph.inputs.extend(held)
    with quiet_exporters():
        optimizer.optimize(model)
        onnx_fusions.fuse(model)  # norms and rotary embeddings as single operators where the opset has them
    common.ClearMetadataAndDocStringPass()(model)
    for value in held:
        graph.inputs.remove(value)
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None  # names of traced sizes mean nothing to a reader


def attach(model: ir.Model, sources: Mapping[str, list[str]], read: Read) -> None:
    """Give a simplified graph its weights, to be read when the file is written.

    A weight that is only transposed is stored transposed, so that no session has to hold both.

    Args:
        model: a simplified graph.
        sources: name of each weight in the graph -> its names in the model.
        read: where the values come from.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.inputs if value is not None}
    for name, source in sources.items():
        value = values.get(name)
        if value is None:  # a weight that nothing uses, such as a vision layer behind the selected one
            continue
        turns = [use.node for use in value.uses()]
        turned = all(node.op_type == "Transpose" and len(value.shape or ()) == 2 for node in turns)
        if turned:
            turned_value = ir.Value(
                name=source[0], type=value.type, shape=ir.Shape(reversed(list(value.shape or ())))
            )
            for node in turns:
                node.outputs[0].replace_all_uses_with(turned_value)
                graph.remove(node, safe=True)
            value = turned_value
        value.name = source[0]
        value.const_value = _lazy(value, source, turned, read)
        graph.register_initializer(value)


def _lazy(value: ir.Value, source: list[str], turned: bool, read: Read) -> ir.LazyTensor:
    kind, shape = value.dtype, value.shape
    assert kind is not None and isinstance(shape, ir.Shape)
    dtype = ir.tensor_adapters.to_torch_dtype(kind)

    def load() -> ir.Tensor:
        stored = read(source)
        if stored.is_floating_point() and not is_finite(stored):
            raise NotFoundError(f"{source[0]} holds values that are not finite (NaN or infinity)", HINT)
        converted, exact = stored.to(dtype), stored.dtype == dtype
        del stored  # copies of the largest weight are most of the export's memory
        if not exact and not is_finite(converted):
            raise UsageError(f"{source[0]} has values that {name_of(dtype)} cannot hold", "use fp32")
        converted = (converted.t() if turned else converted).contiguous()
        return ir.Tensor(converted.numpy(), dtype=kind, name=source[0])

    return ir.LazyTensor(load, dtype=kind, shape=shape, name=source[0])


def write(
    graph: Graph, mode: FakeTensorMode, names: Mapping[int, list[str]], read: Read, opset: int, folder: Path
) -> Path:
    """Trace, simplify and write one graph as ``ROLE.onnx``, with large weights in ``ROLE.onnx.data``.

    Args:
        graph: what to export.
        mode: the mode of its fake parameters.
        names: id of each parameter -> its names in the model.
        read: where the values come from.
        opset: of the file.
        folder: where to write.

    Raises:
        VtwError: it cannot be exported, or the file does not pass the ONNX checker.
    """
    path = folder / f"{graph.role}.onnx"
    model = ready(graph, mode, names, read, opset)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=_SMALL)
    check_file(path)
    return path


def ready(
    graph: Graph, mode: FakeTensorMode, names: Mapping[int, list[str]], read: Read, opset: int
) -> ir.Model:
    """What ``write`` writes, with weights that are read when they are; arguments as there."""
    from onnx_ir.passes import common

    model = trace(graph, mode, opset)
    inside = {name: names[id(p)] for name, p in graph.module.named_parameters(remove_duplicate=False)}
    sources = {name: inside[name] for name in model.graph.initializers if name in inside}
    simplify(model, sources)
    for _ in graph.taps:
        model.graph.outputs.pop()
    attach(model, sources, read)
    common.RemoveUnusedNodesPass()(model)
    model.producer_name, model.producer_version = "vtwcli", __version__
    return model


def check_file(path: Path) -> None:
    """Run the ONNX checker over a file and its data.

    Raises:
        VtwError: it does not pass.
    """
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise VtwError(f"{path.name} does not pass the ONNX checker: {first_line(error)}") from error
