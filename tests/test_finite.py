"""Numbers that are NaN or infinite never become a verdict, a document or an export; -inf logits are fine."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.cli import vtw
from tests.conftest import build_processor
from vtwcli.analyze import analyze
from vtwcli.budget import budget
from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.errors import GateError, NotFoundError, UsageError, VtwError
from vtwcli.evaluate import evaluate
from vtwcli.export.hf.export import export_hf
from vtwcli.export.onnx.export import export_onnx
from vtwcli.io import files
from vtwcli.judge.kl import check_hidden, divergence, log_probabilities
from vtwcli.measure.study import Study
from vtwcli.models.hub import resolve
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import AnalyzeSection, BudgetSection, CalibrateSection, EvalSection, ModelSection
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.sweep import sweep

NAN, INF = float("nan"), float("inf")
DOWN = "model.language_model.layers.{}.mlp.down_proj.weight"
KEY = "model.language_model.layers.{}.self_attn.k_proj.weight"
VISION = "model.multi_modal_projector.linear_2.weight"


def edited(source, folder, change):
    """A copy of a model directory with ``change`` applied to the dict of its weights, by their names in the model."""
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    names = resolve(str(source)).key_map
    weights = {name: stored[tensor.key] for name, tensor in names.items()}
    change(weights)
    for name, tensor in names.items():
        stored[tensor.key] = weights.pop(name)
    save_file(stored | weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def broken(name, value=NAN):
    """One value of a weight is ``value``."""

    def change(weights):
        weights[name] = weights[name].clone()
        weights[name].view(-1)[7] = value

    return change


def overflowing(layer):
    """Finite weights whose layer leaves the range of float16."""

    def change(weights):
        weights[DOWN.format(layer)] = weights[DOWN.format(layer)] * 3e7

    return change


@pytest.fixture(scope="module")
def nan_dir(tiny_dir, tmp_path_factory):
    return edited(tiny_dir, tmp_path_factory.mktemp("nan") / "model", broken(DOWN.format(3)))


@pytest.fixture(scope="module")
def fp16_dir(tiny_dir, tmp_path_factory):
    return edited(tiny_dir, tmp_path_factory.mktemp("fp16") / "model", overflowing(2))


# --- distributions ---------------------------------------------------------------------------------------


def test_tokens_that_are_never_given_add_nothing():
    p = log_probabilities(torch.tensor([[0.0, math.log(3), -INF, -INF]]), "x")
    q = log_probabilities(torch.tensor([[0.0, 0.0, 0.0, -INF]]), "x")
    expected = 0.25 * math.log(0.25 * 3) + 0.75 * math.log(0.75 * 3)
    assert divergence(p, q, "x").item() == pytest.approx(expected)
    far = log_probabilities(torch.tensor([[0.0, -5000.0]]), "x")  # exp underflows where the other is -inf
    assert divergence(far, log_probabilities(torch.tensor([[0.0, -INF]]), "x"), "x").item() == 0
    with pytest.raises(NotFoundError, match=r"^x: the KL to the full model is infinite"):
        divergence(q, p, "x")


@pytest.mark.parametrize("logits", [[0, NAN], [0, INF], [-INF, -INF], [NAN, NAN], [-INF, NAN], [INF, NAN]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_that_are_no_distribution_are_refused(logits, dtype):
    rows = torch.tensor([[1.0, 2.0], logits], dtype=dtype)
    with pytest.raises(NotFoundError) as caught:
        log_probabilities(rows, "sample 'x'")
    name = str(dtype).removeprefix("torch.")
    assert caught.value.message == f"sample 'x': the logits are not finite in {name} (NaN or infinity)"
    assert "bfloat16 or float32" in caught.value.hint


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_hidden_states_of_padding_do_not_count(value):
    hidden = torch.zeros(2, 3, 4)
    hidden[1, 0, 2] = value
    read = torch.ones(2, 3, dtype=torch.bool)
    read[1, 0] = False
    check_hidden(hidden, read, "x", "the output of layer 1 is")
    with pytest.raises(NotFoundError, match="x: the output of layer 1 is not finite in float32"):
        check_hidden(hidden, ~read, "x", "the output of layer 1 is")


# --- commands --------------------------------------------------------------------------------------------


def told(caught, where, dtype):
    """The message names a sample of the data, the place and the type; the hint says what to use."""
    assert caught.value.exit_code == 4
    assert f"{where} not finite in {dtype} (NaN or infinity)" in caught.value.message
    assert caught.value.message.startswith("sample '")
    assert "bfloat16 or float32" in caught.value.hint


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (broken(DOWN.format(0)), "the output of layer 0 is"),
        (broken(KEY.format(4), INF), "the output of layer 4 is"),
        (broken(DOWN.format(5)), "the output of layer 5 is"),
        (broken("lm_head.weight"), "the logits are"),
        (broken(VISION, -INF), "the embeddings of text and images are"),
    ],
)
def test_calibration_names_the_first_place(tiny_dir, data, tmp_path, change, where, stream):
    model = ModelSection(name=str(edited(tiny_dir, tmp_path / "m", change)), stream=stream)
    options = CalibrateSection(limit=1, max_new_tokens=2, bootstrap=0, positions="first")
    with pytest.raises(NotFoundError) as caught:
        calibrate(model, [DataSpec(source=str(data))], options)
    told(caught, where, "float32")


def test_every_command_that_compares_refuses(nan_dir, fp16_dir, data):
    specs = [DataSpec(source=str(data))]
    short = {"limit": 1, "max_new_tokens": 2}
    cases = [
        (ModelSection(name=str(nan_dir)), 3, "float32"),
        (ModelSection(name=str(fp16_dir), dtype="float16"), 2, "float16"),
    ]
    for model, layer, dtype in cases:
        for work in (
            lambda model: calibrate(model, specs, CalibrateSection(**short)),
            lambda model: calibrate(model, specs, CalibrateSection(method="visipruner", **short)),
            lambda model: analyze(model, specs, AnalyzeSection(**short)),
            lambda model: budget(model, specs, BudgetSection(**short)),
            lambda model: evaluate(
                model,
                [("K=4", Schedule.withdraw_at(4))],
                specs,
                EvalSection(timing=False, batch_size=2, **short),
            ),
        ):
            with pytest.raises(NotFoundError) as caught:
                work(model)
            told(caught, f"the output of layer {layer} is", dtype)
    whole = calibrate(ModelSection(name=str(fp16_dir), dtype="bfloat16"), specs, CalibrateSection(**short))
    assert all(math.isfinite(x) for x in whole["kl"]["mean"])


def test_the_command_line_says_it_in_two_lines_and_writes_nothing(nan_dir, data, tmp_path):
    done = vtw(
        "calibrate", nan_dir, "--data", data, "--limit", 1, "--positions", "first", "--output", tmp_path / "k"
    )
    assert done.code == 4
    assert "error: sample '" in done.err and "layer 3" in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_masked_vocabulary_has_the_kl_of_the_rest(tiny_dir, data):
    """Models that rule tokens out give -inf for them, pruned or not."""
    from vtwcli.data.sources import load_data

    loaded = load(str(tiny_dir))
    options = CalibrateSection(positions="first")
    source = Resident(loaded.model, loaded.family)
    _, items = Study(loaded, load_data([DataSpec(source=str(data))], limit=1, seed=0), options, False).encode(
        [0]
    )
    tried = [Intervention("withdraw", k) for k in range(3)]

    def mask(value):
        def hook(module, args, logits):
            return torch.cat([logits[..., :50], torch.full_like(logits[..., 50:], value)], -1)

        handle = loaded.model.lm_head.register_forward_hook(hook)
        try:
            return [result.kl for result in sweep(source, items, tried)]
        finally:
            handle.remove()

    for ruled_out, nearly in zip(mask(-INF), mask(-1e4), strict=True):
        assert bool((nearly > 0).all())
        torch.testing.assert_close(ruled_out, nearly, rtol=1e-12, atol=0)


# --- documents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_documents_hold_numbers_only(value):
    with pytest.raises(VtwError, match=r"^kl\.samples\.1 is not a finite number"):
        files.document({"eta": 0.1, "kl": {"mean": [0.0], "samples": [1.0, value]}})
    assert json.loads(files.document({"a": [1.5, None]})) == {"a": [1.5, None]}


@pytest.mark.parametrize("option", ["--eta=inf", "--set=calibrate.eta=.inf", "--set=calibrate.eta=.nan"])
def test_thresholds_are_finite_before_anything_runs(option):
    done = vtw("calibrate", "demo", option)
    assert done.code == 2 and "eta" in done.err


# --- exports ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_that_are_not_finite_are_not_exported(tiny_dir, tmp_path, value, dtype):
    model = edited(tiny_dir, tmp_path / "model", broken(DOWN.format(4), value))
    with pytest.raises(NotFoundError) as caught:
        export_hf(str(model), Schedule.withdraw_at(3), tmp_path / "out", dtype=dtype)
    assert "layers.4.mlp.down_proj.weight' in model.safetensors holds values that are not" in str(
        caught.value
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_the_model_does_not_read_may_be_anything(tiny_dir, tmp_path):
    def change(weights):
        weights["unused"] = torch.full((3,), NAN)
        weights["counts"] = torch.arange(3)

    model = edited(tiny_dir, tmp_path / "model", change)
    export_hf(str(model), Schedule.withdraw_at(3), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_onnx_graphs_refuse_weights_and_values_that_are_not_finite(exports, tmp_path):
    pytest.importorskip("onnxruntime")
    base = exports.model("split")
    model = edited(base, tmp_path / "model", broken(DOWN.format(1)))
    with pytest.raises(
        NotFoundError, match=r"layers\.1\.mlp\.down_proj\.weight holds values that are not finite"
    ):
        export_onnx(resolve(str(model)), 1, tmp_path / "out")
    # weights that float16 can hold, whose products it cannot
    small = tiny.llava(seed=1, layers=2)
    for layer in small.model.language_model.layers[:1]:
        layer.mlp.down_proj.weight.data *= 4e4 / layer.mlp.down_proj.weight.abs().max()
        layer.mlp.up_proj.weight.data *= 1000
    small.save_pretrained(tmp_path / "far")
    build_processor().save_pretrained(tmp_path / "far")
    with pytest.raises(GateError) as caught:
        export_onnx(resolve(str(tmp_path / "far")), 1, tmp_path / "out", dtype="fp16", steps=2)
    assert "sample 'square': the graphs' logits are not finite in float16" in caught.value.message
    assert "bfloat16 or float32" in caught.value.hint
    far = edited(base, tmp_path / "wide", overflowing(1))
    with pytest.raises(UsageError, match="float16 cannot hold"):
        export_onnx(resolve(str(far)), 1, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
