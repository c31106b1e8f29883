"""Every family with an ONNX export, proved on its tiny model; a new one needs no test code here."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests import reference
from tests.tiny import TINY
from vtwcli.export.onnx import export
from vtwcli.export.onnx import parity as onnx_parity
from vtwcli.export.onnx.graphs import VISION
from vtwcli.models.families import FAMILIES, family_of
from vtwcli.models.loading import LoadedModel
from vtwcli.ort import OnnxModel

CUT, STEPS = 1, 4
HERE = ["onnx", "openvino"] if find_spec("openvino") else ["onnx"]
SIBLINGS = ("llava_onevision", "smolvlm")  # the same graphs as llava_next and idefics3, for `pytest -m slow`
FAST = [name for name in VISION if name not in ("llava", *SIBLINGS)]  # llava has files of its own


def test_the_family_table_says_which():
    assert set(VISION) == {name for name, row in FAMILIES.items() if row.no_onnx is None}


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SIBLINGS)])
def test_a_family_computes_what_the_slow_reference_computes(name, tmp_path):
    model = TINY[name].build(layers=2)
    loaded = LoadedModel(
        model, None, family_of(model.config), name, None, Path(), torch.device("cpu"), torch.float32
    )
    cuts = [{"at": CUT, "action": "withdraw"}]
    manifest = export.write_graphs(
        export.Source.of(loaded), cuts, tmp_path, dtype="fp32", opset=20, merged=True
    )
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    engines = [OnnxModel(tmp_path, backend=backend) for backend in HERE]
    for rows in (["t3 i t5", "t2 t2 i t1 i t3", "t4"], ["t6", "t2"]):
        batch = TINY[name].batch(rows, seed=3)
        tokens, logits = reference.greedy(model, batch, CUT, STEPS, count_positions=False)
        for graphs in engines:
            found = onnx_parity.onnx_steps(graphs, batch, tokens.numpy())
            result = onnx_parity.compare(logits.numpy(), found)
            assert result["agreement"] == 1.0 and result["max_logit_difference"] < 1e-4, graphs.backend
        visual = reference.visual_mask(model, batch["input_ids"])
        if visual.any():  # the comparison can fail
            full = reference.logits(model, batch, reference.withdrawal(model, visual, 2))[:, -1]
            assert (full - logits[:, 0]).abs().max() > 0.05
