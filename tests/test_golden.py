"""Methods against numbers from their authors' own code: what is kept, logits, tokens, cache lengths."""

import pytest
import torch

from tests import golden
from vtwcli.methods.fastv import FastV
from vtwcli.methods.sparsevlm import SparseVLM
from vtwcli.runtime import entries, pruned

SAMPLES = range(4)
ATOL = 2e-5  # of logits; the published code computes in float32


@pytest.fixture(scope="module")
def model():
    return golden.model()


def answer(model, schedule, sample, steps):
    """Logits and tokens of ``steps`` greedy tokens under a schedule, the trace and the cache's entries by layer."""
    with torch.no_grad(), pruned(model, schedule) as running:
        out = model.generate(
            **golden.inputs(model, sample),
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        trace = running.trace
    lengths = entries(out.past_key_values)
    return torch.cat(out.logits), out.sequences[0, -steps:].tolist(), trace, lengths


def test_the_embeddings_are_the_published_ones(model):
    inputs = golden.inputs(model, 0)
    text = golden.load_file(golden.HERE / "gqa.inputs.safetensors")["inputs_embeds.0"][0]
    table = model.get_input_embeddings()(inputs["input_ids"][0])
    outside = inputs["input_ids"][0] != golden.PLACEHOLDER
    torch.testing.assert_close(table[outside], text[outside], rtol=0, atol=0)


@pytest.mark.parametrize("sample", SAMPLES)
def test_fastv(model, sample):
    document, arrays = golden.numbers("fastv")
    runs = document["kv"]["gqa"]
    assert len(runs) >= 2
    for name, rows in runs.items():
        row, layer, dropped = rows[sample], *name.removeprefix("K").split("_R")
        count = round(golden.VISUAL * (1 - float(dropped)))
        schedule = FastV(layer=int(layer), count=count).schedule()
        logits, tokens, trace, lengths = answer(model, schedule, sample, 8)
        assert [golden.BEFORE + i for i in trace.samples[0].actions[0].kept] == row["kept"]
        assert [layer.rows for layer in trace.samples[0].layers] == row["len_in"]
        assert tokens == row["tokens"]
        assert lengths == row["kv_len_per_layer_after"]
        torch.testing.assert_close(logits, arrays[f"kv.gqa.{name}.scores.{sample}"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", ["r192", "r128", "r64"])
def test_sparsevlm(model, name, sample):
    """Where densities are nearly equal the published code's noise decides, and only what is before it is compared."""
    document, arrays = golden.numbers("sparsevlm")
    row = document["runs"]["gqa"][name][sample]
    counts = [stage["n_kept"] for stage in row["stages"]]
    method = SparseVLM(layers=[stage["layer"] + 1 for stage in row["stages"]], counts=counts)
    logits, tokens, trace, lengths = answer(model, method.schedule(), sample, 8)
    kept = [[golden.BEFORE + i if i >= 0 else i for i in one.kept] for one in trace.samples[0].actions]
    assert kept[0] == row["stages"][0]["kept"]
    assert [layer.rows for layer in trace.samples[0].layers] == row["len_in"]
    assert lengths == row["kv_len_per_layer_after"]
    if row["max_score_diff_between_two_seeds"] == 0:
        assert kept[1] == row["stages"][1]["kept"]
        assert tokens == row["tokens"]
        expected = arrays[f"gqa.{name}.scores.{sample}"]
        torch.testing.assert_close(logits, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("sample", SAMPLES)
def test_fastv_without_a_cache(model, sample):
    """The code that the paper timed has no cache, so every step ranks anew by the newest token's row."""
    document, arrays = golden.numbers("fastv")
    for name, rows in document["inplace"]["gqa"].items():
        layer, count = name.removeprefix("K").split("_rank")
        schedule = FastV(layer=int(layer), count=int(count)).schedule()
        inputs = golden.inputs(model, sample)
        for step in range(4):
            with torch.no_grad(), pruned(model, schedule) as running:
                out = model(**inputs, use_cache=False).logits[0, -1]
            kept = [golden.BEFORE + i for i in running.trace.samples[0].actions[0].kept]
            assert kept == arrays[f"inplace.gqa.{name}.kept_per_step.{sample}"][step].tolist()
            expected = arrays[f"inplace.gqa.{name}.scores.{sample}"][step]
            torch.testing.assert_close(out, expected, rtol=0, atol=ATOL)
            token = out.argmax().view(1, 1)
            assert token.item() == rows[sample]["tokens"][step]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
