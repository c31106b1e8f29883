"""Methods that choose in front of the language model, against prompts shortened by hand and run afresh each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import parity, slow_selectors
from tests.plain_rows import Plain, State, best
from tests.tiny import TINY
from vtwcli.methods import METHODS
from vtwcli.methods.in_front import InFront
from vtwcli.methods.method import Shape
from vtwcli.models.families import family_of
from vtwcli.runtime import pruned

IMAGE, COUNT, STEPS = 60, 20, 3
PLAIN = ("tower_cls", "tower_received")  # scores with tests of their own
NAMES = [name for name, one in METHODS.items() if issubclass(one, InFront) and one.score not in PLAIN]


@pytest.fixture(scope="module")
def model():
    """A LLaVA whose tower has six layers and 8 x 8 patches."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=16,
        patch_size=2,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    made = LlavaForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for name, one in made.named_parameters():
            if "vision_tower" in name and one.ndim > 1:
                one.copy_(torch.randn_like(one) * 0.5)
            if "layers.5.self_attn.q_proj" in name:
                one.mul_(0.3)  # few outliers
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def batch():
    """One prompt: four rows of text, an image, six rows of text."""
    make = torch.Generator().manual_seed(1)
    text = torch.randint(1, 50, (10,), generator=make)
    ids = torch.cat([text[:4], torch.full((64,), IMAGE), text[4:]])[None]
    pixels = torch.randn(1, 3, 16, 16, generator=make, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def seen(model, batch):
    """What the tower shows: attentions, hidden states, queries and keys of each layer, as numpy arrays."""
    tower, found = model.model.vision_tower, {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out[0].numpy()}))
        for name, module in tower.named_modules()
        if name.endswith(("q_proj", "k_proj"))
    ]
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(batch["pixel_values"], output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation(before)
    for handle in handles:
        handle.remove()
    kept = {name.split("layers.")[1].replace(".self_attn.", " "): one for name, one in found.items()}
    return [one[0].numpy() for one in out.attentions], [one[0].numpy() for one in out.hidden_states], kept


def rows_by_hand(name, model, batch):
    """The language model's input rows that stand for the image under a method, [n, E]."""
    attentions, hidden, found = seen(model, batch)
    features, cls = hidden[-2], attentions[4][:, 0, 1:]

    def projected(rows):
        with torch.no_grad():
            return model.model.multi_modal_projector(torch.as_tensor(np.asarray(rows))[None])[0]

    everything = projected(features[1:])
    embeds = everything.numpy()
    question = model.get_input_embeddings()(batch["input_ids"][0, 68:]).detach().numpy()
    if name == "visionzip":
        contextual = round(COUNT * 10 / 64)
        keys = found["4 k_proj"].reshape(65, 2, 8)
        _, _, rows = slow_selectors.visionzip(features, keys, cls, COUNT - contextual, contextual)
        return projected(rows)
    if name in ("prumerge", "prumerge_plus"):
        _, rows = slow_selectors.prumerge(
            features, found["5 q_proj"][0], found["5 k_proj"], name == "prumerge_plus"
        )
        return projected(rows)
    if name == "prunesid":
        kept = slow_selectors.prunesid(features, cls.sum(0), COUNT)
        return projected(features[[0] + [1 + i for i in kept]])
    if name == "vscan":
        early = attentions[round(5 / 24 * 6)][:, 0, 1:].mean(0)
        return torch.as_tensor(slow_selectors.vscan(early, cls.mean(0), embeds, COUNT, (8, 8))[1])
    if name == "holov":
        kept = slow_selectors.holov(embeds, cls.mean(0), COUNT)
        return torch.cat([everything[kept], torch.zeros(COUNT - len(kept), 24, dtype=torch.float64)])
    received = [attentions[at].mean((0, 1))[1:] for at in (2, 4)]
    kept = {
        "divprune": lambda: sorted(slow_selectors.divprune(embeds, COUNT)),
        "cdpruner": lambda: slow_selectors.cdpruner(embeds, question, COUNT, 0.5),
        "vispruner": lambda: slow_selectors.vispruner(features[1:], cls.mean(0), COUNT),
        "hiprune": lambda: slow_selectors.hiprune(*received, COUNT, 8),
        "two_cuts": lambda: slow_selectors.knee(
            [slow_selectors.cosine(features[0], x) for x in features[1:]]
        ),
    }[name]()
    return everything[kept]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_a_shorter_prompt(name, model, batch):
    finds = METHODS[name].model_fields["ratio"].default is None
    given = {"second": 1} if name == "vscan" else {}  # its second cut has a test of its own
    schedule = METHODS[name](**given, **({} if finds else {"count": COUNT})).schedule()
    image = rows_by_hand(name, model, batch)
    assert 1 < len(image) < 64
    embed = model.get_input_embeddings()
    ids, tokens, scores = batch["input_ids"][0], [], []
    with torch.no_grad():
        for _ in range(STEPS):
            text = [embed(ids[:4]), image, embed(ids[68:]), embed(torch.tensor(tokens, dtype=torch.long))]
            hidden = model.model.language_model(inputs_embeds=torch.cat(text)[None]).last_hidden_state
            scores.append(model.lm_head(hidden[:, -1]))
            tokens.append(int(scores[-1].argmax()))
    out, logits = parity.generated(model, batch, schedule, STEPS)
    assert out.sequences[0, -STEPS:].tolist() == tokens
    # norms round to single precision, and sums of other lengths round differently
    torch.testing.assert_close(logits, torch.stack(scores, 1), rtol=0, atol=1e-6)
    assert out.past_key_values.layers[0].keys.shape[-2] == 10 + len(image) + STEPS - 1


def test_vscan_cuts_a_second_time(model, batch):
    """By the layer's own attention from the last row, in the shorter prompt; positions close up once more."""
    image, kept = rows_by_hand("vscan", model, batch), []

    def rule(plain: Plain, index: int, state: State) -> None:
        if index == 1:
            scores = plain.weights(index, state.x, state.pos)[:, state.last].mean(0)
            kept.append(state.keep(best(scores, state.image, -(-len(image) * 2 // 5))))
            state.renumber()

    ids = torch.cat(
        [batch["input_ids"][0, :4], torch.zeros(len(image), dtype=torch.long), batch["input_ids"][0, 68:]]
    )
    visual = range(4, 4 + len(image))
    tokens, logits, lengths = Plain(model).answer(ids, image, visual, rule, STEPS)
    schedule = METHODS["vscan"](count=COUNT, second=0.4, layer=1).schedule()
    out, got = parity.generated(model, batch, schedule, STEPS)
    assert out.sequences[0, -STEPS:].tolist() == tokens
    torch.testing.assert_close(got[0], logits, rtol=0, atol=1e-6)
    entries = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert entries == [length + STEPS - 1 for length in lengths]
    assert lengths == [10 + len(image), *[10 + len(kept[0])] * 2]


# grids without a class token, tiles without one grid, tiles of a class token, rows of three axes, merged patches
@pytest.mark.parametrize(
    "kind", ["llava_onevision", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_method_on_other_families(name, kind):
    """Tokens leave, and a prompt gives in a batch what it gives alone."""
    model = TINY[kind].build(dtype=torch.float64)
    schedule = METHODS[name](ratio=0.5).fitted(Shape.of(family_of(model.config), model.config)).schedule()
    schedule.check_depth(6, family_of(model.config).first_withdrawal)
    found = []
    for rows in (["t3 i t5", "t2 i t3 i t2"], ["t3 i t5"]):
        batch = TINY[kind].batch(rows, dtype=torch.float64)
        with torch.no_grad(), pruned(model, schedule) as running:
            logits = model(**batch).logits
            samples = running.trace.samples
        found.append((logits[0, batch["attention_mask"][0].bool()][-1], samples[0].actions[0].kept))
        for sample in samples:
            kept = sample.actions[0].kept
            assert kept
            assert len(set(kept)) == len(kept) < sample.visual
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
