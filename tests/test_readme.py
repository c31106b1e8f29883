"""Every command and snippet of the README and of each page of documentation runs, top to bottom, as a reader would.

Each page has a directory of its own. Environment variables keep samples few, and a ``--limit`` is lowered; nothing
else changes. A block of data is the file that the line before it names. What needs the Hub or pip is named below.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli import vtw
from vtwcli.docs import FOLDER, PAGES, page
from vtwcli.methods import METHODS, table
from vtwcli.recipe.recipe import Recipe
from vtwcli.schedule.schedule import Schedule

ROOT = Path(__file__).parent.parent
TEXTS = {"README": (ROOT / "README.md").read_text(encoding="utf-8")} | {name: page(name) for name in PAGES}
FOLDERS = dict.fromkeys(PAGES, FOLDER) | {"README": ROOT}


def blocks(text, *languages):
    """The fenced blocks of some languages: language, text, and the file's name where it is one."""
    found = re.finditer(
        r"(?:`([^`\s]+)`[^`\n]*:\n\n)?^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    )
    return [(one[2], one[3], one[1]) for one in found if not languages or one[2] in languages]


EVERY = [(name, *block) for name, text in TEXTS.items() for block in blocks(text)]

# commands that cannot run here, and why
ELSEWHERE = {
    r"^pip install": "installs packages",
    r"^pytest": "runs this very test",
    r"^python3 -m venv": "makes an environment that nothing is installed in",
    r"gqa:path=": "needs a copy of a data set",
    r"^transformers serve": "serves until it is stopped; test_serve.py asks one",
    r"^accelerate launch|^torchrun": "tested with two processes in test_calibrate.py",
    r"\b(llava-hf|Qwen|OpenGVLab|HuggingFaceTB)/": "needs a model from the Hub",
    r"recipes/(llava|qwen|visipruner|onnx)": "needs a model from the Hub; test_recipes.py runs it on a tiny one",
    r"--push-to-hub": "uploads",
    r"lmms_eval": "needs an environment of its own; test_lmms_eval.py runs it",
    r"--search": "needs more samples than are taken here; test_search.py runs it",
    r"--policy guarantee": "needs more samples than are taken here; test_guarantee.py runs it",
    r"\bMODEL\b|\bRECIPE\b|\bFILE\b|\bDIR\b": "a pattern, not a command",
}
FILES = ("jsonl", "json", "csv", "tsv")
FEW = {
    "VTW_CALIBRATE__LIMIT": "2", "VTW_CALIBRATE__BOOTSTRAP": "20", "VTW_CALIBRATE__ETA": "0.1",
    "VTW_ANALYZE__LIMIT": "2", "VTW_ANALYZE__MAPS": "1", "VTW_ANALYZE__FREEZE": "false",
    "VTW_EVAL__LIMIT": "1", "VTW_EVAL__BOOTSTRAP": "20", "VTW_EVAL__REPEATS": "1", "VTW_EVAL__TIMING_TOKENS": "1",
    "VTW_GATES__RISK": "0.999", "VTW_GATES__CONFIDENCE": "0.01",
    "VTW_BUDGET__LIMIT": "1", "VTW_GATES__MAX_DROP": "1", "VTW_GATES__MAX_KL": "10", "VTW_GATES__MIN_AGREEMENT": "0",
}  # fmt: skip


def commands(text):
    """The command lines of a shell block."""
    found = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    found = [line.removeprefix("pip install . && ") for line in found]
    return [line for line in found if line and not line.startswith("#")]


def elsewhere(command):
    return next((reason for pattern, reason in ELSEWHERE.items() if re.search(pattern, command)), None)


def test_the_readme_begins_with_what_to_paste_and_is_short():
    text = TEXTS["README"]
    lines = [line for _, block, _ in blocks(text, "sh") for line in commands(block)]
    assert "vtw calibrate demo" in lines
    assert lines.index("vtw calibrate demo") < lines.index("vtw calibrate llava-hf/llava-1.5-7b-hf")
    assert len(text.encode()) <= 10_240


def test_every_page_is_listed_and_linked():
    assert {file.stem for file in FOLDER.glob("*.md")} == set(PAGES)
    for name in PAGES:
        assert TEXTS[name].startswith(f"# {name}: ")
        assert f"](vtwcli/docs/{name}.md)" in TEXTS["README"]
    shown = vtw("docs").out
    assert all(f"{name} " in shown for name in PAGES)
    assert vtw("docs", "data").out == TEXTS["data"]
    missing = vtw("docs", "method")
    assert missing.code == 2 and "did you mean 'methods'?" in missing.err


def test_pages_name_pages_that_exist():
    for text in TEXTS.values():
        assert set(re.findall(r"vtw docs ([a-z]+)", text)) <= set(PAGES)


def test_the_page_of_methods_has_the_table_of_today():
    assert table.markdown() in TEXTS["methods"], "paste vtwcli.methods.table.markdown() into it"
    for name in METHODS:
        assert re.search(rf"^\*\*.*`{name}`", TEXTS["methods"], flags=re.MULTILINE), (
            f"{name} has no paragraph"
        )


@pytest.fixture
def desk(tmp_path):
    """Where a reader sits: a copy of the recipes, and an environment that keeps samples few."""
    folder = tmp_path / "desk"
    folder.mkdir()
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GITHUB_STEP_SUMMARY", str(folder / "step-summary.md"))
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
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


def run_block(language, text, file):
    """What went wrong with a block, a line each."""
    if language in FILES:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text, encoding="utf-8")
        return
    if language == "python":
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        if done.returncode:
            yield f"{text}\n{done.stderr[-1500:]}"
        elif "print(" in text and not done.stdout.strip():
            yield f"{text}\nprints nothing"
        return
    for command in commands(text):
        if elsewhere(command):
            continue
        if "jq " in command and shutil.which("jq") is None:
            warnings.warn(f"jq is not installed, so this was not run: {command}", stacklevel=1)
            continue
        if "openvino" in command and find_spec("openvino") is None:
            warnings.warn(f"openvino is not installed, so this was not run: {command}", stacklevel=1)
            continue
        code, err = run(command)
        if code:
            yield f"{command}\nexit code {code}\n{err[-1500:]}"


