"""No command runs the code of a directory unless --trust-remote-code is given: whatever is put there, nothing ran."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest

from tests.cli import vtw
from vtwcli.errors import UsageError
from vtwcli.export.directory import own_code
from vtwcli.export.directory.manifest import MANIFEST, file_entries
from vtwcli.export.formats import verify
from vtwcli.export.hf import verify as verifying
from vtwcli.export.hf.export import export_hf
from vtwcli.models.loading import load
from vtwcli.schedule.schedule import Schedule


@pytest.fixture(scope="module")
def good(tiny_dir, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("good") / "export"
    export_hf(str(tiny_dir), Schedule.withdraw_at(3), target)
    return target


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "export"))


@pytest.fixture
def proof(tmp_path) -> Path:
    """The file that strange code makes when it runs."""
    return tmp_path / "proof"


def sign_again(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = file_entries(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change(file: Path, **entries: object) -> None:
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | entries))


def code(proof: Path) -> str:
    return f"open({str(proof)!r}, 'w').close()\n"


OWN = "modeling_vtw.LlavaForConditionalGeneration"


@pytest.fixture(autouse=True)
def stock_classes(monkeypatch):
    """transformers marks classes that trusted code names as its own; the next tests want them unmarked."""
    from transformers import LlavaConfig

    monkeypatch.setattr(LlavaConfig, "_auto_class", None)


def another_class(folder: Path, proof: Path) -> None:
    (folder / "evil.py").write_text(
        code(proof) + "from .modeling_vtw import LlavaForConditionalGeneration as Base\nclass M(Base): pass\n"
    )
    change(folder / "config.json", auto_map={"AutoModelForImageTextToText": "evil.M"})


def a_config_class(folder: Path, proof: Path) -> None:
    (folder / "evil.py").write_text(code(proof) + "from transformers import LlavaConfig as C\n")
    change(folder / "config.json", auto_map={"AutoModelForImageTextToText": OWN, "AutoConfig": "evil.C"})


def another_repository(folder: Path, proof: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModelForImageTextToText": f"acme/evil--{OWN}"})


def unlisted_code(folder: Path, proof: Path) -> None:
    (folder / "notes.py").write_text(code(proof))


def changed_code(folder: Path, proof: Path) -> None:
    file = folder / "vtw_pruning.py"
    file.write_text(file.read_text() + code(proof))


def a_generate_function(folder: Path, proof: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(proof) + "def generate(model, **k): pass\n")


def a_link_to_a_generate_function(folder: Path, proof: Path) -> None:
    a_generate_function(folder.parent, proof)
    (folder / "custom_generate").symlink_to(folder.parent / "custom_generate")


def a_package(folder: Path, proof: Path) -> None:
    (folder / "vtw_pruning").mkdir()
    (folder / "vtw_pruning" / "__init__.py").write_text(code(proof))


def a_tokenizer_class(folder: Path, proof: Path) -> None:
    (folder / "evil.py").write_text(code(proof))
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})


def only_a_tokenizer_class(folder: Path, proof: Path) -> None:
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["acme/evil--evil.T", None]})


def an_image_processor_class(folder: Path, proof: Path) -> None:
    change(folder / "processor_config.json", image_processor={"auto_map": {"AutoImageProcessor": "evil.P"}})


def another_generation(folder: Path, proof: Path) -> None:
    change(folder / "generation_config.json", custom_generate="acme/evil")


def part_of_a_config(folder: Path, proof: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_config=config["text_config"] | {"auto_map": {"AutoModel": "evil.M"}})


def compiled_code(folder: Path, proof: Path) -> None:
    (folder / "vtw_pruning.cpython-311-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")


def a_cache_of_compiled_code(folder: Path, proof: Path) -> None:
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "vtw_pruning.cpython-311.pyc").write_bytes(b"\0")


def an_adapter(folder: Path, proof: Path) -> None:
    change(folder / "adapter_config.json", base_model_name_or_path="acme/evil")


ATTACKS = [
    another_class, a_config_class, another_repository, unlisted_code, changed_code, a_generate_function,
    a_link_to_a_generate_function, a_package, a_tokenizer_class, only_a_tokenizer_class, an_image_processor_class,
    another_generation, part_of_a_config, compiled_code, a_cache_of_compiled_code, an_adapter,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_verify_runs_nothing_but_what_this_tool_wrote(copy, proof, attack):
    attack(copy, proof)
    sign_again(copy)
    done = vtw("verify", copy, "--device", "cpu")
    assert done.code == 2, done.err
    assert str(copy) in done.err and "unexpected" not in done.err
    assert done.out == "" and not proof.exists()


@pytest.mark.parametrize("attack", [unlisted_code, a_generate_function], ids=lambda attack: attack.__name__)
def test_code_that_the_manifest_does_not_list_is_code_too(copy, proof, attack):
    attack(copy, proof)
    done = vtw("verify", copy, "--device", "cpu")
    assert done.code == 2 and not proof.exists(), done.err


def test_a_config_that_the_manifest_does_not_list_fails(copy):
    change(copy / "preprocessor_config.json", image_mean=[0, 0, 0])
    done = vtw("verify", copy, "--device", "cpu")
    assert done.code == 3 and "preprocessor_config.json is not in it" in done.err


def test_what_was_checked_is_what_runs(copy, proof, monkeypatch):
    """Somebody changes the directory between the check and the loading."""
    reference = verifying._reference

    def meanwhile(*given):
        changed_code(copy, proof)
        a_generate_function(copy, proof)
        another_class(copy, proof)
        return reference(*given)

    monkeypatch.setattr(verifying, "_reference", meanwhile)
    assert verify(copy, device="cpu", max_new_tokens=2)["max_logit_difference"] <= 1e-4
    assert not proof.exists()


def test_the_code_of_an_earlier_release_is_taken(copy, monkeypatch):
    file = copy / "vtw_pruning.py"
    file.write_text(file.read_text() + "\n# as it was once\n")
    sign_again(copy)
    with pytest.raises(UsageError, match=r"vtw_pruning\.py is not the code that this version"):
        verify(copy, device="cpu")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(own_code.RELEASED, "vtw_pruning.py", frozenset({digest}))
    assert verify(copy, device="cpu", max_new_tokens=2)["max_logit_difference"] <= 1e-4


def test_trusted_code_runs(copy, proof):
    another_class(copy, proof)
    sign_again(copy)
    assert vtw("verify", copy, "--device", "cpu", "--trust-remote-code").code == 0
    assert proof.exists()


def test_an_export_leads_to_no_code_of_its_base(tiny_dir, tmp_path):
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["acme/evil--evil.T", None]})
    part_of_a_config(base, tmp_path / "proof")
    export_hf(str(base), Schedule.withdraw_at(3), tmp_path / "export")
    assert "auto_map" not in json.loads((tmp_path / "export/tokenizer_config.json").read_text())
    assert "acme" not in (tmp_path / "export/config.json").read_text()
    assert verify(tmp_path / "export", device="cpu", max_new_tokens=2)["files"]["unlisted"] == []


def test_other_commands_do_not_ask_either(tiny_dir, data, tmp_path, proof, monkeypatch):
    """Where transformers has no class of its own it would ask on the terminal, and somebody's "y" may lie there."""
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "evil.py").write_text(code(proof))
    for name in ("tokenizer_config.json", "processor_config.json"):
        change(
            model / name,
            tokenizer_class="Evil",
            processor_class="Evil",
            auto_map={"AutoTokenizer": ["evil.T", None], "AutoProcessor": "evil.P"},
        )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.chdir(tmp_path)
    for args in (
        ["calibrate", model],
        ["eval", model, "--layer", "2"],
        ["export", model, "--layer", "2", "-o", "out", "--format", "onnx"],
    ):
        done = vtw(*args, *(["--data", data, "--limit", "1"] if args[0] != "export" else []))
        assert "unexpected" not in done.err and not proof.exists(), (args, done.err)


