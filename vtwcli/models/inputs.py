"""Samples to model inputs and back: chat template, images, reference answers, greedy answers.

S is the length of a prompt, A of an answer, in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtwcli import console
from vtwcli.data.sample import Sample
from vtwcli.errors import NotFoundError
from vtwcli.models import templates
from vtwcli.models.checkpoint import first_line, quiet_libraries
from vtwcli.models.loading import LoadedModel

_ANSWER = "ANSWER"  # stands for an answer where only the template around it is looked at


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


def visual_mask(input_ids: Tensor, ids: Sequence[int]) -> Tensor:
    """Which positions of ``input_ids`` are visual tokens; same shape, bool."""
    return torch.isin(input_ids, torch.tensor(list(ids), dtype=input_ids.dtype, device=input_ids.device))


def encode(
    loaded: LoadedModel, sample: Sample, answer_ids: Tensor | None = None, *, system: str | None = None
) -> Encoded:
    """A sample as model inputs, on the model's device, with pixels in the model's dtype.

    Args:
        loaded: the model and its processor.
        sample: the question and its images.
        answer_ids: [A] token ids to append behind the prompt, for teacher forcing.
        system: text of a system turn.

    Raises:
        NotFoundError: no chat template, a prompt that does not fit, or placeholders that do not match the images.
    """
    inputs = _process(loaded, [sample], "left", system)
    prompt_length = int(inputs["input_ids"].shape[1])
    visual = visual_mask(inputs["input_ids"][0], loaded.placeholder_ids)
    if answer_ids is not None:
        inputs = append(loaded, inputs, answer_ids)
        visual = torch.cat([visual, visual.new_zeros(answer_ids.shape[0])])
    _check_length(loaded, [sample], int(visual.shape[0]))
    return Encoded(inputs, prompt_length, visual)


def encode_batch(
    loaded: LoadedModel, samples: Sequence[Sample], side: str = "left", *, system: str | None = None
) -> dict[str, Tensor]:
    """Samples as one batch, padded on ``side`` ("left" for generation); per-token entries are [B, S]."""
    inputs = _process(loaded, samples, side, system)
    _check_length(loaded, samples, int(inputs["input_ids"].shape[1]))
    return inputs


def append(loaded: LoadedModel, inputs: dict[str, Tensor], answer_ids: Tensor) -> dict[str, Tensor]:
    """Inputs of a batch of one with answer tokens [A] behind the prompt; the answer is text, attended to."""
    tail = answer_ids.to(inputs["input_ids"].device)[None]
    fill = {
        "input_ids": tail,
        "attention_mask": torch.ones_like(tail),
        "token_type_ids": torch.full_like(tail, loaded.family.answer_token_type),
        "mm_token_type_ids": torch.zeros_like(tail),
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
    """
    tokenizer = loaded.processor.tokenizer
    question = Sample("answer", "answer", (), "?")
    prompt = _prompt(loaded, question, None)
    turn = _render(loaded, [*_conversation(question, None), _message("assistant", _ANSWER)], False) or ""
    lead, tail = " " if prompt.endswith(":") else "", ""
    if turn.startswith(prompt) and _ANSWER in turn[len(prompt) :]:
        lead, _, tail = turn[len(prompt) :].partition(_ANSWER)

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    before, whole = ids(prompt), ids(prompt + lead + text.strip())
    # Where the tokenizer merges across the border, generation cannot: the answer is tokenized on its own.
    answer = whole[len(before) :] if whole[: len(before)] == before else ids(lead + text.strip())
    ends = end_ids(loaded)
    end = next((token for token in ids(tail) if token in ends), tokenizer.eos_token_id)
    return torch.tensor([*answer, *([] if end is None else [end])], dtype=torch.long)


def end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """The token ids at which the model's generation stops."""
    ids = loaded.model.generation_config.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, Iterable) else (int(ids),)


