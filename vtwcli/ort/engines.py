"""What runs a graph, ONNX Runtime or OpenVINO, under the same calls.

Values that come out stay where the engine has them, and can be fed again. OpenVINO computes in float32, whatever the
type of the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import NotFoundError, UsageError


class Value(Protocol):
    """A tensor of an engine."""

    def numpy(self) -> np.ndarray: ...
    def shape(self) -> Sequence[int]: ...


class Graph(Protocol):
    """An opened graph.

    Attributes:
        inputs: input name -> type of its numbers, as numpy calls it.
    """

    inputs: dict[str, str]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Input name -> numpy array or ``Value`` of an earlier run, to output name -> ``Value``."""


class Engine(Protocol):
    """A library that opens graphs.

    Attributes:
        name: what it is called.
        package: as it is imported and installed.
        version: the release that is installed.
        devices: that it has here, ``cpu`` and ``cuda``.
    """

    name: str
    package: str
    version: str
    devices: Sequence[str]

    def open(self, path: Path, device: str, threads: int) -> Graph:
        """Open an ONNX file; ``threads`` 0 lets the engine choose. Raises whatever the library raises."""


def engine(backend: str) -> Engine:
    """The engine of a backend, ``onnx`` or ``openvino``.

    Raises:
        UsageError: there is no such backend, or its package is not installed.
    """
    if backend not in _ENGINES:
        raise UsageError(f"{backend!r} is no backend of graphs (there are {', '.join(_ENGINES)})")
    return _ENGINES[backend]()


def has_device(device: str, backend: str = "onnx") -> bool:
    """Whether a backend, as it is installed, runs on ``cpu`` or ``cuda``."""
    return device in engine(backend).devices


def open_graph(engine: Engine, path: Path, device: str, threads: int) -> Graph:
    """An opened ONNX file.

    Raises:
        NotFoundError: the file is missing or broken.
    """
    try:
        return engine.open(path, device, threads)
    except Exception as error:  # the engines' own exceptions have no common base
        raise NotFoundError(f"{path} cannot be loaded: {_reason(error)}") from error


class _OnnxRuntime:
    name, package = "ONNX Runtime", "onnxruntime"

    def __init__(self) -> None:
        self._library = _library(self)
        self.version = self._library.__version__
        known = self._library.get_available_providers()
        self.devices = tuple(device for device, provider in _PROVIDERS.items() if provider in known)

    def open(self, path: Path, device: str, threads: int) -> Graph:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = self._library.InferenceSession(str(path), options, providers=[_PROVIDERS[device]])
        return _OnnxRuntimeGraph(session, self._library.OrtValue, device)


_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class _OnnxRuntimeGraph:
    def __init__(self, session: Any, value: Any, device: str) -> None:
        self.inputs = {port.name: _TYPES[port.type] for port in session.get_inputs()}
        self.session, self._value, self._device = session, value, device

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        binding = self.session.io_binding()
        alive = []  # a binding does not keep its inputs alive
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value, dtype=self.inputs[name])
                value = self._value.ortvalue_from_numpy(value, self._device, 0)
            alive.append(value)
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self._device)
        self.session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))


class _OpenVino:
    name, package = "OpenVINO", "openvino"
    devices = ("cpu",)

    def __init__(self) -> None:
        self._library = _library(self)
        self.version = self._library.__version__.partition("-")[0]  # the rest names a commit
        self._core = self._library.Core()
        frontend = import_module("openvino.frontend.onnx")
        self._core.add_extension(frontend.ConversionExtension("Attention", _attention))

    def open(self, path: Path, device: str, threads: int) -> Graph:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "EXECUTION_MODE_HINT": "ACCURACY",  # else it computes in bfloat16 where the processor has it,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # and rounds what meets quantized weights
            "ENABLE_CPU_PINNING": "NO",  # processes side by side would get the same cores
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        model = self._core.compile_model(self._core.read_model(str(path)), device.upper(), settings)
        return _OpenVinoGraph(model, self._library)


def _attention(node: Any) -> Any:
    """Opset 23's Attention for OpenVINO, whose own reading of it refuses fewer heads of keys than of queries."""
    import openvino.opset13 as ops

    def heads(of: Any) -> Any:
        return ops.gather(ops.shape_of(of), ops.constant([1]), ops.constant(0))

    def spread(given: Any) -> Any:  # [B, G, T, C] to [B, H, T, C]
        times = ops.concat([[1, 1], ops.divide(heads(query), heads(key)), [1, 1]], 0)
        shape = ops.concat([[0], heads(query), [-1], ops.gather(ops.shape_of(given), [3], 0)], 0)
        return ops.reshape(ops.tile(ops.unsqueeze(given, 2), times), shape, special_zero=True)

    query, key, value, *mask = (node.get_input(place) for place in range(node.get_input_size()))
    scale = ops.convert_like(ops.constant(np.float32(node.get_attribute("scale"))), query)
    return ops.scaled_dot_product_attention(
        query, spread(key), spread(value), mask[0] if mask else None, scale
    ).outputs()


class _OpenVinoGraph:
    def __init__(self, model: Any, library: Any) -> None:
        self._request, self._library = model.create_infer_request(), library
        self._outputs = {name: port for port in model.outputs for name in port.names}
        self.inputs = {
            name: str(np.dtype(port.element_type.to_dtype())) for port in model.inputs for name in port.names
        }

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        found = {}
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                value = self._library.Tensor(np.ascontiguousarray(value, dtype=self.inputs[name]))
            else:
                value = value.tensor
            self._request.set_tensor(name, value)
        for name in outputs:  # a tensor of its own, or the next run would write over what this one returned
            port = self._outputs[name]
            least = port.partial_shape.get_min_shape()  # it grows as it is needed
            found[name] = _OpenVinoValue(self._library.Tensor(port.element_type, least))
            self._request.set_tensor(name, found[name].tensor)
        self._request.infer()
        return found


class _OpenVinoValue:
    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def numpy(self) -> np.ndarray:
        data: np.ndarray = self.tensor.data
        return data

    def shape(self) -> list[int]:
        return list(self.tensor.shape)


_ENGINES: dict[str, type[Any]] = {"onnx": _OnnxRuntime, "openvino": _OpenVino}
BACKENDS = tuple(_ENGINES)
"""What can run graphs: ``onnx`` for ONNX Runtime, and ``openvino``."""


def _library(engine: Any) -> Any:
    unheard = sys.modules.setdefault(_TELEMETRY, None) is None  # type: ignore[arg-type]
    try:
        return import_module(engine.package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == engine.package:
            raise UsageError(
                f"{engine.name} is not installed; install it with: pip install {engine.package}"
            ) from error
        raise UsageError(f"{engine.name} cannot be loaded: {_reason(error)}") from error
    finally:
        if unheard:
            sys.modules.pop(_TELEMETRY, None)


_TELEMETRY = "openvino_telemetry"
"""By which OpenVINO's import writes to the home directory and reports over the network; it does without."""

_FRAMES = ("Exception from ", "Check '", "FrontEnd API failed")  # OpenVINO says first where in itself it was


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(_FRAMES)]
    return lines[0] if lines else type(error).__name__
