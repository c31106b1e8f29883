"""Every row of the family table, proved on its tiny model; a new row and its tiny model need no test code here."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests import parity, reference
from tests.test_models_streaming import check_equal
from tests.tiny import IMAGE_ID, LAYERS, TINY, VARIANTS, VIDEO_ID
from tests.wide import Narrow
from vtwcli.docs import page
from vtwcli.errors import NotFoundError
from vtwcli.export.onnx.graphs import VISION
from vtwcli.models.families import (
    FAMILIES,
    OTHERS,
    family_of,
    markdown,
    placeholder_ids,
    refusal,
    table,
)
from vtwcli.models.family_table import ENCODER, INDEXED, SEQUENTIAL
from vtwcli.runtime import PruningError, pruned
from vtwcli.runtime.contract import arguments
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.sweep import SweepItem, sweep

MODELS = TINY | VARIANTS
REFUSED = [name for name, row in FAMILIES.items() if row.no_withdraw]
WORKING = [name for name in MODELS if name not in REFUSED]

IMAGES = ["t3 i t5", "i t2 i t4", "t6"]
FRAMES = ["t2 v t3 v t2", "v t4"]
VIDEOS = [name for name in WORKING if MODELS[name].video]
LAYOUTS = [*((name, IMAGES) for name in WORKING), *((name, FRAMES) for name in VIDEOS)]


def named(cases: list[tuple[str, list[str]]]) -> list:
    return [
        pytest.param(name, rows, id=f"{name}-{'video' if rows is FRAMES else 'image'}")
        for name, rows in cases
    ]


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64):
    """The tiny model of a name in ``MODELS``, built once."""
    return MODELS[name].build(dtype=dtype)


def inputs_of(name: str, rows: list[str], side: str = "left", dtype: torch.dtype = torch.float64) -> dict:
    return MODELS[name].batch(rows, side=side, dtype=dtype)


def inputs_ids(name: str) -> list[int]:
    """All token ids of a batch of videos, or of images where the family has no video."""
    return inputs_of(name, FRAMES if MODELS[name].video else IMAGES)["input_ids"].flatten().tolist()


@torch.no_grad()
def stock(model, batch: dict, **kwargs) -> torch.Tensor:
    return model(**batch, use_cache=False, **kwargs).logits


def test_each_row_has_a_tiny_model_and_each_tiny_model_a_row():
    assert {name for name, row in FAMILIES.items() if not row.no_withdraw} <= set(TINY) <= set(FAMILIES)
    for name, tiny in TINY.items():
        assert tiny.video == FAMILIES[name].video, name


def test_each_type_of_the_library_has_a_row_or_a_reason():
    """What fails here is new in a release of transformers: give it a row, or say in ``OTHERS`` why it has none."""
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(FAMILIES) - set(OTHERS) == set()
    assert set(FAMILIES) & set(OTHERS) == set()
    for name, architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        assert name in OTHERS or FAMILIES[name].architecture == architecture


@pytest.mark.parametrize(
    ("name", "reason"), [*((name, FAMILIES[name].no_withdraw) for name in REFUSED), *OTHERS.items()]
)
def test_a_reason_is_what_the_config_says(name, reason):
    if name not in CONFIG_MAPPING:
        pytest.skip("another release of transformers has it")
    config = AutoConfig.for_model(name)
    found = refusal(config)
    silent = ("minimax_m3_vl", "lfm2_vl")  # a config of which nothing is said has layers of one kind only
    if reason in (SEQUENTIAL, ENCODER, INDEXED) and name not in silent:
        assert found == reason
    elif found:
        assert found == reason or found.startswith("removal is not proved for its layers of the kind")
    if name in REFUSED:
        with pytest.raises(PruningError, match=reason), pruned(SimpleNamespace(config=config), 3):
            pass


@pytest.mark.parametrize("name", WORKING)
def test_a_row_tells_where_things_are(name):
    model = model_of(name)
    row = family_of(model.config)
    assert type(model).__name__ == row.architecture
    text_model = model.get_submodule(row.text_model)
    assert len(text_model.layers) == LAYERS
    for part in ("embed_tokens", "norm", "rotary_emb"):
        assert isinstance(getattr(text_model, part), torch.nn.Module)
    assert model.get_submodule(row.head) is model.get_output_embeddings()
    assert set(placeholder_ids(row, model.config)) == {IMAGE_ID} | ({VIDEO_ID} & set(inputs_ids(name)))
    homes = (row.text_model, row.head, *row.vision, *row.beside)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert [
        n for n in names if not n.startswith(tuple(f"{home}." for home in homes)) and n not in homes
    ] == []
    for home in homes:
        owner, _, attribute = home.rpartition(".")
        assert hasattr(model.get_submodule(owner), attribute), home


def of_rows(value, keep: torch.Tensor):
    """What of a layer's argument belongs to some rows."""
    if isinstance(value, tuple):
        return tuple(of_rows(part, keep) for part in value)
    return value[:, keep] if isinstance(value, torch.Tensor) and value.ndim in (2, 3) else value


