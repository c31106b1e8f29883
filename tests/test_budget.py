"""Comparing methods, and VisiPruner's calibration, on a tiny model: numbers against the slow references."""

import json

import numpy as np
import pytest
import torch

from tests import reference, slow_schedule
from tests.cli import launch, vtw
from vtwcli.budget import best_within, budget, candidates
from vtwcli.calibrate import calibrate
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io.outputs import Outputs
from vtwcli.judge.flops import CONVENTIONS, TextShape, prefill_cost
from vtwcli.measure import many
from vtwcli.measure.accepted import accepted, choice
from vtwcli.measure.candidates import pareto
from vtwcli.methods.method import Answers, Shape
from vtwcli.methods.visipruner import shallow_boundary
from vtwcli.models.generation import generate_answers
from vtwcli.models.inputs import answer_ids, encode
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import BudgetSection, CalibrateSection, ModelSection, Recipe
from vtwcli.report import budget as report_budget
from vtwcli.report import calibration as report_calibrate
from vtwcli.schedule.schedule import Schedule

LIMIT, TOKENS = 2, 3


def section(**given):
    return BudgetSection(
        **{"limit": LIMIT, "max_new_tokens": TOKENS, "ratios": (0.5,), "thresholds": (0.5,), **given}
    )


def forced(tiny_dir, data):
    """The model and its samples with the full model's own answers behind them: inputs and number of answer tokens."""
    loaded = load(str(tiny_dir))
    samples = load_data([DataSpec(source=str(data))], limit=LIMIT, seed=0).samples
    found = []
    for sample in samples:
        [(_, ids)] = generate_answers(loaded, [sample], TOKENS)
        found.append((encode(loaded, sample, ids[:-1]), len(ids)))
    return loaded, samples, found


def slow_numbers(loaded, found, actions):
    """KL and agreement per sample, and tokens per layer, by the slow interpreter."""
    kl, agree, tokens = [], [], []
    for one, length in found:
        full = reference.logits(
            loaded.model, one.inputs, torch.zeros(6, *one.inputs["input_ids"].shape).bool()
        )
        out, decided = slow_schedule.logits(loaded.model, one.inputs, actions, prompt=one.prompt_length)
        p, q = (x[0, -length:].double().log_softmax(-1) for x in (out, full))
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
        agree.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        tokens.append([int(present[0, : one.prompt_length].sum()) for present in decided.present])
    return np.array(kl), np.array(agree), tokens


@pytest.fixture(scope="module")
def compared(tiny_dir, data):
    options = section(max_flops=0.9)
    return budget(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options)


def test_every_row_is_what_the_slow_interpreter_finds(compared, tiny_dir, data):
    loaded, samples, found = forced(tiny_dir, data)
    shape = TextShape.from_config(loaded.model.config)
    # scores that the last row of the prompt decides are not those of the forced sequence's last row
    rows = [row for row in compared["candidates"] if row["method"] in ("vtw", "random", "uniform")]
    assert len(rows) == 6 + 2
    tasks = np.array([sample.task for sample in samples])
    for row in rows:
        kl, agree, tokens = slow_numbers(loaded, found, row["schedule"]["actions"])
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
        assert row["agreement"] == pytest.approx(agree.mean())
        by_task = {task: kl[tasks == task].mean() for task in ("colour", "caption")}
        assert row["kl_by_task"] == pytest.approx(by_task, rel=1e-3, abs=1e-6)
        assert row["worst_kl"] == max(row["kl_by_task"].values())
        whole = [[one.prompt_length] * 6 for one, _ in found]
        for convention in CONVENTIONS:
            total = [sum(prefill_cost(shape, t, convention) for t in side) for side in (tokens, whole)]
            assert row["flops_ratio"][convention] == pytest.approx(total[0] / total[1])
        assert row["kv_ratio"] == pytest.approx(sum(map(sum, tokens)) / sum(map(sum, whole)))


