"""Results as runs of a tracker: what is logged, and that tensorboard holds it."""

import json
from importlib.util import find_spec

import pytest

from tests.cli import vtw
from vtwcli.io.track import scalars, series

DOCUMENT = {
    "format": "vtw-calibration",
    "withdrawal_layer": 9,
    "ok": True,
    "name": "text",
    "samples": [{"kl": 1.0}],
    "kl": {"mean": [0.5, None, 0.25], "samples": [[0.1, 0.2, 0.3]]},
    "cost": {"kv_ratio": 0.75, "visual_per_layer": [64, 64, 0], "interval": [0.1, 0.2]},
}


def test_numbers_and_curves_of_a_document():
    assert dict(scalars(DOCUMENT)) == {"withdrawal_layer": 9.0, "cost/kv_ratio": 0.75}
    assert dict(series(DOCUMENT)) == {"kl/mean": [0.5, None, 0.25]}


def test_an_unknown_and_an_absent_tracker_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = vtw("calibrate", "demo", "--track", "mlflow")
    assert (done.code, done.err) == (
        2, "error: --track: 'mlflow' is not a tracker\n  one of trackio, wandb, tensorboard\n",
    )  # fmt: skip
    absent = [name for name in ("trackio", "wandb") if find_spec(name) is None]
    for name in absent:
        done = vtw("calibrate", "demo", "--track", name)
        assert (done.code, done.err) == (
            2,
            f"error: --track {name}: it is not installed\n  pip install {name}\n",
        )
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_the_curve_and_the_choice(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    done = vtw("calibrate", "demo", "--limit", 2, "--bootstrap", 0, "--json", "--track", "tensorboard")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    events = EventAccumulator(str(tmp_path / "runs" / "calibration-demo"))
    events.Reload()
    assert [one.step for one in events.Scalars("kl/mean")] == list(range(12))
    assert [one.value for one in events.Scalars("kl/mean")] == pytest.approx(result["kl"]["mean"])
    assert events.Scalars("withdrawal_layer")[0].value == result["withdrawal_layer"]
