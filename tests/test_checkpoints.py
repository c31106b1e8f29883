"""Unusual and damaged checkpoints: what safetensors and transformers take is taken, all else is one clear line."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import tiny
from tests.conftest import TEMPLATE
from vtwcli.data.sample import Sample
from vtwcli.demo import model_dir
from vtwcli.errors import NotFoundError, VtwError
from vtwcli.export.hf.weights import place_weights
from vtwcli.export.onnx import companions as onnx_companions
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models import templates
from vtwcli.models.generation import generate_answers
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import answer_ids, encode
from vtwcli.models.loading import LoadedModel, load
from vtwcli.models.stored import read_header
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.streaming import Streamed


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
        f"operator torchvision::nms does not exist (install torchvision 0.{int(torch.__version__.split('.')[1]) + 15} "
        f"that is built for torch {torch.__version__}, from the same index as torch)\n"
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
        source = SimpleNamespace(
            checkpoint=SimpleNamespace(path=tmp_path),
            config=loaded.config,
            family=loaded.family,
            name="model",
            revision=None,
        )
        onnx_companions._prompts(source, loaded.processor)
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


# --- configs that are larger than the weights --------------------------------------------------------------------

ABSURD = [
    ("text_config.hidden_size", 10**6),
    ("text_config.hidden_size", 10**18),
    ("text_config.vocab_size", 10**12),
    ("text_config.intermediate_size", 10**9),
    ("text_config.num_attention_heads", 0),
    ("text_config.num_key_value_heads", -1),
    ("text_config.head_dim", 10**9),
    ("text_config.num_hidden_layers", 10**9),
    ("text_config.num_hidden_layers", 90_000),
    ("text_config.num_hidden_layers", 13),
    ("text_config.num_hidden_layers", 0),
    ("vision_config.num_hidden_layers", 90_000),
    ("vision_config.image_size", 10**6),
    ("vision_config.patch_size", 0),
    ("vision_config.patch_size", 1e6),
    ("vision_config.num_channels", 10**9),
]


@pytest.fixture
def demo(tmp_path) -> Path:
    """The demo model, to be changed."""
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


@pytest.mark.parametrize(("setting", "value"), ABSURD)
def test_a_config_larger_than_the_weights_is_refused_at_once(setting, value, demo):
    change(demo / "config.json", setting.split("."), value)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for weights in (True, False):
        with pytest.raises(NotFoundError) as caught:
            load(str(demo), device="cpu", weights=weights)
        assert str(demo / "config.json") in caught.value.message
        assert setting.rpartition(".")[2] in caught.value.message or value == -1
    assert time.monotonic() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_config_of_many_experts_is_refused_at_once(tmp_path):
    tiny.TINY["qwen3_vl_moe"].build(layers=2).save_pretrained(tmp_path)
    assert resolve(str(tmp_path)).key_map
    change(tmp_path / "config.json", ["text_config", "num_local_experts"], 10**6)
    with pytest.raises(NotFoundError, match=r"config\.json.*num_local_experts is 1000000"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("levels", [150, 10_000, 200_000])
def test_json_that_is_nested_deeply_is_one_line(name, levels, demo):
    file = demo / name
    file.write_text(file.read_text().rstrip()[:-1] + f', "deep": {"[" * levels}{"]" * levels}}}')
    if name == "config.json" or levels > 150:  # as deep as this transformers reads it
        with pytest.raises(
            NotFoundError, match=re.escape(f"{file} cannot be read: it is nested more than 100 levels")
        ):
            load(str(demo), device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_is_too_large_is_not_read(name, demo):
    with (demo / name).open("ab") as stream:
        stream.truncate(10**9)
    with pytest.raises(
        NotFoundError, match=re.escape(f"{demo / name} has 954 MiB, and no model needs more than ")
    ):
        load(str(demo), device="cpu")


@pytest.mark.parametrize(
    ("setting", "value"), [("patch_size", 20_000), ("image_processor.crop_size.height", 10**6)]
)
def test_a_processor_beyond_bounds_is_refused_at_once(setting, value, demo):
    change(demo / "processor_config.json", setting.split("."), value)
    with pytest.raises(NotFoundError, match=re.escape(f"processor_config.json: {setting} is {value}")):
        load(str(demo), device="cpu")


# --- settings of other types -------------------------------------------------------------------------------------

FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
OTHER = (None, True, -1, 1e30, 0.5, "x", [], {})
SAMPLE = Sample(id="0", task="t", prompt="what colour is it?", images=(Image.new("RGB", (112, 112), "red"),))
OWN_RULES = {"architectures"}  # a foreign architecture is refused, whatever transformers makes of the weights


def change(file: Path, keys: Sequence[str | int], value: object) -> None:
    """Set one setting of a JSON file."""
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def settings_of(value: object, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where a JSON value has settings; of lists the first two entries, of a vocabulary none."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:2]):
        yield (*keys, key)
        if isinstance(inner, dict | list) and key not in ("vocab", "merges"):
            yield from settings_of(inner, (*keys, key))


def ours(path: Path, weights: bool) -> None:
    """What a calibration does with a model, for one sample."""
    model = load(str(path), device="cpu", weights=weights)
    encoded = encode(model, SAMPLE, answer_ids(model, "red"))
    if weights:
        Resident(model.model, model.family).captures([encoded.inputs])
        generate_answers(model, [SAMPLE], 2)
    else:
        source = Streamed(model)
        source.captures([encoded.inputs])
        assert len(list(source.layers())) == source.depth


def theirs(path: Path) -> None:
    """What transformers does with a model, for one sample; weights that are not all there are no model."""
    with quiet_libraries():
        model, found = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        assert not any(found[kind] for kind in ("missing_keys", "mismatched_keys", "error_msgs"))
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        content = [{"type": "image", "image": SAMPLE.images[0]}, {"type": "text", "text": SAMPLE.prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        batch = processor(text=[text], images=[list(SAMPLE.images)], return_tensors="pt", padding=True)
        assert "pixel_values" in batch
        model.eval().generate(**batch, max_new_tokens=2, do_sample=False)


def compare(path: Path, name: str, keys: tuple[str | int, ...], value: object) -> None:
    """Change one setting: what transformers runs must run, and all else must be one line."""
    original = (path / name).read_text()
    change(path / name, keys, value)
    try:
        for weights in (True, False):
            try:
                ours(path, weights)
            except VtwError as error:
                assert error.exit_code == 4, (name, keys, value, error)
                assert "\n" not in str(error)
                if keys[0] in OWN_RULES:
                    continue
                with pytest.raises(BaseException):  # noqa: B017 - whatever it is
                    theirs(path)
                    print("transformers runs", name, keys, value, "and here:", error)
            except Exception as error:
                raise AssertionError((name, keys, value, weights)) from error
    finally:
        (path / name).write_text(original)


def cases(path: Path) -> list[tuple[str, tuple[str | int, ...], object]]:
    return [
        (name, keys, value)
        for name in FILES
        for keys in settings_of(json.loads((path / name).read_text()))
        for value in OTHER
    ]


def test_some_settings_of_other_types(demo):
    for case in random.Random(1).sample(cases(demo), 30):
        compare(demo, *case)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_settings_of_other_types(name, demo):
    for case in cases(demo):
        if case[0] == name:
            compare(demo, *case)


# --- weights -----------------------------------------------------------------------------------------------------

HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
DOWN = "language_model.model.layers.3.mlp.down_proj.weight"
Weights = dict[str, torch.Tensor]


def whole(path: Path, weights: Weights, metadata: bool = True) -> None:
    save_file(weights, path / "model.safetensors", {"format": "pt"} if metadata else None)


def shards(
    path: Path, weights: Weights, extra: Sequence[str] = (), metadata: object = (), drop: bool = False
) -> None:
    """Two shards and an index, which may list more, or less, than they hold."""
    (path / "model.safetensors").unlink(missing_ok=True)
    names, index = sorted(weights), {}
    for part in range(2):
        file = f"model-{part + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[part::2]}, path / file, {"format": "pt"})
        index |= dict.fromkeys([*names[part::2], *extra], file)
    content = {"metadata": {} if metadata == () else metadata, "weight_map": index}
    if drop:
        del content["metadata"]
    (path / "model.safetensors.index.json").write_text(json.dumps(content))


def tie(path: Path) -> None:
    for keys in (["tie_word_embeddings"], ["text_config", "tie_word_embeddings"]):
        change(path / "config.json", keys, True)


def without(weights: Weights, *names: str) -> Weights:
    return {name: x for name, x in weights.items() if name not in names}


def unlisted(path: Path, weights: Weights) -> None:
    shards(path, weights)
    file = path / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    for name in (DOWN, HEAD):
        del content["weight_map"][name]
    file.write_text(json.dumps(content))


def both(path: Path, weights: Weights) -> None:
    shards(path, {name: x + 1 for name, x in weights.items()})
    whole(path, weights)


def tied(save: Callable[[Path, Weights], None]) -> Callable[[Path, Weights], None]:
    def saved(path: Path, weights: Weights) -> None:
        tie(path)
        save(path, weights)

    return saved


ODD = [
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.bool,
]
UNUSUAL: dict[str, Callable[[Path, Weights], None]] = {
    "no metadata": lambda path, w: whole(path, w, metadata=False),
    "unused tensors of all types": lambda path, w: whole(
        path, w | {f"unused.{i}": torch.ones(3).to(dtype) for i, dtype in enumerate(ODD)}
    ),
    "an empty unused tensor": lambda path, w: whole(path, w | {"unused": torch.ones(0, 3)}),
    "half": lambda path, w: whole(path, {name: x.half() for name, x in w.items()}),
    "one tensor as integers": lambda path, w: whole(
        path, w | {DOWN: torch.ones_like(w[DOWN]).to(torch.uint16)}
    ),
    "one tensor in float64": lambda path, w: whole(path, w | {DOWN: w[DOWN].double()}),
    "one tensor missing": lambda path, w: whole(path, without(w, DOWN)),
    "one tensor transposed": lambda path, w: whole(path, w | {DOWN: w[DOWN].T.contiguous()}),
    "one tensor flat": lambda path, w: whole(path, w | {DOWN: w[DOWN].flatten()}),
    "one tensor under two names": lambda path, w: whole(path, w | {"lm_head.weight": w[HEAD] + 1}),
    "one tensor under its own name": lambda path, w: whole(
        path, without(w, HEAD) | {"lm_head.weight": w[HEAD]}
    ),
    "no head": lambda path, w: whole(path, without(w, HEAD)),
    "no head, tied": tied(lambda path, w: whole(path, without(w, HEAD))),
    "no table, tied": tied(lambda path, w: whole(path, without(w, TABLE))),
    "neither, tied": tied(lambda path, w: whole(path, without(w, TABLE, HEAD))),
    "two that differ, tied": tied(whole),
    "two that are equal, tied": tied(lambda path, w: whole(path, w | {HEAD: w[TABLE].clone()})),
    "a head of another shape, tied": tied(lambda path, w: whole(path, w | {HEAD: w[HEAD][:-1]})),
    "shards": shards,
    "shards whose index lists a tied head": tied(lambda path, w: shards(path, without(w, HEAD), [HEAD])),
    "shards whose index lists a head": lambda path, w: shards(path, without(w, HEAD), [HEAD]),
    "shards whose index lists what is unknown": lambda path, w: shards(path, w, ["ghost"]),
    "shards whose index leaves tensors out": unlisted,
    "shards whose index has no metadata": lambda path, w: shards(path, w, drop=True),
    "shards whose index has no object for metadata": lambda path, w: shards(path, w, metadata=None),
    "shards and a whole file": both,
    "shards without an index": lambda path, w: (
        shards(path, w),
        (path / "model.safetensors.index.json").unlink(),
    ),
    "one shard missing": lambda path, w: (
        shards(path, w),
        (path / "model-00002-of-00002.safetensors").unlink(),
    ),
    "fewer layers": lambda path, w: change(path / "config.json", ["text_config", "num_hidden_layers"], 4),
    "more layers": lambda path, w: change(path / "config.json", ["text_config", "num_hidden_layers"], 7),
    "a variant beside": lambda path, w: save_file(
        {name: x + 1 for name, x in w.items()}, path / "model.fp16.safetensors", {"format": "pt"}
    ),
    "old buffers": lambda path, w: whole(
        path, w | {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_weights_that_transformers_loads_are_loaded_alike(kind, tiny_dir, tmp_path):
    path = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    UNUSUAL[kind](path, load_file(path / "model.safetensors"))
    with quiet_libraries():
        try:
            model, found = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            good = not any(found[part] for part in ("missing_keys", "mismatched_keys", "error_msgs"))
        except Exception:
            good = False
    if not good:
        for weights in (True, False):
            with pytest.raises(NotFoundError) as caught:
                Streamed(load(str(path), weights=False)) if not weights else load(str(path))
            assert str(path) in caught.value.message
        return
    expected = model.state_dict()
    state = load(str(path), device="cpu").model.state_dict()
    assert state.keys() == expected.keys()
    for name, x in state.items():
        assert torch.equal(x, expected[name]), name
    source = Streamed(load(str(path), device="cpu", weights=False))
    assert source._origins.keys() == expected.keys()
    with source._filled(list(expected)):
        filled = source.model.state_dict()
        for name, x in expected.items():
            assert torch.equal(filled[name], x), name


def test_a_wanted_tensor_of_a_type_that_torch_lacks_is_named(tiny_dir, tmp_path):
    path = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    file = path / "model.safetensors"
    raw = file.read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    text = raw[8:size].decode()
    entry = json.loads(text)[DOWN]
    begin, end = entry["data_offsets"]
    other = entry | {"dtype": "F6_E2M3", "shape": [(end - begin) * 8 // 6]}
    assert (end - begin) % 6 == 0
    file.write_bytes(pack(json.dumps(json.loads(text) | {DOWN: other}).encode(), raw[size:]))
    with pytest.raises(NotFoundError, match=f"{DOWN}' is of type F6_E2M3, which torch does not have"):
        load(str(path), device="cpu")


def test_unused_tensors_of_all_types_are_exported(tiny_dir, tmp_path):
    path = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    weights = load_file(path / "model.safetensors")
    UNUSUAL["unused tensors of all types"](path, weights)
    place_weights(resolve(str(path)), tmp_path, torch.bfloat16)
    made = load_file(tmp_path / "model.safetensors")
    assert made.keys() == load_file(path / "model.safetensors").keys()
    for i, dtype in enumerate(ODD):
        assert made[f"unused.{i}"].dtype == dtype
    assert torch.equal(made[DOWN], weights[DOWN].bfloat16())
