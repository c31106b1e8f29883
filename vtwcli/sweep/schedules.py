"""Many schedules on the same samples, in one pass over the layers; ``trie`` says how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtwcli.io.console import Task
from vtwcli.judge.kl import distance, log_probabilities
from vtwcli.models.families import Family
from vtwcli.runtime.plan import Plan
from vtwcli.runtime.trace import SampleTrace
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import Capture, LayerSource
from vtwcli.sweep.sweep import CHUNK_LOGITS, SweepItem, through_layers
from vtwcli.sweep.trie import Trie


@dataclass(frozen=True, eq=False)
class Followed:
    """What schedules do to one sample; C of them, R positions.

    Attributes:
        item: which item of the call.
        kl: KL(P_pruned ‖ P_full) in nats from float64 logits, float64 [C, R].
        agree: whether the most likely token is the full model's, bool [C, R].
        traces: what each schedule did, [C].
    """

    item: int
    kl: Tensor
    agree: Tensor
    traces: list[SampleTrace]


def plan_of(schedule: Schedule, depth: int, family: Family) -> Plan:
    """A schedule as the runtime executes it on a model.

    Raises:
        UsageError: an action lies outside the model.
        PruningError: one that the runtime cannot execute on it.
    """
    schedule.check_depth(depth, family.first_withdrawal)
    return Plan(schedule.to_dict(), depth, family.first_withdrawal)


def why_not(plan: Plan, layers: Iterable[nn.Module]) -> tuple[str, str] | None:
    """What of a schedule ``follow`` does not know, and what to do about it; None where it knows all.

    Where a layer has a sliding window, which visual token is the first one for a decode step depends on what its
    cache has dropped.
    """
    if plan.front is not None:
        return "scores of the vision tower need the whole model", "use a score of the language model"
    if plan.guided:
        return "a guide does not run", "use a score of the model itself"
    if any(action.needs_all for action in plan.leaving):
        return "scores of all rows are not known", "use the score attention"
    if plan.trims:
        return "what leaves during the answer is not known", "leave out the actions with every"
    if plan.looks_around:
        return "neighbours of visual tokens are not known", "leave out columns: beyond"
    if plan.newer:
        return "what it says runs on the whole model only", "use scores of the last row in the layer before"
    if not any(mute.sink == "first" and mute.during == "all" for mute in plan.mutes):
        return None
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    named = [x for one in attentions for x in (one, getattr(one, "config", None))]
    if all(getattr(x, "sliding_window", None) is None for x in named):
        return None
    return "moving attention to the first visual token goes with no sliding window", "use sink: zero"


@torch.no_grad()
def follow(
    source: LayerSource, items: Sequence[SweepItem], plans: Sequence[Plan], *, progress: Task | None = None
) -> list[Followed]:
    """How far each schedule moves the next-token distributions of each sample, in one pass over the layers: what the
    runtime gives when it is led along the same tokens.

    Args:
        source: a ``Resident`` model, or one streamed layer by layer.
        items: samples, each a batch of one with its answer behind the prompt; its first compared row is the prompt's
            last, from which a schedule decides. Without visual tokens all KL are 0.
        plans: the schedules; their order is that of the results.
        progress: advanced by one for every item and layer.

    Returns:
        One result for each sample, in order.

    Raises:
        UsageError: a compared row that is no text token, or a family that cannot be swept.
        VtwError: a layer that does not behave as a decoder layer with a key/value cache.
        NotFoundError: hidden states, logits or a KL that are not finite; names the sample, the layer and the type.
    """

    def start(i: int, seen: Capture) -> Trie:
        return Trie(i, seen, items[i].rows, plans, source.eager, items[i].name)

    return [_result(walk, head) for walk, head in through_layers(source, items, start, progress)]


def _result(walk: Trie, head: Callable[[Tensor], Tensor]) -> Followed:
    """Compare the distributions of every state that came through the layers with the full stream's."""
    full_hidden = walk.hidden[0]  # [R, D]
    full = log_probabilities(head(full_hidden), walk.name)
    states = list(dict.fromkeys(walk.states))
    kl = torch.zeros(len(states), len(full), dtype=torch.float64)
    agree = torch.ones(len(states), len(full), dtype=torch.bool)
    there = torch.stack([state.layout.changed[walk.rows[0]] for state in states]) if states else kl.bool()
    other = there.any(1).nonzero()[:, 0].tolist()
    chunk = max(1, CHUNK_LOGITS // max(1, full.numel()))
    for at in range(0, len(other), chunk):
        part = other[at : at + chunk]
        streams = full_hidden.repeat(len(part), 1, 1)  # [M, R, D]
        streams[there[part]] = torch.cat([states[m].hidden for m in part])
        apart, same = distance(head(streams.flatten(0, 1)).unflatten(0, streams.shape[:2]), full, walk.name)
        reached = there[part].cpu()
        kl[part] = torch.where(reached, apart.cpu(), 0.0)
        agree[part] = same.cpu() | ~reached
    places = [states.index(state) for state in walk.states]
    return Followed(walk.number, kl[places], agree[places], walk.traces())
