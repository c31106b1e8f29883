"""Measure the demo model with the tool itself and write its card: ``python -m vtwcli.demo.card DIR``.

Every number of the card is measured here, on scenes that training never saw; the rest comes from ``training.json``,
which the training script leaves beside the weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtwcli.calibrate import calibrate
from vtwcli.data.sample import Sample
from vtwcli.data.scenes import ALL_TASKS, DEFAULT_TASKS
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.io import files
from vtwcli.models.generation import generate_answers
from vtwcli.models.loading import LoadedModel, load
from vtwcli.recipe.recipe import CalibrateSection, ModelSection
from vtwcli.results.calibration import is_searched
from vtwcli.runtime import pruned

RECORD = "training.json"
CARD = "README.md"

Accuracy = dict[str, float]


def accuracy(loaded: LoadedModel, samples: Sequence[Sample], withdraw_at: int | None = None) -> Accuracy:
    """Share of greedy answers that equal the reference, by task; without visual tokens from a layer on, if given."""
    if withdraw_at is None:
        answers = generate_answers(loaded, samples, 48, batch_size=100)
    else:
        with pruned(loaded.model, withdraw_at):
            answers = generate_answers(loaded, samples, 48, batch_size=100)
    right: dict[str, list[bool]] = {}
    for sample, (text, _) in zip(samples, answers, strict=True):
        right.setdefault(sample.task, []).append(text == sample.references[0])
    return {task: sum(hits) / len(hits) for task, hits in right.items()}


def measure(folder: Path, limit: int = 200) -> dict[str, Any]:
    """Accuracy and KL of the model in ``folder``.

    Args:
        folder: a directory that ``train`` wrote.
        limit: questions per task.

    Returns:
        ``accuracy`` by task; ``accuracy_at`` [L + 1] of the same, K = L being the full model run through the
        runtime; ``kl`` by task, [L] nats over answer positions; ``layers`` K by task; ``default`` the result of
        ``vtw calibrate`` as it comes, on the default tasks and number of samples.
    """
    model = ModelSection(name=str(folder), dtype="float32")
    every = DataSpec(source="demo", tasks=ALL_TASKS)
    curves = calibrate(model, [every], CalibrateSection(limit=limit, bootstrap=0))
    assert not is_searched(curves)
    loaded = load(str(folder), dtype="float32")
    test = load_data([every.model_copy(update={"split": "test"})], limit=limit, seed=0).samples
    return {
        "limit": limit,
        "accuracy": accuracy(loaded, test),
        "accuracy_at": [accuracy(loaded, test, k) for k in range(curves["num_layers"] + 1)],
        "kl": {task: entry["kl"] for task, entry in curves["tasks"].items()},
        "layers": {task: entry["withdrawal_layer"] for task, entry in curves["tasks"].items()},
        "eta": curves["eta"],
        "default": calibrate(model, [DataSpec(source="demo")]),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def render_card(record: dict[str, Any], found: dict[str, Any], size: int, parameters: int) -> str:
    """The card's Markdown from the training record, ``measure``'s numbers, bytes of weights and parameters."""
    settings, default = record["settings"], found["default"]
    depth, k = settings["layers"], default["withdrawal_layer"]

    def row(name: object, by_task: dict[str, float], form: str) -> list[str]:
        values = [_mean(by_task), *(by_task[task] for task in ALL_TASKS)]
        return [str(name), *(format(value, form) for value in values)]

    head = ["K", "default mix", *ALL_TASKS]
    tasks = table(
        ["task", "accuracy", "K"],
        [[task, f"{found['accuracy'][task]:.1%}", _layer(found["layers"][task])] for task in ALL_TASKS],
    )
    curves = [{task: found["kl"][task][at] for task in ALL_TASKS} for at in range(depth)]
    kl = table(head, [row(at, by_task, ".2g") for at, by_task in enumerate(curves)])
    kept = table(head, [row(at, by_task, ".1%") for at, by_task in enumerate(found["accuracy_at"])])
    verdict = f"No layer qualifies on the default mix at eta {found['eta']}."
    if k is not None:
        full, pruned_at = _mean(found["accuracy"]), [_mean(by_task) for by_task in found["accuracy_at"]]
        low, high = default["interval"]
        verdict = (
            f"`vtw calibrate demo` as it comes finds **K = {k} of {depth}** (95 % interval {low} to {high}, "
            f"{default['options']['limit']} questions per task, policy {default['policy']}, eta {found['eta']} "
            f"nats). Accuracy on the default mix: {full:.1%} full, {pruned_at[k]:.1%} withdrawn at {k}, "
            f"{pruned_at[1]:.1%} withdrawn at 1."
        )
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, demo]
---

# vtwcli demo model

A small LLaVA model ({parameters / 1e6:.2f} M parameters, {size / 1e6:.1f} MB in float16), trained from nothing on
generated scenes of coloured shapes. It exists to show, without a download, what withdrawing visual tokens does to a
model that really looks at its images. It is good for nothing else.

- Vision: CLIP ViT, 112 pixels, 64 visual tokens. Text: Llama, {depth} layers of width {settings["width"]}.
- Data: `vtwcli.data.scenes`; training and evaluation scenes come from disjoint seeds.
- Training: `python -m vtwcli.demo.train --output DIR {options}`,
  {record["minutes"]:.0f} minutes on {record["threads"]} threads of a shared CPU (torch {record["torch"]},
  transformers {record["transformers"]}). The model was never trained with visual tokens withdrawn.
- This card: `python -m vtwcli.demo.card DIR`.

## Accuracy

Exact match of greedy answers, {found["limit"]} questions of each task about unseen scenes. The default mix is
{", ".join(DEFAULT_TASKS)}; `where`, `relation` and `tally` take two hops and are the hard cases.
K is the task's own withdrawal layer: the smallest from which on the mean KL stays at or below {found["eta"]} nats.

{tasks}

## Withdrawal

{verdict}

Mean KL(P_pruned ‖ P_full) in nats by withdrawal layer K, over all positions of the full model's own answers,
{found["limit"]} questions per task:

{kl}

Accuracy by withdrawal layer K (K = {depth}: no withdrawal):

{kept}

## Use

    vtw calibrate demo

or, from Python, like any other model:

    from transformers import AutoModelForImageTextToText, AutoProcessor
    from vtwcli.demo import model_dir

    processor = AutoProcessor.from_pretrained(model_dir())
    model = AutoModelForImageTextToText.from_pretrained(model_dir(), dtype="float32")
"""


def write_card(folder: Path, limit: int = 200) -> str:
    """Measure the model in ``folder`` with ``limit`` questions per task, write its card and return it."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    parameters = sum(p.numel() for p in load(str(folder)).model.parameters())
    text = render_card(record, measure(folder, limit), weights.stat().st_size, parameters)
    files.write_text(folder / CARD, text)
    return text


def _mean(by_task: dict[str, float]) -> float:
    """The default mix: all its tasks weigh the same."""
    return sum(by_task[task] for task in DEFAULT_TASKS) / len(DEFAULT_TASKS)


def _layer(k: int | None) -> str:
    return "none" if k is None else str(k)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vtwcli.demo.card", description="Write the demo model's card."
    )
    parser.add_argument("folder", type=Path, help="directory that vtwcli.demo.train wrote")
    parser.add_argument("--limit", type=int, default=200, help="questions per task, default 200")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, default 2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    write_card(options.folder, options.limit)


if __name__ == "__main__":
    main()
