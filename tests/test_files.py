"""Nothing half-written, nothing overwritten unasked."""

import errno
import os
import stat
from pathlib import Path

import pytest

from vtwcli.errors import UsageError, VtwError
from vtwcli.io import files, staging
from vtwcli.io.outputs import Outputs


def test_write_is_whole_or_nothing(tmp_path):
    target = tmp_path / "deep" / "result.json"
    files.write_text(target, "whole")
    assert target.read_text() == "whole"

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(VtwError, match=r"result\.json: cannot write: No space left on device"):
        files.write(target, fail)
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_exclusive_rename_replaces_nothing(tmp_path, monkeypatch, able, kind):
    """Not even an empty directory, or a link that leads nowhere; also where the system has no such rename."""
    if not able:
        monkeypatch.setattr(staging, "_renameat2", lambda *_: errno.ENOSYS)
    mine, place = tmp_path / "mine", tmp_path / "place"
    mine.mkdir() if kind == "directory" else mine.write_text("mine")
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        make(place)
        with pytest.raises(FileExistsError):
            staging.rename_new(mine, place)
        assert mine.exists() and os.path.lexists(place)
        place.rmdir() if place.is_dir() else place.unlink()
    staging.rename_new(mine, place)
    assert place.exists() and not mine.exists()


def test_interruption_leaves_nothing(tmp_path):
    def interrupt(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "result.json", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_readable_by_others(tmp_path):
    files.write_text(tmp_path / "a.txt", "x")
    plain = tmp_path / "b.txt"
    plain.write_text("x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_places_are_checked_before_the_work(tmp_path):
    taken = tmp_path / "taken.json"
    taken.write_text('{"format": "vtw-calibration"}')

    def check(path, force=False):
        Outputs({"result": path, "plot": None}, "vtw-calibration", force).check([])

    check(tmp_path / "new" / "free.json")
    check(taken, force=True)
    with pytest.raises(UsageError, match=r"taken\.json exists already"):
        check(taken)
    with pytest.raises(UsageError, match="is a directory"):
        check(tmp_path, force=True)
    with pytest.raises(UsageError, match="cannot write in"):
        check(taken / "inside.json")