def test_measured_scores_decide_at_the_prompts_last_row(tiny_dir, data):
    """One new token: then the forced sequence ends where the prompt does, and every schedule can be compared."""
    options = section(max_new_tokens=1, methods=("attention", "contribution", "visipruner", "two-step"))
    result = budget(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options)
    loaded = load(str(tiny_dir))
    samples = load_data([DataSpec(source=str(data))], limit=LIMIT, seed=0).samples
    found = [(encode(loaded, sample), 1) for sample in samples]
    assert len(result["candidates"]) == 1 + 1 + 2 + 2
    for row in result["candidates"]:
        kl, _, tokens = slow_numbers(loaded, found, row["schedule"]["actions"])
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
        text = [one.prompt_length - 9 for one, _ in found]
        visual = [[n - t for n in layers] for layers, t in zip(tokens, text, strict=True)]
        assert row["visual_tokens"] == pytest.approx(np.mean(visual, axis=0))


def test_front_and_best(compared):
    rows = {row["name"]: row for row in compared["candidates"]}
    points = {name: (row["flops_ratio"]["flops"], row["kl"]) for name, row in rows.items()}
    order = list(points)
    for name, (cost, kl) in points.items():
        near = [one for one, (c, k) in points.items() if c <= cost and k <= kl]
        better = [one for one in near if points[one] != points[name] or order.index(one) < order.index(name)]
        assert rows[name]["pareto"] == (name in compared["pareto"]) == (not better)
    best = rows[compared["best"]]
    assert best["flops_ratio"]["flops"] <= 0.9
    assert all(row["kl"] >= best["kl"] for row in rows.values() if row["flops_ratio"]["flops"] <= 0.9)
    assert best_within(compared["candidates"], 0.01) is None
    assert best_within(compared["candidates"], None) is None


def test_of_equal_schedules_the_front_holds_one():
    def row(name, cost, kl):
        return {"name": name, "flops_ratio": {"flops": cost}, "kl": kl}

    assert pareto([row("a", 0.5, 1.0), row("b", 0.5, 1.0), row("c", 0.4, 1.0), row("d", 0.6, 0.1)]) == [
        "c",
        "d",
    ]


def test_candidates_fit_every_depth():
    for depth in (4, 6, 12, 32):
        for first in (0, 3):
            found = candidates(Shape(depth, first))
            assert len({one.name for one in found}) == len(found)
            for one in found:
                one.schedule.check_depth(depth, first)
    names = [one.name for one in candidates(Shape(32))]
    assert {"K=0", "K=31", "visipruner S=6 t=0.2", "attention 25%, K=16", "random 10%"} <= set(names)
    with pytest.raises(UsageError, match="--keep-layer: 9 is not a layer of the model"):
        candidates(Shape(6), section(keep_layer=9))


def test_budget_is_deterministic_and_describes_itself(compared, tiny_dir, data):
    again = budget(
        ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], section(max_flops=0.9, batch_size=8)
    )
    options = {**again["options"], "batch_size": None}
    assert {**again, "run": None, "options": options} == {**compared, "run": None}
    assert compared["format"] == "vtw-budget"
    assert compared["tasks"] == {"colour": {"samples": 2}, "caption": {"samples": 2}}
    assert compared["cost"]["visual_tokens"] == 9
    json.dumps(compared)


def test_views_of_the_budget(compared, tmp_path):
    places = {"result": tmp_path / "b.json", "plot": tmp_path / "b.svg", "schedule": tmp_path / "b.yaml"}
    outputs = Outputs(places, "vtw-budget")
    report_budget.write_budget(compared, outputs)
    assert json.loads(outputs["result"].read_text()) == compared
    chosen = Schedule.from_file(outputs["schedule"])
    best = next(row for row in compared["candidates"] if row["name"] == compared["best"])
    assert chosen.to_dict()["actions"] == best["schedule"]["actions"]
    assert chosen.provenance["budget"] == 0.9
    assert "Pareto front" in outputs["plot"].read_text()
    from rich.console import Console

    console = Console(width=100, record=True)
    console.print(report_budget.budget_view(compared))
    lines = console.export_text().splitlines()
    assert all(any(line.startswith(row["name"]) for line in lines) for row in compared["candidates"])
    [marked] = [line for line in lines if line.endswith("best")]
    assert marked.startswith(compared["best"])
    text = " ".join(" ".join(lines).split())
    assert f"Best within 90%: {compared['best']}, KL {best['kl']:.2e}" in text


