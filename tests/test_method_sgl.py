"""SGL: a second model's attention by hand, what is kept by it, and who refuses it."""

from __future__ import annotations

import json

import pytest
import torch

from tests import tiny
from tests.conftest import build_processor
from vtwcli.budget import at_equal_cost, budget
from vtwcli.data.sample import Sample
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.evaluate import evaluate
from vtwcli.export.hf.export import export_hf
from vtwcli.export.onnx.export import removals
from vtwcli.measure.guide import Guides, attention_received
from vtwcli.methods.method import Shape
from vtwcli.methods.sgl import SGL
from vtwcli.models.inputs import encode_batch
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import BudgetSection, EvalSection, ModelSection, ScheduleSection
from vtwcli.runtime import PruningError, pruned
from vtwcli.schedule.schedule import Schedule
from vtwcli.schedule.sentences import describe

IMAGE_TOKEN = 98
LONGEST = 4


@pytest.fixture(scope="module")
def guide_dir(tmp_path_factory):
    """A model of other weights and the same processor, as guides are."""
    path = tmp_path_factory.mktemp("guide")
    torch.manual_seed(3)
    model = tiny.llava()
    for weight in model.model.language_model.layers.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(path)
    build_processor().save_pretrained(path)
    return path


def by_hand(loaded, sample: Sample) -> torch.Tensor:
    """The answer token by token without a cache, and the attention of one pass over all but its last token."""
    inputs = encode_batch(loaded, [sample])
    ends, ids, answer = {loaded.processor.tokenizer.eos_token_id}, inputs["input_ids"], []
    while len(answer) < LONGEST and not ends & set(answer):
        tail = torch.tensor([answer], dtype=torch.long)
        given = {
            **inputs,
            "input_ids": torch.cat([ids, tail], 1),
            "attention_mask": torch.ones(1, ids.shape[1] + len(answer), dtype=torch.long),
        }
        with torch.no_grad():
            out = loaded.model(**given, use_cache=False, output_attentions=True)
        answer.append(int(out.logits[0, -1].argmax()))
    visual = [i for i, token in enumerate(ids[0].tolist()) if token == IMAGE_TOKEN]
    rows = [i for i in range(given["input_ids"].shape[1]) if i not in visual]
    return torch.stack(
        [sum(layer[0, :, row, i].double().sum() for layer in out.attentions for row in rows) for i in visual]
    )


@pytest.fixture(scope="module")
def samples(data):
    return load_data([DataSpec(source=str(data))], limit=3, seed=0).samples


def test_a_guide_scores_what_its_answer_reads(guide_dir, samples):
    loaded = load(str(guide_dir), attn="eager")
    for sample in samples:
        if sample.images:
            found = attention_received(loaded, sample, LONGEST)
            torch.testing.assert_close(found, by_hand(loaded, sample), rtol=1e-5, atol=1e-7)


def test_the_large_model_keeps_the_best_of_the_guide(tiny_dir, guide_dir, data, samples):
    """Through an evaluation, whose batches hold prompts of several lengths, and one without an image."""
    schedule = SGL(guide=str(guide_dir), layer=3, ratio=0.4).schedule()
    lines: list[str] = []
    options = EvalSection(limit=3, max_new_tokens=LONGEST, bootstrap=0, timing=False)
    named = [("sgl", schedule), ("never", SGL(guide=str(guide_dir), layer=6).schedule())]
    evaluate(
        ModelSection(name=str(tiny_dir)), named, [DataSpec(source=str(data))], options, trace=lines.append
    )
    said = {
        one["id"]: one for one in map(json.loads, "".join(lines).splitlines()) if one["schedule"] == "sgl"
    }
    loaded, compared = load(str(guide_dir), attn="eager"), 0
    for sample in samples:
        if sample.images:
            best = by_hand(loaded, sample).argsort(descending=True)[:4].sort().values.tolist()
            assert said[sample.id]["actions"] == [{"action": "keep", "layer": 3, "kept": best}]
            assert said[sample.id]["visual_per_layer"] == [9, 9, 9, 4, 4, 4]
            compared += 1
    assert compared > 1


def test_a_budget_compares_it_where_there_is_a_guide(tiny_dir, guide_dir, data):
    def run(rule: ScheduleSection, **more):
        options = BudgetSection(limit=1, max_new_tokens=2, methods=("sgl", "uniform"), ratios=(0.4,), **more)
        return budget(ModelSection(name=str(tiny_dir)), [DataSpec(source=str(data))], options, rule)

    guide = ScheduleSection(guide=str(guide_dir))
    assert [row["method"] for row in run(ScheduleSection())["candidates"]] == ["uniform"]
    both = {row["method"]: row for row in run(guide)["candidates"]}
    assert both.keys() == {"sgl", "uniform"}
    assert both["sgl"]["visual_tokens"] == [9, 9, 4, 4, 4, 4]
    [row] = [row for row in run(guide, tokens=(5,))["candidates"] if row["method"] == "sgl"]
    assert row["parameters"]["guide"] == str(guide_dir)
    [left] = at_equal_cost(Shape(6), BudgetSection(tokens=(3,), methods=("sgl", "uniform")), 9).left_out
    assert left["why"] == "it needs a second model: --set schedule.guide=MODEL"


def test_it_is_scaled_and_said():
    assert [SGL().fitted(Shape(depth)).layer for depth in (32, 48, 12)] == [12, 19, 4]
    schedule = SGL(guide="small/model").schedule()
    assert describe(schedule.actions[0], 32) == (
        "From layer 12 of 32 on only 40% of the visual tokens (most attention from small/model while it answers) "
        "remain."
    )
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    with pytest.raises(ValueError, match="method fastv has no guide"):
        ScheduleSection(method="fastv", guide="small")


def test_what_cannot_be_is_refused(tiny_dir, guide_dir, samples, tmp_path):
    schedule = SGL(guide=str(guide_dir), layer=3).schedule()
    for refused in (
        lambda: export_hf(str(tiny_dir), schedule, tmp_path / "out"),
        lambda: removals(schedule, 6),
    ):
        with pytest.raises(UsageError, match="a schedule with a guide cannot be exported"):
            refused()
    assert not (tmp_path / "out").exists()
    loaded = load(str(tiny_dir))
    batch = encode_batch(loaded, samples[:1])
    for given, why in ((None, "nobody gave its scores"), (torch.zeros(1, 2), r"scores are \[1, 2\]")):
        with pruned(loaded.model, schedule) as handle, pytest.raises(PruningError, match=why):
            handle.given = given
            loaded.model(**batch)
    with pytest.raises(UsageError, match="needs one guide"):
        Guides(loaded, 2).beside(batch, samples[:1], SGL().schedule())


def test_another_number_of_visual_tokens_is_refused(tiny_dir, samples, tmp_path):
    other = tiny.llava()
    other.config.vision_config.image_size = 16
    other.model.vision_tower = type(other.model.vision_tower)(other.config.vision_config)
    other.save_pretrained(tmp_path)
    processor = build_processor()
    processor.image_processor.size = {"shortest_edge": 16}
    processor.image_processor.crop_size = {"height": 16, "width": 16}
    processor.save_pretrained(tmp_path)
    loaded = load(str(tiny_dir))
    seeing = [sample for sample in samples if sample.images][:1]
    with pytest.raises(UsageError, match=r"makes 16 visual tokens of sample .* makes 9 of it"):
        schedule = SGL(guide=str(tmp_path), layer=3).schedule()
        Guides(loaded, 2).beside(encode_batch(loaded, seeing), seeing, schedule)
