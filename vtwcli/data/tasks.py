"""The built-in public tasks: one row each, with prompt, references, metric and where the data lives.

Prompts, answer lengths and metrics are those of lmms-eval, so that numbers can be compared; where they are not, the
documentation's page ``data`` says why. Nothing here imports torch or datasets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vtwcli.data.cells import IMAGE_MARK, BadRow, Row, letter_at, lettered, options, text, texts
from vtwcli.data.spec import Columns

DEFAULT_MIX = ("scienceqa", "gqa", "ocrbench", "flickr30k")
"""Read from the Hub for a real model when nothing else is asked for: choice, short answer, text, caption."""

ORGANISATIONS = ("lmms-lab-encoder", "lmms-lab")
"""Where lmms-eval keeps its image data sets, newest place first; the first one that answers is read."""

BUFFER_ROWS = 200
LETTER_LINE = "Answer with the option's letter from the given choices directly."
SHORT_LINE = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Join:
    """Images that live in another configuration of the same data set, found by an id."""

    config: str
    key: str
    id: str


@dataclass(frozen=True)
class TaskRow:
    """How the rows of a data set become samples.

    Attributes:
        name: what the user types, and the task's name in the mix.
        title: for people.
        repository: name on the Hub; ``*/NAME`` stands for lmms-eval's organisations.
        config: configuration on the Hub, or None for the only one.
        split: the split that is read by default.
        metric: key of the metric (``vtwcli.data.metrics``).
        columns: names of its columns.
        prompt: the user's turn of a row.
        references: accepted answers of a row.
        choices: options of a row; empty for open questions.
        images: names of the image columns that a row uses.
        meta: columns that the metric reads.
        join: where the images are, if not in the row.
        buffer: rows of a remote set among which samples are drawn; whole sets where rows are sorted by kind.
        together: column whose equal values mark rows that are drawn together, as their metric needs them.
        longest: tokens of the longest answer; None where lmms-eval leaves it to the model.
        by_model: fields that other models have instead, by transformers' ``model_type``.
    """

    name: str
    title: str
    repository: str
    config: str | None
    split: str
    metric: str
    columns: Columns
    prompt: Callable[[Row], str]
    references: Callable[[Row], tuple[str, ...]]
    choices: Callable[[Row], tuple[str, ...]] = lambda row: ()
    images: Callable[[Row], tuple[str, ...]] = lambda row: ("image",)
    meta: tuple[str, ...] = ()
    join: Join | None = None
    buffer: int = BUFFER_ROWS
    together: str | None = None
    longest: int | None = None
    by_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, model_type: str | None) -> TaskRow:
        """As this model is asked."""
        return replace(self, **self.by_model.get(model_type or "", {}))


def _scienceqa_prompt(row: Row, line: str = LETTER_LINE) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{text(row, 'question')}\n{lettered(options(row, 'choices'))}\n{line}"


def _mmmu_choices(row: Row) -> tuple[str, ...]:
    return options(row, "options") if row["question_type"] == "multiple-choice" else ()


def _mmmu_prompt(row: Row) -> str:
    choices = _mmmu_choices(row)
    if choices:
        return f"{text(row, 'question')}\n{lettered(choices)}\n\n{LETTER_LINE}"
    return f"{text(row, 'question')}\n\n{SHORT_LINE}"


def _mmmu_references(row: Row) -> tuple[str, ...]:
    answer = text(row, "answer")
    if not _mmmu_choices(row) and answer.startswith("["):  # several accepted answers, written as a list
        return options(row, "answer")
    return (answer,)


def _mmmu_images(row: Row) -> tuple[str, ...]:
    """The images in the order in which the prompt names them; all where it names none."""
    named = list(dict.fromkeys(re.findall(r"<image (\d+)>", _mmmu_prompt(row))))
    present = [number for number in range(1, 8) if row.get(f"image_{number}") is not None]
    return tuple(f"image_{number}" for number in named or present or [1])


def _mmmu_interleaved(row: Row) -> str:
    """The prompt with the images where it first names them, without the white space around, as lmms-eval has it."""
    shown = set[str]()

    def mark(name: re.Match[str]) -> str:
        if name[1] in shown:
            return name[0]
        shown.add(name[1])
        return IMAGE_MARK

    return re.sub(r"\s*<image (\d+)>\s*", mark, _mmmu_prompt(row))


def _mmmu_qwen3(row: Row) -> str:
    choices = options(row, "options") if row["options"] not in ("[]", "") else ()
    line = "Answer with the option letter only."
    if not _mmmu_choices(row):
        line = "Please select the correct answer from the options above."
    return f"Question: {text(row, 'question')}\nOptions:\n{lettered(choices)}\n{line}"


_MMMU_QWEN3 = {"prompt": _mmmu_qwen3, "images": lambda row: tuple(sorted(_mmmu_images(row)))}


def _short(row: Row) -> str:
    return f"{text(row, 'question')}\n{SHORT_LINE}"


def _pope(row: Row, line: str = SHORT_LINE) -> str:
    return f"{text(row, 'question').strip()}\n{line}"


_YES_OR_NO = " Please answer yes or no."  # as MME ends its questions


def _mme(row: Row) -> str:
    return f"{text(row, 'question').strip().replace(_YES_OR_NO, '')}\n{SHORT_LINE}"


def _textvqa(row: Row, between: str = "", line: str = SHORT_LINE) -> str:
    # As published: capitalize() also puts names into lower case.
    return f"{text(row, 'question').capitalize()}{between}\n{line}"


def _ocr_tokens(row: Row) -> str:
    tokens = row["ocr_tokens"]
    if not isinstance(tokens, list):
        raise BadRow("column 'ocr_tokens' is not a list of texts")
    return f"\nReference OCR token: {', '.join(map(str, tokens))}"


_PLM, _PLM_SHORT = "perception_lm", "Provide a short and direct response."


TASKS: dict[str, TaskRow] = {
    row.name: row
    for row in (
        TaskRow(
            name="scienceqa",
            title="ScienceQA, questions with an image",
            repository="*/ScienceQA",
            config="ScienceQA-IMG",
            split="test",
            metric="multiple_choice",
            columns=Columns(image="image", question="question", answer="answer", choices="choices"),
            prompt=_scienceqa_prompt,
            references=lambda row: (letter_at(row, "answer", options(row, "choices")),),
            choices=lambda row: options(row, "choices"),
            longest=16,
            by_model={"idefics2": {"prompt": lambda row: _scienceqa_prompt(row, "Answer:")}},
        ),
        TaskRow(
            name="ai2d",
            title="AI2D diagrams",
            repository="*/ai2d",
            config=None,
            split="test",
            metric="ai2d",
            columns=Columns(image="image", question="question", answer="answer", choices="options"),
            prompt=lambda row: f"{text(row, 'question')}\n{lettered(options(row, 'options'))}\n{LETTER_LINE}",
            references=lambda row: (letter_at(row, "answer", options(row, "options")),),
            choices=lambda row: options(row, "options"),
            longest=16,
        ),
        TaskRow(
            name="mmmu",
            title="MMMU",
            repository="*/MMMU",
            config=None,
            split="validation",
            metric="mmmu",
            columns=Columns(question="question", answer="answer", choices="options"),
            prompt=_mmmu_interleaved,
            references=_mmmu_references,
            choices=_mmmu_choices,
            images=_mmmu_images,
            meta=("id", "question_type"),
            buffer=900,
            longest=128,
            by_model=dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _MMMU_QWEN3),
        ),
        TaskRow(
            name="gqa",
            title="GQA, balanced test-dev",
            repository="*/GQA",
            config="testdev_balanced_instructions",
            split="testdev",
            metric="exact_match",
            columns=Columns(image="image", question="question", answer="answer"),
            prompt=_short,
            references=lambda row: (text(row, "answer"),),
            join=Join(config="testdev_balanced_images", key="imageId", id="id"),
            longest=16,
        ),
        TaskRow(
            name="textvqa",
            title="TextVQA",
            repository="*/textvqa",
            config=None,
            split="validation",
            metric="vqa_soft",
            columns=Columns(image="image", question="question", answer="answers"),
            prompt=_textvqa,
            references=lambda row: texts(row, "answers"),
            by_model={_PLM: {"prompt": lambda row: _textvqa(row, line=_PLM_SHORT)}},
        ),
        TaskRow(
            name="textvqa_ocr",
            title="TextVQA, with the words that a text recogniser read",
            repository="*/textvqa",
            config=None,
            split="validation",
            metric="vqa_soft",
            columns=Columns(image="image", question="question", answer="answers"),
            prompt=lambda row: _textvqa(row, _ocr_tokens(row)),
            references=lambda row: texts(row, "answers"),
            by_model={_PLM: {"prompt": lambda row: _textvqa(row, _ocr_tokens(row), _PLM_SHORT)}},
        ),
        TaskRow(
            name="pope",
            title="POPE, all three kinds of negatives",
            repository="*/POPE",
            config=None,
            split="test",
            metric="pope",
            columns=Columns(image="image", question="question", answer="answer"),
            prompt=_pope,
            references=lambda row: (text(row, "answer"),),
            meta=("category",),
            longest=128,
            by_model={_PLM: {"prompt": lambda row: _pope(row, "Your response must be concise.")}},
        ),
        TaskRow(
            name="mme",
            title="MME, perception and cognition",
            repository="*/MME",
            config=None,
            split="test",
            metric="mme",
            columns=Columns(image="image", question="question", answer="answer"),
            prompt=_mme,
            references=lambda row: (text(row, "answer"),),
            meta=("category", "question_id"),
            buffer=2374,
            together="question_id",
            longest=16,
            by_model={_PLM: {"prompt": lambda row: text(row, "question").strip()}},
        ),
        TaskRow(
            name="flickr30k",
            title="Flickr30k captions",
            repository="*/flickr30k",
            config=None,
            split="test",
            metric="cider",
            columns=Columns(image="image", answer="caption"),
            prompt=lambda row: "Provide a one-sentence caption for the provided image.",
            references=lambda row: texts(row, "caption"),
            longest=64,
        ),
        TaskRow(
            name="ocrbench",
            title="OCRBench",
            repository="echo840/OCRBench",
            config=None,
            split="test",
            metric="ocrbench",
            columns=Columns(image="image", question="question", answer="answer"),
            prompt=lambda row: text(row, "question").strip(),
            references=lambda row: texts(row, "answer"),
            meta=("dataset", "question_type"),
            buffer=1000,
            longest=128,
            by_model={
                _PLM: {"prompt": lambda row: f"{text(row, 'question').strip()}\n{_PLM_SHORT}"},
            },
        ),
    )
}
