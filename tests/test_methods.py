"""Methods: VisiPruner's published rule written out step by step, and what the command line makes of its parameters."""

import json
import re

import pytest
import torch
from pydantic import ValidationError

from tests import parity, slow_schedule
from tests.test_runtime import batch_of
from tests.tiny import IMAGE_ID, llava
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import UsageError
from vtwcli.evaluate import evaluate
from vtwcli.judge.flops import TextShape, kv_bytes, prefill_cost
from vtwcli.methods.visipruner import VisiPruner
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.recipe.recipe import EvalSection, ModelSection, Recipe, ScheduleSection
from vtwcli.recipe.schedules import schedule_of, schedules_of
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule

# thresholds that fit a random model, and what happens in each sample of ROWS: the rule must filter and exit
RULE = {"shallow_mid_layer": 1, "layer_threshold": 0.99, "tokens_threshold": 1.0, "exit_threshold": 0.7}
ROWS = ["t3 i t5", "t2 i t4", "i t3"]


@torch.no_grad()
def published(
    model, ids, embeddings, steps, *, shallow, layer_threshold, tokens_threshold, exit_threshold, layer0
):
    """VisiPruner as its paper and code state it, for one sample: eager attention, no cache, no schedule.

    Every generated token recomputes the whole sequence; tokens that left are columns that nobody reads any more.

    Args:
        ids: of the prompt, [S].
        embeddings: of the prompt with the image's features in place, [S, D].

    Returns:
        The logits that predict each of ``steps`` greedy tokens, [steps, V], and a list of what happened.
    """
    text_model = model.model.language_model
    heads = model.config.text_config.num_attention_heads
    visual = (ids == IMAGE_ID).nonzero()[:, 0].tolist()
    prompt, happened = len(ids), []
    gone: dict[int, list[int]] = {}  # layer -> columns that no longer exist there
    found = []
    for step in range(steps):
        x = embeddings[None]
        length = x.shape[1]
        rotary = text_model.rotary_emb(x, torch.arange(length)[None])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        chosen, exits = None, 0
        absent: list[int] = []
        for index, layer in enumerate(text_model.layers):
            if step:
                absent = gone[index]
            else:
                gone[index] = absent
            attention = layer.self_attn
            normed = layer.input_layernorm(x)
            q, k, v = (
                projection(normed).view(1, length, -1, attention.head_dim).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = rotated(q, *rotary), rotated(k, *rotary)
            k, v = (one.repeat_interleave(heads // one.shape[1], 1) for one in (k, v))
            allowed = causal.clone()
            allowed[:, absent] = False
            allowed[range(length), range(length)] = True  # rows of absent tokens; nobody reads them
            scores = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).masked_fill(~allowed, -torch.inf)
            weights = scores.softmax(-1)[0]  # [H, S, S]
            suffix = slice(visual[-1] + 1, prompt)
            block = slice(visual[0], visual[-1] + 1)
            if index < shallow and index == 0 and layer0 == "7b":
                mass = weights[:, suffix, block].sum(-1)
                weights[:, visual[0] : prompt, block] = 0
                weights[:, suffix, visual[0]] = mass
            elif index < shallow and index == 0:
                weights[:, block, block] = 0
                weights[:, suffix, visual[0] : visual[0] + len(visual) // 2] = 0
            elif index < shallow:
                weights[:, suffix, block] = 0
            heads_out = (weights @ v[0]).transpose(0, 1).reshape(length, -1)
            x = x + attention.o_proj(heads_out)[None]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if step or index <= shallow or index == len(text_model.layers) - 1:
                continue
            present = [i for i in visual if i not in absent]
            o = heads_out[-1]
            c = {i: torch.cat([weights[h, -1, i] * v[0, h, i] for h in range(heads)]) for i in present}
            cosine = [torch.cosine_similarity(o - c[i], o, dim=0).item() for i in present]
            if chosen is None:
                if any(value < layer_threshold for value in cosine):
                    chosen = [i for i in present if c[i].norm() > tokens_threshold]
                    absent = [i for i in visual if i not in chosen]
                    happened.append(("keep", index + 1, [i - visual[0] for i in chosen]))
            elif present:
                exits += all(value >= exit_threshold for value in cosine)
                if exits == 2:
                    absent = visual
                    happened.append(("withdraw", index + 1))
        logits = model.lm_head(text_model.norm(x))[0, -1]
        found.append(logits)
        embeddings = torch.cat([embeddings, text_model.embed_tokens(logits.argmax())[None]])
    return torch.stack(found), happened


def rotated(x, cos, sin):
    """Rotary embedding of [1, H, S, E]: pairs (j, j + E/2) turned by the position's angle."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def embedded(model, batch):
    """The prompt's embeddings [S, D] with the image's features in their places."""
    embeddings = model.model.language_model.embed_tokens(batch["input_ids"][0])
    features = model.model.get_image_features(batch["pixel_values"]).pooler_output
    embeddings[batch["input_ids"][0] == IMAGE_ID] = torch.cat(list(features)).to(embeddings.dtype)
    return embeddings


CASES = [
    ("7b", {}),
    ("13b", {}),
    ("7b", {"shallow_mid_layer": 3, "exit_threshold": -1.0}),
    ("7b", {"shallow_mid_layer": 0}),
    ("13b", {"shallow_mid_layer": 2, "exit_threshold": 0.999}),
]


@torch.no_grad()
def outcome(layer0, change, seed):
    """The published rule and the runtime on every sample of ROWS; compares logits and decisions."""
    model = llava(seed=seed, dtype=torch.float64)
    rule = {**RULE, **change}
    seen = []
    for row in ROWS:
        batch = batch_of([row], seed=seed)
        limits = {key: rule[key] for key in ("layer_threshold", "tokens_threshold", "exit_threshold")}
        expected, happened = published(
            model, batch["input_ids"][0], embedded(model, batch), 4, layer0=layer0,
            shallow=rule["shallow_mid_layer"], **limits,
        )  # fmt: skip
        schedule = VisiPruner(**rule, layer0=layer0).schedule()
        _, actual = parity.generated(model, batch, schedule)
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-9)
        with pruned(model, schedule) as running:
            model(**batch)
        [sample] = running.trace.samples
        keep, withdraw = sample.actions
        said = [("keep", keep.layer, keep.kept)] if keep.layer is not None else []
        said += [("withdraw", withdraw.layer)] if withdraw.layer is not None else []
        assert said == happened
        seen.append(happened)
    return seen


@pytest.mark.parametrize("case", range(len(CASES)))
def test_visipruner_is_the_published_rule(case):
    layer0, change = CASES[case]
    for seed in (0, 1):
        outcome(layer0, change, seed)


def test_the_cases_above_filter_and_exit():
    """Else they would compare plain models with plain models."""
    kinds = [tuple(one[0] for one in happened) for happened in outcome("7b", {}, 0)]
    assert ("keep", "withdraw") in kinds
    kept = {len(one[2]) for happened in outcome("7b", {}, 0) for one in happened if one[0] == "keep"}
    assert kept - {0, 9}


def test_muting_ends_with_the_prompt():
    """The published code mutes prompts only; a schedule that mutes answers too says something else."""
    model, batch = llava(dtype=torch.float64), batch_of(["t3 i t5"])
    prompts = VisiPruner(shallow_mid_layer=3).schedule()
    actions = [
        {**action, "during": "all"} if "during" in action else action
        for action in prompts.to_dict()["actions"]
    ]
    _, short = parity.generated(model, batch, prompts, 2)
    _, long = parity.generated(model, batch, Schedule.from_dict(actions), 2)
    torch.testing.assert_close(short[:, 0], long[:, 0], rtol=0, atol=0)
    assert (short[:, 1] - long[:, 1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ from the options


def test_published_defaults():
    """One default in one place: the recipe's fields are those of the method."""
    _, schedule = schedule_of(ScheduleSection(method="visipruner"))
    assert schedule == VisiPruner().schedule()
    assert schedule.to_dict()["actions"] == [
        {"at": 0, "until": 1, "action": "mute", "sink": "first", "during": "prefill"},
        {"at": 0, "until": 1, "action": "mute", "sink": "zero", "readers": "visual", "during": "prefill"},
        {"at": 1, "until": 6, "action": "mute", "sink": "zero", "during": "prefill"},
        {
            "at": "auto",
            "action": "keep",
            "after": 6,
            "when": {"cosine_below": 0.995},
            "select": {"score": "contribution", "above": 0.2},
        },
        {"at": "auto", "action": "withdraw", "when": {"cosine_above": 0.999, "layers": 2}},
    ]
    assert Schedule.from_dict(schedule.to_dict()) == schedule


def test_options_name_schedules(tmp_path):
    file = tmp_path / "mine.schedule.yaml"
    file.write_text(Schedule.withdraw_at(4).to_yaml())
    given = {
        "schedule": [file], "layer": 2, "layers": "3, 5", "method": "visipruner", "layer0": "13b", "exit_layers": 3
    }  # fmt: skip
    assert dict(schedules_of(given, Recipe())) == {
        "mine": Schedule.withdraw_at(4),
        "K=2": Schedule.withdraw_at(2),
        "K=3": Schedule.withdraw_at(3),
        "K=5": Schedule.withdraw_at(5),
        "visipruner": VisiPruner(layer0="13b", exit_layers=3).schedule(),
    }
    assert [name for name, _ in schedules_of({"method": "vtw", "layer": 2}, Recipe())] == ["K=2"]
    assert schedules_of({}, Recipe()) == []


def test_options_override_the_recipe():
    recipe = Recipe(schedule=ScheduleSection(method="visipruner", shallow_mid_layer=2))
    assert schedules_of({}, recipe)[0][1] == VisiPruner(shallow_mid_layer=2).schedule()
    mixed = VisiPruner(shallow_mid_layer=2, tokens_threshold=0.5).schedule()
    assert schedules_of({"tokens_threshold": 0.5}, recipe)[0][1] == mixed
    assert schedules_of({"tokens_threshold": 0.5, "method": "visipruner"}, recipe)[0][1] == mixed
    assert [name for name, _ in schedules_of({"layer": 4}, recipe)] == ["K=4"]
    assert schedules_of({}, Recipe(schedule=ScheduleSection(layer0="13b"))) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": "4,x"}, "--layers: 'x' is not a layer number"),
        ({"method": "vtw"}, "--method vtw needs a layer"),
        ({"layer": 3, "tokens_threshold": 0.1}, "--tokens-threshold is a parameter of VisiPruner"),
        ({"method": "fastest"}, "--method: input should be 'vtw', 'visipruner'"),
        ({"method": "visipruner", "layer_threshold": 1.5}, "--layer-threshold: input should be less than"),
    ],
)
def test_wrong_options_are_one_clear_line(given, message):
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        schedules_of(given, Recipe())


def test_a_recipe_names_one_schedule():
    for wrong in ({"file": "a.yaml", "layer": 3}, {"layer": 3, "method": "visipruner"}, {"method": "vtw"}):
        with pytest.raises(ValidationError):
            ScheduleSection(**wrong)
    assert schedule_of(ScheduleSection(layer=3, method="vtw")) == ("K=3", Schedule.withdraw_at(3))


def test_trace_tells_what_the_runtime_did(tiny_dir, data, tmp_path):
    schedule = VisiPruner(
        shallow_mid_layer=1, layer_threshold=0.99, tokens_threshold=0.5, exit_threshold=-1.0
    ).schedule()
    still = Schedule.from_dict([{"at": 1, "until": 4, "action": "freeze"}, {"at": 3, "action": "withdraw"}])
    named = [
        ("visipruner", schedule),
        ("K=2", Schedule.withdraw_at(2)),
        ("never", Schedule.withdraw_at(6)),
        ("frozen", still),
    ]
    options = EvalSection(limit=2, max_new_tokens=2, timing=False, bootstrap=0, batch_size=3)
    specs = [DataSpec(source=str(data))]
    evaluate(ModelSection(name=str(tiny_dir)), named, specs, options, trace=tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    mix = load_data(specs, limit=2, seed=0)
    assert [(line["id"], line["schedule"]) for line in lines] == [
        (sample.id, name) for sample in mix.samples for name, _ in named
    ]
    loaded = load(str(tiny_dir))
    shape = TextShape.from_config(loaded.model.config)
    fired = set()
    for sample, line, fixed, never, frozen in zip(mix.samples, *(lines[i::4] for i in range(4)), strict=True):
        batch = encode(loaded, sample).inputs
        _, decided = slow_schedule.logits(loaded.model, batch, schedule.to_dict()["actions"])
        keep, leave = line["actions"]
        assert (keep["action"], leave["action"]) == ("keep", "withdraw")
        assert [keep["layer"], leave["layer"]] == [starts[0] for starts in decided.starts]
        assert keep["kept"] == decided.kept[0][0]
        fired.add(keep["layer"] is not None)
        text = batch["input_ids"].shape[1] - 9
        assert (line["visual_tokens"], line["text_tokens"]) == (9, text)
        present = [int(p[0].sum()) for p in decided.present]
        assert [text + n for n in line["visual_per_layer"]] == present
        assert line["flops"] == prefill_cost(shape, present)
        assert line["kv_bytes"] == kv_bytes(shape, present, 4)
        assert fixed["actions"] == [{"action": "withdraw", "layer": 2}]
        assert fixed["flops"] < fixed["full_flops"] == never["flops"] == never["full_flops"]
        assert fixed["kv_bytes"] < fixed["full_kv_bytes"] == never["kv_bytes"]
        assert never["actions"] == [{"action": "withdraw", "layer": None}]
        tokens = [text + 9] * 3 + [text] * 3
        assert frozen["flops"] == prefill_cost(shape, tokens, frozen_per_layer=[0, 9, 9, 0, 0, 0])
        assert frozen["kv_bytes"] == kv_bytes(shape, tokens, 4)
    assert True in fired
