"""Unusual and damaged checkpoints: what safetensors and transformers take is taken, all else is one clear line."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tests.conftest import TEMPLATE
from vtwcli.data.sample import Sample
from vtwcli.errors import NotFoundError
from vtwcli.export import onnx_companions
from vtwcli.models import templates
from vtwcli.models.inputs import encode
from vtwcli.models.loading import LoadedModel, load
from vtwcli.models.stored import read_header


@pytest.fixture(scope="module")
def loaded(tiny_dir) -> LoadedModel:
    return load(str(tiny_dir), device="cpu")


# --- headers -----------------------------------------------------------------------------------------------------


def pack(text: bytes, data: bytes) -> bytes:
    """A safetensors file of a header and data, whatever they are."""
    return struct.pack("<Q", len(text)) + text + data


def mutate(rng: random.Random, header: dict, data: bytes) -> bytes:
    """A safetensors file with one thing changed; not everything that is changed is wrong."""
    header = json.loads(json.dumps(header))
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    entry = header[name]
    numbers = [0, 1, -1, 7, 8, 2**31, 2**63, 2**64, 1.5, None, "8", True]
    kind = rng.randrange(16)
    if kind == 0:
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif kind == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(numbers)
    elif kind == 2:
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -4, -1, 1, 4, 8])
    elif kind == 3:
        entry["shape"] = rng.choice(
            [[], [0], [2**32, 2**32], [-1], entry["shape"][::-1], [*entry["shape"], 1], None]
        )
    elif kind == 4:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(numbers)
    elif kind == 5:
        entry["dtype"] = rng.choice(
            ["I32", "U32", "F16", "BF16", "F64", "C64", "U8", "F4", "F6_E2M3", "X", 3, None]
        )
    elif kind == 6:
        del entry[rng.choice(["dtype", "shape", "data_offsets"])]
    elif kind == 7:
        entry["more"] = rng.choice([1, [], {}])
    elif kind == 8:
        header["__metadata__"] = rng.choice([None, {}, {"a": "b"}, {"a": 1}, [], "x", {"a": None}])
    elif kind == 9:
        header[name] = rng.choice([None, [], 3, [entry["dtype"], entry["shape"], entry["data_offsets"]]])
    elif kind == 10:
        del header[name]
    elif kind == 11:
        items = list(header.items())
        rng.shuffle(items)
        header = dict(items)
    elif kind == 12:
        header["empty"] = {"dtype": "F32", "shape": [0], "data_offsets": [rng.choice([0, 4, len(data)])] * 2}
    text = json.dumps(header).encode()
    if kind == 13:
        first, second = (json.dumps({name: value})[1:-1] for value in (header[other], entry))
        text = text[:-1] + b", " + rng.choice([first, second]).encode() + b"}"
    elif kind == 14:
        place = rng.randrange(len(text))
        text = text[:place] + bytes([rng.randrange(256)]) + text[place + rng.randrange(2) :]
    elif kind == 15:
        data = rng.choice([data + b"\0", data[:-1], data + data, b""])
        text = rng.choice([text, text + b"  ", b" " + text, text + b"\0", b"\xef\xbb\xbf" + text])
    whole = pack(text, data)
    if rng.randrange(20) == 0:
        whole = rng.choice(
            [
                whole[: rng.randrange(len(whole))],
                struct.pack("<Q", rng.choice([0, 1, 10**9, 2**63])) + text + data,
            ]
        )
    return whole


def test_headers_are_read_as_strictly_as_the_library_does(tmp_path):
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for i, shape in enumerate(([2, 3], [4], [1, 5], [6, 2])):
        size = 4 * int(torch.tensor(shape).prod())
        header[f"layers.{i}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    data = torch.arange(place // 4, dtype=torch.float32).numpy().tobytes()
    taken = refused = 0
    for seed in range(600):
        file = tmp_path / f"{seed}.safetensors"
        file.write_bytes(mutate(random.Random(seed), header, data))
        try:
            with safe_open(file, "pt") as opened:
                expected = {key: opened.get_slice(key) for key in opened.offset_keys()}
                shapes = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in expected.items()}
            taken += 1
        except SafetensorError:
            refused += 1
            with pytest.raises(NotFoundError, match=f"weight file {file} is truncated or corrupt"):
                read_header(file)
            continue
        found = read_header(file).tensors
        assert {key: (tensor.kind, tensor.shape) for key, tensor in found.items()} == shapes, seed
        if all(tensor.dtype is not None for tensor in found.values()):
            values = load_file(file)
            for key, tensor in found.items():
                assert torch.equal(tensor.read().view(torch.uint8), values[key].view(torch.uint8)), (
                    seed,
                    key,
                )
    assert taken > 100
    assert refused > 100


# --- torchvision -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_torchvision(tmp_path_factory) -> dict[str, str]:
    """The environment of a process in which torchvision is installed, but was built for another torch."""
    place = tmp_path_factory.mktemp("site")
    package, record = place / "torchvision", place / "torchvision-0.28.0.dist-info"
    package.mkdir()
    record.mkdir()
    (package / "_meta.py").write_text("")
    (package / "__init__.py").write_text(
        "from torchvision import _meta\n"
        "raise RuntimeError('operator torchvision::nms does not exist\\nand more')\n"
    )
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    here = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), here])}


def test_a_torchvision_that_cannot_be_imported_is_not_needed(other_torchvision, tmp_path):
    command = [sys.executable, "-m", "vtwcli", "calibrate", "demo", "--limit", "2", "--policy", "budget"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "out.json"], env=other_torchvision, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "nms" not in done.stderr


@pytest.mark.parametrize("order", ["import transformers\nimport vtwcli", "import vtwcli"])
def test_a_torchvision_that_cannot_be_imported_is_named_where_it_is_needed(
    order, other_torchvision, tiny_dir, tmp_path
):
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "processor_config.json").unlink()
    (model / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "PixtralImageProcessor", "processor_class": "PixtralProcessor"})
    )
    use = f"try: vtwcli.load({str(model)!r})\nexcept vtwcli.errors.NotFoundError as error: print(error)"
    code = f"{order}, vtwcli.errors\n{use}"
    done = subprocess.run([sys.executable, "-c", code], env=other_torchvision, capture_output=True, text=True)
    assert done.stdout == (
        f"the processor of '{model}' needs torchvision, and the installed one cannot be imported: RuntimeError: "
        "operator torchvision::nms does not exist (install the torchvision that is built for torch "
        f"{torch.__version__}, from the same index as torch)\n"
    ), done.stderr


# --- chat templates ----------------------------------------------------------------------------------------------

_LOOPS = "does not end within 2 seconds"
_MEMORY = "takes more than 256 MiB of memory"
BOUNDLESS = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        _LOOPS,
    ),
    "a power": ("{{ 9 ** (9 ** 9) }}", _LOOPS),
    "a power that is no constant": ("{% set n = messages|length + 8 %}{{ n ** (n ** n) }}", _LOOPS),
    "a product": ("{{ 'x' * 10 ** 10 }}", _MEMORY),
    "doubling": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        _MEMORY,
    ),
    "padding": ("{{ 'x'|center(10 ** 9) }}", _MEMORY),
    "a format": ("{{ '%1000000000d' % 1 }}", _MEMORY),
    "recursion": ("{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
    "a long prompt": (
        "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
        "makes a prompt of more than 4,194,304 characters",
    ),
    "with one picture only": (
        "{% for part in messages[0].content if part.image %}{{ 'x' * 10 ** 10 }}{% endfor %}",
        _MEMORY,
    ),
    "a range": ("{% for i in range(10 ** 9) %}{% endfor %}", "fails: Range too big"),
    "a division": ("{{ 1 // 0 }}", "fails: integer division or modulo by zero"),
}


@pytest.mark.parametrize("kind", BOUNDLESS)
def test_a_chat_template_without_bounds_is_refused(kind, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 2.0)
    template, reason = BOUNDLESS[kind]
    (tmp_path / "chat_template.jinja").write_text(template)
    loaded.processor.chat_template = template
    sample = Sample(id="0", task="t", prompt="what?", images=(Image.new("RGB", (12, 12)),))
    began = time.monotonic()
    with pytest.raises(NotFoundError, match=re.escape(reason)) as caught:
        encode(replace(loaded, path=tmp_path), sample)
    assert time.monotonic() - began < 30
    assert ("fails" in reason) or str(tmp_path / "chat_template.jinja") in caught.value.message
    loaded.processor.chat_template = TEMPLATE
    assert encode(loaded, sample).length  # the next prompt is rendered as ever


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json", "tokenizer_config.json"])
def test_the_file_of_a_chat_template_is_named(place, loaded, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / place).write_text(json.dumps({"chat_template": "x"}))
    loaded.processor.chat_template = "{{ 'x' * 10 ** 10 }}"
    with pytest.raises(NotFoundError, match=re.escape(str(tmp_path / place))):
        encode(replace(loaded, path=tmp_path), Sample(id="0", task="t", prompt="what?", images=()))
    loaded.processor.chat_template = TEMPLATE


def test_an_export_renders_within_the_same_bounds(loaded, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' * 10 ** 10 }}")
    loaded.processor.chat_template = "{{ 'x' * 10 ** 10 }}"
    with pytest.raises(
        NotFoundError, match=f"chat template in {tmp_path / 'chat_template.jinja'} takes more"
    ):
        onnx_companions._prompts(loaded.processor, tmp_path)
    loaded.processor.chat_template = TEMPLATE


def test_the_process_for_templates_ends_with_the_one_that_asks(tmp_path):
    code = (
        "import os, signal\nfrom types import SimpleNamespace as N\nfrom vtwcli.models import templates\n"
        "processor = N(tokenizer=N(special_tokens_map={}))\n"
        "templates.check(processor, 'x', None, [{'role': 'user', 'content': 'x'}], True)\n"
        "print(templates._trial.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True)
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{int(done.stdout)}/stat").read_text().split()[2] == "Z":
            break  # nobody has collected it yet
        time.sleep(0.1)
    else:
        raise AssertionError("it is still there")
