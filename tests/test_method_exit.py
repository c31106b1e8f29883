"""The exit by attention: its rule in plain torch, samples without an image, the first layer a family allows."""

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule
from tests.test_golden import answer
from tests.tiny import TINY
from vtwcli.methods.exits import Exit
from vtwcli.methods.method import Shape
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule


def masses(plain, hidden, visual):
    """The last row's attention to all visual rows in each layer of the full model."""
    found = []

    def look(layer, weights, present):
        found.append(float(weights[:, -1, visual].mean(0).sum()))
        return present

    plain(hidden, visual, Rule(leave=look))
    return found


@pytest.mark.parametrize("layers", [1, 3])
def test_the_rule_written_out(layers):
    plain, model = Plain(torch.float64), golden.model(torch.float64)
    hidden, visual = plain.sample(0)
    mass = masses(plain, hidden, visual)
    threshold = sorted(mass[:-1])[4] + 1e-6  # five layers are below it
    below = [layer for layer in range(12) if mass[layer] < threshold]
    start = below[layers - 1] + 1
    assert start < 12

    def leave(layer, weights, present):
        seen = torch.cat([visual, visual.new_zeros(len(present) - len(visual))])
        return present & ~seen if layer + 1 == start else present

    tokens, logits = plain.greedy(0, 3, Rule(leave=leave))
    schedule = Exit(threshold=threshold, exit_layers=layers).schedule()
    mine, said, trace, _ = answer(model, schedule, 0, 3)
    assert trace.samples[0].actions[0].layer == start
    assert said == tokens
    torch.testing.assert_close(mine, logits.float(), rtol=0, atol=2e-6)


def test_no_image_no_exit():
    model = TINY["llava"].build(dtype=torch.float64)
    batch = TINY["llava"].batch(["t3 i t5", "t6"], dtype=torch.float64)
    with torch.no_grad(), pruned(model, Exit(threshold=1, exit_layers=1).schedule()) as running:
        model(**batch)
    assert [sample.actions[0].layer for sample in running.trace.samples] == [1, None]


def test_the_first_layer_that_a_family_allows():
    assert Exit().fitted(Shape(12, 3)).after == 1
    assert Exit(after=5).fitted(Shape(12, 3)).after == 5
    Exit().fitted(Shape(12, 3)).schedule().check_depth(12, 3)


def test_the_word_needs_format_2():
    data = Exit().schedule().to_dict()
    assert data["format_version"] == 2
    assert Schedule.from_dict(data) == Exit().schedule()
    with pytest.raises(Exception, match="format_version is 1, but what the schedule says needs 2"):
        Schedule.from_dict({**data, "format_version": 1})
