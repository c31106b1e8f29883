"""FasterVLM against its authors' numbers and against the plain model on a shorter prompt; its neighbours by hand."""

import pytest
import torch

from tests import golden
from vtwcli.methods import METHODS
from vtwcli.methods.method import Shape
from vtwcli.runtime import entries, pruned
from vtwcli.schedule.sentences import describe

STEPS = 4


@pytest.fixture(scope="module")
def model():
    return golden.seeing()


@torch.no_grad()
def answer(model, inputs, schedule):
    """Logits and tokens under a schedule, the kept tokens and the cache's entries by layer."""
    with pruned(model, schedule) as running:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        [sample] = running.trace.samples
    kept = sample.actions[0].kept
    return torch.cat(out.logits), out.sequences[0, -STEPS:].tolist(), kept, entries(out.past_key_values)


@torch.no_grad()
def shorter(model, inputs, kept):
    """The plain language model on the embeddings of text and the kept tokens alone, everything anew for each token."""
    ids, table = inputs["input_ids"], model.get_input_embeddings()
    whole = table(ids)
    image = model.model.multi_modal_projector(features(model, inputs["pixel_values"])[:, 1:])
    visual = ids[0] == golden.PLACEHOLDER
    whole[0, visual] = image[0]
    stays = ~visual
    stays[visual.nonzero()[kept, 0]] = True
    embeds, logits, tokens = whole[:, stays], [], []
    for _ in range(STEPS):
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits.append(model.lm_head(hidden[:, -1]))
        tokens.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, table(torch.tensor([[tokens[-1]]]))], 1)
    return torch.cat(logits), tokens


@torch.no_grad()
def features(model, pixels):
    """What the projector reads, with the class token."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("sample", range(4))
def test_the_published_numbers(model, sample):
    document, arrays = golden.numbers("fastervlm")
    inputs = golden.pictured(model, sample)
    assert len(document["runs"]) == 3
    for name, rows in document["runs"].items():
        count = int(name.removeprefix("n"))
        logits, tokens, kept, lengths = answer(model, inputs, METHODS["fastervlm"](count=count).schedule())
        assert kept == rows[sample]["kept"]
        of_kept = features(model, inputs["pixel_values"])[0, 1:][kept]
        torch.testing.assert_close(of_kept, arrays[f"{name}.features.{sample}"], rtol=0, atol=1e-4)
        assert lengths == [55 + count + STEPS - 1] * 12
        expected, expected_tokens = shorter(model, inputs, kept)
        assert tokens == expected_tokens
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def attention(model, pixels):
    """Attention weights of all layers of the tower, [layers, heads, 577, 577], by hand."""
    tower, found = model.model.vision_tower, []
    own = getattr(tower, "vision_model", tower)
    states = tower(pixels, output_hidden_states=True).hidden_states
    for layer, x in zip(own.encoder.layers, states[:-1], strict=True):
        x = layer.layer_norm1(x)[0]
        q, k = (
            part(x).view(577, 4, 8).transpose(0, 1)
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        found.append((q @ k.transpose(1, 2) * 8**-0.5).softmax(-1))
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("sample", range(2))
def test_its_neighbours(model, sample):
    inputs = golden.pictured(model, sample)
    weights = attention(model, inputs["pixel_values"])
    cls = weights[15:23, :, 0, 1:].mean(1).sum(0)
    received = weights[22].mean((0, 1))[1:]
    rows = received.view(24, 24).sum(1).argsort(descending=True)[:2]
    wanted = {
        "vtc_cls": cls.argsort(descending=True)[:64],
        "fopru": received.argsort(descending=True)[:64],
        "row": torch.cat([torch.arange(24) + 24 * row for row in rows]),
    }
    for name, tokens in wanted.items():
        method = METHODS["fopru" if name == "row" else name](
            count=64, **({"strategy": "row"} if name == "row" else {})
        )
        _, _, kept, _ = answer(model, inputs, method.schedule())
        assert kept == tokens.sort().values.tolist()


def test_in_words():
    says = [
        describe(METHODS[name](count=64, **more).schedule().actions[0], 32)
        for name, more in (("fastervlm", {}), ("vtc_cls", {}), ("fopru", {"strategy": "row"}))
    ]
    assert says == [
        "From layer 0 of 32 on only 64 visual tokens (in each image, most attention from the class token in vision "
        "layers -2 to -2) remain.",
        "From layer 0 of 32 on only 64 visual tokens (in each image, most attention from the class token in vision "
        "layers -9 to -2) remain.",
        "From layer 0 of 32 on only 64 visual tokens (in each image, best rows of tokens by attention received in "
        "vision layer -2) remain.",
    ]


def test_layers_of_the_sum_follow_the_tower():
    assert [METHODS["vtc_cls"]().fitted(Shape(32, tower_depth=n)).first for n in (24, 12, 2)] == [
        -9,
        -4,
        -2,
    ]
    assert METHODS["vtc_cls"](first=-5).fitted(Shape(32, tower_depth=12)).first == -5
