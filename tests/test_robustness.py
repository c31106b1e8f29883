"""Whatever stands in a recipe, a schedule or a result file: it is taken, or it is one clear line and exit code 2.

Real documents are mutated: keys go, are renamed and doubled, values change their type, text is cut and garbled. What
is drawn is new every day; a failure names the day's seed, and ``VTW_TEST_SEED`` repeats it.
"""

import copy
import json
import random
import re
import string

import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from tests.cli import vtw
from tests.conftest import DAY
from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.evaluate import evaluate
from vtwcli.export import formats
from vtwcli.export.directory.card import _calibration, of_schedule
from vtwcli.pipeline.plan import resolved
from vtwcli.recipe.recipe import CalibrateSection, EvalSection, ModelSection, Recipe
from vtwcli.recipe.settings import load_recipe
from vtwcli.report import calibration as report_calibrate
from vtwcli.report import evaluation as report_eval
from vtwcli.schedule.schedule import Schedule

SEEDS = st.integers(0, 2**32)
SOME = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MANY = settings(SOME, max_examples=2500)
TODAY = seed(DAY)

RECIPE = """\
model: {name: demo, device: cpu, dtype: float32}
data: ["demo:tasks=colour+shape", {source: gqa, limit: 3, columns: {question: q}}]
calibrate: {limit: 3, eta: 1e-3, policy: paper, min_layer: 2, resume: false}
analyze: {map_layers: [0, 4], window: 3}
schedule: {file: schedule.yaml}
eval: {timing: true, batch_size: 4}
gates: {max_drop: 0.01, min_agreement: 0.9}
export: {format: onnx, dtype: float16, quantize: int8}
output: results
"""
SCHEDULE = """\
format_version: 1
actions:
  - {at: 0, until: 6, action: mute, sink: first}
  - {at: 2, until: 3, action: freeze}
  - {at: auto, after: 6, action: keep, select: {score: contribution, above: 0.2}, when: {cosine_below: 0.995}}
  - {at: 16, action: withdraw}
provenance: {model: demo, data: [abc]}
"""
WORDS = [
    "auto",
    "withdraw",
    "demo",
    "eta",
    "layer",
    "x",
    "",
    "é\0",
    "null",
    "1e-3",
    "-1",
    "a.b",
    "~",
    "gqa:limit=x",
]


def value(rng):
    """A value of some type, often of the wrong one."""
    kinds = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([-1, 0, 1, 3, 10**30]),
        lambda: rng.choice([-0.5, 0.0, 0.5, 1e300, float("nan"), float("inf")]),
        lambda: rng.choice(WORDS),
        lambda: [value(rng) for _ in range(rng.randrange(3))],
        lambda: {rng.choice(WORDS) or "k": value(rng) for _ in range(rng.randrange(3))},
    ]
    return rng.choice(kinds)()


def places(node, path=()):
    """The path of everything in a document."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(document, rng):
    """A copy with one to three things changed."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([path for path in places(document) if path])
        parent = document
        for step in path[:-1]:
            parent = parent[step]
        key = path[-1]
        act = rng.randrange(5)
        if act == 0:
            del parent[key]
        elif act == 1 and isinstance(parent, dict):
            parent[key + rng.choice("sx_")] = parent.pop(key)
        elif act == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif act == 3:
            parent[key] = [parent[key]]
        else:
            parent[key] = value(rng)
        if not document:
            break
    return document


def garbled(text, rng):
    """A copy with a few characters changed, lost or added."""
    text = list(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        part = rng.choice(
            ["", rng.choice(string.printable), "\t", ": ", "\n", "&a ", "*a", "!!x ", "\ufeff", "'", "{"]
        )
        text[at : at + rng.randrange(1, 4)] = part
    return "".join(text)


def bad_files(document, text, rng):
    """A mutated document as JSON, or its text garbled."""
    return json.dumps(mutated(document, rng)) if rng.random() < 0.7 else garbled(text, rng)


def check(done, name, many=False):
    """Fine, or one line that names the file and what is wrong, and a hint at most; or ``many`` such lines."""
    assert "Traceback" not in done.err and "unexpected failure" not in done.err, done.err
    assert done.code in (0, 2), done
    if done.code == 2:
        lines = done.err.strip("\n").split("\n")
        assert lines[0].startswith("error: ") and (many or len(lines) <= 2), done.err
        for line in lines:
            assert line.startswith("  ") or re.search(name + r"(:\d+:\d+)?: \S+", line), done.err
        assert done.out == ""


def plain(text):
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def try_recipe(folder, seed):
    note(f"VTW_TEST_SEED={DAY}")
    rng = random.Random(seed)
    (folder / "schedule.yaml").write_text(SCHEDULE)
    (folder / "recipe.yaml").write_text(bad_files(plain(RECIPE), RECIPE, rng), encoding="utf-8")
    done = vtw("recipe", "check", folder / "recipe.yaml")
    # a mutated path may lead to another schedule file, which is then the one that cannot be read
    check(done, "(recipe.yaml|cannot read the schedule|schedule.yaml)" if done.code else "", many=True)
    if done.code == 0:
        recipe = load_recipe(folder / "recipe.yaml")
        again = resolved(recipe, folder)
        assert Recipe.model_validate(json.loads(json.dumps(again))).calibrate == recipe.calibrate


def try_schedule(folder, seed):
    note(f"VTW_TEST_SEED={DAY}")
    rng = random.Random(seed)
    (folder / "s.yaml").write_text(bad_files(plain(SCHEDULE), SCHEDULE, rng), encoding="utf-8")
    (folder / "r.yaml").write_text("schedule: {file: s.yaml}\nexport:")
    done = vtw("recipe", "check", folder / "r.yaml")
    check(done, "(s.yaml|r.yaml)", many=True)
    if done.code == 0:
        schedule = Schedule.from_file(folder / "s.yaml")
        assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.fixture(scope="module")
def documents(tiny_dir, data):
    """A calibration and an evaluation, as files hold them."""
    model, mix = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))]
    options = CalibrateSection(limit=1, max_new_tokens=2, bootstrap=20, eta=1000)
    found = calibrate(model, mix, options)
    schedule = Schedule.from_dict(found["schedule"])
    judged, _ = evaluate(
        model,
        [("a", schedule)],
        mix,
        EvalSection(limit=1, max_new_tokens=2, bootstrap=20, repeats=6, timing_tokens=1, timing_batch=(1, 2)),
    )
    return json.loads(json.dumps(found)), json.loads(json.dumps(judged))


