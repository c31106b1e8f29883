"""A model's own answers: in batches and from layers on disk the same tokens as one by one; who is answered together."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.processors import FAMILIES, save_processor
from vtwcli.calibrate import calibrate
from vtwcli.data.sample import Sample
from vtwcli.data.spec import DataSpec
from vtwcli.evaluate import evaluate
from vtwcli.io.console import Task
from vtwcli.machine import distributed
from vtwcli.measure import batches as module
from vtwcli.measure.answers import reference_answers
from vtwcli.measure.batches import answer_bytes, by_length
from vtwcli.measure.streamed import streamed_answers
from vtwcli.measure.study import Study
from vtwcli.models.generation import generate_answers, generate_batches, greedy, plain_generation
from vtwcli.models.inputs import encode
from vtwcli.models.loading import LoadedModel, load
from vtwcli.recipe.recipe import CalibrateSection, EvalSection, ModelSection
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.decode import decode
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.streaming import Streamed

TOKENS = 7


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(prompt: str, images: int, seed: int) -> Sample:
    return Sample(f"{seed}", "t", tuple(picture(seed + i) for i in range(images)), prompt)


ASKED = [
    ask("what is this?", 1, 1),
    ask("no image", 0, 2),
    ask("which of the two is red?", 2, 3),
    ask("x", 1, 5),
    ask("a question that is much longer than all of the others", 1, 6),
]


def family_model(name: str, folder) -> LoadedModel:
    """A tiny model of a family with its processor, from files; some token of an answer ends it."""
    if name == "llava":
        from tests.conftest import build_processor

        build_processor().save_pretrained(folder)
    else:
        save_processor(name, folder)
    model = tiny.TINY[name].build()
    model.save_pretrained(folder)
    loaded = load(str(folder), dtype="float32", device="cpu")
    end = int(generate_answers(loaded, ASKED[:1], TOKENS)[0][1][3])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 2], "pad_token_id": 0}))
    return load(str(folder), dtype="float32", device="cpu")


def tokens_of(answers) -> list[list[int]]:
    return [ids.tolist() for _, ids in answers]


@pytest.mark.parametrize("name", ["llava", *FAMILIES])
def test_answers_are_the_same_in_batches_and_from_disk(name, tmp_path):
    loaded = family_model(name, tmp_path)
    alone = generate_answers(loaded, ASKED, TOKENS)
    lengths = {len(ids) for _, ids in alone}
    assert len({tuple(ids) for ids in tokens_of(alone)}) > 2 and len(lengths) > 1
    loaded.processor.tokenizer.padding_side = "right"
    config = loaded.model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 9.0, 3.0
    for parts in ([ASKED], [ASKED[1::2], ASKED[::2]]):
        found = [answer for part in generate_batches(loaded, parts, TOKENS) for answer in part]
        expected = [alone[ASKED.index(sample)] for part in parts for sample in part]
        assert tokens_of(found) == tokens_of(expected)
        assert [text for text, _ in found] == [text for text, _ in expected]
    loaded = load(str(tmp_path), dtype="float32", device="cpu", weights=False)
    [first, second] = streamed_answers(loaded, Streamed(loaded), [ASKED[:3], ASKED[3:]], TOKENS)
    assert tokens_of(first + second) == tokens_of(alone)


def bare(name: str) -> tuple[LoadedModel, tiny.Tiny]:
    """A tiny model of a family without files or processor; a random one's tokens are far apart."""
    from vtwcli.models.families import FAMILIES as ALL

    family = tiny.TINY.get(name) or tiny.VARIANTS[name]
    model = family.build()
    row = ALL[model.config.model_type]
    place, processor = torch.device("cpu"), tiny_processor()
    return LoadedModel(model, processor, row, name, None, None, place, torch.float32), family


def tiny_processor():
    from types import SimpleNamespace

    return SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))


def every_family() -> list[str]:
    from vtwcli.models.families import FAMILIES as ALL

    return [name for name in (*tiny.TINY, *tiny.VARIANTS) if name not in ALL or not ALL[name].no_withdraw]


@pytest.mark.parametrize("name", every_family())
def test_layers_one_at_a_time_say_what_the_model_says(name):
    """Padded rows, several images, none; masks, positions and additions of every family."""
    loaded, family = bare(name)
    rows = ["t2 i t3", "t9", "t3 i t4 i t5"]
    batch, alone = family.batch(rows), family.batch(rows[:1])
    assert int(batch["attention_mask"][0].sum()) < batch["input_ids"].shape[1]
    with plain_generation(loaded):
        expected = greedy(loaded, batch, TOKENS)[0]
        first = greedy(loaded, alone, TOKENS)[0]
    assert torch.equal(first[0], expected[0])
    source = Resident(loaded.model, loaded.family)
    bar = Task("", None, None)
    found = decode(loaded, source, [batch, alone], [list("abc"), ["a"]], TOKENS, bar)
    assert torch.equal(found[0], expected) and torch.equal(found[1], first)
    assert bar.done == TOKENS


