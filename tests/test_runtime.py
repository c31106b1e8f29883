"""Withdrawal under the runtime, against the slow reference: forward passes, generation, caches, training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

from tests import parity, reference
from tests.tiny import IMAGE_ID, LAYERS, TINY, VARIANTS, llava, llava_batch
from vtwcli.runtime import PrunedLayer, PruningError, apply, layout_of, pruned, remove
from vtwcli.schedule.schedule import Schedule

# ragged rows: images first, last, twice, in a row without text around it, and nowhere
LAYOUTS = [
    ["t3 i t5"],
    ["t1 i t1", "t12"],
    ["i t4", "t2 i t3 i t2", "t9"],
    ["t3 i", "t2 i i t1"],
]


@cache
def model_of(
    dtype: torch.dtype = torch.float64, attn: str = "sdpa", name: str = "llava"
) -> LlavaForConditionalGeneration:
    return (TINY | VARIANTS)[name].build(dtype=dtype, attn=attn)


def batch_of(rows: list[str], side: str = "left", seed: int = 0) -> dict:
    return llava_batch(rows, seed=seed, side=side, dtype=torch.float64)


def hooks_of(model: torch.nn.Module) -> int:
    """Hooks of any kind on any module, but for those that the library leaves to record hidden states."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    hooks = [h for m in model.modules() for kind in kinds for h in getattr(m, kind).values()]
    return sum("output_capturing" not in getattr(h, "__module__", "") for h in hooks)


@torch.no_grad()
def run(
    model: torch.nn.Module, batch: dict, schedule: Schedule | int | None = None, **kwargs
) -> torch.Tensor:
    if schedule is None:
        return model(**batch, **kwargs).logits
    with pruned(model, schedule):
        return model(**batch, **kwargs).logits


# ------------------------------------------------------------------------------------------------ one forward pass


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", LAYOUTS, ids=", ".join)
@pytest.mark.parametrize(
    ("dtype", "attn"), [(torch.float64, "sdpa"), (torch.float32, "sdpa"), (torch.float32, "eager")]
)
def test_forward_equals_the_reference_for_every_layer(dtype, attn, rows, side):
    parity.forward(model_of(dtype, attn), llava_batch, rows, side)
    parity.forward(model_of(dtype, attn), llava_batch, rows, side, layers=[0, 3], use_cache=True)


def test_withdrawal_changes_the_logits():
    """What the other tests compare is not the same thing under all K."""
    model, batch = model_of(), batch_of(["t3 i t5"])
    logits = [run(model, batch, k)[0, -1] for k in range(LAYERS + 1)]
    for one, other in pairwise(logits):
        assert (one - other).abs().max() > 1e-3


def test_no_withdrawal_is_the_stock_model_bit_for_bit():
    for dtype, attn in ((torch.float64, "sdpa"), (torch.float32, "eager")):
        model = model_of(dtype, attn)
        batch = llava_batch(["t3 i t5", "t2 i t3 i t2"], dtype=dtype)
        with pruned(model, LAYERS):
            assert hooks_of(model) == 0
            assert torch.equal(model(**batch).logits, run(model, batch))


def test_a_batch_without_images_is_the_stock_model_bit_for_bit():
    model, batch = model_of(torch.float32), llava_batch(["t7", "t4"])
    for k in (0, 3):
        assert torch.equal(run(model, batch, k), run(model, batch))


def test_a_batch_gives_each_row_what_it_gets_alone():
    model = model_of()
    alone = run(model, batch_of(["t3 i t5"]), 2)[:, -1]
    together = run(model, batch_of(["t3 i t5", "t9"]), 2)[:1, -1]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_without_an_attention_mask():
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t6"])
    expected = run(model, batch, 2)
    del batch["attention_mask"]
    text = batch["input_ids"] != IMAGE_ID
    torch.testing.assert_close(run(model, batch, 2)[text], expected[text], rtol=0, atol=1e-9)
    torch.testing.assert_close(run(model, batch, 2, use_cache=False)[text], expected[text], rtol=0, atol=1e-9)


