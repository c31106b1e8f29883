"""Finished samples survive an interruption, and only that."""

import json

import numpy as np
import pytest
from PIL import Image

from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.evaluate import evaluate
from vtwcli.machine import distributed
from vtwcli.recipe.recipe import CalibrateSection, EvalSection, ModelSection
from vtwcli.results.resume import kept, key_of, stamp
from vtwcli.schedule.schedule import Schedule

SCHEDULE = Schedule.withdraw_at(3)
ROWS = [f"row {i}" for i in range(4)]


def interrupted(state, key, entries, contents=ROWS):
    """A run that finishes ``entries`` and is then interrupted."""
    with pytest.raises(KeyboardInterrupt), kept(state, key, contents) as (_, keep):
        for place, entry in entries.items():
            keep(place, entry)
        raise KeyboardInterrupt


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_finished_is_known_again_and_gone_at_the_end(tmp_path, capsys):
    state = tmp_path / "deep" / "k.partial.jsonl"
    interrupted(state, "key", {3: {"kl": [0.1]}, 1: [1, None]})
    assert names(tmp_path / "deep") == [".k.partial.jsonl.0"]
    with kept(state, "key", ROWS) as (known, _):
        assert known == {3: {"kl": [0.1]}, 1: [1, None]}
    assert "resuming: 2 samples are done already" in capsys.readouterr().err
    assert names(tmp_path / "deep") == []


def test_a_torn_line_is_not_read_and_not_kept(tmp_path):
    interrupted(tmp_path / "k", "key", {0: "a"})
    file = tmp_path / ".k.0"
    whole = file.read_text()
    file.write_text(whole + '["row 1", "b')
    interrupted(tmp_path / "k", "key", {2: "c"})
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == [
        ["row 0", "a"],
        ["row 2", "c"],
    ]
    file.write_text("")
    with kept(tmp_path / "k", "key", ROWS) as (known, _):
        assert known == {}


def test_other_inputs_start_anew(tmp_path, capsys):
    interrupted(tmp_path / "k", "one", {0: "a"})
    with kept(tmp_path / "k", "two", ROWS) as (known, _):
        assert known == {}
    assert "other inputs" in capsys.readouterr().err


def test_another_number_of_processes_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        interrupted(tmp_path / "k", "key", {rank: rank * 10})
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with kept(tmp_path / "k", "key", ROWS) as (known, _):
        assert known == {0: 0, 1: 10, 2: 20}
    assert names(tmp_path) == []


def test_nothing_is_written_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kept(None, "key", ROWS) as (known, keep):
        keep(0, "a")
        assert known == {}
    assert names(tmp_path) == []


def test_a_changed_model_directory_has_another_stamp(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    before = stamp(tmp_path)
    assert stamp(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert stamp(tmp_path) != before


def test_keys_follow_their_parts():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert key_of("a", 1) != key_of("a", 2)


def test_entries_go_by_content_not_by_place(tmp_path, capsys):
    interrupted(tmp_path / "k", "key", {0: "zero", 1: "one", 2: "two"})
    with kept(tmp_path / "k", "key", ["row 2", "edited", "row 0", "row 2"]) as (known, _):
        assert known == {0: "two", 2: "zero", 3: "two"}
    assert "resuming: 3 samples are done already" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_entries_by_place_of_an_earlier_version_start_anew(tmp_path, capsys):
    import hashlib

    state = tmp_path / "k"
    old = hashlib.sha256(json.dumps(["one"], sort_keys=True, default=str).encode()).hexdigest()
    (tmp_path / ".k.0").write_text(f'{old}\n[0, "a"]\n')
    with kept(state, key_of("one"), ROWS) as (known, _):
        assert known == {}
    assert "starting anew" in capsys.readouterr().err


@pytest.fixture
def rows(tmp_path):
    """Four rows about pictures of noise, and a function that writes them to a file."""
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    rows = [
        {"image": f"{i}.png", "question": f"what is {i}?", "answer": "red sea"[: 3 + i], "task": "ab"[i % 2]}
        for i in range(4)
    ]

    def write(changed=rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, changed)))
        return [DataSpec(source=str(tmp_path / "rows.jsonl"))]

    return rows, write, tmp_path


