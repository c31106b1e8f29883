"""ShortV: its authors' numbers, its rule in plain torch, and its layers found by a calibration."""

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule, probability
from tests.test_golden import ATOL, SAMPLES, answer
from vtwcli.methods.method import Answers, Shape
from vtwcli.methods.shortv import PUBLISHED, ShortV, order
from vtwcli.models.families import family_of
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.sweep import SweepItem, sweep


@pytest.fixture(scope="module")
def model():
    return golden.model()


def contributions(model, sample):
    """LC of every layer as a calibration asks for it, on the prompt's last row."""
    source = Resident(model, family_of(model.config))
    inputs = golden.inputs(model, sample)
    rows = torch.tensor([[inputs["input_ids"].shape[1] - 1]])
    [found] = sweep(source, [SweepItem(inputs, rows)], ShortV.ask(Shape(12)))
    return found.kl[:, 0]


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_published_code_gives_the_same_answers(model, sample):
    document, arrays = golden.numbers("shortv")
    for name, run in document["runs"]["gqa"].items():
        row = run["samples"][sample]
        schedule = ShortV(layers=run["replaced_layers"]).schedule()
        logits, tokens, trace, lengths = answer(model, schedule, sample, 8)
        torch.testing.assert_close(logits, arrays[f"gqa.{name}.scores.{sample}"], rtol=0, atol=ATOL)
        assert tokens == row["tokens"]
        assert lengths == row["kv_len_per_layer_after"]
        assert [layer.visual for layer in trace.samples[0].layers] == [golden.VISUAL] * 12


@pytest.mark.parametrize("sample", SAMPLES)
def test_one_layer_frozen_alone(model, sample):
    _, arrays = golden.numbers("shortv")
    for layer in range(12):
        logits, *_ = answer(model, ShortV(layers=[layer]).schedule(), sample, 1)
        expected = arrays["gqa.lc.frozen_last_logits." + str(sample)][layer]
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=ATOL)


def test_the_contributions_and_their_order_are_the_published_ones(model):
    numbers = golden.numbers("shortv")[0]["lc"]["gqa"]
    mine = torch.stack([contributions(model, sample) for sample in SAMPLES])
    expected = torch.tensor(numbers["lc_per_sample_fp64"], dtype=torch.float64)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    found = Answers(mine.mean(0).tolist(), {}, [], 0.01, False)
    assert order(found) == numbers["order"]
    three = ShortV.candidates(Shape(12), found, {})[2]
    assert three.parameters == {"layers": numbers["order"][:3]}


def test_the_direction_is_from_the_frozen_run():
    plain = Plain(torch.float64)
    hidden, visual = plain.sample(0)
    full = probability(plain(hidden, visual, Rule())[0][-1])
    frozen = probability(plain(hidden, visual, Rule(frozen={4}))[0][-1])
    value = float((frozen[0] * (frozen[1] - full[1])).sum())
    other = float((full[0] * (full[1] - frozen[1])).sum())
    mine = float(contributions(golden.model(torch.float64), 0)[4])
    assert mine == pytest.approx(value, abs=1e-8)
    assert abs(mine - other) > 1e-4


@pytest.mark.parametrize("layers", [(0, 3, 4, 11), (1, 2)])
def test_the_rule_written_out(layers):
    plain, model = Plain(torch.float64), golden.model(torch.float64)
    tokens, logits = plain.greedy(1, 3, Rule(frozen=set(layers)))
    mine, said, *_ = answer(model, ShortV(layers=layers).schedule(), 1, 3)
    assert said == tokens
    torch.testing.assert_close(mine, logits.float(), rtol=0, atol=2e-6)


def test_published_layers_are_scaled_to_the_depth():
    assert ShortV().fitted(Shape(32)).layers == PUBLISHED[32]
    assert ShortV().fitted(Shape(40)).layers == PUBLISHED[40]
    assert ShortV(layers="1-3, 5").fitted(Shape(6)).layers == (1, 2, 3, 5)
    assert ShortV().fitted(Shape(6)).layers == (5, 4, 0, 3)  # of 32: 29, 24, 2, 18