def test_a_four_dimensional_mask():
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3"])
    real = batch["attention_mask"].bool()
    text = real & (batch["input_ids"] != IMAGE_ID)
    expected = reference.logits(model, batch, reference.withdrawal(model, batch["input_ids"] == IMAGE_ID, 2))
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & real[:, None, None, :]
    additive = torch.zeros(causal.shape, dtype=model.dtype).masked_fill(~causal, torch.finfo(model.dtype).min)
    for mask in (causal, additive):
        actual = run(model, batch | {"attention_mask": mask}, 2)
        torch.testing.assert_close(actual[text], expected[text], rtol=0, atol=1e-9)


def test_logits_keep_their_shape_and_can_be_few():
    model, batch = model_of(), batch_of(["t3 i t5", "t4 i t2"])
    full = run(model, batch, 2)
    assert full.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)
    parity.same(model, run(model, batch, 2, logits_to_keep=2), full[:, -2:])
    assert (full[batch["input_ids"] == IMAGE_ID] == 0).all()


def test_hidden_states_and_attentions_are_those_of_the_remaining_rows():
    model, batch = model_of(torch.float32, "eager"), llava_batch(["t3 i t5"])
    with torch.no_grad(), pruned(model, 2):
        out = model(**batch, output_hidden_states=True, output_attentions=True)
    lengths = [h.shape[1] for h in out.hidden_states]
    assert lengths == [17, 17, 17, 8, 8, 8, 8]  # hidden_states[i] leaves layer i - 1
    assert [a.shape[-2:] for a in out.attentions] == [(17, 17)] * 2 + [(8, 8)] * 4
    stock = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[2], stock.hidden_states[2])
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1])[0, -1], out.logits[0, -1])


@pytest.fixture
def flash(monkeypatch):
    """The library's own path to flash attention, its kernels replaced by plain ones of the same contract: causal
    from the lower right corner, sequences packed after the two-dimensional mask."""
    from transformers import modeling_flash_attention_utils as utils

    def kernel(q, k, v, causal, softmax_scale, **_):
        groups = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) * softmax_scale
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
            scores = scores.masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
        parts = [
            kernel(q[a:b][None], k[c:d][None], v[c:d][None], **options)[0]
            for (a, b), (c, d) in zip(
                pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
            )
        ]
        return torch.cat(parts)

    def options(is_causal, softmax_scale, sliding_window=None, **_):
        assert sliding_window is None
        return {"causal": is_causal, "softmax_scale": softmax_scale}

    kernels = (kernel, packed, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_: (kernels, (options, None)))
    model = llava(dtype=torch.float64)
    model.config.text_config._attn_implementation = "flash_attention_2"
    return model


def test_flash_attention_by_its_contract(flash):
    stock = model_of()
    batches = [batch_of(["t3 i t5"]), batch_of(["t3 i t5", "t2 i t3 i t2", "t4"])]
    mute = {"at": 1, "until": 3, "action": "mute"}
    schedules = [
        Schedule.withdraw_at(0),
        Schedule.withdraw_at(3),
        Schedule.from_dict([mute]),
        Schedule.from_dict([mute | {"sink": "zero", "at": 0}]),
        Schedule.from_dict([{"at": 2, "action": "keep", "select": {"score": "attention", "ratio": 0.5}}]),
    ]
    for batch in batches:
        for schedule in schedules:
            expected, logits = parity.generated(stock, batch, schedule)
            actual, flash_logits = parity.generated(flash, batch, schedule)
            assert torch.equal(actual.sequences, expected.sequences)
            torch.testing.assert_close(flash_logits, logits, rtol=0, atol=1e-6)
    refused = [mute | {"readers": "visual"}, mute | {"columns": "first_half"}]
    for action in refused:
        with (
            pruned(flash, Schedule.from_dict([action])),
            pytest.raises(PruningError, match="flash attention cannot"),
        ):
            flash(**batches[0])
    with pruned(flash, 2), pytest.raises(PruningError, match="flash attention cannot"):
        flash(**batch_of(["t3 i"]))