@torch.no_grad()
def by_hand(model, batch: dict, visual: torch.Tensor) -> list[torch.Tensor]:
    """Last-row logits for K = 0..L-1 of one unpadded row: the rows of visual tokens are cut out of what the stock
    model hands layer K and all later layers, which then run by themselves."""
    row = family_of(model.config)
    text_model = model.get_submodule(row.text_model)
    entries, handed = [], []

    def record(module, args, kwargs):
        given = arguments(module, args, kwargs)
        entries.append(given.pop("hidden_states"))
        handed.append({k: v for k, v in given.items() if k != "past_key_values"})

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in text_model.layers]
    stock(model, batch)
    for handle in handles:
        handle.remove()
    keep = (~visual[0]).nonzero()[:, 0]
    results = []
    for k in range(len(entries)):
        hidden = entries[k][:, keep]
        shared = handed[-1].get("shared_kv_states")  # what the stock model's layers left there
        lent = {kind: tuple(x[:, :, keep] for x in two) for kind, two in (shared or {}).items()}
        for layer, kwargs in list(zip(text_model.layers, handed, strict=True))[k:]:
            given, mask = (
                {name: of_rows(value, keep) for name, value in kwargs.items() if name != "position_ids"},
                kwargs["attention_mask"],
            )
            given["position_ids"] = None
            if shared is not None:
                given["shared_kv_states"] = lent
            given["attention_mask"] = None if mask is None else mask[:, :, keep][:, :, :, keep]
            hidden = layer(hidden, **given)
        logits = model.get_submodule(row.head)(text_model.norm(hidden[:, -1]))
        said = model.config.get_text_config()
        logits *= getattr(said, "output_multiplier", 1) / getattr(said, "logits_scaling", 1)
        cap = getattr(said, "final_logit_softcapping", None)
        results.append(torch.tanh(logits / cap) * cap if cap else logits)
    return results


@pytest.mark.parametrize("name", WORKING)
def test_the_reference_is_the_stock_model_at_the_end_and_removal_by_hand_before(name):
    model = model_of(name)
    for side in ("left", "right"):
        batch = inputs_of(name, IMAGES, side)
        visual = reference.visual_mask(model, batch["input_ids"])
        real = batch["attention_mask"].bool()
        same = reference.logits(model, batch, reference.withdrawal(model, visual, LAYERS))
        parity.same(model, same[real], stock(model, batch)[real])
    batch = inputs_of(name, ["t3 i t2 i t5"])
    visual = reference.visual_mask(model, batch["input_ids"])
    full = stock(model, batch)[:, -1]
    for k, expected in enumerate(by_hand(model, batch, visual)):
        actual = reference.logits(model, batch, reference.withdrawal(model, visual, k))[:, -1]
        parity.same(model, actual, expected)
        assert (expected - full).abs().max() > 1e-3, "withdrawal changes nothing, so nothing was tested"


