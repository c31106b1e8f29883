"""Methods that keep in stages: each published rule written out, against the runtime, on the golden decoder's shape."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tests import golden
from tests.plain_rows import Plain, Rule, State, best
from tests.test_golden import answer
from vtwcli.methods.dart import Dart
from vtwcli.methods.himap import HiMAP
from vtwcli.methods.method import Shape
from vtwcli.methods.pyramiddrop import PyramidDrop
from vtwcli.methods.sparsevlm import SparseVLM, SparseVLMPlus
from vtwcli.methods.v2drop import V2Drop
from vtwcli.runtime import pruned

ATOL = 2e-5
STEPS = 4
VISUAL = range(golden.BEFORE, golden.BEFORE + golden.VISUAL)


@pytest.fixture(scope="module", params=["gqa", "mha"])
def model(request):
    return golden.model(mha=request.param == "mha")


def same(model, method, rule: Rule, sample: int = 0, steps: int = STEPS) -> list[list[int]]:
    """The rule by hand and the runtime agree; returns whom the runtime kept at each stage."""
    inputs = golden.inputs(model, sample)
    features = model.model.multi_modal_projector.features
    tokens, logits, lengths = Plain(model).answer(inputs["input_ids"][0], features, VISUAL, rule, steps)
    got, got_tokens, trace, entries = answer(model, method.schedule(), sample, steps)
    torch.testing.assert_close(got.double(), logits, rtol=0, atol=ATOL)
    assert got_tokens == tokens
    assert [layer.rows for layer in trace.samples[0].layers] == lengths
    assert entries == [n + steps - 1 for n in lengths]
    return [[golden.BEFORE + i if i >= 0 else i for i in one.kept] for one in trace.samples[0].actions]


@pytest.mark.parametrize("sample", [0, 2])
def test_pyramiddrop(model, sample):
    layers, ratios, kept = (3, 6, 9), (0.5, 0.3, 0.125), {}

    def rule(plain: Plain, index: int, state: State) -> None:
        if index in layers:
            scores = plain.weights(index, state.x, state.pos)[:, state.last].mean(0)
            ratio = ratios[layers.index(index)]
            kept[index] = state.keep(best(scores, state.image, int(golden.VISUAL * ratio)))
            state.renumber()

    found = same(model, PyramidDrop(layers=layers, ratios=ratios), rule, sample)
    assert found == [kept[index] for index in layers]
    assert [len(one) for one in found] == [288, 172, 72]


@pytest.mark.parametrize("sample", [0, 3])
def test_himap(model, sample):
    counts, kept = {2: 288, 8: 72}, {}

    def rule(plain: Plain, index: int, state: State) -> None:
        if index in counts:
            assert state.weights is not None
            rows = state.question if index == 2 else state.image
            scores = state.weights.mean(0)[rows].sum(0)
            kept[index] = state.keep(best(scores, state.image, counts[index]))

    found = same(model, HiMAP(), rule, sample)
    assert found == [kept[2], kept[8]]


def test_himap_as_published_ranks_anew_at_every_step(model):
    counts, kept = {2: 200, 8: 50}, []

    def rule(plain: Plain, index: int, state: State) -> None:
        if index in counts:
            rows = state.question if index == 2 else state.image
            scores = state.weights.mean(0)[rows].sum(0)
            kept.append(state.keep(best(scores, state.image, counts[index])))

    inputs = golden.inputs(model, 1)
    args = inputs["input_ids"][0], model.model.multi_modal_projector.features, VISUAL, rule, 3
    tokens, logits, _ = Plain(model).answer(*args, anew=True)
    for step in range(3):
        with torch.no_grad(), pruned(model, HiMAP(counts=[200, 50]).schedule()) as running:
            out = model(**inputs, use_cache=False).logits[0, -1]
        torch.testing.assert_close(out.double(), logits[step], rtol=0, atol=ATOL)
        stages = running.trace.samples[0].actions
        assert [[golden.BEFORE + i for i in one.kept] for one in stages] == kept[2 * step : 2 * step + 2]
        assert int(out.argmax()) == tokens[step]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], out.argmax().view(1, 1)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


@pytest.mark.parametrize("sample", [1, 2])
def test_v2drop(model, sample):
    counts, kept = {2: 288, 6: 144, 8: 1}, {}

    def rule(plain: Plain, index: int, state: State) -> None:
        if index in counts:
            assert state.before is not None
            scores = (state.x - state.before).norm(dim=1)
            kept[index] = state.keep(best(scores, state.image, counts[index]))

    found = same(model, V2Drop(layers=[2, 6, 8]), rule, sample)
    assert found == list(kept.values())


@pytest.mark.parametrize(("ratio", "count"), [(0.333, 188), (0.111, 60)])
def test_dart(model, ratio, count):
    kept = []

    def rule(plain: Plain, index: int, state: State) -> None:
        if index != 2:
            return
        assert state.keys is not None
        z = plain.norm(state.x, plain.text.norm.weight)
        z = z / z.norm(dim=1, keepdim=True)
        size = state.keys.transpose(0, 1).flatten(1).abs().sum(1)
        image, text = best(size, state.image, 4), best(size, state.question, 4)
        chosen, pool = set(image), set(state.image) - set(image)
        for pivot in image + text:
            near = sorted(pool, key=lambda j: float(z[pivot] @ z[j]))[: int(golden.VISUAL * ratio / 8)]
            chosen |= set(near)
            pool -= set(near)
        kept.append(state.keep(sorted(chosen)))

    found = same(model, Dart(ratios=ratio), rule)
    assert found == kept[:1]
    assert len(found[0]) == count


def raters(plain: Plain, state: State) -> list[int]:
    """Who rates, of the rows of text behind the image."""
    image, text = state.x[VISUAL.start : VISUAL.stop], state.x[VISUAL.stop : state.prompt]
    share = (image @ text.T).softmax(1).mean(0)
    return [VISUAL.stop + j for j in range(len(text)) if share[j] > share.mean()]


@pytest.mark.parametrize("tokens", [192, 64])
def test_sparsevlm(model, tokens):
    counts, kept = {192: (300, 200), 64: (66, 30)}[tokens], []

    def rule(plain: Plain, index: int, state: State) -> None:
        if index == 0:
            state.notes["raters"] = raters(plain, state)
        if index not in (3, 7):
            return
        assert state.weights is not None
        rows = [state.who.index(j) for j in state.notes["raters"]]
        scores = state.weights.mean(0)[rows].mean(0)
        image = state.image
        chosen = best(scores, image, counts[index == 7])
        dropped = sorted(set(image) - set(chosen), key=lambda j: -float(scores[j]))
        dropped = dropped[: int(0.3 * len(dropped)) + 1]
        merged = means(state.x[dropped], int(len(dropped) / 10) + 1)
        name = min([0, *state.who])
        kept.append(state.keep(chosen))
        at = state.image[-1] + 1
        state.x = torch.cat([state.x[:at], merged, state.x[at:]])
        state.who[at:at] = [name - 1 - c for c in range(len(merged))]
        state.renumber()

    found = same(model, SparseVLM(layers=[3, 7], counts=counts), rule, sample=2)
    assert found == kept[:2]
    assert any(i < 0 for i in found[1]), "no merged token stayed"


def means(x: torch.Tensor, n: int) -> torch.Tensor:
    """The published clustering, its noise drawn from seed 0."""
    apart = torch.stack([(x - row).norm(dim=1) for row in x]) / x.shape[1] ** 0.5
    density = (-(apart.sort(1).values[:, :n] ** 2).mean(1)).exp()
    density = density + torch.rand(len(x), generator=torch.Generator().manual_seed(0)) * 1e-6
    far = torch.stack(
        [
            apart[i][density > density[i]].min() if (density > density[i]).any() else apart.max()
            for i in range(len(x))
        ]
    )
    centres = (density * far).sort(descending=True).indices[:n].tolist()
    owner = [centres.index(i) if i in centres else int(apart[i, centres].argmin()) for i in range(len(x))]
    groups = [[i for i, o in enumerate(owner) if o == c] for c in range(n)]
    return torch.stack([x[group].sum(0) / (len(group) + 1e-6) for group in groups])


@pytest.mark.parametrize("sample", [0, 3])
def test_sparsevlm_plus(model, sample):
    counts, heads, kept = {3: 300, 7: 200}, 2, {}

    def rule(plain: Plain, index: int, state: State) -> None:
        if index == 0:
            state.notes["raters"] = raters(plain, state)
        if index not in counts:
            return
        assert state.weights is not None
        rows, image = [state.who.index(j) for j in state.notes["raters"]], state.image
        ones = plain.turned(torch.ones(1, len(state.who), plain.width, dtype=state.x.dtype), state.pos)[0]
        weights = state.weights / (ones @ ones.T / plain.width**0.5)
        strength = weights[:, rows][:, :, image].sum((1, 2))
        scores = weights[strength.topk(heads).indices].mean(0)[rows].mean(0)
        kept[index] = state.keep(best(scores, image, counts[index]))

    found = same(model, SparseVLMPlus(layers=[3, 7], counts=[300, 200], heads=heads), rule, sample)
    assert found == list(kept.values())


def test_published_numbers_of_tokens():
    for method, counts in (
        (SparseVLM(), [300 + 9, 200 + 4, 110 + 3]),
        (SparseVLM(tokens=64), [66 + 16, 30 + 2, 17 + 1]),
        (SparseVLMPlus(tokens=96), [246, 54, 28]),
    ):
        visual = method.schedule().visual_per_layer(32, golden.VISUAL)
        assert [visual[at] for at in (3, 7, 16)] == counts
    assert SparseVLM(tokens=192).schedule() == SparseVLM().schedule()
    assert SparseVLM(tokens=64).fitted(Shape(16)).amounts()[0] == {"share": 66 / 576}
    with pytest.raises(ValidationError, match="tokens: 100 is not one of 192, 128, 96, 64"):
        SparseVLM(tokens=100)
    with pytest.raises(ValidationError, match="give one of tokens and counts"):
        SparseVLM(tokens=64, counts=3)


def test_stages_are_scaled_to_the_depth():
    fitted = PyramidDrop().fitted(Shape(12))
    assert (fitted.layers, fitted.ratios) == ((3, 6, 9), (0.5, 0.25, 0.125))
    assert PyramidDrop(layers="2, 4", counts=9).fitted(Shape(40)).amounts() == [{"count": 9}] * 2
