"""Every policy on curves small enough to choose by hand."""

import numpy as np
import pytest

from vtwcli.judge import policies
from vtwcli.judge.policies import Rule

KL = np.array([[9.0, 0.1, 0.4, 0.1, 0.0], [9.0, 0.3, 0.4, 0.1, 0.0]])  # mean 9, 0.2, 0.4, 0.1, 0
AGREE = np.array([[0.0, 0.5, 1.0, 1.0, 1.0], [0.0, 1.0, 0.5, 1.0, 1.0]])
TASKS = ["a", "b"]


def choose(policy, eta=0.25, least=1, **extra):
    return policies.choose(Rule(policy, eta, least, **extra), KL, AGREE, TASKS)


def test_paper_takes_the_first_layer_under_eta_and_does_not_look_beyond():
    assert choose("paper") == 1
    assert choose("paper", least=2) == 3
    assert choose("paper", eta=0.2) == 1  # "under" includes the threshold


def test_sustained_wants_every_later_layer_under_eta():
    assert choose("sustained") == 3
    assert choose("sustained", eta=0.5) == 1
    assert choose("sustained", eta=10, least=0) == 0


def test_quantile_looks_at_the_worst_samples():
    assert choose("quantile", eta=0.25, quantile=1.0) == 3
    assert policies.choose(Rule("quantile", 0.25, 1, quantile=1.0), KL[:, :2], AGREE[:, :2], TASKS) is None
    assert policies.choose(Rule("quantile", 0.25, 1, quantile=0.5), KL[:, :2], AGREE[:, :2], TASKS) == 1


def test_agreement():
    assert choose("agreement", agreement=0.75) == 1
    assert choose("agreement", agreement=0.98) == 3


def test_worst_task_is_the_latest_of_the_tasks():
    kl = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert policies.choose(Rule("worst-task", 0.1, 0), kl, kl, ["a", "b"]) == 2
    assert policies.per_task(Rule("worst-task", 0.1, 0), kl, ["a", "b"]) == {"a": 1, "b": 2}
    assert policies.choose(Rule("sustained", 0.5, 0), kl, kl, ["a", "b"]) == 1  # the mean hides task b


def test_one_task_without_a_layer_leaves_none():
    kl = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert policies.choose(Rule("worst-task", 0.1, 0), kl, kl, ["a", "b"]) is None
    assert policies.compromise(Rule("worst-task", 0.1, 0), kl, ["a", "b"]) == 0
    assert policies.compromise(Rule("worst-task", 0.1, 1), kl, ["a", "b"]) == 1


def test_budget_takes_the_smallest_kl_that_is_affordable():
    cost = (0.2, 0.4, 0.6, 0.8, 0.9)
    assert choose("budget", budget=0.6, cost=cost) == 1
    assert choose("budget", budget=0.8, cost=cost) == 3
    assert choose("budget", budget=0.3, cost=cost) is None  # layer 0 is affordable but no candidate


def test_bootstrap_is_seeded_and_brackets_the_choice():
    generator = np.random.default_rng(1)
    kl = np.exp(-np.arange(8) + generator.normal(0, 1, (30, 8)))
    rule = Rule("sustained", 0.05, 1)
    low, high = policies.bootstrap(rule, kl, kl, ["a"] * 30, 300, seed=3)
    assert (low, high) == policies.bootstrap(rule, kl, kl, ["a"] * 30, 300, seed=3)
    assert low <= policies.choose(rule, kl, kl, ["a"] * 30) <= high
    assert low < high
    assert policies.bootstrap(rule, kl, kl, ["a"] * 30, 0, seed=3) is None


def test_bootstrap_of_equal_samples_is_a_point_and_no_layer_counts_as_all():
    same = np.repeat(KL[:1], 6, axis=0)
    assert policies.bootstrap(Rule("paper", 0.25, 1), same, same, ["a"] * 6, 50, 0) == (1, 1)
    assert policies.bootstrap(Rule("paper", 1e-9, 1), same[:, :3], same, ["a"] * 6, 50, 0) == (3, 3)


@pytest.mark.parametrize(
    ("counts", "pooled", "each"),
    [
        ([1], False, False),
        ([5], False, False),
        ([6], True, True),
        ([3, 3], False, False),
        ([4, 3], True, False),
        ([1] * 12, False, False),  # every task would be its own mean in every resample
        ([2] * 5, True, False),
        ([6, 6], True, True),
        ([60, 5], True, False),
    ],
)
def test_few_samples_give_no_interval(counts, pooled, each):
    tasks = [f"task {i}" for i, count in enumerate(counts) for _ in range(count)]
    kl = np.random.default_rng(0).random((len(tasks), 4))
    for policy in ("paper", "sustained", "quantile", "agreement", "worst-task"):
        found = policies.bootstrap(Rule(policy, 0.5, 1), kl, 1 - kl, tasks, 20, 0)
        assert (found is not None) == (each if policy == "worst-task" else pooled), policy


@pytest.mark.parametrize(("layers", "least"), [(8, 1), (15, 1), (16, 5), (32, 5)])
def test_default_first_candidate(layers, least):
    assert policies.default_min_layer(layers) == least
