"""ST3: trimming during the answer in plain torch, and what it leaves in the cache."""

import pytest
import torch

from tests import golden
from tests.plain import Plain, Rule
from tests.test_golden import answer
from vtwcli.errors import UsageError
from vtwcli.methods.method import Shape
from vtwcli.methods.st3 import ST3
from vtwcli.runtime import entries, pruned
from vtwcli.schedule.schedule import Schedule


def test_the_rule_written_out():
    plain, model = Plain(torch.float64), golden.model(torch.float64)
    hidden, visual = plain.sample(0)
    prompt, first, second = len(hidden), 3, 7
    kept, gone = {}, []

    def chosen(weights, row, tokens, share):
        score = weights[:, row].mean(0)
        return sorted(tokens, key=lambda i: -float(score[i]))[: -(-len(tokens) * share // 100)]

    def leave(layer, weights, present):
        if layer + 1 not in (first, second):
            return present
        if layer not in kept:
            tokens = visual.nonzero()[:, 0].tolist() if layer + 1 == first else kept[first - 1]
            kept[layer] = chosen(weights, prompt - 1, tokens, 50)
        newest = len(present) - 1
        step = newest + 1 - prompt
        if layer + 1 == first and step % 2 == 0 and step // 2 > len(gone):
            held = [i for i in kept[layer] if not any(i in left for _, left in gone)]
            gone.append((newest, set(held) - set(chosen(weights, newest, held, 75))))
        out = present.clone()
        out[:prompt] &= ~visual
        out[kept[layer]] = True
        return out

    def allowed(layer, causal):
        out = causal.clone()
        for row, left in gone:
            if layer >= first:
                out[row:, sorted(left)] = False
        return out

    tokens, logits = plain.greedy(0, 5, Rule(leave=leave, allowed=allowed))
    schedule = ST3(layers=[first, second], ratio=0.5, every=2, trim=0.75).schedule()
    mine, said, trace, lengths = answer(model, schedule, 0, 5)
    assert len(gone) == 2
    assert [layer.visual for layer in trace.samples[0].layers] == [576] * 3 + [288] * 4 + [144] * 5
    lost = set().union(*(left for _, left in gone))
    deep = len(set(kept[second - 1]) - lost)
    assert lengths == [576 + 59] * 3 + [288 - len(lost) + 59] * 4 + [deep + 59] * 5
    assert said == tokens
    torch.testing.assert_close(mine, logits.float(), rtol=0, atol=2e-6)


def test_beams_and_single_steps_go_on_with_what_is_left():
    model = golden.model()
    inputs = golden.inputs(model, 0)
    schedule = ST3(layers=[3], ratio=0.5, every=1, trim=0.5).schedule()
    wanted = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), pruned(model, schedule):
        beams = model.generate(**inputs, **wanted, num_beams=2)
        cache = model(**inputs).past_key_values
        for _ in range(3):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert beams.shape[1] == inputs["input_ids"].shape[1] + 4
    assert entries(cache)[2:4] == [631 + 3, 288 // 8 + 55 + 3]


def test_stages_are_scaled_and_rules_are_kept():
    assert ST3().fitted(Shape(12)).layers == (1, 2, 3, 4, 5, 6, 8, 9, 10, 11)
    assert ST3().fitted(Shape(12, 4)).layers[0] == 4
    assert ST3(layers="2, 4").fitted(Shape(32)).layers == (2, 4)
    data = ST3(layers=[2, 4]).schedule().to_dict()
    assert data["format_version"] == 2
    assert Schedule.from_dict(data) == ST3(layers=[2, 4]).schedule()
    for select in ({"score": "uniform", "ratio": 0.5}, {"score": "attention", "above": 0.5}):
        with pytest.raises(UsageError, match="'every' wants a fixed layer, and attention or contribution"):
            Schedule.from_dict([{"at": 2, "action": "keep", "every": 3, "select": select}])
