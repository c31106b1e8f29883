"""Evaluation of what ``vtw export`` made: the same numbers as of the model it was made from, and other baselines."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engines import needs_openvino
from tests.test_evaluate import options
from vtwcli.analyze import analyze
from vtwcli.calibrate import calibrate
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.evaluate import evaluate
from vtwcli.export.hf.export import export_hf
from vtwcli.measure.answers import full_answers, schedule_answers
from vtwcli.models.generation import plain_generation
from vtwcli.models.inputs import encode_batch
from vtwcli.models.loading import load
from vtwcli.recipe.defaults import default_data
from vtwcli.recipe.recipe import AnalyzeSection, CalibrateSection, ModelSection
from vtwcli.report.evaluation import sentences
from vtwcli.schedule.schedule import Schedule

K = 3
SCHEDULE = Schedule.withdraw_at(K)


@pytest.fixture(scope="module")
def exported(tiny_dir, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "pruned"
    export_hf(str(tiny_dir), SCHEDULE, target)
    return target


@pytest.fixture(scope="module")
def rounded(tiny_dir, tmp_path_factory) -> Path:
    """An export whose weights are not the base model's."""
    target = tmp_path_factory.mktemp("rounded") / "pruned"
    export_hf(str(tiny_dir), SCHEDULE, target, dtype="bfloat16")
    return target


def run(model, data, schedules=(), trust=False, **given):
    section = ModelSection(name=str(model), trust_remote_code=trust)
    return evaluate(section, schedules, [DataSpec(source=str(data))], options(**given))[0]


def numbers(result: dict, name: str) -> dict:
    """What was found about one schedule, without names of models."""
    return {
        "tasks": {task: (row["full"], row["schedules"][name]) for task, row in result["tasks"].items()},
        "schedule": {k: v for k, v in result["schedules"][name].items() if k != "schedule"},
        "actions": result["schedules"][name]["schedule"]["actions"],
        "samples": [(row["id"], row["full"], row["pruned"][name]) for row in result["samples"]],
    }


@pytest.mark.parametrize("trust", [False, True])
def test_exported_directory_equals_the_model_under_its_schedule(exported, tiny_dir, data, trust):
    """Also with --trust-remote-code, which must not prune the full model."""
    mine, wanted = run(exported, data, trust=trust), run(tiny_dir, data, [("K=3", SCHEDULE)])
    assert numbers(mine, "exported") == numbers(wanted, "K=3")
    assert mine["model"]["baseline"] == str(exported)
    assert wanted["schedules"]["K=3"]["kl_answer"] > 1e-4  # there is something to tell apart


def test_other_schedules_can_be_tried_on_an_export(exported, tiny_dir, data):
    other = [("K=5", Schedule.withdraw_at(5))]
    assert numbers(run(exported, data, other), "K=5") == numbers(run(tiny_dir, data, other), "K=5")


def test_baseline_is_the_full_model(rounded, tiny_dir, data):
    """Rounding and withdrawal together, against the model before both, recomputed here sample by sample."""
    result = run(rounded, data, baseline=str(tiny_dir), batch_size=1)
    full, own = load(str(tiny_dir)), load(str(rounded))
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    for sample, row in zip(mix.samples, result["samples"], strict=True):
        batch = encode_batch(full, [sample])
        with plain_generation(full), plain_generation(own):
            whole = full_answers(full, batch, 4)
            [answer] = schedule_answers(own, "K", SCHEDULE, batch, whole, 4)
        assert row["full"] == whole.answers[0].text
        assert row["pruned"]["exported"]["answer"] == answer.text
        np.testing.assert_allclose(row["pruned"]["exported"]["kl"], answer.kl, rtol=1e-6)
    alone = run(rounded, data, batch_size=1)
    assert result["schedules"]["exported"]["kl_answer"] != alone["schedules"]["exported"]["kl_answer"]
    assert (result["model"]["baseline"], alone["model"]["baseline"]) == (str(tiny_dir), str(rounded))
    never = run(rounded, data, [("never", Schedule.withdraw_at(6))], baseline=str(tiny_dir))
    assert 1e-9 < never["schedules"]["never"]["kl_answer"] < 1e-2  # what rounding alone does
    same = run(tiny_dir, data, [("K=3", SCHEDULE)], baseline=str(tiny_dir))
    assert numbers(same, "K=3") == numbers(run(tiny_dir, data, [("K=3", SCHEDULE)]), "K=3")


