"""The search for the best schedule within a goal: its bookkeeping, its three parts, its goals and its promise."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.cli import vtw
from tests.test_results import told
from vtwcli.data.spec import DataSpec
from vtwcli.errors import GateError, UsageError
from vtwcli.judge.guarantee import Promise
from vtwcli.measure.candidates import tried
from vtwcli.measure.study import Study
from vtwcli.recipe.recipe import ModelSection
from vtwcli.recipe.search import SearchSection
from vtwcli.report import search as report
from vtwcli.results.resume import kept
from vtwcli.results.search import Search
from vtwcli.schedule.schedule import Schedule
from vtwcli.search import search
from vtwcli.searching import trials as trials_of
from vtwcli.searching.combined import Combination
from vtwcli.searching.parts import parts_of

SHORT = {"limit": 9, "max_new_tokens": 2, "risk": 0.5, "trials": 24}
SURE = ("--loss", "kl", "--eta", 1000)  # nothing counts as lost
METHODS = ("vtw", "attention", "uniform", "stages", "vscan", "fitprune")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Sixteen different questions of each of two tasks about random images."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(32):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        task = ("colour", "caption")[i % 2]
        lines.append({"image": f"{i}.png", "question": f"what is {i}?", "answer": "red", "task": task})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def found(tiny_dir, rows):
    """By what was asked, the result."""
    made = {}

    def result(state=None, stream=None, **given):
        key = json.dumps([stream, given], sort_keys=True)
        if key not in made or state is not None:
            options = SearchSection(**{**SHORT, "methods": METHODS, **given})
            model = ModelSection(name=str(tiny_dir), stream=stream)
            made[key] = search(model, [DataSpec(source=str(rows))], options, state=state)
        return made[key]

    return result


def plain(result):
    """What equal runs have in common."""
    return {key: value for key, value in result.items() if key != "run"}


def test_the_three_parts_are_disjoint_and_drawn_by_the_seed(tiny_dir, rows):
    made = []
    for seed in (0, 0, 1):
        options = SearchSection(**SHORT, max_flops=0.5, seed=seed)
        study = Study.open(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(rows))], options)
        parts = parts_of(study)
        all_of = [*parts.looked, *parts.choose, *parts.guarantee]
        assert sorted(all_of) == list(range(18))
        tasks = [study.samples[place].task for place in parts.guarantee]
        assert tasks.count("colour") == tasks.count("caption") == 5
        assert set(parts.first(0.5)) < set(parts.first(1.0)) == set(parts.looked)
        contents = [
            {study.samples[p].prompt for p in part} for part in (parts.looked, parts.choose, parts.guarantee)
        ]
        made.append([*contents, parts.search])
    assert made[0] == made[1] != made[2]


def test_the_result_is_the_same_each_time_and_by_seed(found, tmp_path):
    first = found(max_flops=0.93)
    again = found(max_flops=0.93, state=tmp_path / "s.partial.jsonl")
    assert plain(first) == plain(again)
    assert not list(tmp_path.iterdir())  # what was kept for a resumption is gone
    assert plain(found(max_flops=0.93, seed=1)) != plain(first)


def test_numbers_are_those_of_the_samples_that_choose(found, tiny_dir, rows):
    result = found(max_flops=0.93)
    options = SearchSection(**{**SHORT, "methods": METHODS, "max_flops": 0.93})
    study = Study.open(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(rows))], options)
    places = parts_of(study).choose
    assert result["parts"]["choose"] == {"colour": 2, "caption": 2}
    samples = [study.samples[place] for place in places]
    for row in result["candidates"]:
        one = Combination.of(Schedule.from_dict(row["schedule"]), 6)
        if one is None:
            continue
        batches = [[number] for number in range(len(samples))]
        alone = tried(study.loaded, None, [one.candidate()], samples, 2, batches)
        worst = max(alone.by_task(alone.kl(0)).values())
        assert row["worst_kl"] == pytest.approx(worst, rel=1e-3, abs=1e-7)
        assert row["worst_agreement"] == min(alone.by_task(alone.agreement(0)).values())
        assert row["worst_agreement"] <= row["agreement"] + 1e-9


def test_the_document_is_what_its_type_says(found):
    absent = set()
    told(json.loads(json.dumps(found(max_flops=0.93))), Search, "search", absent)
    assert absent <= {"template_date", "layer", "parameters", "findings"}


def test_rungs_of_a_result(found):
    result = found(max_flops=0.93, limit=16)
    schedules = [rung["schedules"] for rung in result["rungs"]]
    samples = [rung["samples"] for rung in result["rungs"]]
    assert schedules[0] == 24 and schedules[-1] < schedules[0]
    assert samples == [6, 8] and samples[-1] == sum(result["parts"]["search"].values())
    assert not result["stopped"]
    assert any(row["method"] == "combination" for row in result["candidates"])


@pytest.mark.parametrize("goal", [{"max_flops": 0.93}, {"max_kv": 0.95}, {"max_flops": 0.93, "max_kv": 0.95}])
def test_within_a_cost_the_closest_is_best(found, goal):
    result = found(**goal)
    good = [row for row in result["candidates"] if row["meets"]]
    for row in result["candidates"]:
        costs = {"max_flops": row["flops_ratio"]["flops"], "max_kv": row["kv_ratio"]}
        assert row["meets"] == all(costs[name] <= most for name, most in goal.items())
    best = next(row for row in good if row["name"] == result["best"])
    assert best["worst_kl"] == min(row["worst_kl"] for row in good)
    assert Schedule.from_dict(result["schedule"]).plain() == Schedule.from_dict(best["schedule"]).plain()
    assert result["schedule"]["provenance"]["search"] == goal


@pytest.mark.parametrize("goal", [{"max_kl": 0.001}, {"min_agreement": 0.9}])
def test_within_a_distance_the_cheapest_that_is_promised_is_best(found, goal):
    result = found(**goal, risk=0.6)
    good = [row for row in result["candidates"] if row["meets"]]
    for row in result["candidates"]:
        near = row["worst_kl"] <= goal.get("max_kl", 9) and row["worst_agreement"] >= goal.get(
            "min_agreement", 0
        )
        assert row["meets"] == near
    assert good
    held = [one["candidate"] for one in result["guarantee"]["tested"] if one["holds"]]
    costs = {row["name"]: row["flops_ratio"]["flops"] for row in good}
    tested = [costs[one["candidate"]] for one in result["guarantee"]["tested"]]
    assert tested == sorted(tested, reverse=True)  # from dear to cheap
    assert result["promised"] and costs[result["best"]] == min(costs[name] for name in held)


def test_what_is_proven_is_the_bound_of_the_losses(found):
    result = found(max_flops=0.93)
    [test] = [one for one in result["guarantee"]["tested"] if one["candidate"] == result["best"]]
    promise = Promise(0.5, 0.95)
    bounds = [
        promise.bound([loss] * result["guarantee"]["samples"][task]) for task, loss in test["loss"].items()
    ]
    assert result["proven"] == max(bounds)
    assert result["promised"] == test["holds"] == (result["proven"] <= 0.5 + 1e-9)


def test_a_goal_that_cannot_be_met_is_told_in_a_line(tiny_dir, rows, tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        GateError, match=r"no schedule costs at most 1% of the full model's prefill FLOPs; without"
    ):
        found(max_flops=0.01, methods=("vtw",))
    within = ("--max-flops", 0.9, "--output", "s.json")
    common = (tiny_dir, "--search", "--data", rows, "--methods", "vtw", "--trials", 20, "--risk", 0.5)
    done = vtw("budget", *common, "--limit", 9, "--max-new-tokens", 2, "--max-kv", 0.01)
    assert done.code == 3 and done.err.splitlines()[-2].startswith(
        "error: no schedule costs at most 1% of the full"
    )
    done = vtw("budget", *common, "--limit", 9, "--max-new-tokens", 2, "--max-kl", 1e-12, *within)
    assert (
        done.code == 3
        and "error: no schedule meets the goal (FLOPs at most 90%, worst task's KL at most 1e-12); the"
        in done.err
    )
    assert (tmp_path / "s.json").is_file() and not (tmp_path / "s.schedule.yaml").exists()
    assert json.loads((tmp_path / "s.json").read_text())["best"] is None
    done = vtw("budget", *common)
    assert done.code == 2 and "a search needs a goal" in done.err
    done = vtw("budget", *common, "--max-flops", 0.5, "--ratios", "0.5")
    assert done.code == 2 and "--ratios does not go with --search" in done.err
    done = vtw("budget", tiny_dir, "--max-kv", 0.5)
    assert done.code == 2 and "--max-kv goes with --search" in done.err


def test_too_few_samples_are_told_before_the_model_is_loaded(tiny_dir, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("vtwcli.measure.study.load_model", lambda *_, **__: pytest.fail("loaded"))
    options = SearchSection(limit=9, max_flops=0.5)
    with pytest.raises(
        UsageError, match=r"the promise of a search \(risk 0\.02, confidence 0\.95\) needs at least 297"
    ):
        search(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(rows))], options)


def test_a_killed_search_goes_on_and_finds_the_same(found, tmp_path, monkeypatch, capsys):
    state = tmp_path / "s.partial.jsonl"
    whole = found(max_flops=0.93)
    entry, count = trials_of.Trials._entry, []

    def dying(self, *args):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(1)
        return entry(self, *args)

    monkeypatch.setattr(trials_of.Trials, "_entry", dying)
    with pytest.raises(KeyboardInterrupt):
        found(max_flops=0.93, state=state)
    assert len(list(tmp_path.iterdir())) == 1
    count.clear()
    measured = []
    monkeypatch.setattr(trials_of.Trials, "_entry", lambda *args: measured.append(1) or entry(*args))
    again = found(max_flops=0.93, state=state)
    assert (
        plain(again) == plain(whole)
        and "resuming: 5 parts of the search are done already" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(trials_of.Trials, "_entry", entry)
    # other options are another search
    with kept(state, "another", ["unit 0"]) as (_, keep):
        keep(0, {})


def test_the_limit_of_time_ends_it(found):
    result = found(max_flops=0.93, minutes=1e-9)
    assert result["stopped"] and len(result["rungs"]) == 1
    assert result["best"] is not None
    assert "where the time was up" in report.search_sentence(result)
    assert not found(max_flops=0.93, minutes=600)["stopped"]


def test_streamed_layers_leave_out_what_they_cannot_do(found, capsys):
    result = found(max_flops=0.93, stream=True)
    assert result["run"]["streamed"] and result["best"] is not None
    assert result["left_out"] == [
        {"methods": ["fitprune"], "why": "scores of all rows are not known when layers are streamed"},
        {
            "methods": ["vscan"],
            "why": "scores of the vision tower need the whole model when layers are streamed",
        },
    ]
    assert "left out: vscan: scores of the vision tower" in capsys.readouterr().err
    with pytest.raises(UsageError, match="layers are streamed and cannot answer"):
        found(max_flops=0.93, stream=True, loss="metric")


def test_views(found, tmp_path):
    from rich.console import Console

    result = found(max_flops=0.93)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.search_view(result))
    text = console.export_text()
    assert all(name in text for name in result["pareto"]) and result["best"] in report.markdown(result)
    assert f"Halved from {result['rungs'][0]['schedules']} schedules" in text
    report.plot_search(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    sentence = report.search_line({**result, "promised": True})
    assert sentence.endswith(
        "with 95 % confidence on average at most 50 % of an answer's tokens change, in every task."
    )
    assert "not promised for a risk of 50 %" in report.search_line({**result, "promised": False})
    assert report.shortfall({**result, "promised": False})[0].startswith("the promise cannot be given. ")


def test_the_schedule_is_one_that_other_commands_take(tiny_dir, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = vtw(
        *("budget", tiny_dir, "--search", "--max-flops", 0.95, "--methods", "vtw,uniform", "--trials", 20),
        *("--data", rows, "--limit", 9, "--max-new-tokens", 2, "--risk", 0.9, *SURE, "--output", "s.json"),
    )
    assert done.code == 0, done.err
    assert "s.schedule.yaml" in done.err and (tmp_path / "s.png").is_file()
    result = json.loads((tmp_path / "s.json").read_text())
    for file in ("s.schedule.yaml", "s.json"):
        assert Schedule.from_file(tmp_path / file).to_dict() == result["schedule"]
    judged = ("--limit", 9, "--max-new-tokens", 2, "--no-timing", "--bootstrap", 0)
    done = vtw("eval", tiny_dir, "--schedule", "s.schedule.yaml", "--data", rows, *judged, "--json")
    assert done.code == 0 and "judge on others" in done.err
    done = vtw("eval", tiny_dir, "--schedule", "s.json", "--data", rows, *judged)
    assert done.code == 0 and "judge on others" not in done.err  # the others of each task are left


def test_json(tiny_dir, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = vtw(
        *("budget", tiny_dir, "--search", "--max-flops", 0.95, "--methods", "vtw", "--trials", 12, "--json"),
        *("--data", rows, "--limit", 9, "--max-new-tokens", 2, "--risk", 0.9, *SURE),
    )
    assert done.code == 0 and json.loads(done.out)["format"] == "vtw-search"
    assert not list(tmp_path.iterdir())


def test_as_a_step_of_a_recipe(tiny_dir, tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        f"model: {tiny_dir}\ndata: [{rows}]\n"
        "search: {max_flops: 0.95, risk: 0.9, loss: kl, eta: 1000, limit: 5, max_new_tokens: 2, trials: 20, "
        "methods: [vtw, uniform]}\n"
        "eval: {limit: 9, max_new_tokens: 2, bootstrap: 0, timing: false}\nexport:\n"
    )
    assert vtw("recipe", "check", "r.yaml").out == "r.yaml: valid: search, eval, export\n"
    done = vtw("run", "r.yaml", "--output", "out", "--dry-run")
    assert done.code == 0 and "max_flops 0.95" in done.out and not (tmp_path / "out").exists()
    done = vtw("run", "r.yaml", "--output", "out")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "out" / "search.json").read_text())
    [(name, row)] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["schedules"].items()
    assert name == result["best"] and row["schedule"] == result["schedule"]
    judged = json.loads((tmp_path / "out" / "evaluation.json").read_text())["samples"]
    assert not {one["id"] for one in judged} & {one["id"] for one in result["samples"]}
    assert "search" in done.err and (tmp_path / "out" / "model" / "manifest.json").is_file()
    assert vtw("run", "r.yaml", "--output", "out", "--dry-run").out.count("kept") == 3
    (tmp_path / "bad.yaml").write_text(f"model: {tiny_dir}\nsearch: {{trials: 5}}\n")
    done = vtw("recipe", "check", "bad.yaml")
    assert done.code == 2 and "search: there is no goal" in done.err
    (tmp_path / "few.yaml").write_text(f"model: {tiny_dir}\nsearch: {{max_flops: 0.5, limit: 20}}\n")
    assert (
        "search.limit is 20, and what is to be proved needs at least 297"
        in vtw("recipe", "check", "few.yaml").err
    )
