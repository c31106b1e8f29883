"""Finished samples survive an interruption, and only that."""

import json

import pytest

from vtwcli.resume import kept, key_of, stamp

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
