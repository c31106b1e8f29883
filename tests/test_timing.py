"""Timing in rounds and batches: what is said of made-up times, and the structure of what small runs measure."""

from __future__ import annotations

import json
from itertools import product
from math import comb

import pytest
import torch

from tests.cli import vtw
from tests.test_evaluate import options
from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.evaluate import evaluate
from vtwcli.io import files
from vtwcli.judge.flops import TextShape
from vtwcli.judge.statistics import FEWEST, beyond_noise, median_interval, speed_up
from vtwcli.machine.memory import is_out_of_memory
from vtwcli.measure import timing
from vtwcli.models.inputs import encode_batch, visual_mask
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import EvalSection, ModelSection
from vtwcli.report import evaluation as report_eval
from vtwcli.report.speed import ratio, throughput_table
from vtwcli.results.reading import read_evaluation
from vtwcli.schedule.schedule import Schedule

K = 3
MUTE = Schedule.from_dict({"actions": [{"at": 1, "until": 5, "action": "mute", "readers": "text"}]})
SCHEDULES = [("K=3", Schedule.withdraw_at(K)), ("mute", MUTE)]


# ------------------------------------------------------------------ the interval, and what is said of it


@pytest.mark.parametrize("count", range(1, 13))
def test_the_interval_holds_the_median_as_often_as_it_says(count):
    """Of all ways in which values can fall above and below the median of their population, by counting them."""
    values = list(range(count))
    found = median_interval(values)
    assert (found is None) == (count < FEWEST)
    if found is None:
        return
    low, high = found
    assert low + high == count - 1

    def outside(place):  # values number 0..place, or as many from the top, all on one side of the median
        sides = product((0, 1), repeat=count)
        return sum(sum(side) <= place or sum(side) >= count - place for side in sides) / 2**count

    assert outside(low) <= 0.05 < outside(low + 1)
    assert outside(low) == pytest.approx(2 * sum(comb(count, i) for i in range(low + 1)) / 2**count)


def rounds(ratios, first=1.0, more=0.5):
    """Times of the full model, and of a schedule that takes them divided by ``ratios``."""
    return {
        "full": [(first, first + more)] * len(ratios),
        "K=3": [(first / one, (first + more) / one) for one in ratios],
    }


def test_drifts_of_the_machine_are_no_difference():
    drifting = [1.0, 1.5, 2.0, 4.0, 3.0, 1.0, 1.2]
    found = speed_up(drifting, [seconds / 2 for seconds in drifting])
    assert (found["ratio"], found["interval"]) == (2, [2, 2])
    assert ratio(found) == "2.00x [2.00, 2.00]"


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([2.13, 1.02, 2.15, 0.95, 2.4, 0.97], "noise"),  # one outlier a side is not told from a difference
        ([1.1, 1.2, 1.3, 1.15, 1.25, 1.2], "1.20x [1.10, 1.30]"),
        ([0.9, 0.8, 0.85, 0.9, 0.9, 0.8], "0.88x [0.80, 0.90]"),  # slower is a difference too
        ([1.0, 1.2, 1.3, 1.2, 1.2, 1.2], "noise"),
        ([1.2, 1.3, 0.4, 1.2, 1.25, 1.2, 1.2, 9.0, 1.3], "1.20x [1.20, 1.30]"),  # nine bear an outlier a side
        ([2.0, 2.0, 2.0, 2.0, 2.0], "-"),  # five rounds cannot tell
    ],
)
def test_a_ratio_is_told_only_where_it_is_a_difference(ratios, said):
    found = timing.latencies(rounds(ratios), 9, ["K=3"])["K=3"]["speed_up"]
    assert ratio(found) == said
    assert beyond_noise(found) == said.endswith("]")


def test_rates_and_speed_ups_of_a_batch():
    timed = {"full": [(1.0, 5.0)] * 6, "K=3": [(0.5, 1.5)] * 6, "other": [(0.5, 2.0)] * 6}
    found = timing.throughput(timed, 8, 5, {"full": 30, "K=3": 20, "other": 25}, ["K=3"])
    assert found["full"] == {
        "batch": 8,
        "tokens_per_second": {"median": 8.0, "iqr": [8.0, 8.0]},
        "decode_tokens_per_second": {"median": 8.0, "iqr": [8.0, 8.0]},
        "cache_bytes": 30,
    }
    assert found["K=3"]["tokens_per_second"]["median"] == pytest.approx(8 * 5 / 1.5)
    assert found["K=3"]["decode_tokens_per_second"]["median"] == 32
    assert found["K=3"]["speed_up"]["ratio"] == pytest.approx(5 / 1.5)
    assert found["K=3"]["decode_speed_up"] == {"ratio": 4, "interval": [4, 4]}
    assert found["other"]["cache_bytes"] == 25 and "speed_up" not in found["other"]


