"""Answers in words: exact match, and the accuracy of visual question answering."""

from __future__ import annotations

import re
import string
from decimal import Decimal
from statistics import fmean

from vtwcli.data.sample import Sample

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(
    r"""[\s"'(\[$]*([+-]?)[$]?"""
    r"""((?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?|\.\d+)(e[+-]?\d{1,3})?"""
    r"""[\s"')\].!?%]*"""
)


def _number(text: str) -> Decimal | None:
    """The number that a text is, within quotes, brackets, a unit of money or per cent; None for any other text.

    Digits that name something (007) are text.
    """
    found = _NUMBER.fullmatch(text.lower()) if len(text) <= 100 else None
    if found is None or re.match(r"0\d", found[2]):
        return None
    return Decimal(found[1] + found[2].replace(",", "") + (found[3] or ""))


def exact_match(answer: str, sample: Sample) -> float:
    """1 if the answer equals a reference, without case, ASCII punctuation and extra spaces, else 0.

    The rule of GQA (Hudson and Manning, 2019, https://arxiv.org/abs/1902.09506) as lmms-eval applies it. To users'
    own data it is applied where it makes sense: a reference that is a number equals answers that are the same number,
    whose punctuation matters (5.0 is 5 and not 50), and one of nothing but punctuation equals itself.
    """

    def plain(text: str) -> str:
        return " ".join(text.lower().translate(_DROP_PUNCTUATION).split())

    def same(reference: str) -> bool:
        if sample.meta.get("own"):
            number = _number(reference)
            if number is not None:
                return _number(answer) == number
            if not plain(reference):
                return answer.strip() == reference.strip()
        return plain(answer) == plain(reference)

    return float(any(map(same, sample.references)))


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: str(n) for n, word in enumerate(_NUMBERS)}
_NUMBER_WORDS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
# The contractions that the official evaluation repairs; it knows each with exactly one apostrophe missing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _one_apostrophe_less(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_REPAIRED = {broken: word for word in _CONTRACTIONS.split() for broken in _one_apostrophe_less(word)}
_REPAIRED["somebody'd"] = "somebodyd"  # reversed in the official table, and so part of the definition
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def vqa_normalize(text: str) -> str:
    """The answer normalisation of the VQA challenge server (EvalAI), which TextVQA uses too.

    Lower case; commas and question marks dropped; other punctuation dropped next to a space and otherwise
    made a space; full stops dropped unless a digit follows; number words to ten as digits; articles dropped;
    missing apostrophes repaired.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    for mark in _VQA_PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space else " ")
    stripped = re.sub(r"\.(?!\d)", "", stripped)
    words = (_NUMBER_WORDS.get(word, word) for word in stripped.split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_soft(answer: str, sample: Sample) -> float:
    """VQA accuracy (Antol et al., 2015, https://arxiv.org/abs/1505.00468), leave-one-out over the annotators.

    ``mean over i of min(1, #{j != i: reference_j == answer} / 3)`` after ``vqa_normalize`` of both sides;
    in [0, 1]. With ten references, three annotators who agree give 0.9 and four give 1. The rule is made for ten:
    of two or three references all others must agree where it asks for three, and a single one is compared as it is,
    so that an answer on which all agree is right. Numbers in users' own data are compared as numbers.
    """
    said = vqa_normalize(answer)
    number = _number(answer) if _number(answer) is not None else _number(said)

    def same(reference: str) -> bool:
        wanted = _number(reference) if sample.meta.get("own") else None
        return vqa_normalize(reference) == said if wanted is None else number == wanted

    matches = [same(reference) for reference in sample.references]
    if len(matches) == 1:
        return float(matches[0])
    needed = min(3, len(matches) - 1)
    return fmean(min(1.0, (sum(matches) - own) / needed) for own in matches)
