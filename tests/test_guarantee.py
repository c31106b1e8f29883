"""Promises: p-values against exact arithmetic and scipy, how often one is broken, and the way through commands."""

import json
import shutil
from fractions import Fraction
from math import ceil, comb, e, exp, log
from pathlib import Path

import numpy as np
import pytest

from tests.cli import launch
from vtwcli.calibrate import calibrate
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.judge import gates
from vtwcli.judge.guarantee import Promise, chosen, walk
from vtwcli.measure.promised import distinct, halved
from vtwcli.recipe.recipe import CalibrateSection, GatesSection, ModelSection
from vtwcli.report.guarantee import promise_words

FAST = {"limit": 3, "max_new_tokens": 3, "bootstrap": 0}
FEW = {"policy": "guarantee", "risk": 0.8, "confidence": 0.8}  # one sample of a task, if it loses nothing


def tail(successes, count, chance):
    """P[Bin(count, chance) <= successes] in fractions."""
    p = Fraction(chance)
    return sum(comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(successes + 1))


def lost(total, count):
    """Losses in [0, 1] with this sum."""
    whole = int(total)
    return [1.0] * whole + [total - whole] * (whole < count) + [0.0] * (count - whole - 1)


CASES = [
    (0, 59, 0.05),
    (1, 149, 0.02),
    (3, 200, 0.02),
    (30, 1000, 0.05),
    (7, 20, 0.5),
    (20, 20, 0.9),
    (2, 5000, 0.01),
]


@pytest.mark.parametrize(("failed", "count", "risk"), CASES)
def test_binomial_p_value_is_exact(failed, count, risk):
    found = Promise(risk, 0.95, binary=True).p_value(lost(failed, count))
    assert found == pytest.approx(float(tail(failed, count, risk)), rel=1e-9)


@pytest.mark.parametrize(
    ("total", "count", "risk"), [*CASES, (0.4, 149, 0.02), (2.5, 300, 0.02), (9.5, 20, 0.5)]
)
def test_p_value_of_hoeffding_and_bentkus(total, count, risk):
    r = min(total / count, risk)
    h = (r * log(r / risk) if r else 0) + ((1 - r) * log((1 - r) / (1 - risk)) if r < 1 else 0)
    wanted = min(exp(-count * h), e * float(tail(ceil(total), count, risk)), 1)
    assert Promise(risk, 0.95).p_value(lost(total, count)) == pytest.approx(wanted, rel=1e-9)


def test_p_values_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    special = pytest.importorskip("scipy.special")
    for total, count, risk in CASES:
        assert Promise(risk, 0.9, binary=True).p_value(lost(total, count)) == pytest.approx(
            stats.binom.cdf(total, count, risk), rel=1e-8
        )
        r = min(total / count, risk)
        divergence = special.rel_entr(r, risk) + special.rel_entr(1 - r, 1 - risk)
        wanted = min(np.exp(-count * divergence), e * stats.binom.cdf(total, count, risk), 1)
        assert Promise(risk, 0.9).p_value(lost(total, count)) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("risk", "confidence", "needed"), [(0.05, 0.95, 59), (0.02, 0.95, 149), (0.5, 0.5, 1)]
)
def test_samples_needed_are_the_fewest_that_can_prove_anything(risk, confidence, needed, binary):
    promise = Promise(risk, confidence, binary)
    assert promise.needed == needed
    assert promise.p_value([0.0] * needed) <= promise.delta
    assert needed == 1 or promise.p_value([0.0] * (needed - 1)) > promise.delta


@pytest.mark.parametrize("binary", [True, False])
def test_bound_is_where_the_proof_begins(binary):
    losses = lost(3 if binary else 3.25, 150)
    bound = Promise(0.5, 0.95, binary).bound(losses)
    assert Promise(bound, 0.95, binary).p_value(losses) <= 0.05 + 1e-12
    assert Promise(bound - 1e-6, 0.95, binary).p_value(losses) > 0.05
    assert Promise(0.5, 0.95, binary).bound([]) == Promise(0.5, 0.95, binary).bound([1.0] * 9) == 1


def test_the_walk_ends_at_the_first_candidate_that_fails():
    table = {0: [0.0] * 200, 1: [0.0] * 200, 2: [0.0] * 100 + [1.0] * 100}  # the fourth is never asked for
    tasks = ["a"] * 100 + ["b"] * 100
    tested = walk(4, lambda c: np.array(table[c]), tasks, Promise(0.05, 0.95, binary=True))
    assert [one["holds"] for one in tested] == [True, True, False]
    assert tested[2]["loss"] == {"a": 0, "b": 1} and tested[2]["p_value"]["b"] > 0.99
    assert chosen(tested) == 1 and chosen(tested[2:]) is None and chosen([]) is None


