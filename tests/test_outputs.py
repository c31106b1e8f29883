"""What is written replaces nothing that is not ours, appears whole, survives its rivals, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.cli import vtw
from vtwcli.errors import UsageError, VtwError
from vtwcli.export.directory.manifest import check_files, read_manifest
from vtwcli.export.directory.publish import publish
from vtwcli.export.hf.export import export_hf
from vtwcli.export.onnx import export as onnx
from vtwcli.io import console, files, staging
from vtwcli.io.outputs import Outputs, is_ours
from vtwcli.report import calibration as report_calibrate
from vtwcli.schedule.schedule import Schedule

QUICK = ("--limit", 1, "--max-new-tokens", 2, "--bootstrap", 0, "--eta", 1000)
SET = ["k.json", "k.png", "k.schedule.yaml"]


@pytest.fixture
def here(tiny_dir, data, tmp_path, monkeypatch):
    """A working directory with a model and data of its own."""
    shutil.copytree(tiny_dir, tmp_path / "model")
    shutil.copytree(data.parent, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calibrate(*args):
    return vtw("calibrate", "model", "--data", "data/rows.jsonl", *QUICK, *args)


def names(folder=None):
    return sorted(path.name for path in (folder or Path()).iterdir() if path.name not in ("model", "data"))


def content(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def name_tasks(*tasks):
    """Give the rows of the data these tasks in turn."""
    file = Path("data/rows.jsonl")
    rows = map(json.loads, file.read_text().splitlines())
    named = (row | {"task": tasks[i % len(tasks)]} for i, row in enumerate(rows))
    file.write_text("\n".join(map(json.dumps, named)))


def refused(done, *words):
    assert done.code == 2, (done.out, done.err)
    assert done.err.startswith("error: ") and done.err.count("\n") <= 2
    for word in words:
        assert word in done.err
    assert "Traceback" not in done.err


def spawn(*args, before="", **options):
    """Start the command in a process of its own, with Python code run before it."""
    code = f"import os, signal, sys\n{before}\nfrom vtwcli.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )


# --- what --force replaces -----------------------------------------------------------------------------------


def test_force_replaces_what_the_same_command_wrote(here):
    for options in ([], ["--force"]):
        done = calibrate("--output", "k.json", *options)
        assert done.code == 0, done.err
        assert names() == SET
    for name, kind in zip(SET, ("vtw-calibration", "picture", "schedule"), strict=True):
        assert is_ours(here / name, kind)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_are_known_again(tmp_path, suffix):
    from matplotlib.figure import Figure

    from vtwcli.report.plots import new_figure, save_figure

    save_figure(new_figure()[0], tmp_path / f"ours{suffix}")
    assert is_ours(tmp_path / f"ours{suffix}", "picture")
    Figure().savefig(tmp_path / f"theirs{suffix}")
    assert not is_ours(tmp_path / f"theirs{suffix}", "picture")


@pytest.mark.parametrize("name", SET)
@pytest.mark.parametrize("text", ["", "precious", '{"a": 1}', '{"format": "vtw-evaluation"}', "actions: []"])
def test_force_spares_other_files(here, name, text):
    (here / name).write_text(text)
    refused(calibrate("--output", "k.json", "--force"), name, "--force does not replace it")
    assert (here / name).read_text() == text
    assert names() == [name]


def test_evaluation_and_analysis_are_known_again(here):
    evaluation = ("eval", "model", "--layer", 3, "--data", "data/rows.jsonl", "--limit", 1, "--no-timing")
    evaluation += ("--max-new-tokens", 2, "--bootstrap", 0, "--output", "e.json", "--trace", "t.jsonl")
    analysis = ("analyze", "model", "--data", "data/rows.jsonl", "--limit", 1, "--max-new-tokens", 2)
    analysis += ("--output", "a.json", "--maps", 0)
    comparison = ("budget", "model", "--data", "data/rows.jsonl", "--limit", 1, "--max-new-tokens", 2)
    comparison += ("--methods", "vtw", "--output", "b.json", "--max-flops", 1)
    for command in (evaluation, analysis, comparison, ("recipe", "init", "--output", "r.yaml")):
        done = vtw(*command)
        assert done.code == 0, done.err
        before = names()
        refused(vtw(*command), "exists already")
        done = vtw(*command, "--force")
        assert done.code == 0, done.err
        assert names() == before
    for mine in ("e.md", "e.html", "t.jsonl", "a.html", "b.schedule.yaml", "r.yaml"):
        kept = Path(mine).read_text()
        Path(mine).write_text("mine\n")
        command = {"e": evaluation, "t": evaluation, "a": analysis, "b": comparison}.get(mine[0])
        refused(vtw(*(command or ("recipe", "init", "-o", mine)), "--force"), mine)
        assert Path(mine).read_text() == "mine\n"
        Path(mine).write_text(kept)


def test_a_schedule_of_the_old_result_goes_with_it(here):
    assert calibrate("--output", "k.json").code == 0
    done = calibrate("--output", "k.json", "--force", "--eta", 1e-12, "--min-layer", 1)
    assert done.code == 3
    assert names() == ["k.json", "k.png"]


def strangers(target, what):
    if what == "file":
        (target / "thesis.txt").write_text("years of work")
        return "thesis.txt"
    if what == "git":
        (target / ".git").mkdir()
        (target / ".git" / "HEAD").write_text("ref: refs/heads/main")
        return ".git"
    if what == "empty":
        (target / "photos").mkdir()
        return "photos"
    (target / "link.txt").symlink_to("/etc/hostname")
    return "link.txt"


@pytest.mark.parametrize("what", ["file", "git", "empty", "link"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_directory_with_anything_else_in_it_is_kept(here, what, ours):
    target = here / "out"
    if ours:
        export_hf("model", Schedule.withdraw_at(3), target)
    else:
        target.mkdir()
    name = strangers(target, what)
    before = content(target)
    refused(vtw("export", "model", "--layer", 2, "--output", "out", "--force"), name)
    assert content(target) == before and (target / name).exists()
    assert names() == ["out"]


def test_a_manifest_alone_does_not_make_a_directory_ours(here):
    target = here / "out"
    target.mkdir()
    (target / "a.txt").write_text("a")
    for text in ('{"files": {"a.txt": {}}}', '{"format": "other", "files": {"a.txt": {}}}', "[]", "{", ""):
        (target / "manifest.json").write_text(text)
        refused(vtw("export", "model", "--layer", 2, "--output", "out", "--force"), "out holds a.txt")
    (target / "manifest.json").unlink()
    (here / "m.json").write_text('{"format": "vtw-hf", "files": {"a.txt": {}}}')
    (target / "manifest.json").symlink_to(here / "m.json")
    refused(vtw("export", "model", "--layer", 2, "--output", "out", "--force"), "out holds a.txt")


def test_what_python_compiled_is_no_stranger(here):
    target = here / "out"
    export_hf("model", Schedule.withdraw_at(3), target)
    (target / "__pycache__").mkdir()
    (target / "__pycache__" / "vtw_pruning.cpython-311.pyc").write_text("")
    done = vtw("export", "model", "--layer", 2, "--output", "out", "--force")
    assert done.code == 0, done.err
    (target / "__pycache__").mkdir()
    (target / "__pycache__" / "mine.txt").write_text("")
    refused(vtw("export", "model", "--layer", 2, "--output", "out", "--force"), "__pycache__/mine.txt")


def test_an_empty_directory_is_filled_by_force(here):
    (here / "out").mkdir()
    assert vtw("export", "model", "--layer", 2, "--output", "out", "--force").code == 0
    check_files(here / "out", read_manifest(here / "out"))


# --- inputs are never outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_working_directory_and_those_above_are_never_replaced(here, force, monkeypatch):
    export_hf("model", Schedule.withdraw_at(3), here / "out")
    (here / "out" / "deep").mkdir()
    before = content(here / "out")
    for folder, target in (("out", "."), ("out/deep", ".."), ("out/deep", here / "out"), ("out", "../out")):
        monkeypatch.chdir(here / folder)
        done = vtw("export", here / "model", "--layer", 2, "--output", target, *force)
        refused(done, "holds the working directory itself")
    assert content(here / "out") == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_inputs_are_never_replaced(here, force):
    """Every input is where an output of the same kind would go, under its own name and under others."""
    done = calibrate("--output", "k.json")
    assert done.code == 0, done.err
    (here / "hard.json").hardlink_to(here / "k.json")
    (here / "soft.json").symlink_to("k.json")
    (here / "around").symlink_to(".")
    before = content(here)
    rest = ("--data", "data/rows.jsonl", "--limit", 1, "--max-new-tokens", 2, "--bootstrap", 0, "--no-timing")
    for schedule in ("k.json", "hard.json", "soft.json", "around/k.json", str(here / "k.json")):
        done = vtw("eval", "model", "--schedule", schedule, *rest, "--output", "k.json", *force)
        refused(done, "k.json is the schedule itself")
    for option, value, plot in (
        ("--data", "data/rows.jsonl", "data/rows.jsonl"),
        ("--recipe", "r.yaml", "r.yaml"),
    ):
        (here / "r.yaml").write_text("calibrate: {limit: 1}")
        done = vtw("calibrate", "model", option, value, *QUICK, "--output", plot, *force)
        refused(done, f"{plot} is the {option[2:]} itself")
    (here / "r.yaml").unlink()
    for name in ("config.json", "model.safetensors", "../model/config.json"):
        done = calibrate("--output", f"model/{name}", *force)
        refused(done, "is part of the model")
    done = vtw("eval", "model", "--layer", 3, "--baseline", "model", *rest, "--output", "model/config.json")
    refused(done, "model/config.json is part of")
    done = vtw("export", "model", "--calibration", "k.json", "--output", "around", *force)
    refused(done, "around exists and is not a directory")
    shutil.copytree(here / "model", here / "deep" / "model")
    for target in ("deep", "deep/model", "deep/../deep"):
        done = vtw("export", "deep/model", "--layer", 3, "--output", target, *force)
        refused(done, "holds the model itself")
    shutil.rmtree(here / "deep")
    assert content(here) == before


def test_an_export_that_holds_an_input_is_kept(here):
    """The directory is ours in every file, and still what is read must not go."""
    export_hf("model", Schedule.withdraw_at(3), here / "out")
    assert calibrate("--output", "k.json").code == 0
    shutil.move("k.json", "out/calibration.json")
    manifest = json.loads((here / "out/manifest.json").read_text())
    manifest["files"]["calibration.json"] = {"bytes": 1, "sha256": ""}
    (here / "out/manifest.json").write_text(json.dumps(manifest))
    before = content(here / "out")
    for option in ("--calibration", "--schedule"):
        done = vtw("export", "model", option, "out/calibration.json", "--output", "out", "--force")
        refused(done, f"out holds the {option[2:]} itself")
    (here / "way").symlink_to("out/calibration.json")
    done = vtw("export", "model", "--calibration", "way", "--output", "out", "--force")
    refused(done, "out holds the calibration itself")
    assert content(here / "out") == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_links_and_devices_are_not_free(here, force):
    (here / "k.json").symlink_to("nowhere")
    refused(calibrate("--output", "k.json", *force), "k.json")
    (here / "k.json").unlink()
    (here / "c.png").symlink_to("nowhere.png")
    refused(calibrate("--output", "k.json", "--plot", "c.png", *force), "c.png")
    (here / "c.png").unlink()
    (here / "into").symlink_to("nowhere")
    refused(calibrate("--output", "into/k.json", *force), "cannot write in")
    (here / "out").symlink_to("nowhere")
    refused(vtw("export", "model", "--layer", 3, "--output", "out", *force), "out exists and is not")
    os.mkfifo(here / "pipe.json")
    refused(calibrate("--output", "pipe.json", *force), "pipe.json")
    refused(calibrate("--output", "/dev/null", *force), "/dev/null")
    assert names() == ["into", "out", "pipe.json"]


def test_two_outputs_have_two_names(here):
    refused(calibrate("--output", "k.png"), "cannot be both the result and the plot")
    refused(vtw("eval", "model", "--layer", 3, "--output", "k.json", "--trace", "./k.json"), "and the trace")
    assert names() == []


def test_a_name_that_is_too_long_is_told_at_once(here):
    long = "x" * 256
    for command in (
        ("calibrate", "model", "--data", "data/rows.jsonl", "--output", f"{long}.json"),
        (
            "calibrate",
            "model",
            "--data",
            "data/rows.jsonl",
            "--output",
            f"{long[:248]}.json",
        ),  # .schedule.yaml
        ("calibrate", "model", "--resume", "--output", f"{long[:240]}.json"),
        ("calibrate", "model", "--output", f"{'deep/' * 900}k.json"),
        ("calibrate", "model", "--output", "k.json", "--plot", f"{long}.png"),
        ("eval", "model", "--layer", 3, "--trace", long),
        ("analyze", "model", "--output", long),
        ("analyze", "model", "--output", f"{long}.json"),
        ("export", "model", "--layer", 3, "--output", long),
        ("run", "r.yaml", "--output", long),
        ("run", "r.yaml", "--summary", long),
        ("recipe", "init", "--output", long),
    ):
        (here / "r.yaml").write_text("model: model\ndata: [data/rows.jsonl]\ncalibrate:\n")
        refused(vtw(*command), "File name too long")
        (here / "r.yaml").unlink()
    assert names() == []


# --- runs ----------------------------------------------------------------------------------------------------


RECIPE = """\
model: model
data: [data/rows.jsonl]
calibrate: {limit: 1, max_new_tokens: 2, bootstrap: 0, eta: 1000}
export:
"""


@pytest.fixture
def ran(here):
    """The directory of ``here`` after a run into ``out``."""
    (here / "r.yaml").write_text(RECIPE)
    done = vtw("run", "r.yaml", "--output", "out")
    assert done.code == 0, done.err
    return here


def test_a_run_never_replaces_its_own_data_and_model(here):
    shutil.copytree("data", "rd/model")
    (here / "r.yaml").write_text(
        "model: demo\ndata: [rd/model/rows.jsonl]\nschedule: {layer: 9}\nexport: {format: hf}\n"
    )
    before = content(here)
    for force in ((), ("--force",)):
        refused(vtw("run", "r.yaml", "--output", "rd", *force), "rd/model holds the data itself")
    (here / "r.yaml").write_text(RECIPE)
    refused(vtw("run", "r.yaml", "--output", ".", "--force"), "model holds the model itself")
    (here / "r.yaml").unlink()
    assert content(here) == {name: text for name, text in before.items() if not name.endswith("r.yaml")}


def test_a_run_never_replaces_a_schedule_that_it_reads(ran):
    (ran / "r.yaml").write_text(
        RECIPE.replace("eta: 1000", "eta: 999") + "schedule: {file: out/calibration.schedule.yaml}\n"
    )
    before = content(ran)
    for force in ((), ("--force",)):
        done = vtw("run", "r.yaml", "--output", "out", *force)
        refused(done, "out/calibration.schedule.yaml is the recipe's schedule itself")
    assert content(ran) == before


@pytest.mark.parametrize("what", ["file", "git", "empty", "link"])
@pytest.mark.parametrize("place", ["out", "out/model", "other"])
def test_a_forced_run_spares_what_no_run_made(ran, what, place):
    (ran / place).mkdir(exist_ok=True)
    name = strangers(ran / place, what)
    before = content(ran)
    refused(vtw("run", "r.yaml", "--output", place.partition("/")[0], "--force"), name)
    if place == "out/model":  # the export would be made anew, and the directory with it
        refused(vtw("run", "r.yaml", "--output", "out", "--from", "export"), name)
    assert content(ran) == before


def test_a_forced_run_makes_everything_again(ran):
    (ran / "out/calibration.schedule.yaml").write_text("actions: []")  # listed, whatever is in it
    done = vtw("run", "r.yaml", "--output", "out", "--force")
    assert done.code == 0, done.err
    assert Schedule.from_file(ran / "out/calibration.schedule.yaml").actions
    check_files(ran / "out/model", read_manifest(ran / "out/model"))
    assert not [name for name in names(ran / "out") if name.startswith(".")]


def test_a_recipe_in_the_output_directory_stays_as_it_is(ran):
    text = "# mine\n" + (ran / "out/recipe.yaml").read_text()
    (ran / "out/recipe.yaml").write_text(text)
    done = vtw("run", "out/recipe.yaml", "--force")
    assert done.code == 0, done.err
    assert (ran / "out/recipe.yaml").read_text() == text


def test_a_summary_is_appended_to_nothing_that_matters(ran):
    (ran / "gone.md").symlink_to("nowhere")
    os.mkfifo(ran / "pipe.md")
    (ran / "hard.yaml").hardlink_to(ran / "r.yaml")
    before = content(ran)
    for name, why in (
        ("r.yaml", "is the recipe itself"),
        ("hard.yaml", "is the recipe itself"),
        ("data/rows.jsonl", "is the data itself"),
        ("model/config.json", "is part of the model"),
        ("out/run.json", "is a file that vtw run writes itself"),
        ("out/model/config.json", "is a file that vtw run writes itself"),
        ("gone.md", "is a link that leads nowhere"),
        ("pipe.md", "is not a file"),
        ("out", "is a directory"),
        ("r.yaml/x.md", "cannot write in"),
    ):
        refused(vtw("run", "r.yaml", "--output", "out", "--summary", name), why)
    assert content(ran) == before
    for name in ("/dev/null", "new.md", "out/notes.md"):
        done = vtw("run", "r.yaml", "--output", "out", "--summary", name)
        assert done.code == 0, done.err
    assert (ran / "new.md").read_text() == (ran / "out/summary.md").read_text()


def test_a_second_run_in_the_same_directory_waits_outside(ran):
    before = content(ran)
    with staging.claimed(ran / "out/.vtw-run.lock", UsageError("")):
        done = vtw("run", "r.yaml", "--output", "out", "--force")
    assert (done.code, "error: another vtw run is at work in out\n" in done.err) == (2, True), done.err
    assert content(ran) == before
    (ran / "out/.vtw-run.lock").write_text("")  # of a process that was killed
    assert vtw("run", "r.yaml", "--output", "out", "--force").code == 0
    assert not (ran / "out/.vtw-run.lock").exists()


# --- two runs with one output --------------------------------------------------------------------------------


def test_the_later_of_two_runs_keeps_its_result_aside(here):
    both = [
        spawn("calibrate", "model", "--data", "data/rows.jsonl", *QUICK, "--output", "k.json", cwd=here)
        for _ in range(2)
    ]
    ended = [(one.communicate(), one.returncode) for one in both]
    assert sorted(code for _, code in ended) == [0, 2], ended
    [err] = [err for (_, err), code in ended if code == 2]
    assert "k.json exists by now" in err and "this result is kept in k-1\n" in err
    assert names() == ["k-1", *SET]
    assert names(here / "k-1") == SET
    first, second = (json.loads((here / place / "k.json").read_text()) for place in ("", "k-1"))
    assert first | {"run": None} == second | {"run": None}


@pytest.mark.parametrize("force", [False, True])
def test_the_later_of_two_exports_keeps_its_result_aside(here, force):
    """The rival makes the directory while this one is at work; by force only what an export made may go."""
    (here / "out-1").mkdir()
    with pytest.raises(UsageError) as caught, publish(here / "out", force) as folder:
        (folder / "a").write_text("mine")
        done = vtw("export", "model", "--layer", 3, "--output", "out")
        assert done.code == 0, done.err
        if force:
            (here / "out" / "thesis.txt").write_text("years of work")
    assert f"its own result is kept in {here / 'out-2'}" in str(caught.value)
    assert content(here / "out-2") == {str(here / "out-2" / "a"): b"mine"}
    assert read_manifest(here / "out")["schedule"]
    assert names() == ["out", "out-1", "out-2"]


@pytest.mark.parametrize("direct", [True, False])
def test_a_place_that_is_taken_meanwhile(tmp_path, monkeypatch, direct):
    if not direct:  # a system that cannot rename exclusively
        monkeypatch.setattr(staging, "_renameat2", lambda *_: 38)
    outputs = Outputs({"result": tmp_path / "k.json", "plot": tmp_path / "k.png"}, "vtw-calibration")
    outputs.check([])
    for number, taken in enumerate(("k.json", "k.png"), 1):
        with pytest.raises(UsageError) as caught, outputs.publish() as new:
            new.text("result", f"result {number}")
            new.text("plot", f"plot {number}")
            (tmp_path / taken).write_text("theirs")
        assert f"{taken} exists by now" in str(caught.value) and f"k-{number}" in str(caught.value)
        assert content(tmp_path / f"k-{number}") == {
            str(tmp_path / f"k-{number}/k.json"): f"result {number}".encode(),
            str(tmp_path / f"k-{number}/k.png"): f"plot {number}".encode(),
        }
        assert (tmp_path / taken).read_text() == "theirs"
        (tmp_path / taken).unlink()
        assert names(tmp_path) == [f"k-{n}" for n in range(1, number + 1)]


def test_a_file_that_appears_between_check_and_rename_is_kept(tmp_path, monkeypatch):
    outputs = Outputs({"result": tmp_path / "k.json", "plot": tmp_path / "k.png"}, "vtw-calibration")
    move = staging._move

    def late(new, one):
        (tmp_path / "k.png").write_text("theirs")
        return move(new, one)

    monkeypatch.setattr(staging, "_move", late)
    with pytest.raises(UsageError, match=r"k\.png exists by now"), outputs.publish() as new:
        new.text("result", "result")
        new.text("plot", "plot")
    assert names(tmp_path) == ["k-1", "k.png"]
    assert names(tmp_path / "k-1") == ["k.json", "k.png"]
    assert (tmp_path / "k.png").read_text() == "theirs"


def test_forced_rivals_leave_one_whole_set(tmp_path):
    """Many processes replace one set again and again; whoever looks sees files of one of them."""
    code = """
