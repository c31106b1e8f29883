"""Documents that expand, nest or hold themselves, numbers that are none, and every problem of every recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.cli import vtw
from tests.test_robustness import SCHEDULE, plain
from vtwcli.errors import UsageError
from vtwcli.export.directory.manifest import read_manifest
from vtwcli.io import documents
from vtwcli.methods import METHODS
from vtwcli.models.families import FAMILIES
from vtwcli.recipe.recipe import Recipe, ScheduleSection
from vtwcli.schedule.schedule import Schedule


def bomb(start: str, wide: int = 9, levels: int = 9) -> str:
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * wide)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (bomb("[x]"), r":\d+:\d+: a\d\.\d: aliases stand for more than"),
        ("model: demo\ncalibrate:\n" + "\n".join("  " + one for one in bomb("x").split("\n")), ": calibrate.a"),
        ("k: &k {a: &a [1,1,1,1,1,1,1,1], b: [*a,*a,*a,*a,*a,*a,*a,*a]}\n" + bomb("[*k]", 40, 4), "aliases"),
        ("&a\nmodel: *a\n", r":2:8: \*a lies in what it names"),
        ("data: &d\n  - {source: demo, task: *d}\n", r":2:26: \*d lies in what it names"),
        ("a: &a {<<: *a}", r"\*a lies in what it names"),
        ("model: " + "[" * 300 + "]" * 300, "more than 100 levels deep"),
        ("model: " + "{a: " * 120 + "1" + "}" * 120, "more than 100 levels deep"),
        ("model: " + "[" * 100_000, "more than 100 levels deep"),
        ("\n".join(" " * i + "a:" for i in range(400)), "more than 100 levels deep"),
        ('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}", "more than 100 levels deep"),
        ('{"model": ' + '{"a":' * 60_000 + "1" + "}" * 60_001, "more than 100 levels deep"),
        ("a: &a " + "[" * 60 + "]" * 60 + "\nb: " + "[" * 60 + "*a" + "]" * 60, ":2:.*more than 100 levels deep"),
        ("calibrate: {limit: " + "9" * 5000 + "}", "limit"),
        ("calibrate: {limit: 0o" + "7" * 5000 + "}", r":1:13: calibrate.limit: a whole number beyond"),
        ('{"model": "' + "x" * 300_000, "not valid JSON"),
        ("model: [" + "x, " * 200_000 + "]", "is too long"),
        ("? [a, [b]]\n: 1", "not valid YAML"),
    ],
    ids=range(18),
)  # fmt: skip
def test_documents_that_grow_or_hold_themselves(tmp_path, text, place):
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "s.yaml").write_text("schedule: {file: r.yaml}\nexport:")
    commands = [["run", "--dry-run"], ["calibrate", "demo", "--recipe"]] if text.startswith("a0") else []
    for command in (["recipe", "check"], *commands):
        began = time.perf_counter()
        done = vtw(*command, tmp_path / "r.yaml")
        assert done.code == 2 and "unexpected" not in done.err
        assert re.search(place, done.err) and "r.yaml" in done.err and len(done.err) < 5000, done.err
        assert time.perf_counter() - began < 30  # a few seconds on a machine that does nothing else
    if commands:
        assert vtw("recipe", "check", tmp_path / "s.yaml").code == 2


def test_a_document_without_end_is_not_read_to_it(tmp_path):
    """Within a memory limit that the whole of it would break."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));"
        "from vtwcli.cli import main; sys.argv = ['vtw', 'recipe', 'check', '/dev/zero']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "/dev/zero" in done.stderr and "unexpected" not in done.stderr, (
        done.stderr
    )


def test_anchors_that_are_used_again_are_fine(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: demo\ncalibrate: &few {limit: 3, seed: 1}\nanalyze: *few\neval: {<<: *few, batch_size: 2}\n"
    )
    assert vtw("recipe", "check", tmp_path / "r.yaml").code == 0


# --- true and false are no numbers --------------------------------------------------------------------------


