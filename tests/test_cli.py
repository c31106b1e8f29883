"""The command-line contract: help, exit codes, exact messages, what goes to stdout and what to stderr."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from vtwcli import __version__
from vtwcli.commands.flags import fields, flag, flags
from vtwcli.io.section import Section
from vtwcli.report.tables import fitting_columns

ESCAPE = "\x1b"


def vtw(*args, env=None, cwd=None, **options):
    """Run the command as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vtwcli", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **(env or {})},
        **options,
    )


COMMANDS = [
    "analyze",
    "budget",
    "calibrate",
    "demo",
    "docs",
    "env",
    "eval",
    "export",
    "families",
    "methods",
    "recipe",
    "run",
    "verify",
]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_answers_without_torch_and_shows_an_example(command):
    code = (
        "import sys\n"
        f"sys.argv = ['vtw', *{command!r}, '--help']\n"
        "from vtwcli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"vtw \w+( \w+)? demo", done.stdout)
    assert ESCAPE not in done.stdout


def test_every_command_is_tested_here():
    listed = vtw("--help").stdout.split("Commands")[1]
    assert set(re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)) == set(COMMANDS)


def test_a_flag_is_what_its_field_says():
    class Part(Section):
        count: int | None = Field(None, description="how many")
        share: float = Field(0.5, description="of all")
        names: tuple[str, ...] = Field(("a", "b"), description="which")
        kind: Literal["x", "y"] | None = Field(None, description="x or y")
        on: bool = Field(True, description="whether")
        off: bool = Field(False, description="whether not")
        left_out: int = Field(1, description="not to be given here")

    @flags(fields(Part, without=("left_out",)), flag("plain", bool, "No field."))
    def command(**given: Any) -> None:
        print(given)

    app = typer.Typer(rich_markup_mode="rich")
    app.command()(command)
    run = CliRunner().invoke
    nothing = dict.fromkeys(("count", "share", "names", "kind", "on", "off"))
    assert ast.literal_eval(run(app).output) == nothing | {"plain": False}
    given = ["--count", "3", "--share", ".1", "--names", "c,d", "--kind", "z", "--no-on", "--off", "--plain"]
    assert ast.literal_eval(run(app, given).output) == {
        "count": 3,
        "share": 0.1,
        "names": "c,d",
        "kind": "z",
        "on": False,
        "off": True,
        "plain": True,
    }
    assert [run(app, [word]).exit_code for word in ("--left-out=2", "--no-off", "--count=a")] == [2, 2, 2]
    page = run(app, ["--help"]).output
    assert all(words in page for words in ("how many", "of all", "[default: 0.5]", "[default: a,b]"))
    assert "--on" in page and "--no-on" in page


def test_families_as_table_and_as_json():
    done = vtw("families", env={"COLUMNS": "160"})
    assert done.returncode == 0
    assert "llava-hf/llava-1.5-7b-hf" in done.stdout
    rows = json.loads(vtw("families", "--json").stdout)
    assert {"family": "LLaVA-1.5", "model_type": "llava", "withdraw": "yes"}.items() <= rows[0].items()


def test_env_tells_what_is_installed_against_what_was_tested():
    done = vtw("env")
    assert done.returncode == 0
    report = json.loads(vtw("env", "--json").stdout)
    here = report["libraries"]["transformers"]["installed"]
    assert here == version("transformers")
    assert f"transformers     {here}" in done.stdout
    assert f"tested with transformers {', '.join(report['tested']['transformers'])}" in done.stdout
    assert report["among_tested"] is (here in report["tested"]["transformers"])
    machine = report["machine"]
    assert 0 < machine["memory"]["available"] <= machine["memory"]["total"]
    assert machine["switches"]["HF_HUB_OFFLINE"] == "1" and "HF_HUB_OFFLINE=1" in done.stdout
    assert f"hub cache: {machine['caches']['hub']}" in done.stdout and "CUDA: " in done.stdout
    assert ("is not among the releases" in done.stderr) is not report["among_tested"]


