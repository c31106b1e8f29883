"""The exit by attention, fitted: what it proposes, and where samples leave beside the fixed layer; slow references."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import DAY
from vtwcli.calibrate import calibrate
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.judge.flops import TextShape, prefill_cost
from vtwcli.methods.exits import Exit, label_of
from vtwcli.methods.method import Alone, Answers, Candidate, Shape
from vtwcli.models.inputs import encode_batch
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import CalibrateSection, ModelSection
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule

FAST = {"limit": 3, "max_new_tokens": 3, "bootstrap": 0}


def leaves(rule, read):
    """The rule of the runtime, layer by layer."""
    count = 0
    for layer in range(0 if rule.after is None else rule.after + 1, len(read) - 1):
        count = count + 1 if read[layer] < rule.threshold else 0 if rule.consecutive else count
        if count == rule.exit_layers:
            return layer + 1
    return len(read)


@pytest.mark.parametrize("consecutive", [False, True])
def test_where_samples_leave_and_what_each_bears(consecutive):
    generator = np.random.default_rng(DAY)
    read = generator.random((40, 9)).round(2)
    for after in (None, 0, 3, 6):
        for count in (1, 2, 4, 9):
            for threshold in (0, 0.3, 0.7, 1):
                rule = Exit(threshold=threshold, exit_layers=count, consecutive=consecutive, after=after)
                assert rule.leaves(read).tolist() == [leaves(rule, row) for row in read]
            for row in read:
                label = int(generator.integers(0, 10))
                most = rule.bearable(row.tolist(), label)
                earliest = leaves(rule.model_copy(update={"threshold": 1.0}), row)
                assert leaves(rule.model_copy(update={"threshold": most}), row) >= min(label, 9) or most == 1
                if most < 1:
                    assert leaves(rule.model_copy(update={"threshold": most + 1e-9}), row) < label
                else:
                    assert earliest >= label


def test_a_label_is_where_a_samples_own_curve_stays_down():
    assert label_of([9, 1, 0.1, 2, 0.1, 0.1], 0.5) == 4
    assert label_of([0.1, 0.1], 0.5) == 0 and label_of([0.1, 0.1], 0.5, 1) == 1 and label_of([0, 1], 0.5) == 2


def test_attention_that_tells_is_used():
    """Half of the samples need vision up to layer 3 and half up to 7, and their attention says so."""
    samples = []
    for number in range(40):
        need = 3 if number % 2 else 7
        read = [0.8 if layer < need - 1 else 0.1 for layer in range(10)]
        samples.append(Alone("ab"[number % 4 // 2], [1.0] * need + [0.0] * (10 - need), read))
    curve = np.mean([one.kl for one in samples], 0).tolist()
    found = Answers(curve, {"a": curve, "b": curve}, [], 0.01, True, samples=samples)
    made = Exit.candidates(Shape(10), found, {})
    best = made[-1].parameters  # the only one at which nobody loses anything and somebody leaves
    assert 0.1 < best["threshold"] <= 0.8
    at = Exit(**best).leaves(np.array([one.read for one in samples]))
    assert at.tolist() == [3 if number % 2 else 7 for number in range(40)]
    assert all(one.parameters["after"] >= 2 for one in Exit.candidates(Shape(10, 4), found, {}))
    assert all(
        one.schedule.actions[0].when.consecutive
        for one in Exit.candidates(Shape(10), found, {"consecutive": True})
    )


def test_a_guarantee_begins_where_nobody_can_leave_early():
    parameters = [(1, 1, 2), (0.5, 1, None), (0.9, 2, 1), (0.1, 4, None), (1, 1, 4)]  # the cheapest first
    front = [
        Candidate(str(i), "exit", Schedule(), {"threshold": t, "exit_layers": m, "after": after})
        for i, (t, m, after) in enumerate(parameters)
    ]
    assert [one.name for one in Exit.safest_first(front)] == ["4", "3", "2", "0", "1"]


def run(model, data, **given):
    return calibrate(
        ModelSection(name=str(model)), [DataSpec(source=str(data))], CalibrateSection(**FAST | given)
    )


def by_the_runtime(model, data, schedule, ids):
    """Layer at which each sample's tokens leave, its FLOPs and cache as shares of all, one forward pass each."""
    loaded = load(str(model))
    shape = TextShape.from_config(loaded.model.config)
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    samples = {sample.id: sample for sample in mix.samples}
    layers, spent, entries = [], np.zeros(2), np.zeros(2)
    for name in ids:
        batch = encode_batch(loaded, [samples[name]])
        with torch.no_grad(), pruned(loaded.model, Schedule.from_dict(schedule)) as handle:
            loaded.model(**batch)
        [one] = handle.trace.samples
        layers.append(6 if one.actions[0].layer is None else one.actions[0].layer)
        tokens = [one.text + visual for visual in one.visual_per_layer]
        full = [one.text + one.visual] * 6
        spent += prefill_cost(shape, tokens, "flops"), prefill_cost(shape, full, "flops")
        entries += sum(tokens), sum(full)
    return layers, spent[0] / spent[1], entries[0] / entries[1]


