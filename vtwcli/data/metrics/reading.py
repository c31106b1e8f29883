"""Reading text and charts: ANLS, relaxed accuracy, OCRBench."""

from __future__ import annotations

from vtwcli.data.sample import Sample

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}  # to ASCII


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def anls(answer: str, sample: Sample) -> float:
    """Average normalised Levenshtein similarity of one answer, in {0} or (0.5, 1].

    Biten et al., 2019, https://arxiv.org/abs/1905.13648: with ``NL = edit distance / longer length``, the best
    reference's ``1 - NL`` if ``NL < 0.5``, else 0. Case and runs of spaces do not count.
    """

    def similarity(said: str, meant: str) -> float:
        longest = max(len(said), len(meant))
        distance = edit_distance(said, meant) / longest if longest else 0.0
        return 1.0 - distance if distance < 0.5 else 0.0

    said = " ".join(answer.lower().split())
    return max(similarity(said, " ".join(reference.lower().split())) for reference in sample.references)


def relaxed_accuracy(answer: str, sample: Sample) -> float:
    """1 if the answer equals a reference without case, or as a number is within 5 % of it, else 0.

    ChartQA (Masry et al., 2022, https://arxiv.org/abs/2203.10244): ``|answer - reference| <= 0.05 |reference|``;
    a per cent sign divides by 100; a reference of 0 needs equal text.
    """

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    def close(said: str, meant: str) -> bool:
        value, target = number(said), number(meant)
        if value is not None and target:
            return abs(value - target) / abs(target) <= 0.05
        return said.lower() == meant.lower()

    return float(any(close(answer.strip(), reference.strip()) for reference in sample.references))


def ocrbench(answer: str, sample: Sample) -> float:
    """1 if a reference is contained in the answer, else 0 (Liu et al., 2023, https://arxiv.org/abs/2305.07895).

    Case does not count, line breaks are spaces and full-width letters and marks are plain ones, as in lmms-eval;
    formulas (``dataset`` is HME100k) are read as they are, without any space.
    """
    formula = sample.meta.get("dataset") == "HME100k"

    def plain(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.translate(_FULL_WIDTH).lower().strip().replace("\n", " ")

    wanted = [text for text in map(plain, sample.references) if text]  # no text is contained in every answer
    return float(any(text in plain(answer) for text in wanted))