def test_version():
    done = vtw("--version")
    assert (done.returncode, done.stdout) == (0, f"vtw {__version__}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["calibrate", "demo", "--eta", "-1"], "error: --eta: input should be greater than 0, got -1.0"),
        (["calibrate", "demo", "--policy", "best"], "error: --policy: input should be 'paper', 'sustained'"),
        (["calibrate", "demo", "--data", "demo:x=1"], "error: data source 'demo:x=1': unknown key 'x'"),
        (
            ["calibrate", "demo", "--plot", "curve.gif"],
            "error: --plot: curve.gif must end in .png, .svg or .pdf",
        ),
        (["calibrate", "demo", "--device", "tpu"], "error: --device: string should match pattern"),
        (["calibrate", "demo", "--min-layer", "99"], "error: --min-layer: 99 leaves no candidate"),
        (["calibrate"], "error: no model given\n  name a directory, a Hub id or demo, or a recipe that does"),
        (
            ["calibrate", "demo", "--set", "calibrate.etta=1"],
            "--set calibrate.etta=1: calibrate.etta: unknown key 'etta'",
        ),
        (
            ["calibrate", "--recipe", "none.yaml"],
            "error: none.yaml: cannot read the recipe: No such file or directory",
        ),
        (
            ["calibrate", "demo", "--etaa", "1"],
            "error: no such option: --etaa (Possible options: --data, --eta, --set)\n",
        ),
        (["calibrate", "demo", "--eta", "x"], "error: --eta: input should be a valid number"),
        (["verify"], "error: missing argument 'DIR'\n"),
        (["calibrat"], "error: no such command 'calibrat'"),
        (["verify", "a", "b"], "error: got unexpected extra argument"),
        (["eval", "demo", "--layer", "99"], "error: --layer: 99, but demo has 12 layers (0..11)\n"),
        (["export", "demo", "--layer", "13", "-o", "x"], "error: --layer: 13, but demo has 12 layers"),
        (["demo", "--task", "poem"], "error: --task: 'poem' is not a task of the demo\n  one of colour"),
    ],
)
def test_wrong_use_is_exit_2_and_one_clear_line(args, message, tmp_path):
    done = vtw(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_beyond_the_model_is_named_by_its_file(tmp_path):
    (tmp_path / "deep.yaml").write_text("format_version: 1\nactions: [{action: withdraw, at: 40}]\n")
    done = vtw("eval", "demo", "--schedule", "deep.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: deep.yaml: schedule action 1 (withdraw): at is 40, but the model has 12" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "."],
        ["calibrate", "./nothing"],
        ["calibrate", "demo", "--data", "./nothing.jsonl"],
        ["eval", "nothing/at/all", "--layer", "3"],
    ],
)
def test_what_is_not_there_is_said_without_torch(command, tmp_path):
    code = (
        "import sys\n"
        f"sys.argv = ['vtw', *{command!r}]\n"
        "from vtwcli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: ")


