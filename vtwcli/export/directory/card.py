"""The model card of an exported directory: what was pruned, how the layer was found, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vtwcli import __version__
from vtwcli.errors import UsageError
from vtwcli.io import documents, text
from vtwcli.judge.flops import CONVENTIONS, TextShape, kv_bytes, prefill_cost
from vtwcli.machine.releases import tested
from vtwcli.models.families import Family
from vtwcli.results.calibration import Calibration, is_searched
from vtwcli.results.evaluation import EvaluatedModel, Evaluation
from vtwcli.schedule.schedule import Schedule
from vtwcli.schedule.sentences import describe

_CARRIED = ("license", "license_name", "license_link", "language")
_VISUAL, _TEXT = 576, 64  # the token counts of the computed savings: a LLaVA-1.5 image and a short question


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: of the directory.
        base: name of the base model, as the user gave it.
        revision: its Hub commit, or None.
        on_hub: whether ``base`` is a Hub id.
        family: row of the family table.
        config: the base model's transformers config.
        schedule: what was baked in.
        weights: ``linked``, ``copied`` or ``converted``.
        dtype: of the weights, for people.
        front: what is carried along of the base model's card, see ``front_matter``.
        changed: what the export took out of the base model's generation settings, in sentences.
        packages: what loading the processor needs beside transformers and torch, each with what for.
        adapter_of: the model that an adapter was merged into to give the base model; None for any other.
    """

    name: str
    base: str
    revision: str | None
    on_hub: bool
    family: Family
    config: Any
    schedule: Schedule
    weights: str
    dtype: str
    front: dict[str, str | list[str]]
    changed: Sequence[str] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    adapter_of: str | None = None


