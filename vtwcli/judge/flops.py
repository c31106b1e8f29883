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
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Convention = Literal["flops", "macs-3mlp", "macs-2mlp"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
DEFAULT_CONVENTION: Convention = "flops"


@dataclass(frozen=True)
class TextShape:
    """The sizes of a text model that its cost depends on.

    Attributes:
        each: the sizes of each layer, where they differ; those that borrow keys and values have no heads for them. The
            other attributes are then those of the first.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    each: tuple[TextShape, ...] = ()

    def of(self, layer: int) -> TextShape:
        """The sizes of one layer."""
        return self.each[layer] if self.each else self

    @classmethod
    def from_config(cls, config: Any) -> TextShape:
        """Read the sizes from a transformers config, top-level or text."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        modes = getattr(text, "kv_sharing_modes", None)
        if modes is None:
            return cls._of_layer(text, text.num_hidden_layers)
        wide = 2 if getattr(text, "use_double_wide_mlp", False) else 1
        parts = getattr(text, "per_layer_config", None)
        each = []
        for layer, mode in enumerate(modes):
            one = cls._of_layer(text if parts is None else parts[layer], 1)
            if mode == "reuse":
                one = replace(one, kv_heads=0, intermediate=one.intermediate * wide)
            each.append(one)
        return replace(each[0], layers=len(each), each=tuple(each))

    @classmethod
    def _of_layer(cls, config: Any, layers: int) -> TextShape:
        heads, intermediate = config.num_attention_heads, config.intermediate_size
        return cls(
            layers=layers,
            hidden=config.hidden_size,
            intermediate=intermediate if isinstance(intermediate, int) else max(intermediate),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
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
    layers = enumerate(zip(tokens_per_layer, frozen, strict=True))
    return sum(layer_cost(shape.of(d), tokens, convention, still) for d, (tokens, still) in layers)


def kv_bytes(shape: TextShape, tokens_per_layer: Sequence[int], bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that the layers hold for ``tokens_per_layer`` tokens."""
    widths = (shape.of(d).kv_heads * shape.of(d).head_dim for d in range(len(tokens_per_layer)))
    return sum(n * 2 * g * bytes_per_value for n, g in zip(tokens_per_layer, widths, strict=True))


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
