"""What an exported directory is to hold."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vtwcli.io.section import Section


class ExportSection(Section):
    """What an exported directory holds."""

    format: Literal["hf", "onnx", "transformers.js"] = Field(
        "hf",
        description="hf, a Hugging Face directory, onnx, graphs for ONNX Runtime, or transformers.js, for browsers",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp32", "fp16"] = Field(
        "auto",
        description="auto keeps the weights as they are (onnx: float32); else float32, bfloat16 or float16",
    )
    opset: int = Field(20, ge=18, le=24, description="version of the operators in the ONNX graphs, 18 to 24")
    merged: bool = Field(
        False,
        description="one ONNX decoder that removes the tokens inside, instead of one before and one behind",
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None, description="weights of the ONNX decoder in 8 or 4 bits, int8 or int4: smaller, and less exact"
    )

    @model_validator(mode="after")
    def _fits_the_format(self) -> ExportSection:
        if self.merged and self.format != "onnx":
            raise ValueError("merged goes with format onnx only")
        if self.quantize and self.format == "hf":
            raise ValueError("quantize goes with format onnx or transformers.js only")
        if self.format != "hf" and self.dtype == "bfloat16":
            raise ValueError("ONNX graphs are float32 or float16, not bfloat16")
        return self
