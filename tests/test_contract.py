"""What the runtime takes for granted about a model, broken point by point: an error each time, never other tokens."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
import transformers

from tests.tiny import llava, llava_batch
from vtwcli.runtime import PruningError, pruned

ROWS = ["t3 i t5", "t2 i t1 i t4"]
SCHEDULES = {
    "withdraw": [{"at": 2, "action": "withdraw"}],
    "first": [{"at": 0, "action": "withdraw"}],
    "keep": [{"at": 3, "action": "keep", "select": {"score": "attention", "ratio": 0.5}}],
    "mute": [{"at": 1, "until": 4, "action": "mute", "sink": "first"}],
    "freeze": [{"at": 1, "until": 4, "action": "freeze"}],
}
KNOWN = ("cache", "past_key_values", "past_key_value")


def schedule(name: str) -> dict:
    return {"format_version": 1, "actions": SCHEDULES[name]}


def cache_name(module) -> str:
    return next(name for name in KNOWN if name in inspect.signature(module.forward).parameters)


def text_model(model):
    return model.model.language_model


def wrapped(module, around) -> None:
    """Give a module the forward ``around(original, **arguments)``, with the signature of the original."""
    original = module.forward
    signature = inspect.signature(original)

    def forward(*args, **kwargs):
        bound = signature.bind_partial(*args, **kwargs).arguments
        more = bound.pop("kwargs", {})
        return around(original, **bound, **more)

    forward.__signature__ = signature
    module.forward = forward


class Aside(torch.nn.Module):
    """Calls another module's ``forward`` itself, so that its hooks do not fire."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


# ------------------------------------------------------------------ breaks, each of a fresh model


def renamed(module, old: str, new: str) -> None:
    original = module.forward
    parameters = [
        parameter.replace(name=new) if parameter.name == old else parameter
        for parameter in inspect.signature(original).parameters.values()
    ]

    def forward(*args, **kwargs):
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return original(*args, **kwargs)

    forward.__signature__ = inspect.Signature(parameters)
    module.forward = forward


def layers_name_their_cache_otherwise(model) -> None:
    for layer in text_model(model).layers:
        renamed(layer, cache_name(layer), "kv_store")


def layers_name_their_mask_otherwise(model) -> None:
    for layer in text_model(model).layers:
        renamed(layer, "attention_mask", "bias")


def a_layer_ignores_its_cache(model) -> None:
    layer = text_model(model).layers[3]
    name = cache_name(layer)
    wrapped(layer, lambda original, **given: original(**{**given, name: None}))


def an_attention_ignores_its_cache(model) -> None:
    attention = text_model(model).layers[3].self_attn
    name = cache_name(attention)
    wrapped(attention, lambda original, **given: original(**{**given, name: None}))


def a_layer_fills_its_cache_twice(model) -> None:
    layer = text_model(model).layers[3]

    def twice(original, **given):
        original(**given)
        return original(**given)

    wrapped(layer, twice)


def a_layer_drops_a_row(model) -> None:
    layer = text_model(model).layers[3]
    wrapped(layer, lambda original, **given: original(**given)[:, 1:])


def a_layer_returns_rows_first(model) -> None:
    layer = text_model(model).layers[3]
    wrapped(layer, lambda original, **given: original(**given).transpose(0, 1).contiguous())


def the_last_layer_drops_a_row(model) -> None:
    layer = text_model(model).layers[-1]
    wrapped(layer, lambda original, **given: original(**given)[:, 1:])


BEFORE = [
    layers_name_their_cache_otherwise,
    layers_name_their_mask_otherwise,
    a_layer_ignores_its_cache,
    an_attention_ignores_its_cache,
    a_layer_fills_its_cache_twice,
    a_layer_drops_a_row,
    a_layer_returns_rows_first,
    the_last_layer_drops_a_row,
]


def a_layer_is_called_without_hooks(model) -> None:
    layers = text_model(model).layers
    layers[3] = Aside(layers[3])


