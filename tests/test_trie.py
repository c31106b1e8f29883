"""Many schedules in one pass, against the runtime led along the same answer."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.reference import text_layers
from tests.test_runtime_schedules import SCHEDULES, any_actions
from vtwcli.errors import UsageError
from vtwcli.models.families import family_of
from vtwcli.runtime import PruningError, pruned
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep import schedules as engine
from vtwcli.sweep import trie
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.schedules import Followed, follow, plan_of, why_not
from vtwcli.sweep.sweep import SweepItem

LAYOUTS = ["t3 i t5", "i t1", "t1 i t1", "i i t3", "t2 i t3 i t4", "i t1 i t2 i t2", "t8"]


@cache
def model_of(name: str = "llava", dtype: torch.dtype = torch.float64, attn: str = "sdpa"):
    family = tiny.TINY.get(name) or tiny.VARIANTS[name]
    return family.build(dtype=dtype, attn=attn)


def item_of(batch: dict, answer: torch.Tensor) -> SweepItem:
    """A prompt with all but the last of its answer's tokens [1, R] behind it."""
    length, tail = batch["input_ids"].shape[1], answer[:, :-1]
    fill = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}
    longer = {
        name: torch.cat([x, fill.get(name, torch.zeros_like(tail)).to(x.dtype)], 1)
        for name, x in batch.items()
        if x.ndim == 2 and x.shape == batch["input_ids"].shape
    }
    return SweepItem({**batch, **longer}, torch.arange(length - 1, length - 1 + answer.shape[1])[None])


