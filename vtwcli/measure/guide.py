"""Guides: smaller models that answer first, and whose attention says which visual tokens another model keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.machine import distributed
from vtwcli.models.generation import answer_of, greedy, plain_generation
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import encode_batch, visual_mask
from vtwcli.models.loading import LoadedModel, load
from vtwcli.schedule.rules import parameters
from vtwcli.schedule.schedule import Keep, Schedule

_SCORES = "guide_scores"


def guide_of(schedule: Schedule) -> str | None:
    """The name of the model that a schedule's scores come from; None where it needs none.

    Raises:
        UsageError: it needs one and names none, or several.
    """
    keeps = [one.select for one in schedule.actions if isinstance(one, Keep)]
    names = {parameters(vars(one)).get("guide") for one in keeps if one.score == "guided"}
    if not names:
        return None
    if None in names or len(names) > 1:
        raise UsageError(
            "score guided needs one guide, a second, smaller model that answers first",
            "name it with --set schedule.guide=MODEL",
        )
    return names.pop()


def folder_of(guide: str, beside: LoadedModel) -> Path:
    """Where a guide's files are.

    Raises:
        NotFoundError: it is not there.
    """
    return resolve(guide, trust_remote_code=_trusted(beside), weights=False).path


def split(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """A batch's inputs, and the scores that ``Guides.beside`` put beside them."""
    return {key: value for key, value in batch.items() if key != _SCORES}, batch.get(_SCORES)


class Guides:
    """The guides of a model's schedules, each loaded once, when the first of its scores is wanted.

    What they cost, in time, memory and FLOPs, is not part of what is measured of a schedule.
    """

    def __init__(self, loaded: LoadedModel, max_new_tokens: int) -> None:
        """
        Args:
            loaded: the model whose tokens they choose; guides run on its device, in its type.
            max_new_tokens: longest answer of a guide where no task says otherwise.
        """
        self.loaded, self.longest = loaded, max_new_tokens
        self._open: dict[str, LoadedModel] = {}
        self._known: dict[tuple[str, int], tuple[Sample, Tensor]] = {}

    def beside(
        self, batch: dict[str, Tensor], samples: Sequence[Sample], schedule: Schedule
    ) -> dict[str, Tensor]:
        """The batch of these samples, with the scores [B, S] of the schedule's guide where it has one.

        Raises:
            UsageError: the guide is not named, or sees another number of visual tokens.
            NotFoundError: it cannot be loaded.
        """
        name = guide_of(schedule)
        if name is None:
            return batch
        visual = visual_mask(batch["input_ids"], self.loaded.placeholder_ids)
        scores = torch.zeros(visual.shape, dtype=torch.float64)
        for row, sample in enumerate(samples):
            mine, found = visual[row].cpu(), self._scores(name, sample)
            if int(mine.sum()) != len(found):
                raise UsageError(
                    f"the guide {name} makes {len(found)} visual tokens of sample {sample.id!r}, and "
                    f"{self.loaded.name} makes {int(mine.sum())} of it",
                    "take a guide of the same family, with the same image processor",
                )
            scores[row, mine] = found
        return {**batch, _SCORES: scores.to(visual.device, _wide(visual.device))}

    def _scores(self, name: str, sample: Sample) -> Tensor:
        key = name, id(sample)
        if key not in self._known:
            self._known[key] = sample, attention_received(self._loaded(name), sample, self.longest).cpu()
        return self._known[key][1]

    def _loaded(self, name: str) -> LoadedModel:
        if name not in self._open:
            if distributed.is_main():
                console.note(f"{name} guides; its own time, memory and FLOPs are not counted")
            with console.progress(f"loading {name}"):
                self._open[name] = load(
                    name,
                    device=self.loaded.device,
                    dtype=self.loaded.dtype,
                    attn="eager",
                    trust_remote_code=_trusted(self.loaded),
                )
        return self._open[name]


@torch.no_grad()
def attention_received(loaded: LoadedModel, sample: Sample, max_new_tokens: int) -> Tensor:
    """What each visual token of a sample receives while a model answers greedily, [V].

    The attention weights of all layers and heads, summed over the rows of text in the prompt and of the generated
    tokens but the last, which no layer sees.

    Args:
        loaded: the model, with eager attention.

    Raises:
        UsageError: its attention returns no weights.
    """
    batch, tokens = encode_batch(loaded, [sample]), answer_tokens([sample], max_new_tokens)
    visual = visual_mask(batch["input_ids"], loaded.placeholder_ids)[0]
    # rows that are fed behind the end token do not count, and are known only once the answer is
    steps: list[Tensor] = []
    with _watched(loaded, visual, steps), plain_generation(loaded):
        said = greedy(loaded, batch, tokens, [sample.id])[0][0].tolist()
    return torch.stack(steps[: max(len(answer_of(loaded, said)), 1)]).sum(0)


@contextmanager
def _watched(loaded: LoadedModel, visual: Tensor, steps: list[Tensor]) -> Iterator[None]:
    """Let ``steps`` have a sum [V] for every forward pass, over layers, heads and rows of text."""
    seen = 0

    def watch(layer: int, module: Any, args: Any, output: Any) -> None:
        nonlocal seen
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise UsageError(
                f"the attention of the guide {loaded.name} returns no weights", "take another guide"
            )
        if layer == 0:
            seen += weights.shape[2]
            steps.append(weights.new_zeros(int(visual.sum()), dtype=_wide(weights.device)))
        columns = visual.nonzero()[:, 0].to(weights.device) - (seen - weights.shape[3])
        there = columns >= 0  # a sliding window forgets the oldest
        wide = weights[0].to(steps[-1].dtype)
        rows = wide[:, ~visual.to(wide.device)] if wide.shape[1] == len(visual) else wide
        received = torch.zeros_like(steps[-1], device=wide.device)
        received[there] = rows.sum((0, 1))[columns[there]]
        steps[-1] += received.to(steps[-1].device)

    handles = [
        layer.self_attn.register_forward_hook(partial(watch, number))
        for number, layer in enumerate(loaded.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trusted(loaded: LoadedModel) -> bool:
    return loaded.checkpoint is not None and loaded.checkpoint.trust_remote_code


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
