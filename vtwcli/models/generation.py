"""A model's own answers: greedy, with the logits that each token was chosen from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.errors import NotFoundError, VtwError, first_line
from vtwcli.io import console
from vtwcli.judge.kl import check_generation
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.inputs import encode_batch, end_ids, names_of
from vtwcli.models.loading import LoadedModel


def generate_answers(
    loaded: LoadedModel, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 1
) -> list[tuple[str, Tensor]]:
    """As ``generate_batches`` for batches of ``batch_size`` neighbours, by sample."""
    batches = [samples[at : at + batch_size] for at in range(0, len(samples), batch_size)]
    return [answer for part in generate_batches(loaded, batches, max_new_tokens) for answer in part]


@torch.no_grad()
def generate_batches(
    loaded: LoadedModel, batches: Sequence[Sequence[Sample]], max_new_tokens: int
) -> list[list[tuple[str, Tensor]]]:
    """The model's own greedy answers: per sample the text and the ids [A], up to and with the end token.

    Plain argmax at every step. A checkpoint's generation config may carry penalties and sampling settings; they are
    set aside, so that teacher forcing the answer meets each token as the model's first choice. In float32 it does not
    matter who shares a batch.

    Raises:
        NotFoundError: a sample that cannot be encoded, or whose placeholders the model refuses.
    """
    found = []
    with (
        console.progress("answers", total=sum(map(len, batches))) as task,
        plain_generation(loaded),
        quiet_libraries(),
    ):
        for part in batches:
            found.append(_answered(loaded, part, max_new_tokens))
            task.advance(len(part))
    return found


def _answered(
    loaded: LoadedModel, samples: Sequence[Sample], max_new_tokens: int
) -> list[tuple[str, Tensor]]:
    """The answers to one batch; where it fails, to one sample after the other, so that the bad one has a name."""
    batch = encode_batch(loaded, samples)
    try:
        tokens = answer_tokens(samples, max_new_tokens)
        output, _ = greedy(loaded, batch, tokens, [sample.id for sample in samples])
        return [spelled(loaded, row) for row in output.cpu()]
    except VtwError:
        raise
    except Exception as error:  # as in capture
        failure = first_line(error)
        if len(samples) == 1:
            raise NotFoundError(
                f"the model refuses the inputs of sample {names_of(samples)}: {failure}"
            ) from error
    del batch  # what it held may be what was missing
    console.detail(f"{len(samples)} samples cannot be answered at once, so one by one: {failure}")
    return [one for sample in samples for one in _answered(loaded, [sample], max_new_tokens)]


def spelled(loaded: LoadedModel, ids: Tensor) -> tuple[str, Tensor]:
    """An answer's text, and its ids up to and with the end token, of generated ids [R] with padding behind."""
    ids = ids[: len(answer_of(loaded, ids.tolist()))].clone()
    return loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids


@torch.no_grad()
def greedy(
    loaded: LoadedModel,
    batch: dict[str, Tensor],
    tokens: int,
    names: Sequence[str] = (),
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The most likely tokens of a batch that is padded on the left, and the logits they were chosen from.

    Args:
        loaded: the model; a schedule that is applied to it has its effect.
        batch: model inputs of B rows.
        tokens: longest answer R.
        names: of the rows' samples, for messages.
        forced: token ids [B, R] that are taken instead of the most likely ones.

    Returns:
        Token ids [B, R], behind the end of an answer padding, and raw logits [B, R, V].

    Raises:
        NotFoundError: logits of an answer that are not finite; names the sample, the layer and the type.
    """
    width = batch["input_ids"].shape[1]

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        assert forced is not None
        wanted = forced[:, ids.shape[1] - width, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)

    extra: dict[str, Any] = {}
    if forced is not None:
        extra = {"logits_processor": [force], "min_new_tokens": tokens}

    def run() -> Any:
        return loaded.model.generate(
            **batch,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **extra,
        )

    out = run()
    said, logits = out.sequences[:, width:], torch.stack(out.logits, dim=1)
    lengths = [len(answer_of(loaded, row)) for row in said.tolist()]
    mask = batch.get("attention_mask")
    check_generation(logits, lengths, names, loaded.layers, run, mask, loaded.dtype)
    return said, logits


def answer_of(loaded: LoadedModel, ids: list[int]) -> list[int]:
    """Generated tokens up to and with the first end token."""
    ends = set(end_ids(loaded))
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


@contextmanager
def plain_generation(loaded: LoadedModel) -> Iterator[None]:
    """The library's own generation defaults for a while, with the model's special tokens.

    So the cache is dynamic, which every schedule can shorten, whatever the checkpoint asks for.
    """
    from transformers import GenerationConfig

    model, before = loaded.model, loaded.model.generation_config
    pads = (before.pad_token_id, loaded.processor.tokenizer.pad_token_id, *end_ids(loaded))
    # fed to rows that have ended, whatever it is: an id that the embedding does not have, such as -1, will not do
    pad = next((token for token in pads if token is not None and 0 <= token < loaded.embedding_rows), 0)
    model.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id, eos_token_id=before.eos_token_id, pad_token_id=pad
    )
    try:
        yield
    finally:
        model.generation_config = before


def cache_of(output: Any) -> Any:
    """The cache in what a model or ``generate`` returned."""
    names = ("cache", "past_key_values")
    return next(found for name in names if (found := getattr(output, name, None)) is not None)
