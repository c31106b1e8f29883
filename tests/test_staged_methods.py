"""Methods that keep in stages: each published rule written out, against the runtime, on the golden decoder's shape."""

from __future__ import annotations

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule, State, best
from tests.test_golden import answer
from vtwcli.methods.method import Shape
from vtwcli.methods.pyramiddrop import PyramidDrop

ATOL = 2e-5
STEPS = 4
VISUAL = range(golden.BEFORE, golden.BEFORE + golden.VISUAL)


@pytest.fixture(scope="module", params=["gqa", "mha"])
def model(request):
    return golden.model(mha=request.param == "mha")


def same(
    model, method, rule: Rule, sample: int = 0, steps: int = STEPS, anew: bool = False
) -> list[list[int]]:
    """The rule by hand and the runtime agree; returns whom the runtime kept at each stage."""
    inputs = golden.inputs(model, sample)
    features = model.model.multi_modal_projector.features
    tokens, logits, lengths = Plain(model).answer(
        inputs["input_ids"][0], features, VISUAL, rule, steps, anew=anew
    )
    got, got_tokens, trace, entries = answer(model, method.schedule(), sample, steps)
    torch.testing.assert_close(got, logits, rtol=0, atol=ATOL)
    assert got_tokens == tokens
    assert [layer.rows for layer in trace.samples[0].layers] == lengths
    assert entries == [n + steps - 1 for n in lengths]
    return [[golden.BEFORE + i if i >= 0 else i for i in one.kept] for one in trace.samples[0].actions]


@pytest.mark.parametrize("sample", [0, 2])
def test_pyramiddrop(model, sample):
    layers, ratios, kept = (3, 6, 9), (0.5, 0.3, 0.125), {}

    def rule(plain: Plain, index: int, state: State) -> None:
        if index in layers:
            scores = plain.weights(index, state.x, state.pos)[:, state.last].mean(0)
            ratio = ratios[layers.index(index)]
            kept[index] = state.keep(best(scores, state.image, int(golden.VISUAL * ratio)))
            state.renumber()

    found = same(model, PyramidDrop(layers=layers, ratios=ratios), rule, sample)
    assert found == [kept[index] for index in layers]
    assert [len(one) for one in found] == [288, 172, 72]


def test_stages_are_scaled_to_the_depth():
    fitted = PyramidDrop().fitted(Shape(12))
    assert (fitted.layers, fitted.ratios) == ((3, 6, 9), (0.5, 0.25, 0.125))
    assert PyramidDrop(layers="2, 4", counts=9).fitted(Shape(40)).amounts() == [{"count": 9}] * 2
