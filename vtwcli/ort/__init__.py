"""Generation over exported ONNX graphs with ONNX Runtime or OpenVINO.

This package needs numpy and onnxruntime or openvino only, and nothing else of vtwcli: an exported directory carries a
copy of it beside its graphs, called ``vtw_ort``.
Axes: B batch, S prompt, P past, T kept tokens, V vocabulary, D hidden size, N images.
"""

from .directory import FORMAT, FORMAT_VERSION, MANIFEST, is_export
from .engines import BACKENDS, engine, has_device
from .errors import NotFinite, NotFoundError, OnnxError, UsageError
from .images import best_resolution, pack, patch_feeds, shrink
from .model import OnnxModel
from .removal import chosen, compact, remove
from .sampling import sample
from .tokens import State, Tokens, grid_positions

__all__ = [
    "BACKENDS",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "NotFinite",
    "NotFoundError",
    "OnnxError",
    "OnnxModel",
    "State",
    "Tokens",
    "UsageError",
    "best_resolution",
    "chosen",
    "compact",
    "engine",
    "grid_positions",
    "has_device",
    "is_export",
    "pack",
    "patch_feeds",
    "remove",
    "sample",
    "shrink",
]
