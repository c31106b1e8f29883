"""Last-row measures against slow loops over the attention that the library itself returns."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests import reference, tiny
from vtwcli.errors import VtwError
from vtwcli.models.families import FAMILIES
from vtwcli.runtime import pruned
from vtwcli.sweep.layers import Resident, cache_argument
from vtwcli.sweep.probes import LastRowProbe, entropy, masses, sinks, value_norms
from vtwcli.sweep.sweep import SweepItem, sweep

RATIO = 1.5


def slow(model, batch: dict, rows: list[int]) -> list[list[dict]]:
    """By layer and sample: every measure, token by token, from eager attention and the value projections."""
    seen: list[torch.Tensor] = []
    layers = reference.text_layers(model)
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, args, out: seen.append(out))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            out = model(**batch, output_attentions=True, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    visual = reference.visual_mask(model, batch["input_ids"])
    real = batch["attention_mask"].bool()
    found = []
    for d in range(len(layers)):
        heads = out.attentions[d].shape[1]
        width = seen[d].shape[-1] // model.config.get_text_config().num_key_value_heads
        samples = []
        for b, row in enumerate(rows):
            weights = out.attentions[d][b, :, row].double()
            values = seen[d][b].double().unflatten(-1, (-1, width))  # [S, G, E]
            group = heads // values.shape[1]
            tokens = visual[b].nonzero()[:, 0].tolist()
            first = tokens[0] if tokens else len(real[b])
            text = [i for i in range(len(real[b])) if real[b, i] and not visual[b, i]]

            def mass(columns, weights=weights):
                return sum(float(weights[h, i]) for h in range(len(weights)) for i in columns) / len(weights)

            c = {
                i: torch.cat([weights[h, i] * values[i, h // group] for h in range(heads)])
                for i in range(len(real[b]))
            }
            o = torch.stack(list(c.values())).sum(0)
            spread = 0.0
            for h in range(heads):
                total = sum(float(weights[h, i]) for i in tokens)
                spread -= (
                    sum(float(weights[h, i]) / total * math.log(float(weights[h, i]) / total) for i in tokens)
                    / heads
                )
            average = mass(tokens) / max(len(tokens), 1)
            samples.append(
                {
                    "masses": {
                        "prefix": mass([i for i in text if i < first]),
                        "visual": mass(tokens),
                        "suffix": mass([i for i in text if i > first]),
                        "first": mass(tokens[:1]),
                    },
                    "entropy": spread,
                    "attention": [mass([i]) for i in tokens],
                    "contribution": [float(c[i].norm()) for i in tokens],
                    "cosine": [
                        float(torch.nn.functional.cosine_similarity(o - c[i], o, dim=0)) for i in tokens
                    ],
                    "value_norms": [float(values[i].abs().sum()) for i in tokens],
                    "sinks": [mass([i]) >= RATIO * average for i in tokens],
                    "out": out.hidden_states[d + 1][b, row] if d + 1 < len(layers) else None,
                }
            )
        found.append(samples)
    return found


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next"])
def test_all_measures_equal_those_from_returned_attention(name, attn):
    family = tiny.TINY[name]
    layouts = ["t3 i t5", "i t4 i t2"]
    batch = family.batch(layouts)
    rows = [batch["input_ids"].shape[1] - 1] * 2
    want = slow(family.build(layers=3, attn="eager"), batch, rows)
    probe = LastRowProbe(RATIO)
    model = family.build(layers=3, attn=attn)
    sweep(
        Resident(model, FAMILIES[name]), [SweepItem(batch, torch.tensor(rows)[:, None])], [], probes=[probe]
    )
    assert set(probe.found) == {(0, 0), (0, 1)}
    some = False
    for b in range(2):
        for d, got in enumerate(probe.found[0, b]):
            expected = want[d][b]
            assert got.masses == pytest.approx(expected["masses"], abs=1e-5)
            assert got.entropy == pytest.approx(expected["entropy"], abs=1e-4)
            for measure in ("attention", "contribution", "cosine", "value_norms"):
                torch.testing.assert_close(
                    getattr(got, measure), torch.tensor(expected[measure]), rtol=1e-3, atol=1e-4
                )
            assert got.sinks.tolist() == expected["sinks"]
            some |= any(expected["sinks"])
            if expected["out"] is not None:
                torch.testing.assert_close(got.out, expected["out"], rtol=1e-3, atol=1e-4)
        assert len(got.attention) == int(reference.visual_mask(model, batch["input_ids"])[b].sum())
    assert some


def test_masses_and_entropy_of_numbers_written_by_hand():
    weights = torch.tensor([[[0.1, 0.2, 0.2, 0.5, 0.0], [0.3, 0.0, 0.4, 0.3, 0.0]]])
    visual = torch.tensor([[False, True, True, False, False]])
    attended = torch.tensor([[True, True, True, True, False]])
    found = {name: float(value) for name, value in masses(weights, visual, attended).items()}
    assert found == pytest.approx({"prefix": 0.2, "visual": 0.4, "suffix": 0.4, "first": 0.1})
    # one head spreads evenly over two tokens, the other reads one
    assert float(entropy(weights, visual)) == pytest.approx(math.log(2) / 2)


def test_entropy_of_a_head_that_reads_no_visual_token_is_that_of_an_even_spread():
    weights = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    assert float(entropy(weights, torch.tensor([[False, True, True, True]]))) == pytest.approx(math.log(3))


def test_value_norms_and_sinks():
    values = torch.tensor(
        [[[[1.0, -2.0], [0.5, 0.0]], [[3.0, 0.0], [0.0, -0.5]]]]
    )  # [1, 2 heads, 2 positions, 2]
    assert value_norms(values).tolist() == [[6.0, 1.0]]
    attention = torch.tensor([[0.6, 0.3, 0.05, 0.05]])
    visual = torch.tensor([[False, True, True, True]])
    # the average visual token has 0.4 / 3
    assert sinks(attention, visual, 2.0).tolist() == [[False, True, False, False]]
    assert sinks(attention, visual, 2.5).tolist() == [[False, False, False, False]]


def test_a_prompt_without_images_has_nothing_visual():
    batch = tiny.llava_batch(["t6"])
    probe = LastRowProbe(RATIO)
    model = tiny.llava(layers=2)
    sweep(Resident(model, FAMILIES["llava"]), [SweepItem(batch, torch.tensor([[5]]))], [], probes=[probe])
    for layer in probe.found[0, 0]:
        assert layer.masses == pytest.approx({"prefix": 1, "visual": 0, "suffix": 0, "first": 0}, abs=1e-6)
        assert len(layer.attention) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_by_which_a_schedule_decides(dtype):
    """The runtime keeps a token exactly where its contribution, as measured here, is larger than the threshold."""
    family = tiny.TINY["llava"]
    model = family.build(layers=4, attn="sdpa").to(dtype)
    batch = family.batch(["t3 i t5", "i t4 i t2"], dtype=dtype)
    probe = LastRowProbe(RATIO)
    last = torch.full((2, 1), batch["input_ids"].shape[1] - 1)
    sweep(Resident(model, FAMILIES["llava"]), [SweepItem(batch, last)], [], probes=[probe])
    for d in range(3):
        for b in range(2):
            sizes = probe.found[0, b][d].contribution
            bound = sizes.median()  # one of them, which must fall out
            select = {"score": "contribution", "above": float(bound)}
            actions = [{"at": d + 1, "action": "keep", "select": select}]
            with pruned(model, {"format_version": 1, "actions": actions}) as handle, torch.no_grad():
                model(**batch, use_cache=False)
            [action] = handle.trace.samples[b].actions
            assert action.kept == (sizes > bound).nonzero()[:, 0].tolist()


def test_the_librarys_attention_functions_stay_as_they_are():
    family = tiny.TINY["llava"]
    model, batch = family.build(layers=2, attn="sdpa"), family.batch(["t3 i t5"])
    item = SweepItem(batch, torch.tensor([[batch["input_ids"].shape[1] - 1]]))

    def measured() -> list:
        probe = LastRowProbe(RATIO)
        sweep(Resident(model, FAMILIES["llava"]), [item], [], probes=[probe])
        return [row.contribution for row in probe.found[0, 0]]

    before, want, calls = dict(ALL_ATTENTION_FUNCTIONS), measured(), []
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def own(*args, **kwargs):
        calls.append(args)
        return stock(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        assert all(map(torch.equal, measured(), want))
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        assert calls
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_models_are_measured_in_several_threads_at_once():
    family = tiny.TINY["llava"]
    batches = [family.batch([row]) for row in ("t3 i t5", "i t4 i t2", "t1 i t9")]
    models = [family.build(layers=3, attn="sdpa") for _ in batches]

    def measured(number: int) -> list:
        probe = LastRowProbe(RATIO)
        rows = torch.tensor([[batches[number]["input_ids"].shape[1] - 1]])
        source = Resident(models[number], FAMILIES["llava"])
        for _ in range(5):
            sweep(source, [SweepItem(batches[number], rows)], [], probes=[probe])
        return [row.contribution for row in probe.found[0, 0]]

    want = [measured(number) for number in range(3)]
    with ThreadPoolExecutor(3) as threads:
        for got, expected in zip(threads.map(measured, range(3)), want, strict=True):
            assert len(got) == 15
            assert all(map(torch.equal, got, expected))


def test_an_attention_that_is_not_understood_is_refused():
    model, batch = tiny.llava(layers=2), tiny.llava_batch(["t3 i t5"])
    views = []
    item = SweepItem(batch, torch.tensor([[16]]))
    sweep(Resident(model, FAMILIES["llava"]), [item], [], probes=[views.append])

    def another_cache(module, args, kwargs):
        name = cache_argument(module)
        return args, {**kwargs, name: copy.copy(kwargs[name])}

    views[0].layer.self_attn.register_forward_pre_hook(another_cache, with_kwargs=True)
    with pytest.raises(VtwError, match="does not hand its cache"):
        views[0].attention()
    views[1].layer.attention = views[1].layer.self_attn
    del views[1].layer.self_attn
    with pytest.raises(VtwError, match="has no self_attn"):
        views[1].attention()