def all_layers_are_called_without_hooks(model) -> None:
    layers = text_model(model).layers
    for index in range(len(layers)):
        layers[index] = Aside(layers[index])


def the_last_layer_is_called_without_hooks(model) -> None:
    layers = text_model(model).layers
    layers[-1] = Aside(layers[-1])


def a_layer_is_left_out(model) -> None:
    text = text_model(model)
    text.layers = torch.nn.ModuleList([*text.layers[:3], *text.layers[4:]])


def the_last_layer_is_left_out(model) -> None:
    text = text_model(model)
    text.layers = torch.nn.ModuleList(text.layers[:-1])


def a_layer_runs_twice(model) -> None:
    text = text_model(model)
    text.layers = torch.nn.ModuleList([*text.layers[:4], *text.layers[3:]])


def layers_change_places(model) -> None:
    layers = text_model(model).layers
    layers[3], layers[4] = layers[4], layers[3]


def the_text_model_is_called_without_hooks(model) -> None:
    model.model.language_model = Aside(model.model.language_model)


def the_base_model_is_called_without_hooks(model) -> None:
    model.model = Aside(model.model)


AFTER = [
    a_layer_is_called_without_hooks,
    all_layers_are_called_without_hooks,
    the_last_layer_is_called_without_hooks,
    a_layer_is_left_out,
    the_last_layer_is_left_out,
    a_layer_runs_twice,
    layers_change_places,
    the_text_model_is_called_without_hooks,
    the_base_model_is_called_without_hooks,
]


def generate(model, batch) -> list:
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("change", BEFORE, ids=lambda change: change.__name__)
def test_layers_built_otherwise_are_refused(change, name):
    model, batch = llava(), llava_batch(ROWS)
    change(model)
    with pytest.raises(PruningError), pruned(model, schedule(name)):
        generate(model, batch)


def test_the_message_names_the_release_and_what_to_do():
    model = llava()
    layers_name_their_cache_otherwise(model)
    with pytest.raises(
        PruningError, match=rf"transformers is {transformers.__version__}: take a release it was tested"
    ):
        pruned(model, 2).__enter__()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("change", AFTER, ids=lambda change: change.__name__)
def test_hooks_that_do_not_fire_are_noticed(change, name):
    model, batch = llava(), llava_batch(ROWS)
    with pruned(model, schedule(name)):
        change(model)
        # a layer that was passed by may find rows and masks of different lengths before anything notices
        with pytest.raises((PruningError, RuntimeError)):
            generate(model, batch)


@pytest.mark.parametrize("name", ["keep", "mute"])
def test_an_attention_that_is_called_without_hooks_is_noticed(name):
    model, batch = llava(), llava_batch(ROWS)
    with pruned(model, schedule(name)):
        for layer in text_model(model).layers:
            layer.self_attn = Aside(layer.self_attn)
        with pytest.raises(PruningError, match="self_attn"):
            generate(model, batch)


# ------------------------------------------------------------------ what a model hands its layers


