"""The schedule that a search finds beside the best single method, at equal FLOPs, on samples that neither has seen.

``python -m tests.benchmarks.bench_search MODEL --at 0.3,0.4,0.5 [--data SOURCE ...] [--test SOURCE ...]``

For every bound: a search, and of the schedules that ``vtw budget`` compares, on as many samples as the search looks and
chooses on, the one within the bound whose worst task is closest. Both are then measured on other samples. Intervals are
of the paired bootstrap, samples redrawn within their tasks: of the worst task's KL, and of the ratio of the two.
"""

from __future__ import annotations

import argparse

import numpy as np

from vtwcli.budget import candidates
from vtwcli.data.spec import DataSpec
from vtwcli.measure.candidates import compared, described, flops_of
from vtwcli.measure.study import Study
from vtwcli.methods.method import Candidate
from vtwcli.models.inputs import encode
from vtwcli.recipe.recipe import BudgetSection, ModelSection
from vtwcli.recipe.search import SearchSection
from vtwcli.schedule.schedule import Schedule
from vtwcli.search import search
from vtwcli.searching.space import Costs

DRAWS = 2000


def worst(kl: np.ndarray, tasks: np.ndarray) -> float:
    """The mean of the worst task."""
    return max(float(kl[tasks == task].mean()) for task in dict.fromkeys(tasks.tolist()))


def intervals(one: np.ndarray, other: np.ndarray, tasks: np.ndarray) -> list[tuple[float, float]]:
    """95 % intervals of both worst tasks' KL, and of their ratio."""
    random, drawn = np.random.default_rng(0), []
    groups = [np.flatnonzero(tasks == task) for task in dict.fromkeys(tasks.tolist())]
    for _ in range(DRAWS):
        places = np.concatenate([random.choice(group, len(group)) for group in groups])
        a, b = worst(one[places], tasks[places]), worst(other[places], tasks[places])
        drawn.append((a, b, a / max(b, 1e-12)))
    low, high = np.quantile(np.array(drawn), (0.025, 0.975), axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--test", action="append", default=[])
    parser.add_argument("--at", default="0.3,0.4,0.5")
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--test-limit", type=int, default=100)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    model = ModelSection(name=given.model)
    data = [DataSpec.parse(text) for text in given.data or ["demo"]]
    test = [DataSpec.parse(text) for text in given.test or ["demo:split=test"]]
    bounds = [float(text) for text in given.at.split(",")]

    options = BudgetSection(limit=max(2, given.limit // 2), max_new_tokens=given.tokens)
    study = Study.open(model, data, options)
    counts = [
        (one.length, int(one.visual.sum())) for one in (encode(study.loaded, s) for s in study.samples[:50])
    ]
    length, visual = (round(float(np.mean(column))) for column in zip(*counts, strict=True))
    costs = Costs(study.text, length - visual, visual, {"flops": 1.02 * max(bounds)})
    singles = [one for one in candidates(study.shape, options) if costs.within(one.schedule)]
    tried = study.try_(singles, given.tokens, lenient=True)
    kept = [number for number in range(len(singles)) if number not in tried.refused]
    rows, _ = compared(
        [singles[n] for n in kept],
        type(tried)(tried.samples, tried.full, [tried.rows[n] for n in kept]),
        study.text,
    )
    print(f"{len(rows)} schedules of single methods on {len(tried.samples)} samples", flush=True)
    found: list[Candidate] = []
    for bound in bounds:
        asked = SearchSection(
            limit=given.limit, max_flops=bound, risk=0.2, trials=given.trials, max_new_tokens=given.tokens
        )
        result = search(model, data, asked)
        assert result["schedule"] is not None and result["best"] is not None
        single = min((row for row in rows if flops_of(row) <= bound), key=lambda row: row["worst_kl"])
        found.append(Candidate(result["best"], "found", Schedule.from_dict(result["schedule"])))
        found.append(Candidate(single["name"], single["method"], Schedule.from_dict(single["schedule"])))
        print(f"at {bound:.0%}: {result['best']} | {single['name']}", flush=True)
    other = BudgetSection(limit=given.test_limit, max_new_tokens=given.tokens, seed=1)
    unseen = Study.open(model, test, other)
    seen = set(study.mix.fingerprints)
    assert not seen & set(unseen.mix.fingerprints), "samples of the search among those of the test"
    last = unseen.try_(found, given.tokens)
    tasks = np.array(last.tasks)
    print(f"\n{len(tasks)} samples that neither has seen, {len(set(tasks.tolist()))} tasks\n")
    print(
        "| FLOPs at most | found | FLOPs | worst task's KL | best single method | FLOPs | worst task's KL | ratio |"
    )
    print("|---|---|---:|---:|---|---:|---:|---:|")
    for number, bound in enumerate(bounds):
        a, b = 2 * number, 2 * number + 1
        kl = [last.kl(a), last.kl(b)]
        ranges = intervals(kl[0], kl[1], tasks)
        cost = [flops_of(described(found[n], n, last, unseen.text)) for n in (a, b)]
        values = [worst(one, tasks) for one in kl]
        said = [f"{x:.2g} ({low:.2g}..{high:.2g})" for x, (low, high) in zip(values, ranges, strict=False)]
        low, high = ranges[2]
        print(
            f"| {bound:.0%} | {found[a].name} | {cost[0]:.1%} | {said[0]} | {found[b].name} | {cost[1]:.1%} "
            f"| {said[1]} | {values[0] / max(values[1], 1e-12):.2f} ({low:.2f}..{high:.2f}) |"
        )


if __name__ == "__main__":
    main()
