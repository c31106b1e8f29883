"""Finding, checking and loading models: values against transformers itself, and the exact words of every failure."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests import parity, tiny
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.machine import memory
from vtwcli.machine.memory import memory_available
from vtwcli.models import loading
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.families import FAMILIES, OTHERS
from vtwcli.models.hub import resolve
from vtwcli.models.loading import choose_device, choose_dtype, fits, load, memory_needed
from vtwcli.models.stored import StoredTensor, read_header

COMMIT = "a" * 40


@pytest.fixture
def copy(tiny_dir, tmp_path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def edit(file: Path, **fields) -> None:
    """Set fields of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def value_of(tensor: StoredTensor) -> torch.Tensor:
    """A stored tensor read by its offset, independently of safetensors."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        raw = stream.read(tensor.nbytes)
    return torch.frombuffer(bytearray(raw), dtype=tensor.dtype).reshape(tensor.shape)


def shard(path: Path, parts: int = 3) -> dict[str, str]:
    """Split model.safetensors of a directory into shards with an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file({name: tensors[name] for name in names[part::parts]}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[part::parts], file)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def rename(path: Path, new: bool) -> None:
    """Store the weights under the model's own names, or under the names of older checkpoints."""
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        for old, own in (
            ("language_model.lm_head", "lm_head"),
            ("language_model.model", "model.language_model"),
            ("vision_tower", "model.vision_tower"),
            ("multi_modal_projector", "model.multi_modal_projector"),
        ):
            if name.startswith(old):
                name = name.replace(old, own, 1) if new else name
                break
        else:
            raise AssertionError(name)
        tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def assert_same(found, expected=None) -> None:
    """Equal parameters and buffers, and equal logits but for rounding: what is loaded has other attention."""
    expected = expected or tiny.llava()
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, x in found.state_dict().items():
        assert torch.equal(x, state[name]), name
    batch = tiny.llava_batch(["t3 i t5", "t2 i t1 i t2"])
    parity.same(expected, found(**batch).logits, expected(**batch).logits)


# --- loading -----------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_the_saved_one(tiny_dir, capfd):
    loaded = load(str(tiny_dir))
    assert capfd.readouterr() == ("", "")
    assert_same(loaded.model)
    assert (loaded.name, loaded.path, loaded.revision) == (str(tiny_dir), tiny_dir.resolve(), None)
    assert (loaded.device, loaded.dtype, loaded.model.training) == (torch.device("cpu"), torch.float32, False)
    assert loaded.family is FAMILIES["llava"]
    assert loaded.text_model is loaded.model.model.language_model
    assert len(loaded.layers) == 6
    assert loaded.placeholder_ids == (98,)
    assert loaded.processor.image_token_id == 98
    assert loaded.config.model_type == "llava"


def test_dtype_and_attention_are_those_asked_for(tiny_dir):
    loaded = load(str(tiny_dir), dtype="bfloat16", attn="eager")
    assert {p.dtype for p in loaded.model.parameters()} == {loaded.dtype} == {torch.bfloat16}
    assert loaded.model.config.text_config._attn_implementation == "eager"


def test_a_half_precision_checkpoint_is_widened_on_a_cpu(copy):
    weights = {name: x.half() for name, x in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    edit(copy / "config.json", dtype="float16")
    loaded = load(str(copy))
    assert loaded.dtype == torch.float32
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.checkpoint.dtype == torch.float16
    assert load(str(copy), dtype="float16").model.dtype == torch.float16


def test_a_skeleton_has_no_weights_but_real_buffers(tiny_dir):
    skeleton, loaded = load(str(tiny_dir), weights=False), load(str(tiny_dir))
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}
    buffers = dict(skeleton.model.named_buffers())
    assert buffers.keys() == dict(loaded.model.named_buffers()).keys()
    for name, buffer in loaded.model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert not skeleton.model.training
    assert skeleton.processor.image_token_id == 98
    assert skeleton.model.generation_config.to_dict() == loaded.model.generation_config.to_dict()
    filled = {name: value_of(tensor) for name, tensor in skeleton.checkpoint.key_map.items()}
    skeleton.model.load_state_dict(filled, assign=True)
    assert_same(skeleton.model)


