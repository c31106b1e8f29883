"""What commands write is what its type says, key by key; what reading looks at, and what it does not."""

import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin

import pytest
from typing_extensions import get_type_hints, is_typeddict

from vtwcli.analyze import analyze
from vtwcli.budget import budget
from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.evaluate import evaluate
from vtwcli.recipe.recipe import AnalyzeSection, BudgetSection, CalibrateSection, EvalSection, ModelSection
from vtwcli.results import analysis, calibration, comparison, evaluation
from vtwcli.results.reading import read_calibration, read_evaluation
from vtwcli.schedule.schedule import Schedule

KINDS = {
    "calibration": calibration.VtwCalibration,
    "searched": calibration.SearchedCalibration,
    "leaving": calibration.SearchedCalibration,
    "guaranteed": calibration.VtwCalibration,
    "guaranteed search": calibration.SearchedCalibration,
    "analysis": analysis.AnalysisDocument,
    "budget": comparison.Budget,
    "evaluation": evaluation.Evaluation,
}

PROMISED = {"policy": "guarantee", "risk": 0.9, "confidence": 0.5}


@pytest.fixture(scope="module")
def written(tiny_dir, data):
    """A document of each kind, as files hold it."""
    model, mix = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))]
    short = {"limit": 2, "max_new_tokens": 2}
    made = {
        "calibration": calibrate(model, mix, CalibrateSection(**short, bootstrap=20, eta=1000)),
        "searched": calibrate(model, mix, CalibrateSection(**short, method="visipruner", eta=1000)),
        "leaving": calibrate(model, mix, CalibrateSection(**short, method="exit", eta=1000)),
        "analysis": analyze(model, mix, AnalyzeSection(**short, eta=1000)).result,
        "guaranteed": calibrate(model, mix, CalibrateSection(**short, **PROMISED)),
        "guaranteed search": calibrate(
            model, mix, CalibrateSection(**short, **PROMISED, method="visipruner")
        ),
        "budget": budget(model, mix, BudgetSection(**short, max_flops=0.9)),
        "evaluation": evaluate(
            model,
            [("a", Schedule.withdraw_at(3)), ("b", Schedule.withdraw_at(2))],
            mix,
            EvalSection(**short, bootstrap=20, repeats=1, timing_tokens=1),
        )[0],
    }
    return {name: json.loads(json.dumps(document)) for name, document in made.items()}


def told(value, kind, name, absent):
    """Look at every key of a document; notes in ``absent`` which ones that need not be there are not."""
    if get_origin(kind) in (Annotated, NotRequired):
        told(value, get_args(kind)[0], name, absent)
    elif is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        assert isinstance(value, dict) and value.keys() <= hints.keys(), (name, value.keys() - hints.keys())
        for key, hint in hints.items():
            if key in value:
                told(value[key], hint, f"{name}.{key}", absent)
            else:
                assert get_origin(hint) is NotRequired, f"{name}.{key} is missing"
                absent.add(key)
    elif get_origin(kind) in (Union, UnionType):
        options = [one for one in get_args(kind) if one is not NoneType]
        if len(options) > 1:
            assert type(value) in options, name
        elif value is not None:
            told(value, options[0], name, absent)
    elif get_origin(kind) is Literal:
        assert value in get_args(kind), name
    elif get_origin(kind) is list:
        assert isinstance(value, list), name
        for one in value:
            told(one, *get_args(kind), f"{name}[]", absent)
    elif get_origin(kind) is dict:
        assert isinstance(value, dict), name
        for one in value.values():
            told(one, get_args(kind)[1], f"{name}.*", absent)
    elif kind is float:
        assert type(value) in (float, int), name
    elif kind is not Any:
        assert type(value) is kind, name


