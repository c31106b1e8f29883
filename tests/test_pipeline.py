"""``vtw run`` on a tiny model: what runs, what is kept, what stops it, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.cli import vtw
from vtwcli.budget import budget
from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.errors import VtwError
from vtwcli.evaluate import evaluate
from vtwcli.export.directory.manifest import check_files, read_manifest
from vtwcli.export.hf.export import export_hf
from vtwcli.pipeline import plan as pipeline
from vtwcli.pipeline.run import resolved
from vtwcli.recipe.recipe import BudgetSection, CalibrateSection, EvalSection, ModelSection, Recipe
from vtwcli.recipe.settings import load_recipe
from vtwcli.schedule.schedule import Schedule

CALIBRATE = {"limit": 2, "max_new_tokens": 3, "bootstrap": 0, "eta": 1000}
EVAL = {"limit": 2, "max_new_tokens": 3, "bootstrap": 0, "timing": False}
RECIPE = """\
model: model
data: [rows.jsonl]
calibrate: {limit: 2, max_new_tokens: 3, bootstrap: 0, eta: 1000}
eval: {limit: 1, max_new_tokens: 3, bootstrap: 0, timing: false}  # the other sample of each task
export:
"""
STEPS = ("calibrate", "eval", "export")


@pytest.fixture(scope="module")
def finished(tiny_dir, data, tmp_path_factory):
    """A directory with model, data, recipe and the results of one run; read-only."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_dir, folder / "model")
    shutil.copytree(data.parent, folder, dirs_exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    done = vtw("run", folder / "recipe.yaml", "--output", folder / "out", "--json")
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of the finished run to change, as the working directory."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args):
    return vtw("run", "recipe.yaml", "--output", "out", *args)


def planned(*args):
    """Step -> its line in the plan."""
    done = run("--dry-run", *args)
    assert done.code == 0, done.err
    lines = [line.split(maxsplit=1) for line in done.out.splitlines()[1:]]
    return {name: words for name, words in lines}  # noqa: C416  (a list of two-item lists)


def runs(*args):
    return [name for name, words in planned(*args).items() if words.startswith("will run")]


def test_results_are_those_of_the_single_commands(finished):
    folder, _ = finished
    model = ModelSection(name=str(folder / "model"))
    mix = [DataSpec(source=str(folder / "rows.jsonl"))]
    expected = calibrate(model, mix, CalibrateSection(**CALIBRATE))
    found = json.loads((folder / "out/calibration.json").read_text())
    assert {**found, "run": None} == {**expected, "run": None}
    schedule = Schedule.from_dict(expected["schedule"])
    name = f"K={expected['withdrawal_layer']}"
    judged, _ = evaluate(
        model, [(name, schedule)], mix, EvalSection(**{**EVAL, "limit": 1}), calibration=expected
    )
    found = json.loads((folder / "out/evaluation.json").read_text())
    assert {**found, "run": None} == {**json.loads(json.dumps(judged)), "run": None}
    assert found["left_out"] == 0 or not {row["id"] for row in found["samples"]} & {
        row["id"] for row in expected["samples"]
    }


def test_output_directory(finished):
    folder, _ = finished
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml", "run.json", "summary.md", "model",
        "calibration.json", "calibration.schedule.yaml", "calibration.png",
        "evaluation.json", "evaluation.md", "evaluation.html", "evaluation.png",
    }  # fmt: skip
    manifest = read_manifest(out / "model")
    assert check_files(out / "model", manifest) == {"edited": [], "unlisted": []}
    assert Schedule.from_dict(manifest["schedule"]) == Schedule.from_file(out / "calibration.schedule.yaml")
    assert (out / "model/recipe.yaml").read_text() == RECIPE
    assert "# model\n" in (out / "model/README.md").read_text()


def test_document_is_run_json_and_says_what_was_done(finished):
    folder, done = finished
    document = json.loads(done.out)
    assert document == json.loads((folder / "out/run.json").read_text())
    assert (document["passed"], document["failure"], document["started"]) == (True, None, [])
    assert list(document["steps"]) == list(STEPS)
    assert document["steps"]["export"]["result"]["max_logit_difference"] < 1e-3
    for step in STEPS:
        for file, digest in document["steps"][step]["files"].items():
            assert pipeline.file_digest(folder / "out" / file) == digest


