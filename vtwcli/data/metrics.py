"""How answers are judged: each metric by its field's own definition, in plain Python.

A metric maps an answer and a sample's references to a number, larger is better. ``score`` judges one answer,
``scores`` a list of them (CIDEr needs the whole corpus), ``aggregate`` adds the summary numbers of the field.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from statistics import fmean

from vtwcli.data.sample import Sample
from vtwcli.data.tasks import LETTERS
from vtwcli.errors import UsageError, VtwError

# --- exact match -----------------------------------------------------------------------------------------

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


# --- VQA soft accuracy -----------------------------------------------------------------------------------

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


# --- multiple choice -------------------------------------------------------------------------------------


def multiple_choice(answer: str, sample: Sample) -> float:
    """1 if the answer is the reference's letter or begins with it and a full stop, else 0; without case.

    The rule that LLaVA and lmms-eval apply to ScienceQA and AI2D.
    """
    said, letter = answer.strip().lower(), sample.references[0].strip().lower()
    return float(said == letter or said.startswith(f"{letter}."))


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


# --- POPE ------------------------------------------------------------------------------------------------


def pope_says_yes(answer: str) -> bool:
    """POPE's reading of an answer: "no" if its first sentence has the word No, no or not, else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _pope_means_yes(sample: Sample) -> bool:
    return sample.references[0].strip().lower() == "yes"


def pope(answer: str, sample: Sample) -> float:
    """1 if the answer, read by ``pope_says_yes``, agrees with the reference, else 0; its mean is accuracy."""
    return float(pope_says_yes(answer) == _pope_means_yes(sample))


def _pope_summary(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
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


# --- reading text and charts -----------------------------------------------------------------------------


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

    Case does not count and line breaks are spaces; formulas (``dataset`` is HME100k) keep case and lose all
    spaces.
    """
    formula = sample.meta.get("dataset") == "HME100k"

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    wanted = [text for text in map(plain, sample.references) if text]  # no text is contained in every answer
    return float(any(text in plain(answer) for text in wanted))


# --- captions --------------------------------------------------------------------------------------------

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


# --- by name ---------------------------------------------------------------------------------------------

_PER_SAMPLE: dict[str, Callable[[str, Sample], float]] = {
    "exact_match": exact_match,
    "vqa_soft": vqa_soft,
    "multiple_choice": multiple_choice,
    "mmmu": mmmu,
    "pope": pope,
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


def score(metric: str, answer: str, sample: Sample) -> float:
    """Judge one answer.

    Raises:
        UsageError: an unknown metric, or CIDEr, which judges a whole corpus (``scores``).
        VtwError: the sample has no reference.
    """
    _check(metric, [sample])
    if metric == "cider":
        raise UsageError("cider judges a whole corpus, not one answer")
    return _PER_SAMPLE[metric](answer, sample)


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
    """Summary of a metric over samples: ``mean`` always; for ``pope`` precision, recall, F1 and yes-ratio too.

    Raises:
        UsageError: an unknown metric, or no samples.
        VtwError: a sample has no reference.
    """
    if not samples:
        raise UsageError(f"no samples to judge by {metric}")
    summary = {"mean": fmean(scores(metric, answers, samples))}
    if metric == "pope":
        summary |= _pope_summary(answers, samples)
    return summary