def numbers(node, schema, definitions, path=()):
    """Every place of a document where the schema takes a number."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    kinds = [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])]
    if any(kind.get("type") in ("integer", "number") and "enum" not in kind for kind in kinds):
        yield path
    for kind in kinds:
        if "$ref" in kind and kind is not schema:
            yield from numbers(node, kind, definitions, path)
        if "items" in kind:
            yield from numbers(node, kind["items"], definitions, (*path, 0))
        for key, inner in kind.get("properties", {}).items():
            yield from numbers(node, inner, definitions, (*path, key))


def holding(path, value):
    for key in reversed(path):
        value = [value] if key == 0 else {key: value}
    return value


def test_true_is_no_number_anywhere_in_a_recipe():
    schema = Recipe.model_json_schema()
    places = sorted(set(numbers(None, schema, schema["$defs"])))
    assert len(places) >= 56 and ("data", 0, "limit") in places and ("analyze", "map_layers", 0) in places
    for path in places:
        for value in (True, False):
            document = holding(path, value)
            if (
                path[0] == "schedule" and path[1] not in ScheduleSection.model_fields
            ):  # known with its method only
                owners = [
                    name
                    for name, method in METHODS.items()
                    if path[1] in method.model_fields
                    and not any(
                        one.is_required() for key, one in method.model_fields.items() if key != path[1]
                    )
                ]
                document["schedule"]["method"] = owners[-1]
            with pytest.raises(documents.InvalidDocument) as caught:
                documents.validate(document, Recipe, "r.yaml", "recipe")
            message = f"r.yaml: {'.'.join(map(str, path))}: must be a number, not true or false, got {value}"
            assert message in [problem.message for problem in caught.value.problems]


def test_true_is_no_number_anywhere_in_a_schedule():
    document = plain(SCHEDULE)
    found = 0
    for number in range(len(document["actions"])):
        for path in (
            ["at"],
            ["until"],
            ["after"],
            ["select", "above"],
            ["when", "cosine_below"],
            ["when", "layers"],
        ):
            changed = json.loads(json.dumps(document))
            node = changed["actions"][number]
            for key in path[:-1]:
                node = node.get(key, {})
            if (path[-1] not in node and path != ["when", "layers"]) or not node:
                continue
            node[path[-1]] = True
            with pytest.raises(UsageError, match="must be a number, not true or false"):
                Schedule.from_dict(changed)
            found += 1
    assert found == 10
    with pytest.raises(UsageError, match="must be a number"):
        Schedule.from_dict({"format_version": True, "actions": []})


@pytest.mark.parametrize("value", ["true", "on: 1", "[true]"])
def test_true_is_no_number_in_options(value):
    done = vtw("calibrate", "demo", "--set", f"calibrate.limit={value}")
    assert done.code == 2 and "--set calibrate.limit" in done.err


# --- every problem ------------------------------------------------------------------------------------------


def test_every_problem_of_every_file_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model: {name: demo, dtype: int3}\n"
        "data: ['gqa:limit=x', demo, 'foo:bar=1', {source: demo, limit: 0}]\n"
        "calibrate:\n  limit: true\n  etta: 1\n  policy: best\n"
        "gates: {max_dorp: 1}\n"
        "schedule: {file: s.yaml}\n"
    )
    (tmp_path / "s.yaml").write_text("- {at: true, action: withdraw}\n- {at: 3, action: keeep}\n")
    (tmp_path / "b.yaml").write_text("calibrate:\n")
    (tmp_path / "c.yaml").write_text("export:\ngates: {max_kl: 1}\n")
    (tmp_path / "d.yaml").write_text(
        "export: {format: onnx, dtype: bfloat16, opset: 3}\neval: {limit: 0, limit: 1}"
    )
    done = vtw("recipe", "check", *(tmp_path / f"{name}.yaml" for name in "abcde"))
    assert done.code == 2
    found = [
        line.removeprefix(f"error: {tmp_path}/") for line in done.err.split("\n") if line.startswith("error")
    ]
    wanted = [
        "a.yaml:1:21: model.dtype: input should be", "a.yaml:2:8: data.0: data source 'gqa:limit=x'",
        "a.yaml:2:29: data.2: data source 'foo:bar=1'", "a.yaml:2:57: data.3.limit: input should be greater",
        "a.yaml:4:3: calibrate.limit: must be a number", "a.yaml:5:3: calibrate.etta: unknown key",
        "a.yaml:6:3: calibrate.policy: input should be", "a.yaml:7:9: gates.max_dorp: unknown key",
        "s.yaml:1:4: actions.0.at: must be a number", "s.yaml:2:11: actions.1.action: unknown action 'keeep'",
        "c.yaml: export: there is no schedule for it", "c.yaml: gates: there is nothing that they judge",
        "d.yaml:2:", "e.yaml: cannot read the recipe",
    ]  # fmt: skip
    assert len(found) == len(wanted), done.err
    for one, start in zip(found, wanted, strict=True):
        assert one.startswith(start), (one, start)
    assert done.out == f"{tmp_path / 'b.yaml'}: valid: calibrate\n"


def test_other_commands_tell_the_first_and_count_the_others(tmp_path):
    (tmp_path / "r.yaml").write_text("calibrate:\n  policy: best\n  limit: 0\n  etta: 1\n")
    done = vtw("run", tmp_path / "r.yaml")
    assert done.code == 2 and done.err.count("\n") == 2
    assert "r.yaml:2:3: calibrate.policy" in done.err and "2 more problems in this document" in done.err


def test_families_that_are_refused_are_not_offered(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    done = vtw("calibrate", tmp_path, "--data", "demo")
    assert done.code == 4
    offered = set(done.err.split("supported families: ")[1].split(";")[0].split(", "))
    assert offered == {name for name, row in FAMILIES.items() if not row.no_withdraw}
    assert offered < set(FAMILIES)


# --- manifests ----------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    "",
    "x",
    "../x",
    "\0",
    "\ud800",
    "y" * 300,
    [],
    [0],
    {},
    {"x": 1},
    10**30,
    float("nan"),
]
PARTS = ("format", "format_version", "model", "schedule", "weights", "dtype", "files", "graphs", "text", "vision",
         "positions", "tokens")  # fmt: skip


def mutations(node, path=()):
    """Documents that differ in one place: it is missing, or holds something else."""
    for key in list(node) if isinstance(node, dict) else range(min(len(node), 2)):
        here = (*path, key)
        if not path and key not in PARTS:
            continue
        kept = node[key]
        if isinstance(kept, dict | list):
            yield from mutations(kept, here)
        del node[key]
        yield here, "missing"
        if isinstance(node, dict):
            node[key] = kept
        else:
            node.insert(key, kept)
        for value in VALUES:
            node[key] = value
            yield here, value
        node[key] = kept


def judged(folder, document, options):
    (folder / "manifest.json").write_text(json.dumps(document))
    done = vtw("verify", folder, "--device", "cpu", *options)
    assert done.code in (0, 2, 3, 4) and "unexpected" not in done.err and "Traceback" not in done.err, done
    assert done.code == 0 or done.err.startswith("error: "), done
    return done.code


def test_mutated_manifests(tiny_dir, tmp_path):
    from vtwcli.export.hf.export import export_hf

    folder = tmp_path / "export"
    export_hf(str(tiny_dir), Schedule.withdraw_at(3), folder)
    document = read_manifest(folder)
    document["files"] = {
        name: entry
        for name, entry in document["files"].items()
        if name in ("config.json", "model.safetensors")
    } | document["files"]
    for where, value in mutations(document):
        if where[0] == "files" and len(where) > 1 and where[1] not in ("config.json", "README.md"):
            continue
        code = judged(folder, document, ["--max-new-tokens", "1"])
        fine = where in {("weights",), ("dtype",), ("model", "revision"), ("model", "name")} or where[:2] in {
            ("files", "README.md")
        }
        assert code != 0 or fine, (where, value)
    for files in (
        {},
        {"README.md": document["files"]["README.md"]},
        {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}},
    ):
        assert judged(folder, document | {"files": files}, []) == 4
    text = json.dumps(document)
    for broken in (text[:-1] + ', "files": {}}', text.replace('"bytes"', '"bytes": 1, "bytes"', 1), "[" * 100_000,
                   '{"a":' * 500 + "1" + "}" * 500, "[]", "3", "null", "", '{"format": "vtw-hf"}'):  # fmt: skip
        (folder / "manifest.json").write_text(broken)
        done = vtw("verify", folder)
        assert done.code == 4 and "manifest.json" in done.err, done


def test_mutated_manifests_of_graphs(exports, tmp_path):
    folder = tmp_path / "graphs"
    shutil.copytree(exports("split")[0], folder)
    document = json.loads((folder / "manifest.json").read_text())
    ran = 0
    for where, value in mutations(document):
        if where[0] == "files" and len(where) > 1 and where[1] != "config.json":
            continue
        try:
            (folder / "manifest.json").write_text(json.dumps(document))
            read_manifest(folder, "vtw-onnx")
        except Exception as error:
            assert type(error).__name__ == "NotFoundError", (where, value, error)
            continue
        ran += 1
        if ran % 7 == 0:
            judged(folder, document, ["--max-new-tokens", "1"])
    assert ran < 300


# --- a launcher's variables ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "x"}, {"RANK": ""}, {"RANK": "-1"}, {"RANK": "1.0"}, {"RANK": "9" * 5000}, {"RANK": "١"},
        {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "x"}, {"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"},
        {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_variables_of_a_launcher_that_are_none(monkeypatch, tmp_path, variables):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = vtw("calibrate", "demo", "--limit", "1", "--output", tmp_path / "c.json")
    assert done.code == 2, done
    assert next(iter(variables)) in done.err and "unexpected" not in done.err


def test_processes_that_do_not_find_each_other(tmp_path):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    environment.pop("MASTER_ADDR", None)
    done = subprocess.run(
        [sys.executable, "-m", "vtwcli", "calibrate", "demo", "--limit", "1", "-o", tmp_path / "c.json"],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 2 and "do not find each other" in done.stderr, done.stderr