@pytest.mark.parametrize("binary", [True, False])
def test_a_promise_is_broken_as_rarely_as_it_says_and_not_never(binary):
    """2,000 populations whose third candidate, and those behind, cost a little more than is promised."""
    generator = np.random.default_rng(5)
    promise, count, tasks = Promise(0.05, 0.9, binary), 90, ["a"] * 90 + ["b"] * 90
    broken = useful = 0
    for _ in range(2000):
        # of both tasks in each candidate; one task is free of risk, so that it hides nothing of the other's
        risk = 0.05 * np.array([0.02, 0.1, *np.sort(generator.uniform(1.001, 1.05, 2)), 4])
        if binary:
            first = (generator.random((count, 5)) < risk).astype(float)
        else:  # a share of an answer's tokens: most samples lose nothing, some lose a part
            first = (generator.random((count, 5)) < 2 * risk) * generator.choice([0.25, 0.75], (count, 5))
        losses = np.concatenate([first, np.zeros_like(first)])
        k = chosen(walk(5, lambda c, losses=losses: losses[:, c], tasks, promise))
        broken += k is not None and risk[k] > promise.risk
        useful += k is not None
    assert 0 < broken <= promise.delta * 2000
    assert useful > 1500


# --- through the commands --------------------------------------------------------------------------------


def run(model, data, **given):
    return calibrate(
        ModelSection(name=str(model)), [DataSpec(source=str(data))], CalibrateSection(**FAST | given)
    )


@pytest.mark.parametrize("loss", ["tokens", "answer", "kl"])
def test_k_is_the_last_layer_of_the_walk(tiny_dir, data, loss):
    found = run(tiny_dir, data, **FEW, loss=loss, eta=0.05)
    agree, kl = np.array(found["agreement"]["samples"]), np.array(found["kl"]["samples"])
    losses = {"tokens": 1 - agree, "answer": agree < 1, "kl": kl > 0.05}[loss].astype(float)
    tasks = np.array([sample["task"] for sample in found["samples"]])
    promise, k = Promise(0.8, 0.8, loss != "tokens"), None
    for layer in range(5, 0, -1):
        if any(promise.p_value(losses[tasks == task, layer]) > 1 - 0.8 for task in set(tasks)):
            break
        k = layer
    said = found["guarantee"]
    assert found["withdrawal_layer"] == found["policies"]["guarantee"] == k
    assert k is not None
    assert [one["layer"] for one in said["tested"]] == [*range(5, max(k, 2) - 2, -1)]
    assert (said["samples"], said["loss"]) == ({"colour": 3, "caption": 3}, loss)
    assert said["test"] == ("hoeffding-bentkus" if loss == "tokens" else "binomial")
    assert said["population"] == [f"{data} (seeded draw from all 6 rows)"]
    assert found["schedule"]["provenance"]["confidence"] == 0.8


def test_other_policies_say_nothing_new(tiny_dir, data):
    found = run(tiny_dir, data)
    assert not {"guarantee"} & (found.keys() | found["policies"].keys())
    assert not {"risk", "confidence", "loss"} & found["options"].keys()


def test_the_metrics_drop_is_that_of_generated_answers(tiny_dir, data, tmp_path):
    """With the full model's own answers as references the metric drops exactly where the answer changes."""
    from vtwcli.models.generation import generate_answers
    from vtwcli.models.loading import load

    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    said = {
        s.prompt: text
        for s, (text, _) in zip(
            mix.samples, generate_answers(load(str(tiny_dir)), mix.samples, 3), strict=True
        )
    }
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for row in rows:
        row |= {"answer": said[row["question"]], "image": str(Path(data).parent / row["image"])}
    own = tmp_path / "rows.jsonl"
    own.write_text("\n".join(map(json.dumps, rows)))
    one, other = (run(tiny_dir, own, **FEW, loss=loss)["guarantee"] for loss in ("answer", "metric"))
    assert [row["loss"] for row in one["tested"]][: len(other["tested"])] == [
        row["loss"] for row in other["tested"]
    ]
    assert any(sum(row["loss"].values()) for row in other["tested"])


def test_equal_questions_count_once_and_halves_share_none(data, tmp_path):
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for row in rows:
        row["image"] = str(Path(data).parent / row["image"])
    twice = tmp_path / "rows.jsonl"
    twice.write_text("\n".join(map(json.dumps, rows + [{**row, "answer": "another"} for row in rows])))
    samples = load_data([DataSpec(source=str(twice))], limit=None, seed=0).samples
    assert (len(samples), len(distinct(samples))) == (12, 6)
    first, second = halved(samples, 0)
    asked = [{(samples[i].task, samples[i].prompt) for i in part} for part in (first, second)]
    assert not asked[0] & asked[1]
    assert [len(part) for part in asked] == [2, 4]  # of three a task, two test
    assert halved(samples, 0) == (first, second)


