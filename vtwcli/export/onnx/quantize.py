"""Decoder weights in 8 or 4 bits, with ONNX Runtime's own quantizers.

``int8``: weights per output channel, activations quantized on the fly (MatMulInteger). ``int4``: weights in blocks of
32 along the input, symmetric, activations in float (MatMulNBits). The quantizers hold a whole graph in memory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtwcli.errors import VtwError
from vtwcli.export.onnx.trace import check_file

BLOCK = 32
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level: may round activations to 8 bits where that is faster


def quantize(path: Path, kind: str) -> None:
    """Replace an ONNX file and its data by the quantized ones, under the same names.

    Args:
        path: of the graph.
        kind: ``int8`` or ``int4``.

    Raises:
        VtwError: nothing in the graph could be quantized, or the result does not pass the ONNX checker.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        target = Path(folder) / path.name
        if kind == "int8":
            quantize_dynamic(
                path,
                target,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
        else:
            quantizer = MatMulNBitsQuantizer(
                onnx.load(path), block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS
            )
            quantizer.process()
            quantizer.model.save_model_to_file(str(target), True)
        kinds = {node.op_type for node in onnx.load(target, load_external_data=False).graph.node}
        if not kinds & {"MatMulInteger", "MatMulNBits"}:
            raise VtwError(f"{path.name}: nothing could be quantized to {kind}")
        check_file(target)
        for file in (path, path.with_name(f"{path.name}.data")):
            file.unlink(missing_ok=True)
        for file in sorted(Path(folder).iterdir()):
            file.replace(path.parent / file.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the quantizers' log lines, which they write to the root logger too."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
