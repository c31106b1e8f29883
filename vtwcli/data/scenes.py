"""Scenes of coloured shapes and questions about them, all from a seed.

A scene holds one to five things on a 3 x 3 grid, no two of the same colour and shape. Eight tasks ask about it:

- ``colour``: "What colour is the star?" -> "red"
- ``shape``: "What shape is the red object?" -> "star"
- ``existence``: "Is there a red star?" -> "yes"
- ``count``: "How many objects are there?" -> "three"
- ``where``: "Where is the red star?" -> "top left"; two hops: find it, then tell its place
- ``relation``: "What is left of the red star?" -> "blue circle"; two hops: find it, then read its neighbour
- ``tally``: "How many red objects are there?", "How many stars are there?" -> "two"; two hops: find them, then count
- ``caption``: "Describe the image." -> "a red star, a blue circle and a green square", in reading order

A scene's seed holds the split in its highest bit, so training and evaluation seeds never meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "eval"]
T = TypeVar("T")

SIDE = 112  # pixels of an image
GRID = 3
MAX_THINGS = 5

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

ALL_TASKS = ("colour", "shape", "existence", "count", "caption", "where", "relation", "tally")
DEFAULT_TASKS = ALL_TASKS[:5]  # the others take two hops and need vision up to the last layers
TRAINED_TASKS = ("colour", "shape", "existence", "number", "caption", "where", "relation")
"""What training asks, in the order of its draws; ``number`` is a ``count`` or a ``tally``."""

_COUNTS = 0.3  # share of ``count`` among the numbers asked for in training
_SUPERSAMPLE = 3  # drawn larger, then shrunk: smooth edges


@dataclass(frozen=True)
class Thing:
    """One coloured shape: its cell (row, column) and its circumscribed circle in pixels."""

    colour: str
    shape: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """For example "red star"; unique in its scene."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order (row by row, left to right) on a background of one grey level."""

    things: tuple[Thing, ...]
    grey: int


@dataclass(frozen=True)
class Example:
    """One question about one image; ``image`` is RGB, ``SIDE`` x ``SIDE`` pixels."""

    id: str
    task: str
    image: Image.Image
    question: str
    answer: str


def scene_seed(split: Split, seed: int, index: int) -> int:
    """The seed of scene number ``index``: split in bit 62, ``seed`` in bits 32..61, ``index`` below.

    Raises:
        ValueError: an unknown split, or a number out of its range.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"unknown split {split!r}, expected train or eval")
    if not (0 <= seed < 1 << 30 and 0 <= index < 1 << 32):
        raise ValueError(f"seed {seed} or index {index} is out of range")
    return (split == "eval") << 62 | seed << 32 | index


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene. Half of the scenes draw from few colours, half from few shapes: things that share one."""
    count = int(rng.integers(1, MAX_THINGS + 1))
    colours = _choose(rng, tuple(COLOURS), 3 if rng.random() < 0.5 else len(COLOURS))
    shapes = _choose(rng, SHAPES, 3 if rng.random() < 0.5 else len(SHAPES))
    pairs = _choose(rng, [(colour, shape) for colour in colours for shape in shapes], count)
    cells = sorted(int(cell) for cell in rng.choice(GRID * GRID, count, replace=False))
    things = []
    for (colour, shape), cell in zip(pairs, cells, strict=True):
        row, column = divmod(cell, GRID)
        radius = float(rng.uniform(12, 16))
        room = SIDE / GRID / 2 - radius
        x = (column + 0.5) * SIDE / GRID + rng.uniform(-room, room)
        y = (row + 0.5) * SIDE / GRID + rng.uniform(-room, room)
        things.append(Thing(colour, shape, row, column, float(x), float(y), radius))
    return Scene(tuple(things), int(rng.integers(225, 251)))


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of ``SIDE`` x ``SIDE`` pixels."""
    side = SIDE * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), (scene.grey,) * 3)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        corners = [(_SUPERSAMPLE * x, _SUPERSAMPLE * y) for x, y in outline(thing)]
        pen.polygon(corners, fill=COLOURS[thing.colour])
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The corners (x, y) of a thing's polygon in pixels; a circle has 40."""
    if thing.shape == "cross":
        arm, tip = 0.32, 0.95
        polar = [(arm, tip), (arm, arm), (tip, arm), (tip, -arm), (arm, -arm), (arm, -tip)]
        points = polar + [(-x, -y) for x, y in polar]
    else:
        # corners on the circle as turns clockwise from the top, with their distance from the centre
        turns, radii = {
            "circle": (40, (0.9,)),
            "square": (4, (1.1,)),
            "triangle": (3, (1.05,)),
            "diamond": (4, (1.0, 0.65)),
            "star": (10, (1.05, 0.45)),
        }[thing.shape]
        start = 0.5 if thing.shape == "square" else 0.0
        points = []
        for corner in range(turns):
            angle, radius = 2 * pi * (corner + start) / turns, radii[corner % len(radii)]
            points.append((radius * sin(angle), -radius * cos(angle)))
    return [(thing.x + thing.radius * x, thing.y + thing.radius * y) for x, y in points]


