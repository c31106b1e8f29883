"""Train the demo model from nothing: ``python -m vtwcli.demo.train --output DIR``.

Stage A teaches the vision tower alone which colour and which shape each patch shows. Stage B trains everything end
to end on questions and answers. Stages C and D go on at lower learning rates with more of the questions that the
stage before had not learned yet. Muon (Jordan et al., 2024) drives the matrices of the layers, AdamW the rest. The
model never sees a run without its visual tokens: what withdrawal does to it is found, not trained.

Axes: B images, P prefix (text and visual tokens up to the question), S packed sequence, D width.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtwcli.data.scenes import COLOURS, SHAPES, TRAINED_TASKS, Scene, ask, draw_scene, render, scene_seed
from vtwcli.demo.card import RECORD, write_card
from vtwcli.demo.model import PATCH, PATCHES, PatchReader, build_model, build_processor

QUESTIONS = {"colour": 1, "shape": 1, "existence": 2, "number": 2, "caption": 1, "where": 1, "relation": 2}
# The later stages dwell on what was learned last: stage, questions, factor on the learning rates.
LATER = (
    ("C", {**QUESTIONS, "colour": 4, "existence": 4, "relation": 1}, 0.5),
    ("D", {**QUESTIONS, "colour": 2, "existence": 3, "number": 5, "relation": 1}, 0.4),
)
CAPTION_WEIGHT = 0.5  # of a caption's token in the loss; captions have many
MUON_RATE, ADAM_RATE, DECAY = 0.02, 2e-3, 0.05


@dataclass(frozen=True)
class Batch:
    """Images with all their questions packed behind one prefix.

    Attributes:
        pixels: [B, 3, SIDE, SIDE], normalised.
        ids, positions: [B, S]; each question restarts at position P.
        branch: [B, S], 0 in the prefix, 1.. for the questions, -1 for padding.
        labels: [B, S], the next token where it belongs to an answer, else -100.
        weights: [B, S], the weight of each label in the loss.
    """

    pixels: Tensor
    ids: Tensor
    positions: Tensor
    branch: Tensor
    labels: Tensor
    weights: Tensor


class Packer:
    """Training scenes as tensors; step number ``n`` always holds the same scenes."""

    def __init__(
        self, processor: Any, images: int, seed: int, questions: Mapping[str, int] = QUESTIONS
    ) -> None:
        self.images, self.seed, self.questions = images, seed, questions
        self.tokenizer = processor.tokenizer
        self.end = self.tokenizer.eos_token_id
        image = processor.image_processor
        self.mean, self.std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
        marks = processor.image_token * PATCHES**2
        self.prefix = self.tokenizer(f"USER: {marks}\n")["input_ids"]
        self.encode = cache(self._encode)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def scenes(self, step: int) -> Iterator[tuple[Scene, np.random.Generator]]:
        """The scenes of a step and the random numbers with which to go on."""
        for index in range(step * self.images, (step + 1) * self.images):
            rng = np.random.default_rng(scene_seed("train", self.seed, index))
            yield draw_scene(rng), rng

    def pixels(self, scenes: Iterable[Scene]) -> Tensor:
        """What the processor makes of the images, [B, 3, SIDE, SIDE]."""
        raw = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
        return ((raw / 255 - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()

    def batch(self, step: int) -> Batch:
        """All tasks' questions about the scenes of a step."""
        drawn = list(self.scenes(step))
        rows = [self._row(scene, rng) for scene, rng in drawn]
        length = -(-max(len(row) for row in rows) // 16) * 16
        table = torch.tensor([row + [(0, 0, -1, -100, 0.0)] * (length - len(row)) for row in rows])
        ids, positions, branch, labels = table[..., :4].long().unbind(-1)
        return Batch(self.pixels(scene for scene, _ in drawn), ids, positions, branch, labels, table[..., 4])

    def _row(self, scene: Scene, rng: np.random.Generator) -> list[tuple[int, int, int, int, float]]:
        """(id, position, branch, label, weight) of each token of one image."""
        row = [(token, at, 0, -100, 0.0) for at, token in enumerate(self.prefix)]
        branch = 0
        for task in TRAINED_TASKS:
            asked = {ask(scene, task, rng) for _ in range(self.questions[task])}
            for question, answer in sorted(pair for pair in asked if pair):
                branch += 1
                prompt, reply = self.encode(f"{question} ASSISTANT:"), [*self.encode(f" {answer}"), self.end]
                tokens = [*prompt, *reply]
                weight = CAPTION_WEIGHT if task == "caption" else 1.0
                for i, token in enumerate(tokens[:-1]):
                    answers = i >= len(prompt) - 1
                    label = (tokens[i + 1], weight) if answers else (-100, 0.0)
                    row.append((token, len(self.prefix) + i, branch, *label))
        return row


def branch_mask(branch: Tensor) -> Tensor:
    """Additive mask [B, 1, S, S]: tokens read earlier ones of the prefix and of their own question, and themselves."""
    key, query = branch[:, None, :], branch[:, :, None]
    earlier = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool).tril()
    seen = earlier & ((key == 0) | (key == query))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """Weighted mean cross entropy of the answer tokens, in nats."""
    base = model.model
    features = torch.stack(list(base.get_image_features(batch.pixels).pooler_output))
    embeds = base.get_input_embeddings()(batch.ids)
    visual = (batch.ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(visual, features.to(embeds.dtype))
    hidden = base.language_model(
        inputs_embeds=embeds,
        attention_mask=branch_mask(batch.branch),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    asked = batch.labels >= 0
    losses = F.cross_entropy(model.lm_head(hidden[asked]).float(), batch.labels[asked], reduction="none")
    weights = batch.weights[asked]
    return (losses * weights).sum() / weights.sum()


def patch_labels(scenes: Iterable[Scene]) -> tuple[Tensor, Tensor]:
    """Number of the colour and of the shape at each patch's centre, [B, patches]; the last number is "nothing"."""
    centre = (np.arange(PATCHES) + 0.5) * PATCH
    colours, shapes = [], []
    for scene in scenes:
        colour = np.full((PATCHES, PATCHES), len(COLOURS))
        shape = np.full((PATCHES, PATCHES), len(SHAPES))
        for thing in scene.things:
            there = np.hypot(centre[:, None] - thing.y, centre[None] - thing.x) < thing.radius
            colour[there] = list(COLOURS).index(thing.colour)
            shape[there] = SHAPES.index(thing.shape)
        colours.append(colour.ravel())
        shapes.append(shape.ravel())
    return torch.from_numpy(np.stack(colours)), torch.from_numpy(np.stack(shapes))


class Optimizers:
    """Muon for the layers' matrices, AdamW for the rest; warm-up, then a cosine to zero."""

    def __init__(
        self, modules: Iterable[nn.Module], steps: int, adam_rate: float, muon_rate: float = MUON_RATE
    ) -> None:
        named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if ".layers." in n and p.ndim == 2]
        rest = [p for n, p in named if not (".layers." in n and p.ndim == 2)]
        self.both = (
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=DECAY, momentum=0.95, nesterov=True),
            torch.optim.AdamW(rest, lr=adam_rate, weight_decay=DECAY, betas=(0.9, 0.98)),
        )
        self.rates = (muon_rate, adam_rate)
        self.steps, self.warmup = steps, max(1, steps // 8)
        self.parameters = [*matrices, *rest]

    def step(self, number: int, loss: Tensor) -> None:
        """Update ``number`` of ``steps``, 0-based."""
        late = max(0.0, (number - self.warmup) / max(1, self.steps - self.warmup))
        scale = min(1.0, (number + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * late))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.both, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()


def autocast() -> Any:
    """bfloat16 matrix products: several times as fast where the CPU has AMX or AVX512-BF16."""
    return torch.autocast("cpu", torch.bfloat16)


def stage_a(model: Any, packer: Packer, steps: int) -> float:
    """The vision tower learns what each patch shows. Returns the last accuracy of the shape on things' patches."""
    tower = model.model.vision_tower
    reader = PatchReader(tower.config.hidden_size, len(COLOURS) + 1, len(SHAPES) + 1)
    optimizers = Optimizers([tower, reader], steps, adam_rate=3e-3)
    right = 0.0
    for step in range(steps):
        scenes = [scene for scene, _ in packer.scenes(step)]
        colour, shape = patch_labels(scenes)
        with autocast():
            features = tower(packer.pixels(scenes), output_hidden_states=True).hidden_states[-1][:, 1:]
            of_colour, of_shape = reader(features)
        loss = F.cross_entropy(of_colour.float(), colour) + F.cross_entropy(of_shape.float(), shape)
        optimizers.step(step, loss)
        there = shape < len(SHAPES)
        right = (of_shape.argmax(1) == shape)[there].float().mean().item()
        if step % 50 == 0 or step == steps - 1:
            print(f"A {step:5d}  loss {loss.item():.4f}  shapes right {right:.4f}", flush=True)
    return right


def learn_answers(model: Any, packer: Packer, steps: int, first: int, scale: float, stage: str) -> None:
    """End to end on answers, over the scenes of steps ``first``...; ``scale`` multiplies the learning rates."""
    optimizers = Optimizers([model], steps, ADAM_RATE * scale, MUON_RATE * scale)
    began, mean = time.perf_counter(), 0.0
    for step in range(steps):
        with autocast():
            loss = answer_loss(model, packer.batch(first + step))
        optimizers.step(step, loss)
        mean += (loss.item() - mean) / min(step + 1, 50)
        if step % 50 == 0 or step == steps - 1:
            pace = (time.perf_counter() - began) / (step + 1)
            print(f"{stage} {step:5d}  loss {mean:.5f}  {pace:.2f} s/step", flush=True)


@dataclass(frozen=True)
class Settings:
    """All that shapes the model; the defaults are those of the shipped one."""

    seed: int = 0
    layers: int = 12
    width: int = 128
    images: int = 48
    steps_a: int = 400
    steps_b: int = 1200
    images_c: int = 24  # and of the stages after it
    steps_c: int = 800
    steps_d: int = 500


def train(output: Path, settings: Settings, threads: int, start: Path | None = None) -> None:
    """Train a model and write it to ``output`` in float16, with its processor and a record of the training.

    Args:
        start: a model that ``train`` wrote with no steps in the last stages; the stages that it went through
            are then taken from it.
    """
    began = time.perf_counter()
    torch.set_num_threads(threads)
    processor = build_processor()
    before, done = 0.0, set()
    if start is None:
        model = build_model(
            processor.tokenizer, layers=settings.layers, width=settings.width, seed=settings.seed
        ).train()
        packer = Packer(processor, settings.images, settings.seed)
        stage_a(model, packer, settings.steps_a)
        learn_answers(model, packer, settings.steps_b, settings.steps_a, 1.0, "B")
    else:
        model = LlavaForConditionalGeneration.from_pretrained(
            start, dtype=torch.float32, attn_implementation="eager"
        ).train()
        known = json.loads((start / RECORD).read_text(encoding="utf-8"))
        before = known["minutes"]
        done = {stage for stage, *_ in LATER if known["settings"].get(f"steps_{stage.lower()}")}
    first = -(-(settings.steps_a + settings.steps_b) * settings.images // settings.images_c)
    for stage, questions, scale in LATER:
        steps = getattr(settings, f"steps_{stage.lower()}")
        if steps and stage not in done:
            # begin at the precision in which a model is stored, as if it had been; rotary buffers never are
            for parameter in model.parameters():
                parameter.data = parameter.data.half().float()
            packer = Packer(processor, settings.images_c, settings.seed, questions)
            learn_answers(model, packer, steps, first, scale, stage)
        first += steps
    output.mkdir(parents=True, exist_ok=True)
    model.eval().to(torch.float16).save_pretrained(output)
    processor.save_pretrained(output)
    record = {
        "settings": asdict(settings),
        "threads": threads,
        "minutes": round(before + (time.perf_counter() - began) / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in output.iterdir():
        file.chmod(0o644)  # safetensors writes 0600


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vtwcli.demo.train", description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--start", type=Path, help="a model written with no steps in the last stages, to go on from"
    )
    for name, default in asdict(Settings()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}"
        )
    parser.add_argument("--threads", type=int, default=2, help="torch threads, default 2")
    options = vars(parser.parse_args(arguments))
    output, threads, start = (options.pop(name) for name in ("output", "threads", "start"))
    train(output, Settings(**options), threads, start)
    print(write_card(output), flush=True)


if __name__ == "__main__":
    main()
