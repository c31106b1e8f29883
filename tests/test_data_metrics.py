"""Metrics against hand-computed values and against what the fields' own programs give."""

import math

import pytest

from vtwcli.data.metrics import METRICS, aggregate, scores
from vtwcli.data.metrics.captions import bleu, caption_tokens, cider, rouge_l
from vtwcli.data.metrics.choices import mmmu_letter
from vtwcli.data.metrics.reading import edit_distance
from vtwcli.data.metrics.text import vqa_normalize
from vtwcli.data.sample import Sample
from vtwcli.errors import UsageError, VtwError


def sample(*references, choices=(), **meta):
    return Sample("s:0", "t", (), "?", tuple(references), choices=tuple(choices), meta=meta)


def score(metric, answer, sample):
    return scores(metric, [answer], [sample])[0]


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Red.", ["red"], 1),
        ("  dark   red ", ["Dark red"], 1),
        ("traffic-light", ["traffic light"], 0),  # punctuation goes, it does not become a space
        ("red", ["blue", "RED!"], 1),
        ("reds", ["red"], 0),
        ("", ["red"], 0),
    ],
)
def test_exact_match(answer, references, expected):
    assert score("exact_match", answer, sample(*references)) == expected


# Outputs of the official answer processor of the VQA challenge server.
VQA_NORMALIZED = [
    ("The 2 Dogs.", "2 dogs"),
    ("two dogs", "2 dogs"),
    ("A  red, Ball!", "red ball"),
    ("1,000", "1000"),
    ("3.5", "3.5"),
    ("it isnt", "it isn't"),
    ("isn't", "isn't"),
    ("dont know", "don't know"),
    ("men's", "men 's"),
    ("x-ray", "x ray"),
    ("red - blue", "red blue"),
    ("what?", "what"),
    ("None", "0"),
    ("a.m.", "am"),
    ("$5.00", "$5.00"),
    ("new\nyork", "new york"),
    ("yes/no", "yes no"),
    ("O'Clock", "o'clock"),
    ("youll've", "youll've"),
    ("somebody'd", "somebodyd"),
    ("the", ""),
    ("U.S.A.", "usa"),
    ("(left)", "left"),
    ("10%", "10%"),
    ("ten:30", "ten:30"),
    ("she's", "she 's"),
    ("shes", "shes"),
    ("y'alldve", "y'alldve"),
    ("yall'd've", "y'all'd've"),
]


@pytest.mark.parametrize(("raw", "expected"), VQA_NORMALIZED)
def test_vqa_normalization_is_the_official_one(raw, expected):
    assert vqa_normalize(raw) == expected


@pytest.mark.parametrize("agreeing", range(11))
def test_vqa_soft_counts_the_other_nine_annotators(agreeing):
    references = ["two"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    # Leaving out one who agrees leaves agreeing - 1, leaving out another one leaves them all.
    expected = (agreeing * min(1, max(agreeing - 1, 0) / 3) + (10 - agreeing) * min(1, agreeing / 3)) / 10
    assert score("vqa_soft", "2", sample(*references)) == pytest.approx(expected, abs=1e-12)
    if agreeing == 3:
        assert expected == pytest.approx(0.9)


@pytest.mark.parametrize("count", range(1, 13))
def test_vqa_soft_is_one_where_all_agree(count):
    assert score("vqa_soft", "Two.", sample(*["two"] * count)) == 1
    assert score("vqa_soft", "three", sample(*["two"] * count)) == 0


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["a b", "c"], 1 / 2),
        (["a b", "a b", "c"], 2 / 3),
        (["a b", "c", "d"], 1 / 3),
        (["a b", "a b", "a b", "c"], (3 * 2 / 3 + 1) / 4),  # from four on the published rule
    ],
)
def test_vqa_soft_with_few_references(references, expected):
    assert score("vqa_soft", "a b", sample(*references)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("5", "5.0", 1),
        ("5.00", "5", 1),
        (" (5). ", "5.0", 1),
        ("50", "5.0", 0),
        ("5", "50", 0),
        ("1,000", "1000", 1),
        ("1000.0", "1,000", 1),
        ("-5", "5", 0),
        ("+5", "5", 1),
        ("25", "2.5", 0),
        ("2-5", "2.5", 0),
        ("$2.50", "2.5", 1),
        ("15%", "1.5%", 0),
        ("1e3", "1000", 1),
        ("five", "5", 0),
        ("007", "7", 0),  # digits that name something
        ("007", "007", 1),
        ("10:30", "10:30", 1),
        ("1030", "10:30", 1),  # text, whose punctuation does not count
        ("nan", "nan", 1),
        ("-", "+", 0),
        ("+", "+", 1),
        ("1e9999999999", "1", 0),
        ("9" * 5000, "9", 0),
        ("Dark red!", "dark red", 1),
    ],
)
def test_numbers_in_own_data_are_compared_as_numbers(answer, reference, expected):
    assert score("exact_match", answer, sample(reference, own=True)) == expected
    if reference not in ("+", "10:30") and answer != "five":  # which VQA's rule normalises
        assert score("vqa_soft", answer, sample(reference, own=True)) == expected


