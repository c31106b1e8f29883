"""lmms-eval runs ``--model vtw`` on a local task, offline, in an environment of its own: VTW_LMMS names its folder."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from vtwcli.data.sample import Sample
from vtwcli.data.scenes import examples
from vtwcli.export.hf.export import export_hf
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule

ROOT = Path(__file__).parent.parent
FOLDER = os.environ.get("VTW_LMMS") or None
LAYER, STEPS = 2, 8  # so early that answers are not the full model's
TASK = """
task: scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.visual
doc_to_text: "{{{{question}}}}"
doc_to_messages: !function scenes.messages
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {steps}, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CODE = """
from PIL import Image

def visual(row):
    return [Image.open(row["image"])]

def messages(row):
    parts = [{"type": "image", "url": visual(row)[0]}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": parts}]
"""

needs_it = pytest.mark.skipif(FOLDER is None, reason="VTW_LMMS names no folder that .ci/lmms filled")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task and its rows, the samples, and what Python finds there beside lmms-eval."""
    folder = tmp_path_factory.mktemp("lmms")
    found = list(examples("eval", 7, seed=5, tasks=("colour", "count", "existence")))
    rows = []
    for number, one in enumerate(found):
        one.image.save(folder / f"{number}.png")
        rows.append({"image": str(folder / f"{number}.png"), "question": one.question, "answer": one.answer})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "scenes.yaml").write_text(TASK.format(rows=folder / "rows.jsonl", steps=STEPS))
    (folder / "tasks" / "scenes.py").write_text(CODE)
    # the entry point as this tree declares it, whatever is installed
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "lmms_eval.models"
    ]
    info = folder / "path" / "vtw_here-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vtw-here\nVersion: 0\n")
    lines = [f"{name} = {place}" for name, place in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
    return folder, found


def python(folder, *args):
    path = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(FOLDER), str(folder / "path")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    env = os.environ | offline | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=600, cwd=folder
    )


def answers(folder, given, batch):
    out = folder / f"out-{batch}"
    done = python(
        folder, "-m", "lmms_eval", "--model", "vtw", "--model_args", given, "--include_path", folder / "tasks",
        "--tasks", "scenes", "--batch_size", batch, "--output_path", out, "--log_samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [file] = out.rglob("*samples_scenes.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [one if isinstance(one := row["filtered_resps"], str) else one[0] for row in rows]


@torch.no_grad()
def expected(found, schedule):
    """What the runtime generates, one question at a time."""
    loaded, said = load("demo"), []
    with pruned(loaded.model, schedule):
        for one in found:
            inputs = encode(loaded, Sample(one.id, one.task, (one.image,), one.question)).inputs
            ids = loaded.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
            said.append(
                loaded.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], True).strip()
            )
    return said


@needs_it
def test_answers_in_batches_are_the_runtimes(task):
    folder, found = task
    wanted = expected(found, LAYER)
    assert wanted != [one.answer for one in found]  # so early a withdrawal shows
    assert answers(folder, f"pretrained=demo,layer={LAYER}", 3) == wanted


@needs_it
def test_an_exported_directory_brings_its_schedule(task):
    folder, found = task
    export_hf("demo", Schedule.withdraw_at(LAYER), folder / "pruned")
    assert answers(folder, f"pretrained={folder / 'pruned'}", 1) == expected(found, LAYER)


@needs_it
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": 3}, "--model_args layers: unknown"),
        ({"layer": 3, "method": "fastv"}, "give one of schedule, layer and method"),
        ({"layer": 99}, "--layer: 99, but demo has 12 layers"),
        ({"method": "magic"}, "magic"),
    ],
)
def test_wrong_arguments_are_named(task, given, words):
    folder, _ = task
    done = python(folder, "-c", f"from vtwcli.lmms_eval import Pruned; Pruned('demo', **{given!r})")
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
