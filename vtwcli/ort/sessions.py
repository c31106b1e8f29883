"""The graphs of an exported directory, opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .directory import read_manifest
from .engines import Graph, engine, open_graph
from .errors import UsageError


class Sessions:
    """The graphs of an exported directory, each opened when it is first run.

    Attributes:
        directory: where they are.
        manifest: what the directory says of itself.
        decoders: the manifest's entries of the decoder graphs, in order.
        device: ``cpu`` or ``cuda``.
        backend: what runs them, ``onnx`` or ``openvino``.
        engine: the library of that name.
    """

    def __init__(self, directory: str | Path, device: str, threads: int, backend: str) -> None:
        self.directory, self.device, self.backend = Path(directory), device, backend
        self.manifest = read_manifest(self.directory)
        self.decoders = [graph for graph in self.manifest["graphs"] if graph["layers"] is not None]
        self.engine = engine(backend)
        self._graphs = {graph["role"]: graph for graph in self.manifest["graphs"]}
        self._threads = threads
        self._sessions: dict[str, Graph] = {}
        if device not in self.engine.devices:
            raise UsageError(
                f"this {self.engine.name} has no device {device!r} (it has {', '.join(self.engine.devices)})"
            )

    def session(self, role: str) -> Graph:
        """The session of one graph, loaded when first used.

        Raises:
            NotFoundError: the file is missing or broken.
        """
        if role not in self._sessions:
            self._sessions[role] = self.open(self.directory / self._graphs[role]["file"])
        return self._sessions[role]

    def open(self, path: Path) -> Graph:
        """A session for an ONNX file.

        Raises:
            NotFoundError: the file is missing or broken.
        """
        return open_graph(self.engine, path, self.device, self._threads)

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
        return self.session(role).run(feeds, [port["name"] for port in self._graphs[role]["outputs"]])
