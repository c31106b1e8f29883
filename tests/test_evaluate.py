"""Evaluation on a tiny model: agreement numbers against the slow reference, gates, views, and the files."""

import json
import re

import numpy as np
import pytest
import torch

from tests import reference
from tests.cli import launch
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.evaluate import evaluate
from vtwcli.judge.flops import TextShape, kv_bytes, prefill_ratio, tokens_with_withdrawal
from vtwcli.judge.gates import sentence
from vtwcli.measure.costs import peak_of
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import EvalSection, GatesSection, ModelSection
from vtwcli.report import evaluation as report_eval
from vtwcli.schedule.schedule import Schedule

K = 3
SCHEDULES = [("K=3", Schedule.withdraw_at(K)), ("never", Schedule.withdraw_at(6))]


def options(**given):
    return EvalSection(**{"limit": 3, "max_new_tokens": 4, "timing": False, "bootstrap": 50, **given})


@pytest.fixture(scope="module")
def evaluated(tiny_dir, data):
    return evaluate(
        ModelSection(name=str(tiny_dir)),
        SCHEDULES,
        [DataSpec(source=str(data))],
        options(),
        limits=GatesSection(max_kl=1e-4, max_drop=0.5),
    )


def test_answers_and_kl_are_those_of_the_slow_reference(evaluated, tiny_dir, data):
    result, _ = evaluated
    loaded = load(str(tiny_dir))
    model, decode = loaded.model, loaded.processor.tokenizer.decode
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    for sample, row in zip(mix.samples, result["samples"], strict=True):
        batch = encode(loaded, sample).inputs
        full, at_full = reference.greedy(model, batch, 6, 4)
        pruned, _ = reference.greedy(model, batch, K, 4)
        ids = full[0].tolist()
        length = next((i + 1 for i, token in enumerate(ids) if token == 2), 4)
        assert row["full"] == decode(ids[:length], skip_special_tokens=True).strip()
        said = pruned[0].tolist()
        stop = next((i + 1 for i, token in enumerate(said) if token == 2), 4)
        assert row["pruned"]["K=3"]["answer"] == decode(said[:stop], skip_special_tokens=True).strip()
        forced = encode(loaded, sample, full[0, : length - 1]).inputs
        hidden = reference.withdrawal(model, reference.visual_mask(model, forced["input_ids"]), K)
        p = reference.logits(model, forced, hidden)[0, -length:].double().log_softmax(-1)
        q = at_full[0, :length].double().log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1)
        np.testing.assert_allclose(row["pruned"]["K=3"]["kl"], expected, rtol=1e-3, atol=1e-6)
        differs = [i for i, (a, b) in enumerate(zip(ids[:length], said[:stop], strict=False)) if a != b]
        assert row["pruned"]["K=3"]["first_divergence"] == (differs[0] if differs else None)


def test_never_withdrawing_changes_nothing(evaluated):
    row = evaluated[0]["schedules"]["never"]
    assert row["kl_first"] == row["kl_answer"] == 0
    assert row["top1_agreement"] == row["exact_sequences"] == 1
    assert row["cost"]["kv_ratio"] == row["cost"]["flops_ratio"]["flops"] == 1


def test_costs(evaluated, tiny_dir):
    result, _ = evaluated
    cost = result["schedules"]["K=3"]["cost"]
    shape = TextShape.from_config(load(str(tiny_dir)).model.config)
    text = int(cost["text_tokens"])
    assert cost["visual_tokens"] == 9
    assert cost["flops_ratio"]["macs-2mlp"] == pytest.approx(
        prefill_ratio(shape, text, 9, K, "macs-2mlp"), rel=0.02
    )
    assert cost["kv_bytes"]["measured"] == cost["kv_bytes"]["computed"]
    assert cost["kv_bytes"]["full_measured"] == cost["kv_bytes"]["full_computed"]
    assert cost["kv_bytes"]["computed"] == kv_bytes(shape, tokens_with_withdrawal(6, text, 9, K), 4)


def test_gates(evaluated):
    gates = {(gate["schedule"], gate["gate"]): gate for gate in evaluated[0]["gates"]}
    assert not gates["K=3", "max_kl"]["passed"]
    assert gates["never", "max_kl"]["passed"]
    assert gates["K=3", "max_drop"]["passed"]
    assert gates["never", "max_drop"]["found"] == 0
    words = sentence(gates["K=3", "max_kl"])
    assert re.fullmatch(r"gate max_kl FAILED: K=3: mean KL 0\.\d+, allowed 0\.0001", words)


