"""Letters of options, and MMMU's reading of free answers."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from vtwcli.data.cells import LETTERS
from vtwcli.data.sample import Sample

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def multiple_choice(answer: str, sample: Sample) -> float:
    """1 if the answer is the reference's letter, without case, or begins with it as a capital and a full stop, else 0.

    The rule that LLaVA and lmms-eval apply to ScienceQA. In users' own data the letter before the full stop may be a
    small one.
    """
    said, letter = answer.strip(), sample.references[0].strip().upper()
    if sample.meta.get("own"):
        said = said.upper()
    return float(said.upper() == letter or said.startswith(f"{letter}."))


def ai2d(answer: str, sample: Sample) -> float:
    """1 if the answer is the reference's letter, without case and ASCII punctuation, so that ``(A)`` is right too.

    Of an answer that begins with a capital and a full stop these alone count. lmms-eval's rule for AI2D (Kembhavi et
    al., 2016, https://arxiv.org/abs/1603.07396).
    """
    begins = re.match(r"([A-Z])\.", answer.strip())
    said = begins[1] if begins else answer.strip()
    return float(said.translate(_DROP_PUNCTUATION).upper() == sample.references[0].strip().upper())


def mmmu_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that a free answer to a multiple-choice question means, or None.

    The parser of MMMU (Yue et al., 2023, https://arxiv.org/abs/2311.16502) as lmms-eval extends it: look for
    ``(A)``, else ``A `` , else ``A.``, else, in answers longer than five words, for an option's text; of
    several matches the last one in the answer counts. Where nothing matches MMMU draws a letter at random;
    here that is None, a wrong answer, so that a score does not depend on luck.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = LETTERS[: len(choices)]
    patterns = [[f"({letter})" for letter in letters], [f"{letter} " for letter in letters]]
    patterns.append([f"{letter}." for letter in letters])
    if len(answer.split()) > 5:
        patterns.append([choice.lower() for choice in choices])
    for step, marks in enumerate(patterns):
        text = answer.lower() if step == 3 else answer
        found = [i for i, mark in enumerate(marks) if mark and mark in text]
        if found:
            # "A " also ends words such as "DNA "; a letter that stands alone wins over those.
            where = [f" {mark}" if step == 1 else mark for mark in marks]
            return letters[max(found, key=lambda i: (text.rfind(where[i]), -i))]
    return None


def _mmmu_normalize(text: str) -> list[str | float]:
    """A number as a float with two decimals, else lower case; one letter is padded so it matches words only."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


_MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_MMMU_MARKERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def mmmu_open(answer: str) -> set[str | float]:
    """What an answer to an open MMMU question says: key phrases and the numbers in them, normalised.

    Per line, the shortest text behind words such as "is" or "therefore" (behind "=" in the last line too);
    the whole answer if there is none.
    """
    lines = answer.strip().strip(".").lower().split("\n")
    phrases = []
    for number, line in enumerate(lines):
        markers = (*_MMMU_MARKERS, "=") if number == len(lines) - 1 else _MMMU_MARKERS
        tails = [line.split(marker)[-1].strip() for marker in markers if marker in line]
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in set(":,.!?;'"):
            phrases.append(shortest)
    phrases = phrases or [answer.strip().strip(".").lower()]
    numbers = [
        found for phrase in phrases for pattern in _MMMU_NUMBERS for found in re.findall(pattern, phrase)
    ]
    return {value for text in (*phrases, *numbers) for value in _mmmu_normalize(text)}


def mmmu(answer: str, sample: Sample) -> float:
    """MMMU accuracy of one answer, 0 or 1: ``mmmu_letter`` for questions with choices, else ``mmmu_open``.

    An open answer is right if a normalised reference is contained in one of its phrases or equals one of its
    numbers.
    """
    if sample.choices:
        return float(mmmu_letter(answer, sample.choices) in sample.references)
    accepted = {value for reference in sample.references for value in _mmmu_normalize(reference)}
    for said in mmmu_open(answer):
        if said in accepted:
            return 1.0
        if isinstance(said, str) and any(isinstance(text, str) and text in said for text in accepted):
            return 1.0
    return 0.0
