"""How answers are judged: each metric by its field's own definition, in plain Python.

A metric maps an answer and a sample's references to a number, larger is better. ``scores`` judges a list of answers
(CIDEr needs the whole corpus), ``aggregate`` adds the summary numbers of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from vtwcli.data.metrics.captions import caption_summary, cider
from vtwcli.data.metrics.choices import ai2d, mmmu, multiple_choice
from vtwcli.data.metrics.mme import mme, mme_summary
from vtwcli.data.metrics.pope import pope, pope_exact, yes_summary
from vtwcli.data.metrics.reading import anls, ocrbench, relaxed_accuracy
from vtwcli.data.metrics.text import exact_match, vqa_soft
from vtwcli.data.sample import Sample
from vtwcli.errors import UsageError, VtwError

_PER_SAMPLE: dict[str, Callable[[str, Sample], float]] = {
    "exact_match": exact_match,
    "vqa_soft": vqa_soft,
    "multiple_choice": multiple_choice,
    "ai2d": ai2d,
    "mmmu": mmmu,
    "pope": pope,
    "pope_exact": pope_exact,
    "mme": mme,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "ocrbench": ocrbench,
}
METRICS: tuple[str, ...] = (*_PER_SAMPLE, "cider")


def _check(metric: str, samples: Sequence[Sample]) -> None:
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", f"known metrics: {', '.join(METRICS)}")
    for sample in samples:
        if not sample.references:
            raise VtwError(f"sample {sample.id!r} has no reference answer, so {metric} cannot judge it")


def scores(metric: str, answers: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """Judge each answer; CIDEr takes its document frequencies from all these samples' references.

    Raises:
        UsageError: an unknown metric.
        VtwError: a sample has no reference.
    """
    _check(metric, samples)
    if metric == "cider":
        return cider(answers, [sample.references for sample in samples])
    return [_PER_SAMPLE[metric](answer, sample) for answer, sample in zip(answers, samples, strict=True)]


def aggregate(metric: str, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Summary of a metric over samples: ``mean`` always, and what its field tells beside it.

    For ``pope`` and ``pope_exact`` precision, recall, F1 and yes-ratio, for ``mme`` perception and cognition, for
    ``cider`` BLEU and ROUGE-L.

    Raises:
        UsageError: an unknown metric, or no samples.
        VtwError: a sample has no reference.
    """
    if not samples:
        raise UsageError(f"no samples to judge by {metric}")
    values = scores(metric, answers, samples)
    summary = {"mean": fmean(values)}
    if metric in ("pope", "pope_exact"):
        summary |= yes_summary(answers, samples, exact=metric == "pope_exact")
    elif metric == "mme":
        summary |= mme_summary(values, samples)
    elif metric == "cider":
        summary |= caption_summary(answers, [sample.references for sample in samples])
    return summary
