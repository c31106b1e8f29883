"""``vtw eval`` as a user meets it: files, gates, messages and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.methods.visipruner import VisiPruner

FAST = ("--limit", 2, "--max-new-tokens", 3, "--bootstrap", 0, "--no-timing")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_views_and_files(vtw, tiny_dir, data, tmp_path):
    code, out, err = vtw("eval", tiny_dir, "--layers", "2,4", "--data", data, *FAST, "--output", "e.json")
    assert code == 0, err
    assert files(tmp_path) == ["e.html", "e.json", "e.md", "e.png"]
    assert "Metrics: exact_match for colour, caption." in out
    assert "…" not in out
    assert "KL(pruned ‖ full) in nats" in out
    assert err == "wrote e.json, e.md, e.html, e.png\n"
    result = json.loads(Path("e.json").read_text())
    assert list(result["schedules"]) == ["K=2", "K=4"]
    assert result["run"]["latency"] is None
    assert Path("e.png").read_bytes()[:4] == b"\x89PNG"


def test_json_is_the_whole_of_stdout_and_writes_nothing(vtw, exported, data, tmp_path):
    code, out, err = vtw("eval", exported, "--data", data, *FAST, "--json")
    assert (code, err) == (0, "no files written: --json without --output only prints\n")
    assert list(json.loads(out)["schedules"]) == ["exported"]
    assert files(tmp_path) == []


def test_a_failed_gate_is_exit_3_and_a_sentence_with_the_result_written(vtw, tiny_dir, data, tmp_path):
    args = ("eval", tiny_dir, "--layer", 1, "--data", data, *FAST, "--max-drop", 1, "--max-kl", 1e-9)
    code, out, err = vtw(*args, "--output", "e.json")
    assert code == 3
    result = json.loads(Path("e.json").read_text())
    kl = result["schedules"]["K=1"]["kl_answer"]
    sentence = f"gate max_kl FAILED: K=1: mean KL {kl:.4g}, allowed 1e-09"
    assert f"error: {sentence}\n  1 of 2 gates failed\n" in err
    assert sentence in out
    assert sentence in Path("e.md").read_text()
    assert [gate["passed"] for gate in result["gates"]] == [True, False]
    assert files(tmp_path) == ["e.html", "e.json", "e.md", "e.png"]


def test_samples_of_a_calibration_given_as_schedule_are_left_out(vtw, tiny_dir, data, tmp_path):
    args = ("calibrate", tiny_dir, "--data", data, "--limit", 1, "--max-new-tokens", 3, "--bootstrap", 0)
    code, _, err = vtw(*args, "--eta", 1e3, "--output", "k.json")
    assert code == 0, err
    for given in (["--schedule", "k.json"], ["--layer", 3, "--calibration", "k.json"]):
        code, out, err = vtw("eval", tiny_dir, *given, "--data", data, *FAST, "--limit", 3, "--json")
        assert code == 0, err
        result = json.loads(out)
        used = {sample["id"] for sample in json.loads(Path("k.json").read_text())["samples"]}
        assert (result["left_out"], len(result["samples"]), len(used)) == (2, 4, 2)
        assert used.isdisjoint(row["id"] for row in result["samples"])
    mix = load_data([DataSpec(source=str(data))], limit=1, seed=0)
    code, _, err = vtw(
        "eval", tiny_dir, "--schedule", "k.schedule.yaml", "--data", data, *FAST, "--limit", 1, "--json"
    )
    assert code == 0
    assert len(mix.samples) == 2
    assert "warning: schedule k was calibrated on these very samples" in err


def test_samples_of_another_methods_calibration_are_left_out(vtw, tiny_dir, data, tmp_path):
    """Its samples say less than those of a KL curve."""
    mix = load_data([DataSpec(source=str(data))], limit=2, seed=0)
    result = {
        "format": "vtw-calibration", "method": "visipruner", "num_layers": 6,
        "schedule": VisiPruner(shallow_mid_layer=2).schedule().to_dict(),
        "samples": [{"id": "0", "fingerprint": mix.fingerprints[1], "task": "colour"}],
    }  # fmt: skip
    Path("v.json").write_text(json.dumps(result))
    code, out, err = vtw(
        "eval", tiny_dir, "--schedule", "v.json", "--data", data, *FAST, "--limit", 3, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert list(found["schedules"]) == ["v"]
    assert (found["left_out"], len(found["samples"])) == (1, 5)
    assert mix.samples[1].id not in [row["id"] for row in found["samples"]]


def test_evaluation_lands_on_the_card_of_an_export(vtw, tiny_dir, data, tmp_path):
    code, _, err = vtw("eval", tiny_dir, "--layers", "2,3", "--data", data, *FAST, "--output", "e.json")
    assert code == 0, err
    code, _, err = vtw("export", tiny_dir, "--layer", 3, "--evaluation", "e.json", "--output", "pruned")
    assert code == 0, err
    card = Path("pruned/README.md").read_text()
    result = json.loads(Path("e.json").read_text())
    assert f"| K=3 | {result['schedules']['K=3']['kl_first']:.2e} |" in card
    assert "K=2" not in card
    assert str(tiny_dir) not in card
    assert not Path("pruned/e.json").exists()
    code, _, err = vtw("export", tiny_dir, "--layer", 4, "--evaluation", "e.json", "--output", "other")
    assert code == 2
    assert "error: the evaluation is not of this schedule\n" in err


def test_resume_leaves_nothing_behind(vtw, tiny_dir, data, tmp_path):
    code, _, err = vtw(
        "eval", tiny_dir, "--layer", 3, "--data", data, *FAST, "--resume", "--output", "e.json"
    )
    assert code == 0, err
    assert files(tmp_path) == ["e.html", "e.json", "e.md", "e.png"]
    assert "resume" not in json.loads(Path("e.json").read_text())["options"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            [],
            2,
            "error: nothing to compare with the full model\n  give --schedule FILE, --layer K or --layers\n",
        ),
        (["--layer", 9], 2, "has 6 layers (0..5)\n"),
        (["--layers", "2,2"], 2, "error: two schedules have the same name\n"),
        (
            ["--layer", 3, "--resume", "--json"],
            2,
            "error: --resume: there is no result file to keep finished",
        ),
        (["--layers", "2,x"], 2, "error: --layers: 'x' is not a layer number\n"),
        (
            ["--layer", 3, "--backend", "onnx"],
            2,
            "is not a directory of ONNX graphs\n  make one: vtw export ",
        ),
        (
            ["--layer", 3, "--backend", "jax"],
            2,
            "error: --backend: input should be 'auto', 'torch', 'onnx' or 'openvino'",
        ),
        (
            ["--layer", 3, "--calibration", "none.json"],
            2,
            "error: none.json: cannot read the calibration result",
        ),
        (
            ["--layer", 3, "--max-drop", -1],
            2,
            "error: --max-drop: input should be greater than or equal to 0",
        ),
        (["--layer", 3, "--baseline", "./absent"], 4, "error: there is no directory './absent'\n"),
    ],
)
def test_wrong_use_is_one_clear_line_and_writes_nothing(vtw, tiny_dir, data, tmp_path, args, code, message):
    output = [] if "--json" in args else ["--output", "e.json"]
    ended, out, err = vtw("eval", tiny_dir, "--data", data, *FAST, *args, *output)
    assert (ended, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert files(tmp_path) == []
