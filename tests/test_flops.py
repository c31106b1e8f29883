"""FLOPs and KV arithmetic against numbers that the papers print."""

import pytest
from transformers import LlamaConfig, Qwen2Config

from vtwcli.judge import flops
from vtwcli.judge.flops import TextShape

LLAVA_7B = TextShape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128)


def test_shortv_prints_8_50_tera_for_640_tokens():
    assert flops.prefill_cost(LLAVA_7B, [640] * 32, "flops") / 1e12 == pytest.approx(8.50, abs=0.005)


def test_visipruner_calls_3_82_tera_its_baseline():
    assert flops.prefill_cost(LLAVA_7B, [576] * 32, "macs-3mlp") / 1e12 == pytest.approx(3.82, abs=0.005)


@pytest.mark.parametrize(("k", "percent"), [(15, 52.1), (16, 54.9), (20, 66.2), (26, 83.1)])
def test_ratio_by_withdrawal_layer_with_64_text_tokens(k, percent):
    assert 100 * flops.prefill_ratio(LLAVA_7B, 64, 576, k) == pytest.approx(percent, abs=0.05)


def test_fastv_formula_without_grouped_queries():
    n, d, m = 100, 4096, 11008
    assert flops.layer_cost(LLAVA_7B, n, "macs-2mlp") == 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    assert flops.layer_cost(LLAVA_7B, n, "macs-3mlp") == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    assert flops.layer_cost(LLAVA_7B, n, "flops") == 2 * n * (4 * d + 3 * m) * d + 4 * n**2 * d


def test_grouped_queries_shrink_only_keys_and_values():
    grouped = TextShape(layers=1, hidden=64, intermediate=128, heads=8, kv_heads=2, head_dim=8)
    n = 10
    expected = 2 * n * (64 * 64 + 2 * 64 * 16 + 64 * 64 + 3 * 64 * 128) + 4 * n * n * 64
    assert flops.layer_cost(grouped, n) == expected


def test_shape_is_read_from_text_and_top_level_configs():
    text = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2)  # fmt: skip
    assert TextShape.from_config(text) == TextShape(3, 64, 96, 4, 2, 16)
    wide = Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=4, head_dim=32)  # fmt: skip
    assert TextShape.from_config(wide).head_dim == 32


def test_kv_cache():
    tokens = flops.tokens_with_withdrawal(4, text=3, visual=5, k=1)
    assert tokens == [8, 3, 3, 3]
    shape = TextShape(layers=4, hidden=8, intermediate=8, heads=2, kv_heads=1, head_dim=4)
    assert flops.kv_bytes(shape, tokens, bytes_per_value=2) == 17 * 2 * 4 * 2
    assert flops.kv_ratio(4, text=3, visual=5, k=1) == 17 / 32


@pytest.mark.parametrize("convention", flops.CONVENTIONS)
def test_no_withdrawal_costs_everything(convention):
    assert flops.prefill_ratio(LLAVA_7B, 64, 576, 32, convention) == 1


SHORTV_7B = [0, 2, 3, 12, *range(17, 32)]
"""The layers of LLaVA-1.5-7B in which ShortV (arXiv 2504.00502) freezes visual tokens."""


def test_shortv_prints_55_percent_for_19_frozen_layers():
    frozen = [576 if layer in SHORTV_7B else 0 for layer in range(32)]
    assert len(SHORTV_7B) == 19
    full = flops.prefill_cost(LLAVA_7B, [640] * 32)
    assert 100 * flops.prefill_cost(LLAVA_7B, [640] * 32, frozen_per_layer=frozen) / full == pytest.approx(
        55, abs=0.5
    )


def test_a_frozen_token_costs_its_keys_and_values():
    t, v, d, g, m = 10, 30, 64, 16, 128
    grouped = TextShape(layers=1, hidden=d, intermediate=m, heads=8, kv_heads=2, head_dim=8)
    attention, projections = t * (t + v) * d, t * 2 * d * d + (t + v) * 2 * d * g
    assert flops.layer_cost(grouped, t + v, "macs-2mlp", v) == projections + 2 * attention + 2 * t * d * m
    assert flops.layer_cost(grouped, t + v, "macs-3mlp", v) == projections + 2 * attention + 3 * t * d * m
    assert flops.layer_cost(grouped, t + v, "flops", v) == 2 * (projections + 2 * attention + 3 * t * d * m)