def test_candidates_are_tested_on_samples_that_did_not_order_them(tiny_dir, data):
    found = run(tiny_dir, data, **FEW, method="visipruner", eta=1000)
    said = found["guarantee"]
    assert (said["ordered_on"], said["samples"]) == ({"colour": 1, "caption": 1}, {"colour": 2, "caption": 2})
    names = [one["candidate"] for one in said["tested"]]
    assert names == found["pareto"][::-1][: len(names)]
    held = [one["candidate"] for one in said["tested"] if one["holds"]]
    assert found["chosen"] == (held[-1] if held else None)
    assert {row["name"] for row in found["candidates"] if row["accepted"]} == set(held)
    assert len(found["samples"]) == 6  # an evaluation leaves all of them out


def test_too_few_samples_are_refused_before_the_model_is_loaded(vtw, tiny_dir, data, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_dir, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    args = ("--data", data, "--limit", 3, "--risk", 0.05)
    code, _, err = vtw("calibrate", bare, *args, "--policy", "guarantee")
    assert code == 2
    assert "needs at least 59 distinct samples of each task, and there are: colour 3, caption 3" in err
    code, _, err = vtw("calibrate", bare, *args, "--policy", "guarantee", "--method", "visipruner")
    assert code == 2 and "needs at least 117 distinct samples of each task, half of which" in err
    code, _, err = vtw("eval", bare, "--layer", 3, *args)
    assert code == 2 and "the gate risk (risk 0.05, confidence 0.95) needs at least 59" in err


def test_streamed_layers_promise_what_the_model_in_memory_does(tiny_dir, data, monkeypatch):
    """Of K and of candidates, along reference answers, which the sentence says."""
    specs, streamed = [DataSpec(source=str(data))], ModelSection(name=str(tiny_dir), stream=True)
    found = calibrate(streamed, specs, CalibrateSection(**FAST, **FEW))
    plain = run(tiny_dir, data, **FEW, answers="reference")
    assert found["run"]["streamed"] and found["withdrawal_layer"] == plain["withdrawal_layer"] is not None
    for one, other in zip(found["guarantee"]["tested"], plain["guarantee"]["tested"], strict=True):
        assert {**one, "p_value": 0} == {**other, "p_value": 0}
        assert one["p_value"] == pytest.approx(other["p_value"])
    for words in (promise_words(found), promise_words(plain)):
        assert "at most 80 % of an answer's tokens change along the reference answers" in words
    for method in ("visipruner", "exit"):
        searched = calibrate(streamed, specs, CalibrateSection(**FAST, **FEW, method=method))
        said = searched["guarantee"]
        assert said["samples"] == {"colour": 2, "caption": 2} and searched["run"]["streamed"]
        held = [one["candidate"] for one in said["tested"] if one["holds"]]
        assert searched["chosen"] in (held or [None])
    opened = []
    monkeypatch.setattr("vtwcli.calibrate.measure", lambda *args: opened.append(args))
    for method in ("vtw", "visipruner"):
        asked = CalibrateSection(**FAST, **FEW, loss="metric", method=method)
        with pytest.raises(UsageError, match="layers are streamed and cannot answer"):
            calibrate(streamed, specs, asked)
    assert not opened  # before anything was measured


@pytest.mark.parametrize(("method", "loss"), [("vtw", "tokens"), ("exit", "metric")])
def test_two_processes_promise_what_one_does(tiny_dir, data, tmp_path, method, loss):
    given = ["--method", method, "--loss", loss, "--data", data, "--bootstrap", 0]
    asked = ["--policy", "guarantee", "--risk", 0.8, "--confidence", 0.8, "--limit", 3, "--max-new-tokens", 3]
    args = ["calibrate", tiny_dir, *given, *asked, "--output", "two.json"]
    ended = launch(tmp_path, *map(str, args))
    assert [process.returncode for process, _, _ in ended] == [0, 0], ended
    assert "Promised with 80 % confidence" in " ".join(ended[0][1].split()) and ended[1][1] == ""
    two, one = (
        json.loads((tmp_path / "two.json").read_text()),
        run(tiny_dir, data, **FEW, method=method, loss=loss),
    )
    assert two["run"]["processes"] == 2
    for name in ("guarantee", "schedule", "exits"):
        assert json.dumps(two.get(name)) == json.dumps(one.get(name))


def test_the_metric_must_judge_each_sample(data):
    from vtwcli.measure.promised import check_samples

    options = CalibrateSection(**FEW, loss="metric")
    with pytest.raises(UsageError, match="CIDEr judges all captions together"):
        check_samples(load_data([DataSpec(source=str(data), metric="cider")], limit=3, seed=0), options)


def test_view_and_files_say_what_is_promised(vtw, tiny_dir, data, tmp_path):
    args = (
        "calibrate",
        tiny_dir,
        "--data",
        data,
        "--limit",
        3,
        "--max-new-tokens",
        3,
        "--policy",
        "guarantee",
        "--plot",
        "k.svg",
    )
    code, out, err = vtw(*args, "--risk", 0.9, "--confidence", 0.5, "--output", "k.json")
    assert code == 0, err
    words = " ".join(out.split())
    assert "policy guarantee, risk 0.9, confidence 0.5, loss tokens, answer positions" in words
    assert "Promised with 50 % confidence for each task (" in words
    assert "on average at most 90 % of an answer's tokens change" in words
    assert (
        "from 3 distinct samples a task (hoeffding-bentkus test). Not promised: anything of a single" in words
    )
    assert "95 % interval" not in words
    assert "(risk 0.9 with 50 % confidence)" in Path("k.svg").read_text()
    code, out, err = vtw(
        *args, "--risk", 0.3, "--confidence", 0.6, "--loss", "kl", "--eta", 1e-9, "-o", "n.json", "--force"
    )
    assert code == 3
    assert "No layer qualifies (policy guarantee, risk 0.3" in err and "The safest candidate" in err
    assert "larger --risk" in err


@pytest.mark.parametrize(("layer", "risk", "code"), [(5, 0.9, 0), (0, 0.4, 3)])
def test_the_gate_both_ways(vtw, tiny_dir, data, tmp_path, layer, risk, code):
    args = ("--limit", 3, "--max-new-tokens", 3, "--no-timing", "--risk", risk, "--confidence", 0.75)
    done, out, err = vtw("eval", tiny_dir, "--layer", layer, "--data", data, *args, "--output", "e.json")
    assert done == code, err
    result = json.loads(Path("e.json").read_text())
    [gate] = result["gates"]
    losses = result["schedules"][f"K={layer}"]["losses"]
    assert {task: len(one) for task, one in losses.items()} == {"colour": 3, "caption": 3}
    mean = np.mean([x for one in losses.values() for x in one])
    assert 1 - mean == pytest.approx(result["schedules"][f"K={layer}"]["top1_agreement"])
    bound = max(Promise(risk, 0.75).bound(one) for one in losses.values())
    assert (gate["found"], gate["passed"], gate["samples"]) == (bound, code == 0, 3)
    words = (
        f"of an answer's tokens change on {gate['task']} with 75 % confidence, from 3 samples; allowed {risk}"
    )
    assert f"at most {bound:.4g} {words}" in " ".join(out.split())
    assert gates.check(result["schedules"], GatesSection(risk=0.999, confidence=0.5))[0]["passed"] == (
        mean < 1
    )


def test_a_gate_without_losses_does_not_pass_and_confidence_needs_a_risk():
    row = {"worst_task": None, "worst_difference": None, "kl_answer": 0, "top1_agreement": 1}
    [gate] = gates.check({"a": row}, GatesSection(risk=0.5))
    assert (gate["found"], gate["passed"], gate["confidence"]) == (None, False, 0.95)
    assert gates.sentence(gate) == "gate risk FAILED: a: risk not measured, allowed 0.5"
    with pytest.raises(ValueError, match="confidence goes with risk"):
        GatesSection(confidence=0.9)


def test_a_recipe_proves_its_schedule_and_is_refused_with_too_few_samples(vtw, tiny_dir, data, tmp_path):
    lines = [
        f"model: {tiny_dir}",
        f"data: ['{data}:limit=2']",
        "calibrate: {limit: 2, max_new_tokens: 2, policy: guarantee, risk: 0.99, confidence: 0.5, bootstrap: 0}",
        "eval: {limit: 2, max_new_tokens: 2, timing: false}",
        "gates: {risk: 0.95, confidence: 0.5}",
        "export: {format: hf}",
        "output: out",
    ]
    Path("r.yaml").write_text("\n".join(lines))
    code, _, err = vtw("run", "r.yaml")
    assert code == 0, err
    run = json.loads(Path("out/run.json").read_text())
    [gate] = run["gates"]
    assert gate["gate"] == "risk" and gate["passed"]
    for page in ("out/summary.md", "out/model/README.md"):
        words = Path(page).read_text().replace("\\", "")
        assert (
            "Promised with 50 % confidence" in words and "Not promised: anything of a single input" in words
        )
    Path("s.yaml").write_text("\n".join(lines).replace("risk: 0.95, confidence: 0.5", "risk: 0.05"))
    code, _, err = vtw("recipe", "check", "s.yaml")
    assert code == 2
    assert "eval.limit is 2, and what is to be proved needs at least 59 samples of each task" in err
