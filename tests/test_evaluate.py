"""Evaluation on a tiny model: agreement numbers against the slow reference, gates, views, and the files."""

import json
import re

import numpy as np
import pytest
import torch

from tests import reference
from tests.test_calibrate import data  # noqa: F401  (the fixture)
from vtwcli import report_eval
from vtwcli.data.sources import load_data
from vtwcli.errors import UsageError
from vtwcli.evaluate import evaluate
from vtwcli.flops import TextShape, kv_bytes, prefill_ratio, tokens_with_withdrawal
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.recipe import DataSpec, EvalSection, ModelSection
from vtwcli.schedule import Schedule

K = 3
SCHEDULES = [("K=3", Schedule.withdraw_at(K)), ("never", Schedule.withdraw_at(6))]


def options(**given):
    return EvalSection(**{"limit": 3, "max_new_tokens": 4, "timing": False, "bootstrap": 50, **given})


@pytest.fixture(scope="module")
def evaluated(tiny_dir, data):  # noqa: F811
    return evaluate(
        ModelSection(name=str(tiny_dir)),
        SCHEDULES,
        [DataSpec(source=str(data))],
        options(max_kl=1e-4, max_drop=0.5),
    )


def test_answers_and_kl_are_those_of_the_slow_reference(evaluated, tiny_dir, data):  # noqa: F811
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
    words = report_eval.gate_sentence(gates["K=3", "max_kl"])
    assert re.fullmatch(r"gate max_kl FAILED: K=3: mean KL 0\.\d+, allowed 0\.0001", words)


def test_views_hold_the_numbers(evaluated, tmp_path):
    result, samples = evaluated
    text = report_eval.markdown(result)
    assert "| colour: exact_match | 3 | K=3 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {len(report_eval.QUALITY_HEADER) + 1, len(report_eval.COST_HEADER) + 1}
    assert f"{result['schedules']['K=3']['kl_answer']:.2e}" in text
    page = report_eval.html_report(result, samples)
    different = sum(row["pruned"]["K=3"]["first_divergence"] is not None for row in result["samples"])
    assert f"K=3: {different} of 6 answers differ" in page
    assert page.count("<article>") == page.count("data:image/png;base64,") == different
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


def test_batch_size_does_not_matter(evaluated, tiny_dir, data):  # noqa: F811
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


def test_timing_is_reported(tiny_dir, data):  # noqa: F811
    result, _ = evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))],
        options(limit=1, timing=True, repeats=2, timing_tokens=2),
    )  # fmt: skip
    for name in ("full", "K=3"):
        assert result["run"]["latency"][name]["ttft"]["median"] > 0
        assert len(result["run"]["latency"][name]["tpot"]["iqr"]) == 2


def test_calibrated_samples_are_noticed(tiny_dir, data, capsys):  # noqa: F811
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    calibration = {"samples": [{"fingerprint": mix.fingerprints[0]}]}
    evaluate(
        ModelSection(name=str(tiny_dir)), SCHEDULES[:1], [DataSpec(source=str(data))], options(),
        calibration=calibration,
    )  # fmt: skip
    assert "1 of 6 samples were calibrated on" in capsys.readouterr().err


def test_nothing_to_compare_is_an_error(tiny_dir):
    with pytest.raises(UsageError, match="nothing to compare"):
        evaluate(ModelSection(name=str(tiny_dir)), [])