def test_baselines_that_cannot_be_compared(exported, tiny_dir, data, tmp_path):
    with pytest.raises(UsageError, match="different tokens"):
        other = tmp_path / "other"
        shutil.copytree(tiny_dir, other)
        template = (other / "chat_template.jinja").read_text()
        (other / "chat_template.jinja").write_text(template.replace("USER: ", "ME: "))
        run(exported, data, baseline=str(other))
    with pytest.raises(NotFoundError, match="there is no directory"):
        run(exported, data, baseline=str(tmp_path / "absent"))


def test_calibration_in_the_directory_is_left_out(tiny_dir, data, tmp_path):
    model, specs = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data), limit=1)]
    calibration = calibrate(model, specs, CalibrateSection(max_new_tokens=4, bootstrap=0, eta=1e3))
    export_hf(str(tiny_dir), SCHEDULE, tmp_path / "pruned", calibration=calibration)
    result = run(tmp_path / "pruned", data)
    used = {sample["id"] for sample in calibration["samples"]}
    assert len(used) == 2
    assert result["left_out"] == 2
    assert len(result["samples"]) == 4
    assert used.isdisjoint(row["id"] for row in result["samples"])
    assert (
        len(run(tmp_path / "pruned", data, [("K=3", SCHEDULE)])["samples"]) == 6
    )  # not that calibration's schedule


def test_calibrating_an_export_calibrates_the_full_model(exported, tiny_dir, data):
    def curve(name, trust=False):
        section = ModelSection(name=str(name), trust_remote_code=trust)
        return calibrate(
            section, [DataSpec(source=str(data))], CalibrateSection(limit=1, max_new_tokens=3, bootstrap=0)
        )["kl"]

    assert curve(exported) == curve(exported, trust=True) == curve(tiny_dir)


def test_analyzing_an_export_analyzes_the_full_model(exported, tiny_dir, data):
    def measures(name, trust):
        section, specs = (
            ModelSection(name=str(name), trust_remote_code=trust),
            [DataSpec(source=str(data), limit=1)],
        )
        return analyze(section, specs, AnalyzeSection(max_new_tokens=2, lens=0, maps=0, freeze=False)).result[
            "measures"
        ]

    assert measures(exported, True) == measures(tiny_dir, False)


def test_exports_of_the_demo_model_are_asked_demo_questions(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "vtw-hf", "model": {"name": "demo"}}))
    assert [spec.source for spec in default_data(str(tmp_path))] == ["demo"]
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "vtw-hf", "model": {"name": "llava"}}))
    assert "demo" not in [spec.source for spec in default_data(str(tmp_path))]


# ------------------------------------------------------------------ ONNX graphs


