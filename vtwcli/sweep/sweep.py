"""The sweep: one pass over the layers that evaluates many interventions on visual tokens at once.

``walk`` says why one pass is enough and does it; here are the items that go in, the comparison of the next-token
distributions, and the naive search for families that the one pass cannot serve.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import UsageError
from vtwcli.judge.kl import divergence, log_probabilities
from vtwcli.machine.memory import peak_memory
from vtwcli.sweep.layers import Capture, LayerSource, Resident
from vtwcli.sweep.walk import AttentionRows, Intervention, LayerView, Probe, Walk, as_bool, explicit, readable

__all__ = [
    "AttentionRows",
    "Intervention",
    "ItemResult",
    "LayerView",
    "Probe",
    "Resident",
    "SweepItem",
    "naive",
    "sweep",
]

_CHUNK_LOGITS = 1 << 23  # float64 logits compared at once


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
    progress: Any = None,
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
        progress: told ``advance()`` once for every item and layer.
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
    if source.family.no_sweep:
        raise UsageError(
            f"{source.family.title} cannot be swept: {source.family.no_sweep}", "use the naive search"
        )
    results: list[ItemResult] = []
    everything = range(len(items))
    for numbers in [everything] if source.together else [range(i, i + 1) for i in everything]:
        walks: list[Walk] = []
        for i, seen in zip(numbers, source.captures([items[i].inputs for i in numbers]), strict=True):
            item = items[i]
            _check_rows(item, seen)
            walks.append(Walk(i, seen, item.rows, interventions, probes, source.eager, item.name))
        for d, layer in enumerate(source.layers()):
            for walk in walks:
                walk.step(d, layer)
                if progress is not None:
                    progress.advance()
        with source.head() as head:
            for walk in walks:
                for result in _results(walk, items[walk.number], len(interventions), head):
                    results.append(result)
                    if on_result is not None:
                        on_result(result)
    return results


@torch.no_grad()
def naive(
    source: LayerSource,
    items: Sequence[SweepItem],
    interventions: Sequence[Intervention],
    *,
    progress: Any = None,
    on_result: Callable[[ItemResult], None] | None = None,
) -> list[ItemResult]:
    """What ``sweep`` computes, by a full run of the stock model for each intervention, as VTW (arXiv 2405.05803).

    For families whose layers the sweep cannot take apart. Text rows stop reading visual columns through the masks
    of the stock layers, so nothing gets shorter: every run costs a full forward.

    Args:
        source: a model that is loaded whole.
        items, interventions, on_result: as for ``sweep``.
        progress: told ``advance()`` as often in all as by ``sweep``.

    Raises:
        UsageError: a streamed model, or as ``sweep``.
    """
    _check(interventions, source.depth)
    if not isinstance(source, Resident):
        raise UsageError(f"{source.family.title} needs its model loaded whole", "leave out --stream")
    results: list[ItemResult] = []
    for number, item in enumerate(items):
        began = time.perf_counter()
        (seen,) = source.captures([item.inputs])
        _check_rows(item, seen)
        masks = [as_bool(kwargs.get("attention_mask")) for kwargs in seen.kwargs]
        full = [log_probabilities(x, item.name) for x in _rerun(source, item, seen, masks, None)]
        shape = (len(interventions), item.rows.shape[1])
        kl = torch.zeros(len(full), *shape, dtype=torch.float64)
        agree = torch.ones(len(full), *shape, dtype=torch.bool)
        for i, one in enumerate(interventions):
            for b, logits in enumerate(_rerun(source, item, seen, masks, one)):
                kl[b, i], agree[b, i] = _compare(log_probabilities(logits, item.name), full[b], item.name)
        seconds = (time.perf_counter() - began) / len(full)
        for b in range(len(full)):
            keep = item.kept(b).cpu()
            top1 = full[b].argmax(-1).cpu()[keep]
            counts = _counts(seen.visual[b], seen.attended[b])
            result = ItemResult(
                number, b, kl[b][:, keep], agree[b][:, keep], top1, *counts, seconds, peak_memory()
            )
            results.append(result)
            if on_result is not None:
                on_result(result)
        for _ in range(source.depth if progress is not None else 0):
            progress.advance()
    return results


def _rerun(
    source: Resident, item: SweepItem, seen: Capture, masks: Sequence[Tensor | None], one: Intervention | None
) -> Tensor:
    """Logits [B, R, V] at the compared rows of a full run under one intervention, or none."""
    text, visual = ~seen.visual[:, :, None], seen.visual[:, None, :]
    length = seen.visual.shape[1]
    every = torch.arange(length, device=seen.visual.device).expand(len(seen.visual), -1)

    def mute(mask: Tensor | None) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            allowed = (readable(mask, every, length) & ~(text & visual))[:, None]
            return args, {**kwargs, "attention_mask": explicit(allowed, source.eager, seen.hidden.dtype)}

        return hook

    def freeze(layer: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        return torch.where(seen.visual[:, :, None], args[0] if args else kwargs["hidden_states"], out)

    with ExitStack() as stack:
        for d, layer in enumerate(source.layers()):
            if one is None or not one.active(d):
                continue
            if one.kind == "freeze":
                handle = layer.register_forward_hook(freeze, with_kwargs=True)
            else:
                handle = layer.register_forward_pre_hook(mute(masks[d]), with_kwargs=True)
            stack.callback(handle.remove)
        logits = source.model(**item.inputs, use_cache=False).logits
    rows = item.rows.to(logits.device)
    return logits.gather(1, rows[:, :, None].expand(-1, -1, logits.shape[2]))


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
        chunk = max(1, _CHUNK_LOGITS // max(1, full.numel()))
        for group in walk.groups:
            there = group.find(walk.rows)[1][b, keep]  # rows that were not reached are the full model's
            for start in range(0, group.begun, chunk):
                part = slice(start, min(start + chunk, group.begun))
                # [M, R, D]; of rows that were not reached there is nothing sensible in the group
                streams = torch.where(there[:, None], group.hidden[b, part][:, keep], walk.hidden[b, keep])
                logits = head(streams.flatten(0, 1)).unflatten(0, streams.shape[:2])
                distance, same = _compare(log_probabilities(logits, item.name), full, item.name)
                numbers = torch.tensor(group.numbers[part])
                kl[numbers] = torch.where(there.to(distance.device), distance, 0.0).cpu()
                agree[numbers] = (same | ~there.to(same.device)).cpu()
        counts = _counts(walk.capture.visual[b], walk.capture.attended[b])
        seconds = walk.seconds / len(walk.rows) + time.perf_counter() - began
        top1 = full.argmax(-1).cpu()
        yield ItemResult(walk.number, b, kl, agree, top1, *counts, seconds, peak_memory())


def _compare(pruned: Tensor, full: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """KL(pruned ‖ full), and whether the most likely token is the same, from log-probabilities [..., R, V]."""
    return divergence(pruned, full, name), pruned.argmax(-1) == full.argmax(-1)


def _counts(visual: Tensor, attended: Tensor) -> tuple[int, int, int]:
    """Numbers of prefix, visual and suffix tokens of one row [S]."""
    text, before = attended & ~visual, visual.cumsum(0) == 0
    return int((text & before).sum()), int(visual.sum()), int((text & ~before).sum())
