"""Generation over exported ONNX graphs with ONNX Runtime.

This package needs numpy and onnxruntime only, and nothing else of vtwcli: an exported directory carries a copy of it
beside its graphs, called ``vtw_ort``.
Axes: B batch, S prompt, P past, T kept tokens, V vocabulary, D hidden size, N images.
"""

from .directory import FORMAT, FORMAT_VERSION, MANIFEST, is_export
from .errors import NotFinite, NotFoundError, OnnxError, UsageError
from .images import best_resolution, pack, patch_feeds, shrink
from .model import OnnxModel
from .removal import chosen, compact, remove
from .sampling import sample
from .sessions import has_device
from .tokens import State, Tokens, grid_positions

__all__ = [
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
    "grid_positions",
    "has_device",
    "is_export",
    "pack",
    "patch_feeds",
    "remove",
    "sample",
    "shrink",
]