@pytest.fixture(scope="module")
def loaded(tiny_dir) -> LoadedModel:
    return load(str(tiny_dir))


def test_batches_are_alike_in_length_and_as_large_as_asked(loaded):
    samples = [ask("x" * (1 + 7 * i % 23), i % 3, i) for i in range(19)]
    lengths = [encode(loaded, sample).length for sample in samples]
    assert by_length(loaded, samples, 4, 1) == [[i] for i in range(19)]
    for size, largest in ((4, 4), (100, 19), (None, module.MOST)):
        found = by_length(loaded, samples, 4, size)
        assert sorted(place for part in found for place in part) == list(range(19))
        assert [len(part) for part in found] == [largest] * (19 // largest) + [19 % largest] * (
            19 % largest > 0
        )
        order = [lengths[place] for part in found for place in part]
        assert order == sorted(order)
    assert by_length(loaded, [], 4) == []


def test_memory_bounds_a_batch_and_processes_agree(loaded, monkeypatch):
    samples = [ask("x" * (1 + i), 1, i) for i in range(10)]
    lengths = [encode(loaded, sample).length for sample in samples]
    three = 3 * answer_bytes(loaded, lengths[-1], 4) / module.SHARE
    monkeypatch.setattr(module, "memory_available", lambda device: three)
    assert [len(part) for part in by_length(loaded, samples, 4)] == [3, 3, 3, 1]
    assert [len(part) for part in by_length(loaded, samples, 4, 5)] == [5, 5]
    # another process has room for one
    real = distributed.gathered
    monkeypatch.setattr(module.distributed, "gathered", lambda work: [*real(work), 1])
    assert [len(part) for part in by_length(loaded, samples, 4)] == [1] * 10


def test_what_an_answer_takes_is_about_what_is_counted(loaded):
    """Keys and values of 6 layers, 2 heads, 8 wide, in four bytes; two copies of 99 logits a token."""
    assert answer_bytes(loaded, 10, 4) == 6 * 14 * 2 * 2 * 8 * 4 + 2 * 4 * 4 * 99 + 10 * (6 * 32 + 3 * 48) * 4


def test_a_batch_that_fails_is_answered_one_by_one(loaded, monkeypatch):
    from vtwcli.models import generation

    expected = tokens_of(generate_answers(loaded, ASKED, 3))
    real, sizes = generation.greedy, []

    def narrow(loaded, batch, *rest):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 1:
            raise RuntimeError("out of memory")
        return real(loaded, batch, *rest)

    monkeypatch.setattr(generation, "greedy", narrow)
    assert tokens_of(generate_answers(loaded, ASKED, 3, 3)) == expected
    assert sizes == [3, 1, 1, 1, 2, 1, 1]


def without_run(result, *names):
    """A calibration without what differs, and without these options."""
    left = {name: value for name, value in result["options"].items() if name not in names}
    return {key: value for key, value in result.items() if key != "run"} | {"options": left}


@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_a_calibration_does_not_depend_on_batches(tiny_dir, data, size):
    def run(size):
        options = CalibrateSection(limit=3, max_new_tokens=4, bootstrap=0, eta=0.05, batch_size=size)
        return calibrate(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options)

    assert without_run(run(size), "batch_size") == without_run(run(4), "batch_size")


def test_a_streamed_calibration_generates_and_says_what_it_costs(tiny_dir, data, capsys, monkeypatch):
    def run(stream):
        options = CalibrateSection(
            limit=3, max_new_tokens=4, bootstrap=0, answers="generated", eta=0.05, batch_size=2
        )
        return calibrate(
            ModelSection(name=str(tiny_dir), stream=stream), [DataSpec(source=str(data))], options
        )

    whole = run(False)
    assert "read" not in capsys.readouterr().err
    reads = []
    real = Streamed.layers
    monkeypatch.setattr(Streamed, "layers", lambda self: reads.append(1) or real(self))
    streamed = run(True)
    assert "all 6 layers are read once for every token of the longest answer, at most 4 times" in (
        capsys.readouterr().err
    )
    assert len(reads) == 4 + 1  # and the sweep
    np.testing.assert_allclose(streamed["kl"]["samples"], whole["kl"]["samples"], rtol=1e-4, atol=1e-9)
    assert [len(row[0]) for row in streamed["kl"]["positions"]] == [4] * 6


