"""The recipes that come with the project: valid, true to the papers, and runnable from end to end."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.cli import vtw
from tests.conftest import TEMPLATE, build_processor
from tests.processors import save_processor
from vtwcli.data.spec import DataSpec
from vtwcli.methods import METHODS
from vtwcli.models.families import FAMILIES
from vtwcli.pipeline import steps
from vtwcli.pipeline.steps import steps_of
from vtwcli.recipe.recipe import STEPS, Recipe
from vtwcli.recipe.schedules import schedule_of
from vtwcli.recipe.schema import json_schema
from vtwcli.recipe.settings import load_recipe
from vtwcli.recipe.starter import starter

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]

# the family of each recipe's model; a tiny one of the same takes its place below
FAMILY_OF = {
    "demo": "llava",
    "llava-hf/llava-1.5-7b-hf": "llava",
    "llava-hf/llava-1.5-13b-hf": "llava",
    "llava-hf/llava-interleave-qwen-0.5b-hf": "llava",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava_next",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
}


def recipe(name):
    return next(path for path in RECIPES if path.stem == name)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_is_valid(path):
    loaded = load_recipe(path)
    assert "name" in loaded.model.model_fields_set
    assert loaded.data
    assert steps_of(loaded)[-1] == "export"
    done = vtw("recipe", "check", path)
    assert (done.code, done.out) == (0, f"{path}: valid: {', '.join(steps_of(loaded))}\n")


def test_the_recipes_that_the_readme_names_are_there():
    assert {
        "demo", "ci", "guaranteed", "onnx-edge", "qwen2.5-vl-7b", "visipruner-llava-1.5-7b", "llava-1.5-7b-worst-task",
        "llava-1.5-7b-paper", "llava-1.5-13b-paper", "llava-next-7b-paper", "search",
    } == set(NAMES)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "eta"),
    [("llava-1.5-7b-paper", 3e-3), ("llava-1.5-13b-paper", 5e-4), ("llava-next-7b-paper", 1e-4)],
)
def test_published_thresholds(name, eta):
    found = load_recipe(recipe(name)).calibrate
    assert (found.eta, found.policy, found.positions, found.limit) == (eta, "paper", "first", 20)


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize("name", [name for name in NAMES if "paper" in name or "visipruner" in name])
def test_the_papers_prompts(name):
    for spec in load_recipe(recipe(name)).sources():
        assert spec.system == VICUNA
        assert spec.image == (None if "next" in name else "pad")  # LLaVA-NeXT takes pictures in tiles


def test_visipruner_is_the_published_rule():
    loaded = load_recipe(recipe("visipruner-llava-1.5-7b"))
    assert [spec.source for spec in loaded.data] == ["gqa", "mme", "textvqa_ocr"]
    section = loaded.schedule
    assert (section.shallow_mid_layer, section.layer_threshold, section.tokens_threshold) == (6, 0.995, 0.2)
    name, schedule = schedule_of(section)
    assert (name, schedule.is_static) == ("visipruner", False)


# ------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> directory of a tiny model of it with a processor, and two of LLaVA's family for special ends."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    made = {}
    depths = {"visipruner": 10, "onnx": 2}  # its rule needs layers; its graphs take a while
    for name in (*sorted(set(FAMILY_OF.values())), *depths):
        made[name] = tmp_path_factory.mktemp(name)
        build = tiny.TINY["llava" if name in depths else name].build
        build(layers=depths.get(name, 4)).save_pretrained(made[name])
    for name in ("llava", *depths):
        build_processor().save_pretrained(made[name])
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    LlavaNextProcessor(
        images,
        build_processor().tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(made["llava_next"])
    save_processor("qwen2_5_vl", made["qwen2_5_vl"])
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three questions about random images, in a file."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": f"what is {i}?", "answer": "red"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


SMALL = {
    "calibrate": {"limit": 1, "max_new_tokens": 2, "bootstrap": 0, "eta": 1e4, "policy": "sustained"},
    "analyze": {"limit": 1, "max_new_tokens": 2, "maps": 1, "freeze": "false"},
    "eval": {"limit": 1, "max_new_tokens": 2, "bootstrap": 0, "timing": "false"},
    "gates": {"max_kl": 1e4, "min_agreement": 0},
}  # numbers of a random model say nothing: every layer qualifies, every gate holds


WHOLE = ["visipruner-llava-1.5-7b", "onnx-edge", "qwen2.5-vl-7b"]  # one a format, and one of another family


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WHOLE)))
def test_recipe_is_planned_for_a_tiny_model(name, models, rows, tmp_path):
    """The README's commands run the demo's recipe; what these would run is in their plan."""
    loaded = load_recipe(recipe(name))
    kind = loaded.schedule.method or FAMILY_OF[loaded.model.name]
    sets = [f"model.name={models[kind]}", f"data=['{rows}']"]
    folder = tmp_path / "out"
    done = vtw("run", recipe(name), "-o", folder, "--dry-run", *(f"--set={one}" for one in sets))
    assert done.code == 0, done.err
    assert [step for step in STEPS if re.search(rf"^ *{step}\b", done.out, re.MULTILINE)] == steps_of(loaded)
    assert not folder.exists()


@pytest.mark.parametrize("name", WHOLE)
def test_recipe_runs_from_end_to_end_on_a_tiny_model(name, models, rows, tmp_path):
    path = recipe(name)
    loaded = load_recipe(path)
    family = FAMILY_OF[loaded.model.name]
    assert loaded.model.name == "demo" or family in FAMILIES
    if loaded.export.format == "onnx":
        pytest.importorskip("onnxruntime")
    wanted = steps_of(loaded)
    kind = "onnx" if loaded.export.format == "onnx" else loaded.schedule.method or family
    sets = [f"model.name={models[kind]}", f"data=['{rows}']"]
    for section, values in SMALL.items():
        if section in loaded.model_fields_set:
            sets += [f"{section}.{key}={value}" for key, value in values.items()]
    done = vtw("run", path, "-o", tmp_path / "out", "--json", *(f"--set={one}" for one in sets))
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["passed"], list(document["steps"])) == (True, wanted)
    assert all(gate["passed"] for gate in document["gates"])
    manifest = json.loads((tmp_path / "out/model/manifest.json").read_text())
    expected = schedule_of(loaded.schedule)
    if expected is None:
        assert manifest["schedule"]["actions"] == [{"at": 1, "action": "withdraw"}]
    else:
        assert manifest["schedule"]["actions"] == expected[1].to_dict()["actions"]
    assert (document["steps"]["export"]["result"]["format"], manifest["format"]) in (
        ("hf", "vtw-hf"),
        ("onnx", "vtw-onnx"),
    )


# ------------------------------------------------------------------ vtw recipe


@pytest.mark.parametrize("model", ["demo", "llava-hf/llava-1.5-7b-hf@abc", "./my model: 7b"])
def test_starter_is_valid_and_shows_every_option_with_its_default(model, tmp_path):
    done = vtw("recipe", "init", model)
    assert (done.code, done.out) == (0, starter(model))
    file = tmp_path / "starter.yaml"
    file.write_text(done.out)
    loaded = load_recipe(file)
    assert loaded.model.name == model
    assert steps_of(loaded) == ["calibrate", "eval", "export"]
    assert loaded.calibrate == Recipe().calibrate and loaded.gates == Recipe().gates
    lines = done.out.splitlines()[4:]
    file.write_text("\n".join(re.sub(r"^( *)# (?=[a-z_0-9]+:( |$))", r"\1", line) for line in lines))
    everything = load_recipe(file)
    for name in Recipe.model_fields:
        if name in ("data", "model", "output"):
            continue
        section = getattr(everything, name)
        if name in ("system", "prompt", "image"):
            assert name in everything.model_fields_set and section is None
            continue
        assert section.model_fields_set == set(type(section).model_fields), name
        assert section == getattr(Recipe(), name), name


def test_init_writes_a_file_and_keeps_an_existing_one(tmp_path):
    file = tmp_path / "r.yaml"
    assert vtw("recipe", "init", "-o", file).code == 0
    assert file.read_text() == starter()
    done = vtw("recipe", "init", "-o", file)
    assert (done.code, "exists already" in done.err) == (2, True)
    assert vtw("recipe", "init", "other", "-o", file, "--force").code == 0
    assert file.read_text() == starter("other")


def test_check_tells_file_line_and_key(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: demo\ncalibrate:\n  etta: 1\n")
    done = vtw("recipe", "check", recipe("demo"), file)
    assert done.code == 2
    assert f"error: {file}:3:3: calibrate.etta: unknown key 'etta'\n  did you mean 'eta'?" in done.err
    file.write_text("calibrate: {limit: 3}\nexport:")
    assert vtw("recipe", "check", file).out == f"{file}: valid: calibrate, export\n"
    file.write_text("gates: {max_kl: 3}")
    assert vtw("recipe", "check", file).out == f"{file}: valid: no step for vtw run\n"
    (tmp_path / "s.yaml").write_text("- {at: 3, action: withdrw}")
    file.write_text("schedule: {file: s.yaml}\nexport:")
    assert "s.yaml:1:11: actions.0.action: unknown action 'withdrw'" in vtw("recipe", "check", file).err


def test_schema_names_every_key_and_the_short_forms():
    done = vtw("recipe", "schema")
    schema = json.loads(done.out)
    assert schema == json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert {"type": "null"} in schema["properties"]["eval"]["anyOf"]
    items = next(part for part in schema["properties"]["data"]["anyOf"] if "items" in part)["items"]
    assert items["anyOf"][0] == {"type": "string"}
    eta = schema["$defs"]["CalibrateSection"]["properties"]["eta"]
    assert (eta["default"], eta["exclusiveMinimum"]) == (0.003, 0)
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
    keys = {key for method in METHODS.values() for key in method.model_fields}
    assert keys <= schema["$defs"]["ScheduleSection"]["properties"].keys()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipes_are_valid_by_the_schema(path):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    from ruamel.yaml import YAML

    validator(json_schema()).validate(YAML(typ="safe", pure=True).load(path))


def test_steps_are_sections_in_order():
    assert set(STEPS) <= set(Recipe.model_fields)
    assert tuple(steps.STEPS) == STEPS
    done = list(STEPS)
    assert all(
        done.index(one) < done.index(step.name) for step in steps.STEPS.values() for one in step.follows
    )
    files = [file for step in steps.STEPS.values() for file in step.writes.values()]
    assert len(set(files)) == len(files)


def test_what_a_recipe_says_of_asking_holds_for_all_its_sources(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = f"{{source: '{rows}', system: Own., limit: 1}}"
    text = f"model: demo\nsystem: Be brief.\nprompt: 'Q: {{question}}'\nimage: pad\ndata: ['{rows}', {own}]\nbudget:\n"
    (tmp_path / "r.yaml").write_text(text)
    loaded = load_recipe(tmp_path / "r.yaml")
    assert [(one.system, one.prompt, one.image) for one in loaded.sources()] == [
        ("Be brief.", "Q: {question}", "pad"),
        ("Own.", "Q: {question}", "pad"),
    ]
    [named] = loaded.sources([DataSpec.parse("gqa:image=pad,system=Mine.")])
    assert (named.system, named.prompt, named.image) == ("Mine.", "Q: {question}", "pad")
    assert loaded.asked().asked() == loaded.asked() and loaded.asked().sources() == loaded.sources()
    (tmp_path / "bare.yaml").write_text("model: demo\nsystem: Be brief.\ncalibrate:\n")
    done = vtw("run", "bare.yaml", "--dry-run")
    assert (done.code, done.err) == (
        2,
        "error: system goes with data\n  name the sources under data, or with --data\n",
    )
    few = ("--limit", 1, "--max-new-tokens", 2, "--json", "--bootstrap", 0, "--no-timing", "--layer", 9)
    done = vtw("eval", "demo", "--data", "demo:tasks=colour", "--recipe", "bare.yaml", *few)
    assert done.code == 0, done.err
    plain = json.loads(vtw("eval", "demo", "--data", "demo:tasks=colour", *few).out)
    asked = json.loads(done.out)
    assert asked["samples"][0]["question"] == plain["samples"][0]["question"]
    assert asked["data"][0]["fingerprint"] != plain["data"][0]["fingerprint"]