def test_a_log_has_one_line_a_step_and_no_bars(finished):
    _, done = finished
    lines = [line for line in done.err.splitlines() if line.startswith("[")]
    assert [line.split(":")[0] for line in lines] == ["[1/3] calibrate", "[2/3] eval", "[3/3] export"]
    assert "\x1b" not in done.err and "\r" not in done.err


def test_nothing_changed_nothing_runs(folder, monkeypatch):
    for step in pipeline.STEPS.values():
        monkeypatch.setattr(step, "run", None)  # a step that ran would fail
    done = run()
    assert done.code == 0, done.err
    assert [line.split()[:2] for line in done.out.splitlines()[:3]] == [[step, "kept"] for step in STEPS]
    monkeypatch.chdir(folder.parent)  # paths are the recipe's, wherever the command is called
    done = vtw("run", folder / "recipe.yaml", "-o", folder / "out")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--set", "calibrate.eta=999"], ["calibrate", "eval", "export"]),
        (["--set", "eval.batch_size=1"], ["eval", "export"]),
        (["--set", "export.dtype=bfloat16"], ["export"]),
        (["--set", "model.attn=eager"], ["calibrate", "eval", "export"]),
        (["--set", "gates.max_kl=5"], []),
        (["--set", "schedule.layer=3"], ["eval", "export"]),
        (["--from", "eval"], ["eval", "export"]),
        (["--only", "export"], ["export"]),
        (["--force"], ["calibrate", "eval", "export"]),
        ([], []),
    ],
)
def test_a_step_runs_when_what_it_depends_on_changed(folder, change, expected):
    assert runs(*change) == expected


def test_changed_files_are_noticed(folder):
    config = folder / "model/generation_config.json"
    text = config.read_text()
    config.write_text(text.replace("}", ' ,"top_k": 3}'))
    assert planned()["calibrate"].startswith("will run  changed: model; ")
    config.write_text(text)
    weights = folder / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert runs() == list(STEPS)
    content[-1] ^= 1
    weights.write_bytes(content)
    assert runs() == []
    for path in folder.glob("*.png"):  # the table of rows stays as it is
        Image.new("RGB", (12, 12), "red").save(path)
    assert planned()["calibrate"].startswith("will run  changed: data; ")


def test_large_weight_files_are_sampled(folder, monkeypatch):
    from vtwcli.models.hub import resolve
    from vtwcli.pipeline import fingerprint

    model = ModelSection(name="model")
    monkeypatch.setattr(fingerprint, "_WHOLE", 100_000)
    weights = folder / "model/model.safetensors"
    assert weights.stat().st_size > 100_000
    before = fingerprint.model_record(model)["fingerprint"]
    content = bytearray(weights.read_bytes())
    for tensor in resolve("model").tensors.values():
        for place in (tensor.start, tensor.start + tensor.nbytes - 1):
            content[place] ^= 1
            weights.write_bytes(content)
            assert fingerprint.model_record(model)["fingerprint"] != before, tensor.key
            content[place] ^= 1
    weights.write_bytes(content)
    assert fingerprint.model_record(model)["fingerprint"] == before


def test_a_missing_file_is_made_again(folder):
    (folder / "out/evaluation.md").unlink()
    assert planned()["eval"].startswith("will run  evaluation.md is missing; ")
    done = run()
    assert done.code == 0, done.err
    assert (folder / "out/evaluation.md").exists()
    assert runs() == []


def test_what_people_changed_or_made_is_not_replaced_unasked(folder):
    path = folder / "out/calibration.schedule.yaml"
    path.write_text("actions: []")
    done = run()
    assert (done.code, path.read_text()) == (2, "actions: []")
    assert "out/calibration.schedule.yaml was changed since vtw run wrote it" in done.err
    assert "--force" in done.err
    (folder / "other").mkdir()
    (folder / "other/evaluation.png").write_text("precious")
    done = vtw("run", "recipe.yaml", "--output", "other")
    assert done.code == 2
    assert "other/evaluation.png exists already" in done.err
    assert [path.name for path in (folder / "other").iterdir()] == ["evaluation.png"]


