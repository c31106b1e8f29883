"""Samples to model inputs: chat template, images, reference answers as tokens.

S is the length of a prompt, A of an answer, in tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vtwcli.data.cells import shown
from vtwcli.data.pixels import PictureError, check_resized
from vtwcli.data.sample import Sample
from vtwcli.errors import NotFoundError, first_line
from vtwcli.io import console
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models import prompts, templates
from vtwcli.models.loading import LoadedModel

_ANSWER = "ANSWER"  # stands for an answer where only the template around it is looked at
_MARKUP = re.compile(r"(?:\s|<[^<>]*>|\[/?[A-Z_]+\])*")  # what may stand between a prompt and an answer
_OTHER_TEMPLATE = (
    "use the template of the base model, or one that reads the parts of a message's content in their order"
)
_SKIP = "--skip-bad leaves such rows out"


class UnusableSampleError(NotFoundError):
    """A sample that this model cannot be asked; others may do."""


@dataclass(frozen=True)
class Encoded:
    """One sample as a batch of one.

    Attributes:
        inputs: keyword arguments of the model's forward; per-token entries are [1, S + A].
        prompt_length: S; the row that predicts the first answer token is S - 1.
        visual: [S + A] bool, the visual tokens; never true behind the prompt.
    """

    inputs: dict[str, Tensor]
    prompt_length: int
    visual: Tensor

    @property
    def length(self) -> int:
        """S + A."""
        return int(self.visual.shape[0])

    @property
    def suffix(self) -> int:
        """Number of text tokens behind the first visual one."""
        seen = int(self.visual.sum())
        return self.length - int(self.visual.int().argmax()) - seen if seen else 0

    @property
    def rows(self) -> Tensor:
        """Positions whose next token is compared, [1, 1 + A]: the prompt's last and those of the answer behind it."""
        return torch.arange(self.prompt_length - 1, self.length)[None]


def visual_mask(input_ids: Tensor, ids: Sequence[int]) -> Tensor:
    """Which positions of ``input_ids`` are visual tokens; same shape, bool."""
    return torch.isin(input_ids, torch.tensor(list(ids), dtype=input_ids.dtype, device=input_ids.device))


def encode(loaded: LoadedModel, sample: Sample, answer_ids: Tensor | None = None) -> Encoded:
    """A sample as model inputs, on the model's device, with pixels in the model's dtype.

    Args:
        loaded: the model and its processor.
        sample: the question and its images.
        answer_ids: [A] token ids to append behind the prompt, for teacher forcing.

    Raises:
        NotFoundError: no chat template, a prompt that does not fit, or placeholders that do not match the images.
    """
    inputs = _process(loaded, [sample], "left")
    prompt_length = int(inputs["input_ids"].shape[1])
    visual = visual_mask(inputs["input_ids"][0], loaded.placeholder_ids)
    if answer_ids is not None:
        check_ids(loaded, [sample], answer_ids[None])
        inputs = append(loaded, inputs, answer_ids)
        visual = torch.cat([visual, visual.new_zeros(answer_ids.shape[0])])
    _check_length(loaded, [sample], [int(visual.shape[0])])
    return Encoded(inputs, prompt_length, visual)


def encode_batch(loaded: LoadedModel, samples: Sequence[Sample], side: str = "left") -> dict[str, Tensor]:
    """Samples as one batch, padded on ``side`` ("left" for generation); per-token entries are [B, S]."""
    inputs = _process(loaded, samples, side)
    lengths = inputs["attention_mask"].sum(1).tolist() if "attention_mask" in inputs else []
    _check_length(loaded, samples, lengths or [int(inputs["input_ids"].shape[1])] * len(samples))
    return inputs


def append(loaded: LoadedModel, inputs: dict[str, Tensor], answer_ids: Tensor) -> dict[str, Tensor]:
    """Inputs with the same answer tokens [A] behind every prompt of the batch; they are text, attended to."""
    tail = answer_ids.to(inputs["input_ids"].device).expand(len(inputs["input_ids"]), -1)
    fill = {
        "input_ids": tail,
        "attention_mask": torch.ones_like(tail),
        "token_type_ids": torch.full_like(tail, loaded.family.answer_token_type),
        "mm_token_type_ids": torch.zeros_like(tail),
        "moe_mm_token_type_ids": torch.zeros_like(tail),
    }
    longer = {
        name: torch.cat([inputs[name], x.to(inputs[name].dtype)], 1)
        for name, x in fill.items()
        if name in inputs
    }
    return {**inputs, **longer}


