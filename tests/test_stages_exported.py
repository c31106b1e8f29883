"""Update, read, leave in exported directories: what is not updated is not computed, neither by torch nor in graphs."""

import json
from collections import Counter
from pathlib import Path

import onnxruntime
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from tests import tiny
from tests.onnx_exports import EXPORTS
from vtwcli.export.hf.export import export_hf
from vtwcli.judge.flops import TextShape, prefill_cost
from vtwcli.methods.stages import Stages
from vtwcli.ort import OnnxModel
from vtwcli.schedule.schedule import Schedule


@torch.no_grad()
def test_a_directory_computes_as_much_as_its_operations_say(tiny_dir, tmp_path):
    """The prompt's matrix products as torch counts them, and the layers' by the arithmetic of results."""
    both = Stages(layers="1-2,4", withdraw=5)
    export_hf(str(tiny_dir), both.schedule(), tmp_path / "stages")
    export_hf(str(tiny_dir), Schedule.withdraw_at(5), tmp_path / "withdrawn")
    batch = tiny.llava_batch(["t3 i t5"], seed=5)
    done = {}
    for name in ("stages", "withdrawn"):
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path / name, trust_remote_code=True, attn_implementation="eager"
        ).eval()
        with FlopCounterMode(display=False) as counter:
            model(**batch)
        done[name] = counter.get_total_flops()
    shape = TextShape.from_config(model.config)
    visual, rows = int((batch["input_ids"] == model.config.image_token_id).sum()), batch["input_ids"].shape[1]
    tokens = [rows if d < 5 else rows - visual for d in range(shape.layers)]
    frozen = [visual if d in both.layers else 0 for d in range(shape.layers)]
    saved = prefill_cost(shape, tokens) - prefill_cost(shape, tokens, frozen_per_layer=frozen)
    assert done["withdrawn"] - done["stages"] == saved > 0


def test_graphs_run_what_is_left_of_the_rows(exports, tmp_path, monkeypatch):
    """Frozen rows come as far as keys and values; seen in ONNX Runtime's own profile of the prompt."""

    class Profiled(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.enable_profiling, self.profile_file_prefix = True, str(tmp_path / "run")

    directory, _ = exports("freeze")
    layers, actions = EXPORTS["freeze"][:2]
    assert layers == 4 and [one["action"] for one in actions] == ["freeze", "keep", "freeze", "withdraw"]
    monkeypatch.setattr(onnxruntime, "SessionOptions", Profiled)
    graphs, batch = OnnxModel(directory), tiny.llava_batch(["t3 i t5"], seed=5)
    graphs.prefill({name: value.numpy() for name, value in batch.items()})
    seen = Counter()
    for role in ("decoder_lower", "decoder_middle_1", "decoder_upper"):
        for event in json.loads(Path(graphs.session(role).session.end_profiling()).read_text()):
            known = event.get("args", {})
            shapes = [shape for one in known.get("input_type_shape", []) for shape in one.values()]
            if "MatMul" in known.get("op_name", "") and len(shapes) == 1:  # the other input is a weight
                seen[role, shapes[0][1]] += 1
    # 8 text rows run in every layer; of 9 visual ones, then 6, keys and values
    assert seen == {
        ("decoder_lower", 8): 7, ("decoder_lower", 9): 2, ("decoder_middle_1", 8): 14, ("decoder_middle_1", 6): 4,
        ("decoder_upper", 8): 7, ("decoder_upper", 1): 1,
    }  # fmt: skip