def test_flex_attention_is_refused():
    model = llava(dtype=torch.float64)
    batch = batch_of(["t3 i t5"])
    model.config.text_config._attn_implementation = "flex_attention"
    with pruned(model, 2), pytest.raises(PruningError, match="flex_attention is not supported"):
        model(**batch)


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("rows", LAYOUTS, ids=", ".join)
@pytest.mark.parametrize(
    ("dtype", "attn"), [(torch.float64, "sdpa"), (torch.float32, "sdpa"), (torch.float32, "eager")]
)
def test_generation_equals_the_reference_for_every_layer(dtype, attn, rows):
    parity.generation(model_of(dtype, attn), llava_batch, rows)


def test_eager_attention_in_float64():
    """One row, for padded rows are not a number in the stock model too."""
    parity.forward(model_of(torch.float64, "eager"), llava_batch, ["t3 i t5"])
    parity.generation(model_of(torch.float64, "eager"), llava_batch, ["t3 i t5"])


@contextmanager
def slow_withdrawal(model: torch.nn.Module, prompt: torch.Tensor, k: int) -> Iterator[None]:
    """The reference inside of ``generate(use_cache=False)``: every call recomputes everything under explicit masks."""
    now: dict = {}

    def start(module, args, kwargs):
        mask = kwargs["attention_mask"]
        visual = torch.zeros_like(mask, dtype=torch.bool)
        visual[:, : prompt.shape[1]] = kwargs["input_ids"][:, : prompt.shape[1]] == IMAGE_ID
        now["context"] = reference.hidden_columns(model, mask, reference.withdrawal(model, visual, k))
        now["context"].__enter__()

    def stop(module, args, output):
        now["context"].__exit__(None, None, None)

    handles = [
        model.register_forward_pre_hook(start, with_kwargs=True),
        model.register_forward_hook(stop),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_beams_and_sampling_equal_the_reference(options):
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3 i t2", "t4"])
    with torch.no_grad():
        model.lm_head.weight[IMAGE_ID] = 0
    for k in (0, 3):
        torch.manual_seed(0)
        with slow_withdrawal(model, batch["input_ids"], k):
            expected = model.generate(**batch, max_new_tokens=6, use_cache=False, **options)
        torch.manual_seed(0)
        with pruned(model, k):
            assert torch.equal(model.generate(**batch, max_new_tokens=6, **options), expected)


@pytest.mark.parametrize("k", [0, 3])
def test_assisted_decoding_equals_plain_decoding(k):
    """Guesses are put behind the prompt and cropped from the cache again."""
    model, assistant = model_of(), llava(seed=1, layers=1, dtype=torch.float64)
    batch = batch_of(["t3 i t5"])
    with pruned(model, k):
        plain = model.generate(**batch, max_new_tokens=12, do_sample=False)
        looked_up = model.generate(**batch, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        guessed = model.generate(**batch, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert torch.equal(looked_up, plain)
    assert torch.equal(guessed, plain)


def test_chunked_prefill_of_encoded_images():
    model, batch = model_of(), batch_of(["t3 i t5"])
    with torch.no_grad():
        encoded = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
    rest = {name: x for name, x in batch.items() if name != "pixel_values"}
    for k in (0, 3):
        with pruned(model, k):
            expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
            for size in (4, 5, 12):  # chunks that cut the image, and one that holds nothing else
                options = {"max_new_tokens": 5, "do_sample": False, "prefill_chunk_size": size}
                assert torch.equal(
                    model.generate(**rest, mm_encoder_outputs={"image": encoded}, **options), expected
                )


def with_embeddings(model: torch.nn.Module, batch: dict) -> dict:
    """The same inputs as embeddings, for a reference in which ids do not say what is visual."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output)
    visual = (batch["input_ids"] == IMAGE_ID)[:, :, None]
    return {
        "inputs_embeds": embeds.masked_scatter(visual, features),
        "attention_mask": batch["attention_mask"],
    }


@torch.no_grad()
def test_a_generated_placeholder_is_text():
    model, batch = copy.deepcopy(model_of()), batch_of(["t3 i t5"])
    model.lm_head.weight[IMAGE_ID] = 3 * model.lm_head.weight[run(model, batch, 2)[0, -1].argmax()]
    full = with_embeddings(model, batch)
    visual = batch["input_ids"] == IMAGE_ID
    expected = []
    for _ in range(4):
        logits = reference.logits(model, full, reference.withdrawal(model, visual, 2))[:, -1]
        expected.append(logits)
        token = logits.argmax(-1, keepdim=True)
        embeds = torch.cat([full["inputs_embeds"], model.get_input_embeddings()(token)], 1)
        full = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}
        visual = torch.cat([visual, torch.zeros_like(token, dtype=torch.bool)], 1)
    out, logits = parity.generated(model, batch, 2)
    assert (out.sequences[0, -4:] == IMAGE_ID).any()
    torch.testing.assert_close(logits, torch.stack(expected, 1), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ the cache


def joined(first: dict, second: dict) -> dict:
    """Two turns of a conversation as one prompt."""
    out = {name: torch.cat([first[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    pixels = [turn["pixel_values"] for turn in (first, second) if "pixel_values" in turn]
    return out | {"pixel_values": torch.cat(pixels)}


def positions(batch: dict, last: int) -> dict:
    return {"position_ids": reference.positions(batch["attention_mask"])[:, -last:]}


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize(
    "turns",
    [
        (["t3 i t5"], ["t4"]),
        (["t3 i t5"], ["t2 i t4"]),
        (["t6"], ["t2 i t4"]),
        (["t3 i t5", "t2 i t3 i t2"], ["t4", "t2"]),
        (["t3 i"], ["i t3"]),
    ],
    ids=str,
)
def test_a_second_turn_on_the_same_cache(turns, k):
    model = model_of()
    first, second = batch_of(turns[0]), batch_of(turns[1], seed=1)
    whole = joined(first, second)
    if len(turns[0]) > 1:  # pixels of a batch go row by row
        order = [0, 1, 2] if "pixel_values" not in second else None
        assert order is not None
    visual = reference.visual_mask(model, whole["input_ids"])
    expected = reference.logits(model, whole, reference.withdrawal(model, visual, k), **positions(whole, 0))
    cache, width = DynamicCache(config=model.config.text_config), second["input_ids"].shape[1]
    with pruned(model, k):
        model(**first, past_key_values=cache, **positions(first, 0))
        rest = {"input_ids": second["input_ids"], "attention_mask": whole["attention_mask"]}
        if "pixel_values" in second:
            rest["pixel_values"] = second["pixel_values"]
        actual = model(**rest, past_key_values=cache, **positions(whole, width)).logits
    read = second["attention_mask"].bool() & (second["input_ids"] != IMAGE_ID)
    torch.testing.assert_close(actual[read], expected[:, -width:][read], rtol=0, atol=1e-9)
    assert cache.get_seq_length() == cache.get_seq_length(LAYERS - 1) == whole["input_ids"].shape[1]
    text = int((whole["attention_mask"].bool() & ~visual).sum(1).max())
    assert cache.layers[-1].keys.shape[2] <= text + 2


@torch.no_grad()
def test_generate_continues_its_own_cache():
    model, batch = model_of(), batch_of(["t3 i t5"])
    with pruned(model, 2):
        first = model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        more = torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([first.sequences, more], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        continued = model.generate(
            **again, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False
        )
        fresh = model.generate(**again, pixel_values=batch["pixel_values"], max_new_tokens=4, do_sample=False)
    assert torch.equal(continued, fresh)
    tokens, _ = reference.greedy(model, again | {"pixel_values": batch["pixel_values"]}, 2, 4)
    assert torch.equal(continued[:, -4:], tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava-mistral-window", "gemma3-window", "aya_vision-window"])
def test_many_steps_beyond_the_sliding_window(name):
    model, tiny = model_of(name=name), (TINY | VARIANTS)[name]
    batch = tiny.batch(["t3 i t5", "t2 i t3"], dtype=torch.float64)
    for k in (0, 3):
        tokens, scores = reference.greedy(model, batch, k, 12)
        out, logits = parity.generated(model, batch, k, 12)
        assert torch.equal(out.sequences[:, -12:], tokens)
        torch.testing.assert_close(logits, scores, rtol=0, atol=1e-9)
        for layer in out.past_key_values.layers:
            if isinstance(layer, PrunedLayer) and layer.is_sliding:
                assert layer.keys.shape[2] < layer.window


@torch.no_grad()
def test_a_cropped_cache_is_the_shorter_one():
    """Also into the prompt, where the rows of a batch lose different numbers of entries."""
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3 i t2"])
    token = torch.tensor([[7], [8]])
    for remove_last in (1, 3, 6):
        cache = DynamicCache(config=model.config.text_config)
        short = {n: batch[n][:, :-remove_last] if batch[n].ndim == 2 else batch[n] for n in batch}
        if int((short["input_ids"] == IMAGE_ID).sum()) != 27:
            continue  # an image was cut, so the shorter prompt is none
        longer = joined(short, {"input_ids": token, "attention_mask": torch.ones_like(token)})
        expected = reference.logits(
            model,
            longer,
            reference.withdrawal(model, longer["input_ids"] == IMAGE_ID, 2),
            **positions(longer, 0),
        )[:, -1]
        with pruned(model, 2):
            model(**batch, past_key_values=cache, **positions(batch, 0))
            cache.crop(-remove_last)
            step = {"input_ids": token, "attention_mask": longer["attention_mask"]}
            actual = model(**step, past_key_values=cache, **positions(longer, 1)).logits[:, -1]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
        assert cache.get_seq_length(3) == longer["input_ids"].shape[1]


@torch.no_grad()
def test_rows_of_a_cache_can_be_repeated_selected_and_reset():
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3 i t2"])
    token = torch.tensor([[7], [8]])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
    step = {"input_ids": token, "attention_mask": mask}
    where = {"position_ids": reference.positions(mask)[:, -1:]}
    with pruned(model, 2):
        cache = model(**batch, **positions(batch, 0)).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache), **where).logits
        for change, rows in (
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        ):
            changed = copy.deepcopy(cache)
            change(changed)
            inputs = {name: x[rows] for name, x in (step | where).items()}
            actual = model(**inputs, past_key_values=changed).logits
            torch.testing.assert_close(actual, expected[rows], rtol=0, atol=1e-9)
        cache.reset()
        assert cache.get_seq_length(3) == 0
        again = model(**batch, past_key_values=cache, **positions(batch, 0)).logits
    text = batch["attention_mask"].bool() & (batch["input_ids"] != IMAGE_ID)
    fresh = run(model, batch, 2, **positions(batch, 0))
    torch.testing.assert_close(again[text], fresh[text], rtol=0, atol=1e-9)


@torch.no_grad()
def test_entries_that_left_are_not_held():
    model, batch = model_of(), batch_of(["t3 i t5", "t2 i t3 i t2"])
    with pruned(model, 2):
        layers = model(**batch, use_cache=True).past_key_values.layers
    assert [layer.keys.shape[2] for layer in layers] == [25, 25, 8, 8, 8, 8]


# ------------------------------------------------------------------------------------------------ training


def labelled(batch: dict) -> dict:
    """Labels on the last three tokens of each row."""
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    return batch | {"labels": labels}


def gradients(model: torch.nn.Module, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_training_has_the_gradients_of_the_reference(checkpointing):
    model = llava(dtype=torch.float64).train()
    batch = labelled(batch_of(["t3 i t5", "t2 i t3 i t4"]))
    visual = reference.visual_mask(model, batch["input_ids"])
    for k in (0, 3):
        with reference.hidden_columns(model, batch["attention_mask"], reference.withdrawal(model, visual, k)):
            loss, expected = gradients(model, batch)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        with pruned(model, k):
            pruned_loss, actual = gradients(model, batch)
        model.gradient_checkpointing_disable()
        assert pruned_loss == pytest.approx(loss, abs=1e-9)
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9)
        assert actual["model.language_model.layers.0.self_attn.q_proj.weight"].abs().max() > 1e-6


def test_labels_predicted_from_visual_tokens_are_refused():
    model, batch = model_of(), labelled(batch_of(["t3 i t5"]))
    batch["labels"][:, -5] = batch["input_ids"][:, -5]  # the first token behind the image
    with pruned(model, 2), pytest.raises(PruningError, match="predicted from a visual token"):
        model(**batch)


# ------------------------------------------------------------------------------------------------ coming and going


def test_nothing_stays_behind():
    model, batch = llava(dtype=torch.float64), batch_of(["t3 i t5"])
    before = run(model, batch)
    with pruned(model, 2):
        assert hooks_of(model) > 0
        assert not torch.equal(run(model, batch), before)
    assert hooks_of(model) == 0
    assert torch.equal(run(model, batch), before)
    with pytest.raises(ZeroDivisionError), pruned(model, 2):
        raise ZeroDivisionError
    assert hooks_of(model) == 0
    broken = batch | {"pixel_values": batch["pixel_values"][:, :2]}
    with pruned(model, 2):
        with pytest.raises(RuntimeError, match="3 channels"):
            model(**broken)
        after_error = run(model, batch)
        handle = model.model.language_model.layers[4].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        assert torch.equal(run(model, batch), after_error)
    assert hooks_of(model) == 0
    assert torch.equal(run(model, batch), before)


def test_apply_and_remove():
    model, batch = llava(dtype=torch.float64), batch_of(["t3 i t5"])
    before, expected = run(model, batch), run(model, batch, 2)
    for schedule in (2, Schedule.withdraw_at(2), Schedule.withdraw_at(2, model="x").to_dict()):
        handle = apply(model, schedule)
        assert torch.equal(run(model, batch), expected)
        assert handle.trace.samples[0].visual_per_layer == [9, 9, 0, 0, 0, 0]
        with pytest.raises(PruningError, match="at work on this model already"):
            apply(model, 3)
        remove(model)
        assert torch.equal(run(model, batch), before)
    remove(model)
    assert hooks_of(model) == 0


def test_a_deep_copy_runs_the_schedule_by_itself():
    model, batch = llava(dtype=torch.float64), batch_of(["t3 i t5"])
    before, expected = run(model, batch), run(model, batch, 2)
    apply(model, 2)
    run(model, batch)
    twin = copy.deepcopy(model)
    remove(model)
    assert torch.equal(run(model, batch), before)
    assert torch.equal(run(twin, batch), expected)
    remove(twin)
    assert hooks_of(twin) == hooks_of(model) == 0
    assert torch.equal(run(twin, batch), before)


def test_threads_do_not_disturb_each_other():
    model = model_of()
    batches = [
        batch_of(rows, seed=i) for i, rows in enumerate([["t3 i t5"], ["t2 i i t4"], ["t9"], ["i t7"]])
    ]
    options = {"max_new_tokens": 8, "do_sample": False}
    with pruned(model, 2):
        expected = [model.generate(**batch, **options) for batch in batches]
        found: list = [None] * len(batches)

        def work(number):
            for _ in range(3):
                found[number] = model.generate(**batches[number], **options)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------ refusals


@torch.no_grad()
def test_a_cache_of_another_schedule_is_refused():
    model, batch = model_of(), batch_of(["t3 i t5"])
    more = {"input_ids": torch.tensor([[5]])}
    stock = model(**batch, use_cache=True).past_key_values
    with pruned(model, 2), pytest.raises(PruningError, match="not filled under this schedule"):
        model(**more, past_key_values=stock)
    with pruned(model, 2):
        cache = model(**batch, use_cache=True).past_key_values
    with pruned(model, 3), pytest.raises(PruningError, match="not filled under this schedule"):
        model(**more, past_key_values=copy.deepcopy(cache))
    with pytest.raises(PruningError, match="continue it under the same schedule"):
        model(**more, past_key_values=cache)


def test_what_cannot_be_exact_is_refused():
    model, batch = model_of(), batch_of(["t3 i t5"])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pruned(model, 2):
        with pytest.raises(PruningError, match="do not tell where the images are"):
            model(inputs_embeds=embeds)
        with pytest.raises(PruningError, match="do not tell where the images are"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)
        with pytest.raises(PruningError, match="called on its own"):
            model.model.language_model(inputs_embeds=embeds)
        with pytest.raises(PruningError, match="outside of its model"):
            model.model.language_model.layers[3](embeds)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([{"at": 1, "action": "merge"}], "'merge' is not executable"),
        ([{"at": 1, "action": "withdraw", "ratio": 0.5}], "unknown key 'ratio'"),
        ([{"at": -1, "action": "withdraw"}], "at is -1, which it cannot be"),
        ([{"at": "auto", "action": "withdraw"}], "needs a condition under 'when'"),
        ([{"at": 2, "action": "mute"}], "the key 'until' is required"),
        ([{"at": 2, "until": 2, "action": "freeze"}], r"'until' \(2\) must be above 'at'"),
        ([{"at": 2, "action": "withdraw", "when": {"cosine_below": 0.5}}], "go with 'at: auto' only"),
        ([{"at": 9, "action": "withdraw"}], "at is 9, but the model has 6 layers"),
        (
            [{"at": 3, "action": "withdraw"}, {"at": 4, "action": "withdraw"}],
            r"action 2 \(withdraw\) comes after",
        ),
        ([{"at": 2, "until": 3, "action": "mute", "sink": "last"}], "sink 'last' is not one of"),
        (
            [{"at": 2, "action": "keep", "select": {"score": "entropy", "count": 1}}],
            "score 'entropy' is not one of",
        ),
        ([{"at": 2, "action": "keep", "select": {"score": "uniform", "above": 1}}], "has no threshold"),
        ([{"at": 0, "action": "keep", "select": {"score": "attention", "count": 1}}], "start at 1 or later"),
        (
            [
                {"at": 0, "until": 3, "action": "mute"},
                {"at": 3, "action": "keep", "select": {"score": "attention", "count": 1}},
            ],
            "layer 2 is muted",
        ),
    ],
)
def test_a_schedule_that_cannot_be_executed_is_refused_by_name(actions, message):
    from vtwcli.runtime import pruning

    model = model_of()
    with pytest.raises(PruningError, match=message):
        pruning.apply(model, {"format_version": 1, "actions": actions}, layout_of(model.config))
    assert hooks_of(model) == 0


def test_a_layout_or_format_of_something_else_is_refused():
    from vtwcli.runtime import pruning

    model, layout = model_of(), layout_of(model_of().config)
    withdraw = [{"at": 2, "action": "withdraw"}]
    with pytest.raises(PruningError, match="format 3 is not 1 or 2"):
        pruning.apply(model, {"format_version": 3, "actions": withdraw}, layout)
    with pytest.raises(PruningError, match=r"no model\.text\.layers"):
        pruning.apply(
            model, {"format_version": 1, "actions": withdraw}, layout | {"text_model": "model.text"}
        )
    with pytest.raises(PruningError, match=r"adds vision in layers 0\.\.2"):
        pruning.apply(model, {"format_version": 1, "actions": withdraw}, layout | {"first_withdrawal": 3})


def test_the_runtime_files_need_nothing_of_the_package(tmp_path):
    """An exported model directory carries copies of them."""
    import subprocess
    import sys

    from vtwcli.export.hf.remote import travelling_code

    folder = tmp_path / "export"
    folder.mkdir()
    for name, text in travelling_code().items():
        (folder / name).write_text(text)
    code = (
        "import sys\nfrom export import vtw_pruning\n"
        "assert not any(n.startswith('vtwcli') for n in sys.modules); print(vtw_pruning.apply)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
