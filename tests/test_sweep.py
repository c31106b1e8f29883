"""The sweep against the slow reference: one pass must give what a full run per intervention gives."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference, tiny
from vtwcli.errors import NotFoundError, UsageError, VtwError
from vtwcli.models.families import FAMILIES
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep import reach, walk
from vtwcli.sweep import sweep as sweep_module
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.sweep import SweepItem, sweep

LAYERS = 4

LAYOUTS = [
    ["t3 i t5"],
    ["i t1"],  # no prefix, the shortest suffix
    ["t1 i t1"],
    ["t9 i t7"],
    ["i i t3"],
    ["t2 i t3 i t4"],  # images interleaved with text
    ["i t1 i t2 i t2"],
    ["t3 i t5", "i t9 i t2"],  # padding
    ["t4 i t2", "t2 i t6", "t1 i t1"],
    ["t8", "t2 i t3"],  # one row without visual tokens
]

EVERY_LAYER = [Intervention("withdraw", k) for k in range(LAYERS + 1)]
MIXED = [
    *EVERY_LAYER,
    *(Intervention("mute", d, d + 1) for d in range(LAYERS)),
    Intervention("mute", 0, 3),  # they start together and part one by one
    Intervention("mute", 0, 2),
    Intervention("mute", 0, LAYERS),
    Intervention("mute", 0),
    Intervention("mute", 2),
    *(Intervention("freeze", d, d + 1) for d in range(LAYERS)),
    Intervention("freeze", 0, 3),
    Intervention("freeze", 1),
]


@functools.cache
def llava(dtype: torch.dtype = torch.float64, attn: str = "sdpa"):
    """The shared model; it has grouped-query attention."""
    return tiny.llava(layers=LAYERS, dtype=dtype, attn=attn)


def source(model) -> Resident:
    return Resident(model, FAMILIES[model.config.model_type])


def last_text(batch: dict, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last ``count`` text positions of each row and which of them exist, [B, count]; ends in text."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    rows = torch.zeros(len(ids), count, dtype=torch.long)
    valid = torch.zeros(len(ids), count, dtype=torch.bool)
    for b in range(len(ids)):
        end = int(mask[b].nonzero().max())
        tail = 0
        while end - tail >= 0 and mask[b, end - tail] and ids[b, end - tail] != tiny.IMAGE_ID:
            tail += 1
        for r in range(count):
            at = end - count + 1 + r
            valid[b, r] = end - at < tail
            rows[b, r] = at if valid[b, r] else end
    return rows, valid


def check(model, batch, interventions, count: int = 1, tolerance: float = 1e-9) -> torch.Tensor:
    """Compare the sweep with the reference; ``tolerance`` is absolute in float64, else relative. Returns the KL."""
    rows, valid = last_text(batch, count)
    results = sweep(source(model), [SweepItem(batch, rows, valid)], interventions)
    kl, agree = reference.searched(model, batch, interventions, rows)
    assert [(r.item, r.row) for r in results] == [(0, b) for b in range(len(rows))]
    for b, result in enumerate(results):
        want = kl[b][:, valid[b]]
        assert result.kl.dtype == torch.float64
        assert result.kl.shape == want.shape
        if model.dtype == torch.float64:
            torch.testing.assert_close(result.kl, want, rtol=0, atol=tolerance)
            assert torch.equal(result.agree, agree[b][:, valid[b]])
        else:
            torch.testing.assert_close(result.kl, want, rtol=tolerance, atol=1e-6)
    return kl


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", LAYOUTS, ids=" | ".join)
def test_every_intervention_equals_a_full_run_in_float64(rows, side):
    kl = check(llava(), tiny.llava_batch(rows, side=side, dtype=torch.float64), MIXED, count=2)
    sees = torch.tensor(["i" in row for row in rows])
    assert kl[sees, 0].min() > 1e-3  # the comparison is of numbers that are there
    assert kl[:, LAYERS].abs().max() == 0  # K = L prunes nothing


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [["t3 i t5"], ["t3 i t5", "i t9 i t2"]], ids=" | ".join)
def test_float32_is_within_a_ten_thousandth(rows, attn):
    model = llava(torch.float32, attn)
    check(model, tiny.llava_batch(rows), MIXED, count=2, tolerance=1e-4)


TEXT = st.integers(1, 6).map("t{}".format)
ROW = st.tuples(st.lists(st.one_of(TEXT, st.just("i")), max_size=5), TEXT).map(
    lambda parts: " ".join([*parts[0], parts[1]])
)


@st.composite
def an_intervention(draw) -> Intervention:
    kind = draw(st.sampled_from(["withdraw", "mute", "freeze"]))
    start = draw(st.integers(0, LAYERS - 1))
    stop = None if kind == "withdraw" else draw(st.none() | st.integers(start + 1, LAYERS))
    return Intervention(kind, start, stop)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(ROW, min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    interventions=st.lists(an_intervention(), min_size=1, max_size=6),
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_layout_equals_full_runs(rows, side, interventions, count, seed):
    batch = tiny.llava_batch(rows, seed=seed, side=side, dtype=torch.float64)
    check(llava(), batch, interventions, count)


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen3_vl", "gemma3-window", "paligemma", "aya_vision-window"]
)
def test_families_with_masks_and_additions_of_their_own(name):
    """Merged rotary axes, features added behind layers, sliding windows, two-way attention in the prompt."""
    family = tiny.TINY.get(name) or tiny.VARIANTS[name]
    model = family.build(layers=LAYERS, dtype=torch.float64)
    batch = family.batch(["t3 i t5", "t2 i t4 i t2"], dtype=torch.float64)
    rows = torch.full((2, 2), batch["input_ids"].shape[1] - 1) - torch.tensor([1, 0])
    results = sweep(source(model), [SweepItem(batch, rows)], MIXED)
    kl, _ = reference.searched(model, batch, MIXED, rows)
    torch.testing.assert_close(torch.stack([r.kl for r in results]), kl, rtol=0, atol=1e-9)
    assert kl[:, 0].min() > 1e-4


def test_a_padded_batch_equals_its_rows_alone():
    rows = ["t3 i t5", "i t9 i t2", "t6"]
    batch = tiny.llava_batch(rows, side="right", dtype=torch.float64)
    last, _ = last_text(batch, 1)
    together = sweep(source(llava()), [SweepItem(batch, last)], MIXED)
    images = 0
    for b, row in enumerate(rows):
        real = batch["attention_mask"][b].bool()
        alone = {"input_ids": batch["input_ids"][b : b + 1, real]}
        count = row.split().count("i")
        if count:
            alone["pixel_values"] = batch["pixel_values"][images : images + count]
        images += count
        item = SweepItem(alone, torch.tensor([[int(real.sum()) - 1]]))
        (result,) = sweep(source(llava()), [item], MIXED)
        torch.testing.assert_close(result.kl, together[b].kl, rtol=0, atol=1e-12)
        assert (result.prefix, result.visual, result.suffix) == (
            together[b].prefix,
            together[b].visual,
            together[b].suffix,
        )


def test_counts_and_the_full_models_token():
    batch = tiny.llava_batch(["t3 i t5", "i t4 i t2", "t6"], dtype=torch.float64)
    rows = torch.full((3, 1), batch["input_ids"].shape[1] - 1)
    results = sweep(source(llava()), [SweepItem(batch, rows)], EVERY_LAYER)
    assert [(r.prefix, r.visual, r.suffix) for r in results] == [(3, 9, 5), (0, 18, 6), (6, 0, 0)]
    with torch.no_grad():
        logits = llava()(**batch).logits[:, -1]
    assert [r.top1.tolist() for r in results] == [[t] for t in logits.argmax(-1).tolist()]
    assert results[0].memory["rss"] > 1 << 20
    assert all(r.seconds > 0 for r in results)


def test_a_sample_without_visual_tokens_is_unchanged_by_anything():
    batch = tiny.llava_batch(["t6"], dtype=torch.float64)
    (result,) = sweep(source(llava()), [SweepItem(batch, torch.tensor([[4, 5]]))], MIXED)
    assert result.visual == 0
    assert torch.equal(result.kl, torch.zeros(len(MIXED), 2, dtype=torch.float64))
    assert bool(result.agree.all())


def test_rows_before_the_first_image_are_unchanged():
    batch = tiny.llava_batch(["t4 i t3"], dtype=torch.float64)
    (result,) = sweep(source(llava()), [SweepItem(batch, torch.tensor([[2, 15]]))], MIXED)
    assert result.kl[:, 0].abs().max() == 0
    assert result.kl[0, 1] > 1e-3


def test_no_intervention_and_no_item():
    batch = tiny.llava_batch(["t2 i t2"], dtype=torch.float64)
    (result,) = sweep(source(llava()), [SweepItem(batch, torch.tensor([[12]]))], [])
    assert result.kl.shape == (0, 1)
    assert sweep(source(llava()), [], EVERY_LAYER) == []


@pytest.mark.parametrize("rows_at_once", [1, 12, 10_000])
def test_chunks_change_nothing(rows_at_once, monkeypatch):
    batch = tiny.llava_batch(["t3 i t5", "i t9 i t2"], dtype=torch.float64)
    want = check(llava(), batch, MIXED, 2)
    monkeypatch.setattr(walk, "_CHUNK_ROWS", rows_at_once)
    monkeypatch.setattr(sweep_module, "CHUNK_LOGITS", rows_at_once)
    assert torch.equal(check(llava(), batch, MIXED, 2), want)


@pytest.mark.parametrize(("row", "length", "suffix"), [("t3 i t5", 17, 5), ("t2 i t3 i t4", 27, 7)])
def test_a_sweep_runs_no_row_twice(row, length, suffix):
    """Each layer gets the full stream once and the suffix of each begun stream once; the last layer one row each."""
    model = llava()
    batch = tiny.llava_batch([row], dtype=torch.float64)
    widths: list[list[int]] = [[] for _ in range(LAYERS)]
    mlps: list[list[int]] = [[] for _ in range(LAYERS)]
    handles = []
    for d, layer in enumerate(reference.text_layers(model)):
        handles.append(layer.self_attn.k_proj.register_forward_pre_hook(counter(widths[d])))
        handles.append(layer.mlp.register_forward_pre_hook(counter(mlps[d])))
    try:
        sweep(source(model), [SweepItem(batch, torch.tensor([[length - 1]]))], EVERY_LAYER)
    finally:
        for handle in handles:
            handle.remove()
    for d in range(LAYERS - 1):
        assert widths[d] == mlps[d] == [length, (d + 1) * suffix]
    assert mlps[-1] == [1, LAYERS]
    assert widths[-1] == [length, 1, LAYERS * suffix, LAYERS]


def counter(widths: list[int]):
    return lambda module, args: widths.append(args[0].shape[1])


def test_probes_see_what_the_stock_model_computes():
    model = llava(torch.float64, "eager")
    batch = tiny.llava_batch(["t3 i t5", "i t9 i t2"], side="right", dtype=torch.float64)
    rows, _ = last_text(batch, 1)
    views = []
    results = sweep(source(model), [SweepItem(batch, rows)], MIXED, probes=[views.append])
    plain = sweep(source(model), [SweepItem(batch, rows)], MIXED)
    torch.testing.assert_close(torch.stack([r.kl for r in results]), torch.stack([r.kl for r in plain]))
    with torch.no_grad():
        stock = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [view.index for view in views] == list(range(LAYERS))
    for d, view in enumerate(views):
        torch.testing.assert_close(view.hidden_in, stock.hidden_states[d])
        if d + 1 < LAYERS:  # behind the last layer the library gives the normed stream
            after = torch.stack([stock.hidden_states[d + 1][b, rows[b]] for b in range(2)])
            torch.testing.assert_close(view.out, after)
        weights = view.attention().double()
        for b in range(2):
            torch.testing.assert_close(
                weights[b, :, 0], stock.attentions[d][b, :, rows[b, 0]], rtol=0, atol=1e-6
            )


def test_probes_see_capped_scores():
    family = tiny.VARIANTS["paligemma2"]
    model = family.build(layers=2, dtype=torch.float32, attn="eager")
    batch = family.batch(["t2 i t3"], dtype=torch.float32)
    rows = torch.tensor([[batch["input_ids"].shape[1] - 1]])
    views = []
    sweep(source(model), [SweepItem(batch, rows)], [], probes=[views.append])
    with torch.no_grad():
        stock = model(**batch, output_attentions=True)
    assert model.config.text_config.attn_logit_softcapping == 50
    for d, view in enumerate(views):
        torch.testing.assert_close(
            view.attention()[:, :, 0], stock.attentions[d][:, :, -1], rtol=0, atol=1e-5
        )


def test_a_model_spread_over_devices_by_accelerate(tmp_path):
    """Hooks of accelerate fetch a layer's weights for each call; the walk leaves layers half-way."""
    from accelerate import dispatch_model

    batch = tiny.llava_batch(["t3 i t5", "i t9 i t2"], dtype=torch.float64)
    item = SweepItem(batch, torch.full((2, 1), batch["input_ids"].shape[1] - 1))
    model = tiny.llava(layers=LAYERS, dtype=torch.float64)
    measured = LastRowProbe(10.0)
    want = sweep(source(model), [item], MIXED, probes=[measured])
    places = dict.fromkeys(["model.vision_tower", "model.multi_modal_projector", "lm_head"], "cpu")
    text = "model.language_model"
    places |= {f"{text}.embed_tokens": "cpu", f"{text}.norm": "disk", f"{text}.rotary_emb": "cpu"}
    places |= {f"{text}.layers.{d}": "disk" if d % 2 else "cpu" for d in range(LAYERS)}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    hooked = count_forwards(model)
    assert hooked
    assert next(reference.text_layers(model)[1].parameters()).is_meta
    for _ in range(2):
        probe = LastRowProbe(10.0)
        for w, g in zip(want, sweep(source(model), [item], MIXED, probes=[probe]), strict=True):
            torch.testing.assert_close(g.kl, w.kl, rtol=0, atol=1e-12)
        for b in range(2):
            for mine, theirs in zip(probe.found[0, b], measured.found[0, b], strict=True):
                torch.testing.assert_close(mine.contribution, theirs.contribution, rtol=0, atol=1e-12)
    assert count_forwards(model) == hooked
    assert next(reference.text_layers(model)[1].parameters()).is_meta


