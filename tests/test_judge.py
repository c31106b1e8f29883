"""Paired statistics against values from textbooks and by hand."""

import numpy as np
import pytest

from vtwcli.judge import statistics as judge


def test_difference_and_interval():
    full, pruned = [1, 1, 1, 0] * 2, [1, 0, 1, 0] * 2
    found = judge.paired_difference(full, pruned, 2000, seed=0)
    assert found["difference"] == -0.25
    low, high = found["interval"]
    assert low == -0.625
    assert high == 0
    assert found == judge.paired_difference(full, pruned, 2000, seed=0)
    assert judge.paired_difference(full, pruned, 0, seed=0)["interval"] is None
    few = judge.paired_difference(full[:5], pruned[:5], 2000, seed=0)
    assert few == {"difference": -0.2, "interval": None}


def test_six_is_the_fewest_whose_range_holds_a_median_95_times_in_100():
    rng = np.random.default_rng(0)
    for n in (judge.FEWEST - 1, judge.FEWEST):
        drawn = rng.normal(size=(40_000, n))
        held = float(((drawn.min(1) < 0) & (drawn.max(1) > 0)).mean())
        assert held == pytest.approx(1 - 2 ** (1 - n), abs=0.005)
        assert (held > 0.95) == judge.enough(["a"] * n)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        change = rng.normal(0.1, 1, 40)
        low, high = judge.paired_difference(np.zeros(40), change, 400, seed=trial)["interval"]
        hits += low <= 0.1 <= high
    assert 180 <= hits <= 199


@pytest.mark.parametrize(
    ("b", "c", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (1, 8, 0.0390625), (3, 3, 1.0), (10, 2, 0.03857421875)]
)
def test_mcnemar(b, c, p):
    full = [1] * b + [0] * c + [1, 0, 0.5]
    pruned = [0] * b + [1] * c + [1, 0, 0.9]
    assert judge.mcnemar(full, pruned) == {"only_full": b, "only_pruned": c, "p": pytest.approx(p)}


def test_first_divergence():
    assert judge.first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert judge.first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert judge.first_divergence([1, 2], [1, 2, 3]) == 2