def test_json_says_that_no_file_was_written(tmp_path):
    done = vtw("calibrate", "demo", "--limit", "1", "--bootstrap", "0", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["format"] == "vtw-calibration"
    assert done.stderr.endswith("no files written: --json without --output only prints\n")
    assert list(tmp_path.iterdir()) == []


def test_no_blanks_at_the_end_of_lines_in_a_pipe():
    lines = vtw("methods").stdout.splitlines()
    assert len(lines) > 30 and all(line == line.rstrip() for line in lines)


def test_a_narrow_terminal_breaks_no_cell():
    rows = [{"a": "x" * 10, "b": "y" * 20, "c": "z" * 10}]
    assert fitting_columns("abc", rows, "bc", 44) == ["a", "b", "c"]
    assert fitting_columns("abc", rows, "bc", 43) == ["a", "c"]
    assert fitting_columns("abc", rows, "bc", 21) == ["a"]
    assert fitting_columns("abc", rows, "bc", 5) == ["a"]  # what may not go stays


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["calibrate", "demo", "-o", "k.json"], "nothing half-made is left: --resume would have kept"),
        (["calibrate", "demo", "-o", "k.json", "--resume"], "no sample was finished"),
        (["analyze", "demo", "-o", "a.json"], "nothing half-made is left\n"),
    ],
)
def test_an_interrupt_says_what_is_left(command, words, tmp_path):
    code = (
        "import sys, os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        f"sys.argv = ['vtw', *{command!r}]\n"
        "import vtwcli.models.loading as loading\n"
        "loading._load_weights = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
        "from vtwcli.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert f"interrupted; {words}" in done.stderr
    assert not {path.name for path in tmp_path.iterdir()} - {"k.partial.jsonl"}


def test_missing_model_is_exit_4(tmp_path):
    done = vtw("calibrate", "./nothing-here", cwd=tmp_path)
    assert done.returncode == 4
    assert "./nothing-here" in done.stderr
    assert "Traceback" not in done.stderr


def test_existing_output_is_kept_without_force(tmp_path):
    (tmp_path / "k.json").write_text("precious")
    done = vtw("calibrate", "demo", "--output", "k.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: k.json exists already\n  choose another name, or --force to replace it\n" in done.stderr
    assert (tmp_path / "k.json").read_text() == "precious"


def test_colour_only_on_a_terminal(tmp_path):
    done = vtw("calibrate", "./nothing-here", cwd=tmp_path, env={"NO_COLOR": "1"})
    assert ESCAPE not in done.stderr + done.stdout
    assert ESCAPE not in vtw("calibrate", "./nothing-here", cwd=tmp_path).stderr


def test_completion_knows_commands_and_options():
    code = "import sys; sys.argv = ['vtw']; from vtwcli.cli import main; main()"
    words = {"_VTW_COMPLETE": "complete_bash", "COMP_WORDS": "vtw calibrate --po", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **words}
    )
    assert done.stdout.split() == ["--policy", "--positions"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    args = ["calibrate", "demo", "--limit", "4", "--bootstrap", "50"]
    return folder, vtw(*args, "--output", "k.json", cwd=folder), vtw(*args, "--json", cwd=folder)


def test_calibrate_demo_writes_result_schedule_and_picture(calibrated):
    folder, done, _ = calibrated
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} == {"k.json", "k.schedule.yaml", "k.png"}
    assert re.search(r"K = \d+ of \d+ layers", done.stdout)
    assert ESCAPE not in done.stdout
    assert "wrote k.json, k.schedule.yaml, k.png" in done.stderr


def test_json_is_the_whole_of_stdout_and_equal_but_for_run(calibrated):
    folder, _, done = calibrated
    assert done.returncode == 0, done.stderr
    printed, written = json.loads(done.stdout), json.loads((folder / "k.json").read_text())
    assert printed.pop("run") != written.pop("run")
    assert printed == written


def test_keys_that_scripts_rely_on(calibrated):
    folder, _, _ = calibrated
    result = json.loads((folder / "k.json").read_text())
    layers = result["num_layers"]
    assert 0 < result["withdrawal_layer"] < layers
    assert len(result["kl"]["mean"]) == layers
    assert all(len(row) == layers for row in result["kl"]["samples"])
    assert (result["policy"], result["eta"]) == ("worst-task", 0.003)
    assert result["schedule"]["actions"] == [{"at": result["withdrawal_layer"], "action": "withdraw"}]


def test_no_layer_qualifies_is_exit_3_and_the_curve_is_written(tmp_path):
    done = vtw(
        "calibrate",
        "demo",
        "--limit",
        "2",
        "--eta",
        "1e-12",
        "--output",
        "k.json",
        "--bootstrap",
        "0",
        cwd=tmp_path,
    )
    assert done.returncode == 3
    assert "error: No layer qualifies" in done.stderr
    assert "Best compromise: layer" in done.stderr
    result = json.loads((tmp_path / "k.json").read_text())
    assert result["withdrawal_layer"] is None
    assert result["schedule"] is None
    assert (tmp_path / "k.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("given", "alone"), [({}, True), ({"OMP_NUM_THREADS": "2"}, False), ({"MKL_NUM_THREADS": "2"}, False)]
)
def test_one_thread_computes_a_small_model_unless_the_user_says_otherwise(
    tiny_dir, data, tmp_path, given, alone
):
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-m", "vtwcli", "calibrate", str(tiny_dir), "--data", str(data), "--limit", "1", "--verbose"],
        env=clean | given, cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    # a machine of one core has nothing to choose
    assert ("one thread instead of" in done.stderr) == (alone and (os.cpu_count() or 1) > 1)


def test_threads_of_a_program_that_imports_the_package_are_its_own(monkeypatch):
    import torch

    from vtwcli.machine import threads

    before = torch.get_num_threads()
    monkeypatch.setattr(threads.settings, "by_size", False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    try:
        torch.set_num_threads(2)
        threads.fit(100)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(threads.settings, "by_size", True)
        threads.fit(threads.SMALL + 1)
        assert torch.get_num_threads() == 2
        threads.fit(threads.SMALL)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
