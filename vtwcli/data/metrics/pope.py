"""Yes and no as POPE reads them."""

from __future__ import annotations

from collections.abc import Sequence

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


def yes_summary(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and the share of "yes" among the answers.

    Li et al., 2023, https://arxiv.org/abs/2305.10355: TP, FP, FN count answers against references;
    ``precision = TP / (TP + FP)``, ``recall = TP / (TP + FN)``, ``F1 = 2PR / (P + R)``, each 0 where its
    denominator is 0.
    """
    said = [pope_says_yes(answer) for answer in answers]
    meant = [_pope_means_yes(sample) for sample in samples]
    true_positives = sum(s and m for s, m in zip(said, meant, strict=True))
    precision = true_positives / sum(said) if any(said) else 0.0
    recall = true_positives / sum(meant) if any(meant) else 0.0
    both = precision + recall
    f1 = 2 * precision * recall / both if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": sum(said) / len(said)}