def test_published_rules_stay_as_published():
    assert score("exact_match", "50", sample("5.0")) == 1
    assert score("exact_match", "-5", sample("5")) == 1
    assert score("vqa_soft", "5", sample(*["5.0"] * 10)) == 0
    assert score("vqa_soft", "five", sample(*["5.0"] * 10, own=True)) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        (" b \n", 1),
        ("B. the moon", 1),
        ("b.", 0),
        ("A", 0),
        ("A. B.", 0),
        ("Because", 0),
        ("(B)", 0),
        ("", 0),
    ],
)
def test_multiple_choice(answer, expected):
    assert score("multiple_choice", answer, sample("B", choices=["sun", "moon"])) == expected
    own = sample("B", choices=["sun", "moon"], own=True)
    assert score("multiple_choice", answer, own) == (1 if answer == "b." else expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("(B)", 1),
        ("b)", 1),
        (" 'B' ", 1),
        ("B. moon", 1),
        ("b. moon", 0),
        ("B moon", 0),
        ("(A)", 0),
        ("A. B", 0),
        ("", 0),
    ],
)
def test_ai2d_drops_punctuation(answer, expected):
    assert score("ai2d", answer, sample("B", choices=["sun", "moon"])) == expected


MMMU_CHOICES = ("a red car", "DNA", "the moon", "4")
# Letters that lmms-eval's parser gives; None where it draws one at random.
MMMU_LETTERS = [
    ("B", "B"),
    ("(C)", "C"),
    ("A.", "A"),
    ("The answer is D", "D"),
    ("(A) or (B)", "B"),
    ("Option (D), not (A).", "A"),
    ("I think B because DNA is shown", "B"),
    ("it is clearly a red car in the picture", "A"),
    ("the moon", None),
    ("it is just the moon", None),  # texts count in answers longer than five words
    ("it is surely just the moon", "C"),
    ("C: the moon", None),
    ("B and C", "C"),
    ("", None),
    ("none of these fit the picture at all", None),
]


@pytest.mark.parametrize(("answer", "letter"), MMMU_LETTERS)
def test_mmmu_letters(answer, letter):
    assert mmmu_letter(answer, MMMU_CHOICES) == letter
    for right in "ABCD":
        assert score("mmmu", answer, sample(right, choices=MMMU_CHOICES)) == (letter == right)