def test_rounds_are_interleaved_and_begin_with_each_variant():
    called = []

    def timer(name, prompt):
        def run(tokens):
            called.append((name, prompt, tokens))
            return float(len(called)), float(len(called) + 1)

        return run

    prompts = [{name: timer(name, prompt) for name in ("full", "a", "b")} for prompt in range(2)]
    found = timing.rounds(prompts, 6, 9)
    assert {len(row) for row in found.values()} == {6} and len(called) == 3 * 7
    assert all(tokens == 9 for _, _, tokens in called)
    assert min(first for row in found.values() for first, _ in row) == 4  # the first round warms up
    counted = [called[at : at + 3] for at in range(3, 21, 3)]
    assert all({name for name, _, _ in row} == {"full", "a", "b"} for row in counted)
    assert [{prompt for _, prompt, _ in row} for row in counted] == [{0}, {1}] * 3
    starts = {(row[0][0], row[0][1]) for row in counted}
    assert starts == {(name, prompt) for name in ("full", "a", "b") for prompt in range(2)}


# ------------------------------------------------------------------ small runs


@pytest.fixture(scope="module")
def timed(tiny_dir, data):
    return evaluate(
        ModelSection(name=str(tiny_dir)),
        SCHEDULES,
        [DataSpec(source=str(data))],
        options(timing=True, repeats=6, timing_tokens=2, timing_batch=(7, 1, 3)),
    )


def test_batches_in_the_document_and_back_from_a_file(timed, tmp_path):
    result, _ = timed
    latency = result["run"]["latency"]
    assert result["options"]["timing_batch"] == [7, 1, 3]
    assert "batches_left_out" not in result["run"]
    for name in ("full", "K=3", "mute"):
        assert [row["batch"] for row in latency[name]["batches"]] == [1, 3, 7]
        assert ("speed_up" in latency[name]) == (name != "full")
        for row in latency[name]["batches"]:
            assert row["tokens_per_second"]["median"] > 0 and row["decode_tokens_per_second"]["median"] > 0
            assert ("speed_up" in row) == ("decode_speed_up" in row) == (name != "full")
    (tmp_path / "e.json").write_text(files.document(result))
    assert read_evaluation(tmp_path / "e.json") == json.loads(json.dumps(result))


def test_peak_cache_is_that_of_a_slow_count(timed, tiny_dir):
    """Entries of each row of each layer, one by one: of a batch whose prompts differ in length, and its answers."""
    result, samples = timed
    loaded = load(str(tiny_dir))
    shape = TextShape.from_config(loaded.model.config)
    for place, size in enumerate([1, 3, 7]):
        batch = encode_batch(loaded, [samples[i % len(samples)] for i in range(size)])
        visual = visual_mask(batch["input_ids"], loaded.placeholder_ids)
        width = batch["input_ids"].shape[1]
        longest = int((batch["attention_mask"].bool() & ~visual).sum(1).max())
        for name, pruned in (("full", False), ("K=3", True), ("mute", False)):
            count = 0
            for layer in range(shape.layers):
                for _ in range(size):
                    for _ in range((longest if pruned and layer >= K else width) + 2):
                        count += 2 * shape.kv_heads * shape.head_dim * 4
            assert result["run"]["latency"][name]["batches"][place]["cache_bytes"] == count, (name, size)


def test_views_of_batches(timed):
    result, samples = timed
    header, rows = throughput_table(result)
    assert header == [
        "schedule", "batch", "tokens/s", "decode tokens/s", "peak cache", "speed-up", "decode speed-up"
    ]  # fmt: skip
    assert [row[:2] for row in rows] == [
        [name, size] for size in ("1", "3", "7") for name in ("full", "K=3", "mute")
    ]
    assert report_eval.tables(result)[-1] == (header, rows)
    for view in (report_eval.markdown(result), report_eval.html_report(result, samples)):
        assert "decode tokens/s" in view and "peak cache" in view


