"""``vtw export`` and ``vtw verify`` as a user meets them: messages, exit codes, JSON, and signals at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

import vtwcli
from tests.test_export_hf import calibration_result
from vtwcli import cli
from vtwcli.export.directory import push as pushing
from vtwcli.export.directory.manifest import check_files, read_manifest
from vtwcli.export.hf import export as hf
from vtwcli.export.hf.export import baked_schedule
from vtwcli.io import staging
from vtwcli.models.hub import resolve
from vtwcli.runtime.contract import TESTED
from vtwcli.schedule.schedule import Schedule

# ------------------------------------------------------------------ export


def test_layer(vtw, tiny_dir):
    code, out, err = vtw("export", tiny_dir, "--layer", 3, "--output", "pruned")
    assert (code, out) == (0, "wrote pruned\n")
    assert err == ""
    assert baked_schedule(resolve("pruned").config) == Schedule.withdraw_at(3)


def test_json_is_the_manifest(vtw, tiny_dir):
    code, out, _ = vtw("export", tiny_dir, "--layer", 3, "--output", "pruned", "--json")
    assert code == 0
    assert json.loads(out) == read_manifest(Path("pruned"))


def test_schedule_recipe_and_dtype(vtw, tiny_dir):
    Path("mine.yaml").write_text("schedule:\n  - {at: 4, action: withdraw}\n")
    Path("recipe.yaml").write_text("export: {dtype: bfloat16}  # small\n")
    code, _, err = vtw(
        "export", tiny_dir, "--schedule", "mine.yaml", "--recipe", "recipe.yaml", "--output", "pruned"
    )
    assert code == 0, err
    manifest = read_manifest(Path("pruned"))
    assert (manifest["weights"], manifest["dtype"]) == ("converted", "bfloat16")
    assert manifest["schedule"]["actions"] == [{"at": 4, "action": "withdraw"}]
    assert Path("pruned/recipe.yaml").read_text() == "export: {dtype: bfloat16}  # small\n"


def test_calibration_goes_along(vtw, tiny_dir, tmp_path):
    result = calibration_result()
    (tmp_path / "k.json").write_text(json.dumps(result))
    code, _, err = vtw("export", tiny_dir, "--calibration", "k.json", "--output", "pruned")
    assert code == 0, err
    assert json.loads(Path("pruned/calibration.json").read_text()) == result
    baked = baked_schedule(resolve("pruned").config)
    assert baked.actions == Schedule.withdraw_at(result["withdrawal_layer"]).actions


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--layer", 3], 2, "error: no output directory given\n  --output DIR\n"),
        (
            ["--output", "out"],
            2,
            "error: give exactly one of --schedule, --calibration, --layer and --method\n",
        ),
        (["--output", "out", "--layer", 9], 2, "error: --layer: 9, but "),
        (
            ["--output", "here", "--layer", 3],
            2,
            "error: here exists already\n  choose another name, or --force",
        ),
        (["--output", "out", "--layer", 3, "--dtype", "int8"], 2, "error: --dtype: input should be 'auto',"),
        (
            ["--output", "out", "--schedule", "none.yaml"],
            2,
            "error: none.yaml: cannot read the schedule: No such",
        ),
        (
            ["--output", "out", "--layer", 3, "--evaluation", "k.yaml"],
            2,
            "error: k.yaml: cannot read the evaluation result: No such",
        ),
    ],
)
def test_wrong_use_leaves_nothing(vtw, tiny_dir, tmp_path, args, code, message):
    (tmp_path / "here").mkdir()
    ended, out, err = vtw("export", tiny_dir, *args)
    assert (ended, out) == (code, "")
    assert message in err
    assert err.count("\n") <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert list((tmp_path / "here").iterdir()) == []


def test_no_model_is_exit_4(vtw):
    code, out, err = vtw("export", "./absent", "--layer", 3, "--output", "out")
    assert (code, out) == (4, "")
    assert err.startswith("error: there is no directory './absent'\n")


def test_a_calibration_without_a_layer_says_so(vtw, tiny_dir):
    Path("k.json").write_text(json.dumps({"format": "vtw-calibration", "schedule": None}))
    code, _, err = vtw("export", tiny_dir, "--calibration", "k.json", "--output", "out")
    assert code == 2
    assert err.startswith("error: k.json: nothing qualified in this calibration, so it has no schedule\n")


def test_an_export_is_exported_again_only_by_force(vtw, exported):
    """With and without --trust-remote-code, which never makes an export run its own code."""
    for trust in ([], ["--set", "model.trust_remote_code=true"]):
        code, _, err = vtw("export", exported, "--layer", 4, "--output", "again", *trust)
        assert code == 2
        assert "has a schedule baked in already\n  export the base model, or --force a new schedule\n" in err
        assert not Path("again").exists()
    code, out, _ = vtw("export", exported, "--layer", 4, "--output", "again", "--force")
    assert (code, out) == (0, "wrote again\n")
    assert read_manifest(Path("again"))["schedule"]["actions"] == [{"at": 4, "action": "withdraw"}]


def test_push_is_private_unless_public_and_for_directories_of_hugging_face(vtw, tiny_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(
        pushing, "push", lambda *given, **named: asked.append((given, named)) or "the address"
    )
    args = ("export", tiny_dir, "--layer", 3, "--push-to-hub", "me/model")
    code, out, err = vtw(*args, "--output", "pruned")
    assert (code, out, err) == (0, "wrote pruned\n", "uploaded the address\n")
    assert vtw(*args, "--output", "second", "--public")[0] == 0
    assert asked == [
        ((Path("pruned"), "me/model"), {"private": True}),
        ((Path("second"), "me/model"), {"private": False}),
    ]
    code, _, err = vtw(*args, "--output", "third", "--format", "onnx")
    assert code == 2
    assert err.startswith("error: --push-to-hub goes with --format hf only\n")
    assert not Path("third").exists()
    assert len(asked) == 2


def test_quiet_says_nothing_on_stderr(vtw, tiny_dir):
    code, out, err = vtw("export", tiny_dir, "--layer", 3, "--output", "pruned", "--quiet")
    assert (code, out, err) == (0, "wrote pruned\n", "")


# ------------------------------------------------------------------ verify


def test_verify(vtw, exported):
    code, out, err = vtw("verify", exported, "--max-new-tokens", 2, "--device", "cpu")
    assert (code, out) == (0, f"{exported}: verified\n")
    assert f"exported with {version('transformers')}, its code tested with {', '.join(TESTED)}" in " ".join(
        err.split()
    )


def test_verify_as_json_against_a_base(vtw, exported, tiny_dir):
    code, out, _ = vtw("verify", exported, "--base", tiny_dir, "--json", "--max-new-tokens", 2)
    report = json.loads(out)
    assert code == 0
    assert report["compared_with"] == str(tiny_dir)
    assert len(report["smoke"]["tokens"]) == 2


def test_verify_of_a_damaged_directory_is_exit_3(vtw, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    data = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(data)
    code, out, err = vtw("verify", "copy")
    assert (code, out) == (3, "")
    assert err.startswith("error: copy does not match its manifest: model.safetensors is changed\n")


def test_verify_of_something_else_is_exit_4(vtw, tiny_dir):
    code, out, err = vtw("verify", tiny_dir)
    assert (code, out) == (4, "")
    assert err == f"error: {tiny_dir} has no manifest.json\n  is it a directory that vtw export made?\n"


# ------------------------------------------------------------------ signals


def in_child(*args: object) -> multiprocessing.Process:
    """Start the command in a forked process, which need not import anything again."""

    def work() -> None:
        sys.argv = ["vtw", *map(str, args)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        cli.main()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_writing_leaves_nothing(tiny_dir, tmp_path, monkeypatch, number, code):
    target, seen = tmp_path / "out", tmp_path / "seen"

    def struck(folder: Path, *_: object) -> None:
        seen.write_text("\n".join(sorted(file.name for file in folder.iterdir())))
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(hf, "_check_loading", struck)
    process = in_child("export", tiny_dir, "--layer", 3, "--output", target)
    process.join(60)
    assert process.exitcode == code
    assert "model.safetensors" in seen.read_text().split()  # it was in the middle of it
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_its_code_when_a_library_fails_under_it(tiny_dir, tmp_path, monkeypatch, number, code):
    def struck(*_: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            raise RuntimeError("pop from an empty stack")

    monkeypatch.setattr(hf, "_check_loading", struck)
    process = in_child("export", tiny_dir, "--layer", 3, "--output", tmp_path / "out")
    process.join(60)
    assert process.exitcode == code
    assert list(tmp_path.iterdir()) == []


def test_an_early_interrupt_shows_no_traceback(monkeypatch, capfd):
    monkeypatch.setattr(cli, "build", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    process = in_child("families")
    process.join(60)
    assert process.exitcode == 130
    assert capfd.readouterr().err == "interrupted\n"


def test_a_second_signal_waits_for_the_tidying(tiny_dir, tmp_path, monkeypatch):
    left = [signal.SIGTERM]
    remove = shutil.rmtree

    def struck(*args: object, **options: object) -> None:
        if left:
            os.kill(os.getpid(), left.pop())
        remove(*args, **options)

    monkeypatch.setattr(staging.shutil, "rmtree", struck)
    monkeypatch.setattr(hf, "_check_loading", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    process = in_child("export", tiny_dir, "--layer", 3, "--output", tmp_path / "out")
    process.join(60)
    assert process.exitcode == 143
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_replacing_leaves_the_old(exported, tiny_dir, tmp_path, monkeypatch):
    target = tmp_path / "out"
    shutil.copytree(exported, target)
    monkeypatch.setattr(hf, "_check_loading", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    process = in_child("export", tiny_dir, "--layer", 2, "--output", target, "--force")
    process.join(60)
    assert process.exitcode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_files(target, read_manifest(target))
    assert read_manifest(target)["schedule"]["actions"] == [{"at": 3, "action": "withdraw"}]


def test_sigterm_at_any_moment_leaves_nothing_or_the_whole(tiny_dir, tmp_path):
    target = tmp_path / "out"
    arguments = ("export", tiny_dir, "--layer", 3, "--dtype", "bfloat16", "--output", target)
    began = time.monotonic()
    process = in_child(*arguments)
    process.join()
    span = time.monotonic() - began
    assert process.exitcode == 0
    shutil.rmtree(target)
    codes = set()
    for step in range(1, 11):
        process = in_child(*arguments)
        process.join(span * step / 9)
        process.terminate()
        process.join(60)
        codes.add(process.exitcode)
        assert process.exitcode in (0, 143)
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if target.exists() else [])
        if target.exists():
            check_files(target, read_manifest(target))
            shutil.rmtree(target)
    assert 143 in codes


def test_trust_remote_code_does_not_prune_an_export_that_is_measured(exported, tiny_dir):
    trusted, plain = vtwcli.load(str(exported), trust_remote_code=True), vtwcli.load(str(tiny_dir))
    assert type(trusted.model) is type(plain.model)
    assert getattr(trusted.model, "vtw_pruning", None) is None