@pytest.mark.parametrize(
    "given", [{"eta": 0.05}, {"eta": 0.02}, {"policy": "agreement"}, {"policy": "paper", "eta": 0.05}]
)
def test_every_sample_leaves_where_the_runtime_lets_it(tiny_dir, data, given):
    """Layer, label, savings and fixed layer of a calibration, against forward passes and VTW's own calibration."""
    found, plain = run(tiny_dir, data, method="exit", **given), run(tiny_dir, data, **given)
    exits = found["exits"]
    layers, flops, entries = by_the_runtime(
        tiny_dir, data, found["schedule"], [one["id"] for one in exits["samples"]]
    )
    assert len(set(layers)) > 2  # what is compared is worth it
    assert [one["layer"] for one in exits["samples"]] == layers
    assert exits["leave"] == [layers.count(k) / 6 for k in range(7)]
    assert exits["mean_layer"] == pytest.approx(sum(layers) / 6)
    assert exits["chosen"]["flops_ratio"]["flops"] == pytest.approx(flops)
    assert exits["chosen"]["kv_ratio"] == pytest.approx(entries)
    curves = dict(zip([one["id"] for one in plain["samples"]], plain["kl"]["samples"], strict=True))
    for one in exits["samples"]:
        up = [k for k in range(1, 6) if curves[one["id"]][k] > found["eta"]]
        assert one["label"] == max(up, default=0) + 1
    kl = [[*curves[one["id"]], 0.0][one["layer"]] for one in exits["samples"]]
    assert exits["chosen"]["kl"] == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
    k = plain["withdrawal_layer"]
    assert (exits["fixed"] or {"layer": None})["layer"] == k
    if k is not None:
        assert exits["fixed"]["kl"] == pytest.approx(plain["kl"]["mean"][k], rel=1e-3, abs=1e-6)
        assert exits["fixed"]["flops_ratio"]["flops"] == pytest.approx(plain["cost"]["flops_ratio"]["flops"])
        assert exits["fixed"]["kv_ratio"] == pytest.approx(plain["cost"]["kv_ratio"])


@pytest.mark.parametrize("loss", ["answer", "metric"])
def test_a_promised_exit_and_the_fixed_layer_stand_on_the_same_samples(tiny_dir, data, loss):
    wanted = {"policy": "guarantee", "risk": 0.9, "confidence": 0.75, "loss": loss}
    found, plain = run(tiny_dir, data, method="exit", **wanted), run(tiny_dir, data, **wanted)
    said, exits = found["guarantee"], found["exits"]
    assert (said["ordered_on"], said["samples"]) == ({"colour": 1, "caption": 1}, {"colour": 2, "caption": 2})
    tested = [one["id"] for one in exits["samples"]]
    layers, flops, _ = by_the_runtime(tiny_dir, data, found["schedule"], tested)
    assert len(tested) == 4 and [one["layer"] for one in exits["samples"]] == layers
    assert exits["chosen"]["flops_ratio"]["flops"] == pytest.approx(flops)
    held = [one["candidate"] for one in said["tested"] if one["holds"]]
    assert found["chosen"] in held
    if loss == "answer":
        ids = [one["id"] for one in plain["samples"]]
        changed = np.array(plain["agreement"]["samples"])[[ids.index(name) for name in tested]] < 1
        tasks = np.array([one["task"] for one in exits["samples"]])
        k = 6  # with two samples of a task at this risk and confidence one may lose, (1 - 0.9^2) < 0.25
        while k > 1 and all(changed[tasks == task, k - 1].sum() < 2 for task in set(tasks)):
            k -= 1
        assert exits["fixed"]["layer"] == k


def test_views_say_where_samples_leave(vtw, tiny_dir, data):
    args = ("calibrate", tiny_dir, "--data", data, "--limit", 3, "--max-new-tokens", 3, "--method", "exit")
    code, out, err = vtw(*args, "--eta", 0.02, "--output", "e.json", "--plot", "e.svg")
    assert code == 0, err
    exits, words = json.loads(Path("e.json").read_text())["exits"], " ".join(out.split())
    fixed = exits["fixed"]
    before, behind = sum(exits["leave"][: fixed["layer"]]), sum(exits["leave"][fixed["layer"] + 1 :])
    assert f"Samples leave at layer {exits['mean_layer']:.3g} of 6 on average" in words
    assert (
        f"{before:.1%} before and {behind:.1%} behind the fixed K = {fixed['layer']} of the same policy"
        in words
    )
    assert (
        f"against {fixed['flops_ratio']['flops']:.1%} and {fixed['kv_ratio']:.1%} of K, on these samples"
        in words
    )
    assert "layer samples leave own KL stays under eta" in words and "<- fixed K of this policy" in words
    drawn = Path("e.svg").read_text()
    assert all(text in drawn for text in ("where samples leave", "visual tokens leave at layer", "never"))
    code, out, err = vtw(*args, "--policy", "agreement", "--output", "a.json")
    assert code == 0 and "among fixed layers none qualifies on these samples" in " ".join(out.split()), err
    code, out, err = vtw(*args, "--policy", "budget", "--budget", 0.8, "--output", "b.json")
    assert "All samples leave at layer 1, the fixed K of the same policy on these samples" in " ".join(
        out.split()
    )
