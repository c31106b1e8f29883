"""Exports of a tiny LLaVA, each compared with the slow references."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript
import pytest
import torch
import transformers

from tests import reference, slow_schedule, tiny
from tests.conftest import build_processor
from tests.engines import BACKENDS, needs_openvino
from tests.onnx_exports import EXPORTS, keep, withdraw
from vtwcli import ort
from vtwcli.errors import GateError, UsageError, VtwError
from vtwcli.export.hf.export import export_hf
from vtwcli.export.onnx import export
from vtwcli.export.onnx import layers as onnx_layers
from vtwcli.export.onnx import parity as onnx_parity
from vtwcli.export.onnx import trace as onnx_trace
from vtwcli.export.onnx.companions import scripts, write_companions
from vtwcli.export.onnx.export import export_onnx
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import encode_batch
from vtwcli.models.loading import load
from vtwcli.ort import OnnxModel
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule

STEPS = 5
ROWS = ["t3 i t5", "i t1 i t3", "t4"]


def compared(directory, model, actions, rows=ROWS, side="left", seed=5, backend="onnx"):
    """``compare`` of the graphs with the slow interpreter, on a batch padded on ``side``."""
    left = tiny.llava_batch(rows, seed=seed)
    tokens, logits, _ = slow_schedule.greedy(model, left, actions, STEPS)
    batch = tiny.llava_batch(rows, seed=seed, side=side)
    graphs = OnnxModel(directory, threads=1, backend=backend)
    return onnx_parity.compare(logits.numpy(), onnx_parity.onnx_steps(graphs, batch, tokens.numpy()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_computes_what_the_slow_reference_computes(name, backend, exports):
    _, actions, options, roles = EXPORTS[name]
    directory, report = exports(name)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert [graph["role"] for graph in manifest["graphs"]] == ["embed_tokens", "vision_encoder", *roles]
    assert report["parity"]["agreement"] == 1.0 and report["parity"]["positions"] == 12
    result = compared(directory, exports.loaded(name).model, actions, backend=backend)
    if "quantize" in options:  # random weights in rows of 32 suffer more from four bits than trained ones
        measured = report["parity"]["quantized"]
        assert (
            measured["kind"] == "int4" and 1e-6 < measured["mean_kl"] < 2 and 0 < measured["agreement"] <= 1
        )
        assert 1e-6 < result["mean_kl"] < 2
    elif options.get("dtype") == "fp16":
        assert result["agreement"] == 1.0 and 1e-9 < result["mean_kl"] < 1e-3
    else:
        assert result["agreement"] == 1.0 and result["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("name", ["none", "freeze whole"])
def test_weights_of_eight_bits(name, exports, tmp_path):
    _, actions, _, [role] = EXPORTS[name]
    directory = shutil.copytree(exports(name)[0], tmp_path / "copy")
    before = (directory / f"{role}.onnx.data").stat().st_size
    source, manifest = export.Source.of(exports.loaded(name)), OnnxModel(directory).manifest
    report = export.check(source, Schedule.from_dict(actions), directory, manifest, None, 4, "int8")
    assert report["agreement"] == 1.0 and manifest["quantize"] == report["quantized"]["kind"] == "int8"
    assert 1e-6 < report["quantized"]["mean_kl"] < 0.1
    result = compared(directory, exports.loaded(name).model, actions)
    assert 1e-6 < result["mean_kl"] < 0.1
    if find_spec("openvino"):
        result = compared(directory, exports.loaded(name).model, actions, backend="openvino")
        assert 1e-6 < result["mean_kl"] < 0.1
    kinds = {node.op_type for node in onnx.load(directory / f"{role}.onnx").graph.node}
    assert "MatMulInteger" in kinds and (directory / f"{role}.onnx.data").stat().st_size < before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [["t3 i t5"], ["i t2", "t9 i t1 i t4"], ["t6", "t2"], ["t1", "i t1"]])
def test_batches_of_every_kind(rows, side, exports):
    directory, _ = exports("split")
    result = compared(directory, exports.loaded("split").model, [withdraw(1)], rows, side)
    assert result["agreement"] == 1.0 and result["max_logit_difference"] < 1e-4
    full = compared(exports("full half")[0], exports.loaded("full half").model, [], rows, side)
    assert full["agreement"] == 1.0 and full["mean_kl"] < 1e-3


@needs_openvino
@pytest.mark.parametrize(
    ("rows", "side"), [(["i t2", "t9 i t1 i t4"], "left"), (["t6", "t2"], "right"), (["t1", "i t1"], "right")]
)
def test_batches_in_openvino(rows, side, exports):
    directory, model = exports("split")[0], exports.loaded("split").model
    result = compared(directory, model, [withdraw(1)], rows, side, backend="openvino")
    assert result["agreement"] == 1.0 and result["max_logit_difference"] < 1e-4


@needs_openvino
@pytest.mark.parametrize(("name", "gap"), [("split", 1e-4), ("full half", 0.05)])
def test_long_answers_in_openvino_are_those_of_onnx_runtime(name, gap, exports):
    batch = tiny.llava_batch(ROWS, seed=5)
    one, other = (OnnxModel(exports(name)[0], threads=1, backend=backend) for backend in ort.BACKENDS)
    tokens = one.generate(batch, 60, eos_ids=[])
    expected, actual = (onnx_parity.onnx_steps(graphs, batch, tokens) for graphs in (one, other))
    np.testing.assert_allclose(actual, expected, atol=gap)
    if name == "split":  # in half precision two tokens of random weights may be as likely
        assert np.array_equal(other.generate(batch, 60, eos_ids=[]), tokens)


@needs_openvino
@pytest.mark.parametrize("name", ["merged int4", "freeze merged int4"])
def test_weights_of_four_bits_are_the_same_numbers_in_openvino(name, exports, tmp_path):
    """ONNX Runtime rounds what meets them to eight bits, because the graphs ask for it, and OpenVINO does not."""
    copy = shutil.copytree(exports(name)[0], tmp_path / "copy")
    model = onnx.load(copy / "decoder_merged.onnx", load_external_data=False)
    levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
    for level in levels:
        level.i = 1  # float32
    onnx.save(model, copy / "decoder_merged.onnx")
    batch = tiny.llava_batch(ROWS, seed=5)
    exact, rounded = (OnnxModel(folder, threads=1) for folder in (copy, exports(name)[0]))
    graphs = OnnxModel(exports(name)[0], threads=1, backend="openvino")
    tokens = exact.generate(batch, 20, eos_ids=[])
    expected, other, actual = (
        onnx_parity.onnx_steps(each, batch, tokens) for each in (exact, rounded, graphs)
    )
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert levels and np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_generations_do_not_write_over_each_other(backend, exports):
    graphs = OnnxModel(exports("split")[0], threads=1, backend=backend)
    batches = [tiny.llava_batch([row], seed=5) for row in ("t3 i t5", "i t1 i t3")]
    alone = [graphs.generate(batch, 4, eos_ids=[]).tolist() for batch in batches]
    (one, mine), (other, theirs) = (graphs.prefill(batch) for batch in batches)
    said = [[one.argmax(-1)], [other.argmax(-1)]]
    for _ in range(3):
        one, other = graphs.step(said[0][-1], mine), graphs.step(said[1][-1], theirs)
        said[0].append(one.argmax(-1))
        said[1].append(other.argmax(-1))
    assert [np.stack(columns, 1).tolist() for columns in said] == alone and alone[0] != alone[1]
    assert mine.cache_lengths() == [20, 11, 11] and theirs.cache_lengths() == [25, 7, 7]
    assert mine.cache_bytes() == 42 * 2 * 2 * 8 * 4


def test_pruning_changes_the_numbers(exports):
    """The comparison can fail: the full model's logits are far from those of the split graphs."""
    assert compared(exports("split")[0], exports.loaded("split").model, [])["max_logit_difference"] > 0.1