@torch.no_grad()
def led(model, batch: dict, answer: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] of a model whose generation is led along ``answer`` [1, R]."""
    length = batch["input_ids"].shape[1]

    def force(ids, scores):
        wanted = answer[:, ids.shape[1] - length, None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)

    seen: list[torch.Tensor] = []  # generate itself gives them in float32
    handle = model.register_forward_hook(lambda module, args, out: seen.append(out.logits[0, -1]))
    with handle:
        model.generate(**batch, max_new_tokens=answer.shape[1], do_sample=False, logits_processor=[force])
    return torch.stack(seen)


def check(model, batch: dict, actions: list[list[dict]], count: int = 3) -> Followed:
    """One pass against a led generation for each schedule: KL, agreement, trace."""
    answer = torch.randint(3, 90, (1, count), generator=torch.Generator().manual_seed(5))
    family = family_of(model.config)
    source = Resident(model, family)
    tried = [Schedule(actions=tuple(one)) for one in actions]
    plans = [plan_of(one, source.depth, family) for one in tried]
    [found] = follow(source, [item_of(batch, answer)], plans)
    full = led(model, batch, answer).double().log_softmax(-1)
    wide = model.dtype == torch.float64
    for m, schedule in enumerate(tried):
        with pruned(model, schedule) as handle:
            log = led(model, batch, answer).double().log_softmax(-1)
            trace = handle.trace
        kl = (log.exp() * (log - full)).sum(-1)
        bounds = {"rtol": 0, "atol": 1e-9} if wide else {"rtol": 1e-4, "atol": 2e-6}
        torch.testing.assert_close(found.kl[m], kl, **bounds, msg=lambda text, m=m: f"{actions[m]}: {text}")
        if wide:
            assert torch.equal(found.agree[m], log.argmax(-1) == full.argmax(-1))
        if trace is not None:
            assert found.traces[m].visual_per_layer == trace.samples[0].visual_per_layer
            assert found.traces[m].actions == trace.samples[0].actions
            assert found.traces[m].text == trace.samples[0].text
    return found


KNOWN = [one for one in SCHEDULES.values() if Schedule(actions=tuple(one)).format_version == 1]
ALL = [*KNOWN, *([{"at": k, "action": "withdraw"}] for k in range(tiny.LAYERS + 1))]


def test_newer_words_are_left_to_the_runtime():
    model, newer = model_of(), [one for one in SCHEDULES.values() if one not in KNOWN]
    assert len(newer) > 5
    for one in newer:
        plan = plan_of(Schedule(actions=tuple(one)), tiny.LAYERS, family_of(model.config))
        reason = why_not(plan, text_layers(model))
        assert reason is not None and reason[0] == "what it says runs on the whole model only"


@pytest.mark.parametrize("row", LAYOUTS)
def test_every_schedule_equals_the_led_runtime(row):
    found = check(model_of(), tiny.llava_batch([row], dtype=torch.float64), ALL)
    assert bool((found.kl.abs().amax(1) > 1e-4).sum() > 20) == ("i" in row)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_float32_is_within_a_ten_thousandth(attn):
    check(model_of(dtype=torch.float32, attn=attn), tiny.llava_batch(["t3 i t5"]), ALL)


@pytest.mark.parametrize(
    "name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3-window", "aya_vision-window"]
)
def test_families_with_masks_and_additions_of_their_own(name):
    """Grouped queries, merged rotary axes, features added behind layers, sliding windows, two-way attention."""
    family = tiny.TINY.get(name) or tiny.VARIANTS[name]
    model, actions = model_of(name), []
    for one in ALL:
        try:
            plan = plan_of(Schedule(actions=tuple(one)), tiny.LAYERS, family_of(model.config))
        except UsageError:
            continue  # before all features have come
        if why_not(plan, text_layers(model)) is None:
            actions.append(one)
    assert (len(actions) < len(ALL)) == (name not in ("llava_onevision", "qwen2_5_vl"))
    assert len(actions) > 10
    for row in ("t3 i t5", "t2 i t4 i t2"):
        check(model, family.batch([row], dtype=torch.float64), actions)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    actions=st.lists(any_actions(), min_size=1, max_size=5),
    row=st.sampled_from(["t3 i t5", "i t2", "t2 i t1 i t2", "t1 i i t3"]),
    count=st.integers(1, 3),
)
def test_any_schedules_on_any_layout(actions, row, count):
    check(model_of(), tiny.llava_batch([row], dtype=torch.float64), actions, count)


@pytest.mark.parametrize("rows", [1, 30, 10_000])
def test_chunks_change_nothing(rows, monkeypatch):
    monkeypatch.setattr(trie, "_CHUNK_ROWS", {0: rows})
    monkeypatch.setattr(trie, "_CHUNK_STATES", min(rows, 3))
    monkeypatch.setattr(trie, "_CHUNK_VALUES", 100 * rows)
    monkeypatch.setattr(engine, "CHUNK_LOGITS", rows)
    check(model_of(), tiny.llava_batch(["t2 i t3 i t4"], dtype=torch.float64), ALL)


def test_schedules_that_did_the_same_are_one_state(monkeypatch):
    """Thresholds that choose the same tokens walk once."""
    most, step = [], trie.Trie.step

    def counted(self, d, layer):
        step(self, d, layer)
        most.append(len(set(map(id, self.states))))

    monkeypatch.setattr(trie.Trie, "step", counted)
    keep = [
        [{"at": 2, "action": "keep", "select": {"score": "attention", "above": x}}] for x in (1.0, 1.1, 1.2)
    ]
    withdraw = [[{"at": 2, "action": "withdraw"}], [{"at": 3, "action": "withdraw"}]]
    check(model_of(), tiny.llava_batch(["t3 i t5"], dtype=torch.float64), keep + withdraw)
    assert most == [1, 1, 2, 2, 2, 2]


def test_refuses_what_the_runtime_refuses():
    family = family_of(model_of().config)
    with pytest.raises(UsageError, match="at is 9, but the model has 6 layers"):
        plan_of(Schedule.withdraw_at(9), tiny.LAYERS, family)
    measured = [{"at": 0, "action": "keep", "select": {"score": "attention", "count": 1}}]
    with pytest.raises(PruningError, match="comes from the layer before"):
        plan_of(Schedule.from_dict(measured), tiny.LAYERS, family)
