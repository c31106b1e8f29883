"""Every method on models of every kind, with both attention implementations, against the slow interpreter.

A method has a row here: parameters that fit a random model of six layers, at which it decides something.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import parity, slow_schedule, test_in_front
from tests.tiny import LAYERS, TINY, VARIANTS
from vtwcli.methods import METHODS
from vtwcli.methods.method import Grid, Shape
from vtwcli.models.families import family_of, tower_of
from vtwcli.runtime import PruningError, pruned

ROWS = {
    "vtw": {"layer": 4},
    "visipruner": {
        "shallow_mid_layer": 2, "layer_threshold": 0.99, "tokens_threshold": 1.0, "exit_threshold": 0.7
    },
    "fastv": {"layer": 3, "count": 4},
    "pyramiddrop": {"layers": [3, 4, 5], "counts": [5, 3, 2]},
    "himap": {"layers": [3, 5], "counts": [5, 2]},
    "sparsevlm": {"layers": [3, 4], "counts": [4, 2]},
    "sparsevlm_plus": {"layers": [3, 5], "counts": [5, 2], "heads": 2},
    "v2drop": {"layers": [3, 4, 5], "ratios": [0.6, 0.4, 0]},
    "dart": {"layers": [3], "counts": 5},
    "attention": {"layer": 3, "ratio": 0.5},
    "contribution": {"layer": 3, "ratio": 0.25},
    "random": {"layer": 3, "ratio": 0.5, "seed": 1},
    "uniform": {"layer": 3, "ratio": 0.5},
    "two-step": {"layer": 3, "ratio": 0.5, "withdraw": 5},
    "shortv": {"layers": [0, 3, 4]},
    "exit": {"threshold": 0.85, "exit_layers": 1, "after": 1},
    "fitprune": {"drops": [0, 2, 0, 1, 0, 1], "visual": 6},
    "yopo": {"window": 3, "layer": 4, "depth": 6},
    "st3": {"layers": [2, 4], "ratio": 0.8, "every": 1, "trim": 0.7},
    "vica": {"layers": [1, 3], "depth": 6},
    "sgl": {"layer": 3, "ratio": 0.4},
    "stages": {"layers": [1, 3], "withdraw": 4},
    "fastervlm": {"count": 2},
    "vtc_cls": {"ratio": 0.4, "first": -2},
    "fopru": {"ratio": 0.4},
    **{name: {"ratio": 0.5} for name in test_in_front.NAMES},
}  # fmt: skip

# one a kind: plain, grouped keys with any resolution, three-axis positions, DeepStack, sliding window, prefix mask
KINDS = ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3-window", "paligemma2"]
SAMPLES = ["t3 i t5", "t2 i t3 i t2"]
STEPS = 3
# what a method needs and a family does not tell
REFUSED = {
    ("yopo", "llava_onevision"): "neighbours of visual tokens, which is known of square images",
    ("st3", "gemma3-window"): "layer 2 has a sliding window",
}


@cache
def model_of(kind: str, attn: str):
    return (TINY | VARIANTS)[kind].build(dtype=torch.float64, attn=attn)


def test_every_method_has_a_row():
    assert ROWS.keys() == METHODS.keys()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
# those whose rules the interpreter does not know have tests of their own
@pytest.mark.parametrize("name", [name for name in METHODS if name not in test_in_front.NAMES])
def test_a_method_is_its_schedule_written_out(name, kind, attn):
    model = model_of(kind, attn)
    batch = (TINY | VARIANTS)[kind].batch(SAMPLES, dtype=torch.float64)
    schedule = METHODS[name](**ROWS[name]).schedule()
    family = family_of(model.config)
    schedule.check_depth(LAYERS, family.first_withdrawal)
    if (name, kind) in REFUSED:
        with pytest.raises(PruningError, match=REFUSED[name, kind]), pruned(model, schedule):
            model(**batch)
        return
    if METHODS[name].refused(Shape(LAYERS, family.first_withdrawal, tower_of(family, model.config))):
        with pytest.raises(PruningError, match="no class token"), pruned(model, schedule):
            pass
        return
    actions = schedule.to_dict()["actions"]
    if (TINY | VARIANTS)[kind].own_positions and any("positions" in action for action in actions):
        with pytest.raises(PruningError, match="counts positions along time, rows and columns"):
            parity.generated(model, batch, schedule, 1)
        return
    count = not (TINY | VARIANTS)[kind].own_positions
    guide = {}
    if METHODS[name].guided:
        shape = batch["input_ids"].shape
        guide = {slow_schedule.GIVEN: torch.rand(shape, generator=torch.Generator().manual_seed(2))}
    tokens, scores, _ = slow_schedule.greedy(model, batch | guide, actions, STEPS, count_positions=count)
    out, logits = parity.generated(model, batch, schedule, STEPS, **guide)
    assert torch.equal(out.sequences[:, -STEPS:], tokens)
    parity.same(model, logits, scores)
    if any(action["action"] in ("withdraw", "keep") for action in actions):
        entries = out.past_key_values.layers[-1].keys.shape[-2]
        assert entries < batch["input_ids"].shape[1], "no token left, so nothing was tested"


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_compares_fits_every_depth(name):
    for depth in (4, 6, 12, 32):
        for first in (0, 3):
            grid = Grid((0.5, 0.25), max(2, first), (0.1, 0.4), 0)
            base = {"guide": "small"} if METHODS[name].guided else {}
            found = METHODS[name].compared(Shape(depth, first), grid, base)
            assert found or depth < 6
            for one in found:
                assert one.method == name
                one.schedule.check_depth(depth, first)
