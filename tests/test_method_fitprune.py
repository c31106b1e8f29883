"""FitPrune: its rule in plain torch, published recipes by depth and number of tokens."""

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule
from tests.test_golden import answer
from vtwcli.methods.fitprune import PUBLISHED, FitPrune, fit
from vtwcli.methods.method import Shape
from vtwcli.models.families import family_of
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.lost import LostProbe, lost
from vtwcli.sweep.sweep import SweepItem, sweep

DROPS = (14, 33, 89, 0, 36, 20, 55, 120, 18, 4, 7, 5)


def test_the_rule_written_out():
    plain, model = Plain(torch.float64), golden.model(torch.float64)
    hidden, visual = plain.sample(1)
    prompt, kept = len(hidden), {}

    def leave(layer, weights, present):
        if layer not in kept:  # the prompt decides
            seen = visual & present
            largest = weights.amax(0)
            asking = torch.zeros_like(seen)
            asking[int(visual.nonzero()[-1]) + 1 :] = True
            score = largest[seen].mean(0) * largest[asking].sum(0)
            order = sorted(seen.nonzero()[:, 0].tolist(), key=lambda i: float(score[i]))
            kept[layer] = present.clone()
            kept[layer][order[: DROPS[layer]]] = False
        return torch.cat([kept[layer], torch.ones(len(present) - prompt, dtype=torch.bool)])

    tokens, logits = plain.greedy(1, 3, Rule(leave=leave))
    mine, said, trace, lengths = answer(model, FitPrune(drops=DROPS).schedule(), 1, 3)
    counts = [golden.VISUAL - sum(DROPS[:layer]) for layer in range(12)]
    assert [layer.visual for layer in trace.samples[0].layers] == counts
    for layer, action in zip([d for d in range(11) if DROPS[d]], trace.samples[0].actions, strict=True):
        inside = kept[layer][golden.BEFORE : golden.BEFORE + golden.VISUAL]
        assert action.kept == inside.nonzero()[:, 0].tolist()
    assert lengths == [n + 55 + 2 for n in counts]
    assert said == tokens
    torch.testing.assert_close(mine, logits.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("reduction", PUBLISHED)
def test_the_published_recipes(reduction):
    drops = PUBLISHED[reduction]
    counts = [576 - sum(drops[:layer]) for layer in range(32)]
    one = FitPrune(reduction=reduction)
    assert one.schedule().visual_per_layer(32, 576) == counts
    assert one.fitted(Shape(32)).schedule() == one.schedule()
    average = sum(counts) / 32
    assert round(average) == {60: 245, 70: 188, 80: 131, 90: 73}[reduction]
    for depth in (12, 24, 40):
        for visual in (64, 576, 2880):
            other = one.fitted(Shape(depth)).schedule().visual_per_layer(depth, visual)
            assert sum(other) / depth / visual == pytest.approx(
                average / 576, abs=0.06 if depth < 24 else 0.02
            )


def test_a_recipe_is_fitted_to_an_average():
    flat, steep = [i / 100 for i in range(101)], [min(1, i / 20) for i in range(101)]
    left = fit([flat, steep, flat, steep, flat], 0.5)
    assert left == sorted(left, reverse=True)
    assert 0.45 < sum([1, *left[:-1]]) / 5 <= 0.5
    assert left[0] < 0.5  # where much may leave for little
    assert fit([flat, steep, flat, steep, flat], 0.7, 3)[:2] == [1, 1]


def test_what_is_lost_is_the_attention_that_leaves():
    by_visual, by_text = torch.tensor([4.0, 1, 2, 3]), torch.tensor([1.0, 1, 1, 7])
    share = lost(by_visual, by_text)  # in the order 1, 2, 0, 3
    assert share[[0, 24, 25, 50, 75, 100]].tolist() == pytest.approx([0, 0, 0.1, 0.3, 0.7, 1])


def test_what_a_calibration_looks_at():
    plain, model = Plain(torch.float64), golden.model(torch.float64)
    hidden, visual = plain.sample(3)
    expected = []

    def look(layer, weights, present):
        largest, asking = weights.amax(0), torch.zeros_like(visual)
        asking[int(visual.nonzero()[-1]) + 1 :] = True
        two = torch.stack([largest[visual].sum(0), largest[asking].sum(0)])[:, visual]
        gone = two[:, (two[0] * two[1]).argsort()].cumsum(1) / two.sum(1, keepdim=True)
        expected.append(gone.amax(0)[[143, 287, 431]])
        return present

    plain(hidden, visual, Rule(leave=look))
    probe, inputs = LostProbe(), golden.inputs(model, 3)
    rows = torch.tensor([[inputs["input_ids"].shape[1] - 1]])
    sweep(Resident(model, family_of(model.config)), [SweepItem(inputs, rows)], [], probes=[probe])
    mine = torch.stack(probe.found[0, 0])[:, [25, 50, 75]]
    torch.testing.assert_close(mine, torch.stack(expected).float(), rtol=0, atol=1e-6)
