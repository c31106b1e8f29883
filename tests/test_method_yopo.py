"""YOPO: its rule in plain torch, its defaults by depth, and what has no grid."""

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule
from tests.test_golden import answer
from tests.tiny import TINY
from vtwcli.errors import UsageError
from vtwcli.methods.method import Shape
from vtwcli.methods.yopo import YOPO
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("window", [5, 24])
def test_the_rule_written_out(both_ways, window):
    plain, model = Plain(torch.float64), golden.model(torch.float64)
    place = torch.arange(576)
    row, column, half = place // 24, place % 24, (window - 1) // 2
    close = ((row[:, None] - row).abs() <= half) & ((column[:, None] - column).abs() <= half)
    image = slice(golden.BEFORE, golden.BEFORE + golden.VISUAL)

    def allowed(layer, causal):
        out = causal.clone()
        out[image, image] = close if both_ways else close & causal[image, image]
        return out

    def leave(layer, weights, present):
        out = present.clone()
        if layer + 1 == 7:
            out[image] = False
        return out

    tokens, logits = plain.greedy(0, 3, Rule(allowed=allowed, leave=leave))
    method = YOPO(window=window, layer=7, both_ways=both_ways, depth=12)
    mine, said, *_ = answer(model, method.schedule(), 0, 3)
    assert said == tokens
    torch.testing.assert_close(mine, logits.float(), rtol=0, atol=2e-6)


def test_late_layers_as_the_published_code_has_them():
    schedule = YOPO(window=5, layer=3, depth=6, late="zero").schedule()
    assert [(one.at, one.until, one.sink) for one in schedule.actions] == [
        (0, 6, "renormalise"),
        (3, 6, "zero"),
    ]
    assert YOPO().fitted(Shape(40)).layer == 20
    assert YOPO(window=7).fitted(Shape(32)) == YOPO(window=7, layer=16, depth=32)
    assert YOPO().fitted(Shape(4, 3)).layer == 3


def test_a_batch_with_padding_several_images_and_none():
    model = TINY["llava"].build(dtype=torch.float64)
    schedule = YOPO(window=3, layer=4, depth=6).schedule()
    rows = ["t3 i t5", "t2 i t3 i t2", "t4"]
    together = TINY["llava"].batch(rows, dtype=torch.float64)
    with torch.no_grad(), pruned(model, schedule):
        out = model(**together).logits[:, -1]
        for number in range(3):
            alone = {k: v[number : number + 1] for k, v in together.items() if k != "pixel_values"}
            start = int((alone["attention_mask"] == 0).sum())
            alone = {k: v[:, start:] for k, v in alone.items()}
            pixels = together["pixel_values"][[[0], [1, 2], []][number]]
            alone |= {"pixel_values": pixels} if len(pixels) else {}
            torch.testing.assert_close(model(**alone).logits[0, -1], out[number], rtol=0, atol=1e-9)


def test_short_form_and_rules():
    short = {"at": 0, "until": 3, "action": "mute", "readers": "visual", "columns": {"beyond": 2}}
    schedule = Schedule.from_dict([short])
    [action] = schedule.to_dict()["actions"]
    assert (action["columns"], action["steps"]) == ("beyond", 2)
    assert schedule.to_dict()["format_version"] == 2
    with pytest.raises(UsageError, match="'columns: beyond' goes with 'readers: visual'"):
        Schedule.from_dict([{**short, "readers": "all"}])
    with pytest.raises(UsageError, match="'steps' and 'both_ways' go with 'columns: beyond' only"):
        Schedule.from_dict([{**short, "columns": "all", "steps": 2}])
    with pytest.raises(UsageError, match="columns must be a word"):
        Schedule.from_dict([{**short, "columns": {"near": 2}}])