def test_a_directory_named_demo_needs_its_path(copy, monkeypatch):
    copy.rename(copy.parent / "demo")
    monkeypatch.chdir(copy.parent)
    assert resolve("./demo").path == copy.parent / "demo"


# --- the checkpoint's index --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("new", [False, True], ids=["old names", "own names"])
def test_every_parameter_is_found_under_old_and_new_names(copy, new, sharded):
    rename(copy, new)
    if sharded:
        shard(copy)
    checkpoint = resolve(str(copy))
    stored = {tensor.key for tensor in checkpoint.key_map.values()}
    layer = "layers.0.self_attn.q_proj.weight"
    assert (f"model.language_model.{layer}" in stored) is new
    assert (f"language_model.model.{layer}" in stored) is not new
    state = tiny.llava().state_dict()
    assert checkpoint.key_map.keys() == state.keys()
    for name, tensor in checkpoint.key_map.items():
        assert torch.equal(value_of(tensor), state[name]), name
    assert {tensor.file.name for tensor in checkpoint.tensors.values()} == set(checkpoint.shards)
    assert len(set(checkpoint.shards)) == (3 if sharded else 1)
    assert checkpoint.total_bytes == sum(x.nbytes for x in state.values())
    assert checkpoint.total_elements == sum(x.numel() for x in state.values())
    assert_same(load(str(copy)).model)


@pytest.mark.parametrize("model_type", sorted(t for t, row in FAMILIES.items() if not row.no_withdraw))
def test_the_key_map_of_every_family_leads_to_its_weights(model_type, tmp_path):
    model = tiny.TINY[model_type].build()
    model.save_pretrained(tmp_path)
    checkpoint = resolve(str(tmp_path))
    found = {name: value_of(tensor) for name, tensor in checkpoint.key_map.items()}
    for conversion in checkpoint.conversions.values():
        found |= conversion.convert([value_of(tensor) for tensor in conversion.sources])
    assert set(checkpoint.conversions) == set(found) - set(checkpoint.key_map)
    assert checkpoint.conversions or model_type not in ("qwen3_vl_moe", "molmo2")
    state = model.state_dict()
    assert state.keys() - found.keys() <= model.all_tied_weights_keys.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name
    for name, buffer in checkpoint.skeleton().named_buffers():
        assert name in state or torch.equal(buffer, model.get_buffer(name)), name


def test_a_tied_head_needs_no_tensor_of_its_own(tmp_path):
    model = tiny.llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model = AutoModelForImageTextToText.from_config(model.config)
    model.save_pretrained(tmp_path)
    checkpoint = resolve(str(tmp_path))
    assert "lm_head.weight" not in checkpoint.key_map
    skeleton = checkpoint.skeleton()
    assert skeleton.lm_head.weight is skeleton.model.language_model.embed_tokens.weight


def test_weight_files_named_by_the_config_come_first(copy):
    weights, config = copy / "model.safetensors", copy / "config.json"
    shutil.copy(weights, copy / "other.safetensors")
    edit(config, transformers_weights="other.safetensors")
    assert set(resolve(str(copy)).shards) == {"other.safetensors"}
    shard(copy)
    shutil.copy(copy / "other.safetensors", weights)
    edit(config, transformers_weights="model.safetensors.index.json")
    assert weights.name not in set(resolve(str(copy)).shards)
    edit(config, transformers_weights=None)
    assert set(resolve(str(copy)).shards) == {weights.name}
    for outside in ("../model/other.safetensors", "weights.bin"):
        edit(config, transformers_weights=outside)
        assert (
            failure(copy)[0]
            == f"the config of '{copy}' names '{outside}' as its weights, which is not loaded"
        )


# --- memory, devices, types --------------------------------------------------------------------------------------