def test_a_failed_gate_stops_before_the_export(folder):
    shutil.rmtree(folder / "out")
    done = run("--set", "gates.max_kl=1e-9", "--set", "gates.max_drop=1")
    assert done.code == 3
    assert "gate max_kl FAILED: K=1: mean KL" in done.err
    assert "[3/3] export: not run" in done.err
    assert not (folder / "out/model").exists()
    assert json.loads((folder / "out/evaluation.json").read_text())["schedules"]
    document = json.loads((folder / "out/run.json").read_text())
    assert document["passed"] is False
    assert [(gate["gate"], gate["passed"]) for gate in document["gates"]] == [
        ("max_drop", True),
        ("max_kl", False),
    ]
    summary = (folder / "out/summary.md").read_text()
    assert summary.startswith("## model: FAILED\n")
    assert "| export | not run | - |" in summary
    assert "- gate max_drop passed" in summary
    done = run()  # without the gate the rest is done, and only that
    assert done.code == 0, done.err
    assert [line.split()[1] for line in done.out.splitlines()[:2]] == ["kept", "kept"]
    assert (folder / "out/model/manifest.json").exists()
    done = run("--set", "gates.max_kl=1e-9")
    assert done.code == 3
    assert "out/model is of an earlier run" in done.err


def test_no_layer_qualifies_is_exit_3_and_ends_the_run(folder):
    done = run("--set", "calibrate.eta=1e-12", "--set", "calibrate.min_layer=1")
    assert done.code == 3
    assert "No layer qualifies" in done.err
    assert json.loads((folder / "out/calibration.json").read_text())["withdrawal_layer"] is None
    assert not (folder / "out/calibration.schedule.yaml").exists()  # that of the run before would mislead
    done = run("--set", "calibrate.eta=1e-12", "--set", "calibrate.min_layer=1")
    assert done.code == 3
    assert done.out.startswith("calibrate     kept  No layer qualifies")


def test_an_export_that_fails_is_not_published(folder, monkeypatch):
    from vtwcli.errors import GateError
    from vtwcli.export import formats

    def fails(directory, **options):
        assert directory.name == "model" and (directory / "manifest.json").exists()
        raise GateError("tokens differ")

    before = (folder / "out/model/manifest.json").read_text()
    monkeypatch.setattr(formats, "verify", fails)
    done = run("--from", "export")
    assert done.code == 3
    assert "error: tokens differ" in done.err
    assert (folder / "out/model/manifest.json").read_text() == before
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]
    assert "Stopped: export: tokens differ." in (folder / "out/summary.md").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert runs() == ["export"]


def test_an_interrupted_run_continues(folder, monkeypatch):
    shutil.rmtree(folder / "out")
    real = pipeline.STEPS["eval"].run

    def interrupted(run):
        real(run)  # its files are there, its record is not
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.STEPS["eval"], "run", interrupted)
        patched.setattr(pipeline.STEPS["export"], "run", None)
        with pytest.raises(KeyboardInterrupt):
            recipe = load_recipe(folder / "recipe.yaml")
            pipeline.execute(pipeline.make_plan(recipe, folder / "out"))
    document = json.loads((folder / "out/run.json").read_text())
    assert (document["passed"], document["failure"]) == (False, "eval: interrupted")
    assert runs() == ["eval", "export"]
    done = run()
    assert done.code == 0, done.err
    assert runs() == []


def test_a_crash_is_told_in_the_summary(folder, monkeypatch):
    monkeypatch.setattr(pipeline.STEPS["export"], "run", None)  # not even a function
    done = run("--from", "export")
    assert done.code == 1
    assert (folder / "out/summary.md").read_text().startswith("## model: FAILED\n")
    assert "Stopped: export: TypeError." in (folder / "out/summary.md").read_text()


def test_only_needs_what_comes_before(folder):
    shutil.rmtree(folder / "out")
    done = run("--only", "eval")
    assert done.code == 2
    assert "calibrate has no valid result (no result yet)" in done.err
    done = run("--only", "calibrate")
    assert done.code == 0, done.err
    assert not (folder / "out/evaluation.json").exists()
    assert runs("--only", "eval") == ["eval"]
    done = run("--only", "evil")
    assert (done.code, "did you mean 'eval'?" in done.err) == (2, True)


def test_dry_run_writes_nothing(folder):
    shutil.rmtree(folder / "out")
    assert json.loads(run("--dry-run", "--json").out)["passed"] is None
    done = run("--dry-run")
    assert done.code == 0
    first, *lines = done.out.splitlines()
    assert first.startswith("model ") and "rows.jsonl; results in out" in first
    assert lines[0].split(";")[0] == "  calibrate will run  no result yet"
    assert not (folder / "out").exists()


