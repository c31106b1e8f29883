"""What runs exported graphs in tests: ONNX Runtime, and OpenVINO where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
BACKENDS = ["onnx", pytest.param("openvino", marks=needs_openvino)]