def test_memory_decides_about_dtype_and_streaming(tiny_dir, monkeypatch):
    checkpoint, cpu = resolve(str(tiny_dir)), torch.device("cpu")
    wide, narrow = (memory_needed(checkpoint, d) for d in (torch.float32, torch.bfloat16))
    values = sum(x.numel() for x in tiny.llava().state_dict().values())
    assert wide == int(values * 4 * 1.1)
    assert fits(checkpoint)
    assert fits(str(tiny_dir), "cpu", "float32")
    for free, fast, dtype, whole in (
        (wide, True, torch.float32, True),
        (wide - 1, True, torch.bfloat16, True),
        (wide - 1, False, torch.float32, False),
        (narrow - 1, True, torch.bfloat16, False),
    ):
        monkeypatch.setattr(loading, "memory_available", lambda *_, free=free, **__: free)
        monkeypatch.setattr(loading, "_fast_bfloat16", lambda fast=fast: fast)
        assert choose_dtype(checkpoint, cpu) == dtype
        assert fits(checkpoint) is whole
    monkeypatch.setattr(loading, "memory_available", lambda *_, **__: 100_000)
    with pytest.raises(
        NotFoundError, match=r"^not enough memory for .*: 0\.0 GB are needed in float32"
    ) as caught:
        load(str(tiny_dir), dtype="float32")
    assert "--stream" in caught.value.hint
    assert load(str(tiny_dir), weights=False).dtype == torch.bfloat16


def test_available_memory_respects_a_container_and_other_ranks(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 100000\n")
    assert memory.cgroup_available(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.cgroup_available(tmp_path) == 2**63
    assert memory.cgroup_available(tmp_path / "absent") == 2**63
    monkeypatch.setattr(memory, "cgroup_available", lambda: 1_000_000)
    assert memory_available(torch.device("cpu")) == 1_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_available(torch.device("cpu")) == 250_000


def test_a_model_larger_than_one_gpu_is_spread_over_all(tiny_dir, monkeypatch):
    needed = memory_needed(resolve(str(tiny_dir)), torch.float32)
    free = [needed - 1, 2, 3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 0))
    asked = []

    def from_pretrained(_, **options):
        asked.append(options["device_map"])
        return tiny.llava(), {"missing_keys": set()}

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    assert fits(str(tiny_dir))
    assert not fits(str(tiny_dir), "cuda:0")
    assert load(str(tiny_dir)).device == torch.device("cuda:0")
    with pytest.raises(NotFoundError, match="not enough memory"):
        load(str(tiny_dir), device="cuda:0")
    free[:] = needed, 0, 0
    load(str(tiny_dir), device="cuda")
    load(str(tiny_dir))
    free[:] = needed - 1, 0, 0
    with pytest.raises(NotFoundError, match="not enough memory"):
        load(str(tiny_dir))
    free[:] = 0, 0, needed
    load(str(tiny_dir), device="cuda:2")
    one, last = {"": torch.device("cuda:0")}, {"": torch.device("cuda:2")}
    assert asked == ["auto", one, one, last]


def test_devices_and_types_that_do_not_exist_are_usage_errors(tiny_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for device, message in (
        ("cuda", "there is no device 'cuda': torch sees 0 CUDA devices"),
        ("cuda:1", "there is no device 'cuda:1': torch sees 0 CUDA devices"),
        ("mps", "there is no device 'mps' on this machine"),
        ("gpu", "'gpu' is not a device"),
        ("cuda:x", "'cuda:x' is not a device"),
    ):
        with pytest.raises(UsageError) as caught:
            choose_device(device)
        assert caught.value.message == message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.undo()
    with pytest.raises(UsageError, match="'float8' is not a dtype"):
        load(str(tiny_dir), dtype="float8")
    for attn in ("flash_attention_2", "nonsense"):
        with pytest.raises(UsageError, match=f"attention '{attn}' cannot be used here"):
            load(str(tiny_dir), attn=attn)


def test_half_precision_stays_on_a_gpu(copy, tiny_dir):
    gpu = torch.device("cuda:0")
    assert choose_dtype(resolve(str(tiny_dir)), gpu) == torch.float32
    weights = {name: x.bfloat16() for name, x in load_file(copy / "model.safetensors").items()}
    weights["language_model.lm_head.weight"] = weights["language_model.lm_head.weight"].float()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert choose_dtype(resolve(str(copy)), gpu) == torch.bfloat16


# --- failures ----------------------------------------------------------------------------------------------------


def failure(name, **options) -> tuple[str, str]:
    """Message and hint of a load that fails, on one line."""
    with pytest.raises(NotFoundError) as caught:
        load(str(name), **options)
    assert caught.value.exit_code == 4
    return caught.value.message, caught.value.hint or ""


def test_names_that_lead_nowhere(tmp_path, copy):
    assert failure("./nowhere") == (
        "there is no directory './nowhere'",
        "a model is a local directory, a Hub id such as llava-hf/llava-1.5-7b-hf, or demo",
    )
    assert failure("a/b/c")[0] == "there is no directory 'a/b/c'"
    assert failure("")[0] == "there is no directory ''"
    file = copy / "config.json"
    assert failure(file) == (f"'{file}' is a file; a model is a directory", f"try '{copy}'")
    assert failure(tmp_path)[0] == f"'{tmp_path}' is not a model directory: it has no config.json"


def test_configs_that_are_no_supported_vision_language_model(copy):
    config = copy / "config.json"
    original = config.read_text()
    able = sorted(name for name, row in FAMILIES.items() if not row.no_withdraw)
    supported = f"supported families: {', '.join(able)}; `vtw docs internals` says how to add one"

    edit(config, model_type="llama")
    assert failure(copy) == (
        f"'{copy}' is not a vision-language model that transformers knows: its model type is 'llama'",
        supported,
    )
    edit(config, model_type=None)
    assert failure(copy)[0].endswith("its model type is None")
    edit(config, model_type="git")
    assert failure(copy) == (
        f"'{copy}' is of the family 'git', which is not supported: {OTHERS['git']}",
        supported,
    )
    edit(config, model_type="llava", architectures=["LlavaLlamaForCausalLM"])
    assert failure(copy) == (
        f"'{copy}' was saved for LlavaLlamaForCausalLM, not for transformers' LlavaForConditionalGeneration",
        "use a checkpoint in transformers' format, for example llava-hf/llava-1.5-7b-hf",
    )
    config.write_text(original)
    edit(config, quantization_config={"quant_method": "hqq"})
    assert failure(copy)[0] == f"the weights of '{copy}' are quantized (hqq), which is not supported"
    config.write_text(original[:100])
    assert failure(copy)[0].startswith(f"{config} cannot be read: no valid JSON: ")
    config.write_text("[]")
    assert failure(copy)[0] == f"{config} cannot be read: it does not hold a JSON object"
    config.write_text(original)
    edit(config, text_config={"model_type": "llama", "hidden_size": "wide"})
    assert failure(copy)[0].startswith(f"{config} is not a valid llava config: ")


def test_damaged_weights(copy):
    file = copy / "model.safetensors"
    good = file.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])

    for content in (
        good[:-100],
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        good[: length // 2],
        good[:8] + b"x" * length + good[8 + length :],
        good + b"more",
    ):
        file.write_bytes(content)
        message, hint = failure(copy)
        assert message.startswith(f"weight file {file} is truncated or corrupt ({len(content):,} bytes): ")
        assert hint == "copy or download the model again"

    def with_header(**changes) -> bytes:
        name = "language_model.lm_head.weight"
        text = json.dumps({**header, name: {**header[name], **changes}}).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]

    for change in (
        {"shape": [99, 33]},
        {"dtype": "F3"},
        {"data_offsets": None},
        {"data_offsets": [128, 12800]},
    ):
        file.write_bytes(with_header(**change))
        assert failure(copy)[0].startswith(f"weight file {file} is truncated or corrupt ")
    file.write_bytes(with_header())
    assert load(str(copy)).layers is not None