def test_graphs_equal_the_model_under_their_schedule(exports, data):
    graphs, base = exports("split")[0], exports.model("split")
    mine = run(graphs, data, baseline=str(base), timing=True, repeats=1, timing_tokens=1)
    wanted = run(base, data, [("K=1", Schedule.withdraw_at(1))])
    assert (mine["model"]["backend"], mine["model"]["baseline"]) == ("onnx", str(base))
    assert wanted["schedules"]["K=1"]["kl_answer"] > 1e-4
    for a, b in zip(mine["samples"], wanted["samples"], strict=True):
        assert (a["id"], a["full"]) == (b["id"], b["full"])
        said, expected = a["pruned"]["exported"], b["pruned"]["K=1"]
        assert said["answer"] == expected["answer"]
        torch.testing.assert_close(
            torch.tensor(said["kl"]), torch.tensor(expected["kl"]), rtol=1e-2, atol=1e-5
        )
    for task in ("colour", "caption"):
        assert mine["tasks"][task]["schedules"]["exported"] == wanted["tasks"][task]["schedules"]["K=1"]
    cost = mine["schedules"]["exported"]["cost"]
    assert (
        cost == wanted["schedules"]["K=1"]["cost"]
    )  # bytes of the cache too, read off ONNX Runtime's tensors
    assert cost["kv_bytes"]["measured"] == cost["kv_bytes"]["computed"] < cost["kv_bytes"]["full_measured"]
    assert mine["run"]["latency"]["exported"]["ttft"]["median"] > 0
    said = f"full is {base}; it is compared with {graphs}, ONNX graphs; torch runs the full model."
    assert said in sentences(mine)


@needs_openvino
def test_graphs_in_openvino_give_the_numbers_of_onnx_runtime(exports, data, monkeypatch):
    graphs, base = exports("split")[0], exports.model("split")
    timed = {"timing": True, "repeats": 1, "timing_tokens": 2}
    mine = run(graphs, data, baseline=str(base), backend="openvino", **timed)
    wanted = run(graphs, data, baseline=str(base), backend="onnx")
    assert (mine["model"]["backend"], wanted["model"]["backend"]) == ("openvino", "onnx")
    assert mine["versions"] == wanted["versions"] | {"openvino": metadata.version("openvino")}
    assert mine["tasks"] == wanted["tasks"]
    assert mine["schedules"]["exported"]["cost"] == wanted["schedules"]["exported"]["cost"]
    for a, b in zip(mine["samples"], wanted["samples"], strict=True):
        said, expected = a["pruned"]["exported"], b["pruned"]["exported"]
        assert said["answer"] == expected["answer"]
        torch.testing.assert_close(
            torch.tensor(said["kl"]), torch.tensor(expected["kl"]), rtol=1e-2, atol=1e-5
        )
    assert mine["run"]["latency"]["exported"]["ttft"]["median"] > 0
    assert f"compared with {graphs}, ONNX graphs in OpenVINO; torch" in " ".join(sentences(mine))
    assert any(line.startswith("OpenVINO's times stand beside torch's") for line in sentences(mine))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match="OpenVINO is not installed; install it with: pip install openvino"):
        run(graphs, data, baseline=str(base), backend="openvino")


def test_half_precision_graphs_hold_half_the_cache(exports, data):
    result = run(exports("full half")[0], data, baseline=str(exports.model("full half")))
    cost = result["schedules"]["exported"]["cost"]
    assert (
        cost["kv_bytes"]["measured"] == cost["kv_bytes"]["computed"] == cost["kv_bytes"]["full_measured"] / 2
    )
    assert cost["kv_ratio"] == 1
    assert result["model"]["dtype"] == "float16"


def test_what_graphs_cannot_do(exports, exported, data):
    graphs = exports("split")[0]
    with pytest.raises(UsageError, match="not here to compare with"):
        run(graphs, data)  # its manifest names a directory that nobody knows
    with pytest.raises(UsageError, match="run the schedule they were exported with"):
        run(graphs, data, [("K=3", SCHEDULE)])
    with pytest.raises(UsageError, match="which torch does not run"):
        run(graphs, data, backend="torch")
    with pytest.raises(UsageError, match="is not a directory of ONNX graphs"):
        run(exported, data, backend="onnx")
    with pytest.raises(UsageError, match="is not a directory of ONNX graphs"):
        run(exported, data, backend="openvino")


def test_a_plain_model_needs_a_schedule(tiny_dir, data):
    with pytest.raises(UsageError, match="nothing to compare with the full model"):
        run(tiny_dir, data)