def test_generation_is_that_of_torch(exports):
    model, graphs = exports.loaded("split").model, OnnxModel(exports("split")[0])
    batch = tiny.llava_batch(ROWS, seed=5)
    with torch.no_grad(), pruned(model, 1):
        free = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, -8:]
        end = int(free[0, 2])
        expected = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=end)
    width = batch["input_ids"].shape[1]
    seen = []
    actual = graphs.generate(batch, 8, eos_ids=[end], on_token=seen.append)
    assert actual.tolist() == expected[:, width:].tolist()
    assert [column.tolist() for column in np.stack(seen, 1)] == actual.tolist()
    assert graphs.generate(batch, 0).shape == (3, 0)
    assert graphs.manifest["tokens"]["eos_ids"] == [2]  # the tokenizer's, since the model names none


def test_sampling_is_seeded(exports):
    graphs, batch = OnnxModel(exports("split")[0]), tiny.llava_batch(ROWS, seed=5)
    draws = [graphs.generate(batch, 6, do_sample=True, seed=seed, eos_ids=[]).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    greedy = graphs.generate(batch, 6, eos_ids=[]).tolist()
    assert (
        graphs.generate(batch, 6, do_sample=True, top_k=1, seed=3, eos_ids=[]).tolist() == greedy != draws[0]
    )


def test_features_can_be_reused(exports):
    graphs, batch = OnnxModel(exports("split")[0]), tiny.llava_batch(["t3 i t5"], seed=5)
    arrays = {name: value.numpy() for name, value in batch.items()}
    features = graphs.features(arrays)
    assert features.shape == (9, 32)
    again = {"input_ids": arrays["input_ids"], "image_features": features}
    assert np.array_equal(graphs.prefill(arrays)[0], graphs.prefill(again)[0])


def test_inputs_that_do_not_fit_are_refused(exports):
    graphs = OnnxModel(exports("split")[0])
    batch = {name: value.numpy() for name, value in tiny.llava_batch(["t3 i t5"], seed=5).items()}
    with pytest.raises(ort.UsageError, match="9 visual tokens, the images give 0"):
        graphs.prefill({"input_ids": batch["input_ids"]})
    with pytest.raises(ort.UsageError, match="ends with a visual token"):
        graphs.prefill({**batch, "input_ids": batch["input_ids"][:, :-5], "attention_mask": None})
    with pytest.raises(ort.UsageError, match="no videos"):
        graphs.prefill({**batch, "pixel_values_videos": batch["pixel_values"]})
    with pytest.raises(ort.UsageError, match="has no tokens"):
        graphs.prefill({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"] * 0})
    with pytest.raises(ort.UsageError, match="513 tokens are more than the model's 512"):
        graphs.prefill({"input_ids": np.full((1, 513), 5)})
    with pytest.raises(ort.UsageError, match="no device 'cuda'"):
        OnnxModel(graphs.directory, device="cuda")
    with pytest.raises(ort.UsageError, match="'jax' is no backend of graphs"):
        OnnxModel(graphs.directory, backend="jax")


@needs_openvino
def test_openvino_refuses_what_it_cannot_open(exports, tmp_path):
    with pytest.raises(ort.UsageError, match=r"this OpenVINO has no device 'cuda' \(it has cpu\)"):
        OnnxModel(exports("split")[0], device="cuda", backend="openvino")
    copy = shutil.copytree(exports("split")[0], tmp_path / "copy")
    (copy / "embed_tokens.onnx").write_bytes(b"\0" * 64)
    with pytest.raises(ort.NotFoundError, match=r"embed_tokens.onnx cannot be loaded: (?!Exception from)\w"):
        OnnxModel(copy, backend="openvino").embed(np.zeros((1, 1)))


@pytest.mark.parametrize(("backend", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_an_engine_that_is_not_installed(backend, package, exports, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ort.UsageError, match=f"is not installed; install it with: pip install {package}$"):
        OnnxModel(exports("split")[0], backend=backend)


def test_files_names_and_hashes(exports):
    directory, report = exports("split")
    manifest = json.loads((directory / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (directory / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(manifest["files"]) | {"manifest.json"} == {
        str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()
    }
    assert report["bytes"] == sum(entry["bytes"] for entry in manifest["files"].values())
    companions = ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json")
    others = ("config.json", "LICENSE", "run_onnx.py", "vtw_ort/__init__.py", "vtw_pixels.py", "parity.json")
    assert {*companions, *others} <= set(manifest["files"])
    assert manifest["model"] == {"name": "tiny-llava-3", "revision": None, "model_type": "llava"}
    assert json.loads((directory / "parity.json").read_text()) == report["parity"]
    assert manifest["withdrawal_layer"] == 1 and manifest["schedule"]["actions"] == [withdraw(1)]
    assert manifest["tokens"]["placeholder_ids"] == [tiny.IMAGE_ID]
    libraries = (transformers, torch, onnx, onnxruntime, onnxscript)
    assert manifest["versions"].items() >= {each.__name__: each.__version__ for each in libraries}.items()
    assert manifest["tested"] == {"onnxruntime": [onnxruntime.__version__]}
    card = " ".join((directory / "README.md").read_text().split())
    assert card.startswith("# split ONNX graphs of `tiny-llava-3` with a visual token schedule baked in.")
    assert "- From layer 1 of 3 on there are no visual tokens" in card
    assert (
        f"with transformers {transformers.__version__}, torch {torch.__version__}, onnx {onnx.__version__}"
        in card
    )
    assert f"checked against torch with ONNX Runtime {onnxruntime.__version__} (`parity.json`)" in card
    assert manifest["prompt"]["image"] == "USER: <image>\n{question} ASSISTANT:"
    assert any("keep_index" in step for step in manifest["how_to"])
    for graph in manifest["graphs"]:
        model = onnx.load(directory / graph["file"], load_external_data=False)
        onnx.checker.check_model(directory / graph["file"], full_check=True)
        for ports, values in ((graph["inputs"], model.graph.input), (graph["outputs"], model.graph.output)):
            shapes = [
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values
            ]
            assert [port["name"] for port in ports] == [value.name for value in values]
            assert all(
                actual == declared or isinstance(declared, str)
                for port, shape in zip(ports, shapes, strict=True)
                for actual, declared in zip(shape, port["shape"], strict=True)
            )
        text = (directory / graph["file"]).read_bytes()
        assert b"site-packages" not in text and str(Path.home()).encode() not in text
    upper = manifest["graphs"][-1]
    assert [port["name"] for port in upper["inputs"]] == [
        *("hidden_states", "keep_index", "logits_index", "attention_mask", "position_ids"),
        *(f"past_key_values.{d}.{part}" for d in (1, 2) for part in ("key", "value")),
    ]
    assert [port["name"] for port in upper["outputs"]] == [
        "logits",
        *(f"present.{d}.{part}" for d in (1, 2) for part in ("key", "value")),
    ]
    assert upper["inputs"][-1]["shape"] == ["batch_size", 2, "kept_past_length", 8]


def test_the_words_about_driving_fit_the_graphs(exports):
    def words(name):
        return " ".join(json.loads((exports(name)[0] / "manifest.json").read_text())["how_to"])

    assert "score_index" in words("keep") and "score_index" not in words("split")
    assert "kept_attention_mask" in words("merged int4") and "kept_attention_mask" not in words("keep")
    assert "keep_index" not in words("full half") and "then decoder:" in words("full half")


def test_an_exported_model_is_exported_without_its_code(exports, tmp_path):
    export_hf(str(exports.model("none")), Schedule.withdraw_at(0), tmp_path / "hf")
    assert "auto_map" in json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "onnx").mkdir()
    manifest = {"graphs": [], "positions": "count", "merged": False, "tokens": {}}
    write_companions(export.Source.of(resolve(str(tmp_path / "hf"))), manifest, tmp_path / "onnx")
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["model_type"] == "llava" and not {"vtw", "auto_map"} & set(config)
    found = {str(path.relative_to(tmp_path / "onnx")) for path in (tmp_path / "onnx").rglob("*.py")}
    assert (
        {"run_onnx.py", "vtw_pixels.py", "vtw_ort/__init__.py", "vtw_ort/model.py"} <= found == set(scripts())
    )


@pytest.mark.parametrize("nested", [False, True])
def test_settings_of_a_video_part_travel_along(exports, tmp_path, nested):
    shutil.copytree(exports.model("none"), tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    name, settings = "video_preprocessor_config.json", {"video_processor_type": "ThatVideoProcessor"}
    if nested:
        file = tmp_path / "model/processor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"video_processor": settings}))
    else:
        (tmp_path / "model" / name).write_text(json.dumps(settings))
    manifest = {"graphs": [], "positions": "count", "merged": False, "tokens": {}}
    write_companions(export.Source.of(resolve(str(tmp_path / "model"))), manifest, tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx" / name).read_text()) == settings


def test_weights_lie_outside_and_no_transpose_of_them_is_left(exports):
    directory, _ = exports("split")
    model = onnx.load(directory / "decoder_upper.onnx", load_external_data=False)
    weights = {w.name: w for w in model.graph.initializer if w.name.endswith("weight")}
    assert "lm_head.weight" in weights and "model.language_model.layers.2.mlp.up_proj.weight" in weights
    assert not any("layers.0." in name for name in weights)
    large = [w for w in weights.values() if np.prod(w.dims) * 4 >= 1024]
    assert large and all(w.data_location == onnx.TensorProto.EXTERNAL for w in large)
    assert not any(n.op_type == "Transpose" and n.input[0] in weights for n in model.graph.node)


@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_is_converted_when_it_is_written(turned):
    weight = torch.tensor([[1.0, 1 / 3, -2.5]])
    shape = [3, 1] if turned else [1, 3]
    half = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(shape))
    stored = onnx_trace._lazy(half, ["w"], turned, lambda names: weight).numpy()
    assert stored.dtype == np.float16 and stored.shape == tuple(shape)
    assert stored.ravel().tolist() == weight.half()[0].tolist()
    for wrong, said in (
        (1e6, "has values that float16 cannot hold"),
        (float("nan"), "holds values that are not"),
    ):
        broken = onnx_trace._lazy(half, ["w"], turned, lambda names, w=wrong: torch.full((1, 3), w))
        with pytest.raises(VtwError, match=f"w {said}"):
            broken.numpy()


def test_fused_operators_from_opset_23(exports):
    kinds = {node.op_type for node in onnx.load(exports("keep")[0] / "decoder_upper.onnx").graph.node}
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= kinds and "Softmax" not in kinds


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_script_runs_without_torch_transformers_and_this_package(backend, exports, tmp_path):
    (directory, _), torch_side = exports("split"), exports.loaded("split")
    image, question = export.synthetic_samples()[1].images[0], "how red?"
    image.save(tmp_path / "picture.png")
    other, more = {"onnx": ("openvino", []), "openvino": ("onnxruntime", ["--backend", "openvino"])}[backend]
    bare = "import runpy, sys; " + "".join(
        f"sys.modules[{name!r}] = None; " for name in ("torch", "transformers", "vtwcli", "datasets", other)
    )
    bare += "sys.path.insert(0, sys.argv[1]); sys.argv[:2] = ['run_onnx.py']; "
    bare += "runpy.run_path(sys.path[0] + '/run_onnx.py', run_name='__main__')"

    def run(*arguments):
        command = [
            sys.executable,
            "-c",
            bare,
            str(directory),
            *arguments,
            question,
            *more,
            "--max-new-tokens",
            "7",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sample = dataclasses.replace(export.synthetic_samples()[1], prompt=question)
    for arguments, asked in (
        (["--image", "picture.png"], sample),
        ([], dataclasses.replace(sample, images=())),
    ):
        batch = encode_batch(torch_side, [asked])
        with torch.no_grad(), pruned(torch_side.model, 1):
            tokens = torch_side.model.generate(**batch, max_new_tokens=7, do_sample=False, eos_token_id=2)
        tokens = tokens[0, batch["input_ids"].shape[1] :]
        expected = torch_side.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert run(*arguments) == expected + "\n"
    assert run("--temperature", "5", "--seed", "1") == run("--temperature", "5", "--seed", "1")


# ------------------------------------------------------------------------------------------------ the parity check


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(export, "memory_available", lambda device: 0)


def checked(source, k, exports, name="split", quantize=None, backend="onnx"):
    directory, _ = exports(name)
    manifest = json.loads((directory / "manifest.json").read_text())
    return export.check(source, Schedule.withdraw_at(k), directory, manifest, None, 4, quantize, backend)


@pytest.mark.parametrize(("name", "k"), [("split", 1), ("none", 0), ("full half", 2)])
def test_layer_by_layer_where_the_model_does_not_fit(name, k, exports, no_memory, monkeypatch):
    monkeypatch.setattr("vtwcli.models.loading.memory_available", lambda device: 0)
    report = checked(export.Source.of(resolve(str(exports.model(name)))), k, exports, name)
    assert report["method"] == "layer by layer" and report["agreement"] == 1.0 and report["positions"] == 12
    assert report["mean_kl"] < (1e-3 if name == "full half" else 1e-9)
    assert not (exports(name)[0] / "piece.onnx").exists()


@needs_openvino
def test_layer_by_layer_in_openvino(exports, no_memory, monkeypatch):
    monkeypatch.setattr("vtwcli.models.loading.memory_available", lambda device: 0)
    source = export.Source.of(resolve(str(exports.model("split"))))
    report = checked(source, 1, exports, backend="openvino")
    assert report["method"] == "layer by layer" and report["engine"].startswith("OpenVINO ")
    assert report["agreement"] == 1.0 and report["mean_kl"] < 1e-9
    assert not (exports("split")[0] / "piece.onnx").exists()


def test_layer_by_layer_finds_a_wrong_cut(exports, no_memory):
    with pytest.raises(GateError, match="parity failed"):
        checked(export.Source.of(resolve(str(exports.model("split")))), 2, exports)


def test_layer_by_layer_refuses_what_it_cannot_prove(exports, no_memory):
    source = export.Source.of(resolve(str(exports.model("split"))))
    with pytest.raises(UsageError, match="the model in memory, and it does not fit"):
        checked(source, 1, exports, quantize="int8")
    directory, _ = exports("split")
    schedule = Schedule.from_dict([keep(1, score="attention", count=4)])
    with pytest.raises(UsageError, match="schedule with keep is checked by generation"):
        export.check(source, schedule, directory, {"dtype": "fp32"}, None, 4, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_merged_graph_layer_by_layer(backend, exports):
    """The merged graphs are quantized on disk, so the pieces are compared loosely and with each other."""
    skeleton = load(str(exports.model("merged int4")), device="cpu", dtype="float32", weights=False)
    graphs = OnnxModel(exports("merged int4")[0], backend=backend)
    result = onnx_layers.parity(skeleton, 1, graphs, export.synthetic_samples(), 3)
    assert 1e-9 < result["mean_kl"] < 0.3


def test_a_changed_weight_fails_the_check(exports):
    changed = load(str(exports.model("split")), device="cpu", dtype="float32")
    with torch.no_grad():
        changed.layers[2].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(GateError, match=r"parity failed: .*logits differ by up to"):
        checked(export.Source.of(changed), 1, exports)


def test_a_failed_check_leaves_nothing(exports, tmp_path, monkeypatch):
    """The graphs of one model are offered as another's."""
    tiny.llava(seed=2, layers=1).save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    graphs, _ = exports("none")

    def of_another(source, cuts, folder, **options):
        shutil.copytree(graphs, folder, dirs_exist_ok=True)
        return json.loads((graphs / "manifest.json").read_text())

    monkeypatch.setattr(export, "write_graphs", of_another)
    with pytest.raises(GateError, match="parity failed") as caught:
        export_onnx(resolve(str(tmp_path / "model")), 0, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_gate_bounds():
    good = {"agreement": 1.0, "positions": 9, "max_logit_difference": 1e-4, "max_logit": 5.0, "mean_kl": 1e-9}
    onnx_parity.gate(good, "fp32")
    for wrong in (
        {"agreement": 0.99},
        {"max_logit_difference": 2e-3},
        {"max_logit_difference": float("nan")},
    ):
        with pytest.raises(GateError):
            onnx_parity.gate({**good, **wrong}, "fp32")
    onnx_parity.gate({**good, "agreement": 0.9, "mean_kl": 5e-3}, "fp16")
    for kl in (0.02, float("nan")):
        with pytest.raises(GateError):
            onnx_parity.gate({**good, "mean_kl": kl}, "fp16")


def test_compare_by_hand():
    reference_logits = np.log(np.array([[[0.5, 0.5], [0.9, 0.1]]]))
    logits = np.log(np.array([[[0.25, 0.75], [0.9, 0.1]]]))
    result = onnx_parity.compare(reference_logits, logits)
    expected = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert result["agreement"] == 0.5 and result["positions"] == 2
    assert result["max_kl"] == pytest.approx(expected) and result["mean_kl"] == pytest.approx(expected / 2)
    merged = onnx_parity.merge([result, {**result, "positions": 6, "agreement": 1.0}])
    assert merged["positions"] == 8 and merged["agreement"] == pytest.approx(0.875)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("schedule", "options", "message", "hint"),
    [
        (
            [{"at": "auto", "action": "withdraw", "when": {"cosine_above": 0.99}}],
            {},
            "a dynamic schedule cannot be exported to ONNX",
            "static schedule",
        ),
        ([keep(1, score="attention", above=0.1)], {}, "a dynamic schedule", "static schedule"),
        ([{"at": 0, "until": 1, "action": "mute"}], {}, "the action mute cannot be exported", "--format hf"),
        ([keep(1, score="random", count=3)], {}, "random scores cannot be exported", "uniform"),
        (
            [keep(1, score="uniform", count=3), withdraw(1)],
            {},
            "two actions at one layer",
            "different layers",
        ),
        ([keep(1, score="attention", count=3)], {"merged": True}, "one merged graph", "without --merged"),
        ([withdraw(4)], {}, "the model has 3 layers", None),
        ([withdraw(1)], {"dtype": "bf16"}, "'bf16' is no export type", "fp32 or fp16"),
        ([withdraw(1)], {"opset": 17}, "opset 17", "18 to 24"),
        ([withdraw(1)], {"quantize": "int2"}, "'int2' is no quantization", "int8 or int4"),
        ([withdraw(1)], {"quantize": "int4", "dtype": "fp16"}, "quantization starts from fp32", None),
    ],
)
def test_what_cannot_be_exported_is_refused_with_a_way_out(
    schedule, options, message, hint, exports, tmp_path
):
    plan = {"format_version": 1, "actions": schedule}
    with pytest.raises(UsageError, match=message) as caught:
        export_onnx(resolve(str(exports.model("split"))), plan, tmp_path / "out", **options)
    assert hint is None or hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_before_any_work(exports, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        export_onnx(resolve(str(exports.model("split"))), 1, tmp_path)


@pytest.mark.parametrize("name", ["pixtral", "gemma3"])
def test_families_without_an_export(name, tmp_path):
    from vtwcli.export.onnx.graphs import all_graphs
    from vtwcli.models.families import family_of

    model = (tiny.TINY | tiny.VARIANTS)[name].build(layers=1)
    with pytest.raises(UsageError, match="has no ONNX export"):
        all_graphs(model, family_of(model.config), [], False, torch.float32)


def test_a_sliding_window_bounds_the_length():
    from vtwcli.export.onnx.graphs import max_length

    window = tiny.VARIANTS["llava-mistral-window"].build(layers=1).config.get_text_config()
    assert max_length(window) == 8 and max_length(tiny.llava(layers=1).config.get_text_config()) == 512


def test_reference_is_independent_of_the_runtime(exports):
    """Both slow references agree with each other on withdrawal, so either may judge the graphs."""
    batch, model = tiny.llava_batch(ROWS, seed=5), exports.loaded("split").model
    tokens, logits = reference.greedy(model, batch, 1, 3)
    others, again, _ = slow_schedule.greedy(model, batch, [withdraw(1)], 3)
    assert torch.equal(tokens, others)
    torch.testing.assert_close(logits, again, rtol=0, atol=1e-4)