def test_mmmu_takes_the_last_of_several_letters_with_full_stops():
    assert mmmu_letter("C.then A.no:B.x", MMMU_CHOICES) == "B"


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [  # as MMMU's own program judges them
        ("The answer is 3.14159", "3.14", 1),
        ("so x = 1,000", "1000", 1),
        ("1e3", "1000", 1),
        ("It is a cat.", "cat", 1),
        ("dog", "cat", 0),
        ("x = 5\ny = 7", "5", 0),  # "=" counts in the last line only
        ("x is 5\ny = 7", "5", 1),
        ("Thus the result is b", "b", 1),
        ("bob", "b", 0),  # one letter matches as a word only
        ("0.333", "1/3", 0),
        ("therefore 1/3", "1/3", 1),
    ],
)
def test_mmmu_open_questions(answer, reference, expected):
    assert score("mmmu", answer, sample(reference)) == expected
    assert score("mmmu", answer, sample("no such", reference)) == expected


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is no dog.", False),
        ("no", False),
        ("There is not a dog", False),
        ("A dog is there. No cat.", True),  # the first sentence only
        ("NO", True),  # as published: only "No", "no" and "not" are words of denial
        ("Nothing", True),
        ("", True),
    ],
)
def test_pope_reads_the_first_sentence(answer, yes):
    assert score("pope", answer, sample("yes")) == yes
    assert score("pope", answer, sample("no")) == (not yes)


def test_pope_summary_by_hand():
    answers = ["Yes", "yes", "yes", "no", "no", "No, it is not.", "no", "yes"]
    references = ["yes", "yes", "no", "no", "no", "yes", "no", "yes"]
    got = aggregate("pope", answers, [sample(reference) for reference in references])
    # TP 3, FP 1, FN 1, TN 3
    assert got == {"mean": 0.75, "precision": 0.75, "recall": 0.75, "f1": 0.75, "yes_ratio": 0.5}
    never = aggregate("pope", ["no"] * 4, [sample(r) for r in ("yes", "no", "no", "no")])
    assert never == {"mean": 0.75, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    # The ratio is of the answers, not of the references.
    assert aggregate("pope", ["yes"] * 4, [sample("no")] * 4)["yes_ratio"] == 1.0


def test_pope_by_the_exact_word():
    assert [score("pope_exact", said, sample("No")) for said in ("no", " NO\n", "No.", "No, none", "yes")] == [
        1, 1, 0, 0, 0,
    ]  # fmt: skip
    # lmms-eval: what is neither yes nor no counts for nothing, and the ratio is of the references
    answers, references = ["yes", "Yes, two", "no", "maybe"], ["yes", "yes", "no", "yes"]
    found = aggregate("pope_exact", answers, [sample(reference) for reference in references])
    assert found == {"mean": 0.5, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.75}
    read = aggregate("pope", answers, [sample(reference) for reference in references])
    assert read == {"mean": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.75}


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes.", "yes"), ("y", "yes"), ("N.", "no"), ("x", None), ("Yes, it is", "yes"), ("Not so", "no"),
     ("It is: yes", None), ("I know", None), ("", None)],
)  # fmt: skip
def test_mme_reads_a_word_at_the_beginning(answer, word):
    assert score("mme", answer, sample("Yes")) == (word == "yes")
    assert score("mme", answer, sample("No")) == (word == "no")