def answer_ids(loaded: LoadedModel, text: str) -> Tensor:
    """A reference answer as token ids [A], as it continues a prompt: no bos, an end token behind it.

    What stands between prompt and answer (a space in ``ASSISTANT: red``) and which token ends the turn are taken
    from the chat template.

    Raises:
        UnusableSampleError: the tokens spell another text.
    """
    tokenizer = loaded.processor.tokenizer
    question = Sample("answer", "answer", (), "?")
    prompt = prompt_text(loaded, question)
    lead, tail = " " if prompt.endswith(":") else "", ""
    for turn in _renderings(loaded, question, _ANSWER):
        behind = turn[len(prompt) :] if turn.startswith(prompt) else ""
        if _ANSWER in behind and not prompts.printed_list(turn, ""):
            lead, _, tail = behind.partition(_ANSWER)
            break

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    before, whole = ids(prompt), ids(prompt + lead + text.strip())
    # Where the tokenizer merges across the border, generation cannot: the answer is tokenized on its own.
    answer = whole[len(before) :] if whole[: len(before)] == before else ids(lead + text.strip())
    ends = end_ids(loaded)
    end = next((token for token in ids(tail) if token in ends), tokenizer.eos_token_id)
    spelled = tokenizer.decode(answer, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if _letters(spelled) != _letters(lead + text) or not _MARKUP.fullmatch(lead):
        raise UnusableSampleError(
            f"the answer {shown(text)} behind the chat template {_template_file(loaded)} becomes {shown(spelled)}",
            _SKIP,
        )
    return torch.tensor([*answer, *([] if end is None else [end])], dtype=torch.long)


def end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """The token ids at which the model's generation stops."""
    ids = loaded.model.generation_config.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, Iterable) else (int(ids),)


def names_of(samples: Sequence[Sample]) -> str:
    return ", ".join(repr(sample.id) for sample in samples)