def test_streamed_answers_go_in_groups_that_memory_has_room_for(tiny_dir, monkeypatch, capsys):
    from vtwcli.measure import streamed

    loaded = load(str(tiny_dir), weights=False)
    source = Streamed(loaded)
    expected = streamed_answers(loaded, source, [[one] for one in ASKED], 3)
    monkeypatch.setattr(streamed, "memory_available", lambda device: 0)
    assert "each of" not in capsys.readouterr().err
    found = streamed_answers(loaded, source, [[one] for one in ASKED], 3)
    assert [tokens_of(part) for part in found] == [tokens_of(part) for part in expected]
    assert "of each of 5 groups that memory has room for, at most 15 times" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_of_a_sample_depends_on_its_batch_only_where_its_answer_may(tiny_dir, data, dtype):
    def contents(**given):
        options = CalibrateSection(limit=3, max_new_tokens=2, **given)
        model = ModelSection(name=str(tiny_dir), dtype=dtype)
        return Study.open(model, [DataSpec(source=str(data))], options).contents()

    alone = contents(batch_size=1)
    assert len(set(alone)) == 6
    assert contents(answers="reference") == contents(positions="first") == alone
    assert (contents(batch_size=2) == alone) == (dtype == "float32")
    assert contents(batch_size=2) == contents(batch_size=2)


def test_logits_that_are_no_numbers_name_their_sample(loaded):
    from vtwcli.errors import NotFoundError

    broken = dataclasses.replace(loaded, model=tiny.llava())
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.fill_(math.nan)
    family = tiny.TINY["llava"]
    with pytest.raises(NotFoundError, match="sample 'a': the logits are not finite in float32"):
        source = Resident(broken.model, broken.family)
        decode(broken, source, [family.batch(["t3", "t4"])], [["a", "b"]], 2, Task("", None, None))


def test_answers_are_as_long_as_their_tasks_allow(loaded):
    longest = [2, None, 5, None, 2]
    samples = [replace(one, longest=most) for one, most in zip(ASKED, longest, strict=True)]
    for size in (None, 2):
        parts = by_length(loaded, samples, TOKENS, size)
        assert all(len({longest[place] for place in part}) == 1 for part in parts)
    free = generate_batches(loaded, [[one] for one in ASKED], TOKENS)
    wanted = [part[0][1][: most or TOKENS].tolist() for part, most in zip(free, longest, strict=True)]
    batches = [[samples[place] for place in part] for part in parts]
    for answers in (
        generate_batches(loaded, batches, TOKENS),
        streamed_answers(loaded, Streamed(loaded), batches, TOKENS),
    ):
        found = {
            place: ids
            for part, row in zip(parts, answers, strict=True)
            for place, ids in zip(part, tokens_of(row), strict=True)
        }
        assert [found[place] for place in range(5)] == wanted
    spoken = [replace(one, references=("a long answer indeed",)) for one in samples]
    assert [len(ids) for ids in reference_answers(loaded, spoken, TOKENS)] == [2, 7, 5, 7, 2]


@pytest.mark.parametrize("asked", [None, 3])
def test_a_command_has_one_length_only_if_it_is_asked_for(tiny_dir, data, asked):
    model = ModelSection(name=str(tiny_dir))
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text())
    specs = [
        DataSpec(source=str(data), max_new_tokens=2, task="short", limit=1),
        DataSpec(source=str(other), prompt="x", task="long", limit=1),
    ]
    options = EvalSection(limit=2, max_new_tokens=asked, timing=False, bootstrap=0)
    found, _ = evaluate(model, [("k2", Schedule.withdraw_at(2))], specs, options)
    said = {one["task"]: len(one["pruned"]["k2"]["kl"]) for one in found["samples"]}
    assert said == {"short": asked or 2, "long": asked or 48}
    assert [source.get("max_new_tokens") for source in found["data"]] == (
        [2, None] if asked is None else [None, None]
    )
    assert found["options"]["max_new_tokens"] == asked  # of several lengths there is no one number
    alike, _ = evaluate(model, [("k2", Schedule.withdraw_at(2))], specs[1:], options)
    assert alike["options"]["max_new_tokens"] == (asked or 48)
    for positions, longest in (("answer", (asked or 2, asked or 48)), ("first", (1, 1))):
        calibrating = CalibrateSection(
            limit=1, max_new_tokens=asked, bootstrap=0, eta=1e3, positions=positions, answers="generated"
        )
        curve = calibrate(model, specs, calibrating)["kl"]["positions"]
        assert [len(sample[0]) for sample in curve] == list(longest)
