"""The family table: one row per ``model_type`` that the tool understands.

A row says where things live inside the stock transformers model and which assumptions hold, so that no other
module knows a family by name. Torch-free: the command line reads it for help and error messages.

To add a family: write its row into ``family_table``, and a tiny model built from config beside the others in
``tests/tiny.py``. The tests find both and check them: paths, placeholder ids, runtime and sweep against the slow
reference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vtwcli.errors import NotFoundError
from vtwcli.models.family import Family
from vtwcli.models.family_table import CROSS, ENCODER, FAMILIES, INDEXED, OTHERS, SEQUENTIAL, refused

__all__ = [
    "FAMILIES", "OTHERS", "Family", "family_of", "markdown", "placeholder_ids", "refusal", "supported", "table",
    "tower_depth", "tower_of",
]  # fmt: skip

_CLASS_TOKENS = {"clip_vision_model", "internvl_vision", "qianfan_ocr_vision"}  # vision towers that have one
_ATTENTION = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
}  # layer types that withdrawal is proved for
_LAYERS = {  # why it is not for others
    **dict.fromkeys(
        ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "hybrid_sliding"), SEQUENTIAL
    ),
    **dict.fromkeys(
        (
            "indexed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "minimax_m3_sparse",
        ),
        INDEXED,
    ),
}


def supported() -> str:
    """The hint of an error: the families that something can be withdrawn from."""
    names = sorted(name for name, row in FAMILIES.items() if not row.no_withdraw)
    return f"supported families: {', '.join(names)}; `vtw docs internals` says how to add one"


def refusal(config: Any) -> str | None:
    """Why nothing can be withdrawn from a model, by what its config says of its layers; None where nothing in it
    speaks against that."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    kinds = set(getattr(text, "layer_types", None) or ()) - _ATTENTION
    if getattr(config, "is_encoder_decoder", False):
        return ENCODER
    if getattr(text, "cross_attention_layers", None):
        return CROSS
    known = [_LAYERS[kind] for kind in sorted(kinds) if kind in _LAYERS]
    if SEQUENTIAL in known:
        return SEQUENTIAL
    if kinds and not known:
        return f"removal is not proved for its layers of the kind {', '.join(sorted(kinds))}"
    return known[0] if known else None


def family_of(config: Any) -> Family:
    """The row for a transformers config, with what depends on the config filled in.

    ``first_withdrawal`` follows the number of DeepStack layers, and a model is refused whatever its
    family where its config speaks against it, see ``refusal``.

    Raises:
        NotFoundError: no row has the config's ``model_type``; the message lists those that do.
    """
    model_type = getattr(config, "model_type", None)
    row = FAMILIES.get(str(model_type))
    if row is None:
        raise NotFoundError(
            f"model type {model_type!r} is not a supported vision-language family",
            supported(),
        )
    if row.deepstack:
        value = config
        for name in row.deepstack.split("."):
            value = getattr(value, name)
        row = replace(row, first_withdrawal=len(value))
    if row.injected:
        layers = [layer for name in row.injected for layer in getattr(config, name, None) or ()]
        last = max((one if isinstance(one, int) else one[-1] for one in layers), default=0)
        row = replace(row, first_withdrawal=last)
    reason = None if row.no_withdraw else refusal(config)
    return replace(row, **refused(reason)) if reason else row


def tower_of(family: Family, config: Any) -> str | None:
    """What scores of the vision tower look at: its ``class token`` where it has one, else the attention that patches
    ``received``; None where there are no such scores."""
    if family.no_tower or family.no_withdraw:
        return None
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return "class token" if tower in _CLASS_TOKENS else "received"


def tower_depth(config: Any) -> int | None:
    """Number of layers of the vision tower, as its config says it."""
    vision = getattr(config, "vision_config", None)
    counts = (getattr(vision, name, None) for name in ("num_hidden_layers", "depth", "num_layers"))
    return next((count for count in counts if isinstance(count, int)), None)


def placeholder_ids(family: Family, config: Any) -> tuple[int, ...]:
    """The token ids that stand for visual tokens in ``input_ids``."""
    ids = (getattr(config, name, None) for name in family.placeholders)
    return tuple(int(i) for i in ids if i is not None)


def table() -> list[dict[str, str]]:
    """The families as people read them: one dict of strings per row, in the order of ``FAMILIES``.

    Keys: ``family``, ``model_type``, ``example``, ``inputs`` (image, or image and video), ``withdraw``, ``sweep``,
    ``analyze``, ``tower`` (whether methods may look at its vision tower), ``onnx`` (yes or no) and ``notes``.
    """
    rows = []
    for row in FAMILIES.values():
        can = row.no_withdraw is None
        reasons = [] if can else [f"Not possible: {row.no_withdraw}."]
        if can and row.no_tower:
            reasons.append(f"No scores of the vision tower: {row.no_tower}.")
        rows.append(
            {
                "family": row.title,
                "model_type": row.model_type,
                "example": row.example,
                "inputs": "image, video" if row.video else "image",
                "withdraw": "yes" if can else "no",
                "sweep": "yes" if can else "no",
                "analyze": "yes" if can else "no",
                "tower": "yes" if can and not row.no_tower else "no",
                "onnx": "yes" if can and not row.no_onnx else "no",
                "notes": " ".join([*reasons, row.caveat]).strip(),
            }
        )
    return rows


def markdown() -> str:
    """The table of families for the documentation, in Markdown, without a newline at the end."""
    names = ("family", "example", "inputs", "withdraw", "sweep", "analyze", "tower", "onnx", "notes")
    head = ("Family", "Example", "Inputs", "Withdraw", "Sweep", "Analyze", "Tower", "ONNX", "Notes")
    lines = [head, tuple("---" for _ in head)]
    lines += [
        tuple(f"`{row[name]}`" if name == "example" else row[name] for name in names) for row in table()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
