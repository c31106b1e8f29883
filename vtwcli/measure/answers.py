"""What the full model and schedules say to the same batch: answers, KL and agreement along the full model's answer.

B is the number of rows of a batch, R of generated tokens, V the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.judge.flops import DEFAULT_CONVENTION, Convention, TextShape, kv_bytes, prefill_cost
from vtwcli.judge.kl import distance, log_probabilities, sample_name
from vtwcli.measure.guide import split
from vtwcli.measure.withdrawn import exact
from vtwcli.models.generation import answer_of, greedy
from vtwcli.models.inputs import Encoded, UnusableSampleError, answer_ids
from vtwcli.models.loading import LoadedModel
from vtwcli.results.evaluation import ActionTaken, Spent
from vtwcli.runtime import ActionTrace, PruningError, Trace, pruned
from vtwcli.schedule.schedule import Keep, Schedule, Withdraw
from vtwcli.sweep.schedules import Followed


@dataclass(frozen=True)
class Answer:
    """What one variant of the model says to one sample, plain values only.

    Attributes:
        text: the greedy answer; empty where it was not asked for.
        ids: its tokens, up to and with the end token.
        kl: KL(P_pruned ‖ P_full) in nats at each position of the full model's answer, [R]; zeros for the full model.
        agree: whether the most likely token there is the full model's, [R].
        visual_per_layer: visual tokens present in each layer.
        text_tokens: other tokens of the prompt.
        actions: what the schedule's ``withdraw`` and ``keep`` actions did, in order.
        frozen: whether the visual tokens of each layer are not updated; empty: all are.
    """

    text: str
    ids: list[int]
    kl: list[float]
    agree: list[bool]
    visual_per_layer: list[int]
    text_tokens: int
    actions: list[ActionTaken] = field(default_factory=list)
    frozen: list[bool] = field(default_factory=list)

    @property
    def tokens_per_layer(self) -> list[int]:
        """Tokens of the prompt in each layer, text and visual."""
        return [self.text_tokens + visual for visual in self.visual_per_layer]

    def prefill_cost(self, shape: TextShape, convention: Convention = DEFAULT_CONVENTION) -> int:
        """Operations of the prompt's prefill."""
        still = zip(self.visual_per_layer, self.frozen, strict=True)
        frozen = [visual * stays for visual, stays in still] if self.frozen else None
        return prefill_cost(shape, self.tokens_per_layer, convention, frozen)


def flops_ratio(
    shape: TextShape,
    pruned: Sequence[Answer],
    full: Sequence[Answer],
    convention: Convention = DEFAULT_CONVENTION,
) -> float:
    """Cost of all prompts' prefill over the full model's."""

    def total(answers: Sequence[Answer]) -> int:
        return sum(answer.prefill_cost(shape, convention) for answer in answers)

    return total(pruned) / total(full)


def kv_ratio(shape: TextShape, pruned: Sequence[Answer], full: Sequence[Answer]) -> float:
    """What the KV cache holds for all prompts, over the full model's."""

    def total(answers: Sequence[Answer]) -> int:
        return sum(kv_bytes(shape, answer.tokens_per_layer, 1) for answer in answers)

    return total(pruned) / total(full)


def spent(shape: TextShape, answer: Answer, full: Answer, bytes_per_value: int) -> Spent:
    """One line of a trace: tokens, actions, and the FLOPs and KV bytes of the prompt's prefill."""
    return {
        "visual_tokens": full.visual_per_layer[0],
        "text_tokens": answer.text_tokens,
        "actions": answer.actions,
        "visual_per_layer": answer.visual_per_layer,
        "convention": DEFAULT_CONVENTION,
        "flops": answer.prefill_cost(shape),
        "full_flops": full.prefill_cost(shape),
        "kv_bytes": kv_bytes(shape, answer.tokens_per_layer, bytes_per_value),
        "full_kv_bytes": kv_bytes(shape, full.tokens_per_layer, bytes_per_value),
    }


@dataclass(frozen=True)
class Full:
    """The full model's greedy answers to a batch, which other variants are compared with.

    Attributes:
        answers: one per row.
        tokens: what was generated, [B, R]; behind the end of an answer padding.
        logits: raw, of each generated token, [B, R, V].
        names: what the rows' samples are called in messages.
    """

    answers: list[Answer]
    tokens: Tensor
    logits: Tensor
    names: Sequence[str] = ()


def reference_answers(
    loaded: LoadedModel, samples: Sequence[Sample], max_new_tokens: int
) -> list[Tensor | None]:
    """Each sample's first reference as tokens, cut to so many where its task says nothing; None where it has none.

    Raises:
        UnusableSampleError: the chat template makes another text of it.
    """
    if max_new_tokens > 1 and (without := sum(not sample.references for sample in samples)):
        console.warn(f"{without} samples have no reference answer; only their first position is compared")
    forced = [_reference(loaded, sample) for sample in samples]
    return [
        None if ids is None else ids[: answer_tokens([sample], max_new_tokens)]
        for sample, ids in zip(samples, forced, strict=True)
    ]


def _reference(loaded: LoadedModel, sample: Sample) -> Tensor | None:
    if not sample.references:
        return None
    try:
        return answer_ids(loaded, sample.references[0])
    except UnusableSampleError as error:
        raise UnusableSampleError(f"sample {sample.id!r}: {error.message}", error.hint) from None


def forced_answer(loaded: LoadedModel, encoded: Encoded, ids: Tensor | None) -> Answer:
    """What the full model counts as having said to a sample that is forced along ``ids``, or along nothing."""
    visual, compared = int(encoded.visual.sum()), encoded.rows.shape[1]
    said = [] if ids is None else ids.tolist()
    layers = [visual] * len(loaded.layers)
    return _answer(loaded, said, [0.0] * compared, [True] * compared, layers, encoded.prompt_length - visual)