def model_card(
    subject: Subject,
    calibration: Calibration | None,
    evaluation: Evaluation | None,
    picture: str | None,
) -> str:
    """The text of the card, Markdown with YAML front matter.

    Args:
        subject: what was exported.
        calibration: a result of ``calibrate``.
        evaluation: a result of ``evaluate`` that this schedule is among.
        picture: file name of the calibration's curve.
    """
    shape = TextShape.from_config(subject.config)
    parts = [
        _front_matter(subject),
        f"# {text.markdown(subject.name)}\n\n{_opening(subject)}",
        f"## What was pruned\n\n{_pruned(subject, shape.layers)}",
    ]
    if subject.schedule.is_static:
        parts.append(_savings(subject.schedule, shape))
    if calibration is not None:
        parts.append(f"## How the layer was found\n\n{_calibration(calibration, subject.schedule, picture)}")
    if evaluation is not None:
        from vtwcli.report.evaluation import markdown

        about: EvaluatedModel = {**evaluation["model"], "name": subject.base, "baseline": subject.base}
        parts.append(markdown(of_schedule({**evaluation, "model": about}, subject.schedule)).strip())
    parts += [
        f"## Loading\n\n{_loading(subject)}",
        f"## Licence\n\n{_licence(subject)}",
        f"Made by vtwcli {__version__}. `manifest.json` holds the digest of every file; `vtw verify .` checks them.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(card: Path) -> dict[str, str | list[str]]:
    """What is carried along of a model card's front matter; nothing where there is none or it is not YAML."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        data = documents.plain(documents.parse(found.group(1), str(card), "front matter")) if found else None
    except (OSError, UnicodeDecodeError, UsageError):
        return {}
    if not isinstance(data, dict):
        return {}
    carried: dict[str, str | list[str]] = {}
    for key in _CARRIED:
        value = data.get(key)
        if isinstance(value, str):
            carried[key] = text.one_line(value)
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            carried[key] = [text.one_line(one) for one in value]
    return carried


def _front_matter(subject: Subject) -> str:
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visual-token-withdrawal", "token-pruning", "vtwcli"],
    }
    if subject.on_hub:
        data["base_model"] = text.one_line(subject.base)
    data |= subject.front
    return f"---\n{documents.to_yaml(data)}---"


def _base(subject: Subject) -> str:
    if not subject.on_hub:
        return text.code(subject.base)
    link = f"[{text.markdown(subject.base)}](https://huggingface.co/{quote(subject.base)})"
    return f"{link} at revision {text.code(subject.revision)}" if subject.revision else link


def _opening(subject: Subject) -> str:
    if subject.weights == "converted":
        weights = f"Nothing was trained; the weights were converted to {subject.dtype}."
    else:
        weights = "Nothing was trained: the weights are the base model's files, byte for byte."
    if subject.adapter_of is not None:
        weights = f"The base model is an adapter, merged into {text.code(subject.adapter_of)}. {weights}"
    return (
        f"{_base(subject)} ({subject.family.title}) with a visual token schedule baked in: its language model runs "
        f"with fewer visual tokens, which makes the prefill cheaper and the KV cache smaller. {weights}"
    )


def _pruned(subject: Subject, layers: int) -> str:
    lines = [f"- {describe(action, layers)}" for action in subject.schedule.actions]
    return "\n".join([*(lines or ["Nothing."]), "", text.code_block(subject.schedule.to_yaml(), "yaml")])


def _savings(schedule: Schedule, shape: TextShape) -> str:
    visual = schedule.visual_per_layer(shape.layers, _VISUAL)
    pruned = [_TEXT + n for n in visual]
    frozen = [n * still for n, still in zip(visual, schedule.frozen_layers(shape.layers), strict=True)]
    full = [_TEXT + _VISUAL] * shape.layers
    rows = [
        f"What that saves with {_VISUAL} visual and {_TEXT} text tokens, computed; three conventions are in use.\n",
        "| cost | of the full model's |",
        "|---|---:|",
    ]
    for convention in CONVENTIONS:
        cost = prefill_cost(shape, pruned, convention, frozen)
        ratio = cost / prefill_cost(shape, full, convention)
        rows.append(f"| prefill operations of the language model (`{convention}`) | {ratio:.1%} |")
    rows.append(f"| KV cache after the prefill | {kv_bytes(shape, pruned) / kv_bytes(shape, full):.1%} |")
    return "\n".join(rows)


def _calibration(result: Calibration, schedule: Schedule, picture: str | None) -> str:
    from vtwcli.report.calibration import calibration_sentence
    from vtwcli.report.tables import markdown_table

    samples = sum(task["samples"] for task in result["tasks"].values())
    parts = [text.paragraph(f"Calibrated on {samples} samples. {calibration_sentence(result)}")]
    chosen = (result.get("schedule") or {}).get("actions")
    if chosen != schedule.to_dict()["actions"]:
        parts[0] += " The schedule above is not the one that this calibration chose."
    if picture:
        parts.append(f"![What withdrawing visual tokens changes, by layer]({picture})")
    if is_searched(result):
        return "\n\n".join(parts)
    k = result["withdrawal_layer"]
    if k is not None and k < result["num_layers"]:
        rows = [
            [name, str(task["samples"]), f"{task['kl'][k]:.2e}", f"{task['agreement'][k]:.1%}"]
            for name, task in result["tasks"].items()
        ]
        table = markdown_table(["task", "samples", "KL at K (nats)", "top-1 agreement"], rows)
        parts += [table, "KL(pruned ‖ full) of the next-token distributions, mean over samples."]
    return "\n\n".join(parts)


def of_schedule(evaluation: Evaluation, schedule: Schedule) -> Evaluation:
    """An evaluation result reduced to one of the schedules that it compares.

    Raises:
        UsageError: the schedule is not among them.
    """
    actions = schedule.to_dict()["actions"]
    rows = evaluation.get("schedules", {})
    name = next((name for name, row in rows.items() if row["schedule"]["actions"] == actions), None)
    if name is None:
        raise UsageError("the evaluation is not of this schedule", "evaluate the schedule that is exported")
    tasks = dict(evaluation["tasks"])
    for task, row in tasks.items():
        if "schedules" in row:
            tasks[task] = {**row, "schedules": {name: row["schedules"][name]}}
    return {**evaluation, "tasks": tasks, "schedules": {name: rows[name]}}


def _loading(subject: Subject) -> str:
    changed = "".join(f"\n\n- {text.markdown(sentence)}." for sentence in subject.changed)
    code = f"""from transformers import AutoModelForImageTextToText, AutoProcessor

path = {json.dumps(subject.name)}  # this directory, or its Hub id
model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path)"""
    return f"""{text.code_block(code, "python")}

With `trust_remote_code=True` the model is pruned, in `generate` and in `pipeline("image-text-to-text")`; the code is
`modeling_vtw.py` and the `vtw_*.py` beside it, which need torch and transformers only. It was exported with
transformers {version("transformers")}, and its code was tested with {", ".join(tested())}; where another release
reads the files or runs the layers otherwise, it stops with an error. Without the flag the same files load as the
unpruned model. A model that was loaded pruned stays so through `save_pretrained`; one that was loaded without the
flag and saved again loses the code files, so load it with the flag before saving.{_processor(subject)}{changed}"""


def _processor(subject: Subject) -> str:
    if not subject.packages:
        return ""
    wanted = ", ".join(f"{text.code(name)} (for {what})" for name, what in subject.packages.items())
    fitting = ""
    if "torchvision" in subject.packages:
        fitting = " Take the `torchvision` that is built for the torch in use, from the same index as torch."
    return f"\n\nThe processor needs, beside torch and transformers: {wanted}.{fitting}"


def _licence(subject: Subject) -> str:
    stated = subject.front.get("license_name") or subject.front.get("license")
    if stated:
        said = text.code(stated if isinstance(stated, str) else ", ".join(stated))
        return f"The base model's licence ({said}) applies to these weights; its terms are carried along."
    return "The base model's files state no licence. Whatever applies to the base model applies to these weights."
