"""What becomes a graph: the parts of a stock model, each wrapped so that plain tensors go in and come out.

The wrappers call the library's own modules. Added are an explicit attention mask, plain key-value tensors in the
place of a cache object, and the gathers with which visual tokens leave. Axes: B batch, S sequence, P past,
T kept tokens, M rows whose logits are wanted, N images or tiles, D hidden size.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import UsageError
from vtwcli.models.families import Family

ATTENTION = "vtw_onnx_flash"  # "flash" in the name makes vision towers pass whole sequences and segment marks

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


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in few nodes, without copies of grouped keys and values.

    Args:
        query: [B, H, S, C].
        key: [B, H_kv, S_kv, C]; query head h reads key head h // (H / H_kv).
        value: as ``key``.
        attention_mask: additive, [B, 1, S, S_kv].
        scaling: of the scores.
        cu_seq_lens_q: number of the segment of each position [S]; positions see their own segment only.

    Returns:
        [B, S, H, C].
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    if isinstance(probe := getattr(module, "probe", None), Probe):
        probe.take(query * scale, key, value, attention_mask)
    if cu_seq_lens_q is not None:
        same = cu_seq_lens_q[:, None] == cu_seq_lens_q[None, :]
        attention_mask = torch.where(same, 0.0, lowest(query.dtype)).to(query.dtype)[None, None]
    if groups > 1:
        query = query.reshape(batch, key.shape[1], groups * length, width)
    scores = (query * scale) @ key.transpose(2, 3)
    if groups > 1:
        scores = scores.reshape(batch, heads, length, key.shape[2])
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    if groups > 1:
        weights = weights.reshape(batch, key.shape[1], groups * length, key.shape[2])
    out = weights @ value
    if groups > 1:
        out = out.reshape(batch, heads, length, width)
    return out.transpose(1, 2), None


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``attention`` as one operator, which opset 23 has."""
    if isinstance(probe := getattr(module, "probe", None), Probe):
        probe.take(
            query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key, value, attention_mask
        )
    if cu_seq_lens_q is not None:
        attention_mask = (cu_seq_lens_q[:, None] == cu_seq_lens_q[None, :])[None, None]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2), None


