"""Quantized weights: loaded, unpacked, streamed, measured and exported."""

from __future__ import annotations

import pytest
import torch

from tests import quantized
from vtwcli.models.hub import resolve
from vtwcli.models.loading import load

KINDS = (*quantized.LIBRARY, *quantized.PACKED)


@pytest.fixture(scope="module")
def made(tiny_dir, tmp_path_factory):
    """A function that gives the directory of a kind, made once."""
    folder, held = tmp_path_factory.mktemp("quantized"), {}

    def of(kind: str):
        if kind not in held:
            held[kind] = quantized.make(kind, tiny_dir, folder / kind)
        return held[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_the_weights_own(made, kind, tiny_dir):
    path = made(kind)
    found, plain = resolve(str(path)), resolve(str(tiny_dir))
    assert {name: weight.shape for name, weight in found.key_map.items()} == {
        name: weight.shape for name, weight in plain.key_map.items()
    }
    assert found.total_elements == plain.total_elements
    assert found.dtype == torch.float32
    assert found.total_bytes < plain.total_bytes
    loaded = load(str(path), device="cpu")
    assert loaded.layers[0].mlp.up_proj.in_features == 32
