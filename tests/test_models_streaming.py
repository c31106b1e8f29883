"""Layers read from files one at a time must give what the loaded model gives, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests import tiny
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.models.hub import resolve
from vtwcli.models.loading import LoadedModel, load
from vtwcli.models.stored import StoredTensor
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.streaming import Streamed
from vtwcli.sweep.sweep import SweepItem, sweep

INTERVENTIONS = [
    *(Intervention("withdraw", k) for k in range(tiny.LAYERS)),
    Intervention("mute", 1, 3),
    Intervention("freeze", 2, 3),
]


def skeleton(path, dtype: torch.dtype) -> LoadedModel:
    """A checkpoint's skeleton; families without a processor of their own need none here."""
    checkpoint = resolve(str(path))
    model = checkpoint.skeleton(dtype)
    device = torch.device("cpu")
    return LoadedModel(
        model, None, checkpoint.family, "tiny", None, checkpoint.path, device, dtype, checkpoint
    )


def items(dtype: torch.dtype, batch=tiny.llava_batch) -> list[SweepItem]:
    """A padded batch with two images in a row, and a sample alone."""
    two, one = batch(["t3 i t5", "t1 i t4 i t2"], dtype=dtype), batch(["i t3"], seed=1, dtype=dtype)
    return [
        SweepItem(
            each,
            torch.full((len(each["input_ids"]), 2), each["input_ids"].shape[1] - 1) - torch.tensor([1, 0]),
        )
        for each in (two, one)
    ]


def check_equal(
    path, dtype: torch.dtype = torch.float32, batch=tiny.llava_batch, tolerance: float = 1e-5
) -> Streamed:
    """Streamed and loaded runs agree; the tolerance is for kernels that depend on where weights lie in memory."""
    # without gradients, as the streamed weights are: torch folds products by that, and bfloat16 shows it
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
    source = Streamed(skeleton(path, dtype))
    want = sweep(Resident(model, source.family), items(dtype, batch), INTERVENTIONS)
    got = sweep(source, items(dtype, batch), INTERVENTIONS)
    assert [(r.item, r.row) for r in got] == [(0, 0), (0, 1), (1, 0)]
    for w, g in zip(want, got, strict=True):
        assert w.kl[0].min() > 1e-3
        torch.testing.assert_close(g.kl, w.kl, rtol=tolerance, atol=tolerance)
        assert torch.equal(g.top1, w.top1)
    assert_empty(source)
    return source


def assert_empty(source: Streamed) -> None:
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.fixture
def copy(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir, tmp_path / "model")


def reshard(path, rename=lambda key: key, dtype: torch.dtype | None = None, shards: int = 3) -> None:
    """Write the weights anew, renamed, in another type or in several files."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    tensors = {rename(key): value if dtype is None else value.to(dtype) for key, value in tensors.items()}
    keys = sorted(tensors)
    names = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in keys if names[key] == name}, path / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_one_file(tiny_dir):
    source = check_equal(tiny_dir)
    assert all(seconds > 0 for seconds in source.seconds.values())


def test_shards(copy):
    reshard(copy)
    check_equal(copy)


def test_names_of_older_and_newer_checkpoints(copy):
    own = {stored.key: name for name, stored in resolve(str(copy)).key_map.items()}
    assert "language_model.model.layers.0.mlp.up_proj.weight" in own  # as the public checkpoints have it
    check_equal(copy)
    reshard(copy, own.__getitem__)
    assert "model.language_model.layers.0.mlp.up_proj.weight" in resolve(str(copy)).tensors
    check_equal(copy)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_computed_in_float32(copy, stored):
    reshard(copy, dtype=stored)
    check_equal(copy)


def test_bfloat16_throughout(copy):
    reshard(copy, dtype=torch.bfloat16)
    check_equal(copy, torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "gemma3", "molmo2", "llava_next"])
def test_other_families(name, tmp_path):
    """Features added behind layers, fused experts, a scaled embedding, split projections, a parameter of the model."""
    family = tiny.TINY[name]
    family.build().save_pretrained(tmp_path)
    check_equal(tmp_path, batch=family.batch)


def test_a_tied_head(tmp_path):
    model = tiny.llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(model.config)
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in key for key in resolve(str(tmp_path)).tensors)
    check_equal(tmp_path)


def test_only_the_layer_in_use_is_filled(tiny_dir):
    source = Streamed(load(str(tiny_dir), device="cpu", weights=False))
    seen = []

    def look(view):
        filled = {name for name, parameter in source.model.named_parameters() if not parameter.is_meta}
        layer = f"{source.family.text_model}.layers.{view.index}."
        assert filled
        assert all(name.startswith(layer) for name in filled)
        seen.append((view.index, view.item))

    sweep(source, items(torch.float32), INTERVENTIONS, probes=[look])
    # layers outside, samples inside
    assert seen == [(d, item) for d in range(tiny.LAYERS) for item in (0, 1)]


def test_every_tensor_is_read_once(tiny_dir, monkeypatch):
    source = Streamed(load(str(tiny_dir), device="cpu", weights=False))
    reads: Counter = Counter()
    read = StoredTensor.read_into
    monkeypatch.setattr(
        StoredTensor, "read_into", lambda stored, into: (reads.update([stored.key]), read(stored, into))
    )
    sweep(source, items(torch.float32), INTERVENTIONS)
    assert reads == Counter(list(resolve(str(tiny_dir)).tensors))


def test_layers_share_two_buffers(tiny_dir):
    source = Streamed(load(str(tiny_dir), device="cpu", weights=False))
    starts = [next(layer.parameters()).data_ptr() for layer in source.layers()]
    assert len(set(starts)) == 2
    assert starts[0] == starts[2] != starts[1] == starts[3]


def test_a_file_that_ends_early(copy):
    source = Streamed(skeleton(copy, torch.float32))
    file = copy / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(NotFoundError, match="ends within"):
        sweep(source, items(torch.float32), INTERVENTIONS)
    assert_empty(source)


def test_a_file_that_vanishes(copy):
    source = Streamed(skeleton(copy, torch.float32))
    (copy / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="cannot be read: No such file"):
        sweep(source, items(torch.float32), INTERVENTIONS)
    assert_empty(source)


def test_an_interruption_leaves_it_empty_and_usable(tiny_dir):
    source = Streamed(load(str(tiny_dir), device="cpu", weights=False))

    def stop(view):
        if view.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(source, items(torch.float32), INTERVENTIONS, probes=[stop])
    assert_empty(source)
    again = sweep(source, items(torch.float32), INTERVENTIONS)
    model = AutoModelForImageTextToText.from_pretrained(tiny_dir).eval()
    want = sweep(Resident(model, source.family), items(torch.float32), INTERVENTIONS)
    for w, g in zip(want, again, strict=True):
        torch.testing.assert_close(g.kl, w.kl, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_streamed(tiny_dir):
    loaded = skeleton(tiny_dir, torch.float32)
    with pytest.raises(UsageError, match="did not come from files"):
        Streamed(dataclasses.replace(loaded, checkpoint=None))
