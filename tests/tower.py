"""What the vision tower of a tiny model attends to, by hand: the reference for its scores. No code of the package.

The tower's attention runs on an implementation of its own that keeps every weight. Which visual tokens a patch is part
of is found by changing the patch in front of the projector and looking at which rows of the language model's input
change.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from tests.tiny import IMAGE_ID

NAME = "tests_tower"
_kept: list[tuple[Any, torch.Tensor]] = []
PREFIXED = {
    "llava",
    "vipllava",
    "llava_next",
    "llava_next_video",
    "video_llava",
    "internvl",
    "qianfan_ocr",
}  # with a class token


class Scores(NamedTuple):
    """Numbers of the visual tokens of one image.

    Attributes:
        cls: tower layer -> [heads, N], or empty.
        received: tower layer -> [N].
    """

    cls: dict[int, torch.Tensor]
    received: dict[int, torch.Tensor]


def _weights(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    _kept.append((module, weights))
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, _weights)


def layers_of(model: Any) -> list[Any]:
    """The layers of the tower for images."""
    for name, module in model.model.named_modules():
        if name.startswith(("language_model", "text_model", "video_tower", "audio_tower")):
            continue
        if isinstance(module, torch.nn.ModuleList) and any(
            hasattr(module[0], n) for n in ("self_attn", "attn", "attention")
        ):
            return list(module)
    raise AssertionError("no tower")


@contextmanager
def keeping(model: Any):
    """Inside, ``_kept`` gets the weights of the tower's attention."""
    configs = {
        id(m.config): m.config for layer in layers_of(model) for m in layer.modules() if hasattr(m, "config")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    _kept.clear()
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _kept.clear()


def rows_of(model: Any, batch: dict, change: Any = None) -> torch.Tensor:
    """What the language model gets for the visual tokens, [V, E]; ``change`` alters what leaves the tower's layers."""
    found: list[torch.Tensor] = []
    text = getattr(model.model, "language_model", None) or model.model.text_model
    handles = [
        text.register_forward_pre_hook(lambda m, a, k: found.append(k["inputs_embeds"]), with_kwargs=True)
    ]
    if change is not None:
        handles.append(layers_of(model)[-1].register_forward_hook(change, prepend=True))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0][batch["input_ids"] == IMAGE_ID]


@torch.no_grad()
def scores(model: Any, batch: dict, sizes: list[int]) -> Scores:
    """The numbers of all images of a batch, side by side; ``sizes`` are their numbers of tokens."""
    layers = layers_of(model)
    prefix = int(
        model.config.model_type in PREFIXED and "siglip" not in str(model.config.vision_config.model_type)
    )
    if "pixtral" in str(model.config.vision_config.model_type):
        prefix = 0
    with keeping(model):
        plain = rows_of(model, batch)
        weights = list(_kept)
    seen: list[torch.Tensor] = []
    rows_of(model, batch, lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    whole = seen[0]
    flat = whole.reshape(-1, whole.shape[-1])
    length = whole.shape[-2]
    patches = [i for i in range(len(flat)) if i % length >= prefix]
    owners: dict[int, list[int]] = {token: [] for token in range(len(plain))}
    for patch in patches:

        def change(module, args, out, patch=patch):
            hidden = (out[0] if isinstance(out, tuple) else out).clone(memory_format=torch.contiguous_format)
            hidden.view(-1, hidden.shape[-1])[patch] += torch.linspace(
                -1, 2, hidden.shape[-1], dtype=hidden.dtype
            )
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        moved = (rows_of(model, batch, change) - plain).abs().amax(1) > 1e-12
        for token in moved.nonzero()[:, 0].tolist():
            owners[token].append(patch)
    image_of = [image for image, size in enumerate(sizes) for _ in range(size)]
    own_rows = [0] * len(sizes)  # patches of each image
    image_of_patch = {p: image_of[token] for token, mine in owners.items() for p in mine}
    for image in image_of_patch.values():
        own_rows[image] += 1
    cls, received = {}, {}
    for index, layer in enumerate(layers):
        inside = {id(m) for m in layer.modules()}
        own = [w for m, w in weights if id(m) in inside]
        got = torch.cat([w.mean(1).sum(1).flatten() for w in own])
        if prefix or len(own[0]) > 1:  # an image or tile each
            got = got / own[0].shape[2]
        else:
            got = got / torch.tensor([own_rows[image_of_patch[p]] for p in patches], dtype=got.dtype)
        received[index] = mean_of(got[None], owners)[0]
        if prefix:
            row = torch.cat([w[:, :, 0].transpose(0, 1).flatten(1) for w in own], 1)
            cls[index] = mean_of(row, owners)
    return Scores(cls, received)


def mean_of(x: torch.Tensor, owners: dict[int, list[int]]) -> torch.Tensor:
    """Numbers [K, P] of patches as means over each token's; 0 for those that have none."""
    out = x.new_zeros(x.shape[0], len(owners))
    for token, patches in owners.items():
        if patches:
            out[:, token] = x[:, patches].mean(1)
    return out


def images_of(ids: torch.Tensor) -> list[list[int]]:
    """Numbers of visual tokens of each row's images, which text keeps apart."""
    found = []
    for row in (ids == IMAGE_ID).int().tolist():
        runs = "".join(map(str, row)).replace("0", " ").split()
        found.append([len(run) for run in runs])
    return found


def chosen(model: Any, batch: dict, select: dict) -> list[list[int]]:
    """The places of the tokens that ``tower_cls`` or ``tower_received`` keeps, for each sample."""
    images = images_of(batch["input_ids"])
    found, got = scores(model, batch, [size for row in images for size in row]), {}
    parameters, depth = select.get("parameters", {}), len(layers_of(model))
    if select["score"] == "tower_cls":
        first = parameters.get("first", -2) % depth
        value = sum(found.cls[layer].mean(0) for layer in range(first, depth - 1))
    else:
        value = found.received[depth - 2]
    start = 0
    for b, row in enumerate(images):
        places = (batch["input_ids"][b] == IMAGE_ID).nonzero()[:, 0].tolist()
        got[b], offset = [], 0
        for size in row:
            own = value[start : start + size].tolist()
            wanted = select["count"] if "count" in select else math.ceil(select["ratio"] * size)
            best = sorted(range(size), key=lambda i, own=own: -own[i])[:wanted]
            if parameters.get("per") == "row":
                raise NotImplementedError
            got[b] += [places[offset + i] for i in best]
            start, offset = start + size, offset + size
    return [sorted(got[b]) for b in range(len(images))]
