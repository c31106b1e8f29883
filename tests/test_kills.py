"""Every command that writes, killed at random moments: what is there is whole, and the next run is as if nothing was.

Commands run in processes forked from one that has everything imported, so that most kills strike the work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from vtwcli.export.directory.manifest import check_files, read_manifest

DATA = ("--data", "data/rows.jsonl", "--limit", "1", "--max-new-tokens", "2")
RECIPE = """\
model: model
data: [data/rows.jsonl]
calibrate: {limit: 1, max_new_tokens: 2, bootstrap: 0, eta: 1000}
eval: {limit: 1, max_new_tokens: 2, bootstrap: 0, timing: false}
export:
"""
CALIBRATE = ("calibrate", "model", *DATA, "--bootstrap", "0", "--eta", "1000", "--output", "k.json")
COMMANDS = {
    "calibrate": CALIBRATE,
    "resume": (*CALIBRATE, "--resume"),
    "eval": (
        *("eval", "model", "--layer", "3", *DATA, "--bootstrap", "0", "--no-timing"),
        *("--output", "e.json", "--trace", "t.jsonl"),
    ),
    "analyze": ("analyze", "model", *DATA, "--output", "a.json", "--maps", "1"),
    "budget": (
        "budget",
        "model",
        *DATA,
        "--methods",
        "vtw,uniform",
        "--output",
        "b.json",
        "--max-flops",
        "1",
    ),
    "export": ("export", "model", "--layer", "3", "--dtype", "bfloat16", "--output", "out"),
    "onnx": ("export", "model", "--layer", "3", "--format", "onnx", "--output", "out"),
    "run": ("run", "r.yaml", "--output", "out"),
    "recipe": ("recipe", "init", "--output", "new.yaml"),
}
INPUTS = ("model", "data", "r.yaml")


def work(folder: str, command: tuple[str, ...]) -> None:
    """What a child does; its words go nowhere."""
    import sys

    from vtwcli.cli import main

    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    sys.argv = ["vtw", *command]
    main()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``(folder, command)`` -> a running child."""
    context = multiprocessing.get_context("forkserver")
    used = ("evaluate", "analyze", "budget", "export.hf.verify", "pipeline.plan", "pipeline.summary")
    context.set_forkserver_preload(
        ["tests.test_kills", *(f"vtwcli.{name}" for name in used), "matplotlib.figure"]
    )

    def begin(folder, command):
        process = context.Process(target=work, args=(str(folder), command))
        process.start()
        return process

    begin(tmp_path_factory.mktemp("warm"), ("--version",)).join()  # the imports are not part of any span
    return begin


@pytest.fixture(scope="module")
def prepared(tiny_dir, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_dir, folder / "model")
    shutil.copytree(data.parent, folder / "data")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


def results(folder: Path) -> dict[str, object]:
    """Everything that a command made, without what differs between equal runs."""
    found: dict[str, object] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name.split("/")[0] in INPUTS:
            continue
        found[name] = file.read_bytes()
        if file.suffix == ".json":
            found[name] = steady(json.loads(file.read_text()))
        elif file.name == "summary.md":  # has times
            found[name] = None
    return found


def steady(node: object) -> object:
    """A document without times, and without the digests of files that hold times."""
    moving = ("run", "seconds", "plan", "files", "bytes")
    if isinstance(node, dict):
        return {key: steady(value) for key, value in node.items() if key not in moving}
    return [steady(value) for value in node] if isinstance(node, list) else node


def whole(folder: Path) -> None:
    """Nothing that stands under its own name is half of something."""
    for file in folder.rglob("*.json"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            json.loads(file.read_text())
    for manifest in folder.rglob("manifest.json"):
        if not any(part.startswith(".") for part in manifest.relative_to(folder).parts):
            check_files(manifest.parent, read_manifest(manifest.parent, read_kind(manifest)))


def read_kind(manifest: Path) -> str:
    return str(json.loads(manifest.read_text())["format"])


def kill_often(name: str, times: int, seed: int, start, prepared: Path, tmp_path: Path) -> int:
    """Kill a command ``times`` times and compare; gives how many kills struck it."""
    command, chance, struck = COMMANDS[name], random.Random(f"{name} {seed}"), 0
    reference = tmp_path / "reference"
    shutil.copytree(prepared, reference)
    began = time.monotonic()
    process = start(reference, command)
    process.join(300)
    span = time.monotonic() - began
    assert process.exitcode == 0
    expected = results(reference)
    inputs = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    for turn in range(times):
        folder = tmp_path / f"turn-{turn}"
        shutil.copytree(prepared, folder)
        for _ in range(chance.choice((1, 1, 2))):  # the second may strike the tidying
            delay = chance.uniform(0, span)
            process = start(folder, command)
            process.join(delay)
            process.kill()
            process.join()
            struck += process.exitcode == -9
            whole(folder)
        told = f"{name}, seed {seed}, turn {turn}, killed after {delay:.3f} s"
        process = start(folder, command)
        process.join(300)
        complete = process.exitcode == 2  # "exists already": then all of it does
        assert process.exitcode == 0 or complete, told
        assert results(folder) == expected, told
        assert not [path for path in folder.rglob(".*") if path.name.startswith(".")], told
        for path, text in inputs.items():
            assert (folder / path.relative_to(prepared)).read_bytes() == text, told
        shutil.rmtree(folder)
    return struck


@pytest.mark.parametrize("name", ["calibrate", "export", "run"])
def test_a_few_kills(name, start, prepared, tmp_path):
    assert kill_often(name, 2, 0, start, prepared, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_many_kills(name, start, prepared, tmp_path):
    times = 5 if name == "onnx" else 30
    seed = int(time.time() // 86400)  # another one every day; a failure names it
    assert kill_often(name, times, seed, start, prepared, tmp_path) > 0
