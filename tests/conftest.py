"""What every test shares: no Hub, a private cache, and a tiny LLaVA directory with a real processor."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

# Libraries read these when they are imported, so they are set before any test module is.
_home = tempfile.mkdtemp(prefix="vtwcli-hf-home-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": _home, "HF_MODULES_CACHE": f"{_home}/modules"}
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)

DAY = int(os.environ.get("VTW_TEST_SEED") or datetime.now(UTC).strftime("%Y%m%d"))
"""The seed of what tests draw anew every day."""


def pytest_report_header() -> str:
    return f"what is drawn today: VTW_TEST_SEED={DAY}"


TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} {% endif %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_processor(chat_template: str | None = TEMPLATE, image_token_id: int = 98):
    """A LlavaProcessor whose image token has the id of ``tests.tiny.llava``; 12x12 images give nine tokens each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = sorted({chr(c) for c in range(32, 123)} - set("<>[]^`@#$&*~"))
    alphabet = ["Ġ" if letter == " " else letter for letter in letters] + ["Ċ"]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *alphabet, "Ġr", "Ġre", "Ġred"]
    assert len(tokens) <= image_token_id
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for i in range(len(tokens), image_token_id):
        vocabulary[f"<unused{i}>"] = i
    vocabulary["<image>"] = image_token_id
    merges = [("Ġ", "r"), ("Ġr", "e"), ("Ġre", "d")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
        image_token="<image>",
    )


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A saved six-layer LLaVA with random weights and a real processor; read-only, copy it to change it."""
    from tests import tiny

    path = tmp_path_factory.mktemp("tiny-llava")
    model = tiny.llava()
    model.save_pretrained(path)
    build_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Exports to ONNX by name, see ``tests.onnx_exports``; worker processes share them."""
    from tests.onnx_exports import Exports

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "onnx"
    root.mkdir(exist_ok=True)
    return Exports(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six questions of two tasks about random images, and one without an image."""
    import json

    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        task = ("colour", "caption")[i % 2]
        rows.append(
            {"image": f"{i}.png", "question": f"what is {i}?", "answer": "red sea"[: 3 + i], "task": task}
        )
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def vtw(monkeypatch, tmp_path):
    """Run the command in ``tmp_path``; gives exit code, stdout and stderr."""
    from tests import cli

    monkeypatch.chdir(tmp_path)
    return cli.vtw


@pytest.fixture(scope="module")
def exported(tiny_dir, tmp_path_factory) -> Path:
    """The tiny model exported with withdrawal at layer 3."""
    from vtwcli.export.hf.export import export_hf
    from vtwcli.schedule import Schedule

    target = tmp_path_factory.mktemp("cli") / "pruned"
    export_hf(str(tiny_dir), Schedule.withdraw_at(3), target)
    return target