def blocked(mask: torch.Tensor) -> torch.Tensor:
    """An additive mask."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


MASKS = {
    "transposed": lambda mask: mask.transpose(2, 3).contiguous(),
    "too long": lambda mask: torch.nn.functional.pad(mask, (0, 3)),
    "too short": lambda mask: mask[..., :-1],
    "of the last row": lambda mask: mask[:, :, -1:],
    "of numbers": lambda mask: mask.long(),
    "inverted": lambda mask: ~mask,
    "multiplied": lambda mask: mask.float(),
    "of three axes": lambda mask: mask[:, 0],
    "in a dict": lambda mask: {"full_attention": mask},
    "of another batch": lambda mask: mask[:1].expand(3, -1, -1, -1),
    "additive, transposed": lambda mask: blocked(mask.transpose(2, 3)),
}


def understood(model, argument: str, handed: dict) -> None:
    """Let the layers take for ``handed["known"]`` what they are handed in its stead, so that they all run."""
    for layer in text_model(model).layers:

        def run(original, **given):
            if given.get(argument) is handed.get("other"):
                given[argument] = handed["known"]
            return original(**given)

        wrapped(layer, run)


@pytest.mark.parametrize("name", ["withdraw", "first", "keep", "mute"])
@pytest.mark.parametrize("form", MASKS)
def test_masks_of_another_form_are_refused(monkeypatch, form, name):
    model, batch, handed = llava(), llava_batch(ROWS), {}
    home = importlib.import_module(type(text_model(model)).__module__)
    made = home.create_causal_mask

    def make(*args, **more):
        handed["known"] = made(*args, **more)
        handed["other"] = MASKS[form](handed["known"])
        return handed["other"]

    plain = generate(model, batch)
    monkeypatch.setattr(home, "create_causal_mask", make)
    understood(model, "attention_mask", handed)
    assert generate(model, batch) == plain
    with pytest.raises(PruningError), pruned(model, schedule(name)):
        generate(model, batch)


POSITIONS = {
    "columns first": lambda cos, sin: (cos.transpose(1, 2), sin.transpose(1, 2)),
    "without a batch": lambda cos, sin: (cos[0], sin[0]),
    "rows first": lambda cos, sin: (cos.transpose(0, 1), sin.transpose(0, 1)),
    "heads before rows": lambda cos, sin: (cos[:, :, None], sin[:, :, None]),
    "too short": lambda cos, sin: (cos[:, 1:], sin[:, 1:]),
    "by name": lambda cos, sin: {"cos": cos, "sin": sin},
    "none": lambda cos, sin: None,
}


@pytest.mark.parametrize("name", ["withdraw", "first", "keep"])
@pytest.mark.parametrize("form", POSITIONS)
def test_positions_of_another_form_are_refused(form, name):
    model, batch, handed = llava(), llava_batch(ROWS), {}
    plain = generate(model, batch)

    def make(original, **given):
        handed["known"] = original(**given)
        handed["other"] = POSITIONS[form](*handed["known"])
        return handed["other"]

    wrapped(text_model(model).rotary_emb, make)
    understood(model, "position_embeddings", handed)
    assert generate(model, batch) == plain
    with pytest.raises(PruningError), pruned(model, schedule(name)):
        generate(model, batch)


def test_arguments_with_a_row_for_each_token_are_refused():
    model, batch = llava(), llava_batch(ROWS)
    scale = torch.ones(batch["input_ids"].shape)[..., None]
    with pruned(model, 2), pytest.raises(PruningError, match="row_scale"):
        model(**batch, row_scale=(scale, scale))


def test_a_cache_by_another_name_is_refused():
    from transformers import DynamicCache

    model, batch = llava(), llava_batch(ROWS)
    with pruned(model, 2), pytest.raises(PruningError, match="kv_store"):
        model(**batch, use_cache=False, kv_store=DynamicCache())


def test_nothing_of_this_is_refused_in_a_model_as_it_is():
    model, batch = llava(), llava_batch(ROWS)
    for name in SCHEDULES:
        with pruned(model, schedule(name)):
            generate(model, batch)


# ------------------------------------------------------------------ other ways to run


def test_compiled_code_of_a_model_without_hooks_is_not_used():
    """torch.compile does not look at hooks by itself: what it compiled before a schedule would go on without it."""
    model, batch = llava(layers=2), llava_batch(ROWS)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        full = compiled(**batch).logits[:, -1]
        with pruned(model, 1):
            expected = model(**batch).logits[:, -1]
            torch.testing.assert_close(compiled(**batch).logits[:, -1], expected)
    assert (full - expected).abs().max() > 1e-3


def test_paged_attention_is_refused():
    """As ``generate_batch`` and servers with continuous batching use it."""
    model, batch = llava(), llava_batch(ROWS)
    text_model(model).config._attn_implementation = "paged|sdpa"
    with pruned(model, 2), pytest.raises(PruningError, match=r"paged\|sdpa is not supported"):
        generate(model, batch)