def count_forwards(model: torch.nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def test_progress_and_results_come_as_they_are_made():
    class Ticks:
        count = 0

        def advance(self) -> None:
            self.count += 1

    ticks, seen = Ticks(), []
    items = [
        SweepItem(tiny.llava_batch([row], dtype=torch.float64), torch.tensor([[-1 + n]]))
        for row, n in (("t2 i t2", 13), ("i t3", 12), ("t1 i t1", 11))
    ]
    results = sweep(
        source(llava()),
        items,
        EVERY_LAYER,
        progress=ticks,
        on_result=lambda r: seen.append((r.item, ticks.count)),
    )
    assert ticks.count == 3 * LAYERS
    assert seen == [(0, LAYERS), (1, 2 * LAYERS), (2, 3 * LAYERS)]
    assert [r.item for r in results] == [0, 1, 2]


def test_the_model_is_left_as_it_was():
    model = llava()
    batch = tiny.llava_batch(["t3 i t5"], dtype=torch.float64)
    before, hooks = model(**batch).logits, count_hooks(model)

    def fail(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(source(model), [SweepItem(batch, torch.tensor([[16]]))], MIXED, on_result=fail)
    assert torch.equal(model(**batch).logits, before)
    assert count_forwards(model) == 0
    assert count_hooks(model) == hooks


def count_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_failure_inside_the_model_leaves_no_stub():
    model = tiny.llava(layers=2)
    batch = tiny.llava_batch(["t3 i t5"])
    batch["pixel_values"] = batch["pixel_values"][:, :1]
    with pytest.raises(NotFoundError, match="fails on its inputs"):
        sweep(source(model), [SweepItem(batch, torch.tensor([[16]]))], [Intervention("withdraw", 0)])
    assert count_forwards(model) == 0


def test_half_precision_still_gives_float64_divergences():
    model = llava(torch.float32)
    half = tiny.llava(layers=LAYERS, dtype=torch.float32).to(torch.bfloat16)
    batch = tiny.llava_batch(["t3 i t5"])
    item = SweepItem(batch, torch.tensor([[16]]))
    rounded = SweepItem(batch | {"pixel_values": batch["pixel_values"].bfloat16()}, item.rows)
    (want,), (got,) = (sweep(source(m), [i], EVERY_LAYER) for m, i in ((model, item), (half, rounded)))
    assert got.kl.dtype == torch.float64
    assert got.kl.min() >= 0  # in bfloat16 arithmetic it goes below
    torch.testing.assert_close(got.kl, want.kl, rtol=0.3, atol=0.02)


@pytest.mark.parametrize(
    ("kind", "start", "stop"),
    [("withdraw", -1, None), ("withdraw", 2, 3), ("mute", 2, 2), ("freeze", 3, 1), ("prune", 0, None)],
)
def test_meaningless_interventions_are_refused(kind, start, stop):
    with pytest.raises(UsageError):
        Intervention(kind, start, stop)


def test_what_cannot_be_swept_is_refused():
    model = llava()
    batch = tiny.llava_batch(["t3 i t5", "t1 i t2"], dtype=torch.float64)
    good = torch.tensor([[16], [16]])

    def attempt(match, rows=good, interventions=EVERY_LAYER, valid=None, kind=UsageError):
        with pytest.raises(kind, match=match):
            sweep(source(model), [SweepItem(batch, rows, valid)], interventions)

    attempt("has 4 layers", interventions=[Intervention("withdraw", 5)])
    attempt("visual token", rows=torch.tensor([[5], [16]]))
    attempt("padding", rows=torch.tensor([[16], [1]]))
    attempt("outside", rows=torch.tensor([[17], [16]]))
    attempt("shape", rows=torch.tensor([[16]]))
    sweep(
        source(model),
        [SweepItem(batch, torch.tensor([[16], [1]]), torch.tensor([[True], [False]]))],
        EVERY_LAYER,
    )


def test_models_that_cannot_be_swept_are_refused():
    model = tiny.llava(layers=2)
    with pytest.raises(UsageError, match="training mode"):
        source(model.train())
    model.eval()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="flash_attention_2 attention takes no explicit masks"):
        source(model)


def test_a_family_that_cannot_be_swept_says_why():
    resident = Resident(llava(), replace(FAMILIES["llava"], no_withdraw="its attention looks ahead"))
    item = SweepItem(tiny.llava_batch(["t2 i t2"], dtype=torch.float64), torch.tensor([[12]]))
    with pytest.raises(UsageError, match="its attention looks ahead"):
        sweep(resident, [item], EVERY_LAYER)


def test_layers_that_are_not_understood_are_refused(monkeypatch):
    model = tiny.llava(layers=2)
    item = SweepItem(tiny.llava_batch(["t3 i t5"]), torch.tensor([[16]]))
    interventions = [Intervention("withdraw", 0)]
    layer_type = type(reference.text_layers(model)[0])
    stock = layer_type.forward

    def no_cache(self, hidden_states, past_key_values=None, **kwargs):
        return stock(self, hidden_states, **kwargs)

    monkeypatch.setattr(layer_type, "forward", no_cache)
    with pytest.raises(VtwError, match="asked its cache 0 times"):
        sweep(source(model), [item], interventions)
    monkeypatch.undo()

    text_model = model.model.language_model
    text_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "per_position": torch.zeros(1, 17)}), with_kwargs=True
    )
    with pytest.raises(VtwError, match="per_position"):
        sweep(source(model), [item], interventions)


def test_additions_behind_the_last_layer_are_refused():
    model = tiny.llava(layers=2)
    model.model.language_model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    item = SweepItem(tiny.llava_batch(["t3 i t5"]), torch.tensor([[16]]))
    with pytest.raises(VtwError, match="behind its last layer"):
        sweep(source(model), [item], [Intervention("withdraw", 0)])


def test_masks_that_are_not_understood_are_refused():
    with pytest.raises(VtwError, match="shape"):
        reach.as_bool(torch.ones(2, 5))
    with pytest.raises(VtwError, match="bias"):
        reach.as_bool(torch.full((1, 1, 2, 2), -0.5))
