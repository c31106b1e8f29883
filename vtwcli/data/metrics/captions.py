"""Captions: CIDEr-D."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

_CAPTION_TOKENS = re.compile(
    r"can(?=not\b)|(?<=\bcan)not"  # cannot -> can not
    r"|[a-z]+(?=n't\b)|n't\b"  # don't -> do n't
    r"|o'clock|'(?:s|re|ve|ll|d|m)\b"
    r"|\d+(?:[.,:/]\d+)+"
    r"|\w+(?:[-/&]\w+)*"
    r"|[$#%&@+*=/]|\(|\)"
)


def caption_tokens(text: str) -> list[str]:
    """Words of a caption, lower case and without punctuation.

    The caption evaluation's tokenizer (Stanford PTB, a Java program) followed closely enough for everyday
    captions: clitics are words of their own, hyphenated words stay whole, brackets become ``-lrb-`` and
    ``-rrb-``. Not followed: abbreviations ("mr.") lose their full stop.
    """
    text = text.lower().replace("\u2019", "'")
    brackets = {"(": "-lrb-", ")": "-rrb-"}
    return [brackets.get(token, token) for token in _CAPTION_TOKENS.findall(text)]


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer, in [0, 10]; multiply the mean by 100 for the number that papers print.

    Vedantam et al., 2015, https://arxiv.org/abs/1411.5726, as the caption evaluation computes it. With ``g`` the
    tf-idf vector of an n-gram order (term count times ``log N - log max(1, df)``, ``df`` counting the images
    that have the n-gram in a reference, ``N`` the images):

        mean over n = 1..4 and over references r of
        10 exp(-(l_a - l_r)^2 / (2 sigma^2)) sum(min(g_a, g_r) g_r) / (|g_a| |g_r|),  sigma = 6,

    where ``l`` is the number of bigrams. The document frequencies come from these references, so a score
    depends on the corpus, and a corpus of one image gives 0.

    Args:
        answers: one caption per image.
        references: the accepted captions of each image.
    """
    cooked = [[_ngrams(caption_tokens(text)) for text in texts] for texts in references]
    frequency = Counter(gram for counts in cooked for gram in set().union(*counts))
    log_images = math.log(len(cooked)) if cooked else 0.0

    def vector(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {
            gram: count * (log_images - math.log(max(1, frequency[gram]))) for gram, count in counts.items()
        }

    def norms(weights: Mapping[tuple[str, ...], float]) -> list[float]:
        return [math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n)) for n in range(1, 5)]

    def bigrams(counts: Counter[tuple[str, ...]]) -> int:
        return sum(count for gram, count in counts.items() if len(gram) == 2)

    results = []
    for answer, texts in zip(answers, cooked, strict=True):
        counts = _ngrams(caption_tokens(answer))
        said = vector(counts)
        said_norms = norms(said)
        total = 0.0
        for text in texts:
            meant = vector(text)
            penalty = math.exp(-((bigrams(counts) - bigrams(text)) ** 2) / (2 * 6.0**2))
            dots = [0.0] * 4
            for gram, weight in said.items():
                other = meant.get(gram, 0.0)
                dots[len(gram) - 1] += min(weight, other) * other
            for dot, a, b in zip(dots, said_norms, norms(meant), strict=True):
                total += penalty * dot / (a * b) / 4 if a * b else 0.0
        results.append(10.0 * total / len(texts))
    return results
