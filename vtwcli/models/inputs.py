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
from vtwcli.models.checkpoint import first_line, quiet_transformers
from vtwcli.models.loading import LoadedModel

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


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
        inputs = append(inputs, answer_ids)
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


def append(inputs: dict[str, Tensor], answer_ids: Tensor) -> dict[str, Tensor]:
    """Inputs of a batch of one with answer tokens [A] behind the prompt; the answer is text, attended to."""
    extended = dict(inputs)
    tail = answer_ids.to(inputs["input_ids"].device)[None]
    for name in _PER_TOKEN:
        if name in inputs:
            old = inputs[name]
            fill = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}.get(
                name, torch.zeros_like(tail)
            )
            extended[name] = torch.cat([old, fill.to(old.dtype)], dim=1)
    return extended


def answer_ids(loaded: LoadedModel, text: str) -> Tensor:
    """A reference answer as token ids [A], as it continues a prompt: no bos, an eos at the end.

    What stands between prompt and answer (a space in ``ASSISTANT: red``) and which token ends the turn are taken
    from the chat template.
    """
    tokenizer = loaded.processor.tokenizer
    question = Sample("answer", "answer", (), "?")
    prompt = _prompt(loaded, question, None)
    turn = _render(loaded, [*_conversation(question, None), _message("assistant", text)], False)
    lead, tail = " ", ""
    if turn is not None and turn.startswith(prompt) and text and text in turn[len(prompt) :]:
        lead, _, tail = turn[len(prompt) :].partition(text)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + lead + text, add_special_tokens=False)["input_ids"]
    if (
        whole[: len(before)] != before
    ):  # the tokenizer merges across the border: tokenize the answer on its own
        before, whole = [], tokenizer((lead + text).lstrip(), add_special_tokens=False)["input_ids"]
    ends = end_ids(loaded)
    closing = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail.strip() else []
    end = next((i for i in closing if i in ends), tokenizer.eos_token_id)
    return torch.tensor([*whole[len(before) :], *([end] if end is not None else [])], dtype=torch.long)


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
    with console.progress("answers", total=len(samples)) as task, _plain_generation(loaded):
        for at in range(0, len(samples), batch_size):
            batch = encode_batch(loaded, samples[at : at + batch_size])
            width = batch["input_ids"].shape[1]
            try:
                with quiet_transformers():
                    output = loaded.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            except ValueError as error:
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
def _plain_generation(loaded: LoadedModel) -> Iterator[None]:
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
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        return None
    return str(
        processor.apply_chat_template(conversation, add_generation_prompt=generation_prompt, tokenize=False)
    )


def _prompt(loaded: LoadedModel, sample: Sample, system: str | None) -> str:
    text = _render(loaded, _conversation(sample, system), True)
    if text is not None:
        return text
    if loaded.family.model_type != "llava":
        raise NotFoundError(
            f"the processor of {loaded.name!r} has no chat template",
            "copy chat_template.jinja of the base model beside the weights",
        )
    console.note(
        f"{loaded.name}: no chat template, using the prompt of LLaVA-1.5: USER: <image> ... ASSISTANT:"
    )
    head = f"{system} " if system else ""
    return f"{head}USER: {'<image>' * len(sample.images)}\n{sample.prompt} ASSISTANT:"


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
        with quiet_transformers():
            encoded = processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                padding_side=side,
                # a template that writes the bos itself must not get a second one
                add_special_tokens=not (bos and texts[0].startswith(bos)),
                return_tensors="pt",
            )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise NotFoundError(
            f"the processor cannot encode sample {_names(samples)}: {first_line(error)}"
        ) from error
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
    if limit and length > limit:
        raise NotFoundError(
            f"sample {_names(samples)} is {length} tokens long, more than the model's {limit} positions",
            "use a shorter prompt or fewer images",
        )
