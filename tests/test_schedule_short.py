"""Short forms of several layers: what they stand for, and what is said of those that say nothing."""

import re

import pytest

from vtwcli.errors import UsageError
from vtwcli.schedule.schedule import Schedule


def test_short_forms_stand_for_actions_in_order():
    short = [
        {"action": "freeze", "layers": "0-5, 9"},
        {"action": "mute", "layers": [2, 3], "sink": "zero"},
        {"action": "keep", "at": [2, 8], "select": {"score": "attention", "ratio": [0.5, 0.25]}},
        {"action": "keep", "at": [10, 11], "select": {"score": "uniform", "count": 3}},
    ]
    long = [
        {"action": "freeze", "at": 0, "until": 6},
        {"action": "mute", "at": 2, "until": 4, "sink": "zero"},
        {"action": "keep", "at": 2, "select": {"score": "attention", "ratio": 0.5}},
        {"action": "keep", "at": 8, "select": {"score": "attention", "ratio": 0.25}},
        {"action": "freeze", "at": 9, "until": 10},
        {"action": "keep", "at": 10, "select": {"score": "uniform", "count": 3}},
        {"action": "keep", "at": 11, "select": {"score": "uniform", "count": 3}},
    ]
    found = Schedule.from_dict(short)
    assert found == Schedule.from_dict(long)
    assert [action["action"] for action in found.to_dict()["actions"]] == [one["action"] for one in long]


def test_what_starts_at_auto_stays_behind_what_is_above_it():
    auto = {"action": "withdraw", "at": "auto", "after": 4, "when": {"cosine_above": 0.9}}
    found = Schedule.from_dict([{"action": "mute", "layers": "0, 3"}, auto])
    assert [action.at for action in found.actions] == [0, 3, "auto"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"action": "freeze", "layers": "x"}, "action 1: layers: 'x' is no layer, nor a range of layers"),
        ({"action": "freeze", "layers": "3-1"}, "action 1: layers: '3-1' is no layer"),
        ({"action": "freeze", "layers": "1, 0-2"}, "action 1: layers: 1 is there twice"),
        ({"action": "freeze", "layers": 3}, "action 1: layers must be a list or a text"),
        (
            {"action": "mute", "at": 1, "layers": "2"},
            "action 1: mute has layers, so at and until say nothing",
        ),
        (
            {"action": "keep", "at": [1, 2], "select": {"score": "uniform", "count": [1]}},
            "action 1: count has 1 entries for 2 layers",
        ),
        ({"action": "withdraw", "at": [1, 2]}, "actions.0.at"),
    ],
)
def test_short_forms_that_say_nothing(action, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Schedule.from_dict([action])
