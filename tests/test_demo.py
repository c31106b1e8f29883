"""The demo: scenes against an independent reading, the training's arithmetic, and what the shipped model can do."""

from __future__ import annotations

import json
import math
import re
import stat
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtwcli.calibrate import calibrate
from vtwcli.data.scenes import (
    ALL_TASKS,
    COLOURS,
    DEFAULT_TASKS,
    SHAPES,
    SIDE,
    TRAINED_TASKS,
    Scene,
    Thing,
    ask,
    draw_scene,
    examples,
    outline,
    render,
    scene_seed,
)
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.demo import model_dir, train
from vtwcli.demo.card import accuracy
from vtwcli.demo.model import build_model, build_processor
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import CalibrateSection, ModelSection

# --- scenes -----------------------------------------------------------------------------------------------------


def test_same_seed_same_examples():
    first, again = list(examples("eval", 24, 3, ALL_TASKS)), list(examples("eval", 30, 3, ALL_TASKS))
    for one, other in zip(first, again, strict=False):
        assert (one.id, one.task, one.question, one.answer) == (
            other.id,
            other.task,
            other.question,
            other.answer,
        )
        assert one.image.tobytes() == other.image.tobytes()
    assert [one.task for one in first] == [*ALL_TASKS] * 3
    assert len({one.id for one in first}) == 24
    elsewhere = list(examples("eval", 24, 4, ALL_TASKS))
    assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(first, elsewhere, strict=True))


def test_seeds_of_the_splits_never_meet():
    numbers = [(seed, index) for seed in (0, 1, 2**30 - 1) for index in (0, 1, 2**32 - 1)]
    train_seeds = {scene_seed("train", *pair) for pair in numbers}
    eval_seeds = {scene_seed("eval", *pair) for pair in numbers}
    assert len(train_seeds) == len(eval_seeds) == len(numbers)
    assert max(train_seeds) < 2**62 <= min(eval_seeds)
    for bad in [("test", 0, 0), ("train", -1, 0), ("train", 2**30, 0), ("train", 0, 2**32)]:
        with pytest.raises(ValueError):
            scene_seed(*bad)


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="smell"):
        next(examples("eval", 1, tasks=("smell",)))
    with pytest.raises(ValueError, match="smell"):
        ask(draw_scene(np.random.default_rng(0)), "smell", np.random.default_rng(0))