@torch.no_grad()
def full_answers(
    loaded: LoadedModel, batch: dict[str, Tensor], max_new_tokens: int, names: Sequence[str] = ()
) -> Full:
    """What the model says as it is; ``batch`` is padded on the left, ``names`` are its samples'."""
    depth = len(loaded.layers)
    texts = [int(x) for x in _text_counts(loaded, batch)]
    visual = [int(m) - t for m, t in zip(batch["attention_mask"].sum(1), texts, strict=True)]
    tokens, logits = greedy(loaded, batch, max_new_tokens, names)
    answers = []
    for row, v, t in zip(tokens.tolist(), visual, texts, strict=True):
        ids = answer_of(loaded, row)
        answers.append(_answer(loaded, ids, [0.0] * len(ids), [True] * len(ids), [v] * depth, t))
    return Full(answers, tokens, logits, names)


@torch.no_grad()
def schedule_answers(
    loaded: LoadedModel,
    name: str,
    schedule: Schedule,
    batch: dict[str, Tensor],
    full: Full,
    max_new_tokens: int,
    *,
    free: bool = True,
    along: Sequence[Answer] | None = None,
) -> list[Answer]:
    """What the model says under a schedule, by row, compared with ``full``.

    Args:
        name: of the schedule, for messages.
        batch: the prompts that ``full`` answers, with a guide's scores where the schedule has one.
        free: let the schedule answer too; else it is only forced along the full model's answer.
        along: what it is known to say along that; None forces it.

    Raises:
        UsageError: a schedule that cannot be executed on this model.
    """
    said = None
    try:
        inputs, given = split(batch)
        with pruned(loaded.model, schedule) as handle:
            handle.given = given
            if free:
                said = greedy(loaded, inputs, max_new_tokens, full.names)[0].tolist()
            if along is None:
                length = full.tokens.shape[1]
                _, forced = greedy(loaded, inputs, length, full.names, full.tokens.to(loaded.device))
                along = compared(loaded, full, forced)
            trace = handle.trace
    except PruningError as error:
        raise UsageError(f"schedule {name}: {error}") from None
    found = []
    for b, answer in enumerate(along):
        layers = answer.visual_per_layer if trace is None else trace.samples[b].visual_per_layer
        ids = [] if said is None else answer_of(loaded, said[b])
        one = replace(
            answer,
            text=_text(loaded, ids),
            ids=ids,
            visual_per_layer=[int(n) for n in layers],
            actions=_actions(schedule, trace, b),
            frozen=schedule.frozen_layers(len(layers)),
        )
        found.append(one)
    return found


def followed_answers(found: Followed, schedules: Sequence[Schedule]) -> list[Answer]:
    """What schedules do to one sample, from one pass over the layers."""
    answers = []
    for number, (schedule, trace) in enumerate(zip(schedules, found.traces, strict=True)):
        actions = _actions(schedule, Trace([trace]), 0)
        kl, agree = exact(found.kl[number].tolist()), found.agree[number].tolist()
        frozen = schedule.frozen_layers(len(trace.layers))
        answers.append(Answer("", [], kl, agree, trace.visual_per_layer, trace.text, actions, frozen))
    return answers


def compared(
    loaded: LoadedModel, full: Full, forced: Tensor, said: list[list[int]] | None = None
) -> list[Answer]:
    """Answers of a variant, by row, with all visual tokens in all layers: whoever removed some puts the counts in.

    Args:
        loaded: whose tokenizer and end tokens to use.
        full: what the full model says.
        forced: the variant's raw logits when it is led along ``full.tokens``, [B, R, V].
        said: the tokens that it generates freely, a row each.
    """
    found = []
    for b, whole in enumerate(full.answers):
        length = len(whole.ids)
        name = sample_name(full.names, b)
        kl, agree = distance(forced[b, :length], log_probabilities(full.logits[b, :length], name), name)
        ids = [] if said is None else answer_of(loaded, said[b])
        found.append(
            _answer(loaded, ids, kl.tolist(), agree.tolist(), whole.visual_per_layer, whole.text_tokens)
        )
    return found


def _actions(schedule: Schedule, trace: Trace | None, row: int) -> list[ActionTaken]:
    """``Answer.actions`` of one row of the batch; without a trace no action ever starts."""
    if trace is not None:
        happened = trace.samples[row].actions
    else:
        taking = (one for one in schedule.actions if isinstance(one, Withdraw | Keep))
        leaving = [one for one in taking if isinstance(one, Withdraw) or one.every is None]
        happened = [ActionTrace(action.action, None) for action in leaving]
    found: list[ActionTaken] = []
    for one in happened:
        found.append({"action": one.action, "layer": one.layer})
        if one.action == "keep":
            found[-1]["kept"] = one.kept
    return found


def _text(loaded: LoadedModel, ids: list[int]) -> str:
    return str(loaded.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _text_counts(loaded: LoadedModel, batch: dict[str, Tensor]) -> Tensor:
    visual = torch.isin(
        batch["input_ids"], torch.tensor(loaded.placeholder_ids, device=batch["input_ids"].device)
    )
    return (batch["attention_mask"].bool() & ~visual).sum(1)


def _answer(
    loaded: LoadedModel,
    ids: list[int],
    kl: list[float],
    agree: list[bool],
    layers: list[int],
    text: int,
) -> Answer:
    return Answer(_text(loaded, ids), ids, exact(kl), agree, layers, text)
