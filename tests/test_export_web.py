"""Exports to transformers.js: what that library itself makes of them in Node and in a browser, against the runtime.

Node's packages are looked for in ``$VTW_NODE``; where nobody set it these tests are skipped, else they run.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from tests.cli import vtw
from tests.conftest import build_processor
from tests.onnx_exports import freeze, keep, withdraw
from tests.processors import save_processor
from tests.test_verify_onnx import sign_again
from tests.tiny import TINY
from vtwcli.data.sample import Sample
from vtwcli.data.scenes import examples
from vtwcli.errors import GateError, NotFoundError, UsageError
from vtwcli.export.formats import verify
from vtwcli.export.onnx.parity import torch_steps
from vtwcli.export.web import files
from vtwcli.export.web.export import export_web
from vtwcli.export.web.graphs import FAMILIES, GRIDS, locate, stages_of
from vtwcli.export.web.kind import FORMAT, is_web_export
from vtwcli.export.web.model import WebModel, as_the_library
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.ort import UsageError as Refused
from vtwcli.ort import patch_feeds
from vtwcli.schedule.schedule import Schedule

WEB = Path(__file__).parent / "web"
LIBRARY = "node_modules/@huggingface/transformers/dist"
NODE = os.environ.get("VTW_NODE", "")
CHROMIUM = os.environ.get("VTW_CHROMIUM", "")
node = pytest.mark.skipif(not NODE, reason="VTW_NODE names no folder with transformers.js")
browser = pytest.mark.skipif(not (NODE and CHROMIUM), reason="VTW_NODE and VTW_CHROMIUM name no browser")
QUESTION, STEPS, LAYERS, START = "what is red", 5, 3, 96

# name -> family, actions, options, side of a picture that no processor resizes
EXPORTS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], int]] = {
    "llava": (
        "llava",
        [freeze(0, 1), keep(1, score="attention", ratio=0.6), keep(2, score="uniform", count=2)],
        {},
        12,
    ),
    "onevision_half": ("llava_onevision", [withdraw(1)], {"dtype": "fp16"}, 8),
    "smolvlm_int4": ("smolvlm", [keep(1, score="contribution", ratio=0.4)], {"quantize": "int4"}, 16),
    "qwen2_vl_int8": ("qwen2_vl", [withdraw(2)], {"quantize": "int8"}, 16),
    "qwen2_5_vl": ("qwen2_5_vl", [keep(1, score="uniform", ratio=0.5), withdraw(2)], {"opset": 23}, 16),
}


class Exports:
    """``exports(name)`` -> directory of an export in ``EXPORTS``, or of the demo at layer 9, made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded = functools.cache(lambda name: load(self.model(name), device="cpu", dtype="float32"))

    def model(self, name: str) -> str:
        return "demo" if name == "demo" else str(self.root / f"base-{name}")

    def __call__(self, name: str) -> Path:
        path = self.root / name
        with FileLock(f"{path}.lock"):
            if not path.exists():
                if name == "demo":
                    export_web(resolve("demo"), 9, path, steps=2)
                else:
                    family, actions, options, _ = EXPORTS[name]
                    save_model(family, Path(self.model(name)))
                    plan = Schedule.from_dict({"format_version": 1, "actions": actions})
                    export_web(resolve(self.model(name)), plan, path, steps=3, **options)
        return path


def save_model(family: str, folder: Path) -> None:
    TINY[family].build(seed=1, layers=LAYERS).save_pretrained(folder)
    if family == "llava":
        build_processor().save_pretrained(folder)
        return
    save_processor(family, folder)
    if family not in GRIDS:
        return
    for file in [
        *folder.glob("*.json"),
        *folder.glob("*.jinja"),
    ]:  # the names that the library has in its code
        text = (
            file.read_text()
            .replace("<image>", "<|image_pad|>")
            .replace(f"<unused{START}>", "<|vision_start|>")
        )
        if file.suffix == ".jinja":
            text = text.replace("<|image_pad|>", "<|vision_start|><|image_pad|>")
        file.write_text(text)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_start_token_id": START}))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "web"
    root.mkdir(exist_ok=True)
    return Exports(root)


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8))


