"""Exports of a tiny LLaVA to ONNX that several test modules look at; each is built once, whatever the number of
worker processes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests import tiny
from tests.conftest import build_processor
from vtwcli.export.onnx.export import export_onnx
from vtwcli.models.hub import resolve
from vtwcli.models.loading import load


def withdraw(k: int) -> dict[str, Any]:
    return {"at": k, "action": "withdraw"}


def keep(k: int, **select: Any) -> dict[str, Any]:
    return {"at": k, "action": "keep", "select": select}


def freeze(at: int, until: int) -> dict[str, Any]:
    return {"at": at, "until": until, "action": "freeze"}


# name -> layers of the model, actions, options, roles of the decoder graphs
EXPORTS: dict[str, tuple[int, list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "split": (3, [withdraw(1)], {}, ["decoder_lower", "decoder_upper"]),
    "full half": (1, [withdraw(1)], {"dtype": "fp16"}, ["decoder"]),
    "none": (1, [withdraw(0)], {}, ["decoder_upper"]),
    "merged int4": (2, [withdraw(1)], {"merged": True, "quantize": "int4"}, ["decoder_merged"]),
    "freeze": (
        4,
        [freeze(0, 1), keep(1, score="attention", ratio=0.6), freeze(1, 3), withdraw(3)],
        {"opset": 23},
        ["decoder_lower", "decoder_middle_1", "decoder_upper"],
    ),
    "freeze merged int4": (
        3,
        [freeze(0, 2), keep(1, score="uniform", ratio=0.6)],
        {"merged": True, "quantize": "int4"},
        ["decoder_merged"],
    ),
    "freeze whole": (2, [freeze(1, 2)], {}, ["decoder"]),
    "keep": (
        3,
        [
            keep(0, score="uniform", count=6),
            keep(1, score="attention", count=4),
            keep(2, score="contribution", ratio=0.4),
        ],
        {"opset": 23},
        ["decoder_lower", "decoder_middle_1", "decoder_upper"],
    ),
}


class Exports:
    """``exports(name)`` -> directory and report of an export in ``EXPORTS``, made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded = cache(lambda name: load(str(self.model(name)), device="cpu", dtype="float32"))

    def model(self, name: str) -> Path:
        """The directory of the model that an export is made from."""
        layers = EXPORTS[name][0]
        path = self.root / f"tiny-llava-{layers}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                tiny.llava(seed=1, layers=layers).save_pretrained(path)
                build_processor().save_pretrained(path)
                (path / "LICENSE").write_text("as is")
        return path

    def __call__(self, name: str) -> tuple[Path, dict[str, Any]]:
        _, actions, options, _ = EXPORTS[name]
        path, report = self.root / name, self.root / f"{name}.json"
        model = resolve(str(self.model(name)))
        with FileLock(f"{path}.lock"):
            if not report.exists():
                schedule = {"format_version": 1, "actions": actions}
                report.write_text(json.dumps(export_onnx(model, schedule, path, steps=4, **options)))
        return path, json.loads(report.read_text())