def test_missing_and_unfitting_weights(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    kept = {name: x for name, x in tensors.items() if "layers.3.mlp" not in name or "language" not in name}
    save_file(kept, file, {"format": "pt"})
    gone = "model.language_model.layers.3.mlp.down_proj.weight"
    assert failure(copy)[0] == (
        f"the weights of '{copy}' are incomplete: 3 of 100 tensors of {copy / 'config.json'} are missing, first "
        f"'{gone}' (text_config.num_hidden_layers is 6)"
    )

    wrong = {**tensors, "language_model.lm_head.weight": torch.zeros(99, 31)}
    save_file(wrong, file, {"format": "pt"})
    assert failure(copy)[0] == (
        f"the weights of '{copy}' do not fit {copy / 'config.json'}: 'lm_head.weight' is [99, 31] on disk and "
        "[99, 32] in the model (text_config.hidden_size is 32, vision_config.intermediate_size is 32)"
    )


def test_damaged_shards(copy):
    weight_map = shard(copy)
    index = copy / "model.safetensors.index.json"
    shard_two = copy / "model-00002-of-00003.safetensors"
    content = shard_two.read_bytes()
    shard_two.unlink()
    assert failure(copy) == (f"weight file {shard_two} is missing", "copy or download the model again")
    shard_two.write_bytes(content)
    edit(index, weight_map={**weight_map, "ghost": shard_two.name})
    assert load(str(copy)).layers is not None
    for bad in ({}, {"a": "../../secret.safetensors"}, None, 3, {"a": 3}, ["a"]):
        index.write_text(json.dumps({"metadata": {}, "weight_map": bad}))
        assert failure(copy)[0].startswith(
            f"weight index {index} cannot be used: its weight_map "
        ) or failure(copy)[0].endswith("it has no weight_map")
    index.write_text("{")
    assert failure(copy)[0].startswith(f"{index} cannot be read: no valid JSON: ")


def test_pickled_weights_are_refused_unread(copy):
    (copy / "model.safetensors").unlink()
    assert failure(copy) == (
        f"'{copy}' has no weights in safetensors format",
        "expected model.safetensors, or model.safetensors.index.json and its shards",
    )
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert failure(copy)[0] == (
        f"'{copy}' has its weights only as pickle (pytorch_model.bin), which can run code and is not loaded"
    )
    assert not Path("owned").exists()


def test_missing_processors(copy):
    processor = copy / "processor_config.json"
    saved = processor.read_text()
    processor.unlink()
    assert failure(copy)[0].startswith(f"'{copy}' has no usable processor: ")
    processor.write_text(saved)
    edit(processor, patch_size=None)
    assert failure(copy)[0] == (
        f"'{copy}' has no usable processor: processor_config.json does not give patch_size"
    )
    processor.write_text(saved)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink()
    message, hint = failure(copy)
    assert message.startswith(f"'{copy}' has no usable processor: ")
    assert hint.startswith("copy the tokenizer and processor files")
    assert load_without_processor_still_resolves(copy)


def load_without_processor_still_resolves(path: Path) -> bool:
    checkpoint = resolve(str(path))
    return isinstance(checkpoint, Checkpoint) and bool(checkpoint.key_map)


def test_code_in_a_model_directory_does_not_run(copy, tmp_path):
    """The stock class is used; the code beside it, which leaves a mark, is not."""
    mark = tmp_path / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    edit(copy / "config.json", auto_map={"AutoModelForImageTextToText": "modeling_evil.Evil"})
    loaded = load(str(copy))
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"
    assert not mark.exists()


def test_headers_agree_with_safetensors(tiny_dir):
    expected = load_file(tiny_dir / "model.safetensors")
    found = read_header(tiny_dir / "model.safetensors").tensors
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(value_of(tensor), expected[name]), name


# --- the Hub, by a loopback server -------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the Hub as a download needs, for one good repository and several bad ones."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.log: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models")
        repo, _, rest = path[1:].partition("/")[2].partition("/")
        if self.command == "GET":
            self.server.log.append(path)
        if repo == "gated":
            return self.fail(401, "GatedRepo")
        if repo == "forbidden":
            return self.fail(403, "GatedRepo")
        if repo == "private":
            return self.fail(401, "RepoNotFound")
        if repo == "broken":
            return self.fail(500, "")
        if repo not in ("good", "pickle"):
            return self.fail(404, "RepoNotFound")
        files = self.server.files
        if repo == "pickle":
            files = {"pytorch_model.bin": b"pickle"} | {
                name: data
                for name, data in files.items()
                if not name.endswith((".safetensors", ".index.json"))
            }
        kind, _, rest = rest.partition("/")
        revision, _, name = rest.partition("/")
        if revision not in (COMMIT, "main", "v1"):
            return self.fail(404, "RevisionNotFound")
        if kind == "revision":
            return self.send(json.dumps({"id": f"org/{repo}", "sha": COMMIT, "siblings": []}).encode())
        if kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": f"{len(path):040x}"}
                for path, data in files.items()
            ]
            return self.send(json.dumps(entries).encode())
        if kind == "resolve" and name in files:
            return self.send(files[name], {"ETag": f'"{len(name):040x}{len(files[name])}"'})
        return self.fail(404, "EntryNotFound")

    def fail(self, status: int, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": "no"}, status)

    def send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tiny_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "served"))
    shard(folder, 2)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "onnx/config.json": b"{}", "flax_model.msgpack": b"flax"}
    files |= {"consolidated.safetensors": b"copy", "modeling_own.py": b"raise SystemExit"}
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from vtwcli.errors import VtwError
from vtwcli.models.hub import resolve
for name in sys.argv[1:]:
    try:
        found = resolve(name)
        print(json.dumps({"path": str(found.path), "revision": found.revision, "tensors": len(found.tensors)}))
    except VtwError as error:
        print(json.dumps({"exit": error.exit_code, "message": error.message, "hint": error.hint}))