def seen_by_git(names):
    """Those of some names in a checkout that git would not ignore."""
    if not names or shutil.which("git") is None or not (ROOT / ".git").exists():
        return []
    ignored = subprocess.run(
        ["git", "-C", ROOT, "check-ignore", "--no-index", *names], capture_output=True, text=True
    )
    return sorted(set(names) - set(ignored.stdout.split()) - {"recipes/"})


@pytest.mark.parametrize("name", TEXTS)
def test_commands_and_snippets_run(
    name, desk
):  # one test a page, because later ones use what earlier ones wrote
    found = blocks(TEXTS[name])
    shown = [block for block in found if block[0] in (*FILES, "sh", "console", "python")]
    failed = [words for block in shown for words in run_block(*block)]
    assert not failed, "\n\n".join(failed)
    assert not seen_by_git([f"{one.name}/" if one.is_dir() else one.name for one in desk.iterdir()])


@pytest.mark.parametrize("text", [text for _, kind, text, _ in EVERY if kind == "yaml"])
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


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)\)", TEXTS[name]):
        if not re.match(r"https?:", target):
            assert (FOLDERS[name] / target).exists(), target


def test_workflow_of_the_project_is_whole():
    from ruamel.yaml import YAML

    flow = YAML(typ="safe", pure=True).load(ROOT / ".github/workflows/tests.yml")
    lines = [step.get("run", "") for job in flow["jobs"].values() for step in job["steps"]]
    for wanted in ("ruff check .", "ruff format --check .", "mypy", "pytest -n auto"):
        assert wanted in lines
    assert any(line.startswith("vtw run recipes/ci.yaml --summary") for line in lines)
    assert flow["permissions"] == {"contents": "read"}