def cell(thing: Thing) -> tuple[int, int]:
    """Column and row by where the thing is drawn, not by what it says of itself."""
    return int(thing.x * 3 // SIDE), int(thing.y * 3 // SIDE)


def true_answer(scene: Scene, question: str) -> str:
    """The answer by parsing the question's words and looking at what is drawn where."""
    things = [(thing.colour, thing.shape, *cell(thing)) for thing in scene.things]
    words = question.rstrip("?.").split()

    def among(values):
        (value,) = set(values)  # the question must have one answer
        return value

    if question.startswith("What colour"):
        return among(c for c, s, *_ in things if s == words[-1])
    if question.startswith("What shape"):
        return among(s for c, s, *_ in things if c == words[-2])
    if question.startswith("Is there"):
        return "yes" if (words[-2], words[-1]) in [thing[:2] for thing in things] else "no"
    if question.startswith("How many"):
        kind = words[2] if words[2] in COLOURS else re.sub("e?s$", "", words[2]).replace("circl", "circle")
        kind = {"squar": "square", "triangl": "triangle"}.get(kind, kind)
        number = sum(kind in ("object", c, s) for c, s, *_ in things)
        return ["zero", "one", "two", "three", "four", "five"][number]
    if question.startswith("Where"):
        x, y = among((x, y) for c, s, x, y in things if [c, s] == words[-2:])
        vertical, horizontal = ("top", "", "bottom")[y], ("left", "", "right")[x]
        return f"{vertical} {horizontal}".strip() or "middle"
    if question.startswith("What is"):
        x, y = among((x, y) for c, s, x, y in things if [c, s] == words[-2:])
        move = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[words[2]]
        return among(f"{c} {s}" for c, s, u, v in things if (u, v) == (x + move[0], y + move[1]))
    assert question == "Describe the image."
    phrases = [
        f"{'an' if c[0] in 'aeiou' else 'a'} {c} {s}"
        for c, s, *_ in sorted(things, key=lambda t: (t[3], t[2]))
    ]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_answers_are_true_of_the_scene(task):
    answers: Counter[str] = Counter()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        asked = ask(scene, task, rng)
        if asked is None:
            assert task in ("colour", "shape", "relation")
            continue
        question, answer = asked
        assert answer == true_answer(scene, question), question
        answers[answer] += 1
    assert sum(answers.values()) >= 200
    expected = {
        "existence": 2,
        "count": 5,
        "tally": 4,
        "where": 9,
        "colour": 6,
        "shape": 6,
        "relation": 30,
        "caption": 300,
    }
    assert len(answers) >= expected[task]
    if task == "existence":
        assert 0.4 < answers["yes"] / 400 < 0.6


def test_scenes_hold_one_to_five_distinct_things_inside_their_cells():
    sizes = Counter()
    for seed in range(300):
        things = draw_scene(np.random.default_rng(seed)).things
        sizes[len(things)] += 1
        assert len({thing.name for thing in things}) == len(things)
        assert len({cell(thing) for thing in things}) == len(things)
        for thing in things:
            assert cell(thing) == (thing.column, thing.row)
            x, y = np.array(outline(thing)).T
            assert SIDE / 3 * thing.column - 1 < x.min() and x.max() < SIDE / 3 * (thing.column + 1) + 1
            assert SIDE / 3 * thing.row - 1 < y.min() and y.max() < SIDE / 3 * (thing.row + 1) + 1
    assert set(sizes) == {1, 2, 3, 4, 5}


def test_pictures_show_the_scene():
    """Colour at every thing's centre, background in every empty cell."""
    for seed in range(40):
        scene = draw_scene(np.random.default_rng(seed))
        image = render(scene)
        assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
        pixels = np.asarray(image)
        background = (pixels == scene.grey).all(-1)
        for thing in scene.things:
            assert tuple(pixels[round(thing.y), round(thing.x)]) == COLOURS[thing.colour]
        taken = {cell(thing) for thing in scene.things}
        for column, row in {(c, r) for c in range(3) for r in range(3)} - taken:
            edges = [round(i * SIDE / 3) for i in range(4)]
            inside = background[
                edges[row] + 2 : edges[row + 1] - 2, edges[column] + 2 : edges[column + 1] - 2
            ]
            assert inside.all()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_their_area(shape):
    r = 16.0
    area = {
        "circle": math.pi * (0.9 * r) ** 2,
        "square": 2 * (1.1 * r) ** 2,
        "triangle": 3 * math.sqrt(3) / 4 * (1.05 * r) ** 2,
        "diamond": 2 * r * 0.65 * r,
        "star": 10 * 0.5 * 1.05 * r * 0.45 * r * math.sin(math.pi / 5),
        "cross": (2 * 2 * 0.95 * 2 * 0.32 - 4 * 0.32**2) * r**2,
    }[shape]
    image = render(Scene((Thing("red", shape, 1, 1, 56.0, 56.0, r),), 240))
    # the share of red in each pixel, from the green channel: 240 is background, 39 is red
    red = (240 - np.asarray(image)[..., 1].astype(float)) / (240 - COLOURS["red"][1])
    assert red.sum() == pytest.approx(area, rel=0.08)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained():
    processor = build_processor()
    model = build_model(processor.tokenizer, layers=2, width=32).eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return processor, model


def test_packed_questions_score_as_each_alone(untrained):
    """The loss of a packed batch equals that of every question in a prompt of its own, made by the processor."""
    processor, model = untrained
    packer = train.Packer(processor, images=3, seed=5)
    with torch.no_grad():
        packed = train.answer_loss(model, packer.batch(7))
    total = weight = 0.0
    for scene, rng in packer.scenes(7):
        for task in TRAINED_TASKS:
            asked = {ask(scene, task, rng) for _ in range(train.QUESTIONS[task])}
            for question, answer in sorted(pair for pair in asked if pair):
                turn = [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ]
                prompt = processor.apply_chat_template(turn[:1], add_generation_prompt=True)
                whole = processor.apply_chat_template(turn)
                length = processor(text=prompt, images=render(scene), return_tensors="pt")["input_ids"].shape[
                    1
                ]
                inputs = processor(text=whole, images=render(scene), return_tensors="pt")
                labels = inputs["input_ids"][0, length:]
                with torch.no_grad():
                    logits = model(**inputs).logits[0, length - 1 : -1]
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                share = train.CAPTION_WEIGHT if task == "caption" else 1
                total, weight = total + share * loss, weight + share * len(labels)
    assert packed.item() == pytest.approx(total / weight, rel=1e-5)


def test_patch_labels_agree_with_the_picture():
    """A labelled patch shows its colour and the shape that has it; the others are background for the most part."""
    scenes = [draw_scene(np.random.default_rng(seed)) for seed in range(20)]
    names = list(COLOURS)
    for scene, of_colour, of_shape in zip(scenes, *train.patch_labels(scenes), strict=True):
        pixels = np.asarray(render(scene))
        for i, (colour, shape) in enumerate(zip(of_colour.tolist(), of_shape.tolist(), strict=True)):
            y, x = 14 * (i // 8), 14 * (i % 8)
            patch = pixels[y : y + 14, x : x + 14].reshape(-1, 3)
            if colour == len(names):
                assert shape == len(SHAPES)
                assert (patch == scene.grey).all(1).mean() > 0.5
            else:
                assert (patch == COLOURS[names[colour]]).all(1).sum() >= 10
                assert (names[colour], SHAPES[shape]) in {(t.colour, t.shape) for t in scene.things}
        shown = {(names[c], SHAPES[s]) for c, s in zip(of_colour, of_shape, strict=True) if c < len(names)}
        assert shown == {(t.colour, t.shape) for t in scene.things}


TINY = train.Settings(
    seed=1, layers=2, width=32, images=3, steps_a=2, steps_b=3, images_c=2, steps_c=3, steps_d=2
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("demo") / "new" / "model"
    train.train(folder, TINY, threads)
    return folder


def test_training_writes_a_loadable_directory(trained):
    processor = AutoProcessor.from_pretrained(trained)
    model, problems = AutoModelForImageTextToText.from_pretrained(
        trained, dtype="float32", output_loading_info=True
    )
    assert not any(problems.values())
    example = next(examples("eval", 1))
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    assert prompt == f"USER: <image>\n{example.question} ASSISTANT:"
    inputs = processor(text=prompt, images=example.image, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    assert {stat.S_IMODE(file.stat().st_mode) for file in trained.iterdir()} == {0o644}


def test_training_in_parts_gives_the_same_weights(trained, tmp_path):
    """Stored after stage B and again after C: byte for byte the uninterrupted training."""
    threads = torch.get_num_threads()
    first, second, third = (tmp_path / name for name in "bcd")
    train.train(first, replace(TINY, steps_c=0, steps_d=0), threads)
    train.train(second, replace(TINY, steps_d=0), threads, start=first)
    train.train(third, TINY, threads, start=second)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second, third, trained)]
    assert weights[2] == weights[3]
    assert len(set(weights)) == 3
    assert json.loads((third / "training.json").read_text())["settings"] == asdict(TINY)


def test_no_two_stages_train_on_the_same_scene(monkeypatch, tmp_path):
    seen: list[int] = []

    def spy(split, seed, index):
        assert (split, seed) == ("train", TINY.seed)
        seen.append(index)
        return scene_seed(split, seed, index)

    monkeypatch.setattr(train, "scene_seed", spy)
    train.train(tmp_path, TINY, torch.get_num_threads())
    assert len(seen) == len(set(seen)) == 3 * (2 + 3) + 2 * (3 + 2)


def test_training_lowers_the_loss(untrained):
    processor, _ = untrained
    model = build_model(processor.tokenizer, layers=2, width=32)
    packer = train.Packer(processor, images=4, seed=0)
    batch = packer.batch(0)
    optimizers = train.Optimizers([model], 30, adam_rate=1e-2)
    losses = []
    for number in range(30):
        loss = train.answer_loss(model, batch)
        optimizers.step(number, loss)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(model.config.text_config.vocab_size), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


# --- the shipped model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return load("demo", dtype="float32")


@pytest.fixture(scope="module")
def card() -> str:
    return (model_dir() / "README.md").read_text(encoding="utf-8")


def numbers(card: str, after: str) -> list[list[str]]:
    """The body of the first table behind a line of the card."""
    lines = iter(card[card.index(after) :].splitlines())
    rows = [line for line in lines if line.startswith("|")]
    body = list(islice(rows, 2, None))
    table = []
    for row in body:
        cells = [one.strip() for one in row.strip("|").split("|")]
        if (table and len(cells) != len(table[0])) or cells[0] == "K":
            break
        table.append(cells)
    return table


def chosen(card: str) -> int:
    return int(re.search(r"\*\*K = (\d+) of", card)[1])


def test_shipped_model_is_small_and_readable():
    names = {file.name for file in model_dir().iterdir()}
    assert names == {
        "README.md",
        "analysis.png",
        "budget.png",
        "calibration.png",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(file.stat().st_size for file in model_dir().iterdir()) <= 8e6
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in model_dir().iterdir())


def test_shipped_model_loads_like_any_other():
    processor = AutoProcessor.from_pretrained(model_dir())
    model, problems = AutoModelForImageTextToText.from_pretrained(model_dir(), output_loading_info=True)
    assert not any(problems.values())
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"
    assert model.dtype == torch.float16


def test_shipped_model_answers_and_early_withdrawal_destroys(shipped, card):
    data = load_data([DataSpec(source="demo", split="test")], limit=40, seed=11).samples
    assert Counter(sample.task for sample in data) == dict.fromkeys(DEFAULT_TASKS, 40)
    full = accuracy(shipped, data)
    assert min(full.values()) >= 0.975
    assert sum(full.values()) / len(DEFAULT_TASKS) >= 0.98
    at_k = accuracy(shipped, data, chosen(card))
    assert sum(at_k.values()) / len(DEFAULT_TASKS) >= sum(full.values()) / len(DEFAULT_TASKS) - 0.01
    early = accuracy(shipped, data, 1)
    assert sum(early.values()) / len(DEFAULT_TASKS) < 0.5
    assert early["caption"] == 0


def test_card_holds_what_calibration_finds(card):
    """K of the card is that of a fresh calibration, strictly inside the model, and the hard task needs more layers."""
    result = calibrate(ModelSection(name="demo"), [], CalibrateSection(bootstrap=0))
    assert result["withdrawal_layer"] == chosen(card)
    assert 0 < chosen(card) < result["num_layers"]
    own = {task: k for task, _, k in numbers(card, "## Accuracy")}
    assert set(own) == set(ALL_TASKS)
    relation = result["num_layers"] if own["relation"] == "none" else int(own["relation"])
    assert relation > max(int(own[task]) for task in DEFAULT_TASKS)


def test_card_tables_tell_the_story(card):
    layers = int(re.search(r"K = \d+ of (\d+)", card)[1])
    kl = numbers(card, "Mean KL(P_pruned")
    kept = numbers(card, "Accuracy by withdrawal layer")
    assert [row[0] for row in kl] == [str(k) for k in range(layers)]
    assert [row[0] for row in kept] == [str(k) for k in range(layers + 1)]
    mix = [float(row[1]) for row in kl]
    assert mix[0] > 1 and mix[chosen(card)] < 0.003 < mix[4]
    assert mix[0] / mix[chosen(card)] > 300
    tasks = {row[0]: row[1] for row in numbers(card, "## Accuracy")}
    assert [tasks[task] for task in ALL_TASKS] == kept[-1][2:]
    share = [float(row[1].rstrip("%")) for row in kept]
    assert share[1] < 50 and share[-1] >= 98 and share[chosen(card)] >= share[-1] - 1
    assert all(float(tasks[task].rstrip("%")) >= 98 for task in DEFAULT_TASKS)
    assert max(later - earlier for earlier, later in pairwise(mix)) < 0.5
