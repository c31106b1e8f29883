"""Quantized weights: loaded, unpacked, streamed, measured and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import parity, quantized, tiny
from tests.test_models_streaming import INTERVENTIONS, assert_empty, items
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.export.directory.manifest import read_manifest
from vtwcli.export.onnx.export import export_onnx
from vtwcli.export.onnx.source import Source
from vtwcli.models.hub import resolve
from vtwcli.models.loading import fits, load, memory_needed
from vtwcli.models.packed import PackedTensor
from vtwcli.models.unpacking import words_to_numbers
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.streaming import Streamed
from vtwcli.sweep.sweep import sweep

KINDS = (*quantized.LIBRARY, *quantized.PACKED)
FAST = ("--limit", 2, "--max-new-tokens", 2, "--bootstrap", 0)


@pytest.fixture(scope="module")
def made(tiny_dir, tmp_path_factory):
    """A function that gives the directory of a kind, made once."""
    folder, held = tmp_path_factory.mktemp("quantized"), {}

    def of(kind: str) -> Path:
        if kind not in held:
            held[kind] = quantized.make(kind, tiny_dir, folder / kind)
        return held[kind]

    return of


@pytest.fixture
def changed(made, tmp_path):
    """A function that copies the directory of a kind to change it."""
    return lambda kind: shutil.copytree(made(kind), tmp_path / kind)


def edit(path: Path, **settings: object) -> None:
    """Change settings of the quantization."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= settings
    (path / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_the_weights_own(made, kind, tiny_dir):
    found, plain = resolve(str(made(kind))), resolve(str(tiny_dir))
    shapes = {name: weight.shape for name, weight in plain.key_map.items()}
    assert {name: weight.shape for name, weight in found.key_map.items()} == shapes
    packed = {name for name, weight in found.key_map.items() if isinstance(weight, PackedTensor)}
    assert len([name for name in packed if ".language_model.layers." in name]) == 7 * tiny.LAYERS
    assert "model.language_model.layers.0.mlp.up_proj.weight" in packed
    assert found.total_bytes < plain.total_bytes
    assert found.dtype == torch.float32
    held = memory_needed(found, torch.float32) / memory_needed(plain, torch.float32)
    assert held < 0.8 if kind in quantized.SEALED else 0.99 < held < 1.01
    assert fits(found, "cpu", "float32")


@pytest.mark.parametrize("kind", quantized.UNPACKED)
def test_unpacked_weights_are_the_librarys_and_near_the_original(made, kind, tiny_dir):
    plain, unpacked = load(str(tiny_dir)), load(str(made(kind)), unpacked=True)
    ran = load(str(made(kind))).model.state_dict()
    assert unpacked.model.dtype == torch.float32
    for name, weight in unpacked.model.state_dict().items():
        original = plain.model.state_dict()[name]
        torch.testing.assert_close(ran[name], weight, rtol=0, atol=0)  # of compressed-tensors by the library
        if not torch.equal(weight, original):
            assert "_proj.weight" in name
            parts = {"w8a8": 127, "fp8": 16, "fp8-static": 16}.get(kind, 7)
            step = original.abs().amax() * 2 / parts
            assert (weight - original).abs().max() <= step


def test_awq_is_what_compressed_tensors_makes_of_it(made):
    """A second reading of the format, by people who did not write this one."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    path, owner = made("awq"), "language_model.model.layers.1.mlp.down_proj"
    tensors = load_file(path / "model.safetensors")
    found = AutoAWQConverter(group_size=quantized.GROUP).process(
        {key: value for key, value in tensors.items() if key.startswith(f"{owner}.")}
    )
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=quantized.GROUP, symmetric=False)
    state = {key.removeprefix(f"{owner}."): value for key, value in found.items()}
    state["weight_scale"] = state["weight_scale"].float()
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    wanted = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load(str(path)).model.state_dict()[name], wanted)


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_width_come_out_of_words(bits):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    numbers = torch.randint(-half, half, (5, 70), dtype=torch.int8)
    words = pack_to_int32(numbers, bits)
    assert torch.equal(words_to_numbers(words, bits, 70) - half, numbers.int())


@pytest.mark.parametrize(("kind", "key"), [("gptq", "g_idx"), ("gptq", "scales"), ("awq", "qzeros")])
def test_parts_that_do_not_fit_are_told(changed, kind, key):
    path = changed(kind)
    tensors = load_file(path / "model.safetensors")
    name = f"language_model.model.layers.0.mlp.up_proj.{key}"
    tensors[name] = tensors[name] * 0 + 9 if key == "g_idx" else tensors[name][:, :2].contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFoundError, match=r"mlp.up_proj.weight' in .* cannot be unpacked: "):
        load(str(path))
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if key == "scales":
        with pytest.raises(NotFoundError, match=f"weights are incomplete: '.*{key}' is missing"):
            load(str(path))


def test_settings_that_are_refused(changed):
    path = changed("awq")
    edit(path, quant_method="hqq")
    with pytest.raises(NotFoundError, match=r"are quantized \(hqq\), which is not supported"):
        resolve(str(path))
    edit(path, quant_method="compressed-tensors", kv_cache_scheme={"num_bits": 8})
    with pytest.raises(NotFoundError, match="quantizes its KV cache"):
        resolve(str(path))
    edit(path, quant_method="awq", version="gemv")
    with pytest.raises(NotFoundError, match="gptqmodel is not installed"):
        load(str(path))
    with pytest.raises(UsageError, match="AWQ's version gemv with 4 bits is unpacked by gptqmodel alone"):
        export_onnx(resolve(str(path)), 3, path.parent / "out")


# ------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_is_the_slow_reference_on_the_quantized_model(made, kind):
    # inputs that are rounded to whole numbers fall on either side by the last bit: not in float64
    dtype = torch.float64 if kind == "w8a8" else torch.float32
    model = load(str(made(kind)), device="cpu", dtype=dtype).model
    for rows, side in (
        (["i t4", "t2 i t3 i t2", "t9"], "left"),
        (["t3 i t5", "t9"], "right"),
        (["t1 i t4"], "left"),
    ):
        if kind == "int8":
            _int8(model, rows, side)
        else:
            parity.forward(model, tiny.llava_batch, rows, side, layers=[0, 3])


def _int8(model, rows, side):
    """bitsandbytes rounds inputs to float16 and to whole numbers on the way, so that a value may fall one step off."""
    from tests import reference
    from vtwcli.runtime import pruned

    batch = tiny.llava_batch(rows, side=side)
    visual = reference.visual_mask(model, batch["input_ids"])
    text = batch["attention_mask"].bool() & ~visual
    for k in (0, 3):
        wanted = reference.logits(model, batch, reference.withdrawal(model, visual, k))[text].log_softmax(-1)
        with torch.no_grad(), pruned(model, k):
            found = model(**batch).logits[text].log_softmax(-1)
        assert (wanted.exp() * (wanted - found)).sum(-1).max() < 1e-2


@pytest.mark.parametrize("kind", quantized.UNPACKED)
def test_streamed_is_what_the_loaded_model_gives(made, kind):
    dtype = torch.float64 if kind == "w8a8" else torch.float32
    loaded = load(str(made(kind)), device="cpu", dtype=dtype)
    streamed = Streamed(load(str(made(kind)), device="cpu", dtype=dtype, weights=False))
    want = sweep(Resident(loaded.model.requires_grad_(False), loaded.family), items(dtype), INTERVENTIONS)
    got = sweep(streamed, items(dtype), INTERVENTIONS)
    for w, g in zip(want, got, strict=True):
        assert w.kl[0].min() > 1e-3
        torch.testing.assert_close(g.kl, w.kl, rtol=1e-5, atol=1e-5)
        assert torch.equal(g.top1, w.top1)
    assert_empty(streamed)


@pytest.mark.parametrize("kind", quantized.SEALED)
def test_what_only_a_library_unpacks_is_refused(made, kind, tmp_path):
    loaded = load(str(made(kind)), device="cpu", weights=False)
    with pytest.raises(UsageError, match=r"its layers cannot be streamed: .* unpack"):
        Streamed(loaded)
    with pytest.raises(UsageError, match=r"no graphs can be made of it: .* unpack"):
        export_onnx(resolve(str(made(kind))), 3, tmp_path / "onnx")
    with pytest.raises(NotFoundError, match="cannot be unpacked: "):
        load(str(made(kind)), device="cpu", unpacked=True)


# ------------------------------------------------------------------ commands


@pytest.mark.parametrize("kind", ["w4a16", "nf4"])
def test_every_command(vtw, made, data, kind):
    path = made(kind)
    for name, *more in (
        ("calibrate", "--eta", 1e3, *FAST, "--output", "k.json"),
        ("analyze", "--limit", 2, "--output", "a.json"),
        ("budget", *FAST[:4], "--output", "b.json"),
        ("eval", "--layer", 3, *FAST, "--no-timing", "--output", "e.json"),
    ):
        code, _, err = vtw(name, path, "--data", data, *more)
        assert code == 0, (name, err)
    assert json.loads(Path("e.json").read_text())["schedules"]["K=3"]["kl_answer"] > 0


@pytest.mark.parametrize("kind", ["w4a16", "fp8-static", "nf4", "int8", "torchao"])
def test_an_export_keeps_files_and_settings_and_verifies(vtw, made, kind):
    path = made(kind)
    code, _, err = vtw("export", path, "--layer", 3, "--output", "pruned")
    assert (code, err) == (0, "")
    assert (Path("pruned") / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    was, now = (
        json.loads((p / "config.json").read_text())["quantization_config"] for p in (path, Path("pruned"))
    )
    more = set(now.pop("ignore", ())) - set(was.pop("ignore", ()))  # the same layers by their present names
    assert was == now
    assert all("vision" in name or "projector" in name or "lm_head" in name for name in more)
    assert read_manifest(Path("pruned"))["quantization"].startswith(was["quant_method"])
    code, _, err = vtw("verify", "pruned")
    assert code == 0, err


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_without_its_library_an_export_is_made_and_cannot_be_run(vtw, made, data, kind):
    if not resolve(str(made(kind))).quantization.missing:
        pytest.skip("gptqmodel is installed")
    code, _, err = vtw("export", made(kind), "--layer", 3, "--output", "pruned")
    assert code == 0 and err.startswith("warning: not loaded to see that all weights are found: gptqmodel")
    code, _, err = vtw("verify", "pruned")
    assert code == 4 and "not installed\n  pip install gptqmodel" in err
    args = ("--data", data, *FAST, "--eta", 1e3, "--stream", "--output", "k.json")
    code, _, err = vtw("calibrate", "pruned", *args)
    assert code == 0, err


def test_quantized_weights_are_not_converted(vtw, made):
    code, _, err = vtw("export", made("gptq"), "--layer", 3, "--dtype", "bfloat16", "--output", "pruned")
    assert code == 2
    assert "is quantized (gptq 4-bit), so its weights stay as they are\n  leave out --dtype" in err


@pytest.mark.parametrize("kind", quantized.UNPACKED)
def test_graphs_get_the_unpacked_weights(made, kind):
    read = Source.of(resolve(str(made(kind)))).read
    for name, weight in load(str(made(kind)), unpacked=True).model.state_dict().items():
        assert torch.equal(read([name]), weight)


@pytest.mark.parametrize("kind", ["w8a8", "awq"])
def test_graphs_compute_what_the_unpacked_model_computes(made, kind, tmp_path, capsys):
    pytest.importorskip("onnx")
    report = export_onnx(resolve(str(made(kind))), 3, tmp_path / "onnx", steps=2)
    assert report["parity"]["agreement"] == 1.0 and report["parity"]["max_logit_difference"] < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "onnx/config.json").read_text())
    said = "quantizes activations too; its weights are unpacked exactly" in capsys.readouterr().err
    assert said == (kind == "w8a8")


def test_zero_points_that_transformers_cannot_load(vtw, made):
    code, _, err = vtw("export", made("w4a16-zero"), "--layer", 3, "--output", "pruned")
    assert code == 4 and "transformers does not load" in err