def test_summary_is_appended_to_a_file_of_choice(folder):
    (folder / "page.md").write_text("before\n")
    assert run("--summary", "page.md").code == 0
    text = (folder / "page.md").read_text()
    assert text.startswith("before\n## ")
    assert (folder / "out/summary.md").read_text() == text.removeprefix("before\n")
    assert "| calibrate | K = 1 of 6 layers" in text
    assert text.count("full against pruned") == 1


def test_an_export_of_the_demo_model_takes_the_demo_data(tmp_path):
    export_hf("demo", Schedule.withdraw_at(9), tmp_path / "model")
    recipe = Recipe(model=str(tmp_path / "model"), analyze={"limit": 1})
    [step] = pipeline.make_plan(recipe, tmp_path / "out").steps  # the public tasks cannot be reached here
    assert step.runs and step.inputs["data"]


def test_resolved_recipe_runs_again_from_where_it_is(folder, monkeypatch):
    recipe = load_recipe(folder / "out/recipe.yaml")
    assert recipe.calibrate == load_recipe(folder / "recipe.yaml").calibrate
    assert recipe.calibrate.policy == "worst-task"
    assert pipeline.steps_of(recipe) == list(STEPS)
    done = vtw("run", "out/recipe.yaml", "--dry-run")
    assert done.out.count(" kept ") == 3, done.out


def test_every_path_is_seen_from_where_the_results_are(folder, monkeypatch):
    for name in ("baseline", "pope-copy"):
        (folder / name).mkdir()
    (folder / "k.yaml").write_text(Schedule.withdraw_at(3).to_yaml())
    (folder / "recipe.yaml").write_text(
        "model: model\ndata: [{source: pope, path: pope-copy}, rows.jsonl]\nschedule: {file: k.yaml}\n"
        "eval: {baseline: baseline}\n"
    )
    here = resolved(load_recipe(Path("recipe.yaml")), Path("new"))
    assert here["model"]["name"] == "../model"
    assert here["data"] == [{"source": "pope", "path": "../pope-copy"}, {"source": "../rows.jsonl"}]
    assert here["schedule"]["file"] == "../k.yaml"
    assert here["eval"]["baseline"] == "../baseline"
    monkeypatch.chdir(folder.parent)
    assert resolved(load_recipe(folder / "recipe.yaml"), folder / "new") == here


def test_another_baseline_evaluates_again(folder):
    shutil.copytree(folder / "model", folder / "baseline")
    baseline = ("--set", "eval.baseline=baseline")
    assert run(*baseline).code == 0
    assert runs(*baseline) == []
    config = folder / "baseline/config.json"
    config.write_text(config.read_text() + " ")
    assert runs(*baseline) == ["eval", "export"]


def test_a_broken_run_file_is_told_and_replaced_on_request(folder):
    (folder / "out/run.json").write_text('{"format": "vtw-run"')
    done = run()
    assert done.code == 2
    assert "out/run.json:1:" in done.err
    assert run("--force", "--dry-run").code == 2  # whatever this is, it may be somebody's
    (folder / "out/run.json").write_text('{"format": "vtw-run", "format_version": 9}')
    assert "out/run.json:1:23: format_version: input should be 1, got 9" in run().err
    assert runs("--force") == list(STEPS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: model",
            "the recipe has no step to run\n  add a section, it may be empty: calibrate, analyze",
        ),
        ("model: model\nexport:", "export: there is no schedule for it\n  add the section calibrate"),
        ("model: model\ncalibrate:\ngates: {max_kl: 1}", "gates: there is nothing that they judge"),
        (
            "calibrate:\nexport: {quantize: int8}",
            "recipe.yaml:2:1: export: quantize goes with format onnx or transformers.js only",
        ),
        ("schedule: {file: none.yaml}\nexport:", "none.yaml: cannot read the schedule"),
    ],
)
def test_recipes_that_cannot_run(folder, text, message):
    (folder / "recipe.yaml").write_text(text)
    done = run()
    assert done.code == 2
    assert message in done.err


def test_the_model_itself_is_safe(folder):
    done = vtw("run", "recipe.yaml", "--output", ".", "--force")
    assert done.code == 2
    assert "model holds the model itself" in done.err


