"""The sweep: one pass over the layers that evaluates many interventions on visual tokens at once.

``walk`` says why one pass is enough and does it; here are the items that go in and the comparison of the next-token
distributions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from vtwcli.errors import UsageError
from vtwcli.io.console import Task
from vtwcli.judge.kl import distance, log_probabilities
from vtwcli.machine.memory import peak_memory
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.layers import Capture, LayerSource
from vtwcli.sweep.views import Probe
from vtwcli.sweep.walk import Walk

CHUNK_LOGITS = 1 << 23  # float64 logits compared at once


@dataclass(frozen=True, eq=False)
class SweepItem:
    """A batch of model inputs and the rows whose next-token distributions are compared.

    Attributes:
        inputs: what the processor made: ``input_ids`` [B, S] and, where there is padding, ``attention_mask``,
            pixels and so on. B is 1, or the rows are padded to one length.
        rows: positions in the padded sequence, long [B, R]; the distribution is that of the token behind each.
        valid: which entries of ``rows`` count, bool [B, R]; None means all.
        name: what the item is called in messages.
    """

    inputs: Mapping[str, Tensor]
    rows: Tensor
    valid: Tensor | None = None
    name: str = "a sample"

    def kept(self, row: int) -> Tensor:
        """Which of the row's positions count, bool [R]."""
        return (
            torch.ones_like(self.rows[row], dtype=torch.bool)
            if self.valid is None
            else self.valid[row].bool()
        )


@dataclass(frozen=True, eq=False)
class ItemResult:
    """What the interventions do to one sample, a row of one item's batch.

    Attributes:
        item, row: which item of the call, and which row of its batch.
        kl: KL(P_pruned ‖ P_full) in nats from float64 logits, float64 [interventions, R].
        agree: whether the most likely token is the full model's, bool [interventions, R].
        top1: the full model's most likely token, long [R].
        prefix, visual, suffix: numbers of text tokens before the first visual token, of visual tokens, and of text
            tokens behind the first visual token. Without visual tokens all KL are 0.
        seconds: computing time spent on the sample.
        memory: peak of the process so far, see ``peak_memory``.
    """

    item: int
    row: int
    kl: Tensor
    agree: Tensor
    top1: Tensor
    prefix: int
    visual: int
    suffix: int
    seconds: float
    memory: dict[str, int]


@torch.no_grad()
def sweep(
    source: LayerSource,
    items: Sequence[SweepItem],
    interventions: Sequence[Intervention],
    *,
    probes: Sequence[Probe] = (),
    progress: Task | None = None,
    on_result: Callable[[ItemResult], None] | None = None,
) -> list[ItemResult]:
    """How far each intervention moves the next-token distributions of each sample, in one pass over the layers.

    Cost for withdrawal at every layer, with c(n) the cost of n rows in one layer: L·c(S) + Σ(L-k)·c(Q), against
    (Σk + L)·c(S) + Σ(L-k)·c(P+Q) for one run per candidate layer (VTW, arXiv 2405.05803); P prefix, Q suffix.

    Args:
        source: a ``Resident`` model, or one streamed layer by layer.
        items: samples, each alone or several as a padded batch.
        interventions: what to try; the order is that of the results.
        probes: called with a ``LayerView`` for every item and layer.
        progress: advanced by one for every item and layer.
        on_result: called with each result as soon as it exists: behind each item of a resident model, at the end
            of a streamed one, whose items walk together.

    Returns:
        One result for each sample: items in order, the rows of a batch in order.

    Raises:
        UsageError: an intervention behind the last layer, a compared row that is no text token, or a family that
            cannot be swept.
        VtwError: a layer that does not behave as a decoder layer with a key/value cache.
        NotFoundError: hidden states, logits or a KL that are not finite; names the sample, the layer and the type.
    """
    _check(interventions, source.depth)
    results: list[ItemResult] = []

    def start(i: int, seen: Capture) -> Walk:
        return Walk(i, seen, items[i].rows, interventions, probes, source.eager, items[i].name)

    for walk, head in through_layers(source, items, start, progress):
        for result in _results(walk, items[walk.number], len(interventions), head):
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


class Walker(Protocol):
    """An item on its way through the layers."""

    def step(self, d: int, layer: nn.Module) -> None:
        """Run layer ``d``."""


