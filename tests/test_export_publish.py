"""Directories appear whole or not at all."""

from __future__ import annotations

import json

import pytest

from vtwcli.errors import UsageError, VtwError
from vtwcli.export.directory.publish import check_target, publish


def files(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def make_old(target):
    """A directory that an export might have made; gives its files."""
    target.mkdir()
    (target / "old").write_text("0")
    (target / "manifest.json").write_text(json.dumps({"format": "vtw-hf", "files": {"old": {}}}))
    return files(target.parent)


def test_new_directory_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "model"
    with publish(target, force=False) as folder:
        (folder / "a").write_text("1")
        assert folder.parent.parent.parent == target.parent and not target.exists()
    assert files(tmp_path / "deep") == {"model/a": "1"}
    assert target.stat().st_mode & 0o755 == 0o755


def test_failure_leaves_nothing_new_and_the_old(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), publish(target, force=False) as folder:
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    old = make_old(target)
    with pytest.raises(ZeroDivisionError), publish(target, force=True) as folder:
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    assert files(tmp_path) == old


def test_force_replaces_whole_directories(tmp_path):
    target = tmp_path / "model"
    make_old(target)
    with publish(target, force=True) as folder:
        (folder / "a").write_text("1")
    assert files(tmp_path) == {"model/a": "1"}


def test_existing_targets_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(UsageError, match="exists already") as caught,
        publish(tmp_path / "model", force=False),
    ):
        raise AssertionError("the block must not run")
    assert "--force" in str(caught.value.hint)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a directory"):
        check_target(tmp_path / "file", force=True)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UsageError, match="not a directory"):
        check_target(tmp_path / "link", force=True)
    with pytest.raises(UsageError, match="cannot write in"):
        check_target(tmp_path / "file" / "below", force=False)


def test_full_disk_is_one_line(tmp_path):
    with pytest.raises(VtwError, match="No space left"), publish(tmp_path / "model", force=False):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(UsageError, match="exists already"), publish(target, force=False) as folder:
        (folder / "a").write_text("1")
        target.mkdir()
        (target / "other").write_text("2")
    assert files(tmp_path) == {"model/other": "2", "model-1/a": "1"}