def test_a_step_that_fails_keeps_those_before_it(folder, monkeypatch):
    shutil.rmtree(folder / "out")

    def fails(run):
        raise VtwError("no room")

    monkeypatch.setattr(pipeline.STEPS["eval"], "run", fails)
    done = run()
    assert (done.code, "error: no room" in done.err) == (1, True)
    document = json.loads((folder / "out/run.json").read_text())
    assert (document["failure"], document["started"]) == ("eval: no room", ["eval"])
    assert "| eval | failed | - |" in (folder / "out/summary.md").read_text()
    assert runs() == ["eval", "export"]


@pytest.mark.parametrize("shared", [True, False])
def test_calibrate_and_analyze_share_a_sweep_where_they_can(shared, folder, monkeypatch):
    from vtwcli import analyze, calibrate

    expected = json.loads((folder / "out/calibration.json").read_text())
    counted = []

    def counting(name, real):
        return lambda *given, **more: counted.append(name) or real(*given, **more)

    monkeypatch.setattr(analyze, "analyze", counting("analyze", analyze.analyze))
    monkeypatch.setattr(calibrate, "calibrate", counting("calibrate", calibrate.calibrate))
    text = (
        RECIPE.partition("eval:")[0]
        + f"analyze: {{limit: {2 if shared else 1}, max_new_tokens: 3, maps: 0}}\n"
    )
    (folder / "recipe.yaml").write_text(text)
    done = vtw("run", "recipe.yaml", "--output", "both")
    assert done.code == 0, done.err
    assert counted == (["analyze"] if shared else ["calibrate", "analyze"])
    found = json.loads((folder / "both/calibration.json").read_text())
    assert found["kl"]["mean"] == pytest.approx(expected["kl"]["mean"], rel=1e-5)
    assert found["schedule"]["actions"] == expected["schedule"]["actions"]
    names = {path.name for path in (folder / "both").iterdir()}
    assert {"analysis.json", "analysis.html", "analysis.kl.png", "calibration.schedule.yaml"} <= names
    assert vtw("run", "recipe.yaml", "--output", "both", "--dry-run").out.count(" kept ") == 2


# --- comparing methods ---------------------------------------------------------------------------------------

COMPARED = {"limit": 1, "max_new_tokens": 2, "methods": ("vtw", "uniform"), "ratios": (0.5,)}
BUDGET = RECIPE.replace(
    "export:",
    "budget: {limit: 1, max_new_tokens: 2, methods: [vtw, uniform], ratios: [0.5], max_flops: 1}\nexport:",
)


