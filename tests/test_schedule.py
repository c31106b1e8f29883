"""The schedule: forms, validation, arithmetic, and the exact words of its errors."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtwcli.errors import UsageError
from vtwcli.schedule import rules, words
from vtwcli.schedule.schedule import Freeze, Keep, Mute, Schedule, Select, When, Withdraw

VISIPRUNER = """\
schedule:
  - {at: 0, until: 6, action: mute, sink: first}
  - {at: auto, after: 6, action: keep, select: {score: contribution, above: 0.2}, when: {cosine_below: 0.995}}
  - {at: 16, action: withdraw}
"""


def read(tmp_path, text, name="s.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return Schedule.from_file(path)


def test_yaml_and_json_forms_are_the_same_schedule(tmp_path):
    schedule = read(tmp_path, VISIPRUNER)
    assert not schedule.is_static
    assert read(tmp_path, schedule.to_yaml()) == schedule
    assert read(tmp_path, json.dumps(schedule.to_dict()), "s.json") == schedule
    assert read(tmp_path, VISIPRUNER.partition("\n")[2], "list.yaml") == schedule
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def test_canonical_form_says_only_what_matters():
    assert Schedule.withdraw_at(3).to_dict() == {
        "format_version": 1,
        "actions": [{"at": 3, "action": "withdraw"}],
    }
    assert Schedule.withdraw_at(3, model="m").to_dict()["provenance"] == {"model": "m"}


def test_schedule_of_a_calibration_result(tmp_path):
    result = {"withdrawal_layer": 4, "kl": {"mean": [1, 2]}, "schedule": Schedule.withdraw_at(4).to_dict()}
    assert read(tmp_path, json.dumps(result), "calibration.json") == Schedule.withdraw_at(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule:\n  - {at: 3, action: witdraw}", ":2:13: actions.0.action: unknown action 'witdraw', must be"),
        ("- {at: 3, action: withdraw, untill: 4}", ":1:29: actions.0.untill: unknown key 'untill' (did you mean"),
        ("a: 1\na: 2", ':2:1: found duplicate key "a"'),
        ("schedule: 3", "s.yaml: actions: input should be a list, got 3"),
        ("- {at: -1, action: withdraw}", ":1:4: actions.0.at: input should be"),
        ("- {at: 2, until: 2, action: freeze}", ":1:3: actions.0: 'until' (2) must be above 'at' (2)"),
        ("- {at: auto, action: withdraw}", "actions.0: 'at: auto' needs a condition under 'when'"),
        ("- {at: 2, after: 1, action: withdraw}", "'when' and 'after' go with 'at: auto' only"),
        ("- {at: 2, action: keep, select: {score: random}}", "give exactly one of ratio, count"),
        ("- {at: 2, action: keep, select: {score: random, above: 1}}", "score random has no threshold"),
        ("- {at: 5, action: withdraw}\n- {at: 6, action: withdraw}", "action 2 (withdraw) comes after the withdrawal"),
        ("- {at: 5, until: 6, action: mute}\n- {at: 4, action: withdraw}", "action 2 (withdraw) starts at 4, before"),
        ("- {action: mute, at: 3}", ":1:3: actions.0.until: this key is required"),
        ("- {at: 3}", "actions.0: the key 'action' is required"),
        ("", "a schedule must be a mapping of keys to values, not an empty file"),
        ("- at: 1\n   x: [", ":2:5: mapping values are not allowed here"),
        ("format_version: 3\nactions: []", ":1:1: format_version: input should be 1 or 2, got 3"),
    ],
)  # fmt: skip
def test_errors_name_file_line_and_key(tmp_path, text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "s.yaml") in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot read the schedule: No such file"):
        Schedule.from_file(tmp_path / "none.yaml")


def test_depth_is_checked():
    Schedule.withdraw_at(8).check_depth(8)
    with pytest.raises(UsageError, match=re.escape("at is 9, but the model has 8 layers (0..7)")):
        Schedule.withdraw_at(9).check_depth(8)
    with pytest.raises(UsageError, match=r"still adds vision in layers 0\.\.2"):
        Schedule.withdraw_at(2).check_depth(8, first_withdrawal=3)


def test_visual_tokens_by_layer():
    schedule = Schedule.from_dict(
        [
            {"at": 1, "action": "keep", "select": {"score": "uniform", "ratio": 0.5}},
            {"at": 3, "action": "keep", "select": {"score": "random", "count": 2}},
            {"at": 4, "action": "withdraw"},
        ]
    )
    assert schedule.is_static
    assert schedule.visual_per_layer(6, 9) == [9, 5, 5, 2, 0, 0]
    assert Schedule.withdraw_at(6).visual_per_layer(6, 9) == [9] * 6


def test_dynamic_schedule_has_no_fixed_counts(tmp_path):
    with pytest.raises(UsageError, match="no fixed token counts"):
        read(tmp_path, VISIPRUNER).visual_per_layer(32, 576)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "at",
    "until",
    "action",
    "select",
    "score",
    "ratio",
    "count",
    "above",
    "when",
    "cosine_below",
    "sink",
    "after",
]
WORDS = ["withdraw", "keep", "mute", "freeze", "auto", "random", "uniform", "attention", "first", "zero"]
near_actions = st.dictionaries(
    st.sampled_from(KEYS),
    st.integers(-1, 9) | st.sampled_from(WORDS) | st.floats(-1, 1) | json_values
    | st.dictionaries(st.sampled_from(KEYS), st.sampled_from(WORDS) | st.floats(0, 1), max_size=3),
    max_size=5,
)  # fmt: skip


ACTIONS = [
    {"at": 2, "action": "withdraw"},
    {"at": 2, "action": "keep", "select": {"score": "random", "ratio": 0.5, "seed": 3}},
    {"at": 1, "until": 4, "action": "mute", "sink": "zero", "during": "prefill"},
    {"at": 0, "until": 1, "action": "freeze"},
    {"at": "auto", "after": 1, "action": "withdraw", "when": {"cosine_above": 0.9, "layers": 2}},
    {
        "at": "auto",
        "action": "keep",
        "select": {"score": "attention", "above": 0.1},
        "when": {"cosine_below": 0},
    },
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(near_actions, max_size=3) | json_values)
def test_any_document_is_a_schedule_or_a_clear_error(data):
    try:
        schedule = Schedule.from_dict(data)
    except UsageError as error:
        assert "\n" not in error.message
    else:
        assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def filled(action):
    """An action with its defaults, and nothing that holds nothing."""
    return {
        key: filled(value) if isinstance(value, dict) else value
        for key, value in action.items()
        if value is not None
    }


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(near_actions | st.sampled_from(ACTIONS), max_size=3))
def test_a_schedule_is_valid_where_it_is_read_as_where_it_runs(data):
    """Who reads a person's document and who executes what it became go by the same rules."""
    try:
        schedule = Schedule.from_dict(data)
    except UsageError:
        with pytest.raises(words.ScheduleError):
            rules.read({"format_version": 1, "actions": data})
    else:
        wanted = [filled(action.model_dump()) for action in schedule.actions]
        assert rules.read(schedule.to_dict()) == wanted
        assert rules.read({"format_version": 1, "actions": data}) == wanted


def test_every_key_is_a_field_of_its_section():
    for part in (Withdraw, Keep, Mute, Freeze, When, Select):
        assert part.model_fields.keys() - {"action"} == rules.KEYS[part.__name__.lower()].keys()
    assert {part.__name__.lower() for part in (Withdraw, Keep, Mute, Freeze)} == set(words.words("action"))


def test_every_word_says_something_or_is_what_is_left_unsaid():
    assert len(words.WORDS) == len({(word.slot, word.word) for word in words.WORDS})
    assert [word.word for word in words.WORDS if not word.says] == [words.words("during")[0]]
    for key in ("score", *words.MUTED):
        assert any(key in keys for keys in rules.KEYS.values())


@pytest.mark.parametrize("ratio", [0, 0.1, 1 / 3, 0.5, 1])
def test_a_ratio_rounds_up(ratio):
    for present in range(100):
        assert words.count_of(ratio, present) == -(-ratio * present // 1)
        kept = Select(score="uniform", ratio=ratio)
        assert words.kept_count(kept.model_dump(), present) == words.count_of(ratio, present) <= present
