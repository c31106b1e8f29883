"""FitPrune: its rule in plain torch, published recipes by depth and number of tokens."""

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule
from tests.test_golden import answer
from vtwcli.methods.fitprune import PUBLISHED, FitPrune
from vtwcli.methods.method import Shape

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
