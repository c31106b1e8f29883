"""What becomes a graph: the parts of a stock model with the names, types and shapes of inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vtwcli.errors import UsageError
from vtwcli.export.onnx.decoder import Decoder, Layers, MergedDecoder
from vtwcli.export.onnx.modules import Embedding, MaskedTower, PatchTower, TowerAndProjector
from vtwcli.models.families import Family
from vtwcli.schedule import words

FIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; a dimension given by name is dynamic."""

    name: str
    dtype: torch.dtype
    dims: Dims


@dataclass(frozen=True)
class Graph:
    """A module to be exported.

    Attributes:
        role: ``vision_encoder``, ``embed_tokens``, ``decoder``, ``decoder_lower``, ``decoder_upper`` or
            ``decoder_merged``; the name of the file.
        module: takes the inputs in order as ``*tensors``, returns a tuple of tensors in the order of ``outputs``.
        inputs: what goes in.
        outputs: what comes out.
        layers: the range of decoder layers inside.
        removal: the schedule's action that takes effect before these layers, in canonical form.
        taps: hidden states between layers, returned after ``outputs``; they name the borders for the parity check
            and are no outputs of the finished graph.
        scale: dynamic dimensions that are multiples of others, {"num_patches": ("num_features", 4)}.
    """

    role: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    layers: tuple[int, int] | None = None
    removal: Mapping[str, Any] | None = None
    taps: tuple[Port, ...] = ()
    scale: Mapping[str, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Vision:
    """How a family's vision becomes a graph.

    Attributes:
        wrapper: makes the module from the base model and its config.
        arrange: what the runtime does with the features (``vtwcli.ort``): ``rows``, ``anyres``, ``tiles`` or
            ``patches``.
    """

    wrapper: Callable[[Any, Any], nn.Module]
    arrange: str


VISION: dict[str, Vision] = {
    "llava": Vision(TowerAndProjector, "rows"),
    "llava_next": Vision(TowerAndProjector, "anyres"),
    "llava_onevision": Vision(TowerAndProjector, "anyres"),
    "idefics3": Vision(MaskedTower, "tiles"),
    "smolvlm": Vision(MaskedTower, "tiles"),
    "qwen2_vl": Vision(PatchTower, "patches"),
    "qwen2_5_vl": Vision(PatchTower, "patches"),
}
"""The families with an ONNX export."""


def all_graphs(
    model: Any,
    family: Family,
    removals: Sequence[Mapping[str, Any]],
    merged: bool,
    dtype: torch.dtype,
    frozen: Collection[int] = (),
) -> list[Graph]:
    """Every graph of an export.

    Args:
        model: the stock model or its skeleton.
        family: its row of the family table.
        removals: the actions of a schedule that remove visual tokens, in canonical form, layers rising and below L.
        merged: one decoder graph in place of several.
        dtype: of the weights.
        frozen: the layers in which visual tokens are there and not updated.

    Raises:
        UsageError: the family, or something in its text config, has no export, or ``merged`` cannot be had.
    """
    config = model.config
    if family.model_type not in VISION:
        raise UsageError(
            f"{family.title} has no ONNX export{': ' + family.no_onnx if family.no_onnx else ''}",
            f"families with one: {', '.join(sorted(VISION))}",
        )
    check_text(config.get_text_config())
    check_vision(family, config.vision_config)
    graphs = [embedding_graph(model, family, dtype), vision_graph(model, family, dtype)]
    depth = len(model.get_submodule(family.text_model).layers)
    inner = [removal for removal in removals if removal["at"] > 0]
    if merged and inner:
        if len(removals) > 1 or measured(inner[0]):
            raise UsageError(
                "one merged graph holds one removal whose tokens are known beforehand",
                "export without --merged",
            )
        return [*graphs, merged_graph(model, family, inner[0], dtype, frozen)]
    first = next((removal for removal in removals if removal["at"] == 0), None)
    starts = [0, *(removal["at"] for removal in inner), depth]
    before: list[Mapping[str, Any] | None] = [first, *inner]
    for i, removal in enumerate(before):
        role = _role(i, len(before), removal)
        score = measured(before[i + 1]) if i + 1 < len(before) else None
        layers = starts[i], starts[i + 1]
        graphs.append(decoder_graph(model, family, role, layers, removal, score, dtype, frozen))
    return graphs


def _role(index: int, count: int, removal: Mapping[str, Any] | None) -> str:
    if count == 1:
        return "decoder" if removal is None else "decoder_upper"
    if index in (0, count - 1):
        return "decoder_upper" if index else "decoder_lower"
    return f"decoder_middle_{index}"


def measured(removal: Mapping[str, Any] | None) -> str | None:
    """The kind of scores that a removal needs from the layer before it, or None."""
    score = removal.get("select", {}).get("score") if removal is not None else None
    return score if score is not None and words.row("score", score).needs == words.LAST_ROW else None


def check_text(config: Any) -> None:
    """Refuse text models whose layers or logits are more than the wrappers reproduce.

    Raises:
        UsageError: soft-capped or scaled logits, or layers other than attention.
    """
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UsageError(f"the text model has {name}, which has no ONNX export")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UsageError(f"the text model has layers of the kind {min(kinds)}, which have no ONNX export")


def check_vision(family: Family, config: Any) -> None:
    """Refuse vision towers that take images of any size where the wrapper gives them one size.

    Raises:
        UsageError: a LLaVA checkpoint with another tower than CLIP or SigLIP.
    """
    kind = getattr(config, "model_type", None)
    if VISION[family.model_type].wrapper is TowerAndProjector and kind not in FIXED_TOWERS:
        raise UsageError(
            f"{family.title} with a vision tower of the kind {kind} has no ONNX export",
            f"towers with one: {', '.join(FIXED_TOWERS)}",
        )


def max_length(config: Any) -> int:
    """The longest sequence for which the exported attention is the model's.

    The graphs attend to the whole past, so a sliding window that is in use bounds the length.
    """
    longest = int(config.max_position_embeddings)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if (
        window
        and (kinds is None or "sliding_attention" in kinds)
        and getattr(config, "use_sliding_window", True)
    ):
        return min(longest, int(window))
    return longest


def position_dims(family: Family, length: str) -> Dims:
    """Dimensions of ``position_ids``: Qwen's have three axes (time, row, column)."""
    plain: Dims = ("batch_size", length)
    return (3, *plain) if VISION[family.model_type].arrange == "patches" else plain


def embedding_graph(model: Any, family: Family, dtype: torch.dtype) -> Graph:
    """``input_ids`` to ``inputs_embeds``."""
    embed_tokens = model.get_submodule(family.text_model).embed_tokens
    dims: Dims = ("batch_size", "sequence_length")
    width = model.config.get_text_config().hidden_size
    return Graph(
        "embed_tokens",
        Embedding(embed_tokens),
        (Port("input_ids", torch.int64, dims),),
        (Port("inputs_embeds", dtype, (*dims, width)),),
    )


def vision_graph(model: Any, family: Family, dtype: torch.dtype) -> Graph:
    """Pixels to projected features."""
    row, config = VISION[family.model_type], model.config
    width, vision = config.get_text_config().hidden_size, config.vision_config
    module = row.wrapper(model.model, config)
    if row.arrange == "patches":
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        windowed = hasattr(model.model.visual, "window_size")
        inputs = [
            Port("pixel_values", dtype, ("num_patches", patch)),
            Port("patch_positions", torch.int64, ("num_patches", 2)),
            Port("segments", torch.int64, ("num_patches",)),
        ]
        if windowed:
            inputs += [
                Port("window_index", torch.int64, ("num_features",)),
                Port("windows", torch.int64, ("num_patches",)),
            ]
        return Graph(
            "vision_encoder",
            module,
            tuple(inputs),
            (Port("image_features", dtype, ("num_features", width)),),
            scale={"num_patches": ("num_features", vision.spatial_merge_size**2)},
        )
    side = vision.image_size
    inputs = [Port("pixel_values", dtype, ("num_images", 3, side, side))]
    outputs = [Port("image_features", dtype, ("num_images", "num_features", width))]
    if row.arrange == "tiles":
        patches = side // vision.patch_size
        inputs.append(Port("patch_attention_mask", torch.bool, ("num_images", patches, patches)))
    if row.arrange == "anyres":
        outputs.append(Port("image_newline", dtype, (width,)))
    return Graph("vision_encoder", module, tuple(inputs), tuple(outputs))


def decoder_graph(
    model: Any,
    family: Family,
    role: str,
    layers: tuple[int, int],
    removal: Mapping[str, Any] | None,
    score: str | None,
    dtype: torch.dtype,
    frozen: Collection[int] = (),
) -> Graph:
    """A range of layers; behind the model's last layer the norm and the head.

    Args:
        model: the stock model or its skeleton.
        family: its row of the family table.
        role: of the graph.
        layers: first layer, and first that is not inside any more.
        removal: what leaves before these layers.
        score: kind of the scores that come out of the last layer.
        dtype: of the weights.
        frozen: the layers in which visual tokens are not updated.
    """
    text_model = model.get_submodule(family.text_model)
    width = model.config.get_text_config().hidden_size
    (lo, hi), gathers = layers, removal is not None
    last = hi == len(text_model.layers)
    tapped = range(lo, hi if last else hi - 1)  # without a head the last border is the output itself
    inner = Layers(text_model, lo, hi, last, tapped, score, frozen)
    module = Decoder(inner, model.get_submodule(family.head) if last else None, gathers)
    length, prefix = ("kept_length", "kept_") if gathers else ("sequence_length", "")
    past = f"{prefix}past_length"
    full = f"{past} + {length}"
    stream = "hidden_states" if gathers else "inputs_embeds"
    inputs = [Port(stream, dtype, ("batch_size", "sequence_length", width))]
    if gathers:
        inputs.append(Port("keep_index", torch.int64, ("batch_size", length)))
    inputs += part_ports("", inner)
    if last:
        inputs.append(Port("logits_index", torch.int64, ("batch_size", "num_logits")))
    if score:
        inputs.append(Port("score_index", torch.int64, ("batch_size", 1)))
    inputs += [
        Port("attention_mask", torch.int64, ("batch_size", full)),
        Port("position_ids", torch.int64, position_dims(family, length)),
        *cache_ports(model, "past_key_values", lo, hi, past, dtype),
    ]
    vocabulary = model.get_submodule(family.head).weight.shape[0]
    main = (
        Port("logits", dtype, ("batch_size", "num_logits", vocabulary))
        if last
        else Port("next_hidden_states" if gathers else "hidden_states", dtype, ("batch_size", length, width))
    )
    scores = [Port("scores", torch.float32, ("batch_size", full))] if score else []
    outputs = (main, *scores, *cache_ports(model, "present", lo, hi, full, dtype))
    return Graph(
        role, module, tuple(inputs), outputs, layers, removal, tap_ports(tapped, length, width, dtype)
    )


def merged_graph(
    model: Any,
    family: Family,
    removal: Mapping[str, Any],
    dtype: torch.dtype,
    frozen: Collection[int] = (),
) -> Graph:
    """All layers, with visual tokens leaving between two of them."""
    text_model, cut = model.get_submodule(family.text_model), removal["at"]
    width, depth = model.config.get_text_config().hidden_size, len(text_model.layers)
    head = model.get_submodule(family.head)
    below, above = range(cut), range(cut, depth)
    lower = Layers(text_model, 0, cut, False, below, None, frozen)
    upper = Layers(text_model, cut, depth, True, above, None, frozen)
    module = MergedDecoder(lower, upper, head)
    full, kept = "past_length + sequence_length", "kept_past_length + kept_length"
    inputs = (
        Port("inputs_embeds", dtype, ("batch_size", "sequence_length", width)),
        Port("attention_mask", torch.int64, ("batch_size", full)),
        Port("position_ids", torch.int64, position_dims(family, "sequence_length")),
        Port("keep_index", torch.int64, ("batch_size", "kept_length")),
        Port("kept_attention_mask", torch.int64, ("batch_size", kept)),
        Port("logits_index", torch.int64, ("batch_size", "num_logits")),
        *part_ports("", lower),
        *part_ports("kept_", upper),
        *cache_ports(model, "past_key_values", 0, cut, "past_length", dtype),
        *cache_ports(model, "past_key_values", cut, depth, "kept_past_length", dtype),
    )
    outputs = (
        Port("logits", dtype, ("batch_size", "num_logits", head.weight.shape[0])),
        *cache_ports(model, "present", 0, cut, full, dtype),
        *cache_ports(model, "present", cut, depth, kept, dtype),
    )
    taps = (
        *tap_ports(below, "sequence_length", width, dtype),
        *tap_ports(above, "kept_length", width, dtype),
    )
    return Graph("decoder_merged", module, inputs, outputs, (0, depth), removal, taps)


def part_ports(prefix: str, layers: Layers) -> list[Port]:
    """Where text and visual rows are, if some layer is frozen."""
    kinds = ("text", "visual") if layers.frozen else ()
    return [
        Port(f"{prefix}{kind}_index", torch.int64, ("batch_size", f"{prefix}{kind}_length")) for kind in kinds
    ]


def cache_ports(model: Any, name: str, lo: int, hi: int, length: str, dtype: torch.dtype) -> list[Port]:
    """``NAME.{layer}.key`` and ``.value``, [B, H_kv, length, C], for layers ``lo``..``hi``-1."""
    heads, width = kv_shape(model.config.get_text_config())
    dims: Dims = ("batch_size", heads, length, width)
    return [Port(f"{name}.{d}.{part}", dtype, dims) for d in range(lo, hi) for part in ("key", "value")]


def kv_shape(config: Any) -> tuple[int, int]:
    """Key-value heads and their width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(width)


def tap_ports(layers: range, length: str, width: int, dtype: torch.dtype) -> tuple[Port, ...]:
    """``layer.{d}``: the hidden states behind layer d."""
    return tuple(Port(f"layer.{d}", dtype, ("batch_size", length, width)) for d in layers)