@pytest.fixture(scope="module")
def compared(finished, tmp_path_factory):
    """The finished run gone on with after its recipe was given a comparison; read-only."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    (folder / "recipe.yaml").write_text(BUDGET)
    plan = vtw("run", folder / "recipe.yaml", "--output", folder / "out", "--dry-run")
    assert not (folder / "out/budget.json").exists()
    done = vtw("run", folder / "recipe.yaml", "--output", folder / "out")
    assert (plan.code, done.code) == (0, 0), done.err
    return folder, plan, done


@pytest.fixture
def comparing(compared, tmp_path, monkeypatch):
    """A copy of it to change, as the working directory."""
    shutil.copytree(compared[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_comparison_is_a_step(compared):
    """It stands behind the calibration; what is there already stays valid, and files are those of the command."""
    folder, plan, done = compared
    lines = plan.out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["calibrate", "budget", "eval", "export"]
    assert [line.split()[1] for line in lines] == ["kept", "will", "kept", "kept"]
    assert lines[1].split(maxsplit=3)[3] == (
        'no result yet; limit 1, max_flops 1.0, methods ["vtw", "uniform"], ratios [0.5], max_new_tokens 2'
    )
    found = json.loads((folder / "out/budget.json").read_text())
    where = ModelSection(name=str(folder / "model"))
    expected = budget(
        where, [DataSpec(source=str(folder / "rows.jsonl"))], BudgetSection(**COMPARED, max_flops=1)
    )
    assert {**found, "run": None} == {**json.loads(json.dumps(expected)), "run": None}
    best = next(row for row in found["candidates"] if row["name"] == found["best"])
    saved = Schedule.from_file(folder / "out/budget.schedule.yaml")
    assert saved.to_dict()["actions"] == best["schedule"]["actions"]
    assert (folder / "out/budget.png").exists()
    record = json.loads((folder / "out/run.json").read_text())["steps"]["budget"]
    assert set(record["files"]) == {"budget.json", "budget.schedule.yaml", "budget.png"}
    assert record["result"] == {"best": found["best"], "pareto": found["pareto"]}
    front = len(found["pareto"])
    assert (
        f"7 schedules, {front} of them on the Pareto front. Best within 100%: {best['name']}, KL" in done.out
    )
    summary = (folder / "out/summary.md").read_text()
    assert "model: methods compared\n" in summary
    assert summary.index("methods compared") < summary.index("full against pruned")
    table = summary.partition("methods compared")[2].partition("The Pareto front")[0]
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][2:] == [
        f"| {name}" for name in found["pareto"]
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([], []),
        (["--set", "budget.ratios=[0.3]"], ["budget"]),
        (["--set", "budget.max_flops=0.9"], ["budget"]),
        (["--set", "schedule.exit_layers=3"], ["budget"]),  # a method's parameter that is not varied
        (["--set", "schedule.layer=3"], ["eval", "export"]),  # which schedule is exported is another matter
        (["--set", "calibrate.eta=999"], ["calibrate", "eval", "export"]),
        (["--set", "gates.max_kl=5"], []),
        (["--only", "budget"], ["budget"]),
        (["--set", "model.attn=eager"], ["calibrate", "budget", "eval", "export"]),
    ],
)
def test_a_comparison_runs_again_when_what_it_depends_on_changed(comparing, change, expected):
    assert runs(*change) == expected


def test_a_changed_comparison_alone_is_made_again(comparing):
    before = {
        path.name: path.read_bytes() for path in (comparing / "out").glob("*.*") if path.suffix != ".json"
    }
    (comparing / "recipe.yaml").write_text(BUDGET.replace("max_flops: 1", "seed: 1"))
    done = run()
    assert done.code == 0, done.err
    assert [line.split()[1] == "kept" for line in done.out.splitlines()[:4]] == [True, False, True, True]
    assert not (comparing / "out/budget.schedule.yaml").exists()  # without a budget there is no best
    assert (comparing / "out/evaluation.md").read_bytes() == before["evaluation.md"]
    assert runs() == []
    (comparing / "out/budget.png").unlink()
    assert planned()["budget"].startswith("will run  budget.png is missing; ")


def test_a_budget_that_nothing_fits_stops_the_run_as_it_does_the_command(comparing):
    done = run("--set", "budget.max_flops=1e-6")
    assert done.code == 3
    said = "no schedule costs at most 0.0001% of the full model's prefill FLOPs"
    assert said in done.err
    assert "[3/4] eval: not run" in done.err
    assert json.loads((comparing / "out/run.json").read_text())["failure"] == said
    assert not (comparing / "out/budget.schedule.yaml").exists()
    done = vtw("budget", "--recipe", "recipe.yaml", "--set", "budget.max_flops=1e-6")
    assert (done.code, said in done.err) == (3, True)


def test_a_variable_alone_makes_no_comparison(folder, monkeypatch):
    monkeypatch.setenv("VTW_BUDGET__LIMIT", "3")
    assert list(planned()) == list(STEPS)
    monkeypatch.setenv("VTW_BUDGET__LIMIT", "0")
    done = run("--dry-run")
    assert (done.code, "budget.limit" in done.err) == (2, True)


def test_files_of_a_comparison_in_the_way(folder):
    (folder / "recipe.yaml").write_text(BUDGET)
    (folder / "out/budget.png").write_text("precious")
    done = run()
    assert (done.code, "out/budget.png exists already" in done.err) == (2, True)
    assert (folder / "out/budget.png").read_text() == "precious"


@pytest.mark.parametrize("edit", ["picture", "task", "answer"])
def test_a_changed_row_runs_the_steps_again(folder, edit):
    """The digest of the data is over what the samples say, wherever that stands."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    used = json.loads((folder / "out/calibration.json").read_text())["samples"]
    used = [rows[int(sample["id"].rpartition(":")[2])] for sample in used]
    assert runs() == []
    if edit == "picture":
        Image.new("RGB", (12, 12), (1, 200, 3)).save(folder / used[0]["image"])
    elif edit == "answer":
        used[0]["answer"] += "x"
    else:  # as many of each task as before
        other = next(row for row in used if row["task"] != used[0]["task"])
        used[0]["task"], other["task"] = other["task"], used[0]["task"]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert runs() == ["calibrate", "eval", "export"]