def test_noise_is_told_with_both_numbers(timed):
    result = json.loads(json.dumps(timed[0]))
    for row in result["run"]["latency"].values():
        row["speed_up"] = {"ratio": 2.0, "interval": [1.9, 2.1]}
        for one in row["batches"]:
            one["speed_up"] = {"ratio": 1.02, "interval": [0.9, 2.15]}
            one["decode_speed_up"] = {"ratio": 1.5, "interval": None}
    one, full = (result["run"]["latency"][name]["batches"][1] for name in ("K=3", "full"))
    one["tokens_per_second"] = {"median": 20.5, "iqr": [20, 21]}
    full["tokens_per_second"] = {"median": 120, "iqr": [110, 130]}
    rows = {(row[0], row[1]): row for row in throughput_table(result)[1]}
    assert rows["K=3", "3"][-2:] == ["noise", "-"]
    said = report_eval.sentences(result)
    [noise] = [words for words in said if words.startswith("No difference beyond noise: ")]
    assert "tokens/s of K=3 at batch 3, 20.5 ±0.5 against 120 ±10 (ratio 0.90 to 2.15)" in noise
    assert "TTFT" not in noise
    assert any(words.startswith(f"Fewer than {FEWEST} rounds") for words in said)


def test_single_prompts_alone_show_no_further_table(tiny_dir, data):
    assert EvalSection().timing_batch == (1,) and EvalSection().repeats >= FEWEST
    result, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))],
        options(limit=1, timing=True, repeats=1, timing_tokens=1),
    )  # fmt: skip
    assert [row["batch"] for row in result["run"]["latency"]["full"]["batches"]] == [1]
    assert throughput_table(result)[1] == [] and len(report_eval.tables(result)) == 3
    assert report_eval.cost_table(result)[1][1][-1] == "-"  # one round


def test_a_batch_without_room_is_left_out(tiny_dir, data, monkeypatch, capsys):
    monkeypatch.setattr(timing, "memory_available", lambda device: 1000)  # bytes that the machine has left
    result, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))],
        options(limit=1, timing=True, repeats=1, timing_tokens=1, timing_batch=(1, 2, 4)),
    )  # fmt: skip
    run = result["run"]
    assert run["batches_left_out"] == [2, 4]
    assert [row["batch"] for row in run["latency"]["K=3"]["batches"]] == [1]
    assert "warning: a batch of 2 does not fit in memory, so it is not timed\n" in capsys.readouterr().err
    assert "Batches that do not fit in memory: 2, 4." in report_eval.sentences(result)


def test_refused_memory_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) + torch.zeros(3)
    assert not is_out_of_memory(caught.value)


def test_two_engines_stand_side_by_side(exports, data):
    graphs, base = exports("split")[0], exports.model("split")
    result, _ = evaluate(
        ModelSection(name=str(graphs)), [], [DataSpec(source=str(data))],
        options(limit=1, baseline=str(base), timing=True, repeats=6, timing_tokens=1, timing_batch=(2,)),
    )  # fmt: skip
    latency = result["run"]["latency"]
    assert "speed_up" not in json.dumps(latency)
    assert report_eval.cost_table(result)[0][-1] == "ideal"
    header, rows = throughput_table(result)
    assert header[-1] == "peak cache" and [row[0] for row in rows] == ["full", "exported"]
    said = report_eval.sentences(result)
    assert any("two engines, whose ratio is no speed-up of pruning" in words for words in said)
    full, pruned = (latency[name]["batches"][0]["cache_bytes"] for name in ("full", "exported"))
    wanted, _ = evaluate(
        ModelSection(name=str(base)), [("K=1", Schedule.withdraw_at(1))], [DataSpec(source=str(data))],
        options(limit=1, timing=True, repeats=1, timing_tokens=1, timing_batch=(2,)),
    )  # fmt: skip
    torch_sizes = wanted["run"]["latency"]
    assert full == torch_sizes["full"]["batches"][0]["cache_bytes"]
    assert pruned == torch_sizes["K=1"]["batches"][0]["cache_bytes"] < full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows["K=3"]["batches"].pop(), "run.latency.K=3.batches: not each size once, in order"),
        (lambda rows: [row["batches"].reverse() for row in rows.values()], "not each size once, in order"),
        (lambda rows: rows["full"]["batches"][0].pop("cache_bytes"), "cache_bytes"),
        (lambda rows: rows["K=3"]["speed_up"].update(ratio=0), "ratio"),
        (lambda rows: rows["K=3"]["speed_up"].update(interval=[1.0]), "interval"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(timed, tmp_path, change, message):
    document = json.loads(json.dumps(timed[0]))
    change(document["run"]["latency"])
    (tmp_path / "e.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=message):
        read_evaluation(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [("1,0", "--timing-batch: input should be greater than or equal to 1"), ("1,x", "--timing-batch")],
)
def test_sizes_that_are_none(tiny_dir, data, given, message):
    done = vtw("eval", tiny_dir, "--layer", 3, "--data", data, "--timing-batch", given, "--json")
    assert done.code == 2 and f"error: {message}" in done.err and done.out == ""