def test_views_hold_the_numbers(evaluated, tmp_path):
    result, samples = evaluated
    text = report_eval.markdown(result)
    assert "| colour | 3 | K=3 |" in text
    assert "Metrics: exact_match for colour, caption." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {len(header) + 1 for header, _ in report_eval.tables(result)}
    assert f"{result['schedules']['K=3']['kl_answer']:.2e}" in text
    page = report_eval.html_report(result, samples)
    different = sum(row["pruned"]["K=3"]["first_divergence"] is not None for row in result["samples"])
    assert f"K=3: {different} of 6 answers differ" in page
    assert page.count("<article>") == page.count("data:image/png;base64,") - 1 == different  # and the plot
    opening = page[: page.index("<table>")]  # a sentence for each schedule and the picture come first
    assert all(f"<li>{name}: " in opening for name in result["schedules"]) and "<img" in opening
    assert f"mean KL {result['schedules']['K=3']['kl_answer']:.2g} nats" in opening
    assert (
        result["schedules"]["never"]["worst_difference"] == 0
        and "never: no task&#x27;s score falls" in opening
    )
    assert "http" not in page
    report_eval.plot_quality(result, tmp_path / "plot.svg")
    assert "K=3" in (tmp_path / "plot.svg").read_text()
    json.dumps(result)


def test_page_escapes_what_people_wrote(evaluated):
    result, samples = evaluated
    row = {**result["samples"][0], "question": "<script>alert(1)</script>"}
    row["pruned"] = {name: {**one, "first_divergence": 0} for name, one in row["pruned"].items()}
    page = report_eval.html_report({**result, "samples": [row, *result["samples"][1:]]}, samples)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_batch_size_does_not_matter(evaluated, tiny_dir, data):
    other, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES, [DataSpec(source=str(data))], options(batch_size=1)
    )
    for a, b in zip(evaluated[0]["samples"], other["samples"], strict=True):
        assert a["full"] == b["full"]
        assert a["pruned"]["K=3"]["answer"] == b["pruned"]["K=3"]["answer"]
        torch.testing.assert_close(
            torch.tensor(a["pruned"]["K=3"]["kl"]),
            torch.tensor(b["pruned"]["K=3"]["kl"]),
            rtol=1e-2,
            atol=1e-5,
        )


def test_timing_is_reported(tiny_dir, data):
    result, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))],
        options(limit=1, timing=True, repeats=2, timing_tokens=2),
    )  # fmt: skip
    for name in ("full", "K=3"):
        assert result["run"]["latency"][name]["ttft"]["median"] > 0
        assert len(result["run"]["latency"][name]["tpot"]["iqr"]) == 2


def test_memory_of_each_variant_is_measured(tiny_dir, data):
    result, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))],
        options(limit=1, timing=True, repeats=1, timing_tokens=1),
    )  # fmt: skip
    memory = result["run"]["memory"]
    assert set(memory) == {"full", "K=3"}
    for row in memory.values():
        assert row["device"] is None  # no CUDA here
        assert row["resident"] is None or row["resident"] >= 0


def test_peak_memory_is_that_of_the_work():
    held = []

    def work():
        held.append(torch.ones(8 << 20))  # 32 MiB, kept
        torch.ones(16 << 20).sum()  # 64 MiB, gone again

    found = peak_of(work, torch.device("cpu"))
    assert found["device"] is None
    if found["resident"] is not None:
        assert 90 << 20 < found["resident"] < 140 << 20


def without_run(result):
    return {key: value for key, value in result.items() if key != "run"}


def test_same_seed_same_document(evaluated, tiny_dir, data):
    again, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES, [DataSpec(source=str(data))], options(),
        limits=GatesSection(max_kl=1e-4, max_drop=0.5),
    )  # fmt: skip
    assert json.dumps(without_run(again)) == json.dumps(without_run(evaluated[0]))
    other, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES, [DataSpec(source=str(data))], options(seed=1, limit=2)
    )
    one, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES, [DataSpec(source=str(data))], options(seed=0, limit=2)
    )
    assert [row["id"] for row in other["samples"]] != [row["id"] for row in one["samples"]]


def test_calibrated_samples_are_left_out(tiny_dir, data):
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    calibration = {"samples": [{"fingerprint": mix.fingerprints[0]}, {"fingerprint": mix.fingerprints[4]}]}
    result, samples = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))], options(),
        calibration=calibration,
    )  # fmt: skip
    left = [sample.id for i, sample in enumerate(mix.samples) if i not in (0, 4)]
    assert [sample.id for sample in samples] == [row["id"] for row in result["samples"]] == left
    assert result["left_out"] == 2


