"""The profile end to end on a tiny model with real files: values against the slow reference, and every way to run."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from importlib.metadata import version
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests import reference, slow_schedule
from tests.cli import launch
from vtwcli.analyze import analyze, shares_sweep
from vtwcli.calibrate import calibrate
from vtwcli.cli import build
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.judge.stages import boundaries
from vtwcli.measure import many
from vtwcli.measure.profile import interventions
from vtwcli.methods.visipruner import filter_and_exit
from vtwcli.models.generation import generate_answers
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import AnalyzeSection, CalibrateSection, ModelSection
from vtwcli.report.analysis import PLOTS, plot, sentences
from vtwcli.report.analysis_page import heat_map, page, spread_over
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.sweep import SweepItem, sweep

LAYERS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two questions of each of two tasks; the last has two images, and there is one without."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        image = [f"{i}.png", "0.png"] if i == 3 else [] if i == 4 else f"{i}.png"
        task = ("colour", "caption")[i % 2]
        rows.append({"image": image, "question": f"what is {i}?", "answer": "red sea"[: 3 + i], "task": task})
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def options(**given):
    defaults = {
        "limit": 3,
        "max_new_tokens": 3,
        "eta": 0.05,
        "window": 2,
        "lens": 2,
        "maps": 4,
        "map_layers": (0, 5),
    }
    return AnalyzeSection(**{**defaults, "tokens_threshold": 0.05, "sink_ratio": 1.5, **given})


def run(model, data, stream=None, **given):
    return analyze(
        ModelSection(name=str(model), stream=stream), [DataSpec(source=str(data))], options(**given)
    )


def without_run(result):
    return {key: value for key, value in result.items() if key != "run"}


@pytest.fixture(scope="module")
def analysis(tiny_dir, data):
    return run(tiny_dir, data)


@pytest.fixture(scope="module")
def result(analysis):
    return analysis.result


def prompts(tiny_dir, data, loaded):
    """The samples that see an image, as model inputs with their forced answers, and the compared rows."""
    mix = load_data([DataSpec(source=str(data))], limit=3, seed=0)
    for sample in mix.samples:
        if not sample.images:
            continue
        [(_, ids)] = generate_answers(loaded, [sample], 3)
        one = encode(loaded, sample, ids[:-1])
        rows = slice(one.prompt_length - 1, one.prompt_length - 1 + len(ids))
        yield sample, dict(one.inputs), rows, one.prompt_length


def test_every_curve_is_that_of_the_slow_reference(tiny_dir, data, result):
    loaded = load(str(tiny_dir))
    model = loaded.model
    layers = reference.text_layers(model)
    for s, (_, batch, rows, _) in enumerate(prompts(tiny_dir, data, loaded)):
        visual = reference.visual_mask(model, batch["input_ids"])
        blind = visual[:, None, :] & ~visual[:, :, None]
        nothing = torch.zeros(LAYERS, *blind.shape, dtype=torch.bool)

        def log_probs(hidden, batch=batch, rows=rows):
            return reference.logits(model, batch, hidden)[0, rows].double().log_softmax(-1)

        full = log_probs(nothing)

        def kl(changed, full=full):
            return float((changed.exp() * (changed - full)).sum(-1).mean())

        def knocked(first, behind, nothing=nothing, blind=blind, kl=kl, log_probs=log_probs):
            hidden = nothing.clone()
            hidden[first:behind] = blind
            return kl(log_probs(hidden))

        def frozen(d, visual=visual, nothing=nothing, kl=kl, log_probs=log_probs):
            def keep(module, args, kwargs, out):
                return torch.where(visual[..., None], args[0] if args else kwargs["hidden_states"], out)

            handle = layers[d].register_forward_hook(keep, with_kwargs=True)
            try:
                return kl(log_probs(nothing))
            finally:
                handle.remove()

        expected = {
            "withdrawal": [kl(log_probs(reference.withdrawal(model, visual, d))) for d in range(LAYERS)],
            "knockout_layer": [knocked(d, d + 1) for d in range(LAYERS)],
            "knockout_window": [knocked(d, d + 2) for d in range(LAYERS - 1)],
            "knockout_until": [knocked(0, d + 1) for d in range(LAYERS)],
            "layer_update": [frozen(d) for d in range(LAYERS)],
        }
        for name, curve in expected.items():
            got = result["measures"][name]["samples"][s]
            np.testing.assert_allclose(got, curve, rtol=1e-3, atol=1e-6, err_msg=name)
        assert max(expected["layer_update"]) > 1e-4
        assert expected["layer_update"][-1] == pytest.approx(0, abs=1e-9)
    assert s + 1 == len(result["samples"])


def test_blindness_from_a_layer_on_is_withdrawal_there(tiny_dir, data):
    loaded = load(str(tiny_dir))
    source = Resident(loaded.model, loaded.family)
    for _, batch, rows, _ in prompts(tiny_dir, data, loaded):
        item = SweepItem(batch, torch.arange(rows.start, rows.stop)[None])
        tried = [Intervention(kind, d) for kind in ("withdraw", "mute") for d in range(LAYERS)]
        (found,) = sweep(source, [item], tried)
        torch.testing.assert_close(found.kl[:LAYERS], found.kl[LAYERS:], rtol=1e-4, atol=1e-9)


def test_what_is_tried_covers_every_layer():
    tried = interventions(4, 3, True)
    assert [(one.start, one.stop) for one in tried["knockout_window"]] == [(0, 3), (1, 4)]
    assert [(one.start, one.stop) for one in tried["knockout_until"]] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert {name: len(curve) for name, curve in tried.items()} == {
        "withdrawal": 4, "knockout_layer": 4, "knockout_window": 2, "knockout_until": 4, "layer_update": 4,
    }  # fmt: skip
    assert "layer_update" not in interventions(4, 3, False)


def test_critical_tokens_lens_and_filter_are_those_of_the_slow_interpreter(tiny_dir, data, result):
    """The interpreter of schedules computes every weight of every layer and decides token by token."""
    loaded = load(str(tiny_dir))
    model = loaded.model
    norm, head = model.model.language_model.norm, model.lm_head
    actions = [
        {"at": "auto", "action": "keep", "after": len(range(*result["stages"]["shallow"])),
         "when": {"cosine_below": 0.995}, "select": {"score": "contribution", "above": 0.05}}
    ]  # fmt: skip
    some = 0
    for s, (_, batch, _, length) in enumerate(prompts(tiny_dir, data, loaded)):
        prompt = {name: x[:, :length] if x.ndim == 2 else x for name, x in batch.items()}
        row = result["samples"][s]
        _, decisions = slow_schedule.logits(model, prompt, actions)
        assert row["filter"] == decisions.starts[0][0]
        if row["filter"] is not None:
            kept = decisions.kept[0][0]
            assert row["critical"][row["filter"] - 1] == kept
            assert row["kept"] == len(kept)
            some += 1
        with torch.no_grad():
            hidden = model(**prompt, output_hidden_states=True).hidden_states
            for d in range(LAYERS - 1):
                p = head(norm(hidden[d + 1][0, -1])).double().softmax(-1)
                want = p.topk(2)
                assert [share for _, share in row["lens"][d]] == pytest.approx(want.values.tolist(), rel=1e-3)
                tokens = [loaded.processor.tokenizer.decode([i]) for i in want.indices.tolist()]
                assert [token for token, _ in row["lens"][d]] == tokens
        assert result["measures"]["lens_agreement"]["samples"][s][-1] == 1
    assert some


def test_measures_add_up(result):
    measures = result["measures"]
    for name, row in measures.items():
        samples = np.array(row["samples"], dtype=float)
        there = ~np.isnan(samples).all(axis=0)
        np.testing.assert_allclose(
            np.array(row["mean"], dtype=float)[there], np.nanmean(samples[:, there], axis=0), err_msg=name
        )
        np.testing.assert_allclose(
            np.array(row["std"], dtype=float)[there],
            np.nanstd(samples[:, there], axis=0),
            atol=1e-12,
            err_msg=name,
        )
        assert len(row["mean"]) == LAYERS - (name == "knockout_window")
    whole = [np.array(measures[f"attention_{part}"]["samples"]) for part in ("prefix", "visual", "suffix")]
    np.testing.assert_allclose(sum(whole), 1, atol=1e-5)
    assert (np.array(measures["attention_first"]["samples"]) <= whole[1] + 1e-6).all()
    counts = [[len(layer) for layer in sample["critical"]] for sample in result["samples"]]
    assert measures["critical"]["samples"] == counts
    assert any(map(any, counts))


def test_document_describes_itself(result, tiny_dir):
    assert (result["format"], result["format_version"]) == ("vtw-analysis", 1)
    assert result["model"]["name"] == str(tiny_dir)
    assert [sample["visual"] for sample in result["samples"]] == [9, 9, 9, 18]
    assert result["versions"]["torch"] == version("torch")
    assert result["data"][0]["fingerprint"]
    assert set(result["stages"]["tasks"]) == {"colour", "caption"}
    parts = [range(*result["stages"][name]) for name in ("shallow", "middle", "deep")]
    assert [layer for part in parts for layer in part] == list(range(LAYERS))
    for schedule in result["schedules"].values():
        if schedule:
            Schedule.from_dict(schedule).check_depth(LAYERS)
    json.dumps(result, allow_nan=False)


def test_maps_hold_the_shown_samples_and_layers(analysis, result):
    assert [shown["sample"] for shown in result["maps"]] == [0, 1, 2, 3]
    for shown in result["maps"]:
        row = result["samples"][shown["sample"]]
        assert shown["layers"] == [0, 5]
        assert len(shown["boxes"]) == row["visual"]
        assert [box[0] for box in shown["boxes"]] == [0] * 9 + [1] * (row["visual"] - 9)
        # 16 x 12 pixels, the middle 12 x 12 of them in 3 x 3 patches
        assert shown["boxes"][0] == [0, 0.125, 0, 0.375, pytest.approx(1 / 3, abs=1e-6)]
        for place, layer in enumerate(shown["layers"]):
            total = result["measures"]["attention_visual"]["samples"][shown["sample"]][layer]
            assert sum(shown["attention"][place]) == pytest.approx(total, rel=1e-3)
            critical = [i for i, value in enumerate(shown["contribution"][place]) if value > 0.05]
            assert critical == row["critical"][layer]


def test_same_seed_same_document(tiny_dir, data, result):
    assert without_run(run(tiny_dir, data).result) == without_run(result)


THRESHOLDS = {"eta": 1.55, "layer_threshold": 0.9, "exit_threshold": 0.98, "exit_layers": 1}


def test_other_thresholds_need_no_new_run(tiny_dir, data, result):
    """From the document alone: what a run under other thresholds finds."""
    want = run(tiny_dir, data, **THRESHOLDS).result
    measures, tasks = result["measures"], [sample["task"] for sample in result["samples"]]
    until, withdrawal = (np.array(measures[name]["samples"]) for name in ("knockout_until", "withdrawal"))
    found, by_task = boundaries(until, withdrawal, tasks, THRESHOLDS["eta"], result["min_layer"])
    stages = [*by_task.values(), found]
    expected = [*(want["stages"]["tasks"][task] for task in by_task), want["stages"]]
    for one, document in zip(stages, expected, strict=True):
        parts = {"shallow": one.shallow, "middle": one.middle, "deep": one.last}
        assert {name: [part.start, part.stop] for name, part in parts.items()} == {
            name: document[name] for name in parts
        }
    assert want["stages"]["shallow"] != result["stages"]["shallow"]
    rules = [THRESHOLDS[name] for name in ("layer_threshold", "exit_threshold", "exit_layers")]
    changed = 0
    for s, sample in enumerate(result["samples"]):
        lowest, counts = (measures[name]["samples"][s] for name in ("minimum_cosine", "critical"))
        ends = filter_and_exit(lowest, counts, sample["kept_cosine"], len(found.shallow), *rules)
        assert ends == (want["samples"][s]["filter"], want["samples"][s]["exit"])
        changed += ends != (sample["filter"], sample["exit"])
    assert changed
    assert any(sample["exit"] is not None for sample in want["samples"])


def test_kl_is_kept_by_position(tiny_dir, data, result):
    first = run(tiny_dir, data, positions="first").result
    for name in ("withdrawal", "knockout_layer", "knockout_window", "knockout_until", "layer_update"):
        measure, alone = result["measures"][name], first["measures"][name]
        for by_layer, mean, only in zip(
            measure["positions"], measure["samples"], alone["positions"], strict=True
        ):
            np.testing.assert_allclose(np.mean(by_layer, axis=1), mean, rtol=1e-5)
            np.testing.assert_allclose(np.array(by_layer)[:, :1], only, rtol=1e-3, atol=1e-7)
    assert "positions" not in result["measures"]["entropy"]


def test_streamed_layers_give_the_same_profile(tiny_dir, data, monkeypatch, capsys):
    import vtwcli.analyze as module

    whole = run(tiny_dir, data, answers="reference", freeze=True).result
    counts = []

    def counting(source, items, *given, **kwargs):
        counts.append(len(items))
        return sweep(source, items, *given, **kwargs)

    monkeypatch.setattr(module, "sweep", counting)
    monkeypatch.setattr(many, "_STREAM_BYTES", 200_000)
    streamed = run(tiny_dir, data, stream=True, answers="reference", freeze=True).result
    assert sum(counts) == 5 and 1 < len(counts) < 5  # several samples walk together, not all
    assert streamed["run"]["streamed"]
    monkeypatch.undo()
    for name, row in whole["measures"].items():
        got = np.array(streamed["measures"][name]["samples"], dtype=float)
        np.testing.assert_allclose(
            got, np.array(row["samples"], dtype=float), rtol=1e-3, atol=1e-6, err_msg=name
        )
    for got, expected in zip(streamed["samples"], whole["samples"], strict=True):
        for mine, theirs in zip(got["lens"], expected["lens"], strict=True):
            assert [token for token, _ in mine] == [token for token, _ in theirs]
            assert [share for _, share in mine] == pytest.approx([share for _, share in theirs], rel=1e-3)
    left_out = run(tiny_dir, data, stream=True, answers="reference").result
    assert "layer_update" not in left_out["measures"]
    assert "--freeze" in capsys.readouterr().err


def test_one_sweep_gives_both_documents(tiny_dir, data, result):
    model, specs = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))]
    wanted = CalibrateSection(limit=3, max_new_tokens=3, eta=0.05, bootstrap=20)
    assert shares_sweep(options(), wanted)
    both = analyze(model, specs, options(), calibration=wanted)
    assert without_run(both.result) == without_run(result)
    assert without_run(both.calibration) == without_run(calibrate(model, specs, wanted))
    other = CalibrateSection(limit=2, max_new_tokens=3)
    assert not shares_sweep(options(), other)
    for alone in ({"resume": True}, {"method": "visipruner"}):
        assert not shares_sweep(options(), wanted.model_copy(update=alone))
    with pytest.raises(UsageError, match="cannot share one sweep"):
        analyze(model, specs, options(), calibration=other)


def test_samples_without_images_do_not_count(tiny_dir, data, result, tmp_path, capsys):
    run(tiny_dir, data, maps=0, lens=0, freeze=False)
    assert "1 samples have no visual token" in capsys.readouterr().err
    assert len(result["samples"]) == 4
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"image": [], "question": "why?", "answer": "so"}))
    with pytest.raises(NotFoundError, match="nothing to analyze"):
        run(tiny_dir, file)


def test_a_layer_that_is_not_there_is_refused(tiny_dir, data):
    with pytest.raises(UsageError, match=r"--map-layers: there is no layer 6, the model has layers 0\.\.5"):
        run(tiny_dir, data, map_layers=(6,))


ARGUMENTS = [
    "--limit", "3", "--max-new-tokens", "3", "--eta", "0.05", "--window", "2", "--lens", "2", "--maps", "4",
    "--map-layers", "0,5", "--tokens-threshold", "0.05", "--set", "analyze.sink_ratio=1.5",
]  # fmt: skip


def test_two_processes_give_the_file_of_one(tiny_dir, data, tmp_path, result):
    ended = launch(
        tmp_path, "analyze", str(tiny_dir), "--data", str(data), *ARGUMENTS, "--output", "two.json"
    )
    assert [process.returncode for process, _, _ in ended] == [0, 0], ended
    assert "layer" in ended[0][1]
    assert ended[1][1] == ""
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["run"]["processes"] == 2
    assert json.dumps(without_run(two)) == json.dumps(without_run(result))


def test_the_command_writes_a_directory_of_views(tiny_dir, data, tmp_path, result):
    arguments = ["analyze", str(tiny_dir), "--data", str(data), *ARGUMENTS, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(build(["analyze"]), arguments)
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "analysis.json", "analysis.html", "analysis.static.yaml", "analysis.kl.png", "analysis.attention.png",
        "analysis.tokens.png", "analysis.values.png",
    }  # fmt: skip
    assert without_run(json.loads((tmp_path / "out" / "analysis.json").read_text())) == without_run(result)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : LAYERS + 1]] == [str(d) for d in range(LAYERS)]
    for sentence in sentences(result):
        assert sentence in done.stdout
    static = Schedule.from_file(tmp_path / "out" / "analysis.static.yaml")
    assert static == Schedule.from_dict(result["schedules"]["static"])
    again = CliRunner().invoke(build(["analyze"]), arguments)
    assert isinstance(again.exception, UsageError)
    assert "exists already" in str(again.exception)


def test_json_on_stdout_and_svg_plots(tiny_dir, data, tmp_path, result):
    arguments = ["analyze", str(tiny_dir), "--data", str(data), *ARGUMENTS, "--json", "--svg"]
    done = CliRunner().invoke(build(["analyze"]), [*arguments, "--output", str(tmp_path / "p.json")])
    assert without_run(json.loads(done.stdout)) == without_run(result)
    assert (tmp_path / "p.kl.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "p.kl.png").exists()


class Tags(HTMLParser):
    """Collects tags and addresses, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_with_all_pictures(analysis):
    text = page(analysis)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("img") == 4 + sum(
        len(analysis.samples[shown["sample"]].images) for shown in analysis.result["maps"]
    )
    assert tags.addresses
    assert all(address.startswith("data:image/png;base64,") for address in tags.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    for address in tags.addresses:
        Image.open(BytesIO(base64.b64decode(address.split(",", 1)[1]))).load()
    for sample in (analysis.result["samples"][shown["sample"]] for shown in analysis.result["maps"]):
        assert sample["question"] in text
    assert "Logit lens" in text


def test_pictures_show_the_numbers(result):
    drawn = {name: plot(result, name) for name in PLOTS}
    lines = {line.get_label(): line for line in drawn["kl"].axes[0].get_lines()}
    blue = lines["no visual tokens from here on (= text blind from here on)"]
    np.testing.assert_allclose(blue.get_ydata(), np.maximum(result["measures"]["withdrawal"]["mean"], 1e-5))
    window = lines["text blind in a window of 2 layers"]
    np.testing.assert_allclose(window.get_xdata(), np.arange(LAYERS - 1) + 0.5)
    bars = drawn["attention"].axes[0].patches
    heights = np.array([bar.get_height() for bar in bars if bar.get_width() == 0.8]).reshape(4, LAYERS)
    np.testing.assert_allclose(heights.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(heights[1], result["measures"]["attention_first"]["mean"])


def test_heat_lands_on_the_tokens_box():
    boxes = [[0, 0, 0, 1, 1], [0, 0.5, 0, 1, 0.25], None, [1, 0, 0, 1, 1]]
    picture = spread_over(boxes, [0.8, 0.2, 0.5, 0.7], 0, (8, 12), add=True)
    assert picture.shape == (8, 12)
    assert picture.sum() == pytest.approx(1)
    ground = 0.8 / 96
    np.testing.assert_allclose(picture[:2, 6:], ground + 0.2 / 12)
    assert np.count_nonzero(picture > ground * 1.001) == 12
    largest = spread_over(boxes, [0.1, 0.2, 0.5, 0.7], 0, (8, 12), add=False)
    np.testing.assert_allclose(largest[:2, 6:], 0.2)
    np.testing.assert_allclose(largest[2:], 0.1)


def test_critical_patches_are_outlined(analysis, result):
    shown = result["maps"][0]
    figure = heat_map(result, shown, analysis.samples[0].images[0], 0)
    outlined = [len(axis.patches) for axis in figure.axes]
    counts = [len(result["samples"][0]["critical"][layer]) for layer in shown["layers"]]
    assert outlined == counts * 2