def test_command(tiny_dir, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "budget",
        tiny_dir,
        "--data",
        data,
        "--limit",
        "1",
        "--methods",
        "vtw,random",
        "--max-new-tokens",
        "1",
    ]
    done = vtw(*given, "--max-flops", "0.95", "--json", "--output", "out.json")
    assert (done.code, sorted(path.name for path in tmp_path.iterdir())) == (
        0,
        ["out.json", "out.png", "out.schedule.yaml"],
    )
    result = json.loads(done.out)
    assert result["options"]["methods"] == ["vtw", "random"]
    assert len(result["candidates"]) == 6 + 3
    assert Schedule.from_file(tmp_path / "out.schedule.yaml").provenance["model"] == str(tiny_dir)
    done = vtw(*given, "--max-flops", "0.001", "--output", "out.json", "--force")
    assert done.code == 3
    assert "error: no schedule costs at most 0.1% of the full model's prefill FLOPs" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]
    assert json.loads((tmp_path / "out.json").read_text())["best"] is None
    wrong = vtw("budget", tiny_dir, "--methods", "vtw,fastest")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("error: --methods: input should be 'vtw', 'visipruner'")


# ------------------------------------------------------------------------------------------------ VisiPruner


def options(**given):
    return CalibrateSection(
        **{"method": "visipruner", "limit": LIMIT, "max_new_tokens": 1, "eta": 0.05, **given}
    )


@pytest.fixture(scope="module")
def calibrated(tiny_dir, data):
    return calibrate(
        ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options(policy="budget", budget=0.9)
    )


def test_boundary_curve_is_the_slow_interpreters(calibrated, tiny_dir, data):
    loaded = load(str(tiny_dir))
    samples = load_data([DataSpec(source=str(data))], limit=LIMIT, seed=0).samples
    found = [(encode(loaded, sample), 1) for sample in samples]
    for d in range(6):
        kl, _, _ = slow_numbers(loaded, found, [{"at": 0, "until": d + 1, "action": "mute"}])
        assert calibrated["boundary"]["kl"][d] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)


def test_boundary_is_the_first_layer_that_costs_more_than_eta():
    curves = {"a": np.array([0.0, 0.01, 0.5, 0.0]), "b": np.array([0.0, 0.2, 0.2, 0.0])}
    mean = np.mean(list(curves.values()), axis=0)

    def found(eta, policy):
        return shallow_boundary(Answers(mean, curves, (), eta, policy == "worst-task"))

    assert found(0.15, "paper") == 2
    assert found(0.15, "worst-task") == 1
    assert found(0.4, "worst-task") == 2
    assert found(1.0, "worst-task") == 4


def test_candidates_are_run_by_the_runtime(calibrated, tiny_dir, data):
    loaded = load(str(tiny_dir))
    samples = load_data([DataSpec(source=str(data))], limit=LIMIT, seed=0).samples
    found = [(encode(loaded, sample), 1) for sample in samples]
    rows = calibrated["candidates"]
    assert len(rows) >= 16
    for row in rows[::4]:
        kl, _, _ = slow_numbers(loaded, found, row["schedule"]["actions"])
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)