def test_mme_scores_by_hand():
    def ask(category, picture, reference):
        return sample(reference, category=category, question_id=picture)

    samples = [
        ask("OCR", "1", "Yes"), ask("OCR", "1", "No"), ask("OCR", "2", "Yes"), ask("OCR", "2", "No"),
        ask("count", "1", "Yes"), ask("count", "1", "No"), ask("code_reasoning", "1", "Yes"),
    ]  # fmt: skip
    answers = ["yes", "no", "yes", "yes", "no", "no", "yes"]
    found = aggregate("mme", answers, samples)
    # OCR: 3 of 4 right and one picture of two: 75 + 50. Count: 1 of 2, no picture: 50. The last has half a picture.
    assert found == {"mean": pytest.approx(5 / 7), "perception": 175.0}
    samples.append(ask("code_reasoning", "1", "No"))
    found = aggregate("mme", [*answers, "n"], samples)
    assert (found["perception"], found["cognition"]) == (175.0, 200.0)
    assert aggregate("mme", ["yes"], [sample("yes")]) == {"mean": 1.0}  # somebody's own rows


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "", 3), ("same", "same", 0)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Kitten", ["kitten"], 1.0),
        ("sitting", ["kitten"], 1 - 3 / 7),
        ("ab", ["cb"], 0.0),  # distance 1 of 2 is not below the threshold
        ("abc", ["cbc"], 1 - 1 / 3),
        ("july  12", ["July 12", "12"], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_anls(answer, references, expected):
    assert score("anls", answer, sample(*references)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("5%", "0.05", 1),
        ("-10.4", "-10", 1),
        ("10.4", "-10", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # nothing is within 5 % of zero, and the text differs
        ("Yes", "yes", 1),
        ("yess", "yes", 0),
    ],
)
def test_relaxed_accuracy(answer, reference, expected):
    assert score("relaxed_accuracy", answer, sample(reference)) == expected


def test_ocrbench_containment():
    assert score("ocrbench", "It says STOP\nHERE.", sample("go", "stop here")) == 1
    assert score("ocrbench", "st op", sample("stop")) == 0
    assert score("ocrbench", "go", sample("", "stop")) == 0  # nothing is contained in everything
    assert score("ocrbench", "\uff33\uff34\uff2f\uff30\u3000\uff11", sample("stop 1")) == 1  # full width
    assert score("ocrbench", "stop 1", sample("\uff33\uff34\uff2f\uff30\u3000\uff11 ")) == 1
    formula = sample("x ^ 2 + Y", dataset="HME100k")
    assert score("ocrbench", "\uff58", sample("x", dataset="HME100k")) == 0
    assert score("ocrbench", "the formula x^2+Y", formula) == 1
    assert score("ocrbench", "the formula x^2+y", formula) == 0


# Tokens of the caption evaluation's own (Java) tokenizer.
CAPTION_TOKENS = [
    ("The man's dog doesn't like the cat, isn't it?", "the man 's dog does n't like the cat is n't it"),
    ("A black-and-white dog (a collie) runs!", "a black-and-white dog -lrb- a collie -rrb- runs"),
    ("We cannot pay $3.50 for 1,000 toys", "we can not pay $ 3.50 for 1,000 toys"),
    ("I've seen what you'd do, we'll see", "i 've seen what you 'd do we 'll see"),
    ("It's 10:30 - the boys' ball is at 50% off.", "it 's 10:30 the boys ball is at 50 % off"),
    ('A t-shirt says "Just Do It" at 9 o\u2019clock...', "a t-shirt says just do it at 9 o'clock"),
]


@pytest.mark.parametrize(("caption", "expected"), CAPTION_TOKENS)
def test_caption_tokens(caption, expected):
    assert caption_tokens(caption) == expected.split()


def test_cider_by_hand():
    # Two images without a common word: every n-gram weighs log 2, so equal captions have cosine 1 for n = 1, 2
    # and no n-grams of order 3 and 4: 10 * (1 + 1 + 0 + 0) / 4.
    assert cider(["red ball", "green tree"], [["red ball"], ["blue sky"]]) == pytest.approx([5.0, 0.0])
    # One word more: 2 of 3 words and 1 of 2 bigrams match, one bigram of difference in length.
    penalty = math.exp(-1 / 72)
    expected = 10 * penalty * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4
    assert cider(["red ball here", "x"], [["red ball"], ["blue sky"]])[0] == pytest.approx(expected)
    # A repeated word is clipped to the reference's count, but counts in the norm.
    got = cider(["red red", "x"], [["red ball"], ["blue sky"]])[0]
    assert got == pytest.approx(10 * (1 / (2 * math.sqrt(2))) / 4)
    # A word in every image's references weighs nothing; a corpus of one image is all such words.
    assert cider(["a ball", "a tree"], [["a dog"], ["a sky"]]) == [0.0, 0.0]
    assert cider(["red ball"], [["red ball"]]) == [0.0]


PUBLISHED = {
    "bleu_1": 0.814227373629354,
    "bleu_2": 0.6905913468339655,
    "bleu_3": 0.48591415042095104,
    "bleu_4": 0.33758956960885156,
    "rouge_l": 0.6548061066232173,
}


def test_cider_equals_the_caption_evaluation():
    references = [
        [
            "a man rides a brown horse on the beach",
            "a man is riding a horse by the sea",
            "someone on a horse",
        ],
        ["two dogs play with a red ball", "a pair of dogs chase a ball on grass"],
        ["a child eats an apple", "a little girl is eating a red apple at a table"],
    ]
    answers = [
        "a man riding a horse on the beach",
        "a dog plays with a ball",
        "a child is eating an apple at a table at a table",
    ]
    published = [2.8648166642468302, 1.1842867620143265, 1.8241013973597298]  # pycocoevalcap
    assert cider(answers, references) == pytest.approx(published, abs=1e-12)
    samples = [sample(*texts) for texts in references]
    assert scores("cider", answers, samples) == pytest.approx(published, abs=1e-12)
    found = aggregate("cider", answers, samples)
    assert found.pop("mean") == pytest.approx(sum(published) / 3, abs=1e-12)
    # pycocoevalcap of BLEU and ROUGE-L
    assert found == pytest.approx(PUBLISHED, abs=1e-8)


def test_bleu_and_rouge_by_hand():
    # 3 of 4 words and 1 of 3 pairs are in the reference, which is a word longer
    [one, two, three, four] = bleu(["a red ball here"], [["a red big ball there"]])
    short = math.exp(1 - 5 / 4)
    assert (one, two) == pytest.approx((short * 3 / 4, short * math.sqrt(3 / 4 / 3)))
    assert (three, four) == (0.0, 0.0)
    # of references as far in length the shorter counts; a word counts as often as one reference has it
    assert bleu(["the the the"], [["the cat", "the cat is so"]])[0] == pytest.approx(1 / 3)
    assert bleu([""], [["a"]]) == [0.0] * 4
    # longest common subsequence "a red ball": P = 3/4, R = 3/5
    assert rouge_l("a red ball here", ["a red big ball there"]) == pytest.approx(
        2.44 * 0.45 / (0.6 + 1.44 * 0.75)
    )
    # the best P and the best R may come from different references
    assert rouge_l("a b", ["a", "a b c d"]) == pytest.approx(1.0)
    assert rouge_l("", ["a"]) == rouge_l("a", ["b"]) == 0.0


def test_scores_and_aggregate_agree():
    samples = [sample("red"), sample("blue"), sample("green")]
    assert scores("exact_match", ["red", "red", "green"], samples) == [1.0, 0.0, 1.0]
    assert aggregate("exact_match", ["red", "red", "green"], samples) == {"mean": pytest.approx(2 / 3)}


def test_errors():
    with pytest.raises(
        UsageError, match=r"^unknown metric 'accuracy' \(known metrics: exact_match, vqa_soft, "
    ):
        score("accuracy", "red", sample("red"))
    with pytest.raises(
        VtwError, match=r"^sample 's:0' has no reference answer, so exact_match cannot judge it$"
    ):
        scores("exact_match", ["red"], [sample()])
    with pytest.raises(UsageError, match=r"^no samples to judge by anls$"):
        aggregate("anls", [], [])
    with pytest.raises(ValueError, match="zip"):
        scores("anls", ["one", "two"], [sample("one")])


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "cider"])
def test_every_metric_is_one_for_the_reference_itself(metric):
    assert score(metric, "yes", sample("yes", "yes", "yes", "yes")) == 1.0
    assert score(metric, "yes", sample("yes")) == 1.0
