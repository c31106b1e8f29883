"""The numpy side of generation over graphs, compared with transformers' own torch code."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from tests.engines import needs_openvino
from tests.tiny import IMAGE_ID, TINY
from vtwcli import ort
from vtwcli.errors import VtwError
from vtwcli.export.onnx.companions import scripts

PINPOINTS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]


def test_compact_aligns_rows_to_the_right():
    keep = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=bool)
    index, mask = ort.compact(keep)
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, False, False]]
    assert index[0].tolist() == [0, 2, 3]
    assert index[1, 2] == 3
    assert ort.compact(np.zeros((2, 3), dtype=bool))[0].shape == (2, 1)


def test_remove_keeps_text_its_positions_and_padding_out():
    attended = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=bool)
    visual = np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=bool)
    positions = np.array([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    index, tokens = ort.remove(ort.Tokens(attended, visual, positions), {"action": "withdraw"}, None)
    assert tokens.attended.tolist() == [[False, False, True, True], [True] * 4]
    assert index[1].tolist() == [0, 2, 3, 4] and index[0, 2:].tolist() == [1, 4]
    assert tokens.positions[0, 2:].tolist() == [0, 3] and tokens.positions[1].tolist() == [0, 2, 3, 4]
    assert not tokens.visual.any()
    axes = ort.Tokens(attended, visual, np.stack([positions, positions * 2, positions * 3]))
    three = ort.remove(axes, {"action": "withdraw"}, None)[1].positions
    assert three.shape == (3, 2, 4) and np.array_equal(three[2], 3 * tokens.positions)


@pytest.mark.parametrize(
    "amount", [{"count": 3}, {"count": 0}, {"count": 9}, {"ratio": 0.5}, {"ratio": 0.34}]
)
@pytest.mark.parametrize("score", ["uniform", "attention"])
def test_chosen_by_definition(score, amount):
    random = np.random.default_rng(0)
    visual = random.random((3, 12)) < 0.6
    visual[2] = False
    scores = random.integers(0, 4, (3, 12)).astype(float)  # with ties
    actual = ort.chosen(visual, {"score": score, **amount}, scores)
    for row in range(3):
        places = np.flatnonzero(visual[row]).tolist()
        n = len(places)
        m = min(n, amount["count"]) if "count" in amount else math.ceil(n * amount["ratio"])
        if score == "uniform":
            expected = [places[math.ceil(i * n / m)] for i in range(m)]
        else:
            expected = sorted(sorted(places, key=lambda p: (-scores[row, p], p))[:m])
        assert np.flatnonzero(actual[row]).tolist() == expected


def test_sampling_follows_the_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    draws = ort.sample(np.repeat(logits, 4000, 0), np.random.default_rng(0))
    shares = np.bincount(draws, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    cold = ort.sample(np.repeat(logits, 4000, 0), np.random.default_rng(0), temperature=0.5)
    np.testing.assert_allclose(
        np.bincount(cold, minlength=4) / 4000, np.array([25, 9, 2.25, 0.25]) / 36.5, atol=0.03
    )
    assert set(ort.sample(np.repeat(logits, 500, 0), np.random.default_rng(0), top_k=2)) == {0, 1}
    assert set(ort.sample(np.repeat(logits, 500, 0), np.random.default_rng(0), top_p=0.81)) == {0, 1, 2}
    assert set(ort.sample(np.repeat(logits, 500, 0), np.random.default_rng(0), top_p=0.0)) == {0}
    with pytest.raises(ort.UsageError, match="temperature"):
        ort.sample(logits, np.random.default_rng(0), temperature=0)


def test_grid_positions_are_those_of_qwen2_vl():
    model = TINY["qwen2_vl"].build(layers=1).model
    for side in ("left", "right"):
        batch = TINY["qwen2_vl"].batch(["t3 i t5", "i t1 i t2 i t1", "t4"], side=side)
        expected, deltas = model.get_rope_index(**{k: v for k, v in batch.items() if k != "pixel_values"})
        attended = batch["attention_mask"].numpy() > 0
        visual = batch["input_ids"].numpy() == IMAGE_ID
        actual = ort.grid_positions(visual, attended, batch["image_grid_thw"].numpy(), 2)
        assert np.array_equal(actual[:, attended], expected.numpy()[:, attended])
        following = ort.Tokens(attended, visual, actual).next_position()
        assert np.array_equal(following, deltas[:, 0].numpy() + attended.sum(1))


def test_grid_positions_refuse_what_does_not_fit():
    visual, attended = np.array([[False, True, True]]), np.ones((1, 3), dtype=bool)
    with pytest.raises(ort.UsageError, match="more images"):
        ort.grid_positions(visual, attended, np.zeros((0, 3), dtype=int), 2)
    with pytest.raises(ort.UsageError, match="fewer placeholders"):
        ort.grid_positions(visual, attended, np.array([[1, 4, 4]]), 2)


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 6, 10), (2, 8, 4), (1, 2, 14)])
def test_patch_feeds_are_those_of_the_vision_tower(grid):
    window, merge = 3, 2
    feeds = ort.patch_feeds(grid, {"spatial_merge_size": merge, "window": window})
    thw = torch.tensor([grid])
    assert np.array_equal(feeds["patch_positions"], get_vision_position_ids(thw, merge).numpy())
    index, borders = get_vision_window_index(thw, merge, window_size=window * merge * 4, patch_size=4)
    assert np.array_equal(feeds["window_index"], index.numpy())
    lengths = np.diff(borders.numpy())
    assert np.array_equal(np.unique(feeds["windows"], return_counts=True)[1], lengths)
    assert (np.diff(feeds["windows"]) >= 0).all()
    frames = np.diff(get_vision_cu_seqlens(thw).numpy())
    assert np.array_equal(np.unique(feeds["segments"], return_counts=True)[1], frames)
    assert set(ort.patch_feeds(grid, {"spatial_merge_size": merge})) == {"patch_positions", "segments"}


def test_best_resolution_is_transformers():
    for size in itertools.product((3, 8, 11, 16, 40), repeat=2):
        assert ort.best_resolution(size, PINPOINTS) == tuple(select_best_resolution(size, PINPOINTS))


@pytest.mark.parametrize("size", [(8, 16), (7, 30), (30, 7), (16, 16), (5, 4), (9, 27)])
@pytest.mark.parametrize("max_tiles", [None, 1, 2])
def test_pack_is_transformers(size, max_tiles):
    high, wide = ort.best_resolution(size, PINPOINTS)
    count = 1 + (high // 8) * (wide // 8)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 16, 5, generator=generator)
    newline = torch.randn(5, generator=generator)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=8, patch_size=2), image_grid_pinpoints=PINPOINTS
    )
    owner, sizes = SimpleNamespace(config=config), torch.tensor([size])
    if max_tiles is None:
        expected = LlavaNextModel.pack_image_features(owner, [features], sizes, "default", newline)[0][0]
    else:
        ratio = f"anyres_max_{max_tiles}"
        expected = LlavaOnevisionModel.pack_image_features(owner, [features], sizes, newline, ratio)[0][0]
    vision = {"image_size": 8, "patch_size": 2, "max_tiles": max_tiles}
    actual = ort.pack(features.numpy(), size, (high, wide), newline.numpy(), vision)
    np.testing.assert_allclose(actual, expected.numpy(), atol=2e-6)


def test_pack_of_the_whole_image_alone():
    features, newline = np.arange(8.0).reshape(1, 4, 2), np.array([9.0, 9.0])
    packed = ort.pack(features, (8, 8), (8, 8), newline, {})
    assert packed.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [9, 9]]


def test_shrink_is_bilinear_interpolation():
    grid = torch.randn(13, 9, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(grid.permute(2, 0, 1)[None], (7, 6), mode="bilinear")[0]
    np.testing.assert_allclose(ort.shrink(grid.numpy(), 7, 6), expected.permute(1, 2, 0).numpy(), atol=1e-6)


def test_a_directory_that_is_no_export(tmp_path):
    with pytest.raises(ort.NotFoundError, match="no exported ONNX model"):
        ort.OnnxModel(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "vtw-hf", "format_version": 1}))
    with pytest.raises(ort.NotFoundError, match="no exported ONNX model"):
        ort.OnnxModel(tmp_path)


def test_a_manifest_without_what_graphs_need(tmp_path):
    for graphs, said in (
        ([{"file": "../a.onnx"}], "a graph lies outside the directory"),
        ([{"file": "a.onnx", "role": "decoder"}], "a graph has no inputs"),
        (["a.onnx"], "no exported ONNX model"),
    ):
        manifest = {"format": ort.FORMAT, "format_version": ort.FORMAT_VERSION, "graphs": graphs}
        (tmp_path / ort.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ort.NotFoundError, match=said):
            ort.OnnxModel(tmp_path)


@needs_openvino
def test_openvino_reports_nothing(tmp_path):
    program = """
import sys
from vtwcli.ort import engine
assert engine("openvino").name == "OpenVINO"
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
"""
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_package_stands_alone(tmp_path):
    """Beside a model it is called ``vtw_ort``, and has the same errors whether vtwcli is installed or not."""
    for name, text in scripts().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    program = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "vtwcli", "PIL"))
import vtw_ort
try:
    vtw_ort.OnnxModel("nowhere")
except ValueError as error:
    assert isinstance(error, vtw_ort.NotFoundError)
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nowhere is no exported ONNX model: ")
    assert issubclass(ort.NotFoundError, ValueError) and not issubclass(ort.OnnxError, VtwError)
