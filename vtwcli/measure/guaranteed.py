"""A calibration's choice with a promise: candidates in a fixed order, tested on samples that did not order them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vtwcli.data import metrics
from vtwcli.errors import UsageError
from vtwcli.judge.guarantee import Losses, Promise, walk
from vtwcli.machine import distributed
from vtwcli.measure.candidates import Tried
from vtwcli.measure.promised import counted, distinct, losses_of, population
from vtwcli.methods.method import Candidate
from vtwcli.models.generation import generate_batches
from vtwcli.results.guarantee import Guarantee, Tested
from vtwcli.runtime import PruningError, pruned
from vtwcli.schedule.schedule import Schedule

if TYPE_CHECKING:
    from vtwcli.measure.study import Study
    from vtwcli.recipe.recipe import CalibrateSection
    from vtwcli.recipe.search import SearchSection


def of_layers(
    study: Study[CalibrateSection],
    promise: Promise,
    least: int,
    kl: NDArray[np.float64],
    agree: NDArray[np.float64],
    seeing: NDArray[np.bool_],
) -> tuple[int | None, Guarantee]:
    """K, the first layer of those tested from the last one down to ``least`` that all hold; and what is promised.

    Args:
        kl: mean over an answer's positions, by sample and withdrawal layer, nats, [S, L].
        agree: share of positions whose most likely token is the full model's, [S, L].
        seeing: whether a sample has visual tokens; others do not count, [S].
    """
    options, samples = study.options, study.samples
    places = [place for place in distinct(samples) if seeing[place]]
    tasks = [samples[place].task for place in places]
    layers = range(study.shape.depth - 1, least - 1, -1)
    losses: Callable[[int], Losses]
    if options.loss == "metric":
        dropped = metric_drop(study)

        def losses(number: int) -> Losses:
            return dropped(f"K={layers[number]}", Schedule.withdraw_at(layers[number]))[places]
    else:

        def losses(number: int) -> Losses:
            k = layers[number]
            return losses_of(options.loss, kl[places, k], agree[places, k], options.eta)

    tested = walk(len(layers), losses, tasks, promise)
    for layer, one in zip(layers, tested, strict=False):
        one["layer"] = layer
    k = min((one["layer"] for one in tested if one["holds"]), default=None)
    return k, _guarantee(study, promise, tasks, tested)


def of_candidates(
    study: Study[CalibrateSection | SearchSection],
    promise: Promise,
    ordered: Sequence[Candidate],
    longest: int,
    found: Tried | None = None,
) -> Guarantee:
    """What is promised of candidates, the safest first, as other samples than the study's ordered them.

    Args:
        longest: answer, in tokens.
        found: what came of them on the study's samples, where that is known.
    """
    options, found = study.options, found or study.try_(ordered, longest)
    losses: Callable[[int], Losses]
    if options.loss == "metric":
        dropped, seen = metric_drop(study), {sample.id for sample in found.samples}
        places = [place for place, sample in enumerate(study.samples) if sample.id in seen]

        def losses(number: int) -> Losses:
            return dropped(ordered[number].name, ordered[number].schedule)[places]
    else:

        def losses(number: int) -> Losses:
            return losses_of(options.loss, found.kl(number), found.agreement(number), options.eta)

    tested = walk(len(ordered), losses, found.tasks, promise)
    for candidate, one in zip(ordered, tested, strict=False):
        one["candidate"] = candidate.name
    return _guarantee(study, promise, found.tasks, tested)


def metric_drop(study: Study[CalibrateSection | SearchSection]) -> Callable[[str, Schedule], Losses]:
    """How much each sample's score drops when a schedule answers in place of the full model, gains counted as 0, [S].

    Raises:
        UsageError: a schedule that this model cannot execute.
    """
    loaded, samples, longest = study.loaded, study.samples, study.options.longest
    parts = study.batches(longest)

    def scores() -> NDArray[np.float64]:
        def work() -> dict[int, float]:
            mine = [part for _, part in distributed.share(parts)]
            answered = generate_batches(
                loaded, [[samples[place] for place in part] for part in mine], longest
            )
            found = {}
            for part, answers in zip(mine, answered, strict=True):
                for place, (text, _) in zip(part, answers, strict=True):
                    [found[place]] = metrics.scores(samples[place].metric, [text], [samples[place]])
            return found

        with study.part("answers"):
            return np.array(distributed.gathered(work), dtype=np.float64)

    full = scores()

    def drop(name: str, schedule: Schedule) -> Losses:
        try:
            with pruned(loaded.model, schedule):
                return np.clip(full - scores(), 0, 1)
        except PruningError as error:
            raise UsageError(f"schedule {name}: {error}") from None

    return drop


def _guarantee(
    study: Study[CalibrateSection | SearchSection],
    promise: Promise,
    tasks: Sequence[str],
    tested: list[Tested],
) -> Guarantee:
    return {
        "risk": promise.risk,
        "confidence": promise.confidence,
        "loss": study.options.loss,
        "test": "binomial" if promise.binary else "hoeffding-bentkus",
        "population": population(study.mix.sources),
        "samples": counted(tasks),
        "tested": [_first_named(one) for one in tested],
    }


def _first_named(one: Tested) -> Tested:
    """The candidate's name before what came of it."""
    name: Tested = {key: one[key] for key in ("layer", "candidate") if key in one}  # type: ignore
    return {**name, **one}
