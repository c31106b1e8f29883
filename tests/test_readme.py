"""Every command of the README runs, top to bottom in one directory, as a reader would type it.

Environment variables keep samples few, and a ``--limit`` is lowered; nothing else changes. What needs the Hub or pip
is named below.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.cli import vtw
from vtwcli.data.scenes import examples
from vtwcli.recipe.recipe import Recipe
from vtwcli.schedule.schedule import Schedule

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

PYTHON = README.partition("\n## In Python\n")[2].partition("\n## ")[0]

# commands that cannot run here, and why
ELSEWHERE = {
    r"^pip install": "installs packages",
    r"^pytest": "runs this very test",
    r"^transformers serve": "serves until it is stopped; test_serve.py asks one",
    r"^accelerate launch|^torchrun": "tested with two processes in test_calibrate.py",
    r"\b(llava-hf|Qwen|OpenGVLab|HuggingFaceTB)/": "needs a model from the Hub",
    r"recipes/(llava|qwen|visipruner|onnx)": "needs a model from the Hub; test_recipes.py runs it on a tiny one",
    r"--push-to-hub": "uploads",
    r"\bMODEL\b|\bRECIPE\b|\bFILE\b|\bDIR\b": "a pattern, not a command",
}
FEW = {
    "VTW_CALIBRATE__LIMIT": "2", "VTW_CALIBRATE__BOOTSTRAP": "20", "VTW_CALIBRATE__ETA": "0.1",
    "VTW_ANALYZE__LIMIT": "2", "VTW_ANALYZE__MAPS": "1", "VTW_ANALYZE__FREEZE": "false",
    "VTW_EVAL__LIMIT": "1", "VTW_EVAL__BOOTSTRAP": "20", "VTW_EVAL__REPEATS": "1", "VTW_EVAL__TIMING_TOKENS": "1",
    "VTW_BUDGET__LIMIT": "1", "VTW_GATES__MAX_DROP": "1", "VTW_GATES__MAX_KL": "10", "VTW_GATES__MIN_AGREEMENT": "0",
}  # fmt: skip


def commands():
    """Every command line of the shell blocks, in order, once."""
    lines = "\n".join(text for language, text in BLOCKS if language in ("sh", "bash", "console"))
    found = [line.strip() for line in lines.replace("\\\n", " ").splitlines()]
    found = [line.removeprefix("pip install . && ") for line in found]
    return list(dict.fromkeys(line for line in found if line and not line.startswith("#")))


def elsewhere(command):
    return next((reason for pattern, reason in ELSEWHERE.items() if re.search(pattern, command)), None)


def test_the_readme_has_commands():
    assert sum(elsewhere(command) is None for command in commands()) >= 4
    assert "vtw calibrate demo" in commands()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where a reader of the README sits: a copy of the recipes, and an environment that keeps samples few."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    next(examples("eval", 1)).image.save(folder / "picture.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GITHUB_STEP_SUMMARY", str(folder / "step-summary.md"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        for name, value in FEW.items():
            patch.setenv(name, value)
        yield folder


def run(command):
    """Exit code and stderr of a shell line; plain ``vtw`` commands run in this process, which is much faster."""
    command = re.sub(r"--limit \d+", "--limit 2", command)
    for part in command.split(" && "):
        first, *pipe = part.split(" | ")
        words = shlex.split(first, comments=True)
        target = None
        if ">" in words:
            *words, _, target = words
        if not words or words[0] != "vtw" or re.search(r"\$\(|;|<|\|\||2>", part):
            done = subprocess.run(["bash", "-c", f"set -o pipefail; {part}"], capture_output=True, text=True)
            code, err = done.returncode, done.stderr
        else:
            code, out, err = vtw(*map(os.path.expandvars, words[1:]))
            if pipe:
                rest = subprocess.run(
                    ["bash", "-c", " | ".join(pipe)], input=out, capture_output=True, text=True
                )
                code, err, out = code or rest.returncode, err + rest.stderr, rest.stdout
                assert out.strip() or ">" in part, f"{command}: prints nothing"
            if target:
                Path(target).write_text(out)
        if code:
            return code, err
    return 0, ""


def test_every_command_runs(desk):  # one test, because later commands use what earlier ones wrote
    failed = []
    for command in commands():
        if elsewhere(command):
            continue
        if "jq " in command and shutil.which("jq") is None:
            warnings.warn(f"jq is not installed, so this was not run: {command}", stacklevel=1)
            continue
        code, err = run(command)
        if code:
            failed.append(f"{command}\nexit code {code}\n{err[-1500:]}")
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "yaml"])
def test_yaml_is_a_recipe_a_schedule_or_a_workflow(text):
    from ruamel.yaml import YAML

    node = YAML(typ="safe", pure=True).load(text)
    if "jobs" in node:
        steps = [step for job in node["jobs"].values() for step in job["steps"]]
        assert all(("uses" in step) != ("run" in step) for step in steps)
        called = [
            line for step in steps for line in step.get("run", "").splitlines() if line.startswith("vtw ")
        ]
        assert called
        for line in called:
            names = set(re.findall(r" (--[a-z-]+)", line))
            shown = vtw(shlex.split(line)[1], "--help").out
            assert all(name in shown for name in names), line
    elif "actions" in node or isinstance(node.get("schedule"), list):
        Schedule.from_dict(node)
    else:
        Recipe.model_validate(node)


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "python"])
def test_python_is_python(text):
    compile(text, "README.md", "exec")


@pytest.mark.parametrize("text", re.findall(r"^```python\n(.*?)^```", PYTHON, flags=re.MULTILINE | re.DOTALL))
def test_python_runs_as_printed(text, capsys):
    exec(compile(text, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert len(said.splitlines()) == text.count("print(")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#\s]+)\)", README):
        if not re.match(r"https?:", target):
            assert (ROOT / target).exists(), target


def test_workflow_of_the_project_is_whole():
    from ruamel.yaml import YAML

    flow = YAML(typ="safe", pure=True).load(ROOT / ".github/workflows/tests.yml")
    lines = [step.get("run", "") for job in flow["jobs"].values() for step in job["steps"]]
    for wanted in ("ruff check .", "ruff format --check .", "mypy", "pytest -n auto"):
        assert wanted in lines
    assert any(line.startswith("vtw run recipes/ci.yaml --summary") for line in lines)
    assert flow["permissions"] == {"contents": "read"}
