"""Which candidates a policy accepts, which of them is taken, and from which a method may go further."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vtwcli.measure.candidates import Tried, compared, flops_of
from vtwcli.measure.promised import losses_of
from vtwcli.measure.study import Study
from vtwcli.methods import METHODS
from vtwcli.methods.method import Candidate, Trial
from vtwcli.recipe.recipe import CalibrateSection
from vtwcli.results.calibration import SearchedRow
from vtwcli.results.comparison import ComparedRow


def judged(row: ComparedRow, kl: NDArray[np.float64], options: CalibrateSection) -> SearchedRow:
    """A candidate's row with what the policy says of it.

    Args:
        kl: of each sample, [S] nats.
    """
    quantile = float(np.quantile(kl, options.quantile))
    found: SearchedRow = {**row, "quantile_kl": quantile, "accepted": False}
    found["accepted"] = accepted(found, options)
    return found


def accepted(row: SearchedRow, options: CalibrateSection) -> bool:
    """Whether a candidate's row satisfies the policy."""
    if options.policy == "budget":
        cost = row["kv_ratio"] if options.budget_of == "kv" else flops_of(row)
        return cost <= options.budget
    if options.policy == "agreement":
        return row["agreement"] >= options.agreement
    return harm(row, options) <= options.eta


def harm(row: SearchedRow, options: CalibrateSection) -> float:
    """The KL of a candidate's row that the policy looks at, nats."""
    if options.policy in ("worst-task", "guarantee"):
        return row["worst_kl"]
    return row["quantile_kl"] if options.policy == "quantile" else row["kl"]


def choice(rows: Sequence[SearchedRow], options: CalibrateSection) -> SearchedRow | None:
    """The cheapest accepted row, of equals the closest; under ``budget`` the closest, of equals the cheapest."""
    good = [row for row in rows if row["accepted"]]
    if options.policy == "budget":
        return min(good, key=lambda row: (row["kl"], flops_of(row)), default=None)
    return min(good, key=lambda row: (flops_of(row), row["kl"]), default=None)


def grown(
    study: Study[CalibrateSection], candidates: list[Candidate], found: Tried, longest: int
) -> tuple[list[Candidate], Tried]:
    """Candidates with all that their method makes of what came of them, pass by pass.

    Under ``guarantee`` it goes on from those whose loss on these samples is at most the risk in every task; of the
    metric, which would have to be answered for, from those whose KL stays at or under eta.

    Args:
        found: what came of them.
        longest: answer, in tokens.
    """
    options, method = study.options, METHODS[study.options.method]
    while True:
        tried, _ = compared(candidates, found, study.text)
        rows = [judged(row, found.kl(number), options) for number, row in enumerate(tried)]
        best = choice(rows, options) if options.policy == "budget" else None
        trials = []
        for number, (candidate, row) in enumerate(zip(candidates, rows, strict=True)):
            holds = row["accepted"]
            if options.policy == "budget":
                holds = best is None or row["kl"] < best["kl"]
            elif options.policy == "guarantee" and options.loss != "metric":
                lost = losses_of(options.loss, found.kl(number), found.agreement(number), options.eta)
                holds = max(found.by_task(lost).values()) <= options.risk
            trials.append(Trial(candidate, harm(row, options), flops_of(row), holds))
        more = method.further(study.shape, trials)
        if not more:
            return candidates, found
        candidates, found = [*candidates, *more], found.with_(study.try_(more, longest))
