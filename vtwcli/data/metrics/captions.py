"""Captions: CIDEr-D, BLEU and ROUGE-L, as the caption evaluation of COCO computes them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

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


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus of captions, in [0, 1].

    Papineni et al., 2002, https://aclanthology.org/P02-1040: the geometric mean of the shares of n-grams that a
    reference has too, each as often as it occurs in one of them at most, times ``exp(1 - r / c)`` where the answers'
    c words are fewer than the r of the references that are nearest in length (of two the shorter).
    """
    matched, offered = Counter[int](), Counter[int]()
    said_words = meant_words = 0
    for answer, texts in zip(answers, references, strict=True):
        said, meant = caption_tokens(answer), [caption_tokens(text) for text in texts]
        said_words += len(said)
        meant_words += min((len(words) for words in meant), key=lambda n: (abs(n - len(said)), n))
        most: Counter[tuple[str, ...]] = Counter()
        for words in meant:
            most |= _ngrams(words)
        for gram, count in _ngrams(said).items():
            offered[len(gram)] += count
            matched[len(gram)] += min(count, most[gram])
    short = math.exp(min(0.0, 1 - meant_words / said_words)) if said_words else 0.0
    found, product = [], 1.0
    for n in range(1, 5):
        product *= matched[n] / offered[n] if offered[n] else 0.0
        found.append(short * product ** (1 / n))
    return found


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption, in [0, 1].

    Lin, 2004, https://aclanthology.org/W04-1013: with ``l`` the longest common subsequence of words, the F-measure
    ``(1 + b^2) P R / (R + b^2 P)``, b = 1.2, of the best ``P = l / |answer|`` and the best ``R = l / |reference|``
    over the references.
    """
    said = caption_tokens(answer)
    meant = [words for words in map(caption_tokens, references) if words]
    if not said or not meant:
        return 0.0
    common = [_longest_common(said, words) for words in meant]
    precision = max(common) / len(said)
    recall = max(length / len(words) for length, words in zip(common, meant, strict=True))
    weight = 1.2**2
    return (1 + weight) * precision * recall / (recall + weight * precision) if precision else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def caption_summary(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU of the corpus and the mean ROUGE-L, beside CIDEr."""
    by_order = {f"bleu_{n}": value for n, value in enumerate(bleu(answers, references), start=1)}
    said = zip(answers, references, strict=True)
    return by_order | {"rouge_l": fmean(rouge_l(answer, texts) for answer, texts in said)}
