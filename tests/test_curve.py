"""The curve of a live model with tensors, against the slow reference."""

import numpy as np
import pytest
import torch

import vtwcli
from tests import reference
from tests.test_runtime import llava_batch, model_of
from vtwcli.errors import NotFoundError

LAYOUTS = ["t3 i t5", "t2 i t3 i t2", "t6"]


def slow(model, batch, answers):
    """KL [rows with vision, L, R] by one full run for each layer."""
    visual = reference.visual_mask(model, batch["input_ids"])
    depth = len(reference.text_layers(model))

    def log_probs(k):
        return reference.logits(model, batch, reference.withdrawal(model, visual, k)).double().log_softmax(-1)

    full, found = log_probs(depth), []
    for row, mask in enumerate(batch["attention_mask"]):
        if visual[row].any():
            rows = mask.nonzero()[-answers - 1 :, 0]
            out = [log_probs(k)[row, rows] for k in range(depth)]
            found.append([(p.exp() * (p - full[row, rows])).sum(-1).numpy() for p in out])
    return np.array(found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("answers", [0, 1])
def test_curve_is_the_slow_reference(side, answers):
    model, batch = model_of(), llava_batch(LAYOUTS, side=side, dtype=torch.float64)
    found = vtwcli.curve(model, batch, answers=answers, eta=0.3, min_layer=1)
    expected = slow(model, batch, answers)
    np.testing.assert_allclose(np.array(found.positions), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.mean, expected.mean((0, 2)), rtol=0, atol=1e-9)
    small = np.flatnonzero(expected.mean((0, 2)) > 0.3)
    assert 0 < len(small) < 6
    assert found.layer == max(1, int(small[-1]) + 1 if len(small) else 0)
    assert found.schedule.to_dict()["actions"] == [{"at": found.layer, "action": "withdraw"}]
    assert found.agreement.shape == found.kl.shape == (2, len(reference.text_layers(model)))


def test_several_batches_are_one_curve():
    model = model_of()
    one, two = (llava_batch([rows]) for rows in LAYOUTS[:2])
    both = vtwcli.curve(model, [one, two])
    np.testing.assert_array_equal(both.kl[:1], vtwcli.curve(model, one).kl)
    np.testing.assert_array_equal(both.kl[1:], vtwcli.curve(model, two).kl)


def test_no_layer_qualifies_and_no_image():
    model = model_of()
    none = vtwcli.curve(model, llava_batch(LAYOUTS[:1]), eta=1e-12, min_layer=1)
    assert none.layer is None
    assert none.schedule is None
    with pytest.raises(NotFoundError, match="no row has a visual token"):
        vtwcli.curve(model, llava_batch(["t6"]))
    with pytest.raises(ValueError, match="needs costs or tasks"):
        vtwcli.curve(model, llava_batch(LAYOUTS[:1]), policy="budget")
    with pytest.raises(ValueError, match="the shortest row has 6"):
        vtwcli.curve(model, llava_batch(LAYOUTS), answers=6)


def test_it_leaves_the_model_alone():
    model, batch = model_of(), llava_batch(LAYOUTS[:1])
    before = model(**batch).logits
    vtwcli.curve(model, batch)
    assert torch.equal(model(**batch).logits, before)
