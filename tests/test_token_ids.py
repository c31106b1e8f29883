"""Token ids that the embedding has no row for: a clear error where the model would fail, none where it would not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli import vtw
from tests.conftest import build_processor
from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError
from vtwcli.evaluate import evaluate
from vtwcli.models.families import FAMILIES
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import CalibrateSection, EvalSection, ModelSection
from vtwcli.schedule.schedule import Schedule


def changed(source, folder, name, **values):
    """A copy of a model directory with values in one of its JSON files changed; a dotted key goes into a section."""
    if not folder.exists():
        shutil.copytree(source, folder)
    file = folder / name
    document = json.loads(file.read_text())
    for key, value in values.items():
        document[key] = value
    file.write_text(json.dumps(document))
    return folder


def with_word(source, folder, word="what"):
    """The tokenizer reads a word as one token, which was added without its embedding."""
    folder = changed(source, folder, "config.json")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": 10**6, "content": word, **plain})
    file.write_text(json.dumps(tokenizer))
    rows = shrunk(folder)
    return folder, rows


def shrunk(folder):
    """Cut the embedding and the head down to the tokenizer's first words; how many rows are left."""
    rows = len(load(str(folder)).processor.tokenizer) - 1
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = tensor[:rows].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    return rows


@pytest.mark.parametrize(
    "command", [["calibrate"], ["eval", "--layer", 3, "--no-timing"], ["analyze"], ["budget"]]
)
def test_a_prompt_with_such_a_token(tiny_dir, data, tmp_path, command):
    model, rows = with_word(tiny_dir, tmp_path / "model")
    done = vtw(
        *command, model, "--data", data, "--limit", 1, "--max-new-tokens", 2, "--output", tmp_path / "out"
    )
    assert done.code == 4, done.err
    assert f"the token 'what' has the id {rows} in {model / 'tokenizer.json'}" in done.err
    assert f"the model embeds the ids 0..{rows - 1} only" in done.err and "error: sample '" in done.err
    assert not (tmp_path / "out").exists()


def test_a_reference_answer_with_such_a_token(tiny_dir, data, tmp_path):
    model, _ = with_word(tiny_dir, tmp_path / "model", "red")
    options = CalibrateSection(limit=1, answers="reference", bootstrap=0)
    with pytest.raises(NotFoundError, match="the token 'red' has the id"):
        calibrate(ModelSection(name=str(model)), [DataSpec(source=str(data))], options)


def test_a_placeholder_outside_is_refused_where_the_model_embeds_it(tiny_dir, data, tmp_path):
    model = changed(tiny_dir, tmp_path / "model", "config.json", image_token_id=150)
    build_processor(image_token_id=150).save_pretrained(model)
    rows = load(str(model)).embedding_rows
    assert rows <= 150
    with pytest.raises(NotFoundError, match=f"the token '<image>' has the id 150 .* 0..{rows - 1} only"):
        calibrate(ModelSection(name=str(model)), [DataSpec(source=str(data))], CalibrateSection(limit=1))


def test_families_that_take_the_placeholder_out_first_are_those_of_the_library():
    import inspect

    import transformers

    for family in FAMILIES.values():
        path = inspect.getsourcefile(getattr(transformers, family.architecture))
        source = open(path, encoding="utf-8").read()  # noqa: PTH123, SIM115
        apart = "image_token_id >= self.vocab_size" in source or "llm_input_ids" in source
        assert family.placeholder_apart == apart, family.model_type


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.placeholder_apart])
def test_a_placeholder_outside_is_fine_where_the_model_replaces_it(name):
    """What the library itself computes with such an id, the check of ids lets through."""
    from dataclasses import replace
    from types import SimpleNamespace

    from tests import tiny
    from vtwcli.data.sample import Sample
    from vtwcli.models import inputs
    from vtwcli.models.loading import LoadedModel
    from vtwcli.schedule.intervention import Intervention
    from vtwcli.sweep.layers import Resident
    from vtwcli.sweep.sweep import SweepItem, sweep

    model, batch = tiny.TINY[name].build(), tiny.TINY[name].batch(["t3 i t4"])
    ids, old, family = batch["input_ids"], model.config.image_token_id, FAMILIES[name]
    inside = sweep(
        Resident(model, family),
        [SweepItem(batch, torch.tensor([[ids.shape[1] - 1]]))],
        [Intervention("withdraw", 1)],
    )
    outside = model.get_input_embeddings().weight.shape[0] + 7
    model.config.image_token_id = outside
    moved = {**batch, "input_ids": torch.where(ids == old, outside, ids)}
    again = sweep(
        Resident(model, family),
        [SweepItem(moved, torch.tensor([[ids.shape[1] - 1]]))],
        [Intervention("withdraw", 1)],
    )
    assert torch.equal(inside[0].kl, again[0].kl)
    loaded = LoadedModel(
        model, SimpleNamespace(tokenizer=None), family, name, None, None, torch.device("cpu"), torch.float32
    )
    inputs.check_ids(loaded, [Sample("x", "t", (), "?")], moved["input_ids"])
    refused = replace(loaded, family=replace(family, placeholder_apart=False))
    with pytest.raises(AttributeError):  # it goes on to name the token
        inputs.check_ids(refused, [Sample("x", "t", (), "?")], moved["input_ids"])


@pytest.mark.parametrize("pad", [-1, 10**6, None])
def test_padding_behind_an_answer_may_have_any_id(tiny_dir, data, tmp_path, pad):
    """Rows of a batch that have ended are fed something until the others have; it is not part of the result."""
    model = changed(
        tiny_dir, tmp_path / "model", "generation_config.json", pad_token_id=pad, eos_token_id=[2, 50]
    )
    plain = changed(tiny_dir, tmp_path / "plain", "generation_config.json", eos_token_id=[2, 50])
    options = EvalSection(limit=3, max_new_tokens=6, bootstrap=0, timing=False, batch_size=6)
    specs, schedules = [DataSpec(source=str(data))], [("K=3", Schedule.withdraw_at(3))]
    found, expected = (
        evaluate(ModelSection(name=str(name)), schedules, specs, options)[0] for name in (model, plain)
    )
    assert found["samples"] == expected["samples"]


@pytest.mark.parametrize("ends", [10**6, [10**6, 10**7]])
def test_answers_that_cannot_end_are_told(tiny_dir, data, tmp_path, ends):
    model = changed(tiny_dir, tmp_path / "model", "generation_config.json", eos_token_id=ends)
    done = vtw(
        "calibrate", model, "--data", data, "--limit", 1, "--max-new-tokens", 2, "--eta", 1000, "--json"
    )
    assert done.code == 0
    assert "1000000" in done.err and "no answer ever ends by itself" in done.err
    model = changed(tiny_dir, tmp_path / "model", "generation_config.json", eos_token_id=[2, 10**6])
    done = vtw(
        "calibrate", model, "--data", data, "--limit", 1, "--max-new-tokens", 2, "--eta", 1000, "--json"
    )
    assert done.code == 0 and "ends by itself" not in done.err
