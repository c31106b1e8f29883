"""Static caches under fixed schedules: the dynamic cache's tokens and logits, shorter layers, one graph a step."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from tests import reference, slow_schedule
from tests.parity import generated, last_of, same
from tests.test_runtime_schedules import SCHEDULES as ALL
from tests.tiny import TINY, VARIANTS, llava, llava_batch
from vtwcli.export.hf.export import export_hf
from vtwcli.models.generation import cache_of
from vtwcli.runtime import PruningError, entries, pruned
from vtwcli.runtime.plan import PlannedAction
from vtwcli.schedule.schedule import Schedule

ROWS = ["t3 i t5", "t2 i t3 i t2", "t4"]
STEPS = 10  # so many that windows of 8 slide on
MODELS = {
    "llava": TINY["llava"],
    "internvl": TINY["internvl"],
    "qwen2_5_vl": TINY["qwen2_5_vl"],
    "gemma3": TINY["gemma3"],
    "all windows": VARIANTS["llava-mistral-window"],
    "some windows": VARIANTS["gemma3-window"],
    "windows": VARIANTS["aya_vision-window"],
}
SCHEDULES = {
    name: ALL[name]
    for name in (
        "withdraw",
        "freeze",
        "mute",
        "mute all readers, half",
        "mute the prefill to zero",
        "mute to zero",
        "keep by contribution",
        "keep evenly",
        "mute, then withdraw",
        "keep and mute",
    )
}
FIRST = {name: ALL[name] for name in ("mute to the first", "everything")}


def schedule(actions: list[dict]) -> dict:
    return {"format_version": 1, "actions": actions}


def compiling(**options) -> CompileConfig:
    """For ``generate`` to compile its steps on a CPU too."""
    config = CompileConfig(fullgraph=True, **options)
    config._compile_all_devices = True
    return config


def both(model, batch: dict, actions: list[dict] | None, steps: int = STEPS, **options):
    """What the dynamic and the static cache hold behind ``generate``; tokens and logits must be the same."""
    given = None if actions is None else schedule(actions)
    dynamic, expected = generated(model, batch, given, steps, **options)
    static, logits = generated(model, batch, given, steps, cache_implementation="static", **options)
    assert torch.equal(dynamic.sequences, static.sequences)
    same(model, logits, expected)
    return cache_of(dynamic), cache_of(static)


# ------------------------------------------------------------------------------------------------ the same answers


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["ragged", "one"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_logits_are_those_of_the_dynamic_cache(name, rows, attn):
    model = MODELS[name].build(dtype=torch.float64, attn=attn)
    batch = MODELS[name].batch(rows, dtype=torch.float64)
    for actions in [*SCHEDULES.values(), *([] if "windows" in name else FIRST.values())]:
        dynamic, static = both(model, batch, actions)
        for layer, short, long in zip(static.layers, entries(static), entries(dynamic), strict=True):
            # a window's layer holds the newest token too; muted entries that only visual rows read are gone
            assert short <= (8 if layer.is_sliding and "windows" in name else long)


@pytest.mark.parametrize("name", ["withdraw", "keep evenly"])
def test_beams(name):
    model, batch = llava(dtype=torch.float64), llava_batch(ROWS, dtype=torch.float64)
    both(model, batch, SCHEDULES[name], num_beams=3)


def test_no_image_at_all():
    model, batch = llava(dtype=torch.float64), llava_batch(["t3", "t5"], dtype=torch.float64)
    both(model, batch, SCHEDULES["withdraw"])


@pytest.mark.parametrize("name", ["everything", "keep by attention twice"])
def test_against_the_slow_interpreter(name):
    model, batch = llava(dtype=torch.float64), llava_batch(ROWS, dtype=torch.float64)
    tokens, scores, _ = slow_schedule.greedy(model, batch, ALL[name], 4)
    out, logits = generated(model, batch, schedule(ALL[name]), 4, cache_implementation="static")
    assert torch.equal(out.sequences[:, batch["input_ids"].shape[1] :], tokens)
    same(model, logits, scores)


# ------------------------------------------------------------------------------------------------ what it holds


def test_layers_from_the_removal_on_are_as_short_as_they_can_be():
    model, batch = llava(), llava_batch(ROWS)
    visual, real = reference.visual_mask(model, batch["input_ids"]), batch["attention_mask"].bool()
    room = batch["input_ids"].shape[1] + STEPS - 1
    text = int((real & ~visual).sum(1).max()) + STEPS - 1
    _, static = both(model, batch, [{"at": 2, "action": "withdraw"}])
    assert entries(static) == [room] * 2 + [text] * 4
    _, kept = both(
        model,
        batch,
        [
            {"at": 1, "action": "keep", "select": {"score": "uniform", "count": 3}},
            {"at": 4, "action": "withdraw"},
        ],
    )
    three = max(int(r.sum()) - int(v.sum()) + min(3, int(v.sum())) for r, v in zip(real, visual, strict=True))
    assert entries(kept) == [room] + [three + STEPS - 1] * 3 + [text] * 2
    size = model.config.text_config.num_key_value_heads * 8 * 4 * len(ROWS) * 2
    held = sum(x.keys.nbytes + x.values.nbytes for x in static.layers)
    assert held == size * (2 * room + 4 * text)
    assert not (visual & last_of(real)).any()


def test_a_cache_of_ones_own_size_and_used_twice():
    model, batch = llava(dtype=torch.float64), llava_batch(ROWS, dtype=torch.float64)
    other = llava_batch(["t2 i t9", "t3", "i t2"], seed=5, dtype=torch.float64)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    for each in (batch, other):
        expected, logits = generated(model, each, 2, 6)
        out, found = generated(model, each, 2, 6, past_key_values=cache)
        assert torch.equal(out.sequences, expected.sequences)
        same(model, found, logits)
        gone = reference.visual_mask(model, each["input_ids"]).sum(1).min()
        assert gone == 0 or entries(cache)[5] < 64
        cache.reset()


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    ("name", "actions", "backend"),
    [
        ("llava", "withdraw", "inductor"),
        ("llava", "everything", "eager"),
        ("qwen2_5_vl", "keep by contribution", "eager"),
        ("some windows", "mute, then withdraw", "eager"),
    ],
)
def test_steps_compile_into_one_graph(name, actions, backend):
    torch._dynamo.reset()
    tiny, steps = MODELS[name], 4 if backend == "inductor" else STEPS
    model, batch = tiny.build(), tiny.batch(ROWS)
    options = {"cache_implementation": "static", "compile_config": compiling(backend=backend, mode=None)}
    expected, wanted = generated(model, batch, schedule(ALL[actions]), steps)
    counters.clear()
    with pruned(model, schedule(ALL[actions])):
        out = model.generate(**batch, **_plain(steps), **options)
        graphs = counters["stats"]["unique_graphs"]
        again = model.generate(**tiny.batch(ROWS, seed=3), **_plain(steps), **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted, rtol=0, atol=1e-4)
    # sliding layers are compiled anew when their window is full, as the library's are
    assert graphs == (2 if "windows" in name else 1) and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs, "a prompt of the same lengths was compiled for again"
    other = generated(model, tiny.batch(ROWS, seed=3), schedule(ALL[actions]), steps)[0]
    assert torch.equal(again.sequences, other.sequences)


def _plain(steps: int) -> dict:
    return {
        "max_new_tokens": steps,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


@torch.no_grad()
def test_the_compiled_forward_of_ones_own_loop():
    torch._dynamo.reset()
    model, batch = llava(), llava_batch(ROWS)
    mask, room = batch["attention_mask"], batch["input_ids"].shape[1] + STEPS
    expected = generated(model, batch, 2)[0].sequences[:, batch["input_ids"].shape[1] :]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room)
    with pruned(model, 2):
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        out = model(**batch, position_ids=reference.positions(mask), past_key_values=cache)
        said = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(3):
            mask = torch.cat([mask, torch.ones_like(said[-1])], 1)
            out = step(
                input_ids=said[-1],
                attention_mask=torch.nn.functional.pad(mask, (0, room - mask.shape[1])),
                position_ids=reference.positions(mask)[:, -1:],
                past_key_values=cache,
            )
            said.append(out.logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(said, 1), expected[:, :4])


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("name", ["auto withdraw", "auto, fixed end", "keep above"])
def test_what_each_prompt_decides_is_refused(name):
    model = llava()
    with pruned(model, schedule(ALL[name])):
        for rows in (ROWS, ["t3"]):
            with pytest.raises(PruningError, match=r"no lengths to fix; name layers, counts or ratios"):
                model.generate(**llava_batch(rows), max_new_tokens=2, cache_implementation="static")


def test_other_ways_to_go_on_are_refused():
    model, batch = llava(), llava_batch(ROWS)
    more, one = torch.full((3, 2), 5), torch.full((3, 1), 5)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with torch.no_grad(), pruned(model, 2):
        model(**batch, past_key_values=cache)
        with pytest.raises(PruningError, match="takes one token at a time"):
            model(input_ids=more, past_key_values=cache)
        with pytest.raises(PruningError, match="takes one token at a time"):
            model(**batch, past_key_values=cache)
        with pytest.raises(PruningError, match="cannot forget single tokens"):
            cache.layers[3].crop(-1)
    with torch.no_grad(), pytest.raises(PruningError, match="continue it under the same schedule"):
        model(input_ids=one, past_key_values=cache)
    with (
        torch.no_grad(),
        pruned(model, 3),
        pytest.raises(PruningError, match="not filled under this schedule"),
    ):
        model(input_ids=one, past_key_values=cache)


def test_a_first_visual_token_that_slides_out_of_the_window_is_refused():
    tiny = MODELS["all windows"]
    model, refused = tiny.build(), pytest.raises(PruningError, match="let the mute's 'during' be prefill")
    with pruned(model, schedule(FIRST["mute to the first"])), refused:
        model.generate(**tiny.batch(ROWS), max_new_tokens=2, cache_implementation="static")


def test_words_of_actions_that_static_steps_know():
    """A step on a static cache decides nothing. Whoever adds a word that acts behind the prompt (on positions, masks,
    values or entries of generated tokens) lets ``StaticPrunedLayer`` follow it, or ``static.greet`` refuse it."""
    known = (
        "action at until after when select positions rest every steps both_ways sink readers columns during"
    )
    assert {field.name for field in dataclasses.fields(PlannedAction)} == set(known.split())


# ------------------------------------------------------------------------------------------------ exported


CHILD = """
import json, sys
sys.modules["vtwcli"] = None  # the directory must do without
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText, CompileConfig

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
batch = torch.load(sys.argv[2], weights_only=True)
compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
compiled._compile_all_devices = True
for more in ({}, {"cache_implementation": "static"}, {"cache_implementation": "static", "compile_config": compiled}):
    out = model.generate(**batch, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **more)
    cache = getattr(out, "cache", None) or out.past_key_values
    print(json.dumps([out.sequences.tolist(), [int(x.keys.shape[2]) for x in cache.layers]]))
print(counters["stats"]["unique_graphs"])
"""


def test_an_exported_directory(tiny_dir, tmp_path):
    export_hf(str(tiny_dir), Schedule.withdraw_at(3), tmp_path / "out")
    torch.save(llava_batch(ROWS), tmp_path / "batch.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "out"), str(tmp_path / "batch.pt")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *answers, graphs = (json.loads(line) for line in done.stdout.splitlines())
    assert answers[0] == answers[1] == answers[2] and graphs == 1
    assert answers[0][1][0] > answers[0][1][3]