def test_a_task_that_is_all_calibrated_on_is_told(tiny_dir, data, capsys):
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    found = [
        {"fingerprint": content}
        for sample, content in zip(mix.samples, mix.fingerprints, strict=True)
        if sample.task == "colour"
    ]
    result, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))], options(),
        calibration={"samples": found},
    )  # fmt: skip
    assert list(result["tasks"]) == ["caption"]
    assert "no samples besides those to leave out for colour" in capsys.readouterr().err
    everything = {"samples": [{"fingerprint": content} for content in mix.fingerprints]}
    with pytest.raises(NotFoundError, match="all 6 samples are among those to leave out"):
        evaluate(
            ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))], options(),
            calibration=everything,
        )  # fmt: skip


def test_a_schedule_that_was_calibrated_on_these_samples_is_noticed(tiny_dir, data, capsys):
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    schedule = Schedule.withdraw_at(K, data=[mix.sources[0]["fingerprint"]])
    model, specs = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))]
    evaluate(model, [("mine", schedule)], specs, options())
    assert "schedule mine was calibrated on these very samples" in capsys.readouterr().err
    evaluate(model, [("mine", schedule)], specs, options(limit=2))
    assert "calibrated" not in capsys.readouterr().err


def test_resume_recomputes_only_what_is_missing(evaluated, tiny_dir, data, tmp_path, monkeypatch):
    import vtwcli.evaluate as module

    model, specs, state = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], tmp_path / "state"
    small = options(batch_size=2)
    real, calls = module.full_answers, []

    def interrupted(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*given)

    whole, _ = evaluate(model, SCHEDULES, specs, small)
    monkeypatch.setattr(module, "full_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, SCHEDULES, specs, small, state=state)
    calls.clear()

    def counting(*given):
        calls.append(1)
        return real(*given)

    monkeypatch.setattr(module, "full_answers", counting)
    resumed, _ = evaluate(model, SCHEDULES, specs, small, state=state)
    assert len(calls) == 1  # two of the three batches were done
    assert json.dumps(without_run(resumed)) == json.dumps(without_run(whole))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_give_the_document_of_one(tiny_dir, data, tmp_path):
    found = []
    for processes in (1, 2):
        ended = launch(
            tmp_path, "eval", str(tiny_dir), "--data", str(data), "--layers", "3", "--limit", "3", "--batch-size", "2",
            "--max-new-tokens", "4", "--bootstrap", "50", "--no-timing", "--output", f"{processes}.json",
            processes=processes,
        )  # fmt: skip
        assert [process.returncode for process, _, _ in ended] == [0] * processes, ended
        assert [out for _, out, _ in ended[1:]] == [""] * (processes - 1)
        found.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    one, two = found
    assert two["run"]["processes"] == 2
    assert without_run(two) == without_run(one)


def test_one_pass_gives_what_the_led_runtime_gives(tiny_dir, data, monkeypatch):
    """KL, agreement, traces and answers, of schedules of every kind."""
    import vtwcli.evaluate as module

    acts = {
        "withdraw": [{"at": 3, "action": "withdraw"}],
        "keep": [{"at": 2, "action": "keep", "select": {"score": "attention", "ratio": 0.4}}],
        "first": [{"at": 1, "until": 4, "action": "mute", "sink": "first"}],
        "freeze": [{"at": 1, "until": 5, "action": "freeze"}],
        "auto": [{"at": "auto", "action": "withdraw", "when": {"cosine_above": -1.0, "layers": 2}}],
        "nothing": [],
    }
    schedules = [(name, Schedule(actions=tuple(one))) for name, one in acts.items()]
    model, specs = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))]
    lines: list[list[str]] = [[], []]
    one, _ = evaluate(model, schedules, specs, options(), trace=lines[0].append)
    monkeypatch.setattr(module, "engine_of", lambda *_: None)
    other, _ = evaluate(model, schedules, specs, options(), trace=lines[1].append)
    assert lines[0] == lines[1]
    for mine, its in zip(one["samples"], other["samples"], strict=True):
        for name in acts:
            a, b = (dict(row["pruned"][name]) for row in (mine, its))
            np.testing.assert_allclose(a.pop("kl"), b.pop("kl"), rtol=1e-4, atol=2e-6)
            assert a == b
    for name in acts:
        assert one["schedules"][name]["cost"] == other["schedules"][name]["cost"]
    assert one["schedules"]["nothing"]["kl_answer"] == 0


