"""The tour of ``vtw demo``: what it writes, and that its last answers are what the commands would say."""

import json

from tests.cli import vtw
from vtwcli.data.scenes import examples
from vtwcli.results.reading import read_calibration
from vtwcli.tour import ask


def test_the_tour_writes_what_its_commands_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = vtw("demo", "--limit", "6", "--task", "colour", "--quiet")
    assert done.code == 0, done.err
    folder = tmp_path / "vtw-tour"
    k = read_calibration(folder / "calibration.json")["withdrawal_layer"]
    names = {path.name for path in folder.iterdir()}
    assert {"calibration.png", "analysis.html", "answer.png", "model"} <= names
    for command in ("calibrate demo", "analyze demo", f"export demo --layer {k}", "verify vtw-tour/model"):
        assert f"     vtw {command}" in done.out
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["vtw"]["schedule"]["actions"] == [{"action": "withdraw", "at": k}]
    again = vtw("demo")
    assert again.code == 2 and "exists already" in again.err
    assert vtw("demo", "--limit", "6", "--force", "--quiet").code == 0


def test_the_question_is_answered_full_and_pruned():
    example = next(examples("eval", 1, seed=2, tasks=("colour",)))
    asked = ask(example, 9)
    assert asked.answers == (example.answer, example.answer)
    full, lean = asked.entries
    assert len(set(full)) == 1 and lean[:9] == full[:9]
    assert lean[9:] == [full[0] - 64] * 3
    assert asked.entries != ask(example, 10).entries