Walking = TypeVar("Walking", bound=Walker)


def through_layers(
    source: LayerSource,
    items: Sequence[SweepItem],
    start: Callable[[int, Capture], Walking],
    progress: Task | None = None,
) -> Iterator[tuple[Walking, Callable[[Tensor], Tensor]]]:
    """Items that came through all layers, in order, each with the head; one after the other where the model is
    resident, together where every pass over its layers is dear.

    Args:
        start: makes what walks, from an item's number and what the model hands its layers.
        progress: advanced by one for every item and layer.

    Raises:
        UsageError: a compared row that is no text token, or a family that cannot be swept.
    """
    if source.family.no_withdraw:
        raise UsageError(f"{source.family.title} cannot be swept: {source.family.no_withdraw}")
    everything = range(len(items))
    for numbers in [everything] if source.together else [range(i, i + 1) for i in everything]:
        walks: list[Walking] = []
        for i, seen in zip(numbers, source.captures([items[i].inputs for i in numbers]), strict=True):
            _check_rows(items[i], seen)
            walks.append(start(i, seen))
        for d, layer in enumerate(source.layers()):
            for walk in walks:
                walk.step(d, layer)
                if progress is not None:
                    progress.advance()
        with source.head() as head:
            for walk in walks:
                yield walk, head


def _check(interventions: Sequence[Intervention], depth: int) -> None:
    for one in interventions:
        if one.start > depth:
            raise UsageError(f"{one.kind} at layer {one.start}: the model has {depth} layers")


def _check_rows(item: SweepItem, seen: Capture) -> None:
    batch, length = seen.visual.shape
    if item.rows.ndim != 2 or len(item.rows) != batch or not item.rows.shape[1]:
        raise UsageError(f"compared rows of shape {list(item.rows.shape)} for a batch of {batch}")
    if bool(((item.rows < 0) | (item.rows >= length)).any()):
        raise UsageError(f"a compared row lies outside the sequence of {length} tokens")
    text = (seen.attended & ~seen.visual).cpu().gather(1, item.rows.cpu())
    for b in range(batch):
        if not bool(text[b, item.kept(b).cpu()].all()):
            raise UsageError(
                "a compared row is padding or a visual token; only text tokens have a next token to compare"
            )


def _results(
    walk: Walk, item: SweepItem, interventions: int, head: Callable[[Tensor], Tensor]
) -> Iterator[ItemResult]:
    """Compare the distributions of every stream that came through the layers with the full stream's."""
    for b in range(len(walk.rows)):
        began = time.perf_counter()
        keep = item.kept(b).to(walk.rows.device)
        full = log_probabilities(head(walk.hidden[b, keep]), item.name)  # [R, V]
        kl = torch.zeros(interventions, len(full), dtype=torch.float64)
        agree = torch.ones(interventions, len(full), dtype=torch.bool)
        chunk = max(1, CHUNK_LOGITS // max(1, full.numel()))
        for group in walk.groups:
            there = group.find(walk.rows)[1][b, keep]  # rows that were not reached are the full model's
            for start in range(0, group.begun, chunk):
                part = slice(start, min(start + chunk, group.begun))
                # [M, R, D]; of rows that were not reached there is nothing sensible in the group
                streams = torch.where(there[:, None], group.hidden[b, part][:, keep], walk.hidden[b, keep])
                logits = head(streams.flatten(0, 1)).unflatten(0, streams.shape[:2])
                apart, same = distance(logits, full, item.name)
                numbers = torch.tensor(group.numbers[part])
                kl[numbers] = torch.where(there.to(apart.device), apart, 0.0).cpu()
                agree[numbers] = (same | ~there.to(same.device)).cpu()
        counts = _counts(walk.capture.visual[b], walk.capture.attended[b])
        seconds = walk.seconds / len(walk.rows) + time.perf_counter() - began
        top1 = full.argmax(-1).cpu()
        yield ItemResult(walk.number, b, kl, agree, top1, *counts, seconds, peak_memory())


def _counts(visual: Tensor, attended: Tensor) -> tuple[int, int, int]:
    """Numbers of prefix, visual and suffix tokens of one row [S]."""
    text, before = attended & ~visual, visual.cumsum(0) == 0
    return int((text & before).sum()), int(visual.sum()), int((text & ~before).sum())
