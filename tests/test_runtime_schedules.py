"""Every action of the schedule, against its slow interpreter: logits, tokens, decisions, traces."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests import parity, reference, slow_schedule
from tests.test_runtime import batch_of, gradients, joined, labelled, positions
from tests.tiny import COMPRESSED, IMAGE_ID, LAYERS, LONG, TINY, VARIANTS, llava, llava_batch
from vtwcli.errors import VtwError
from vtwcli.models.families import FAMILIES
from vtwcli.runtime import PrunedLayer, PruningError, entries, pruned
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.sweep import SweepItem, sweep

LAYOUTS = [
    ["t3 i t5"],
    ["t3 i t5", "t2 i t3 i t2", "t4"],
    ["i t4", "t2 i t2 i"],
]

MUTE = {"action": "mute"}
# VisiPruner's two forms of layer 0, and its rule with a shallow boundary of 2 and thresholds that fit a random model
SEVEN_B = [
    {"at": 0, "until": 1, **MUTE, "sink": "first"},
    {"at": 0, "until": 1, **MUTE, "sink": "zero", "readers": "visual"},
]
THIRTEEN_B = [
    {"at": 0, "until": 1, **MUTE, "sink": "zero", "readers": "visual"},
    {"at": 0, "until": 1, **MUTE, "sink": "zero", "columns": "first_half"},
]
FILTER = {"at": "auto", "action": "keep", "select": {"score": "contribution", "above": 0.5}}
LEAVE = {"at": "auto", "action": "withdraw"}
UNIFORM = {"score": "uniform", "ratio": 0.5}
RATED = {"score": "attention", "rows": "raters"}
CLUSTER = {"merge": "cluster"}
OWN = {"score": "attention", "layer": "here"}

SCHEDULES: dict[str, list[dict]] = {
    "withdraw": [{"at": 3, "action": "withdraw"}],
    "mute": [{"at": 1, "until": 4, **MUTE}],
    "mute visual readers": [{"at": 0, "until": 3, **MUTE, "readers": "visual"}],
    "mute all readers, half": [{"at": 2, "until": 5, **MUTE, "readers": "all", "columns": "first_half"}],
    "mute to the first": [{"at": 0, "until": 3, **MUTE, "sink": "first"}],
    "mute to zero": [{"at": 2, "until": 6, **MUTE, "sink": "zero"}],
    "mute the prefill": [{"at": 1, "until": 4, **MUTE, "during": "prefill"}],
    "mute the prefill to zero": [
        {"at": 0, "until": 1, **MUTE, "sink": "first", "during": "prefill"},
        {"at": 0, "until": 1, **MUTE, "sink": "zero", "readers": "visual", "during": "prefill"},
        {"at": 1, "until": 3, **MUTE, "sink": "zero", "during": "prefill"},
    ],
    "mute all to zero": [{"at": 1, "until": 3, **MUTE, "readers": "all", "sink": "zero"}],
    "mute half to the first": [
        {"at": 1, "until": 3, **MUTE, "readers": "all", "columns": "first_half", "sink": "first"}
    ],
    "mute half, and to the first": [
        {"at": 1, "until": 3, **MUTE, "columns": "first_half"},
        {"at": 1, "until": 3, **MUTE, "sink": "first"},
    ],
    "mute half, the rest to the first": [
        {"at": 0, "until": 2, **MUTE, "columns": "first_half"},
        {"at": 1, "until": 3, **MUTE, "sink": "first"},
    ],
    "mute twice to the first": [
        {"at": 0, "until": 3, **MUTE, "sink": "first"},
        {"at": 1, "until": 4, **MUTE, "sink": "first", "columns": "first_half", "readers": "all"},
    ],
    "mute to the first, half of it to zero": [
        {"at": 1, "until": 4, **MUTE, "sink": "first"},
        {"at": 1, "until": 4, **MUTE, "sink": "zero", "columns": "first_half"},
    ],
    "7b": SEVEN_B,
    "13b": THIRTEEN_B,
    "mute, then withdraw": [{"at": 0, "until": 3, **MUTE}, {"at": 3, "action": "withdraw"}],
    "freeze": [{"at": 1, "until": 4, "action": "freeze"}],
    "keep by contribution": [
        {"at": 2, "action": "keep", "select": {"score": "contribution", "ratio": 0.3}},
        {"at": 4, "action": "withdraw"},
    ],
    "keep by attention twice": [
        {"at": 1, "action": "keep", "select": {"score": "attention", "count": 4}},
        {"at": 3, "action": "keep", "select": {"score": "attention", "ratio": 0.5}},
    ],
    "keep above": [{"at": 2, "action": "keep", "select": {"score": "contribution", "above": 1.0}}],
    "keep none": [{"at": 2, "action": "keep", "select": {"score": "attention", "above": 1.0}}],
    "keep at random": [{"at": 0, "action": "keep", "select": {"score": "random", "ratio": 0.4, "seed": 3}}],
    "keep evenly": [
        {"at": 0, "action": "keep", "select": {"score": "uniform", "count": 5}},
        {"at": 2, "action": "keep", "select": {"score": "random", "count": 2}},
    ],
    "keep every token": [{"at": 2, "action": "keep", "select": {"score": "uniform", "ratio": 1.0}}],
    "keep and mute": [
        {"at": 1, "action": "keep", "select": {"score": "uniform", "ratio": 0.5}},
        {"at": 2, "until": 5, **MUTE, "sink": "zero"},
        {"at": 5, "action": "withdraw"},
    ],
    "everything": [
        {"at": 0, "until": 2, **MUTE},
        {"at": 1, "until": 3, "action": "freeze"},
        {"at": 3, "action": "keep", "select": {"score": "attention", "ratio": 0.5}},
        {"at": 4, "until": 6, **MUTE, "sink": "first"},
    ],
    "keep by its own layer": [
        {"at": 0, "action": "keep", "select": {"score": "attention", "share": 0.7, "layer": "here"}},
        {"at": 3, "action": "keep", "select": {"score": "contribution", "share": 0.3, "layer": "here"}},
    ],
    "close up": [{"at": 2, "action": "keep", "positions": "compact", "select": UNIFORM}],
    "close up by stages": [
        {"at": 1, "action": "keep", "positions": "compact", "select": {**OWN, "share": 0.6}},
        {"at": 3, "action": "keep", "select": {"score": "attention", "ratio": 0.6}},
        {"at": 4, "action": "keep", "positions": "compact", "select": {**OWN, "count": 2}},
        {"at": 5, "action": "withdraw"},
    ],
    "keep by text, then by vision": [
        {"at": 1, "action": "keep", "select": {"score": "attention", "rows": "text", "share": 0.6}},
        {"at": 3, "action": "keep", "select": {"score": "attention", "rows": "visual", "share": 0.3}},
    ],
    "keep by all, then by its own layer's text": [
        {"at": 0, "until": 1, **MUTE, "readers": "visual"},
        {"at": 2, "action": "keep", "select": {"score": "attention", "rows": "all", "count": 5}},
        {"at": 3, "action": "keep", "positions": "compact", "select": {**OWN, "rows": "text", "count": 2}},
    ],
    "keep what changes, then what differs": [
        {"at": 2, "action": "keep", "positions": "compact", "select": {"score": "change", "share": 0.7}},
        {"at": 3, "action": "keep", "select": {"score": "duplication", "count": 5}},
        {"at": 4, "action": "keep", "select": {"score": "change", "above": 1.0}},
    ],
    "freeze, keep what differs": [
        {"at": 1, "until": 3, "action": "freeze"},
        {"at": 3, "action": "keep", "select": {"score": "duplication", "ratio": 0.6}},
        {"at": 3, "until": 5, "action": "freeze"},
        {"at": 5, "action": "keep", "select": {"score": "change", "ratio": 0.5}},
    ],
    "merge by raters": [
        {"at": 2, "action": "keep", "select": {**RATED, "count": 4}, "rest": CLUSTER, "positions": "compact"},
        {"at": 4, "action": "keep", "select": {**RATED, "count": 3}, "rest": CLUSTER, "positions": "compact"},
    ],
    "merge what changes little": [
        {
            "at": 1,
            "action": "keep",
            "select": {"score": "change", "ratio": 0.7},
            "rest": {**CLUSTER, "share": 1.0, "into": 0.5, "seed": 3},
            "positions": "compact",
        },
        {"at": 3, "action": "keep", "select": {"score": "duplication", "count": 4}},
        {"at": 4, "until": 6, "action": "freeze"},
    ],
    "keep by some heads, levelled": [
        {"at": 1, "action": "keep", "select": {"score": "attention", "heads": 2, "ratio": 0.7}},
        {"at": 3, "action": "keep", "select": {**RATED, "heads": 1, "level": True, "ratio": 0.7}},
        {"at": 4, "action": "keep", "select": {**OWN, "rows": "visual", "level": True, "ratio": 0.7}},
    ],
    "freeze and close up": [
        {"at": 0, "until": 4, "action": "freeze"},
        {"at": 2, "action": "keep", "positions": "compact", "select": {**OWN, "count": 4}},
        {"at": 4, "until": 6, **MUTE},
    ],
    "auto, close up": [{**FILTER, "after": 0, "when": {"cosine_below": 0.8}, "positions": "compact"}],
    "auto withdraw": [{**LEAVE, "after": 0, "when": {"cosine_above": 0.9}}],
    "auto, fixed end": [
        {**FILTER, "after": 0, "when": {"cosine_below": 0.8}},
        {"at": 4, "action": "withdraw"},
    ],
    "auto, one by one": [  # one sample waits for the first while the other must not yet look at the second
        {**FILTER, "after": 0, "when": {"cosine_below": 0.8}},
        {**LEAVE, "after": 3, "when": {"cosine_above": -1.0}},
    ],
    "auto, total": [
        {**FILTER, "when": {"cosine_below": 0.9}},
        {**LEAVE, "when": {"cosine_above": 0.6, "layers": 2}},
    ],
    "auto, consecutive": [{**LEAVE, "when": {"cosine_above": 0.9, "layers": 2, "consecutive": True}}],
    "auto, not consecutive": [{**LEAVE, "when": {"cosine_above": 0.9, "layers": 2}}],
    "visipruner": [
        *SEVEN_B,
        {"at": 1, "until": 2, **MUTE, "sink": "zero"},
        {**FILTER, "after": 1, "when": {"cosine_below": 0.995}},
        {**LEAVE, "when": {"cosine_above": 0.5, "layers": 2}},
    ],
}


def schedule(actions: list[dict]) -> Schedule:
    return Schedule.from_dict(actions)


def layouts(actions: list[dict]) -> list[list[str]]:
    """What a schedule can do: merged rows have no place behind an image that ends the prompt."""
    merges = any("rest" in action for action in actions)
    return [rows for rows in LAYOUTS if not (merges and any(row.endswith("i") for row in rows))]


@cache
def model_of(dtype: torch.dtype = torch.float64, attn: str = "sdpa"):
    return llava(dtype=dtype, attn=attn)


def check_trace(trace, decided: slow_schedule.Decisions, visual: torch.Tensor, real: torch.Tensor) -> None:
    for b, sample in enumerate(trace.samples):
        assert [action.layer for action in sample.actions] == [starts[b] for starts in decided.starts]
        for action, kept in zip(sample.actions, decided.kept, strict=True):
            assert action.kept == (kept[b] if action.action == "keep" else None)
        assert [layer.layer for layer in sample.layers] == list(range(len(decided.present)))
        assert sample.visual_per_layer == [int((p[b] & visual[b]).sum()) for p in decided.present]
        assert sample.visual == int(visual[b].sum())
        assert sample.text == int((real & ~visual)[b].sum())


def check_forward(model, batch: dict, actions: list[dict], atol: float = 1e-9) -> slow_schedule.Decisions:
    visual, real = reference.visual_mask(model, batch["input_ids"]), batch["attention_mask"].bool()
    expected, decided = slow_schedule.logits(model, batch, actions)
    read = real & (~visual | parity.last_of(real))
    for use_cache in (True, False):
        with torch.no_grad(), pruned(model, schedule(actions)) as running:
            actual = model(**batch, use_cache=use_cache).logits
        torch.testing.assert_close(actual[read], expected[read], rtol=0, atol=atol)
        if actions:
            check_trace(running.trace, decided, visual, real)
    return decided


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_equals_the_slow_interpreter(name, side):
    for rows in layouts(SCHEDULES[name]):
        check_forward(model_of(), batch_of(rows, side), SCHEDULES[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_generation_equals_the_slow_interpreter(name):
    for rows in layouts(SCHEDULES[name]):
        batch, actions = batch_of(rows), SCHEDULES[name]
        tokens, scores, _ = slow_schedule.greedy(model_of(), batch, actions, 4)
        out, logits = parity.generated(model_of(), batch, schedule(actions))
        assert torch.equal(out.sequences[:, -4:], tokens)
        torch.testing.assert_close(logits, scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["visipruner", "everything", "keep by contribution", "13b", "mute"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_in_float32(name, attn):
    model, batch, actions = model_of(torch.float32, attn), llava_batch(LAYOUTS[1]), SCHEDULES[name]
    check_forward(model, batch, actions, atol=1e-4)
    tokens, scores, _ = slow_schedule.greedy(model, batch, actions, 4)
    out, logits = parity.generated(model, batch, schedule(actions))
    assert torch.equal(out.sequences[:, -4:], tokens)
    torch.testing.assert_close(logits, scores, rtol=0, atol=1e-4)


def test_the_schedules_decide_differently_for_different_samples():
    """Else the per-sample decisions above would be tested on one case only."""
    starts = {
        name: check_forward(model_of(), batch_of(LAYOUTS[1]), actions).starts
        for name, actions in SCHEDULES.items()
        if "auto" in name or name == "visipruner"
    }
    assert starts == {
        "auto, close up": [[None, 2, None]],
        "auto withdraw": [[5, 4, None]],
        "auto, fixed end": [[None, 2, None], [4, 4, 4]],
        "auto, one by one": [[None, 2, None], [None, 5, None]],
        "auto, total": [[2, 1, None], [4, 3, None]],
        "auto, consecutive": [[None, 5, None]],
        "auto, not consecutive": [[5, 5, None]],
        "visipruner": [[4, 3, None], [None, 5, None]],
    }


def test_merged_rows_need_text_behind_them():
    with (
        pruned(model_of(), schedule(SCHEDULES["merge by raters"])),
        pytest.raises(PruningError, match="this prompt ends with an image"),
    ):
        model_of()(**batch_of(["t3 i"]))


amounts = st.one_of(
    st.fixed_dictionaries({"ratio": st.sampled_from([0.0, 0.2, 0.5, 1.0])}),
    st.fixed_dictionaries({"count": st.integers(0, 12)}),
)


@st.composite
def any_actions(draw) -> list[dict]:
    """Schedules with mutes first, then keeps and perhaps a withdrawal, fixed or not."""
    mutes = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "at": st.integers(0, 1),
                    "until": st.just(2),
                    "action": st.just("mute"),
                    "sink": st.sampled_from(["renormalise", "first", "zero"]),
                    "readers": st.sampled_from(["text", "visual", "all"]),
                    "columns": st.sampled_from(["all", "first_half"]),
                }
            ),
            max_size=2,
        )
    )
    mutes.sort(key=lambda action: action["at"])
    leaving, start = [], 2
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(start, LAYERS - 1))
        score = draw(st.sampled_from(["contribution", "attention", "random", "uniform"]))
        select = {"score": score, **draw(amounts)}
        if mutes and start == 2 and score in ("contribution", "attention"):
            start = 3  # the layer before must not be muted
        leaving.append({"at": start, "action": "keep", "select": select})
    if draw(st.booleans()):
        when = draw(
            st.sampled_from(
                [{"cosine_below": 0.7}, {"cosine_above": 0.5}, {"cosine_above": 0.4, "layers": 2}]
            )
        )
        leaving.append({"at": "auto", "after": max(start, 2), "action": "withdraw", "when": when})
    return mutes + leaving


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    actions=any_actions(),
    rows=st.lists(
        st.sampled_from(["t3 i t5", "i t2", "t6", "t2 i t1 i t2", "t1 i i t3", "t2 i"]),
        min_size=1,
        max_size=3,
    ),
    side=st.sampled_from(["left", "right"]),
)
def test_any_schedule_on_any_layout(actions, rows, side):
    check_forward(model_of(), batch_of(rows, side), actions)


# ------------------------------------------------------------------------------------------------ the cache


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["mute", "mute to zero", "mute, then withdraw", "keep at random", "everything"]
)
def test_a_second_image_on_the_same_cache(name):
    """What the first turn set aside, its own visual tokens above all, is there for the rows that read it."""
    model, actions = model_of(), SCHEDULES[name]
    if name == "everything":  # scores would come from the last row of each turn, not of the whole
        actions = [a for a in actions if a["action"] != "keep"]
    first, second = batch_of(["t3 i t5"]), batch_of(["t2 i t4"], seed=1)
    whole, width = joined(first, second), second["input_ids"].shape[1]
    expected, decided = slow_schedule.logits(model, whole, actions, **positions(whole, 0))
    if name == "keep at random":  # each turn draws for its own tokens
        turns = [slow_schedule.logits(model, turn, actions)[1].present for turn in (first, second)]
        decided.present = [torch.cat(pair, 1) for pair in zip(*turns, strict=True)]
        expected, _ = slow_schedule.logits(model, whole, actions, decided=decided, **positions(whole, 0))
    cache = DynamicCache(config=model.config.text_config)
    with pruned(model, schedule(actions)):
        model(**first, past_key_values=cache, **positions(first, 0))
        text = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 18, dtype=torch.long)}
        model(**text, past_key_values=cache, position_ids=torch.tensor([[17]]))
        cache.crop(-1)
        rest = second | {"attention_mask": whole["attention_mask"]}
        actual = model(**rest, past_key_values=cache, **positions(whole, width)).logits
    read = second["input_ids"] != IMAGE_ID
    torch.testing.assert_close(actual[read], expected[:, -width:][read], rtol=0, atol=1e-9)


@torch.no_grad()
def test_text_does_not_carry_muted_entries_along():
    """A decode step reads the text entries of muted layers only; the visual ones lie aside."""
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3 i t2"])
    with pruned(model, schedule([{"at": 1, "until": 4, **MUTE}])):
        out = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        held = out.past_key_values.layers
        assert [layer.keys.shape[2] for layer in held] == [27, 10, 10, 10, 27, 27]
        assert [layer.aside.keys.shape[2] for layer in held[1:4]] == [18, 18, 18]
        assert entries(out.past_key_values) == [27, 28, 28, 28, 27, 27]
        beams = model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)
        one_by_one = model.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=3, use_cache=False)
    assert torch.equal(beams, one_by_one)
    assert isinstance(held[1], PrunedLayer) and not isinstance(held[0], PrunedLayer)


@torch.no_grad()
def test_rows_keep_different_numbers_of_entries():
    model, batch = model_of(), batch_of(LAYOUTS[1])
    actions = SCHEDULES["keep above"]
    with pruned(model, schedule(actions)) as running:
        layers = model(**batch, use_cache=True).past_key_values.layers
    counts = [sample.visual_per_layer[3] + sample.text for sample in running.trace.samples]
    assert len(set(counts)) == 3
    columns = layers[3].columns.position
    assert columns.shape[1] == layers[3].keys.shape[2] == max(counts)
    assert (columns >= 0).sum(1).tolist() == counts
    for sample in running.trace.samples:
        assert [layer.rows for layer in sample.layers] == [25, 25, *[max(counts)] * 4]


# ------------------------------------------------------------------------------------------------ scores


def test_scores_do_not_run_eager_attention_on_a_layer(monkeypatch):
    """Only one row a sample goes through the path that returns weights."""
    from transformers.models.llama import modeling_llama

    rows = []
    original = modeling_llama.eager_attention_forward

    def count(module, query, *args, **kwargs):
        rows.append(query.shape[2])
        return original(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", count)
    check_forward(model_of(), batch_of(["t3 i t5", "t2 i t3 i t2"]), SCHEDULES["keep by contribution"])
    assert rows == [1, 1]  # one layer looked at, with a cache and without
    assert model_of().config.text_config._attn_implementation == "sdpa"


def test_random_choice_depends_on_the_seed_and_not_on_the_batch():
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3 i t2"])

    def kept(batch, seed):
        select = {"score": "random", "count": 4, "seed": seed}
        with (
            torch.no_grad(),
            pruned(model, schedule([{"at": 1, "action": "keep", "select": select}])) as running,
        ):
            model(**batch)
        return [sample.actions[0].kept for sample in running.trace.samples]

    assert kept(batch, 0) == kept(batch, 0) != kept(batch, 1)
    assert kept(batch_of(["t4 i t2"]), 0) == kept(batch, 0)[:1]


def test_assisted_decoding_is_refused_where_the_last_row_decides():
    model, batch = model_of(), batch_of(["t3 i t5"])
    assistant = llava(seed=1, layers=1, dtype=torch.float64)
    for name in ("keep by contribution", "auto withdraw"):
        with (
            pruned(model, schedule(SCHEDULES[name])),
            pytest.raises(PruningError, match="assisted decoding puts guessed tokens"),
        ):
            model.generate(**batch, max_new_tokens=4, assistant_model=assistant)
    with pruned(model, schedule(SCHEDULES["keep evenly"])):
        plain = model.generate(**batch, max_new_tokens=8, do_sample=False)
        guessed = model.generate(**batch, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, guessed)


def test_training_has_the_gradients_of_the_slow_interpreter():
    model, batch = llava(dtype=torch.float64).train(), labelled(batch_of(["t3 i t5", "t2 i t3 i t4"]))
    for actions in (
        [*SEVEN_B, {"at": 3, "action": "keep", "select": {"score": "attention", "ratio": 0.5}}],
        [{"at": 1, "until": 3, **MUTE}, {"at": 2, "until": 5, "action": "freeze"}],
    ):
        with slow_schedule.interpreted(model, batch, actions):
            loss, expected = gradients(model, batch)
        with pruned(model, schedule(actions)):
            pruned_loss, actual = gradients(model, batch)
        assert pruned_loss == pytest.approx(loss, abs=1e-9)
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9)
        assert actual["model.multi_modal_projector.linear_1.weight"].abs().max() > 1e-3
        model.gradient_checkpointing_enable()
        with pruned(model, schedule(actions)), pytest.raises(PruningError, match="gradient checkpointing"):
            model(**batch)
        model.gradient_checkpointing_disable()


# ------------------------------------------------------------------------------------------------ other families

FAMILY_SCHEDULES = ["visipruner", "keep by attention twice", "mute to the first"]
WORKING = [
    name
    for name in TINY | VARIANTS
    if name not in LONG | COMPRESSED and not (name in FAMILIES and FAMILIES[name].no_withdraw)
]


@pytest.mark.parametrize("name", WORKING)
def test_every_family_runs_every_action(name):
    tiny = (TINY | VARIANTS)[name]
    model = tiny.build(dtype=torch.float64)
    batch = tiny.batch(["t3 i t5", "t2 i t3 i t2"], dtype=torch.float64)
    for actions in (SCHEDULES[s] for s in FAMILY_SCHEDULES):
        later = [dict(a) for a in actions]
        for action in later:  # DeepStack families add vision in their first layers
            if action["action"] in ("keep", "withdraw") and action["at"] != "auto":
                action["at"] += 2
        check_forward(model, batch, later)


@pytest.mark.parametrize("name", sorted(COMPRESSED))
def test_what_compressed_keys_and_values_do_not_tell(name):
    tiny = TINY[name]
    model = tiny.build(dtype=torch.float64)
    batch = tiny.batch(["t3 i t5", "t2 i t3 i t2"], dtype=torch.float64)
    for score in ("attention", "contribution"):
        keep = {"at": 2, "action": "keep", "select": {"score": score, "ratio": 0.5}}
        with pruned(model, schedule([keep])), pytest.raises(PruningError, match="holds compressed keys"):
            model(**batch)
    for sink in ("first", "zero"):
        mute = {"at": 2, "until": LAYERS, "action": "mute", "sink": sink}
        with pruned(model, schedule([mute])), pytest.raises(PruningError, match="holds compressed keys"):
            model(**batch)
    for uniform in (
        [{"at": 1, "action": "freeze", "until": 3}, {"at": 4, "action": "withdraw"}],
        [{"at": 2, "action": "mute", "until": 4}],
    ):
        check_forward(model, batch, uniform)
    item = SweepItem(batch, torch.full((2, 1), batch["input_ids"].shape[1] - 1))
    with pytest.raises(VtwError, match="holds compressed keys"):
        sweep(
            Resident(model, FAMILIES[name]), [item], [Intervention("withdraw", 2)], probes=[LastRowProbe(10)]
        )