@pytest.mark.parametrize("name", WORKING)
def test_a_float64_text_model_computes_in_float64_throughout(name):
    """Else the comparisons here would hold on some CPUs only, see ``tests.wide``."""
    model, narrow = model_of(name), Narrow()
    text_model = model.get_submodule(family_of(model.config).text_model)
    handles = [
        text_model.register_forward_pre_hook(lambda *_: narrow.__enter__() and None),
        text_model.register_forward_hook(lambda *_: narrow.__exit__(None, None, None)),
    ]
    stock(model, inputs_of(name, IMAGES))
    for handle in handles:
        handle.remove()
    assert not narrow.found


def divergence(pruned: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """KL(P_pruned || P_full) over the last axis of logits, nats."""
    pruned, full = pruned.double().log_softmax(-1), full.double().log_softmax(-1)
    return (pruned.exp() * (pruned - full)).sum(-1)


@pytest.mark.parametrize(("name", "rows"), named(LAYOUTS))
def test_the_sweep_is_the_slow_search(name, rows):
    model = model_of(name)
    batch = inputs_of(name, rows)
    visual = reference.visual_mask(model, batch["input_ids"])
    width = visual.shape[1]
    compared = torch.tensor([[width - 2, width - 1]]).expand(len(rows), -1)
    source = Resident(model, family_of(model.config))
    withdrawals = [Intervention("withdraw", k) for k in range(LAYERS)]
    others = [Intervention("mute", 1, 3), Intervention("mute", 2), Intervention("freeze", 1, 4)]
    item = SweepItem(batch, compared)
    swept = sweep(source, [item], [*withdrawals, *others])
    searched, _ = reference.searched(model, batch, others, compared)

    full = stock(model, batch)[:, -2:]
    expected = torch.stack(
        [
            divergence(reference.logits(model, batch, reference.withdrawal(model, visual, k))[:, -2:], full)
            for k in range(LAYERS)
        ]
    )
    for b, result in enumerate(swept):
        parity.same(model, result.kl[:LAYERS], expected[:, b])
        parity.same(model, result.kl[LAYERS:], searched[b])
        assert result.visual == int(visual[b].sum())
        if result.visual:
            assert (result.kl > 1e-4).all(), "an intervention that changes nothing tests nothing"


@pytest.mark.parametrize(("name", "rows"), named(LAYOUTS))
def test_the_runtime_is_the_slow_reference(name, rows):
    model, tiny = model_of(name), MODELS[name]
    first = family_of(model.config).first_withdrawal
    for side in ("left", "right"):
        parity.forward(model, tiny.batch, rows, side)
    parity.generation(model, tiny.batch, rows, [first, 3, LAYERS], tiny.own_positions)


@pytest.mark.parametrize("name", WORKING)
def test_the_other_actions(name):
    """``mute`` and ``freeze`` against the slow search; ``keep`` against columns hidden in the reference."""
    model = model_of(name)
    batch = inputs_of(name, IMAGES)
    visual = reference.visual_mask(model, batch["input_ids"])
    rows, width = visual.shape
    full = stock(model, batch)[:, -1]
    last = torch.full((rows, 1), width - 1)
    for kind in ("mute", "freeze"):
        searched, _ = reference.searched(model, batch, [Intervention(kind, 2, 4)], last)
        with pruned(model, {"format_version": 1, "actions": [{"at": 2, "until": 4, "action": kind}]}):
            actual = divergence(stock(model, batch)[:, -1], full)
        parity.same(model, actual, searched[:, 0, 0])

    select = {"score": "uniform", "ratio": 0.5}
    actions = [{"at": 3, "action": "keep", "select": select}, {"at": 5, "action": "withdraw"}]
    hidden = reference.withdrawal(model, visual, 5)
    for row in range(rows):
        places = visual[row].nonzero()[:, 0].tolist()
        some = -(-len(places) // 2)
        kept = {places[-(-len(places) * i // some)] for i in range(some)}  # as evenly as can be
        hidden[3:, row, [place for place in places if place not in kept]] = True
    with pruned(model, {"format_version": 1, "actions": actions}):
        actual = stock(model, batch)[:, -1]
    parity.same(model, actual, reference.logits(model, batch, hidden)[:, -1])


@pytest.mark.parametrize("name", WORKING)
def test_a_saved_checkpoint_is_streamed(name, tmp_path):
    MODELS[name].build().save_pretrained(tmp_path)
    check_equal(tmp_path, batch=MODELS[name].batch)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in TINY])
def test_a_family_without_withdrawal_is_refused_with_its_reason(name):
    model = MODELS[name].build()
    batch = MODELS[name].batch(["t4"])
    before = stock(model, batch)
    with pytest.raises(PruningError, match=FAMILIES[name].no_withdraw), pruned(model, 3):
        pass
    assert torch.equal(stock(model, batch), before)
    assert FAMILIES[name].no_onnx


def test_an_unknown_family_is_an_error_that_lists_the_known():
    with pytest.raises(NotFoundError, match="'bert' is not a supported vision-language family") as caught:
        family_of(SimpleNamespace(model_type="bert"))
    assert "llava, llava_next" in caught.value.hint


def test_a_row_follows_its_config():
    config = model_of("qwen3_vl").config
    assert family_of(config).first_withdrawal == 2
    assert family_of(model_of("qwen3_vl_moe").config).first_withdrawal == 1
    with pytest.raises(Exception, match="2"), pruned(model_of("qwen3_vl"), 1):
        pass
    llava = model_of("llava").config
    assert family_of(llava) is FAMILIES["llava"]
    text = SimpleNamespace(layer_types=["full_attention", "mamba"])
    hybrid = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    assert family_of(hybrid).no_withdraw == FAMILIES["lfm2_vl"].no_withdraw
    text.layer_types = ["full_attention", "sliding_attention"]
    assert family_of(hybrid).no_withdraw is None
    text.layer_types = ["full_attention", "indexed_attention", "dreamt_attention"]
    assert family_of(hybrid).no_withdraw == INDEXED
    text.layer_types = ["full_attention", "dreamt_attention"]
    assert (
        family_of(hybrid).no_withdraw == "removal is not proved for its layers of the kind dreamt_attention"
    )
    text.layer_types, text.cross_attention_layers = None, [3]
    assert family_of(hybrid).no_withdraw == FAMILIES["mllama"].no_withdraw
    hybrid.is_encoder_decoder = True
    assert family_of(hybrid).no_withdraw == FAMILIES["florence2"].no_withdraw


def test_the_table():
    rows = {row["model_type"]: row for row in table()}
    assert list(rows) == list(FAMILIES)
    assert rows["llava"] == {
        "family": "LLaVA-1.5",
        "model_type": "llava",
        "example": "llava-hf/llava-1.5-7b-hf",
        "inputs": "image",
        "withdraw": "yes",
        "sweep": "yes",
        "analyze": "yes",
        "tower": "yes",
        "onnx": "yes",
        "notes": "Also LLaVA-shaped models with another tower, such as Pixtral-12B.",
    }
    assert rows["qwen2_vl"]["inputs"] == "image, video"
    refused = rows["mllama"]
    assert {refused[name] for name in ("withdraw", "sweep", "analyze", "tower", "onnx")} == {"no"}
    assert refused["notes"].startswith("Not possible: its text reads images by cross-attention")
    lines = markdown().splitlines()
    assert len(lines) == 2 + len(FAMILIES)
    assert lines[0] == "| Family | Example | Inputs | Withdraw | Sweep | Analyze | Tower | ONNX | Notes |"
    assert lines[2].startswith(
        "| LLaVA-1.5 | `llava-hf/llava-1.5-7b-hf` | image | yes | yes | yes | yes | yes |"
    )


def test_the_table_promises_the_onnx_exports_that_exist():
    assert {name for name, row in FAMILIES.items() if row.no_onnx is None} == set(VISION)


def test_the_page_has_the_table_of_today():
    assert markdown() in page("families"), "paste vtwcli.models.families.markdown() into it"
