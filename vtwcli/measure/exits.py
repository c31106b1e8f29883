"""An exit of each sample's own beside the fixed layer that the same policy chooses on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vtwcli.judge import policies
from vtwcli.judge.flops import TextShape
from vtwcli.judge.guarantee import Promise
from vtwcli.measure.candidates import Tried, described
from vtwcli.measure.guaranteed import of_candidates
from vtwcli.measure.study import Study
from vtwcli.methods.exits import label_of
from vtwcli.methods.method import Candidate
from vtwcli.recipe.recipe import CalibrateSection
from vtwcli.results.calibration import Exits, FixedLayer, Outcome
from vtwcli.schedule.schedule import Schedule


@dataclass(frozen=True)
class Beside:
    """Plain withdrawals that are run beside candidates.

    Attributes:
        study: on whose samples.
        least: the first layer.
        first: how many candidates are in front of them.
        found: what came of all.
    """

    study: Study[CalibrateSection]
    least: int
    first: int
    found: Tried

    @classmethod
    def run(cls, study: Study[CalibrateSection], candidates: Sequence[Candidate], longest: int) -> Beside:
        """Run candidates and, behind them, withdrawal at each layer that the policy may choose.

        Args:
            longest: answer, in tokens.
        """
        least = study.least(study.options.min_layer)
        found = study.try_([*candidates, *_withdrawals(least, study.shape.depth)], longest)
        return cls(study, least, len(candidates), found)

    def exits(self, number: int, promise: Promise | None, longest: int) -> Exits:
        """Where samples leave under the candidate of this number, beside the fixed layer.

        Args:
            promise: what the policy asks for, if it does.
            longest: answer, in tokens.
        """
        depth, found = self.study.shape.depth, self.found
        left = [answer.actions[0]["layer"] for answer in found.rows[number]]
        layers = [depth if layer is None else layer for layer in left]
        kl = np.stack([found.kl(self.first + i) for i in range(depth - self.least)], 1)
        labels = [self.least + label_of(row.tolist(), self.study.options.eta) for row in kl]
        k = self._fixed(promise, longest)
        fixed: FixedLayer | None = None
        if k is not None:
            fixed = {"layer": k, **self._outcome(self.first + k - self.least)}
        return {
            "samples": [
                {"id": sample.id, "task": sample.task, "layer": layer, "label": label}
                for sample, layer, label in zip(found.samples, layers, labels, strict=True)
            ],
            "leave": _shares(layers, depth),
            "labels": _shares(labels, depth),
            "mean_layer": float(np.mean(layers)),
            "chosen": self._outcome(number),
            "fixed": fixed,
        }

    def _fixed(self, promise: Promise | None, longest: int) -> int | None:
        """The layer that the policy chooses on these samples."""
        options, found = self.study.options, self.found
        plain = _withdrawals(self.least, self.study.shape.depth)
        numbers = range(self.first, self.first + len(plain))
        if promise is not None:  # from the last layer down, as VTW's own are tested
            backwards = replace(found, rows=[found.rows[number] for number in reversed(numbers)])
            said = of_candidates(self.study, promise, plain[::-1], longest, backwards)
            held = sum(one["holds"] for one in said["tested"])
            return self.study.shape.depth - held if held else None
        rows = [self._outcome(number) for number in numbers]
        unseen = [rows[0]] * self.least  # no policy looks in front of the first
        kl, agree = (
            np.pad(np.stack([of(number) for number in numbers], 1), ((0, 0), (self.least, 0)))
            for of in (found.kl, found.agreement)
        )
        return policies.choose(
            policies.rule_of(options, self.least, [*unseen, *rows]), kl, agree, found.tasks
        )

    def _outcome(self, number: int) -> Outcome:
        return outcome_of(number, self.found, self.study.text)


def outcome_of(number: int, found: Tried, shape: TextShape) -> Outcome:
    """What the candidate of this number did."""
    row = described(Candidate("", "", Schedule()), number, found, shape)
    return {
        "flops_ratio": row["flops_ratio"],
        "kv_ratio": row["kv_ratio"],
        "kl": row["kl"],
        "worst_kl": row["worst_kl"],
        "agreement": row["agreement"],
    }


def _withdrawals(least: int, depth: int) -> list[Candidate]:
    return [Candidate(f"K={k}", "vtw", Schedule.withdraw_at(k)) for k in range(least, depth)]


def _shares(layers: Sequence[int], depth: int) -> list[float]:
    return [float(x) for x in np.bincount(layers, minlength=depth + 1) / len(layers)]
