"""``verify`` on a directory of ONNX graphs: passes what is whole and right, and says what is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from importlib import metadata

import onnx
import onnxruntime
import pytest
import torch
import transformers

from tests.cli import vtw
from tests.engines import needs_openvino
from tests.onnx_exports import withdraw
from vtwcli.errors import GateError, NotFoundError, UsageError
from vtwcli.export.formats import verify
from vtwcli.export.onnx import parity
from vtwcli.models.inputs import encode_batch
from vtwcli.runtime import pruned


def sign_again(folder):
    """Bring the manifest in line with the files, as somebody who changes a directory on purpose would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def copy(exports, tmp_path):
    return shutil.copytree(exports("split")[0], tmp_path / "export")


def test_report_of_a_good_export(exports):
    directory, _ = exports("split")
    report = verify(directory, base=str(exports.model("split")), device="cpu", max_new_tokens=5)
    assert report["compared_with"] == str(exports.model("split")) and report["device"] == "cpu"
    assert report["parity"]["method"] == "generation" and report["parity"]["samples"] == 1
    assert report["parity"]["agreement"] == 1.0 and 0 < report["parity"]["max_logit_difference"] < 1e-4
    assert report["files"]["edited"] == report["files"]["unlisted"] == []
    assert report["schedule"]["actions"] == [withdraw(1)]
    smoke = report["smoke"]
    assert smoke["visual_tokens"] == 9 and smoke["visual_per_layer"] == [9, 0, 0]
    text = smoke["text_tokens"] + len(smoke["tokens"]) - 1
    assert smoke["cache_entries"] == [text + 9, text, text]
    version = onnxruntime.__version__
    assert report["onnxruntime"] == {"installed": version, "tested": [version]}
    assert report["made_with"]["torch"] == torch.__version__
    assert json.loads(json.dumps(report)) == report


def test_the_answer_is_that_of_torch(exports):
    from vtwcli.export.formats import sample_of

    report = verify(exports("keep")[0], device="cpu", max_new_tokens=4)
    loaded = exports.loaded("keep")
    batch = encode_batch(loaded, [sample_of(None)])
    with torch.no_grad(), pruned(loaded.model, report["schedule"]):
        out = loaded.model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=2)
    assert report["smoke"]["tokens"] == out[0, batch["input_ids"].shape[1] :].tolist()
    assert report["smoke"]["visual_per_layer"] == [6, 4, 2]


def test_without_the_base_the_report_of_the_export_stands(exports, capsys):
    directory, made = exports("split")
    report = verify(directory, device="cpu", max_new_tokens=2)
    assert report["compared_with"] is None and report["parity"] == made["parity"]
    assert "tiny-llava-3 is not here to compare with; name it with --base" in capsys.readouterr().err


@needs_openvino
def test_openvino_is_held_to_torch(exports, capsys):
    directory, base = exports("split")[0], str(exports.model("split"))
    report = verify(directory, base=base, backend="openvino", max_new_tokens=5)
    assert report["parity"]["reference"] == "torch float32" and report["compared_with"] == base
    assert report["parity"]["agreement"] == 1.0 and 0 < report["parity"]["max_logit_difference"] < 1e-4
    installed = metadata.version("openvino")
    assert report["parity"]["engine"] == f"OpenVINO {installed}"
    assert report["openvino"] == {"installed": installed}
    assert report["onnxruntime"] == {"tested": [onnxruntime.__version__]}
    usual = verify(directory, base=base, device="cpu", max_new_tokens=5)
    assert report["smoke"] == usual["smoke"] and "engine" not in usual["parity"]
    assert "fp32 graphs in OpenVINO against torch float32: 100.0% of 5 tokens" in capsys.readouterr().err
    with pytest.raises(GateError, match="parity failed"):
        verify(directory, base=str(exports.model("freeze")), backend="openvino", max_new_tokens=5)


@needs_openvino
def test_without_the_base_openvino_is_held_to_onnx_runtime(exports, monkeypatch):
    report = verify(exports("split")[0], backend="openvino", max_new_tokens=3)
    assert report["compared_with"] is None
    assert report["parity"]["reference"] == f"ONNX Runtime {onnxruntime.__version__}"
    assert report["parity"]["positions"] == 3 and 0 < report["parity"]["max_logit_difference"] < 1e-4
    monkeypatch.setattr(parity, "RELATIVE_TOLERANCE", 0.0)
    with pytest.raises(
        GateError, match=r"parity failed: 100.00% of 3 tokens agree with ONNX Runtime [\d.]+, log"
    ):
        verify(exports("split")[0], backend="openvino", max_new_tokens=3)


