"""The graphs of an exported directory in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .directory import read_manifest
from .errors import NotFoundError, UsageError

_TYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def has_device(device: str) -> bool:
    """Whether this ONNX Runtime runs on ``cpu`` or ``cuda``."""
    import onnxruntime

    return _PROVIDERS.get(device) in onnxruntime.get_available_providers()


class Sessions:
    """The graphs of an exported directory, each opened when it is first run.

    Attributes:
        directory: where they are.
        manifest: what the directory says of itself.
        decoders: the manifest's entries of the decoder graphs, in order.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, directory: str | Path, device: str, threads: int) -> None:
        self.directory, self.device = Path(directory), device
        self.manifest = read_manifest(self.directory)
        self.decoders = [graph for graph in self.manifest["graphs"] if graph["layers"] is not None]
        self._graphs = {graph["role"]: graph for graph in self.manifest["graphs"]}
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        _check_device(device)

    def session(self, role: str) -> Any:
        """The session of one graph, loaded when first used.

        Raises:
            NotFoundError: the file is missing or broken.
        """
        if role not in self._sessions:
            self._sessions[role] = self.open(self.directory / self._graphs[role]["file"])
        return self._sessions[role]

    def open(self, path: Path) -> Any:
        """A session for an ONNX file.

        Raises:
            NotFoundError: the file is missing or broken.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=[_PROVIDERS[self.device]])
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise NotFoundError(f"{path} cannot be loaded: {_reason(error)}") from error

    def release(self) -> None:
        """Close all sessions; the next use opens them again."""
        self._sessions.clear()

    def run(self, role: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run one graph.

        Args:
            role: of the graph.
            feeds: input name -> numpy array, or value that an earlier run returned.

        Returns:
            Output name -> value that stays on the session's device; ``.numpy()`` fetches it.
        """
        from onnxruntime import OrtValue

        session, types = self.session(role), {p["name"]: p["dtype"] for p in self._graphs[role]["inputs"]}
        binding = session.io_binding()
        alive = []  # a binding does not keep its inputs alive
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value, dtype=_TYPES[types[name]])
                value = OrtValue.ortvalue_from_numpy(value, self.device, 0)
            alive.append(value)
            binding.bind_ortvalue_input(name, value)
        for port in self._graphs[role]["outputs"]:
            binding.bind_output(port["name"], self.device)
        session.run_with_iobinding(binding)
        names = [port["name"] for port in self._graphs[role]["outputs"]]
        return dict(zip(names, binding.get_outputs(), strict=True))


def _check_device(device: str) -> None:
    import onnxruntime

    if not has_device(device):
        raise UsageError(
            f"this ONNX Runtime has no device {device!r}"
            f" (it has {', '.join(onnxruntime.get_available_providers())})"
        )


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
