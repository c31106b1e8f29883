"""Stages, VisiPruner's boundaries and proposed schedules from curves written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtwcli.judge.stages import (
    Stages,
    boundaries,
    sentences,
    static_schedule,
)
from vtwcli.methods.method import Shape
from vtwcli.methods.visipruner import VisiPruner, behind, filter_and_exit
from vtwcli.schedule.schedule import Schedule

UNTIL = np.array([[0.001, 0.002, 0.5, 2, 3, 3]])
WITHDRAWAL = np.array([[3, 2, 1, 0.5, 0.001, 0.0001]])


def found(until=UNTIL, withdrawal=WITHDRAWAL, tasks=("a",), eta=0.003, least=1):
    return boundaries(np.asarray(until), np.asarray(withdrawal), tasks, eta, least)


def test_shallow_ends_where_blindness_costs_and_deep_begins_at_the_withdrawal_layer():
    stages, tasks = found()
    assert (stages.blind, stages.deep) == (2, 4)
    assert (stages.shallow, stages.middle, stages.last) == (range(2), range(2, 4), range(4, 6))
    assert tasks == {"a": stages}


def test_means_over_the_samples_of_a_task_count():
    stages, _ = found(
        np.repeat(UNTIL, 2, 0) * [[0], [2]], np.repeat(WITHDRAWAL, 2, 0) * [[0], [2]], ["a", "a"]
    )
    assert (stages.blind, stages.deep) == (2, 4)


def test_every_task_must_agree():
    until = np.array([[0.001, 0.001, 0.001, 9, 9, 9], [0.001, 9, 9, 9, 9, 9]])
    withdrawal = np.array([[9, 9, 0, 0, 0, 0], [9, 9, 9, 9, 9, 0.001]])
    stages, tasks = found(until, withdrawal, ["a", "b"])
    assert (tasks["a"].blind, tasks["a"].deep) == (3, 2)
    assert (tasks["b"].blind, tasks["b"].deep) == (1, 5)
    assert (stages.blind, stages.deep) == (1, 5)


def test_no_task_may_be_without_a_withdrawal_layer():
    stages, tasks = found(np.repeat(UNTIL, 2, 0), np.array([WITHDRAWAL[0], [9.0] * 6]), ["a", "b"])
    assert tasks["a"].deep == 4
    assert stages.deep is None
    assert (stages.middle, stages.last) == (range(2, 6), range(6, 6))


def test_stages_never_overlap_and_cover_all_layers():
    for blind in range(7):
        for deep in [None, *range(1, 6)]:
            one = Stages(blind, deep, 6)
            assert [*one.shallow, *one.middle, *one.last] == list(range(6))


def test_a_model_that_ignores_vision():
    stages, _ = found(np.zeros((1, 6)), np.zeros((1, 6)))
    assert (stages.blind, stages.deep) == (6, 1)
    assert (list(stages.shallow), list(stages.middle)) == ([0], [])
    words = sentences(stages, [0.0] * 6, [0.0] * 6, [0.0] * 6, [0.0] * 6, 0.003)
    assert words["middle"] == "none: the shallow stage reaches the deep one"


def test_sentences_name_layers_and_costs():
    stages, _ = found()
    words = sentences(stages, UNTIL[0], [0, 0, 0.25, 0.125, 0, 0], WITHDRAWAL[0], [0, 0, 3, 4, 0, 0], 0.003)
    assert words == {
        "shallow": "layers 0-1: blocking text's reading of vision costs 0.002 nats",
        "middle": "layers 2-3: vision is read here; blocking one layer alone costs at most 0.25 nats (layer 2), and "
        "3.5 visual tokens are critical on average",
        "deep": "layers 4-5: withdrawing visual tokens costs 0.001 nats",
    }
    none = Stages(0, None, 6)
    words = sentences(none, [0.5] * 6, [0.5] * 6, [9.0] * 6, [1] * 6, 0.003)
    assert words["shallow"] == "none: blocking text's reading of vision in layer 0 costs 0.5 nats"
    assert words["deep"] == "none: withdrawal at no layer stays at or under 0.003 nats for every task"


def by_hand(cosines, critical, shallow, below, above, layers):
    """The rule as its authors run it: layer by layer, with a counter."""
    kept, count = None, 0
    start = end = None
    for d, row in enumerate(cosines):
        if d <= shallow:
            continue
        if kept is None:
            if any(value < below for value in row):
                kept, start = critical[d], d + 1
                if not kept:
                    return start, start
        elif all(row[i] >= above for i in kept):
            count += 1
            if count == layers:
                end = d + 1
                break
    return start, end


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_filter_and_exit_equal_the_rule_run_layer_by_layer(data):
    depth, tokens = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    value = st.sampled_from([0.9, 0.95, 0.996, 0.9995, 1.0])
    cosines = data.draw(
        st.lists(st.lists(value, min_size=tokens, max_size=tokens), min_size=depth, max_size=depth)
    )
    critical = [
        [i for i in range(tokens) if chosen[i]]
        for chosen in data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=depth, max_size=depth
            )
        )
    ]
    shallow, layers = data.draw(st.integers(0, depth)), data.draw(st.integers(1, 3))
    got = filter_and_exit(
        [min(row) for row in cosines],
        [len(kept) for kept in critical],
        [[min(row[i] for i in kept) for row in cosines] if kept else [] for kept in critical],
        shallow,
        0.995,
        0.999,
        layers,
    )
    assert got == by_hand(cosines, critical, shallow, 0.995, 0.999, layers)


def test_static_schedule_mutes_and_withdraws():
    schedule = static_schedule(Stages(2, 4, 6), {"model": "m"})
    assert schedule.to_dict() == {
        "format_version": 1,
        "actions": [{"at": 0, "until": 2, "action": "mute"}, {"at": 4, "action": "withdraw"}],
        "provenance": {"model": "m"},
    }
    assert schedule.is_static
    assert static_schedule(Stages(0, None, 6), {}).actions == ()


@pytest.mark.parametrize(("shallow", "first", "after"), [(2, 0, 2), (0, 0, 0), (0, 3, 1), (3, 3, 3)])
def test_dynamic_schedule_fits_the_model(shallow, first, after):
    schedule = behind(shallow, Shape(8, first), VisiPruner(), {})
    schedule.check_depth(8, first)
    keep, withdraw = schedule.actions[-2:]
    assert (keep.action, keep.at, keep.after, withdraw.action) == ("keep", "auto", after, "withdraw")
    assert keep.select.above == 0.2
    assert {action.action for action in schedule.actions[:-2]} == ({"mute"} if shallow else set())
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def test_no_dynamic_schedule_where_nothing_is_left_to_decide():
    assert behind(6, Shape(6), VisiPruner(), {}) is None
