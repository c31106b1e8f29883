"""Rules that choose visual tokens: against the rules by hand, the authors' numbers, and at their edges."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import golden, slow_selectors
from vtwcli.methods import METHODS
from vtwcli.runtime import entries, pruned
from vtwcli.runtime.picture import Picture
from vtwcli.runtime.select_diverse import farthest
from vtwcli.runtime.select_parts import penultimate, salience, scaled, top
from vtwcli.runtime.selectors import SELECTORS
from vtwcli.schedule.rules import KEYS, read
from vtwcli.schedule.words import ScheduleError, row

SAMPLES = range(4)


RULES = [name.removeprefix("tower_") for name in SELECTORS if name not in ("tower_cls", "tower_received")]


def select(rule, picture, count=None, **parameters):
    return SELECTORS[f"tower_{rule}"].choose(picture, count, **parameters)


def drawn(rows=8, columns=12, heads=2, width=12, depth=24, seed=0):
    """A picture of random numbers: keys and queries of width / heads a head, embeddings of 16."""
    make, n = torch.Generator().manual_seed(seed), rows * columns

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    features = normal(1 + n, width) + 2 * normal(1, width)
    layers = range(depth)
    return Picture(
        embeds=normal(n, 16) + normal(1, 16),
        question=normal(5, 16),
        grid=(rows, columns),
        cls={layer: (2 * normal(heads, 1 + n)).softmax(-1)[:, 1:] for layer in layers},
        received={layer: normal(1 + n).softmax(-1)[1:] for layer in layers},
        keys={layer: normal(1 + n, heads, width // heads) for layer in layers},
        queries={layer: normal(1 + n, heads, width // heads) for layer in layers},
        features=features,
        depth=depth,
    )


@pytest.fixture(scope="module")
def clip():
    """The pictures of the golden tower's four images; nothing stands behind its projector."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**json.loads((golden.HERE / "clip.config.json").read_text()))
    config._attn_implementation = "eager"
    tower = CLIPVisionModel(config).eval()
    weights = load_file(golden.HERE / "clip.safetensors")
    names = tower.state_dict()
    named = {
        name if name in names else name.removeprefix("vision_model."): one for name, one in weights.items()
    }
    missing, unexpected = tower.load_state_dict(named, strict=False)
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]
    taken = {"q_proj": {}, "k_proj": {}}
    for name, module in tower.named_modules():
        at, kind = name.split("."), name.rsplit(".", 1)[-1]
        if kind in taken:
            layer = int(at[at.index("layers") + 1])
            module.register_forward_hook(
                lambda _, __, out, to=taken[kind], layer=layer: to.update({layer: out})
            )
    pixels = load_file(golden.HERE / "clip.inputs.safetensors")["pixel_values"]
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    heads = config.num_attention_heads

    def split(kind, i):
        return {layer: one[i].unflatten(-1, (heads, -1)) for layer, one in taken[kind].items()}

    return [
        Picture(
            embeds=out.hidden_states[-2][i, 1:],
            question=torch.zeros(0, config.hidden_size),
            grid=(24, 24),
            cls={layer: one[i, :, 0, 1:] for layer, one in enumerate(out.attentions)},
            received={layer: one[i].mean((0, 1))[1:] for layer, one in enumerate(out.attentions)},
            keys=split("k_proj", i),
            queries=split("q_proj", i),
            features=out.hidden_states[-2][i],
            depth=config.num_hidden_layers,
        )
        for i in SAMPLES
    ]


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(
        found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol
    )


def array(values):
    return values.double().numpy()


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_golden_pictures_are_the_published_ones(clip, sample):
    document, arrays = golden.numbers("fastervlm")
    for name, rows in document["runs"].items():
        scores = salience(clip[sample], 22)
        close(scores, arrays["rank_scores"][sample], 1e-5)
        close(clip[sample].features[1:][rows[sample]["kept"]], arrays[f"{name}.features.{sample}"])
        assert top(scores, int(name[1:])).sort().values.tolist() == rows[sample]["kept"]


@pytest.fixture(scope="module")
def decoder():
    return golden.model()


