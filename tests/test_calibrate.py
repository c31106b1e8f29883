"""Calibration end to end on a tiny model with real files: values against the slow reference, and every way to run."""

import json
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from tests import reference
from tests.cli import launch
from vtwcli.calibrate import calibrate
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError
from vtwcli.models.generation import generate_answers
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import CalibrateSection, ModelSection
from vtwcli.schedule.schedule import Schedule


def options(**given):
    return CalibrateSection(**{"limit": 3, "max_new_tokens": 4, "bootstrap": 50, "eta": 0.05, **given})


def run(model, data, **given):
    return calibrate(ModelSection(name=str(model)), [DataSpec(source=str(data))], options(**given))


def without_run(result):
    return {key: value for key, value in result.items() if key != "run"}


@pytest.fixture(scope="module")
def result(tiny_dir, data):
    return run(tiny_dir, data)


@pytest.mark.parametrize("positions", ["first", "answer"])
def test_curve_is_that_of_the_slow_reference(tiny_dir, data, positions):
    found = run(tiny_dir, data, positions=positions)
    loaded = load(str(tiny_dir))
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    model = loaded.model
    for s, sample in enumerate(mix.samples):
        [(_, ids)] = generate_answers(loaded, [sample], 4)
        one = encode(loaded, sample, ids if positions == "answer" else None)
        batch = {**one.inputs}
        rows = slice(
            one.prompt_length - 1, one.prompt_length - 1 + (len(ids) if positions == "answer" else 1)
        )
        visual = reference.visual_mask(model, batch["input_ids"])
        depth = found["num_layers"]

        def log_probs(k, batch=batch, visual=visual, rows=rows):
            hidden = reference.withdrawal(model, visual, k)
            return reference.logits(model, batch, hidden)[0, rows].double().log_softmax(-1)

        full = log_probs(depth)
        for k in range(depth):
            pruned = log_probs(k)
            expected = (pruned.exp() * (pruned - full)).sum(-1)
            torch.testing.assert_close(
                torch.tensor(found["kl"]["positions"][s][k]), expected.float(), rtol=1e-3, atol=1e-6
            )
            agree = (pruned.argmax(-1) == full.argmax(-1)).double().mean().item()
            assert found["agreement"]["samples"][s][k] == pytest.approx(agree)


def test_means_are_the_means(result):
    samples = np.array(result["kl"]["samples"])
    np.testing.assert_allclose([[np.mean(p) for p in row] for row in result["kl"]["positions"]], samples)
    np.testing.assert_allclose(result["kl"]["mean"], samples.mean(axis=0))
    tasks = np.array([sample["task"] for sample in result["samples"]])
    for task, row in result["tasks"].items():
        np.testing.assert_allclose(row["kl"], samples[tasks == task].mean(axis=0))
        assert row["samples"] == 3


def test_document_describes_itself(result, tiny_dir):
    assert result["format"] == "vtw-calibration"
    assert result["model"]["name"] == str(tiny_dir)
    assert result["model"]["family"] == "llava"
    assert result["num_layers"] == 6
    assert result["min_layer"] == 1
    assert {sample["visual"] for sample in result["samples"]} == {9}
    assert result["data"][0]["fingerprint"]
    assert result["versions"]["torch"] == version("torch")
    assert set(result["policies"]) == {"paper", "sustained", "quantile", "agreement", "worst-task", "budget"}
    json.dumps(result)


def test_schedule_and_cost_belong_to_k(tiny_dir, data):
    found = run(tiny_dir, data, policy="budget", budget=0.8)
    k = found["withdrawal_layer"]
    schedule = Schedule.from_dict(found["schedule"])
    assert schedule.actions == Schedule.withdraw_at(k).actions
    assert schedule.provenance["policy"] == "budget"
    assert found["cost"]["flops_ratio"]["flops"] <= 0.8
    text, visual = found["cost"]["text_tokens"], found["cost"]["visual_tokens"]
    assert found["cost"]["kv_ratio"] == pytest.approx((6 * text + k * visual) / (6 * (text + visual)))


def test_same_seed_same_document(tiny_dir, data, result):
    assert without_run(run(tiny_dir, data)) == without_run(result)


def test_streamed_layers_give_the_same_curve(tiny_dir, data):
    whole = calibrate(
        ModelSection(name=str(tiny_dir), stream=False),
        [DataSpec(source=str(data))],
        options(answers="reference"),
    )
    streamed = calibrate(
        ModelSection(name=str(tiny_dir), stream=True),
        [DataSpec(source=str(data))],
        options(answers="reference"),
    )
    assert streamed["run"]["streamed"]
    assert not whole["run"]["streamed"]
    np.testing.assert_allclose(streamed["kl"]["samples"], whole["kl"]["samples"], rtol=1e-4, atol=1e-9)


def test_sample_without_an_image_does_not_count(tiny_dir, data, tmp_path, capsys):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["image"] = str(data.parent / row["image"])
    rows.append({"image": [], "question": "no image?", "answer": "no", "task": "colour"})
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, rows)))
    found = run(tiny_dir, mixed, limit=4)
    blind = [i for i, sample in enumerate(found["samples"]) if sample["visual"] == 0]
    assert len(blind) == 1
    assert not np.any(found["kl"]["samples"][blind[0]])
    seeing = [row for i, row in enumerate(found["kl"]["samples"]) if i != blind[0]]
    np.testing.assert_allclose(found["kl"]["mean"], np.mean(seeing, axis=0))
    assert "1 samples have no visual token" in capsys.readouterr().err


