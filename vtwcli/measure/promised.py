"""What a promise asks of samples, and what each of them loses; the tests themselves are ``judge.guarantee``'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vtwcli.data.drawing import sample_fingerprint
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.judge.guarantee import Losses, Promise
from vtwcli.machine import distributed

if TYPE_CHECKING:
    from vtwcli.data.sample import Sample
    from vtwcli.data.sources import DataMix
    from vtwcli.measure.answers import Answer
    from vtwcli.recipe.recipe import CalibrateSection
    from vtwcli.recipe.search import SearchSection


def promise_of(options: CalibrateSection | SearchSection) -> Promise | None:
    """What a calibration is to promise; None where its policy is another one."""
    if options.policy != "guarantee":
        return None
    binary = options.loss in ("answer", "kl") or (options.loss == "tokens" and options.positions == "first")
    return Promise(options.risk, options.confidence, binary)


def check_samples(mix: DataMix, options: Any) -> None:
    """Refuse samples with which a calibration cannot give its promise; for other policies nothing is looked at.

    Args:
        options: the command's section, be it of a calibration or not.

    Raises:
        UsageError: too few of a task, or samples that the metric cannot judge one by one.
    """
    if getattr(options, "policy", None) != "guarantee":
        return
    promise = promise_of(options)
    assert promise is not None
    if options.loss == "metric":
        bare = next((one for one in mix.samples if not one.references), None)
        if bare is not None:
            raise UsageError(
                f"--loss metric: sample {bare.id!r} has no reference answer", "choose another --loss"
            )
        if any(one.metric == "cider" for one in mix.samples):
            raise UsageError(
                "--loss metric: CIDEr judges all captions together, so no single one loses",
                "choose another --loss",
            )
    asking = getattr(options, "asking", "the policy guarantee")
    check_enough(mix, promise, asking, halves=options.method != "vtw")


def check_loss(options: Any, streamed: bool) -> None:
    """Refuse the loss ``metric`` of a promise where layers are streamed, which cannot answer.

    Raises:
        UsageError: names the option.
    """
    if streamed and getattr(options, "policy", None) == "guarantee" and options.loss == "metric":
        raise UsageError("--loss metric: layers are streamed and cannot answer", "choose another --loss")


def check_enough(mix: DataMix, promise: Promise, asking: str, *, halves: bool = False) -> None:
    """Refuse too few samples before a model is loaded.

    Args:
        asking: who wants the promise, for the message.
        halves: whether only the second half of each task's samples is tested.

    Raises:
        UsageError: names the number needed.
    """
    counts = counted([mix.samples[place].task for place in distinct(mix.samples)])
    least = needed(promise, halves)
    few = {task: count for task, count in counts.items() if count < least}
    if few:
        half = ", half of which order the candidates" if halves else ""
        said = ", ".join(f"{task} {count}" for task, count in few.items())
        raise UsageError(
            f"{asking} (risk {promise.risk:g}, confidence {promise.confidence:g}) needs at least {least} distinct "
            f"samples of each task{half}, and there are: {said}",
            f"--limit {least} or more, more data, or a larger risk",
        )
    first = [source["source"] for source in mix.sources if source["choice"] == "first rows"]
    if first and distributed.is_main():
        console.warn(
            f"{', '.join(first)}: the first rows are no random draw, so {asking} holds for inputs like them alone"
        )


def needed(promise: Promise | None, halves: bool = False) -> int:
    """How many samples of each task a promise needs at least, ``halves`` as for ``check_enough``; 0 without one."""
    if promise is None:
        return 0
    return 2 * promise.needed - 1 if halves else promise.needed


def distinct(samples: Sequence[Sample]) -> list[int]:
    """Places of the samples that ask something new of their task: equal images and words count once."""
    seen: dict[tuple[str, str], int] = {}
    for place, sample in enumerate(samples):
        seen.setdefault((sample.task, sample_fingerprint(replace(sample, references=()))), place)
    return list(seen.values())


def halved(samples: Sequence[Sample], seed: int) -> tuple[list[int], list[int]]:
    """Places of distinct samples in two parts, drawn within each task: to order candidates, and to test them.

    Where a task's number is odd the second part has one more.
    """
    generator = np.random.default_rng(seed)
    places = distinct(samples)
    first: list[int] = []
    for task in dict.fromkeys(samples[place].task for place in places):
        mine = [place for place in places if samples[place].task == task]
        first += generator.permutation(mine)[: len(mine) // 2].tolist()
    return sorted(first), sorted(set(places) - set(first))


def counted(tasks: Sequence[str]) -> dict[str, int]:
    """Number of samples by task, in order of appearance."""
    return {task: tasks.count(task) for task in dict.fromkeys(tasks)}


def losses_of(loss: str, kl: NDArray[np.float64], agree: NDArray[np.float64], eta: float) -> Losses:
    """What samples lose by ``tokens``, ``answer`` or ``kl``.

    Args:
        kl: mean over an answer's positions, nats, of any shape.
        agree: share of the positions whose most likely token is the full model's, of the same shape.
    """
    if loss == "tokens":
        return np.asarray(1 - agree)
    return np.asarray(agree < 1 if loss == "answer" else kl > eta, dtype=np.float64)


def changed_tokens(
    samples: Sequence[Sample], answers: Sequence[Sequence[Answer]], variant: int
) -> dict[str, list[float]]:
    """Share of the answer's tokens whose first choice changes, of distinct samples with visual tokens, by task.

    Args:
        answers: of each sample the full model's, then each variant's.
        variant: which of them is meant.
    """
    found: dict[str, list[float]] = {}
    for place in distinct(samples):
        full, mine = answers[place][0], answers[place][variant]
        if full.visual_per_layer[0]:
            found.setdefault(samples[place].task, []).append(1 - sum(mine.agree) / len(mine.agree))
    return found


def population(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the samples were drawn from, a source each."""
    return [
        f"{source['source']}{', split ' + source['split'] if source.get('split') else ''} ({source['choice']})"
        for source in sources
    ]