@torch.no_grad()
def generate_answers(
    loaded: LoadedModel, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 1
) -> list[tuple[str, Tensor]]:
    """The model's own greedy answers: per sample the text and the ids [A], up to and with the end token.

    Plain argmax at every step. A checkpoint's generation config may carry penalties and sampling settings; they are
    set aside, so that teacher forcing the answer meets each token as the model's first choice.

    Raises:
        NotFoundError: a sample that cannot be encoded, or whose placeholders the model refuses.
    """
    answers: list[tuple[str, Tensor]] = []
    ends = set(end_ids(loaded))
    with console.progress("answers", total=len(samples)) as task, plain_generation(loaded):
        for at in range(0, len(samples), batch_size):
            batch = encode_batch(loaded, samples[at : at + batch_size])
            width = batch["input_ids"].shape[1]
            try:
                with quiet_libraries():
                    output = loaded.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            except Exception as error:  # as in capture
                ids = _names(samples[at : at + batch_size])
                raise NotFoundError(
                    f"the model refuses the inputs of sample {ids}: {first_line(error)}"
                ) from error
            for row in output[:, width:].cpu():
                stop = next((i + 1 for i, token in enumerate(row.tolist()) if token in ends), len(row))
                text = loaded.processor.tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
                answers.append((text, row[:stop].clone()))
            task.advance(len(output))
    return answers


@contextmanager
def plain_generation(loaded: LoadedModel) -> Iterator[None]:
    """The library's own generation defaults for a while, with the model's special tokens."""
    from transformers import GenerationConfig

    model, before = loaded.model, loaded.model.generation_config
    pad = before.pad_token_id if before.pad_token_id is not None else loaded.processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id, eos_token_id=before.eos_token_id, pad_token_id=pad
    )
    try:
        yield
    finally:
        model.generation_config = before


def _names(samples: Sequence[Sample]) -> str:
    return ", ".join(repr(sample.id) for sample in samples)


def _message(role: str, text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def _conversation(sample: Sample, system: str | None) -> list[dict[str, Any]]:
    turns = [_message("system", system)] if system else []
    return [*turns, _message("user", sample.prompt, sample.images)]


def _render(loaded: LoadedModel, conversation: list[dict[str, Any]], generation_prompt: bool) -> str | None:
    """The chat template's text, or None where the processor has no template."""
    processor = loaded.processor
    template = templates.template_of(processor)
    if template is None:
        return None
    templates.check(processor, template, loaded.path, conversation, generation_prompt)
    try:
        text = processor.apply_chat_template(
            conversation, add_generation_prompt=generation_prompt, tokenize=False
        )
    except Exception as error:  # a template raises what it likes
        raise NotFoundError(
            f"the chat template of {loaded.name!r} fails: {first_line(error)}",
            "it is called with one user turn of images and text, and a system turn where one is asked for",
        ) from error
    return str(text)


def _prompt(loaded: LoadedModel, sample: Sample, system: str | None) -> str:
    text = _render(loaded, _conversation(sample, system), True)
    if text is not None:
        return text
    if loaded.family.prompt is None:
        raise NotFoundError(
            f"the processor of {loaded.name!r} has no chat template",
            "copy chat_template.jinja of the base model beside the weights",
        )
    images = loaded.processor.image_token * len(sample.images)
    return f"{system} " * bool(system) + loaded.family.prompt.format(images=images, text=sample.prompt)


def _process(
    loaded: LoadedModel, samples: Sequence[Sample], side: str, system: str | None
) -> dict[str, Tensor]:
    processor = loaded.processor
    token = getattr(processor, "image_token", None)
    for sample in samples:
        if token and token in sample.prompt:
            raise NotFoundError(
                f"the prompt of sample {sample.id!r} contains the image placeholder {token!r}",
                "prompts hold text only; the images' places are set by the chat template",
            )
    texts = [_prompt(loaded, sample, system) for sample in samples]
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
    except Exception as error:  # there is no telling what unusual settings make a processor raise
        raise NotFoundError(
            f"the processor cannot encode sample {_names(samples)}: {first_line(error)}"
        ) from error
    encoded.pop("labels", None)  # PaliGemma's processor makes some even where there is nothing to learn
    inputs = {
        name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else None)
        for name, value in encoded.items()
        if isinstance(value, Tensor)
    }
    for row, sample in zip(inputs["input_ids"], samples, strict=True):
        if bool(visual_mask(row, loaded.placeholder_ids).any()) != bool(sample.images):
            raise NotFoundError(
                f"sample {sample.id!r} has {len(sample.images)} images, but its encoded prompt has "
                f"{int(visual_mask(row, loaded.placeholder_ids).sum())} visual tokens",
                "the processor and the model's config disagree about the image placeholder",
            )
    return inputs


def _check_length(loaded: LoadedModel, samples: Sequence[Sample], length: int) -> None:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and 0 < limit < length:
        raise NotFoundError(
            f"sample {_names(samples)} is {length} tokens long, more than the model's {limit} positions",
            "use a shorter prompt or fewer images",
        )
