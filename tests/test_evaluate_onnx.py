"""The columns of an evaluation that come from ONNX graphs, compared with the slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import slow_schedule, tiny
from tests.engines import BACKENDS
from tests.onnx_exports import EXPORTS
from vtwcli import ort
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.judge.flops import TextShape, kv_bytes
from vtwcli.measure import graphs as onnx
from vtwcli.measure.variants import reader_of
from vtwcli.recipe.recipe import EvalSection, ModelSection

ROWS = ["t3 i t5", "i t1 i t3", "t4"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["split", "keep"])
def test_answers_and_forced_logits_are_the_slow_references(name, backend, exports):
    graphs = onnx.open_exported(exports(name)[0], CPU, backend)
    actions, batch = EXPORTS[name][1], tiny.llava_batch(ROWS, seed=5)
    tokens, logits, _ = slow_schedule.greedy(exports.loaded(name).model, batch, actions, 5)
    assert onnx.generated(graphs, batch, 5, eos_ids=[]) == tokens.tolist()
    torch.testing.assert_close(onnx.forced_logits(graphs, batch, tokens), logits, rtol=0, atol=1e-4)
    others = tokens.flip(0)  # forced along another row's tokens
    assert not torch.allclose(onnx.forced_logits(graphs, batch, others)[:, 1:], logits[:, 1:], atol=0.1)


def test_an_answer_ends_where_the_model_says(exports):
    graphs, batch = onnx.open_exported(exports("split")[0], CPU), tiny.llava_batch(ROWS, seed=5)
    free = np.array(onnx.generated(graphs, batch, 5, eos_ids=[]))
    end = int(free[0, 1])
    ended = np.array(onnx.generated(graphs, batch, 5, eos_ids=[end]))
    assert ended[0].tolist() == [*free[0, :2], *[0] * (ended.shape[1] - 2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_bytes_are_those_of_the_tokens_that_are_left(backend, exports):
    batch = tiny.llava_batch(["t3 i t5"], seed=5)
    loaded = exports.loaded("split")
    graphs = onnx.open_exported(exports("split")[0], CPU, backend)
    shape = TextShape.from_config(loaded.model.config)
    assert onnx.cache_bytes(graphs, batch) == kv_bytes(shape, [17, 8, 8], 4)
    half = onnx.open_exported(exports("full half")[0], CPU, backend)
    one = TextShape.from_config(exports.loaded("full half").model.config)
    assert onnx.cache_bytes(half, batch) == kv_bytes(one, [17], 2)
    assert onnx.cache_bytes(graphs, batch, 4) == kv_bytes(shape, [20, 11, 11], 4)  # the last token is not fed


def test_generation_is_timed_whole(exports):
    graphs, batch = onnx.open_exported(exports("split")[0], CPU), tiny.llava_batch(["t3 i t5"], seed=5)
    first, whole = onnx.generation_times(graphs, batch, 60)
    assert 0 < first < whole


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_the_engine_lacks(backend, exports, capsys):
    graphs = onnx.open_exported(exports("split")[0], torch.device("mps"), backend)
    assert graphs.device == "cpu"
    name = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[backend]
    assert f"this {name} has no device 'mps': the graphs run on the CPU" in capsys.readouterr().err


def test_the_base_and_what_is_no_export(exports, tmp_path):
    directory, _ = exports("split")
    graphs = onnx.open_exported(directory, CPU)
    assert onnx.base_of(graphs) is None
    graphs.manifest["model"] = {"name": "demo", "revision": None, "model_type": "llava"}
    assert onnx.base_of(graphs) == "demo"
    assert ort.is_export(directory) and not ort.is_export(tmp_path) and not ort.is_export(tmp_path / "no")
    with pytest.raises(NotFoundError, match="no exported ONNX model"):
        onnx.open_exported(tmp_path, CPU)


def test_what_the_runtime_refuses_has_an_exit_code(exports):
    graphs, batch = onnx.open_exported(exports("split")[0], CPU), tiny.llava_batch(["t3 i t5"], seed=5)
    del batch["pixel_values"]
    for call in (
        lambda: onnx.generated(graphs, batch, 2),
        lambda: onnx.forced_logits(graphs, batch, torch.zeros(1, 2)),
        lambda: onnx.generation_times(graphs, batch, 2),
        lambda: onnx.cache_bytes(graphs, batch),
    ):
        with pytest.raises(UsageError, match="9 visual tokens, the images give 0"):
            call()


def test_whose_processor_makes_the_inputs(exports, tmp_path):
    directory, _ = exports("split")
    model = ModelSection(name=str(directory))
    with pytest.raises(UsageError, match="is not here to compare with"):
        reader_of(model, EvalSection())
    assert reader_of(model, EvalSection(baseline="demo")) == "demo"
    assert reader_of(ModelSection(name=str(tmp_path)), EvalSection()) == str(tmp_path)