class Probe:
    """How much one row reads of each column, for the choice of the tokens that stay.

    ``attention`` is the mean over heads of the row's weights w, ``contribution`` the norm of the concatenation over
    heads of w_i v_i (VisiPruner, arXiv 2510.17205); in float32.
    """

    def __init__(self, score: str) -> None:
        self.score = score
        self.row: Tensor | None = None
        self.scores: Tensor | None = None

    def take(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> None:
        """Compute ``scores`` [B, S_kv] for the row ``row`` [B, 1]; ``query`` is scaled [B, H, S, C]."""
        assert self.row is not None and attention_mask is not None
        batch, heads, columns = query.shape[0], key.shape[1], key.shape[2]
        row = gather(query.transpose(1, 2), self.row).transpose(1, 2)
        row = row.reshape(batch, heads, -1, query.shape[-1]).float()
        hidden = gather(attention_mask[:, 0], self.row)[:, None].float()
        weights = (row @ key.transpose(2, 3).float() + hidden).softmax(-1)  # [B, H_kv, H / H_kv, S_kv]
        if self.score == "attention":
            self.scores = weights.mean((1, 2))
        else:
            norms = value.float().square().sum(-1)[:, :, None]
            self.scores = (weights.square() * norms).sum((1, 2)).sqrt().reshape(batch, columns)


@contextmanager
def exportable_attention(function: Callable[..., Any]) -> Iterator[None]:
    """Make ``function`` available to transformers' modules under the name ``ATTENTION`` for a while."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def lowest(dtype: torch.dtype) -> float:
    """The value that hides a column: half the least number, so that adding a score cannot reach -inf."""
    return torch.finfo(dtype).min / 2


def mask(attended: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The additive causal mask [B, 1, S, P + S] of the last ``length`` positions over ``attended`` [B, P + S]."""
    total = attended.shape[1]
    rows = torch.arange(length, device=attended.device)[:, None] + (total - length)
    allowed = (torch.arange(total, device=attended.device)[None, :] <= rows)[None, None]
    allowed = allowed & attended.bool()[:, None, None, :]
    return torch.where(allowed, 0.0, lowest(dtype)).to(dtype)


def gather(x_BSD: Tensor, index_BT: Tensor) -> Tensor:
    """Rows ``index`` of each batch row, [B, T, D]."""
    return x_BSD[torch.arange(x_BSD.shape[0], device=x_BSD.device)[:, None], index_BT]


class PlainCache:
    """Keys and values as plain tensors behind the one method that attention layers call."""

    def __init__(self, past: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the past; every layer of one text model call has the same."""
        return next(iter(self.past.values()))[0].shape[2]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append and return the whole keys and values of a layer."""
        old_key, old_value = self.past[layer_idx]
        self.present[layer_idx] = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        return self.present[layer_idx]


class Layers(nn.Module):
    """The text model's own forward over some of its layers.

    Args:
        text_model: the stock text model.
        lo: first layer.
        hi: first layer that is not run any more.
        norm: whether the final norm runs behind them.
        tapped: the layers whose output is kept in ``taps``.
        score: kind of the scores of columns that the last of the layers takes, or None.
    """

    def __init__(
        self, text_model: Any, lo: int, hi: int, norm: bool, tapped: range, score: str | None = None
    ) -> None:
        super().__init__()
        self.lo, self.hi = lo, hi
        self.probe = Probe(score) if score else None
        self.text_model = _shallow(text_model)
        self.text_model.layers = nn.ModuleList()
        self.taps: dict[int, Tensor] = {}
        for index in range(lo, hi):
            layer = _shallow(text_model.layers[index])
            layer._forward_hooks = OrderedDict()
            if index in tapped:
                layer.register_forward_hook(self._tap(index))
            if self.probe is not None and index == hi - 1:
                layer.self_attn = _shallow(layer.self_attn)
                layer.self_attn.probe = self.probe
            self.text_model.layers.append(layer)
        self.text_model.config = copy.copy(text_model.config)
        self.text_model.config.num_hidden_layers = hi - lo
        if not norm:
            self.text_model.norm = nn.Identity()

    def _tap(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.taps[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(
        self, hidden: Tensor, attended: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, S, D] and present keys and values, alternating; ``past`` alternates likewise."""
        layers = range(self.lo, self.hi)
        cache = PlainCache({d: (past[2 * i], past[2 * i + 1]) for i, d in enumerate(layers)})
        out = self.text_model(
            inputs_embeds=hidden,
            attention_mask=mask(attended, hidden.shape[1], hidden.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return out, [x for d in layers for x in cache.present[d]]


class Decoder(nn.Module):
    """One decoder graph: some layers, the gather before them, the head behind them.

    Inputs in order: hidden states [B, S, D]; ``keep_index`` [B, T] if ``gathers``; ``logits_index`` [B, M] if there
    is a head; ``score_index`` [B, 1] if the layers take scores; ``attention_mask`` [B, P + T]; ``position_ids``
    [B, T] or [3, B, T]; past keys and values.
    """

    def __init__(self, layers: Layers, head: nn.Module | None, gathers: bool) -> None:
        super().__init__()
        self.layers, self.head, self.gathers = layers, head, gathers

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, M, V] or hidden states [B, T, D]; scores [B, P + T]; present keys and values; the taps."""
        given = iter(tensors)
        hidden = next(given)
        if self.gathers:
            hidden = gather(hidden, next(given))
        logits_index = next(given) if self.head is not None else None
        probe = self.layers.probe
        if probe is not None:
            probe.row = next(given)
        attended, position_ids = next(given), next(given)
        out, present = self.layers(hidden, attended, position_ids, list(given))
        if self.head is not None and logits_index is not None:
            out = self.head(gather(out, logits_index))
        scores = [] if probe is None or probe.scores is None else [probe.scores]
        return out, *scores, *present, *self.layers.taps.values()


class MergedDecoder(nn.Module):
    """Both parts of the decoder in one graph, with the gather between them.

    Inputs in order: ``inputs_embeds`` [B, S, D]; ``attention_mask`` [B, P + S]; ``position_ids`` [B, S] or
    [3, B, S]; ``keep_index`` [B, T]; ``kept_attention_mask`` [B, P' + T]; ``logits_index`` [B, M]; past keys and
    values of the lower layers (length P), then of the upper ones (length P').
    """

    def __init__(self, lower: Layers, upper: Layers, head: nn.Module) -> None:
        super().__init__()
        self.lower, self.upper, self.head = lower, upper, head

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, M, V]; present keys and values; the taps."""
        hidden, attended, position_ids, keep_index, kept, logits_index, *past = tensors
        cut = 2 * (self.lower.hi - self.lower.lo)
        hidden, present = self.lower(hidden, attended, position_ids, past[:cut])
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        out, more = self.upper(
            gather(hidden, keep_index), kept, position_ids[..., rows, keep_index], past[cut:]
        )
        logits = self.head(gather(out, logits_index))
        return logits, *present, *more, *self.lower.taps.values(), *self.upper.taps.values()


class Embedding(nn.Module):
    """``input_ids`` [B, S] to ``inputs_embeds`` [B, S, D]."""

    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """The embeddings."""
        return (self.embed_tokens(tensors[0]),)


class TowerAndProjector(nn.Module):
    """The LLaVA line: pixels [N, 3, H, W] to projected features [N, T, D], with the new-line vector if there is one."""

    def __init__(self, base: Any, config: Any) -> None:
        super().__init__()
        self.tower, self.projector = base.vision_tower, base.multi_modal_projector
        self.newline = getattr(base, "image_newline", None)
        self.select = config.vision_feature_layer
        self.drop_first = config.vision_feature_select_strategy == "default"

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The features, and the new-line vector [D]."""
        states = self.tower(tensors[0], output_hidden_states=True, return_dict=True).hidden_states
        chosen = [self.select] if isinstance(self.select, int) else self.select
        picked = [states[i][:, 1:] if self.drop_first else states[i] for i in chosen]
        features = self.projector(torch.cat(picked, -1) if len(picked) > 1 else picked[0])
        return (features,) if self.newline is None else (features, self.newline * 1)


class MaskedTower(nn.Module):
    """Idefics3 and SmolVLM: pixels [N, 3, H, W] and the patches that are image [N, h, w] to features [N, T, D]."""

    def __init__(self, base: Any, config: Any) -> None:
        super().__init__()
        self.tower, self.connector = base.vision_model, base.connector

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """The features."""
        pixel_values, patches = tensors
        states = self.tower(pixel_values=pixel_values, patch_attention_mask=patches, return_dict=True)
        return (self.connector(states.last_hidden_state),)


class PatchTower(nn.Module):
    """Qwen2-VL and Qwen2.5-VL: the flattened patches of images to features [T, D].

    Inputs in order: ``pixel_values`` [N, C]; ``patch_positions`` [N, 2], row and column of each patch;
    ``segments`` [N], number of the image (or frame) of each patch; for windowed towers also ``window_index``
    [N / merge**2] and ``windows`` [N], number of the window of each patch in window order.
    """

    def __init__(self, base: Any, config: Any) -> None:
        super().__init__()
        self.visual = base.visual
        self.visual.config._attn_implementation = ATTENTION

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """The features."""
        pixel_values, positions, segments, *windowed = tensors
        more: dict[str, Any] = {}
        if windowed:
            more = {"window_index": windowed[0], "cu_window_seqlens": windowed[1], "max_window_seqlen": 1}
        out = self.visual(
            pixel_values, grid_thw=None, position_ids=positions, cu_seqlens=segments, max_seqlen=1, **more
        )
        return (out.pooler_output,)


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
    "idefics3": Vision(MaskedTower, "tiles"),
    "smolvlm": Vision(MaskedTower, "tiles"),
    "qwen2_vl": Vision(PatchTower, "patches"),
    "qwen2_5_vl": Vision(PatchTower, "patches"),
}
"""The families with an ONNX export."""


def all_graphs(
    model: Any, family: Family, removals: Sequence[Mapping[str, Any]], merged: bool, dtype: torch.dtype
) -> list[Graph]:
    """Every graph of an export.

    Args:
        model: the stock model or its skeleton.
        family: its row of the family table.
        removals: the actions of a schedule that remove visual tokens, in canonical form, layers rising and below L.
        merged: one decoder graph in place of several.
        dtype: of the weights.

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
        return [*graphs, merged_graph(model, family, inner[0], dtype)]
    first = next((removal for removal in removals if removal["at"] == 0), None)
    starts = [0, *(removal["at"] for removal in inner), depth]
    before: list[Mapping[str, Any] | None] = [first, *inner]
    for i, removal in enumerate(before):
        role = _role(i, len(before), removal)
        score = measured(before[i + 1]) if i + 1 < len(before) else None
        graphs.append(decoder_graph(model, family, role, (starts[i], starts[i + 1]), removal, score, dtype))
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
    return score if score in ("attention", "contribution") else None


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
    """
    text_model = model.get_submodule(family.text_model)
    width = model.config.get_text_config().hidden_size
    (lo, hi), gathers = layers, removal is not None
    last = hi == len(text_model.layers)
    tapped = range(lo, hi if last else hi - 1)  # without a head the last border is the output itself
    inner = Layers(text_model, lo, hi, last, tapped, score)
    module = Decoder(inner, model.get_submodule(family.head) if last else None, gathers)
    length, prefix = ("kept_length", "kept_") if gathers else ("sequence_length", "")
    past = f"{prefix}past_length"
    full = f"{past} + {length}"
    stream = "hidden_states" if gathers else "inputs_embeds"
    inputs = [Port(stream, dtype, ("batch_size", "sequence_length", width))]
    if gathers:
        inputs.append(Port("keep_index", torch.int64, ("batch_size", length)))
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


def merged_graph(model: Any, family: Family, removal: Mapping[str, Any], dtype: torch.dtype) -> Graph:
    """All layers, with visual tokens leaving between two of them."""
    text_model, cut = model.get_submodule(family.text_model), removal["at"]
    width, depth = model.config.get_text_config().hidden_size, len(text_model.layers)
    head = model.get_submodule(family.head)
    below, above = range(cut), range(cut, depth)
    module = MergedDecoder(
        Layers(text_model, 0, cut, False, below), Layers(text_model, cut, depth, True, above), head
    )
    full, kept = "past_length + sequence_length", "kept_past_length + kept_length"
    inputs = (
        Port("inputs_embeds", dtype, ("batch_size", "sequence_length", width)),
        Port("attention_mask", torch.int64, ("batch_size", full)),
        Port("position_ids", torch.int64, position_dims(family, "sequence_length")),
        Port("keep_index", torch.int64, ("batch_size", "kept_length")),
        Port("kept_attention_mask", torch.int64, ("batch_size", kept)),
        Port("logits_index", torch.int64, ("batch_size", "num_logits")),
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


def _shallow(module: nn.Module) -> Any:
    """A copy that shares parameters and submodules but can be given others."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