from vtwcli.io.outputs import Outputs
from pathlib import Path
for turn in range(25):
    places = {"result": Path("k.json"), "schedule": Path("k.yaml")}
    with Outputs(places, "vtw-calibration", force=True).publish() as new:
        new.text("result", '{"format": "vtw-calibration", "by": "%s %d"}' % (sys.argv[1], turn))
        new.text("schedule", 'actions: []\\nprovenance: {vtwcli: "%s %d"}\\n' % (sys.argv[1], turn))
sys.exit()"""
    rivals = [spawn(name, before=code, cwd=tmp_path) for name in "abcd"]
    assert [(one.communicate()[1], one.returncode) for one in rivals] == [("", 0)] * 4
    assert names(tmp_path) == ["k.json", "k.yaml"]
    by = json.loads((tmp_path / "k.json").read_text())["by"]
    assert by in (tmp_path / "k.yaml").read_text()


# --- whole or not at all -------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_drawn_costs_a_warning(here, monkeypatch):
    def fails(*_):
        raise ValueError("\n$\\frac{$\n^\nParseSyntaxException: Expected end of text")

    assert calibrate("--output", "k.json").code == 0
    monkeypatch.setattr(report_calibrate, "plot_calibration", fails)
    done = calibrate("--output", "k.json", "--force")
    assert done.code == 0, done.err
    assert (
        "warning: k.png: cannot be made, the result is written without it (ValueError: $\\frac{$)" in done.err
    )
    assert names() == ["k.json", "k.schedule.yaml"]  # an old picture would pass for the new result's
    done = vtw("export", "model", "--calibration", "k.json", "--output", "out")
    assert done.code == 0, done.err
    assert "calibration.png: cannot be drawn" in done.err
    assert "calibration.png" not in (here / "out/README.md").read_text()
    check_files(here / "out", read_manifest(here / "out"))


@pytest.mark.parametrize(
    "task", ["$\\frac{$", "$x^{2$", "a_$b", "\\", "$" * 300, "\x01", "\u202e", "\ud800x"]
)
def test_text_of_data_never_costs_the_result(here, task):
    name_tasks(f"{task}0", f"{task}1")
    done = calibrate("--output", "k.json")
    if done.code:  # data may be refused, but never after the work
        assert done.code in (2, 4) and names() == [], done.err
        return
    assert {"k.json", "k.schedule.yaml"} <= set(names())
    assert json.loads(Path("k.json").read_text())["tasks"]


def test_an_old_set_survives_until_the_new_one_is_complete(here, monkeypatch):
    assert calibrate("--output", "k.json").code == 0
    before = content(here)
    for moment in ("document", "to_yaml", "alone_in"):
        with monkeypatch.context() as patched:

            def interrupted(*_, **__):
                raise KeyboardInterrupt

            owner = {"document": files, "to_yaml": Schedule, "alone_in": staging}[moment]
            patched.setattr(owner, moment, interrupted)
            assert calibrate("--output", "k.json", "--force", "--seed", 1).code != 0
        assert content(here) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_signal_between_two_renames_finishes_the_set(tmp_path, monkeypatch, force, after):
    """A signal comes once, and the few renames that are left are made before it has its way."""
    texts = {"result": '{"format": "vtw-calibration"%s}', "plot": "tEXtSoftware\0vtwcli%s", "page": "%s"}
    places = {"result": tmp_path / "k.json", "plot": tmp_path / "k.png", "page": tmp_path / "k.html"}
    outputs = Outputs(places, "vtw-calibration", force, places.values() if force else ())
    if force:
        for key, path in places.items():
            path.write_text(texts[key] % "")
    move, count = staging._move, []

    def struck(new, one):
        done = move(new, one)
        count.append(1)
        if len(count) == after + 1:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(staging, "_move", struck)
    with pytest.raises(KeyboardInterrupt), outputs.publish() as new:
        for key, text in texts.items():
            new.text(key, text % ' , "new": 1')
    assert names(tmp_path) == ["k.html", "k.json", "k.png"]
    assert all('"new"' in path.read_text() for path in places.values())


# --- standard output -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [(), ("--json",)])
@pytest.mark.parametrize("encoding", ["ascii"])
def test_a_character_that_stdout_lacks_is_escaped(here, encoding, as_json):
    name_tasks("größe 色 😀")
    command = ("calibrate", "model", "--data", "data/rows.jsonl", *QUICK, "--output", "k.json", *as_json)
    done = subprocess.run(
        [sys.executable, "-m", "vtwcli", *map(str, command), "--force"],
        capture_output=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert names() == SET
    if as_json:
        assert json.loads(done.stdout.decode(encoding)) == json.loads(Path("k.json").read_text())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_stdout_is_one_line(here):
    for command in (
        ("calibrate", "model", "--data", "data/rows.jsonl", *QUICK, "--output", "k.json"),
        ("export", "model", "--layer", "3", "--output", "out", "--json"),
        ("--help",),
    ):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "vtwcli", *map(str, command)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=here,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        lines = done.stderr.splitlines()
        assert done.returncode == 1
        assert lines[-2] == "error: cannot write to stdout: No space left on device", lines
    assert names() == [*SET, "out"]
    check_files(here / "out", read_manifest(here / "out"))


@pytest.mark.parametrize("shell", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_nobody_listening_does_not_cost_the_result(here, shell):
    """``run`` shows its plan before it begins."""
    (here / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "vtwcli", "run", "r.yaml", "--output", "out", "--only", "calibrate"]
    subprocess.run(
        ["sh", "-c", f'"$@" {shell}', "sh", *command],
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert {"run.json", "calibration.json", "calibration.png", "summary.md"} <= set(names(here / "out"))


def test_a_reader_that_leaves_ends_the_output_alone():
    with spawn("families") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "utf-8"])
def test_what_an_encoding_lacks_is_json_still(encoding):
    text = "größe 色 😀 \ud800"
    for line in (json.dumps(text, ensure_ascii=False), json.dumps(text)):
        assert json.loads(line.encode(encoding, console.ESCAPE).decode(encoding)) == text


def test_half_a_surrogate_pair_is_written_as_json_does(tmp_path):
    files.write_text(tmp_path / "a.json", files.document({"a": "\ud800 é"}))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "\ud800 é"}


# --- what a killed process leaves ----------------------------------------------------------------------------


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
MOMENTS = {
    "calibrate, drawing": (
        ("calibrate", "model", "--data", "data/rows.jsonl", *QUICK, "--output", "k.json"),
        f"from vtwcli.report import calibration as m\nm.plot_calibration = lambda *_: {KILL}",
    ),
    "export, at the end": (
        ("export", "model", "--layer", 3, "--dtype", "bfloat16", "--output", "out"),
        f"from vtwcli.export.hf import export as m\nm.write_manifest = lambda *_: {KILL}",
    ),
    "export, converting": (
        ("export", "model", "--layer", 3, "--dtype", "bfloat16", "--output", "out"),
        f"from vtwcli.export.hf import weights as m\nm._cast = lambda *_: {KILL}",
    ),
    "onnx, at the beginning": (
        ("export", "model", "--layer", 3, "--format", "onnx", "--output", "out"),
        f"from vtwcli.export.onnx import export as m\nm.write_graphs = lambda *_, **__: {KILL}",
    ),
    "run, exporting": (
        ("run", "r.yaml", "--output", "out"),
        f"from vtwcli.export.hf import export as m\nm.write_manifest = lambda *_: {KILL}",
    ),
    "run, drawing": (
        ("run", "r.yaml", "--output", "out"),
        f"from vtwcli.report import calibration as m\nm.plot_calibration = lambda *_: {KILL}",
    ),
    "run, at the beginning": (
        ("run", "r.yaml", "--output", "out"),
        f"from vtwcli.pipeline import plan as m\nm.resolved = lambda *_: {KILL}",
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_run_removes_what_a_killed_one_left(here, moment, monkeypatch):
    command, hook = MOMENTS[moment]
    if command[0] == "run":
        (here / "r.yaml").write_text(RECIPE)
    process = spawn(*command, before=hook, cwd=here)
    assert (process.communicate()[1], process.returncode)[1] == -signal.SIGKILL
    hidden = list(here.rglob(".vtw-*"))
    assert hidden, "the process was killed before it had made anything"
    monkeypatch.setattr(onnx, "check", lambda *_: {})  # it takes its time, and writes nothing
    done = vtw(*command)
    assert done.code == 0, done.err
    assert not list(here.rglob(".*"))
    if (here / "out").exists() and command[0] == "export" and "onnx" not in command:
        check_files(here / "out", read_manifest(here / "out"))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_set_that_was_ready_is_put_in_place_by_the_next_run(here, after, force):
    """Killed between the renames of a set: whoever comes next finds all of it, of one result."""
    command = ("calibrate", "model", "--data", "data/rows.jsonl", *QUICK, "--output", "k.json")
    seeds = ["--seed", 1]
    if force:
        assert vtw(*command).code == 0
        seeds = ["--seed", 2, "--force"]
    hook = (
        "from vtwcli.io import staging as m\nreal, count = m._move, []\n"
        "def move(*given):\n"
        f"    if len(count) == {after}: {KILL}\n"
        "    count.append(1)\n"
        "    return real(*given)\n"
        "m._move = move\n"
    )
    process = spawn(*command, *seeds, before=hook, cwd=here)
    _, err = process.communicate()
    if after == 3:
        assert process.returncode == 0, err
        return
    assert process.returncode == -signal.SIGKILL
    refused(vtw(*command), "k.json exists already")
    assert names() == SET
    result = json.loads((here / "k.json").read_text())
    assert result["seed"] == seeds[1]
    assert Schedule.from_file(here / "k.schedule.yaml") == Schedule.from_dict(result["schedule"])


def test_what_a_running_process_makes_is_left_alone(here):
    with staging.staged(here / "out") as new, staging.staged(here / "k.json") as other:
        (new / "a").write_text("mine")
        assert vtw("export", "model", "--layer", 3, "--output", "out").code == 0
        assert calibrate("--output", "k.json").code == 0
        assert (new / "a").read_text() == "mine" and other.is_dir()
    assert names() == [*SET, "out"]


def test_what_is_not_of_the_target_or_not_ours_is_left_alone(here):
    dead = here / f"{staging.stage_prefix('out')}{'0' * 12}"
    for place in (dead, here / f"{staging.stage_prefix('other')}{'0' * 12}", here / ".out-0123456789ab"):
        (place / "new").mkdir(parents=True)
    (here / f"{staging.stage_prefix('out')}{'1' * 12}").write_text("a file")
    (here / f"{staging.stage_prefix('out')}{'2' * 12}").symlink_to(here / "data")
    assert vtw("export", "model", "--layer", 3, "--output", "out").code == 0
    assert not dead.exists() and len(names()) == 5
    assert (here / "data" / "rows.jsonl").exists()


@pytest.mark.parametrize("moment", ["_move", "put_in_place"])
def test_killed_while_two_directories_could_not_change_places(here, moment):
    """The old export stands aside for a moment; the new one, which was complete, takes its place."""
    export_hf("model", Schedule.withdraw_at(3), here / "out")
    hook = (
        "from vtwcli.io import staging\nfrom vtwcli.export.directory import publish as m\n"
        f"m.exchange = lambda *_: False\nstaging.{moment} = lambda *_: {KILL}"
    )
    process = spawn("export", "model", "--layer", 2, "--output", "out", "--force", before=hook, cwd=here)
    assert (process.communicate()[1], process.returncode)[1] == -signal.SIGKILL
    refused(vtw("export", "model", "--layer", 4, "--output", "out"), "out exists already")
    check_files(here / "out", read_manifest(here / "out"))
    assert read_manifest(here / "out")["schedule"]["actions"][0]["at"] == 2
    assert names() == ["out"]


# --- companions, pipes and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "onnx"])
def test_a_link_out_of_the_model_is_not_exported(here, kind, monkeypatch):
    monkeypatch.setattr(onnx, "check", lambda *_: {})  # it takes its time, and writes nothing
    (here / "secret.txt").write_text("0xDEADBEEF")
    for name in ("LICENSE", "notes.txt"):
        (here / "model" / name).symlink_to("../secret.txt")
    (here / "model" / "NOTICE").write_text("a notice")
    done = vtw("export", "model", "--layer", 3, "--format", kind, "--output", "out")
    assert done.code == 0, done.err
    assert "model/LICENSE is a link to" in done.err and done.err.count("LICENSE") == 1
    assert (here / "out/NOTICE").read_text() == "a notice"
    assert b"0xDEADBEEF" not in b"".join(content(here / "out").values())


@pytest.mark.parametrize("kind", ["hf", "onnx"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "extra.json", "tokenizer.model"])
def test_a_part_of_the_model_that_lies_elsewhere_is_refused(here, kind, name):
    (here / "secret").write_text("{}")
    (here / "model" / name).unlink(missing_ok=True)
    (here / "model" / name).symlink_to(here / "secret")
    done = vtw("export", "model", "--layer", 3, "--format", kind, "--output", "out")
    assert done.code == 4
    assert f"model/{name} is a link to {here / 'secret'}, outside of the model's directory" in done.err
    assert names() == ["secret"]


def test_links_inside_and_those_of_the_hub_cache_are_files(here):
    repo = here / "models--org--name"
    shutil.copytree("model", repo / "blobs")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for file in (repo / "blobs").iterdir():
        (repo / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    (repo / "snapshots" / "abc" / "LICENSE").symlink_to(here / "data" / "rows.jsonl")
    (here / "model" / "NOTICE").write_text("a notice")
    (here / "model" / "LICENSE").symlink_to("NOTICE")
    for model in ("model", repo / "snapshots" / "abc"):
        done = vtw("export", model, "--layer", 3, "--output", "out")
        assert done.code == 0, done.err
        assert ("LICENSE is a link" in done.err, "LICENSE" in names(here / "out")) == (
            (False, True) if model == "model" else (True, False)
        )
        assert {"tokenizer.json", "chat_template.jinja"} <= set(names(here / "out"))
        shutil.rmtree("out")


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_pipes_are_refused_wherever_something_is_read(here):
    """A pipe without a writer would be waited for: every one of these would hang."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(120)
    try:
        for name in ("p.yaml", "p.json", "p.jsonl", "p.csv", "p.parquet", "p.png"):
            pipe(here / name)
        (here / "rows.jsonl").write_text(json.dumps({"image": "p.png", "question": "?", "answer": "a"}))
        data_ = ("--data", "data/rows.jsonl")
        for code, command in (
            (2, ("run", "p.yaml")),
            (2, ("recipe", "check", "p.yaml")),
            (2, ("calibrate", "--recipe", "p.yaml")),
            (2, ("eval", "model", *data_, "--schedule", "p.yaml")),
            (2, ("eval", "model", *data_, "--layer", 3, "--calibration", "p.json")),
            (2, ("export", "model", "--schedule", "p.yaml", "--output", "out")),
            (2, ("export", "model", "--calibration", "p.json", "--output", "out")),
            (2, ("export", "model", "--layer", 3, "--evaluation", "p.json", "--output", "out")),
            *((4, ("calibrate", "model", "--data", name)) for name in ("p.json", "p.jsonl", "p.csv")),
            (4, ("calibrate", "model", "--data", "p.parquet")),
            (4, ("calibrate", "model", "--data", "rows.jsonl")),
            (4, ("verify", "model", "--image", "p.png")),
        ):
            done = vtw(*command)
            assert (done.code, "it is a pipe, and only files are read" in done.err) == (code, True), (
                command,
                done.err,
            )
        for name in (
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "generation_config.json",
            "x.model",
        ):
            shutil.copytree("model", "other")
            pipe(here / "other" / name)
            for command in (("calibrate", "other", *data_), ("export", "other", "--layer", 3, "-o", "out")):
                done = vtw(*command)
                assert (done.code, f"{name}: cannot be read: it is a pipe" in done.err) == (4, True), done.err
            shutil.rmtree("other")
        (here / "exported").mkdir()
        pipe(here / "exported" / "manifest.json")
        for command in (("verify", "exported"), ("eval", "exported", *data_)):
            assert vtw(*command).code == 4
        export_hf("model", Schedule.withdraw_at(3), here / "out")
        pipe(here / "out" / "manifest.json")
        refused(vtw("export", "model", "--layer", 3, "--output", "out", "--force"), "out holds")
    finally:
        signal.alarm(0)


def test_devices_and_sockets_are_refused(here):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("s.yaml")
        for path, kind in (("/dev/null", "a device"), ("s.yaml", "a socket")):
            refused(vtw("recipe", "check", path), f"it is {kind}")
    (here / "rows.jsonl").write_text(json.dumps({"image": "/dev/null", "question": "?", "answer": "a"}))
    done = vtw("calibrate", "model", "--data", "rows.jsonl")
    assert done.code == 4 and "it is a device" in done.err
    Image.new("RGB", (12, 12)).save("real.png")
    (here / "link.png").symlink_to("real.png")
    assert files.regular(here / "link.png") == here / "link.png"
    with pytest.raises(VtwError):
        files.check_folder(Path("/dev/null/x"))