class Interrupted:
    """What a command knows of its processes when it is interrupted as soon as all its work is done."""

    share, is_main = staticmethod(distributed.share), staticmethod(distributed.is_main)

    @staticmethod
    def gathered(work):
        work()
        raise KeyboardInterrupt


def without_run(result):
    return {key: value for key, value in result.items() if key != "run"}


def repaint(folder):
    Image.new("RGB", (12, 12), (200, 10, 10)).save(folder / "1.png")


EDITS = {
    "nothing": (lambda rows, folder: rows, 0),
    "question": (lambda rows, folder: [rows[0] | {"question": "who?"}, *rows[1:]], 1),
    "answer": (lambda rows, folder: [rows[0], rows[1] | {"answer": "sea"}, *rows[2:]], 1),
    "picture": (lambda rows, folder: repaint(folder) or rows, 1),
    "task": (lambda rows, folder: [*rows[:3], rows[3] | {"task": "a"}], 1),
    "order": (lambda rows, folder: rows[::-1], 0),
    "one less": (lambda rows, folder: rows[1:], 0),
    "one more": (lambda rows, folder: [rows[0] | {"question": "why?"}, *rows], 1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_calibration_computes_edited_rows_again_and_only_those(tiny_dir, rows, edit, monkeypatch):
    import vtwcli.calibrate as module

    rows, write, folder = rows
    options = CalibrateSection(limit=9, max_new_tokens=2, bootstrap=0, answers="reference", eta=1e3)
    real, model, state = module.sweep, ModelSection(name=str(tiny_dir)), folder / "state" / "k"
    calls = []

    def counting(*given, **kwargs):
        calls.append(1)
        return real(*given, **kwargs)

    monkeypatch.setattr(module, "sweep", counting)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "distributed", Interrupted)
        calibrate(model, write(), options, state=state)
    assert len(calls) == 4
    change, again = EDITS[edit]
    specs = write(change(rows, folder))
    calls.clear()
    resumed = calibrate(model, specs, options, state=state)
    assert len(calls) == again
    calls.clear()
    assert json.dumps(without_run(resumed)) == json.dumps(without_run(calibrate(model, specs, options)))


@pytest.mark.parametrize("edit", ["nothing", "question", "answer", "picture", "order"])
def test_evaluation_computes_the_batches_of_edited_rows_again(tiny_dir, rows, edit, monkeypatch):
    import vtwcli.evaluate as module

    rows, write, folder = rows
    options = EvalSection(limit=9, max_new_tokens=2, bootstrap=0, timing=False, batch_size=2)
    model, state, schedules = ModelSection(name=str(tiny_dir)), folder / "state" / "e", [("K=3", SCHEDULE)]
    real, calls = module.full_answers, []

    def counting(*given):
        calls.append(1)
        return real(*given)

    monkeypatch.setattr(module, "full_answers", counting)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "distributed", Interrupted)
        evaluate(model, schedules, write(), options, state=state)
    assert len(calls) == 2
    specs = write(EDITS[edit][0](rows, folder))
    calls.clear()
    resumed, _ = evaluate(model, schedules, specs, options, state=state)
    assert len(calls) == {"nothing": 0, "order": 2}.get(edit, 1)  # padding depends on who shares a batch
    whole, _ = evaluate(model, schedules, specs, options)
    assert json.dumps(without_run(resumed)) == json.dumps(without_run(whole))


def test_another_model_schedule_or_option_starts_anew(tiny_dir, rows, monkeypatch, capsys):
    import vtwcli.evaluate as module

    _, write, folder = rows
    options = EvalSection(limit=9, max_new_tokens=2, bootstrap=0, timing=False)
    model, specs = ModelSection(name=str(tiny_dir)), write()
    others = [
        (model, [("K=3", Schedule.withdraw_at(4))], options),
        (model, [("K=3", SCHEDULE)], options.model_copy(update={"max_new_tokens": 1})),
        (model.model_copy(update={"dtype": "bfloat16"}), [("K=3", SCHEDULE)], options),
        (model.model_copy(update={"attn": "eager"}), [("K=3", SCHEDULE)], options),
    ]

    for number, (other, schedules, changed) in enumerate(others):
        state = folder / "state" / str(number)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(module, "distributed", Interrupted)
            evaluate(model, [("K=3", SCHEDULE)], specs, options, state=state)
        capsys.readouterr()
        evaluate(other, schedules, specs, changed, state=state)
        assert "starting anew" in capsys.readouterr().err