def test_metrics_of_several_numbers_and_of_none(tiny_dir, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    spec = DataSpec(source=str(data), metric="cider", tasks="caption")
    result, _ = evaluate(ModelSection(name=str(tiny_dir)), SCHEDULES, [spec], options())
    assert result["tasks"]["caption"]["schedules"]["K=3"]["mcnemar"] is None
    assert len(rows) == 6
    assert {row[-1] for row in report_eval.quality_table(result)[1]} == {"-"}
    pope = {"mean": 0.5, "f1": 0.25, "yes_ratio": 0.125}
    compared = {**pope, "f1": 0.75, "difference": 0, "interval": None, "mcnemar": {"p": 1}}
    row = {"metric": "pope", "judged": 3, "full": pope, "schedules": {"K=3": compared, "never": compared}}
    said = report_eval.sentences({**result, "tasks": {"objects": row}})
    assert "objects, f1: full 0.250, K=3 0.750, never 0.750." in said
    assert "objects, yes ratio: full 0.125, K=3 0.125, never 0.125." in said


def test_page_is_well_formed(evaluated):
    from html.parser import HTMLParser

    begun = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                begun.append(tag)

        def handle_endtag(self, tag):
            assert begun.pop() == tag

    reader = Reader()
    reader.feed(report_eval.html_report(*evaluated))
    reader.close()
    assert begun == []


def test_largest_kl_comes_first_on_the_page(evaluated):
    result, samples = evaluated
    page = report_eval.html_report(result, samples)
    shown = re.findall(r"<dt>mean KL</dt><dd>([\d.e+-]+) nats</dd>", page)
    found = [
        np.mean(row["pruned"]["K=3"]["kl"])
        for row in result["samples"]
        if row["pruned"]["K=3"]["first_divergence"] is not None
    ]
    assert shown == [f"{kl:.3g}" for kl in sorted(found, reverse=True)]


def test_speed_ups_promised_and_measured(evaluated):
    result = json.loads(json.dumps(evaluated[0]))
    second = {"median": 0.010, "iqr": [0.009, 0.011]}
    half = {"median": 0.004, "iqr": [0.004, 0.004]}
    result["run"]["latency"] = {
        "full": {"ttft": second, "tpot": half},
        "K=3": {"ttft": half, "tpot": half, "speed_up": {"ratio": 2.5, "interval": [2.4, 2.625]}},
        "never": {"ttft": second, "tpot": half, "speed_up": {"ratio": 1.01, "interval": [0.99, 1.04]}},
    }
    result["run"]["memory"] = {
        "full": {"device": None, "resident": 2_000_000},
        "K=3": {"device": 1500, "resident": 3},
    }
    header, rows = report_eval.cost_table(result)
    share = result["schedules"]["K=3"]["cost"]["flops_ratio"]["flops"]
    assert header[-5:] == ["TTFT ms", "TPOT ms", "memory", "ideal", "speed-up"]
    assert rows[0][3:] == ["10.00 ±1.00", "4.00 ±0.00", "2 MB", "1x", "1x"]
    assert rows[1][3:] == ["4.00 ±0.00", "4.00 ±0.00", "1.5 kB", f"{1 / share:.2f}x", "2.50x [2.40, 2.62]"]
    assert rows[2][-3:] == ["-", "1.00x", "noise"]
    for row in result["run"]["latency"].values():
        row.pop("speed_up", None)  # a document of a release that did not tell noise from a difference
    assert report_eval.cost_table(result)[0][-1] == "ideal"
    assert not any("noise" in words or "speed-up:" in words for words in report_eval.sentences(result))


def test_no_schedule_takes_the_full_models_name(tiny_dir, data):
    with pytest.raises(UsageError, match="cannot be called 'full'"):
        evaluate(ModelSection(name=str(tiny_dir)), [("full", SCHEDULES[0][1])], [DataSpec(source=str(data))])


def test_nothing_to_compare_is_an_error(tiny_dir):
    with pytest.raises(UsageError, match="nothing to compare"):
        evaluate(ModelSection(name=str(tiny_dir)), [])


def test_scores_that_do_not_change_leave_a_readable_axis(evaluated):
    result, _ = evaluated
    still = {**result, "schedules": {"never": result["schedules"]["never"]}}
    low, high = report_eval.quality_figure(still).axes[0].get_ylim()
    assert (low, high) == (-0.01, 0.01)