@pytest.mark.parametrize("sample", SAMPLES)
def test_divprune_against_its_authors(decoder, sample):
    """Picks, answers, logits, and how many rows each layer has and caches."""
    document, arrays = golden.numbers("divprune")
    inputs = golden.inputs(decoder, sample)
    image = decoder.model.multi_modal_projector.features
    for name, rows in document["runs"]["gqa"].items():
        row, count = rows[sample], round(float(name[1:]) * golden.VISUAL)
        if row["same_order_fp64"]:
            assert farthest(image, count).tolist() == row["selection_order"]
        schedule = METHODS["divprune"](count=count).schedule()
        with torch.no_grad(), pruned(decoder, schedule) as running:
            out = decoder.generate(
                **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            [trace] = running.trace.samples
        end = golden.BEFORE + golden.VISUAL
        visual = [golden.BEFORE + i for i in trace.actions[0].kept]
        assert visual == [i for i in row["kept"] if golden.BEFORE <= i < end]
        assert {layer.rows for layer in trace.layers} == {row["len_in"]}
        assert out.sequences[0, -8:].tolist() == row["tokens"]
        assert entries(out.past_key_values) == row["kv_len_per_layer_after"]
        close(torch.cat(out.logits), arrays[f"gqa.{name}.scores.{sample}"], 2e-5)


@pytest.mark.parametrize(("dominant", "contextual"), [(54, 10), (162, 30), (1, 7)])
def test_visionzip(clip, dominant, contextual):
    for picture in (clip[0], drawn()):
        if dominant + contextual >= len(picture.embeds):
            continue
        found = select("visionzip", picture, dominant + contextual, contextual=contextual)
        layer = picture.depth - 2
        first, targets, rows = slow_selectors.visionzip(
            array(picture.features),
            array(picture.keys[layer]),
            array(picture.cls[layer]),
            dominant,
            contextual,
        )
        assert found.kept[1:].tolist() == first + targets
        assert int(found.kept[0]) == min(set(range(len(picture.embeds))) - set(first + targets))
        close(found.rows, rows)


def test_visionzip_shares_its_count_as_published():
    picture = drawn(24, 24)
    for count, contextual in ((64, 10), (128, 20), (192, 30)):
        default = select("visionzip", picture, count)
        given = select("visionzip", picture, count, contextual=contextual)
        assert torch.equal(default.kept, given.kept)
        assert torch.equal(default.rows, given.rows)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("sample", SAMPLES)
def test_prumerge(clip, plus, sample):
    picture = clip[sample]
    found = select("prumerge_plus" if plus else "prumerge", picture)
    query, keys = array(picture.queries[23][0]).ravel(), array(picture.keys[23]).reshape(577, -1)
    chosen, rows = slow_selectors.prumerge(array(picture.features), query, keys, plus)
    assert 1 < len(chosen) < 576
    assert found.kept[:-1].tolist() == chosen
    assert int(found.kept[-1]) not in chosen
    close(found.rows, rows)


def test_prumerge_of_a_given_count(clip):
    picture = clip[0]
    query, keys = array(picture.queries[23][0]).ravel(), array(picture.keys[23]).reshape(577, -1)
    chosen, rows = slow_selectors.prumerge(array(picture.features), query, keys, share=1 / 8)
    found = select("prumerge", picture, 73)
    assert found.kept[:-1].tolist() == chosen
    close(found.rows, rows)
    for count in (1, 2, 65, 129, 193, 400):
        few = select("prumerge_plus", picture, count)
        assert len(few.kept) == len(few.rows) <= count


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 9, 31])
def test_chosen_by_hand(count, seed):
    picture = drawn(seed=seed)
    n, embeds, features = len(picture.embeds), array(picture.embeds), array(picture.features)
    late = array(picture.cls[22].mean(0))
    assert select("divprune", picture, count).kept.tolist() == sorted(slow_selectors.divprune(embeds, count))
    assert select("vispruner", picture, count).kept.tolist() == slow_selectors.vispruner(
        features[1:], late, count
    )
    received = [array(picture.received[layer]) for layer in (8, 22)]
    for alpha in (0.1, 0.6, 1.0):
        expected = slow_selectors.hiprune(*received, count, 12, alpha)
        assert select("hiprune", picture, count, alpha=alpha).kept.tolist() == expected
    found = select("holov", picture, count)
    expected = slow_selectors.holov(embeds, late, count)
    assert found.kept[: len(expected)].tolist() == expected
    assert len(found.kept) == len(set(found.kept.tolist())) == count < n
    few = min(count, 14)  # embeddings have 16 dimensions
    for weight in (0, 0.5, 1):
        found = select("cdpruner", picture, few, relevance_weight=weight)
        assert found.kept.tolist() == slow_selectors.cdpruner(embeds, array(picture.question), few, weight)


@pytest.mark.parametrize("count", [1, 31, 40, 80])
def test_vscan(count):
    picture = drawn()
    found = select("vscan", picture, count)
    early, late = (array(picture.cls[layer].mean(0)) for layer in (5, 22))
    kept, rows = slow_selectors.vscan(early, late, array(picture.embeds), count, (8, 12))
    assert found.kept.tolist() == kept
    assert len(kept) == count // 2 // 16 * 16 + count - count // 2
    close(found.embeds, rows)


@pytest.mark.parametrize("count", [8, 16, 40])
def test_prunesid(count):
    picture = drawn(width=32)
    found = select("prunesid", picture, count)
    late = array(picture.cls[22].sum(0))
    expected = slow_selectors.prunesid(array(picture.features), late, count)
    assert found.kept[1:].tolist() == expected
    assert len(found.kept) == count
    close(found.rows, array(picture.features)[[0] + [1 + i for i in expected]], 0)


def test_holov_fills_with_zeros_what_full_crops_cannot_give():
    picture = drawn()
    heavy = torch.full((2, 96), 1e-4)
    heavy[:, :6] = 0.1
    picture = picture._replace(cls={22: heavy})
    found = select("holov", picture, 20)
    expected = slow_selectors.holov(array(picture.embeds), array(heavy.mean(0)), 20)
    assert len(expected) < 20
    assert found.kept[: len(expected)].tolist() == expected
    assert len(set(found.kept.tolist())) == 20
    assert torch.equal(found.embeds[: len(expected)], picture.embeds[expected])
    assert not found.embeds[len(expected) :].any()


