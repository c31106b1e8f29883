"""FLOPs and KV-cache arithmetic of a text model's prefill; each convention has a name.

Papers mix three conventions, so a number is always printed with its convention and its token counts. With n tokens,
width d, attention width a (heads x head size), key-value width g and MLP width m, a decoder layer costs

==============  ============================================  ==========================================
convention      formula                                       used by
==============  ============================================  ==========================================
``macs-2mlp``   n(2da + 2dg) + 2n²a + 2ndm                    FastV; the formula that VTW states
``macs-3mlp``   n(2da + 2dg) + 2n²a + 3ndm                    SparseVLM, PyramidDrop, VisiPruner
``flops``       2n(2da + 2dg + 3dm) + 4n²a                    ShortV; the default here
==============  ============================================  ==========================================

Without grouped queries a = g = d, and the first formula is the well-known 4nd² + 2n²d + 2ndm. Of n tokens f may be
frozen: they cost their keys and values alone, 2dg each, and n² becomes (n - f)n, since the others still read all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Convention = Literal["flops", "macs-3mlp", "macs-2mlp"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
DEFAULT_CONVENTION: Convention = "flops"


@dataclass(frozen=True)
class TextShape:
    """The sizes of a text model that its cost depends on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any) -> TextShape:
        """Read the sizes from a transformers config, top-level or text."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = text.num_attention_heads
        intermediate = text.intermediate_size
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=intermediate if isinstance(intermediate, int) else max(intermediate),
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )


def layer_cost(
    shape: TextShape, tokens: int, convention: Convention = DEFAULT_CONVENTION, frozen: int = 0
) -> int:
    """Operations of one decoder layer over ``tokens`` tokens, ``frozen`` ones among them, by ``convention``."""
    n, d, m = tokens - frozen, shape.hidden, shape.intermediate
    a, g = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = n * 2 * d * a + tokens * 2 * d * g
    if convention == "macs-2mlp":
        return projections + 2 * n * tokens * a + 2 * n * d * m
    if convention == "macs-3mlp":
        return projections + 2 * n * tokens * a + 3 * n * d * m
    return 2 * projections + 2 * n * 3 * d * m + 4 * n * tokens * a


def prefill_cost(
    shape: TextShape,
    tokens_per_layer: Sequence[int],
    convention: Convention = DEFAULT_CONVENTION,
    frozen_per_layer: Sequence[int] | None = None,
) -> int:
    """Operations of the decoder layers when layer l runs over ``tokens_per_layer[l]`` tokens.

    Args:
        frozen_per_layer: how many of them are not updated; None: all are.
    """
    frozen = [0] * len(tokens_per_layer) if frozen_per_layer is None else frozen_per_layer
    layers = zip(tokens_per_layer, frozen, strict=True)
    return sum(layer_cost(shape, tokens, convention, still) for tokens, still in layers)


def kv_bytes(shape: TextShape, tokens_per_layer: Sequence[int], bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that the layers hold for ``tokens_per_layer`` tokens."""
    return sum(tokens_per_layer) * 2 * shape.kv_heads * shape.head_dim * bytes_per_value


def tokens_with_withdrawal(layers: int, text: int, visual: int, k: int) -> list[int]:
    """Tokens in each layer when ``visual`` tokens are withdrawn at layer ``k``."""
    return [text + visual if layer < k else text for layer in range(layers)]


def prefill_ratio(
    shape: TextShape, text: int, visual: int, k: int, convention: Convention = DEFAULT_CONVENTION
) -> float:
    """Cost of the prefill with withdrawal at ``k`` over the full one: 1 at k = L."""
    pruned = prefill_cost(shape, tokens_with_withdrawal(shape.layers, text, visual, k), convention)
    return pruned / prefill_cost(shape, [text + visual] * shape.layers, convention)


def kv_ratio(layers: int, text: int, visual: int, k: int) -> float:
    """KV-cache entries after a prefill with withdrawal at ``k`` over the full number."""
    return sum(tokens_with_withdrawal(layers, text, visual, k)) / (layers * (text + visual))
