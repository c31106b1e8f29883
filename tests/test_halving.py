"""Successive halving and the space of combinations, against slow references."""

import itertools
import math

import numpy as np
import pytest

from vtwcli.schedule.schedule import Schedule
from vtwcli.searching.combined import Combination, Space
from vtwcli.searching.halving import CLASSES, better_half, classes, rungs, spread


def slow_half(cost, far, least):
    """By sorting each class on its own, candidate by candidate."""
    low, high = min(cost), max(cost)
    groups = {}
    for place, value in enumerate(cost):
        number = 0
        while number < CLASSES - 1 and high > low and (value - low) / (high - low) * CLASSES >= number + 1:
            number += 1
        groups.setdefault(number, []).append(place)
    stay = []
    for mine in groups.values():
        mine = sorted(mine, key=lambda place: (far[place], cost[place], place))
        stay += mine[: (len(mine) + 1) // 2]
    for place in sorted(range(len(cost)), key=lambda place: (far[place], cost[place], place)):
        if len(stay) < least and place not in stay:
            stay.append(place)
    return sorted(stay)


@pytest.mark.parametrize("seed", range(20))
def test_halving_is_the_slow_references(seed):
    random = np.random.default_rng(seed)
    count, least = int(random.integers(1, 60)), int(random.integers(1, 8))
    cost = random.choice(np.linspace(0.1, 1, 13), count).tolist()
    far = random.choice(np.linspace(0, 2, 9), count).tolist()  # with ties
    assert better_half(cost, far, least) == slow_half(cost, far, least)
    half = better_half(cost, far)
    assert count / 2 <= len(half) <= (count + CLASSES) / 2
    assert set(classes(cost)) <= set(range(CLASSES))
    # of each class the best one is there
    for number in set(classes(cost)):
        mine = [place for place in range(count) if classes(cost)[place] == number]
        assert min(mine, key=lambda place: (far[place], cost[place], place)) in half


def test_rungs_double_samples_and_halve_candidates():
    assert rungs(96, 40, 12) == [5, 10, 20, 40]
    assert rungs(12, 40, 12) == [40]
    assert rungs(1000, 5, 12) == [3, 5]  # no rung without new samples, none on one alone
    for trials in (1, 5, 100, 400):
        for samples in (1, 2, 7, 100):
            counts = rungs(trials, samples)
            assert counts[-1] == samples and counts == sorted(set(counts))
            assert all(math.ceil(b / 2) <= a for a, b in itertools.pairwise(counts))


def test_spread_takes_from_all_classes():
    cost = [0.1] * 50 + [0.5] * 3 + [0.9]
    assert spread(cost, 6) == [0, 1, 50, 51, 52, 53]
    assert spread(cost, 100) == list(range(54)) and spread([], 3) == []


@pytest.mark.parametrize("seed", range(5))
def test_combinations_are_schedules_and_come_back(seed):
    space = Space(8, 1, ("attention", "uniform"), (7, 6, 5, 4, 3, 2, 1, 0))
    random = np.random.default_rng(seed)
    one = space.draw(random)
    for _ in range(100):
        schedule = one.schedule()
        schedule.check_depth(8, 1)
        assert Combination.of(schedule, 8) == one
        assert Schedule.from_dict(schedule.to_dict()) == schedule
        assert all(layer < one.withdraw for layer in one.frozen)
        assert all(1 <= part.layer < one.withdraw for part in one.kept) and len(one.kept) <= 2
        one = space.near(one, random) if random.random() < 0.8 else space.draw(random)
    assert Combination.of(Schedule.withdraw_at(3), 8) == Combination(8, withdraw=3)
    visi = {"at": "auto", "when": {"cosine_below": 0.5}, "action": "withdraw"}
    assert Combination.of(Schedule.from_dict([visi]), 8) is None