def test_choice_under_a_budget_and_under_eta(calibrated):
    rows = calibrated["candidates"]
    chosen = next(row for row in rows if row["name"] == calibrated["chosen"])
    assert chosen["flops_ratio"]["flops"] <= 0.9
    assert all(row["kl"] >= chosen["kl"] for row in rows if row["flops_ratio"]["flops"] <= 0.9)
    assert chosen["parameters"] == {
        key: calibrated[key] for key in ("shallow_mid_layer", "layer_threshold", "tokens_threshold")
    }
    assert calibrated["schedule"]["actions"] == chosen["schedule"]["actions"]
    assert Schedule.from_dict(calibrated["schedule"]).provenance["method"] == "visipruner"
    eta = sorted(row["worst_kl"] for row in rows)[len(rows) // 2]
    wanted = options(eta=eta)
    judged = [{**row, "accepted": accepted(row, wanted)} for row in rows]
    assert sum(row["accepted"] for row in judged) >= len(rows) // 2
    cheapest = choice(judged, wanted)
    assert cheapest["worst_kl"] <= eta
    assert all(
        row["flops_ratio"]["flops"] >= cheapest["flops_ratio"]["flops"]
        for row in rows
        if row["worst_kl"] <= eta
    )
    never = [{**row, "accepted": False} for row in rows]
    assert choice(never, wanted) is None


def test_visipruner_calibration_is_deterministic_with_files_and_views(calibrated, tiny_dir, data, tmp_path):
    again = calibrate(
        ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options(policy="budget", budget=0.9)
    )
    assert {**again, "run": None} == {**calibrated, "run": None}
    places = {"result": tmp_path / "c.json", "plot": tmp_path / "c.svg", "schedule": tmp_path / "c.yaml"}
    outputs = Outputs(places, "vtw-calibration")
    report_calibrate.write_calibration(calibrated, outputs)
    assert Schedule.from_file(outputs["schedule"]) == Schedule.from_file(outputs["result"])
    assert f"chosen: {calibrated['chosen']}" in outputs["plot"].read_text()
    sentence = report_calibrate.calibration_sentence(calibrated)
    assert f"VisiPruner with shallow boundary {calibrated['shallow_mid_layer']}, layer threshold" in sentence
    none = {**calibrated, "chosen": None, "schedule": None}
    assert report_calibrate.calibration_sentence(none).startswith(
        "No candidate qualifies (policy budget, eta 0.05"
    )
    from rich.console import Console

    console = Console(width=120, record=True)
    console.print(report_calibrate.calibration_view(calibrated))
    [marked] = [line for line in console.export_text().splitlines() if line.endswith("<- chosen")]
    assert marked.startswith(calibrated["chosen"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resume": True}, "--resume does not go with --method visipruner"),
        ({"answers": "reference"}, "--method visipruner compares along the model's own answers"),
    ],
)
def test_what_visipruners_calibration_refuses(given, message, tiny_dir):
    with pytest.raises(UsageError, match=message):
        calibrate(ModelSection(name=str(tiny_dir)), [], options(**given))


def test_a_streamed_search_compares_along_references(tiny_dir, data, monkeypatch):
    """As one pass over the model in memory does, in parts too; the model's own answers are refused."""
    from vtwcli.methods.method import Candidate
    from vtwcli.sweep.layers import Resident

    specs, streamed = [DataSpec(source=str(data))], ModelSection(name=str(tiny_dir), stream=True)
    given = {"positions": "answer", "max_new_tokens": 2}
    with pytest.raises(UsageError, match="compares along the samples' reference answers"):
        calibrate(streamed, specs, options(**given, answers="generated"))
    found = calibrate(streamed, specs, options(**given))
    monkeypatch.setattr(many, "_STREAM_BYTES", 1)
    assert {**calibrate(streamed, specs, options(**given, answers="reference")), "run": None, "options": None} == {
        **found, "run": None, "options": None,
    }  # fmt: skip
    assert found["run"]["streamed"]
    loaded = load(str(tiny_dir))
    samples = load_data(specs, limit=LIMIT, seed=0).samples
    tried = [Candidate(x["name"], "", Schedule.from_dict(x["schedule"], "")) for x in found["candidates"]]
    rows = many.Many(loaded, Resident(loaded.model, loaded.family), tried).along_references(samples, 2)
    for c, row in enumerate(found["candidates"], 1):
        assert row["kl"] == pytest.approx(np.mean([np.mean(one[c].kl) for one in rows]), rel=1e-3, abs=1e-6)
        assert row["agreement"] == pytest.approx(np.mean([np.mean(one[c].agree) for one in rows]))


def test_samples_without_vision_are_an_error(tiny_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"image": [], "question": "why?", "answer": "so"}))
    model, specs = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(file))]
    with pytest.raises(NotFoundError, match="no sample has a visual token"):
        budget(model, specs, section(methods=("vtw",)))
    with pytest.raises(NotFoundError, match="no sample has a visual token"):
        calibrate(model, specs, options())


def test_samples_without_vision_do_not_count(tiny_dir, data, tmp_path, capsys):
    file = data.with_name("mixed.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()[:3]]
    blind = {"image": [], "question": "no image?", "answer": "no", "task": "colour"}
    found = []
    for lines in (rows, [blind, *rows]):
        file.write_text("\n".join(map(json.dumps, lines)))
        options = section(methods=("vtw", "attention"), limit=9)
        found.append(budget(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(file))], options))
    assert "1 samples have no visual token; they do not count" in capsys.readouterr().err
    for alone, mixed in zip(*(result["candidates"] for result in found), strict=True):
        assert mixed["kl"] == pytest.approx(alone["kl"], rel=1e-3, abs=1e-6)
        assert mixed["flops_ratio"] == pytest.approx(alone["flops_ratio"])