def test_two_cuts_find_the_knee():
    picture = drawn()
    x = array(picture.features)
    similarity = [slow_selectors.cosine(x[0], one) for one in x[1:]]
    assert select("two_cuts", picture).kept.tolist() == slow_selectors.knee(similarity)
    assert select("two_cuts", picture, 5).kept.tolist() == sorted(slow_selectors.falling(similarity)[:5])
    curve = torch.cat([torch.tensor([9.0, 8.0, 7.0]), torch.linspace(1, 0.9, 93)])
    bare = picture._replace(features=None, cls={}, received={22: curve})
    assert select("two_cuts", bare).kept.tolist() == [0, 1, 2, 3]
    assert len(select("two_cuts", bare._replace(received={22: torch.ones(96)})).kept) == 96


def variants():
    """A class token's picture, one without it, one whose tokens are several patches without a grid, a constant one."""
    picture = drawn()
    bare = picture._replace(cls={}, features=picture.features[1:])
    bare = bare._replace(keys={layer: one[1:] for layer, one in bare.keys.items()}, queries={})
    rough = bare._replace(keys={}, features=None, grid=None)
    same = picture._replace(
        embeds=torch.ones_like(picture.embeds),
        features=torch.ones_like(picture.features),
        cls={layer: torch.full_like(one, 0.01) for layer, one in picture.cls.items()},
        received={layer: torch.full_like(one, 0.01) for layer, one in picture.received.items()},
        keys={layer: torch.ones_like(one) for layer, one in picture.keys.items()},
        queries={layer: torch.ones_like(one) for layer, one in picture.queries.items()},
    )
    return {"class": picture, "bare": bare, "rough": rough, "constant": same}


@pytest.mark.parametrize("kind", variants())
@pytest.mark.parametrize("word", RULES)
def test_edges(word, kind):
    picture = variants()[kind]
    n = len(picture.embeds)
    for count in (1, 2, 3, 17, 50, n - 1):
        found = select(word, picture, count)
        kept = found.kept.tolist()
        assert len(set(kept)) == len(kept)
        assert all(0 <= i < n for i in kept)
        if word in ("prumerge_plus", "vscan"):
            assert 0 < len(kept) <= count
        else:
            assert len(kept) == count
        for rows, like in ((found.rows, picture.features), (found.embeds, picture.embeds)):
            assert rows is None or (rows.shape == (len(kept), like.shape[1]) and rows.isfinite().all())
        assert found.rows is None or found.embeds is None
    for count in (n, n + 5):
        found = select(word, picture, count)
        assert (found.kept.tolist(), found.rows, found.embeds) == (list(range(n)), None, None)
    assert len(select(word, picture, 0).kept) == 0
    if row("score", f"tower_{word}").finds:
        assert 0 < len(select(word, picture).kept) <= n


@pytest.mark.parametrize("word", RULES)
def test_each_reads_what_it_says(word):
    """A picture with no more than a rule's row of the table suffices, in half precision too, and keeps its type."""
    full, defaults = drawn(), {name: key.default for name, key in KEYS.get(f"tower_{word}", {}).items()}
    needs = SELECTORS[f"tower_{word}"].needs(defaults)

    def only(given, layers):
        at = [round(x * full.depth) if isinstance(x, float) else x % full.depth for x in layers]
        return {layer: given[layer].bfloat16() for layer in at}

    half = full._replace(
        embeds=full.embeds.bfloat16(),
        cls=only(full.cls, needs.cls),
        received=only(full.received, needs.received),
        keys=only(full.keys, needs.keys),
        queries=only(full.queries, needs.queries),
        features=full.features.bfloat16() if needs.features else None,
    )
    assert select(word, half, 20, **defaults).kept.tolist() == select(word, half, 20).kept.tolist()
    found = select(word, half, 20)
    for rows in (found.rows, found.embeds):
        assert rows is None or rows.dtype == torch.bfloat16


def test_layers_scale_to_the_towers_depth():
    assert [scaled(8, depth) for depth in (1, 6, 12, 24, 27)] == [0, 2, 4, 8, 9]
    assert [penultimate(depth) for depth in (1, 2, 24, 27)] == [0, 0, 22, 25]


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"score": "tower_divprune", "found": True}, "finds no number of tokens"),
        ({"score": "tower_prumerge", "found": False}, "finds no number of tokens"),
        ({"score": "tower_prumerge", "found": True, "count": 3}, "give exactly one of"),
        ({"score": "tower_hiprune", "count": 3, "parameters": {"alpha": 2}}, "alpha is 2"),
        ({"score": "tower_divprune", "count": 3, "parameters": {"alpha": 0.1}}, "has no parameters"),
    ],
)
def test_what_a_selection_cannot_say(select, message):
    action = {"at": 0, "action": "keep", "select": select}
    with pytest.raises(ScheduleError, match=message):
        read({"format_version": 2, "actions": [action]})