@pytest.mark.parametrize("name", KINDS)
def test_documents_are_what_their_types_say(written, name):
    absent = set()
    told(written[name], KINDS[name], name, absent)
    # of some models, of other methods, of the metric POPE, of measures that are a KL, of timing with enough rounds
    timed = {"speed_up", "decode_speed_up", "batches_left_out", "parameters", "findings", "exits"}
    visipruner = {"shallow_mid_layer", "layer_threshold", "tokens_threshold", "boundary"}
    # of promises, some of each kind of method
    proved = {"guarantee", "losses", "layer", "candidate", "ordered_on"}
    # of a comparison at equal cost
    equal = {"tokens", "scores", "left_out"}
    known = {
        "template_date",
        "precision",
        "recall",
        "f1",
        "yes_ratio",
        "positions",
        "perception",
        "cognition",
    }
    known |= {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"}
    assert absent <= known | timed | visipruner | proved | equal


def test_a_document_says_its_kind_and_no_other_method_than_its_own(written):
    kinds = (calibration.CALIBRATION, analysis.ANALYSIS, comparison.BUDGET, evaluation.EVALUATION)
    for name, files in zip(("calibration", "analysis", "budget", "evaluation"), kinds, strict=True):
        assert written[name]["format"] == files.format == f"vtw-{name}"
        assert files.named()["result"] == f"{name}.json"
    assert "method" not in written["calibration"] and not calibration.is_searched(written["calibration"])
    assert calibration.is_searched(written["searched"])


def test_a_methods_own_keys_stand_in_their_places(written):
    keys = list(written["searched"])
    own = keys[keys.index("withdrawal_layer") + 1 : keys.index("chosen")]
    assert own == ["shallow_mid_layer", "layer_threshold", "tokens_threshold"]
    assert keys[keys.index("rule") + 1] == "boundary"


def test_reading_looks_at_what_readers_rely_on(written, tmp_path):
    """Other keys may be missing and be anything; what is there is given as it stands."""
    lean = dict(written["calibration"], data=7, more=[1])
    del lean["seed"], lean["kl"]["positions"], lean["format_version"], lean["run"], lean["samples"][0]["task"]
    (tmp_path / "c.json").write_text(json.dumps(lean))
    assert read_calibration(tmp_path / "c.json") == lean
    for key in ("schedule", "samples", "method"):
        broken = {k: v for k, v in written["searched"].items() if k != key}
        (tmp_path / "s.json").write_text(json.dumps(broken))
        with pytest.raises(
            UsageError, match=r"s\.json\S*: \S+: "
        ):  # without its method it is taken for VTW's
            read_calibration(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["tasks"]["colour"]["schedules"].pop("b"), "tasks.colour: not all of the schedules are in it"),
        (lambda e: e["run"]["latency"].pop("full"), "run.latency has no full"),
        (lambda e: e["run"]["latency"]["a"]["ttft"].update(median=0), "run.latency.a.ttft.median: "),
        (lambda e: e["schedules"]["a"]["cost"].update(convention="x"), "flops_ratio has no entry"),
        (lambda e: e["schedules"]["a"]["cost"]["flops_full"].pop("flops"), "flops_full has no entry"),
        (lambda e: e["schedules"]["a"].update(worst_task=None), "schedules.a: worst_task and worst_difference go"),
        (lambda e: e["schedules"]["a"]["schedule"].pop("actions"), "schedules.a: schedule has no actions"),
        (lambda e: e.update(schedules={}), "schedules: "),
        (lambda e: e["gates"].append(3), "gates.0: input should be a valid dictionary, got 3"),
    ],
)  # fmt: skip
def test_an_evaluation_that_does_not_hang_together(written, tmp_path, change, message):
    found = json.loads(json.dumps(written["evaluation"]))
    change(found)
    (tmp_path / "e.json").write_text(json.dumps(found))
    with pytest.raises(UsageError) as caught:
        read_evaluation(tmp_path / "e.json")
    assert message in caught.value.message and caught.value.message.startswith(str(tmp_path / "e.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["kl"]["mean"].pop(), "kl.mean has 5 entries, and num_layers is 6"),
        (lambda c: c["tasks"]["colour"]["kl"].append(1), "tasks.colour.kl has 7 entries"),
        (lambda c: c["samples"].pop(), "samples, but"),
        (lambda c: c.update(withdrawal_layer=7), "withdrawal_layer is 7, and num_layers is 6"),
        (lambda c: [c.update(withdrawal_layer=None), c.pop("compromise")], "compromise: required"),
        (lambda c: [one.update(visual=0) for one in c["samples"]], "samples: none has a visual token"),
        (lambda c: c.update(interval=[1]), "interval: "),
        (lambda c: c.update(eta=0), "eta: "),
        (lambda c: c["kl"]["samples"][0].__setitem__(0, True), "kl.samples.0.0: "),
        (lambda c: c["cost"].update(convention="x"), "cost: flops_ratio has no entry for the convention 'x'"),
    ],
)
def test_a_calibration_that_does_not_hang_together(written, tmp_path, change, message):
    found = json.loads(json.dumps(written["calibration"]))
    change(found)
    (tmp_path / "c.json").write_text(json.dumps(found))
    with pytest.raises(UsageError) as caught:
        read_calibration(tmp_path / "c.json")
    assert message in caught.value.message and caught.value.message.startswith(str(tmp_path / "c.json"))