def _letters(text: str) -> str:
    """What a tokenizer must keep of a text: forms of a letter are one, white space does not count."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _template_file(loaded: LoadedModel) -> str:
    return templates.template_file(loaded.path)


def _renderings(loaded: LoadedModel, sample: Sample, answer: str | None = None) -> Iterator[str]:
    """The chat template's texts for the forms in which a sample can be given to it; none without a template.

    Raises:
        NotFoundError: the template fails for all of them.
    """
    failure: NotFoundError | None = None
    rendered = False
    token = getattr(loaded.processor, "image_token", None)
    for turns in prompts.conversations(sample, answer, token):
        try:
            text = _render(loaded, turns, answer is None)
        except NotFoundError as error:
            failure = failure or error
            continue
        if text is None:
            return
        rendered = True
        yield text
    if failure is not None and not rendered:
        raise failure


def _render(loaded: LoadedModel, conversation: list[dict[str, Any]], generation_prompt: bool) -> str | None:
    """The chat template's text, or None where the processor has no template."""
    template = templates.template_of(loaded.processor)
    if template is None:
        return None
    template = prompts.dated(template)
    templates.check(loaded.processor, template, loaded.path, conversation, generation_prompt)
    try:
        text = loaded.processor.apply_chat_template(
            conversation,
            chat_template=template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # a template raises what it likes
        raise NotFoundError(
            f"the chat template of {loaded.name!r} fails: {first_line(error)}",
            "it is called with one user turn of images and text, and a system turn where one is asked for",
        ) from error
    return str(text)


def prompt_text(loaded: LoadedModel, sample: Sample) -> str:
    """The text that a sample becomes before images take their places in it.

    Raises:
        NotFoundError: no chat template, or one that fails.
        UnusableSampleError: the template does not show the sample's text as it is.
    """
    tokens = prompts.media_tokens(loaded.processor, loaded.placeholder_ids)
    seen = False
    for text in _renderings(loaded, sample):
        if prompts.shows(text, sample, tokens):
            return text
        seen = True
    if seen:
        places = ", or images in their places in it" if sample.places else ""
        raise UnusableSampleError(
            f"the chat template {_template_file(loaded)} does not show the text of sample {sample.id!r} "
            f"as it is{places}",
            "the template may know no system turn: leave out system" if sample.system else _OTHER_TEMPLATE,
        )
    if loaded.family.prompt is None:
        raise NotFoundError(
            f"the processor of {loaded.name!r} has no chat template",
            "copy chat_template.jinja of the base model beside the weights",
        )
    token = loaded.processor.image_token
    images = "" if sample.places else token * len(sample.images)
    text = prompts.written(sample, token) if sample.places else sample.prompt
    return f"{sample.system} " * bool(sample.system) + loaded.family.prompt.format(images=images, text=text)


def _process(loaded: LoadedModel, samples: Sequence[Sample], side: str) -> dict[str, Tensor]:
    for sample in samples:
        _check_sample(loaded, sample)
    texts = [prompt_text(loaded, sample) for sample in samples]
    try:
        return _processed(loaded, samples, texts, side)
    except UnusableSampleError:
        if len(samples) > 1:  # the one that it is about has a name
            for sample, text in zip(samples, texts, strict=True):
                _processed(loaded, [sample], [text], side)
        raise


def _check_sample(loaded: LoadedModel, sample: Sample) -> None:
    """Refuse what no processor must see: text that is taken for an image, and images that grow without bounds."""
    processor = loaded.processor
    said = sample.prompt + (sample.system or "")
    for token in prompts.media_tokens(processor, loaded.placeholder_ids):
        if token in said:
            raise UnusableSampleError(
                f"the prompt of sample {sample.id!r} contains the image placeholder {token!r}",
                "prompts hold text only; the images' places are set by the chat template",
            )
    if control := [token for token in processor.tokenizer.all_special_tokens if token in said]:
        warn_of_control(control[0])
    size = getattr(processor.image_processor, "size", None) or {}
    edge = size.get("shortest_edge") if hasattr(size, "get") else None
    if edge and not size.get("longest_edge"):
        for image in sample.images:
            try:
                check_resized(image.width, image.height, int(edge))
            except PictureError as error:
                raise UnusableSampleError(f"sample {sample.id!r}: {error}", _SKIP) from None


@cache
def warn_of_control(token: str) -> None:
    console.warn(
        f"some prompts contain {token!r}, which the tokenizer reads as a control token and not as text"
    )


def _processed(
    loaded: LoadedModel, samples: Sequence[Sample], texts: list[str], side: str
) -> dict[str, Tensor]:
    processor = loaded.processor
    images = [list(sample.images) for sample in samples]
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    bos = tokenizer.bos_token
    try:
        with quiet_libraries():
            encoded = processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                padding_side=side,
                # a template that writes the bos itself must not get a second one
                add_special_tokens=not (bos and texts[0].startswith(bos)),
                return_tensors="pt",
            )
    except Exception as error:  # there is no telling what a processor raises for an image that it cannot take
        raise UnusableSampleError(
            f"the processor cannot encode sample {names_of(samples)}: {first_line(error)[:300]}", _SKIP
        ) from error
    check_ids(loaded, samples, encoded["input_ids"])
    encoded.pop("labels", None)  # PaliGemma's processor makes some even where there is nothing to learn
    inputs = {
        name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else None)
        for name, value in encoded.items()
        if isinstance(value, Tensor)
    }
    for row, sample in zip(inputs["input_ids"], samples, strict=True):
        if bool(visual_mask(row, loaded.placeholder_ids).any()) != bool(sample.images):
            raise UnusableSampleError(
                f"sample {sample.id!r} has {len(sample.images)} images, but its encoded prompt has "
                f"{int(visual_mask(row, loaded.placeholder_ids).sum())} visual tokens",
                "the processor and the model's config disagree about the image placeholder",
            )
    return inputs


def check_ids(loaded: LoadedModel, samples: Sequence[Sample], ids: Tensor) -> None:
    """Refuse token ids [B, S] that the embedding has no row for, as the model itself would.

    Raises:
        NotFoundError: naming the sample, the token, its id and the file that it comes from.
    """
    rows = loaded.embedding_rows
    outside = (ids < 0) | (ids >= rows)
    if loaded.family.placeholder_apart:
        outside &= ids != loaded.config.image_token_id
    if not bool(outside.any()):
        return
    row, place = outside.nonzero()[0].tolist()
    token = int(ids[row, place])
    text = loaded.processor.tokenizer.convert_ids_to_tokens(token)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    file = next((loaded.path / name for name in names if (loaded.path / name).is_file()), loaded.path)
    raise NotFoundError(
        f"sample {samples[row].id!r}: the token {text!r} has the id {token} in {file}, but the model embeds the ids "
        f"0..{rows - 1} only",
        "the tokenizer and the weights come from different models, or a token was added without its embedding",
    )


def _check_length(loaded: LoadedModel, samples: Sequence[Sample], lengths: Sequence[int]) -> None:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    for sample, length in zip(samples, lengths, strict=True):
        if limit and 0 < limit < length:
            raise UnusableSampleError(
                f"sample {sample.id!r} is {length} tokens long, more than the model's {limit} positions",
                "use a shorter prompt or fewer images; --skip-bad leaves such rows out",
            )
