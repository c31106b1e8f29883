"""ViCA: its rule in plain torch; what it asks for of models of other depths."""

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule
from tests.test_golden import answer
from vtwcli.methods.method import Shape
from vtwcli.methods.vica import PUBLISHED, ViCA


@pytest.mark.parametrize("layers", [(0, 1, 5), (11,), ()])
def test_the_rule_written_out(layers):
    plain, model = Plain(torch.float64), golden.model(torch.float64)
    _, visual = plain.sample(2)

    def allowed(layer, causal):
        if layer in layers:
            return causal
        seen = torch.zeros(len(causal), dtype=torch.bool)
        seen[: len(visual)] = visual
        return causal & (~seen | seen[:, None])  # text reads text alone

    tokens, logits = plain.greedy(2, 3, Rule(frozen=set(range(12)), allowed=allowed))
    mine, said, *_ = answer(model, ViCA(layers=layers, depth=12).schedule(), 2, 3)
    assert said == tokens
    torch.testing.assert_close(mine, logits.float(), rtol=0, atol=2e-6)


def test_published_layers_are_scaled_to_the_depth():
    for depth, layers in PUBLISHED.items():
        assert ViCA().fitted(Shape(depth)).layers == layers
    assert ViCA().fitted(Shape(12)).layers == (0, 3, 4, 5)  # 0, 8..10, 10..11, 14
    assert ViCA(layers=[2]).fitted(Shape(6)) == ViCA(layers=[2], depth=6)