@pytest.fixture
def trusting(tiny_dir, tmp_path, proof):
    """A model with a config class of its own, and a recipe that wants it run."""
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "own.py").write_text(code(proof) + "from transformers import LlavaConfig as C\n")
    change(model / "config.json", auto_map={"AutoConfig": "own.C"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model:\n  name: model\n  trust_remote_code: true\ndata: [demo]\ncalibrate: {limit: 1}\nschedule: {layer: 2}\n"
    )
    return recipe


COMMANDS = [
    ["run"], ["run", "--dry-run"], ["calibrate", "--recipe"], ["analyze", "--recipe"], ["eval", "--recipe"],
    ["budget", "--recipe"], ["export", "--output", "out", "--recipe"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_recipe_does_not_switch_trust_on(trusting, proof, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = vtw(*command, trusting)
    assert done.code == 2, done.err
    assert "recipe.yaml:3:3: model.trust_remote_code: a recipe does not switch this on by itself" in done.err
    assert "--trust-remote-code" in done.err and not proof.exists()
    assert {file.name for file in tmp_path.iterdir()} == {"model", "recipe.yaml"}


def test_the_user_does(trusting, proof, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = ["run", trusting, "--dry-run"]
    assert vtw(*asked, "--set", "model.trust_remote_code=false").code == 0
    assert not proof.exists()
    for more in (["--trust-remote-code"], ["--set", "model.trust_remote_code=true"]):
        assert vtw(*asked, *more).code == 0
        assert proof.exists()
        proof.unlink()
        own = trusting.parent / "model/own.py"  # a module that is loaded already does not run again
        own.write_text(f"# {more[0]}\n" + own.read_text())
    trusting.write_text("model: model\ndata: [demo]\ncalibrate: {limit: 1}\n")
    monkeypatch.setenv("VTW_MODEL__TRUST_REMOTE_CODE", "true")
    assert vtw(*asked).code == 0


def test_a_recipe_that_asks_for_it_is_valid(trusting):
    assert vtw("recipe", "check", trusting).code == 0


def test_pickled_weights_are_never_loaded(copy, proof):
    """Also where the code is trusted."""
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    (copy / "pytorch_model.bin").write_bytes(
        b"cbuiltins\nexec\n(S'" + code(proof).strip().replace("'", '"').encode() + b"'\ntR."
    )
    sign_again(copy)
    for trust in ([], ["--trust-remote-code"]):
        done = vtw("verify", copy, "--device", "cpu", *trust)
        assert done.code in (2, 3, 4) and "unexpected" not in done.err and not proof.exists()


@pytest.mark.parametrize(
    "name",
    [
        "vtw_ort/__init__.py",
        "vtw_ort/own.py",
        "vtw_ort/__pycache__/model.cpython-311.pyc",
        "vtw_ort.py",  # one file, as it was in earlier versions
        "vtw_pixels.py",
        "run_onnx.py",
        "onnxruntime.py",
    ],
)
def test_verify_of_graphs_runs_no_script(exports, tmp_path, proof, name):
    folder = Path(shutil.copytree(exports("split")[0], tmp_path / "graphs"))
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text() if file.exists() else "") + code(proof))
    sign_again(folder)
    done = vtw("verify", folder, "--device", "cpu", "--max-new-tokens", "2")
    assert done.code == 2 and file.name in done.err and not proof.exists(), done.err


def test_graphs_stay_inside_their_directory(exports, tmp_path):
    folder = Path(shutil.copytree(exports("split")[0], tmp_path / "graphs"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["graphs"][0]["file"] = "../embed_tokens.onnx"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    done = vtw("verify", folder, "--device", "cpu")
    assert done.code == 4 and "graphs.0.file" in done.err


def test_the_loader_asks_nobody(tiny_dir, tmp_path, proof, monkeypatch):
    """A part of a config whose type has no model class in transformers, but a code map."""
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "evil.py").write_text(code(proof))
    config = json.loads((model / "config.json").read_text())
    change(
        model / "config.json",
        vision_config={
            **config["vision_config"],
            "model_type": "llama4_text",
            "auto_map": {"AutoModel": "evil.M"},
        },
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    with pytest.raises(Exception):  # noqa: B017  (whatever it says, it ran nothing)
        load(str(model), device="cpu")
    assert not proof.exists()
