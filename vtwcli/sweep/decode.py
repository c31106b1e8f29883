"""Greedy answers from a source of layers: each token takes all batches through the layers once.

So a model that is read from disk is read once for every token, however many samples are answered. What the model
hands its layers is captured once, with stand-ins where the answer will be: masks and rotary embeddings do not depend
on which tokens those are. Keys and values stay in memory.

Axes: B batch rows, S prompt, R answer, n rows that run, D width, H heads of keys and values, E their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vtwcli.io.console import Task
from vtwcli.judge.kl import is_distribution, not_finite
from vtwcli.models.inputs import append, end_ids
from vtwcli.models.loading import LoadedModel
from vtwcli.sweep.caches import KeysValues, Lent, run
from vtwcli.sweep.layers import LayerSource
from vtwcli.sweep.reach import readable, take
from vtwcli.sweep.stream import Stream


class _Answer:
    """One batch's answers as they grow.

    Attributes:
        hidden: [B, n, D] on its way through the layers: first of the prompt, then of the last token.
        said: what was said so far, [B] each.
        open: which rows have not ended, [B].
    """

    def __init__(self, stream: Stream, prompt: int) -> None:
        self.stream, self.prompt = stream, prompt
        self.hidden = stream.capture.hidden[:, :prompt]
        self.said: list[Tensor] = []
        self.open = torch.ones(len(self.hidden), dtype=torch.bool)
        self._entries: dict[int, KeysValues] = {}  # by layer, [B, H, S + R - 1, E]
        self._lent = Lent()

    def step(self, d: int, layer: nn.Module) -> None:
        """Run layer ``d``."""
        seen, (batch, count, _) = self.stream.capture, self.hidden.shape
        end = self.prompt + len(self.said)
        rows = torch.arange(end - count, end, device=self.hidden.device).expand(batch, -1)
        if d in seen.added:
            self.hidden = self.hidden + take(seen.added[d], rows)
        allowed = readable(self.stream.mask(d), rows, seen.hidden.shape[1])[:, :, :end]

        def read(*new: Tensor) -> KeysValues:
            if d not in self._entries:
                room = [x.new_empty(*x.shape[:2], seen.hidden.shape[1], x.shape[3]) for x in new]
                self._entries[d] = (room[0], room[1])
                self._lent.put(layer, self._entries[d])
            for kept, x in zip(self._entries[d], new, strict=True):
                kept[:, :, end - count : end] = x
            keys, values = self._entries[d]
            return keys[:, :, :end], values[:, :, :end]

        lent = self._lent.get(layer)
        if lent is not None:
            lent = lent[0][:, :, :end], lent[1][:, :, :end]
        kwargs = self.stream.arguments(d, rows, allowed)
        self.hidden = run(layer, self.hidden, kwargs, read if lent is None else lambda *all: all, lent)
        self.stream.check(self.hidden, seen.attended.gather(1, rows), d)


@torch.no_grad()
def decode(
    loaded: LoadedModel,
    source: LayerSource,
    batches: Sequence[Mapping[str, Tensor]],
    names: Sequence[Sequence[str]],
    tokens: int,
    progress: Task,
) -> list[Tensor]:
    """The most likely tokens of batches that are padded on the left.

    Args:
        loaded: the model, or its skeleton.
        source: its layers.
        batches: model inputs.
        names: of the rows' samples, for messages.
        tokens: longest answer R.
        progress: advanced by one for every token.

    Returns:
        By batch token ids [B, R] or fewer; behind an end token anything.

    Raises:
        NotFoundError: hidden states or logits that are not finite; names the samples and the type.
    """
    ends = torch.tensor(end_ids(loaded), dtype=torch.long)
    tails = [batch["input_ids"][0, -1].expand(tokens - 1) for batch in batches]
    seen = source.captures(
        [append(loaded, dict(batch), tail) for batch, tail in zip(batches, tails, strict=True)]
    )
    answers = []
    for number, (capture, batch) in enumerate(zip(seen, batches, strict=True)):
        prompt = batch["input_ids"].shape[1]
        last = torch.full((len(capture.hidden), 1), prompt - 1)
        name = "sample " + ", ".join(map(repr, names[number]))
        answers.append(_Answer(Stream(number, capture, last, source.eager, name), prompt))
    going = list(answers)
    for step in range(tokens):
        if step:
            _embed(source, going)
        for d, layer in enumerate(source.layers()):
            for one in going:
                one.step(d, layer)
        with source.head() as head:
            for one in going:
                logits = head(one.hidden[:, -1])
                if not bool((sound := is_distribution(logits)).all()):
                    whose = f"sample {names[one.stream.number][int(sound.int().argmin())]!r}"
                    raise not_finite(whose, "the logits are", logits.dtype)
                one.said.append(logits.argmax(-1).cpu())
                one.open &= ~torch.isin(one.said[-1], ends)
        progress.advance()
        going = [one for one in going if bool(one.open.any())]
        if not going:
            break
    return [torch.stack(one.said, dim=1) for one in answers]


def _embed(source: LayerSource, going: Sequence[_Answer]) -> None:
    """Give each batch the embeddings of what it said last; all of them are one text to the model."""
    said = [one.said[-1] for one in going]
    [seen] = source.captures([{"input_ids": torch.cat(said)[None].to(going[0].hidden.device)}])
    for one, hidden in zip(going, seen.hidden[0].split([len(x) for x in said]), strict=True):
        one.hidden = hidden[:, None]