def test_two_processes_calibrate_as_one(calibrated, tiny_dir, data, tmp_path):
    ended = launch(
        tmp_path, "calibrate", str(tiny_dir), "--method", "visipruner", "--data", str(data), "--limit", str(LIMIT),
        "--max-new-tokens", "1", "--eta", "0.05", "--policy", "budget", "--budget", "0.9", "--output", "two.json",
    )  # fmt: skip
    assert [process.returncode for process, _, _ in ended] == [0, 0], ended
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["run"]["processes"] == 2
    assert (two["chosen"], two["boundary"]["layer"]) == (
        calibrated["chosen"],
        calibrated["boundary"]["layer"],
    )
    for a, b in zip(two["candidates"], calibrated["candidates"], strict=True):
        assert a["schedule"] == b["schedule"]
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-6)


def test_sections_in_a_recipe():
    recipe = Recipe(
        budget={"methods": "vtw, random", "ratios": "0.5,0.1"}, calibrate={"method": "visipruner"}
    )
    assert recipe.budget.methods == ("vtw", "random")
    assert recipe.budget.ratios == (0.5, 0.1)


def test_streamed_layers_give_the_same_comparison(tiny_dir, data, monkeypatch):
    """Along references, where the model's own answers would read every layer once a token; in parts too."""
    specs, options = [DataSpec(source=str(data))], section(max_new_tokens=2)
    streamed = budget(ModelSection(name=str(tiny_dir), stream=True), specs, options)
    monkeypatch.setattr(many, "_STREAM_BYTES", 1)
    alone = budget(ModelSection(name=str(tiny_dir), stream=True), specs, options)
    assert {**alone, "run": None} == {**streamed, "run": None}
    assert streamed["run"]["streamed"]

    loaded = load(str(tiny_dir))
    samples = load_data(specs, limit=LIMIT, seed=0).samples
    ids = [answer_ids(loaded, sample.references[0])[:2] for sample in samples]
    found = [(encode(loaded, one, x[:-1]), len(x)) for one, x in zip(samples, ids, strict=True)]
    rows = [row for row in streamed["candidates"] if row["method"] in ("vtw", "random", "uniform")]
    for row in rows:
        kl, agree, _ = slow_numbers(loaded, found, row["schedule"]["actions"])
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
        assert row["agreement"] == pytest.approx(agree.mean())


def test_the_pass_gives_what_the_runtime_gives(tiny_dir, data):
    """The same candidates on the same samples, once all together and once one by one."""
    from vtwcli.measure.candidates import tried
    from vtwcli.sweep.layers import Resident

    loaded = load(str(tiny_dir))
    samples = load_data([DataSpec(source=str(data))], limit=LIMIT, seed=0).samples
    chosen = candidates(Shape(6, tower_depth=2), section())
    one, other = (
        tried(loaded, source, chosen, samples, TOKENS, [range(3), range(3, len(samples))])
        for source in (Resident(loaded.model, loaded.family), None)
    )
    for c in range(len(chosen)):
        np.testing.assert_allclose(one.kl(c), other.kl(c), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(one.agreement(c), other.agreement(c))
        for mine, its in zip(one.rows[c], other.rows[c], strict=True):
            assert (mine.actions, mine.visual_per_layer) == (its.actions, its.visual_per_layer)
            assert mine.text_tokens == its.text_tokens


def test_what_this_model_cannot_execute_is_left_out_with_its_reason(tiny_dir, data, capsys):
    from vtwcli.measure.candidates import tried
    from vtwcli.methods.method import Candidate
    from vtwcli.sweep.layers import Resident

    loaded = load(str(tiny_dir))
    samples = load_data([DataSpec(source=str(data))], limit=1, seed=0).samples
    mute = {"at": 2, "until": 3, "action": "mute"}
    keep = {"at": 3, "action": "keep", "select": {"score": "attention", "ratio": 0.5}}
    bad = Candidate("bad", "attention", Schedule.from_dict([mute, keep]))
    good = Candidate("good", "vtw", Schedule.withdraw_at(3))
    work = loaded, Resident(loaded.model, loaded.family), [bad, good], samples, 2, [range(len(samples))]
    found = tried(*work, lenient=True)
    assert list(found.refused) == [0] and "layer 2 is muted, so it has no scores" in found.refused[0]
    assert found.rows[0] == [] and len(found.rows[1]) == len(samples)
    with pytest.raises(UsageError, match="schedule bad: layer 2 is muted"):
        tried(*work)
