"""Generation settings that a model under a schedule cannot follow are taken out of an export, and that is said."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from tests.cli import vtw
from vtwcli.data.spec import DataSpec
from vtwcli.errors import GateError
from vtwcli.evaluate import evaluate
from vtwcli.export.formats import verify
from vtwcli.export.hf.export import export_hf
from vtwcli.export.hf.generation import clean
from vtwcli.recipe.recipe import EvalSection, ModelSection
from vtwcli.schedule.schedule import Schedule

STATIC = Schedule.withdraw_at(3)
MEASURED = Schedule.from_dict(
    {
        "format_version": 1,
        "actions": [{"at": 3, "action": "keep", "select": {"score": "attention", "ratio": 0.5}}],
    }
)
DYNAMIC = Schedule.from_dict(
    {
        "format_version": 1,
        "actions": [{"at": 3, "action": "keep", "select": {"score": "attention", "above": 0.1}}],
    }
)


def asking(source, folder, where="generation_config.json", **settings):
    """A copy of a model directory with settings added to one of its files, or to a part of config.json."""
    if not folder.exists():
        shutil.copytree(source, folder)
    name, _, part = where.partition("#")
    file = folder / name
    document = json.loads(file.read_text())
    (document[part] if part else document).update(settings)
    file.write_text(json.dumps(document, indent=2) + "\n")
    return folder


@pytest.mark.parametrize("cache", [*ALL_CACHE_IMPLEMENTATIONS, "paged"])
def test_every_cache_of_the_library_can_be_exported_and_then_generates(tiny_dir, tmp_path, cache):
    settings = {"cache_implementation": cache}
    if "static" in cache:
        settings |= {"max_cache_len": 64}
    model = asking(tiny_dir, tmp_path / "model", **settings)
    manifest = export_hf(str(model), STATIC, tmp_path / "out")
    stays = cache in ("dynamic", "offloaded", "static")
    assert manifest["changed"] == ({} if stays else {"generation_config.json": settings})
    written = (tmp_path / "out" / "generation_config.json").read_bytes()
    if stays:
        assert written == (model / "generation_config.json").read_bytes()
    else:
        assert json.loads(written) == json.loads((tiny_dir / "generation_config.json").read_bytes())
    if not torch.cuda.is_available() and cache == "offloaded":
        return  # needs a GPU, pruned or not
    assert verify(tmp_path / "out", base=str(model), max_new_tokens=2)["smoke"]["tokens"]


def test_old_style_settings_in_the_model_config(tiny_dir, tmp_path):
    model = asking(tiny_dir, tmp_path / "model", "config.json#text_config", cache_implementation="static")
    (model / "generation_config.json").unlink()
    manifest = export_hf(str(model), DYNAMIC, tmp_path / "out")
    assert manifest["changed"] == {"config.json": {"text_config.cache_implementation": "static"}}
    assert "cache_implementation" not in (tmp_path / "out" / "config.json").read_text()
    assert verify(tmp_path / "out", base=str(model), max_new_tokens=2)["smoke"]["tokens"]


def test_it_is_said_on_stderr_and_in_the_card(tiny_dir, tmp_path):
    model = asking(
        tiny_dir, tmp_path / "model", cache_implementation="quantized", cache_config={"backend": "hqq"}
    )
    done = vtw("export", model, "--layer", 3, "--output", tmp_path / "out")
    assert done.code == 0
    words = 'generation_config.json: cache_implementation "quantized" was taken out'
    assert words in done.err and words in (tmp_path / "out" / "README.md").read_text()
    done = vtw("export", tiny_dir, "--layer", 3, "--output", tmp_path / "plain")
    assert done.code == 0 and "taken out" not in done.err + (tmp_path / "plain" / "README.md").read_text()


def test_guessing_goes_with_schedules_that_do_not_measure():
    settings = {"prompt_lookup_num_tokens": 3, "do_sample": True}
    assert clean(dict(settings), STATIC) == {}
    assert clean(settings, MEASURED) == {"prompt_lookup_num_tokens": 3}
    assert settings == {"do_sample": True}


def test_an_export_that_guesses_generates(tiny_dir, tmp_path):
    model = asking(tiny_dir, tmp_path / "model", prompt_lookup_num_tokens=3)
    manifest = export_hf(str(model), MEASURED, tmp_path / "out")
    assert manifest["changed"] == {"generation_config.json": {"prompt_lookup_num_tokens": 3}}
    assert verify(tmp_path / "out", base=str(model), max_new_tokens=2)["smoke"]["tokens"]


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"num_beams": 2}])
def test_other_settings_stay(tiny_dir, tmp_path, settings):
    model = asking(tiny_dir, tmp_path / "model", **settings)
    assert export_hf(str(model), STATIC, tmp_path / "out")["changed"] == {}
    assert verify(tmp_path / "out", base=str(model), max_new_tokens=2)["smoke"]["tokens"]


def test_verify_refuses_an_export_that_cannot_generate(tiny_dir, tmp_path):
    from vtwcli.export.directory.manifest import read_manifest, write_manifest

    export_hf(str(tiny_dir), DYNAMIC, tmp_path / "out")
    asking(tiny_dir, tmp_path / "out", cache_implementation="static")  # as an earlier version left it
    manifest = read_manifest(tmp_path / "out")
    write_manifest(
        tmp_path / "out",
        {k: v for k, v in manifest.items() if k not in ("format", "format_version", "files")},
    )
    with pytest.raises(GateError, match=r"loads, but does not generate: .*DynamicCache"):
        verify(tmp_path / "out", base=str(tiny_dir), max_new_tokens=2)


def test_evaluation_overrides_what_the_checkpoint_asks_for(tiny_dir, data, tmp_path):
    model = asking(tiny_dir, tmp_path / "model", cache_implementation="static")
    assert GenerationConfig.from_pretrained(model).cache_implementation == "static"
    options = EvalSection(limit=1, max_new_tokens=2, bootstrap=0, repeats=1, timing_tokens=2)
    specs, schedules = [DataSpec(source=str(data))], [("K=3", STATIC), ("measured", MEASURED)]
    found, plain = (
        evaluate(ModelSection(name=str(name)), schedules, specs, options)[0] for name in (model, tiny_dir)
    )
    assert [row["pruned"] for row in found["samples"]] == [row["pruned"] for row in plain["samples"]]