@needs_openvino
@pytest.mark.parametrize("based", [True, False])
def test_quantized_graphs_are_measured_in_openvino(based, exports):
    directory, _ = exports("merged int4")
    base = str(exports.model("merged int4")) if based else None
    report = verify(directory, base=base, backend="openvino", max_new_tokens=3)
    assert report["smoke"]["visual_per_layer"] == [9, 0]
    assert 1e-6 < report["parity"]["mean_kl"] < 2


def test_the_command_on_another_backend(exports, tmp_path, monkeypatch):
    directory, _ = exports("split")
    for backend, said in (
        ("torch", "holds ONNX graphs, which torch does not run"),
        ("jax", "--backend: input should be 'auto', 'torch', 'onnx' or 'openvino', got 'jax'"),
    ):
        done = vtw("verify", directory, "--backend", backend)
        assert done.code == 2 and said in " ".join(done.err.split())
    done = vtw("verify", tmp_path, "--backend", "openvino")
    assert done.code == 2 and "is not a directory of ONNX graphs" in " ".join(done.err.split())
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match="OpenVINO is not installed; install it with: pip install openvino"):
        verify(directory, backend="openvino")


def test_quantized_graphs_are_measured(exports):
    directory, _ = exports("merged int4")
    report = verify(directory, base=str(exports.model("merged int4")), device="cpu", max_new_tokens=3)
    assert 1e-6 < report["parity"]["mean_kl"] < 2
    assert report["smoke"]["visual_per_layer"] == [9, 0]


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named"])
def test_the_command_says_what_made_the_graphs_and_what_they_were_checked_with(copy, named):
    """Older exports do not say with what they were checked."""
    manifest = json.loads((copy / "manifest.json").read_text())
    if named:
        manifest["tested"] = {"onnxruntime": ["1.0", "1.1"]}
    else:
        del manifest["tested"], manifest["versions"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = vtw("verify", copy, "--device", "cpu", "--max-new-tokens", 2)
    assert (done.code, done.out) == (0, f"{copy}: verified\n")
    said = " ".join(done.err.split())
    made = f"transformers {transformers.__version__}, torch {torch.__version__}, onnx {onnx.__version__}"
    assert (
        f"with ONNX Runtime {onnxruntime.__version__}; made with {made if named else 'nothing named'}" in said
    )
    assert f"checked with ONNX Runtime {'1.0, 1.1' if named else 'no release named'}" in said


@pytest.mark.parametrize("wrong", [{"tested": {"onnxruntime": "1.0"}}, {"versions": ["torch"]}])
def test_releases_that_are_no_names_are_refused(copy, wrong):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | wrong))
    with pytest.raises(NotFoundError, match="is not a readable manifest"):
        verify(copy, device="cpu")


def test_a_changed_file_fails(copy):
    data = bytearray((copy / "decoder_upper.onnx.data").read_bytes())
    data[-7] ^= 1
    (copy / "decoder_upper.onnx.data").write_bytes(data)
    with pytest.raises(GateError, match=r"decoder_upper.onnx.data is changed"):
        verify(copy, device="cpu")


def test_a_wrong_weight_fails_though_it_is_signed(copy, exports):
    data = bytearray((copy / "decoder_upper.onnx.data").read_bytes())
    for place in range(3, len(data), 64):
        data[place] ^= 0x80  # the sign of every sixteenth number
    (copy / "decoder_upper.onnx.data").write_bytes(data)
    sign_again(copy)
    with pytest.raises(GateError, match="parity failed"):
        verify(copy, base=str(exports.model("split")), device="cpu", max_new_tokens=2)


def test_a_graph_with_another_interface_fails(copy):
    model = onnx.load(copy / "embed_tokens.onnx", load_external_data=False)
    model.graph.input[0].name = model.graph.node[0].input[1] = "ids"
    onnx.save(model, copy / "embed_tokens.onnx")
    sign_again(copy)
    with pytest.raises(GateError, match="other inputs or outputs than the manifest says: ids"):
        verify(copy, device="cpu")


def test_a_broken_graph_fails(copy):
    model = onnx.load(copy / "embed_tokens.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, copy / "embed_tokens.onnx")
    sign_again(copy)
    with pytest.raises(GateError, match=r"embed_tokens.onnx does not pass the ONNX checker"):
        verify(copy, device="cpu")


def test_visual_tokens_that_did_not_leave_fail(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["schedule"]["actions"] = [withdraw(2)]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        GateError, match=r"layer 1 holds .* entries in its KV cache, not .* and 9 visual tokens"
    ):
        verify(copy, device="cpu", max_new_tokens=2)


def test_wrong_use(exports, tmp_path):
    with pytest.raises(UsageError, match="compared with torch in float32"):
        verify(exports("split")[0], dtype="float16")
