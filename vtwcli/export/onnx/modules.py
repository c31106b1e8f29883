"""The library's own modules, wrapped so that plain tensors go in and come out; ``onnx_graphs`` makes graphs of them.

Added are an explicit attention mask, plain key-value tensors in the place of a cache object, and the gathers with
which visual tokens leave. Axes: B batch, S sequence, P past, T kept tokens, M rows whose logits are wanted, N images
or tiles, D hidden size, H heads, C their width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "vtw_onnx_flash"  # "flash" in the name makes vision towers pass whole sequences and segment marks


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


def shallow(module: nn.Module) -> Any:
    """A copy that shares parameters and submodules but can be given others."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
