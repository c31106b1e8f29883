"""What is installed against what this version was tested with and asks for."""

from __future__ import annotations

import ast
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from vtwcli import __version__

LIBRARIES = (
    "torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate", "datasets", "numpy",
    "onnx", "onnxruntime", "onnxscript", "openvino",
)  # fmt: skip


def tested() -> list[str]:
    """The releases of transformers that exported code was tested with; they are named in that code itself."""
    text = Path(__file__).parents[1].joinpath("runtime", "contract.py").read_text(encoding="utf-8")
    found = re.search(r"^TESTED = (\(.*?\))$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return list(ast.literal_eval(found[1]))


def environment() -> dict[str, Any]:
    """The report of ``vtw env``.

    Returns:
        ``vtwcli``, ``python``, ``platform``; ``libraries``: by name ``installed`` (None: it is not) and ``wanted``
        (the bounds that this package declares, None where it declares none); ``tested``: releases of transformers,
        and ``among_tested``: whether the installed one is one of them; ``machine``: as ``here.machine`` has it.
    """
    from vtwcli.machine.here import machine

    wanted = _wanted()
    libraries = {
        name: {"installed": installed(name), "wanted": wanted.get(name)} for name in LIBRARIES
    }  # some are optional
    return {
        "vtwcli": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": libraries,
        "tested": {"transformers": tested()},
        "among_tested": libraries["transformers"]["installed"] in tested(),
        "machine": machine(),
    }


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _wanted() -> dict[str, str]:
    """Version bounds by distribution, as declared by this package where it is installed."""
    try:
        declared = metadata.requires("vtwcli") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)\s*([^;]*)", line) for line in declared)
    return {each[1].replace("-", "_").lower(): each[2].strip() for each in found if each and each[2].strip()}


def untested(version: str | None) -> str | None:
    """A sentence about a release of transformers that was not tested; None for one that was."""
    if version in tested():
        return None
    return (
        f"transformers {version} is not among the releases that this was tested with: {', '.join(tested())}; what it "
        "does otherwise is an error, not another answer"
    )