"""


def resolved(home: Path, names: list[str], **environment: str) -> list[dict]:
    """What a fresh process says about each name; huggingface_hub reads its settings when it is imported."""
    import os

    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env={
            **kept,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "60",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert run.stderr == ""
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_hub_ids(hub, tmp_path):
    home = tmp_path / "home"
    names = ["good", "good@v1", "good@nope", "absent", "gated", "forbidden", "private", "pickle", "broken"]
    found = dict(
        zip(names, resolved(home, [f"org/{name}" for name in names], HF_ENDPOINT=hub.url), strict=True)
    )

    snapshot = home / "hub" / "models--org--good" / "snapshots" / COMMIT
    good = {"path": str(snapshot), "revision": COMMIT, "tensors": 100}
    assert found["good"] == found["good@v1"] == good
    start = f"/org/good/resolve/{COMMIT}/"
    fetched = {path.removeprefix(start) for path in hub.log if path.startswith(start)}
    unwanted = {
        "pytorch_model.bin",
        "onnx/config.json",
        "flax_model.msgpack",
        "consolidated.safetensors",
        "modeling_own.py",
    }
    assert fetched == hub.files.keys() - unwanted

    assert found["good@nope"] == {
        "exit": 4,
        "message": "the model 'org/good' has no revision 'nope'",
        "hint": None,
    }
    assert found["absent"] == {
        "exit": 4,
        "message": "there is no directory and no public model 'org/absent' on the Hub",
        "hint": "check the spelling; for a private model log in with: hf auth login (HTTP 404)",
    }
    assert found["private"]["message"] == "there is no directory and no public model 'org/private' on the Hub"
    for name, status in (("gated", 401), ("forbidden", 403)):
        assert found[name] == {
            "exit": 4,
            "message": f"the model 'org/{name}' is gated",
            "hint": f"ask for access on its page on the Hub, then log in with: hf auth login (HTTP {status})",
        }
    assert found["pickle"]["message"] == "'org/pickle' has no weights in safetensors format"
    assert found["broken"]["message"] == (
        "the model 'org/broken' is not on this machine, and the Hub cannot be reached"
    )
    assert "500" in found["broken"]["hint"]

    # The cache serves the model when nothing answers, and when nothing may be asked.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
        cached, refused = resolved(home, ["org/good", "org/other"], HF_ENDPOINT=dead)
    assert cached == good
    assert refused["message"] == "the model 'org/other' is not on this machine, and the Hub cannot be reached"
    assert refused["hint"].startswith("check the network and HF_ENDPOINT, or give a local directory (")
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    partial, other = resolved(home, ["org/good@v1", "org/other"], HF_HUB_OFFLINE="1")
    assert partial["message"] == (
        "the weights of 'org/good@v1' are not on this machine, and HF_HUB_OFFLINE forbids fetching them"
    )
    assert other == {
        "exit": 4,
        "message": "the model 'org/other' is not on this machine, and HF_HUB_OFFLINE forbids fetching it",
        "hint": "unset HF_HUB_OFFLINE, or give a local directory",
    }


def test_a_hand_made_cache_is_found_offline(tiny_dir, tmp_path):
    """The documented cache layout, as another tool or a copy from another machine leaves it."""
    repo = tmp_path / "hub" / "models--org--good"
    shutil.copytree(tiny_dir, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    by_branch, by_commit, wrong = resolved(
        tmp_path, ["org/good", f"org/good@{COMMIT}", "org/good@v9"], HF_HUB_OFFLINE="1"
    )
    assert by_branch == by_commit
    assert by_branch["revision"] == COMMIT
    assert by_branch["tensors"] == 100
    assert wrong["message"].startswith("the model 'org/good@v9' is not on this machine")