def ask(scene: Scene, task: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of a task of ``ALL_TASKS`` or ``TRAINED_TASKS`` and its answer, or None if the scene admits none."""
    things = scene.things
    if task == "colour":
        once = [t for t in things if sum(o.shape == t.shape for o in things) == 1]
        if not once:
            return None
        thing = _pick(rng, once)
        return f"What colour is the {thing.shape}?", thing.colour
    if task == "shape":
        once = [t for t in things if sum(o.colour == t.colour for o in things) == 1]
        if not once:
            return None
        thing = _pick(rng, once)
        return f"What shape is the {thing.colour} object?", thing.shape
    if task == "existence":
        return _ask_existence(things, rng)
    if task == "count":
        return _ask_number(things, rng, 0.0)
    if task == "tally":
        return _ask_number(things, rng, rng.uniform(_COUNTS, 1))
    if task == "number":
        return _ask_number(things, rng, rng.random())
    if task == "where":
        thing = _pick(rng, things)
        return f"Where is the {thing.name}?", PLACES[thing.row][thing.column]
    if task == "relation":
        at = {(t.row, t.column): t for t in things}
        near = [
            (words, thing, at[thing.row + down, thing.column + right])
            for thing in things
            for words, (down, right) in STEPS.items()
            if (thing.row + down, thing.column + right) in at
        ]
        if not near:
            return None
        words, thing, other = _pick(rng, near)
        return f"What is {words} the {thing.name}?", other.name
    if task == "caption":
        names = [f"a{'n' if t.colour == 'orange' else ''} {t.name}" for t in things]
        listed = ", ".join(names[:-1])
        return "Describe the image.", f"{listed} and {names[-1]}" if listed else names[-1]
    raise ValueError(f"unknown task {task!r}, expected one of {', '.join(ALL_TASKS)}")


def examples(
    split: Split, count: int, seed: int = 0, tasks: Sequence[str] = DEFAULT_TASKS
) -> Iterator[Example]:
    """``count`` questions, each about a scene of its own, the tasks in turn.

    The same arguments give the same examples; a smaller ``count`` gives their beginning.

    Args:
        split: "train" or "eval"; their scenes come from disjoint seeds.
        count: number of examples.
        seed: another seed gives other scenes.
        tasks: some of ``ALL_TASKS``.

    Raises:
        ValueError: an unknown split or task, or no task.
    """
    unknown = [task for task in tasks if task not in ALL_TASKS]
    if unknown or not tasks:
        raise ValueError(f"unknown tasks {unknown}, expected some of {', '.join(ALL_TASKS)}")
    for index in range(count):
        rng = np.random.default_rng(scene_seed(split, seed, index))
        task = tasks[index % len(tasks)]
        asked = None
        while asked is None:
            scene = draw_scene(rng)
            asked = ask(scene, task, rng)
        yield Example(f"{split}:{seed}:{index}", task, render(scene), *asked)


def _ask_existence(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str]:
    """Yes and no equally often; most things asked for in vain share a colour or a shape with one that is there."""
    present = {t.name for t in things}
    if rng.random() < 0.5:
        name = _pick(rng, things).name
    else:
        colours = [t.colour for t in things] if rng.random() < 0.75 else tuple(COLOURS)
        shapes = [t.shape for t in things] if rng.random() < 0.5 else SHAPES
        absent = [f"{c} {s}" for c in dict.fromkeys(colours) for s in dict.fromkeys(shapes)]
        absent = [name for name in absent if name not in present]
        name = _pick(
            rng, absent or [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in present]
        )
    article = "an" if name.startswith("orange") else "a"
    return f"Is there {article} {name}?", "yes" if name in present else "no"


def _ask_number(things: Sequence[Thing], rng: np.random.Generator, kind: float) -> tuple[str, str]:
    """How many of all things, of a colour or of a shape, by ``kind`` in [0, 1); one in eight of the latter two asks
    for what may be absent."""
    common = rng.random() < 0.875
    if kind < _COUNTS:
        what, number = "objects", len(things)
    elif kind < 0.65:
        colour = _pick(rng, things).colour if common else _pick(rng, tuple(COLOURS))
        what, number = f"{colour} objects", sum(t.colour == colour for t in things)
    else:
        shape = _pick(rng, things).shape if common else _pick(rng, SHAPES)
        what, number = f"{shape}{'es' if shape == 'cross' else 's'}", sum(t.shape == shape for t in things)
    return f"How many {what} are there?", NUMBERS[number]


def _pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def _choose(rng: np.random.Generator, values: Sequence[T], count: int) -> list[T]:
    return [values[int(i)] for i in rng.permutation(len(values))[:count]]
