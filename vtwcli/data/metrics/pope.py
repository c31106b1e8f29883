"""Yes and no as POPE, lmms-eval and MME read them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from vtwcli.data.sample import Sample


def pope_says_yes(answer: str) -> bool:
    """POPE's reading of an answer: "no" if its first sentence has the word No, no or not, else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _pope_means_yes(sample: Sample) -> bool:
    return sample.references[0].strip().lower() == "yes"


def pope(answer: str, sample: Sample) -> float:
    """1 if the answer, read by ``pope_says_yes``, agrees with the reference, else 0; its mean is accuracy."""
    return float(pope_says_yes(answer) == _pope_means_yes(sample))


def pope_exact(answer: str, sample: Sample) -> float:
    """1 if the answer is the reference's word and nothing else, without case, else 0: lmms-eval's reading of POPE."""
    return float(answer.strip().lower() == sample.references[0].strip().lower())


def yes_summary(answers: Sequence[str], samples: Sequence[Sample], exact: bool = False) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and the share of "yes" among the answers.

    With ``exact`` as lmms-eval counts: an answer says yes or no only if it is that word, what is neither counts for
    nothing, and the share of "yes" is that of the references.

    Li et al., 2023, https://arxiv.org/abs/2305.10355: TP, FP, FN count answers against references;
    ``precision = TP / (TP + FP)``, ``recall = TP / (TP + FN)``, ``F1 = 2PR / (P + R)``, each 0 where its
    denominator is 0.
    """
    meant = [_pope_means_yes(sample) for sample in samples]
    if exact:
        words = [answer.strip().lower() for answer in answers]
        said = [word == "yes" for word in words]
        recalled = sum(m for word, m in zip(words, meant, strict=True) if word in ("yes", "no"))
    else:
        said = [pope_says_yes(answer) for answer in answers]
        recalled = sum(meant)
    true_positives = sum(s and m for s, m in zip(said, meant, strict=True))
    precision = true_positives / sum(said) if any(said) else 0.0
    recall = true_positives / recalled if recalled else 0.0
    both = precision + recall
    f1 = 2 * precision * recall / both if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": fmean(meant if exact else said)}
