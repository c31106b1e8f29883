"""Exports of every family, loaded by a process that cannot import the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests import tiny
from tests.conftest import build_processor
from tests.tiny import TINY
from vtwcli.errors import NotFoundError
from vtwcli.export.hf.export import export_hf
from vtwcli.models.families import family_of
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule

ROWS = ["t3 i t5", "t2 i t1 i t4"]
STEPS = 4
QUESTIONS = ["what is it?", "is the star at the left red or blue?"]
DYNAMIC = [
    {"at": 0, "until": 1, "action": "mute", "sink": "first"},
    {
        "at": "auto",
        "after": 1,
        "action": "keep",
        "select": {"score": "contribution", "ratio": 0.4},
        "when": {"cosine_below": 0.999},
    },
    {"at": 5, "action": "withdraw"},
]

CHILD = '''
"""Loads exported directories in every way a user would, without the package; prints what they compute as JSON."""
import json, sys, tempfile, warnings
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vtwcli":
            raise ModuleNotFoundError("No module named 'vtwcli'")

sys.meta_path.insert(0, Blocker())
try:
    import vtwcli
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can be imported")

import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.utils import logging
logging.disable_progress_bar()

def answer(model, batch, steps):
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**batch, max_new_tokens=steps, **how)
    return out.sequences[:, batch["input_ids"].shape[1]:].tolist(), torch.stack(out.logits, 1)

def load(path, auto=AutoModelForImageTextToText, **options):
    model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model

def on_the_hub(directory, cache):
    """The Hub's cache as it is behind a download of the directory as ``acme/pruned``."""
    repository, sha = cache / "models--acme--pruned", "a" * 40
    for folder in ("refs", "blobs", f"snapshots/{sha}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(sha)
    for file in directory.iterdir():
        (repository / "blobs" / file.name).symlink_to(file)
        (repository / "snapshots" / sha / file.name).symlink_to(repository / "blobs" / file.name)

root, results = Path(sys.argv[1]), {}
for directory in sorted(root.glob("*.export")):
    print("##", directory.name, file=sys.stderr)
    name = directory.name.removesuffix(".export")
    batch = torch.load(root / f"{name}.batch.pt", weights_only=True)
    trusted = load(directory, trust_remote_code=True)
    tokens, logits = answer(trusted, batch, int(sys.argv[2]))
    torch.save(logits, root / f"{name}.logits.pt")
    print("## plain", file=sys.stderr)
    plain = answer(load(directory), batch, int(sys.argv[2]))[0]
    print("## again", file=sys.stderr)
    with tempfile.TemporaryDirectory() as again:
        trusted.save_pretrained(again)
        saved = load(again, AutoModelForMultimodalLM, trust_remote_code=True)
        results[name] = {
            "tokens": tokens,
            "plain": plain,
            "saved": answer(saved, batch, int(sys.argv[2]))[0],
            "module": type(trusted).__module__.partition(".")[0],
            "saved_module": type(saved).__module__.partition(".")[0],
        }
print("## hub", file=sys.stderr)
on_the_hub(root / "dynamic.export", root / "hub")
model = load("acme/pruned", trust_remote_code=True, cache_dir=str(root / "hub"), revision="main")
batch = torch.load(root / "dynamic.batch.pt", weights_only=True)
results["hub"] = {"tokens": answer(model, batch, int(sys.argv[2]))[0], "module": type(model).__module__}
print("## pipeline", file=sys.stderr)  # it has words of its own about how it calls the processor
talk = pipeline("image-text-to-text", model=str(root / "llava.export"), trust_remote_code=True)
image = {"type": "image", "path": str(root / "image.png")}
texts = json.loads(sys.argv[3])
turns = [[{"role": "user", "content": [image, {"type": "text", "text": text}]}] for text in texts]
said = talk(text=turns, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=len(turns))
results["pipeline"] = [one[0]["generated_text"] for one in said]
print(json.dumps(results))
'''


def first_layer(model) -> int:
    """A withdrawal layer that the family allows and that is not the first."""
    return max(2, family_of(model.config).first_withdrawal)


def run_without_package(root: Path) -> tuple[dict, str]:
    """Run ``CHILD`` over the exports in ``root``; its results and what it wrote to stderr."""
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(
        Path(transformers.__file__).parents[1]
    )  # the same release, and nothing else
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            "-c",
            CHILD,
            str(root),
            str(STEPS),
            json.dumps(QUESTIONS),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Every family with a tiny model: exported, loaded elsewhere, and computed here by the runtime."""
    root = tmp_path_factory.mktemp("families")
    noise = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy().astype("uint8")).save(root / "image.png")
    expected, refused = {}, {}
    for name, (model, batch, schedule) in cases().items():
        base = root / f"{name}.base"
        model.save_pretrained(base)
        if name == "llava":
            build_processor().save_pretrained(base)
        try:
            export_hf(str(base), schedule, root / f"{name}.export")
        except NotFoundError as error:
            refused[name] = error
            continue
        torch.save(batch, root / f"{name}.batch.pt")
        # attention and experts as the loader chooses them, so that both processes do the same operations
        model = AutoModelForImageTextToText.from_pretrained(base)
        with pruned(model, schedule):
            inside = generate(model, batch)
        expected[name] = (inside, generate(model, batch))
    results, errors = run_without_package(root)
    return {"root": root, "expected": expected, "refused": refused, "results": results, "stderr": errors}


# what the libraries say of some models and of themselves, with or without a schedule
LIBRARY = ("rope_param", "torchao", "torch/utils/_pytree.py", "guidance_scale", "`max_length`")


def cases() -> dict[str, tuple]:
    """Model, batch and schedule by name: withdrawal for each family, and a dynamic schedule."""
    found = {}
    for name, row in TINY.items():
        if name in tiny.ABSENT:
            continue
        model = row.build()
        found[name] = (model, row.batch(ROWS), Schedule.withdraw_at(first_layer(model)))
    found["dynamic"] = (tiny.llava(seed=3), TINY["llava"].batch(ROWS), Schedule.from_dict(DYNAMIC))
    return found


@torch.no_grad()
def generate(model, batch) -> tuple[list, torch.Tensor]:
    """Greedy tokens and their logits [B, A, V]."""
    out = model.generate(
        **batch,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, batch["input_ids"].shape[1] :].tolist(), torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", [*TINY, "dynamic"])
def test_export_computes_what_the_runtime_computes(families, name):
    if name in tiny.ABSENT:
        pytest.skip(tiny.ABSENT[name])
    if name in families["refused"]:
        error, row = families["refused"][name], family_of(TINY[name].build().config)
        assert row.no_withdraw
        assert row.no_withdraw in str(error)
        assert not (families["root"] / f"{name}.export").exists()
        return
    got = families["results"][name]
    (tokens, logits), (full_tokens, full_logits) = families["expected"][name]
    stored = torch.load(families["root"] / f"{name}.logits.pt", weights_only=True)
    assert got["tokens"] == tokens
    torch.testing.assert_close(stored, logits, rtol=0, atol=1e-4)
    assert (logits - full_logits).abs().max() > 1e-3  # the schedule does something here
    assert got["plain"] == full_tokens
    assert got["saved"] == tokens
    assert got["module"] == got["saved_module"] == "transformers_modules"


def test_export_loads_from_the_cache_of_the_hub(families):
    got = families["results"]["hub"]
    assert got["tokens"] == families["results"]["dynamic"]["tokens"]
    assert got["module"].startswith("transformers_modules.acme.pruned.")


def test_loading_says_nothing_that_would_frighten(families):
    loading = families["stderr"].partition("## pipeline")[0]
    said = [line for line in loading.splitlines() if line and not line.startswith("##")]
    assert [line for line in said if not any(words in line for words in LIBRARY)] == []


def test_pipeline_is_pruned(families):
    model, processor = TINY["llava"].build(), build_processor()
    with Image.open(families["root"] / "image.png") as image:
        prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
        batch = processor(
            text=prompts, images=[[image], [image]], padding=True, padding_side="left", return_tensors="pt"
        )

    def say() -> list[str]:
        out = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        return processor.batch_decode(out, skip_special_tokens=True)

    with pruned(model, first_layer(model)):
        wanted = say()
    assert families["results"]["pipeline"] == wanted
    assert wanted != say()
