"""MME: two questions a picture, one to be answered yes and one no."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from vtwcli.data.sample import Sample

PERCEPTION = (
    *(
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
)
"""Its categories; all others are cognition."""


def mme_word(answer: str) -> str | None:
    """What an answer says, ``yes``, ``no`` or neither (None).

    Full stops aside it is that word, or its first letter alone, or has the word among its first four letters.
    """
    said = answer.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said)
    return next((word for word in ("yes", "no") if word in said[:4]), None)


def mme(answer: str, sample: Sample) -> float:
    """1 if the answer says what the reference says, else 0 (Fu et al., 2023, https://arxiv.org/abs/2306.13394)."""
    return float(mme_word(answer) == sample.references[0].lower().strip().replace(".", ""))


def mme_summary(right: Sequence[float], samples: Sequence[Sample]) -> dict[str, float]:
    """The scores ``perception`` (2,000 at most) and ``cognition`` (800), sums over the categories that are there.

    A category gives 100 times the share of right answers and 100 times the share of pictures of which both are right.
    Pictures with one question among the samples only do not count; without any other a score is left out.
    """
    pictures: dict[str, dict[str, list[float]]] = {}
    for value, sample in zip(right, samples, strict=True):
        if "category" not in sample.meta:
            continue  # not MME's own rows
        category, picture = str(sample.meta["category"]), str(sample.meta["question_id"])
        pictures.setdefault(category, {}).setdefault(picture, []).append(value)
    totals: dict[str, float] = {}
    for category, found in pictures.items():
        pairs = [pair for pair in found.values() if len(pair) == 2]
        if pairs:
            score = fmean(100 * fmean(pair) + 100 * (sum(pair) == 2) for pair in pairs)
            kind = "perception" if category in PERCEPTION else "cognition"
            totals[kind] = totals.get(kind, 0.0) + score
    return totals