def test_nothing_but_text_is_an_error(tiny_dir, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"image": [], "question": "why?", "answer": "so"}))
    with pytest.raises(NotFoundError, match="no sample has a visual token"):
        run(tiny_dir, file)


def test_resume_recomputes_only_what_is_missing(tiny_dir, data, result, tmp_path, monkeypatch):
    import vtwcli.calibrate as module

    state = tmp_path / "k.partial.jsonl"
    arguments = (ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options())
    real, calls = module.sweep, []

    def interrupted(*given, **kwargs):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*given, **kwargs)

    monkeypatch.setattr(module, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*arguments, state=state)
    kept = list(tmp_path.iterdir())
    assert len(kept) == 1
    with kept[0].open("a") as stream:
        stream.write('{"place": 5, "kl": [[0.')  # torn by the interruption

    def counting(*given, **kwargs):
        calls.append(1)
        return real(*given, **kwargs)

    calls.clear()
    monkeypatch.setattr(module, "sweep", counting)
    assert without_run(calibrate(*arguments, state=state)) == without_run(result)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def arguments(tiny_dir, data):
    return [
        "calibrate", str(tiny_dir), "--data", str(data), "--limit", "3", "--max-new-tokens", "4",
        "--bootstrap", "50", "--eta", "0.05", "--policy", "budget", "--budget", "0.95",
    ]  # fmt: skip


def test_two_processes_give_the_file_of_one(tiny_dir, data, tmp_path):
    ended = launch(tmp_path, *arguments(tiny_dir, data), "--output", "two.json")
    assert [process.returncode for process, _, _ in ended] == [0, 0], ended
    assert "K = " in ended[0][1]
    assert ended[1][1] == ""
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["run"]["processes"] == 2
    one = run(tiny_dir, data, policy="budget", budget=0.95)
    assert json.dumps(without_run(two)) == json.dumps(without_run(one))


@pytest.mark.parametrize(
    ("death", "message"), [("raise RuntimeError('out of memory')", "process 1 failed: out of memory"),
                           ("os._exit(9)", "another process of this run died")]
)  # fmt: skip
def test_a_rank_that_dies_ends_the_run_with_a_word(tiny_dir, data, tmp_path, death, message):
    code = (
        "import os, sys\n"
        "import vtwcli.calibrate as module\n"
        "def measure(*args):\n"
        "    if os.environ['RANK'] == '1':\n"
        f"        {death}\n"
        "    yield from real(*args)\n"
        "real, module.measure = module.measure, measure\n"
        "from vtwcli.cli import main\n"
        "main()\n"
    )
    ended = launch(tmp_path, *arguments(tiny_dir, data), "--output", "two.json", code=code)
    assert ended[0][0].returncode == 1
    assert message in ended[0][2]
    assert "Traceback" not in ended[0][2]
    assert not (tmp_path / "two.json").exists()


def test_interruption_is_exit_130_and_leaves_nothing(tiny_dir, data, tmp_path):
    code = (
        "import vtwcli.calibrate as module\n"
        "def measure(*args):\n"
        "    raise KeyboardInterrupt\n"
        "    yield\n"
        "module.measure = measure\n"
        "from vtwcli.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(tiny_dir, data), "--output", "k.json"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "copies"), [(1, 1), (1, 12), (5, 3), (6, 1), (6, 2)])
def test_few_distinct_samples_give_no_interval_and_a_warning(tiny_dir, data, tmp_path, capsys, count, copies):
    rows = [json.loads(line) | {"task": "one"} for line in data.read_text().splitlines()][:count]
    rows = [row | {"image": str(data.parent / row["image"])} for row in rows]
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, rows * copies)))
    found = run(tiny_dir, file, limit=20, positions="first", eta=1e3)
    told = capsys.readouterr().err
    assert len(found["samples"]) == count and found["tasks"]["one"]["samples"] == count
    assert (found["interval"] is None) == (count < 6)
    words = "1 sample leaves K uncertain" if count == 1 else f"{count} samples leave K uncertain"
    assert (f"{words}: too few distinct samples for a 95 % interval (one: {count}); it takes 6" in told) == (
        count < 6
    )
    again = count * (copies - 1)
    assert found["data"][0]["duplicates"] == again
    assert (f"{again} rows equal others in image, question, answer and task" in told) == bool(again)


def test_the_worst_task_needs_enough_samples_of_each(tiny_dir, data, tmp_path, capsys):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [row | {"image": str(data.parent / row["image"]), "task": "many"} for row in rows]
    file = tmp_path / "uneven.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"task": "few"}])))
    found = run(tiny_dir, file, limit=20, positions="first", eta=1e3, policy="sustained")
    assert found["interval"] is not None
    capsys.readouterr()
    found = run(tiny_dir, file, limit=20, positions="first", eta=1e3, policy="worst-task")
    assert found["interval"] is None and found["withdrawal_layer"] is not None
    told = capsys.readouterr().err
    assert "samples for a 95 % interval (many: 6, few: 1); it takes 6 of each task" in told