@pytest.fixture
def reading(monkeypatch):
    """Replaces what ``vtw export`` does with a valid result by what it reads of it, without writing a model."""

    drawn = []

    def export(model, schedule, output, options, *, calibration=None, evaluation=None, **more):
        if calibration is not None:
            assert _calibration(calibration, schedule, None)
            drawn.append(1)
            if len(drawn) % 20 == 1:  # a picture takes a while
                report_calibrate.plot_calibration(calibration, output.with_suffix(".svg"))
        if evaluation is not None:
            assert report_eval.markdown(evaluation)
            chosen = Schedule.from_dict(next(iter(evaluation["schedules"].values()))["schedule"])
            assert report_eval.markdown(of_schedule(evaluation, chosen))
        return {}

    monkeypatch.setattr(formats, "export", export)


def try_calibration(folder, seed, documents):
    note(f"VTW_TEST_SEED={DAY}")
    rng = random.Random(seed)
    (folder / "c.json").write_text(bad_files(documents[0], json.dumps(documents[0], indent=1), rng))
    done = vtw("export", "demo", "--calibration", folder / "c.json", "--output", folder / "out")
    check(done, "c.json")


def try_evaluation(folder, seed, documents):
    note(f"VTW_TEST_SEED={DAY}")
    rng = random.Random(seed)
    (folder / "e.json").write_text(bad_files(documents[1], json.dumps(documents[1], indent=1), rng))
    done = vtw("export", "demo", "--layer", 1, "--evaluation", folder / "e.json", "--output", folder / "out")
    check(done, "e.json")


def try_run_file(folder, seed, run_file):
    note(f"VTW_TEST_SEED={DAY}")
    rng = random.Random(seed)
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out/run.json").write_text(bad_files(run_file, json.dumps(run_file, indent=1), rng))
    (folder / "r.yaml").write_text("model: demo\ncalibrate: {limit: 1}")
    check(vtw("run", folder / "r.yaml", "-o", folder / "out", "--dry-run"), "run.json")


@TODAY
@SOME
@given(drawn=SEEDS)
def test_recipes(tmp_path, drawn):
    try_recipe(tmp_path, drawn)


@TODAY
@SOME
@given(drawn=SEEDS)
def test_schedules(tmp_path, drawn):
    try_schedule(tmp_path, drawn)


@TODAY
@SOME
@given(drawn=SEEDS)
def test_calibration_results(tmp_path, documents, reading, drawn):
    try_calibration(tmp_path, drawn, documents)


@TODAY
@SOME
@given(drawn=SEEDS)
def test_evaluation_results(tmp_path, documents, reading, drawn):
    try_evaluation(tmp_path, drawn, documents)


@TODAY
@SOME
@given(drawn=SEEDS)
def test_run_files(tmp_path, drawn):
    record = {
        "inputs": {"options": "a", "model": "b"},
        "files": {"calibration.json": "c"},
        "seconds": 1.5,
        "words": "K = 1",
        "result": {"withdrawal_layer": 1},
    }
    known = {"format": "vtw-run", "format_version": 1, "started": ["eval"], "steps": {"calibrate": record}}
    try_run_file(tmp_path, drawn, known)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [try_recipe, try_schedule, try_calibration, try_evaluation])
@TODAY
@MANY
@given(drawn=SEEDS)
def test_ten_thousand_cases(tmp_path, documents, reading, attempt, drawn):
    more = (documents,) if attempt in (try_calibration, try_evaluation) else ()
    attempt(tmp_path, drawn, *more)


def test_unmutated_documents_are_taken(tmp_path, documents, reading):
    (tmp_path / "schedule.yaml").write_text(SCHEDULE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert vtw("recipe", "check", tmp_path / "recipe.yaml").code == 0
    for name, document in zip(("c.json", "e.json"), documents, strict=True):
        (tmp_path / name).write_text(json.dumps(document))
    done = vtw(
        "export",
        "demo",
        "--calibration",
        tmp_path / "c.json",
        "--evaluation",
        tmp_path / "e.json",
        "-o",
        tmp_path / "out",
    )
    assert done.code == 0, done.err


def test_large_results_are_read_fast_and_still_checked(tmp_path, documents):
    document = copy.deepcopy(documents[0])
    document["padding"] = ["x" * 100] * 20_000
    (tmp_path / "c.json").write_text(json.dumps(document))
    assert Schedule.from_file(tmp_path / "c.json") == Schedule.from_dict(document["schedule"])
    document["schedule"]["actions"] = [{"at": 3}]
    (tmp_path / "c.json").write_text(json.dumps(document))
    done = vtw("export", "demo", "--calibration", tmp_path / "c.json", "--output", tmp_path / "out")
    assert done.code == 2
    assert "actions.0: the key 'action' is required" in done.err