def tensors(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    kinds = {torch.int64: "int64", torch.float32: "float32", torch.bool: "bool"}
    return {
        name: {"type": kinds[value.dtype], "data": value.flatten().tolist(), "dims": list(value.shape)}
        for name, value in inputs.items()
    }


def ask(
    directory: Path, questions: list[dict[str, Any]], folder: Path, **generate: Any
) -> list[dict[str, Any]]:
    """What transformers.js answers in Node."""
    file = folder / "questions.json"
    file.write_text(json.dumps({"questions": questions, "generate": generate}))
    library = Path(NODE, LIBRARY, "transformers.node.mjs")
    done = subprocess.run(
        ["node", WEB / "ask.mjs", library, directory, file], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def batch_of(exports: Exports, name: str, texts: list[str]) -> dict[str, torch.Tensor]:
    """Model inputs of an export, one row a text; all texts of one length."""
    loaded, side = exports.loaded(name), EXPORTS[name][3]
    rows = [encode(loaded, Sample("row", "smoke", (noise(side),), text)).inputs for text in texts]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


@node
@pytest.mark.parametrize("name", EXPORTS)
def test_the_library_gives_the_tokens_and_caches_of_the_runtime(exports, name, tmp_path):
    directory, side = exports(name), EXPORTS[name][3]
    picture = tmp_path / "picture.png"
    noise(side).save(picture)
    manifest = json.loads((directory / "manifest.json").read_text())
    question = {"image": str(picture), "text": QUESTION}
    [found] = ask(directory, [question], tmp_path, max_new_tokens=STEPS, eos_token_id=-1)
    assert "error" not in found, found
    loaded = exports.loaded(name)
    inputs = as_the_library(encode(loaded, Sample("one", "smoke", (noise(side),), QUESTION)).inputs, manifest)
    assert found["ids"] == inputs["input_ids"].tolist()
    visual = int(torch.isin(inputs["input_ids"], torch.tensor(loaded.placeholder_ids)).sum())
    left = Schedule.from_dict(manifest["schedule"]).visual_per_layer(LAYERS, visual)
    text = inputs["input_ids"].shape[1] - visual + STEPS - 1
    assert found["lengths"] == [text + n for n in left] and left[0] == visual > left[-1]
    exported = WebModel(directory, manifest)
    logits, state = exported.prefill({key: value.numpy() for key, value in inputs.items()})
    chosen = [logits.argmax(-1)]
    while len(chosen) < STEPS:
        chosen.append(exported.step(chosen[-1], state).argmax(-1))
    assert found["tokens"] == [
        np.concatenate(chosen).tolist()
    ]  # what parity is measured on is what the library runs
    if manifest["quantize"] is None and manifest["dtype"] == "fp32":
        wanted, _ = torch_steps(loaded.model, manifest["schedule"], inputs, STEPS)
        assert found["tokens"] == wanted.tolist()


@node
def test_the_demo_answers_pruned_and_batches_are_right_or_refused(exports, tmp_path):
    questions, wanted = [], []
    loaded = exports.loaded("demo")
    rows = []
    for number, example in enumerate(examples("eval", 3)):
        example.image.save(tmp_path / f"{number}.png")
        questions.append({"image": str(tmp_path / f"{number}.png"), "text": example.question})
        sample = Sample("one", "smoke", (example.image,), example.question)
        rows.append(encode(loaded, sample).inputs)
        tokens, _ = torch_steps(loaded.model, Schedule.withdraw_at(9).to_dict(), rows[-1], 2)
        wanted.append(tokens.tolist())
    alike = [row for row in rows if row["input_ids"].shape == rows[0]["input_ids"].shape][:2]
    batch = {key: torch.cat([row[key] for row in alike]) for key in alike[0]}
    padded = {**batch, "attention_mask": batch["attention_mask"].clone()}
    padded["attention_mask"][0, 0] = 0
    both, refused = {"inputs": tensors(batch)}, {"inputs": tensors(padded)}
    *found, together, refusal = ask(exports("demo"), [*questions, both, refused], tmp_path, max_new_tokens=2)
    assert [answer["tokens"] for answer in found] == wanted
    assert [answer["words"][0].strip() for answer in found] == [e.answer for e in examples("eval", 3)]
    for answer in found:
        length = len(answer["ids"][0]) + 1
        assert answer["lengths"] == [length] * 9 + [length - 64] * 3
    assert len(alike) == 2 and together["tokens"] == [found[0]["tokens"][0], found[2]["tokens"][0]]
    assert "refused: padding in a batch" in refusal["error"]


@contextmanager
def served(*folders: Path, root: Path) -> Iterator[str]:
    for folder in folders:
        (root / folder.name).symlink_to(folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@browser
def test_the_page_answers_full_and_pruned_in_a_browser(exports, tmp_path):
    directory, library, root, shots = exports("demo"), tmp_path / "own", tmp_path / "root", tmp_path / "shots"
    for folder in (library, root, shots):
        folder.mkdir()
    shutil.copy(Path(NODE, LIBRARY, "transformers.min.js"), library)
    for file in Path(NODE, "node_modules/onnxruntime-web/dist").glob("ort-wasm-simd-threaded.asyncify.*"):
        shutil.copy(file, library)
    example = next(examples("eval", 1))
    example.image.save(tmp_path / "picture.png")
    playwright = Path(NODE, "node_modules/playwright-core/index.js")
    with served(directory, library, root=root) as host:
        address = f"{host}/{directory.name}/?library=../own/"
        command = ["node", WEB / "page.mjs", playwright, CHROMIUM, address, tmp_path / "picture.png"]
        done = subprocess.run(
            [*command, example.question, shots], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = json.loads(done.stdout)
    assert shown["status"] == "Done" and not shown["errors"] and not shown["elsewhere"]
    assert shown["answer"] == [example.answer] * 2
    full, pruned = shown["entries"]
    length = int(full.split()[0])
    assert full == f"{length} in 0 to 11" and pruned == f"{length} in 0 to 8, {length - 64} in 9 to 11"
    assert all(time.endswith(" ms") and int(time.split()[0]) > 0 for time in shown["time"])
    sizes = [float(size.split()[0]) for size in shown["cache"]]
    assert sizes[0] - sizes[1] == pytest.approx(3 * 64 * 2 * 128 * 4 / 1e3, abs=0.2)
    assert shown["wide"] == [0] * 4  # nothing runs out of the page, at 1280 and 400 pixels, light and dark
    assert len(list(shots.iterdir())) == 4


def test_rows_that_are_not_alike_are_refused_and_others_are_right(exports):
    manifest = json.loads((exports("llava") / "manifest.json").read_text())
    exported = WebModel(exports("llava"), manifest)
    inputs = batch_of(exports, "llava", ["what is bid", "what is bad"])
    arrays = {key: value.numpy() for key, value in inputs.items()}
    together, _ = exported.prefill(arrays)
    for row in range(2):
        alone, _ = exported.prefill({key: value[row : row + 1] for key, value in arrays.items()})
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)
    mask = arrays["attention_mask"].copy()
    mask[1, 0] = 0
    with pytest.raises(Refused, match=r"^refused: padding in a batch"):
        exported.prefill({**arrays, "attention_mask": mask})
    image = int(exports.loaded("llava").placeholder_ids[0])
    ids = arrays["input_ids"].copy()
    ids[1, np.flatnonzero(ids[1] == image)[0]] = 5
    ids[0, 1] = image
    with pytest.raises(Refused, match=r"^refused: rows of a batch with different numbers"):
        exported.prefill({**arrays, "input_ids": ids})
    ids = arrays["input_ids"].copy()
    ids[:, np.flatnonzero(ids[0] == image)[0]], ids[:, -1] = 5, image
    with pytest.raises(Refused, match=r"^refused: a prompt ends with a visual token"):
        exported.prefill({**arrays, "input_ids": ids})


def test_without_the_mark_it_is_the_full_model(exports):
    """What the page compares with."""
    manifest = json.loads((exports("llava") / "manifest.json").read_text())
    exported = WebModel(exports("llava"), manifest)
    inputs = batch_of(exports, "llava", [QUESTION])
    arrays = {key: value.numpy() for key, value in inputs.items()}
    run = exported.run

    def unmarked(role: str, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
        out = run(role, feeds)
        if role == "vision_encoder":
            out["image_features"][..., -1] = 0
        return out

    pruned, _ = exported.prefill(arrays)
    exported.run = unmarked
    logits, state = exported.prefill(arrays)
    _, wanted = torch_steps(exports.loaded("llava").model, None, inputs, 1)
    np.testing.assert_allclose(logits, wanted[:, 0], atol=1e-4)
    assert np.abs(pruned - logits).max() > 0.01 and len(set(state.cache_lengths())) == 1


def test_verify_proves_an_export_and_finds_what_is_wrong(exports, tmp_path):
    copy = shutil.copytree(exports("llava"), tmp_path / "export")
    report = verify(copy, base=exports.model("llava"), max_new_tokens=3)
    assert report["parity"]["agreement"] == 1.0 and report["smoke"]["visual_per_layer"] == [9, 6, 2]
    assert report["files"]["edited"] == report["files"]["unlisted"] == []
    assert "index.html" in json.loads((copy / "manifest.json").read_text())["files"]
    assert verify(exports("onevision_half"), max_new_tokens=2)["smoke"]["visual_tokens"] == 5
    with pytest.raises(UsageError, match="leave out --dtype"):
        verify(copy, dtype="float16")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["schedule"]["actions"][-1]["select"]["count"] = 3  # says what the graphs do not do
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GateError, match=r"layer 2 holds .* entries in its KV cache"):
        verify(copy, max_new_tokens=2)
    shutil.copy(exports("onevision_half") / "onnx/embed_tokens_fp16.onnx", copy / "onnx/embed_tokens.onnx")
    with pytest.raises(GateError, match=r"onnx/embed_tokens\.onnx is of another size"):
        verify(copy)
    sign_again(copy)
    with pytest.raises(GateError):
        verify(copy)
    del manifest["graphs"][0]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NotFoundError, match="graphs"):
        verify(copy)


def test_another_models_graphs_fail_parity(exports, tmp_path):
    folder = tmp_path / "base"
    TINY["llava"].build(seed=2, layers=LAYERS).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    with pytest.raises(GateError, match="parity failed"):
        verify(exports("llava"), base=str(folder), max_new_tokens=3)


def test_files_have_the_names_that_the_library_looks_for(exports):
    def library(name: str) -> dict[str, Any]:
        return json.loads((exports(name) / "config.json").read_text())["transformers.js_config"]

    graphs = ("embed_tokens", "vision_encoder", "decoder_model_merged")
    for name, dtypes, decoder in [
        ("llava", ("fp32", "fp32", "fp32"), "decoder_model_merged.onnx"),
        ("onevision_half", ("fp16", "fp16", "fp16"), "decoder_model_merged_fp16.onnx"),
        ("smolvlm_int4", ("fp32", "fp32", "q4"), "decoder_model_merged_q4.onnx"),
        ("qwen2_vl_int8", ("fp32", "fp32", "q8"), "decoder_model_merged_quantized.onnx"),
    ]:
        assert library(name)["dtype"] == dict(zip(graphs, dtypes, strict=True))
        held = {file.name for file in (exports(name) / "onnx").iterdir()}
        assert decoder in held and len(held) == 3
        assert is_web_export(exports(name))
        assert json.loads((exports(name) / "manifest.json").read_text())["format"] == FORMAT


def test_large_weights_lie_in_pieces_beside_the_graph(monkeypatch, exports, tmp_path):
    import onnx_ir as ir
    import onnxruntime

    name = "onnx/decoder_model_merged.onnx"
    monkeypatch.setattr(files, "ALONE", 10_000)
    monkeypatch.setattr(files, "PIECE", 30_000)
    target = tmp_path / "decoder_model_merged.onnx"
    files.save(ir.load(exports("llava") / name), target)
    held = [file.name for file in files.beside(target)]
    assert held[:2] == [f"{target.name}_data", f"{target.name}_data_1"] and files.chunks(target) > 1
    assert max(file.stat().st_size for file in files.beside(target)) <= 30_000
    onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("merge", "size"), [(1, None), (2, 1), (2, 2)])
def test_patches_of_several_images_are_where_each_alone_has_them(merge, size):
    grids = torch.tensor([[1, 4, 6], [2, 8, 4], [1, 2, 2]])
    count = int(grids.prod(1).sum())
    frame, row, column, _, high, wide = locate(count, grids, merge)
    vision = {"spatial_merge_size": merge, "window": size}
    feeds = [patch_feeds(grid, vision) for grid in grids.tolist()]
    positions = np.concatenate([feed["patch_positions"] for feed in feeds])
    assert torch.stack([row, column], 1).tolist() == positions.tolist()
    each = [grid[0] for grid in grids.tolist()]
    begins = np.cumsum([0, *each[:-1]])
    assert (
        frame.tolist()
        == np.concatenate([f["segments"] + b for f, b in zip(feeds, begins, strict=True)]).tolist()
    )
    assert high[0] == 4 and wide[0] == 6 and high[-1] == wide[-1] == 2


def test_windows_of_several_images(exports):
    """Each image alone and both at once give the same features."""
    manifest = json.loads((exports("qwen2_5_vl") / "manifest.json").read_text())
    exported = WebModel(exports("qwen2_5_vl"), manifest)
    random = np.random.default_rng(0)
    grids = np.array([[1, 12, 8], [1, 4, 20]])
    pixels = [random.standard_normal((int(grid.prod()), 96), dtype=np.float32) for grid in grids]

    def features(pixels: np.ndarray, grids: np.ndarray) -> np.ndarray:
        return exported.run("vision_encoder", {"pixel_values": pixels, "image_grid_thw": grids})[
            "image_features"
        ]

    alone = np.concatenate([features(p, g[None]) for p, g in zip(pixels, grids, strict=True)])
    np.testing.assert_allclose(features(np.concatenate(pixels), grids), alone, atol=1e-4)
    model = exports.loaded("qwen2_5_vl").model
    with torch.no_grad():
        wanted = model.model.visual(
            torch.from_numpy(pixels[0]), grid_thw=torch.from_numpy(grids[:1])
        ).pooler_output
    np.testing.assert_allclose(alone[: len(wanted), :-1], wanted.numpy(), atol=1e-4)


def test_what_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing can leave in front of it"):
        stages_of(4, [withdraw(0)], ())
    done = vtw("export", "demo", "--layer", "0", "--format", "transformers.js", "-o", tmp_path / "out")
    assert done.code == 2 and "transformers.js counts positions by the cache of layer 0" in done.err
    done = vtw(
        "export", "demo", "--layer", "9", "--format", "transformers.js", "--merged", "-o", tmp_path / "out"
    )
    assert done.code == 2 and "merged goes with format onnx only" in done.err
    folder = tmp_path / "next"
    TINY["llava_next"].build(seed=1, layers=2).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    with pytest.raises(UsageError, match=r"LLaVA-NeXT has no export to transformers\.js"):
        export_web(resolve(str(folder)), 1, tmp_path / "out")
    assert not (tmp_path / "out").exists() and "llava_next" not in FAMILIES
