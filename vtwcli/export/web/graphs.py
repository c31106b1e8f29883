"""What becomes a graph for transformers.js: modules whose inputs and outputs have the names which that library knows.

Axes: B batch, S sequence, P past, D hidden size, N images or tiles, T features of one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtwcli.errors import UsageError
from vtwcli.export.onnx import graphs
from vtwcli.export.onnx.decoder import Layers
from vtwcli.export.onnx.graphs import Graph, Port
from vtwcli.export.onnx.modules import MaskedTower, PatchTower, TowerAndProjector, gather
from vtwcli.models.families import Family

DECODER = "decoder_model_merged"
FLOAT = torch.float32  # of everything that the library puts together itself, whatever the type of the weights

GRIDS = {"qwen2_vl": "grid_thw", "qwen2_5_vl": "image_grid_thw"}
"""What the library calls the sizes of images in patches."""

FAMILIES = ("llava", "llava_onevision", "idefics3", "smolvlm", *GRIDS)
"""Those that this library and the graphs both have."""


@dataclass(frozen=True)
class Stage:
    """Some layers of the decoder, and what leaves in front of them.

    Attributes:
        layers: first layer, and first that is not inside any more.
        removal: the action in canonical form; None for the first stage.
        score: kind of the scores that the last of the layers takes for the next removal, or None.
        frozen: whether some of them do not update visual rows.
    """

    layers: tuple[int, int]
    removal: Mapping[str, Any] | None
    score: str | None
    frozen: bool


def stages_of(depth: int, removals: Sequence[Mapping[str, Any]], frozen: Collection[int]) -> list[Stage]:
    """The decoder's stages.

    Raises:
        UsageError: tokens leave in front of the decoder.
    """
    if any(removal["at"] == 0 for removal in removals):
        raise UsageError(
            "transformers.js counts positions by the cache of layer 0, so nothing can leave in front of it",
            "start at layer 1 or later",
        )
    starts = [0, *(removal["at"] for removal in removals), depth]
    before = [None, *removals]
    return [
        Stage(
            (starts[i], starts[i + 1]),
            before[i],
            graphs.measured(before[i + 1]) if i + 1 < len(before) else None,
            any(starts[i] <= d < starts[i + 1] for d in frozen),
        )
        for i in range(len(before))
    ]


def all_graphs(
    model: Any, family: Family, stages: Sequence[Stage], dtype: torch.dtype, frozen: Collection[int]
) -> list[Graph]:
    """The three graphs that the library loads; the decoder's still wants what ``marker`` computes for it.

    Raises:
        UsageError: the library or the export does not know the family or something in its configs.
    """
    if family.model_type not in FAMILIES:
        raise UsageError(
            f"{family.title} has no export to transformers.js", f"families with one: {', '.join(FAMILIES)}"
        )
    graphs.check_text(model.config.get_text_config())
    graphs.check_vision(family, model.config.vision_config)
    return [
        embedding_graph(model, family),
        vision_graph(model, family, dtype),
        decoder_graph(model, family, stages, dtype, frozen),
    ]


def marked(x: Tensor, mark: float) -> Tensor:
    """Rows [..., D] with one more channel that says whether they are visual, in float32."""
    return torch.cat([x.float(), torch.full_like(x[..., :1], mark, dtype=FLOAT)], -1)


class MarkedEmbedding(nn.Module):
    """``input_ids`` [B, S] to ``inputs_embeds`` [B, S, D + 1]."""

    def __init__(self, embed_tokens: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """The embeddings, marked as text."""
        return (marked(self.embed_tokens(tensors[0]), 0.0),)


class MarkedImages(nn.Module):
    """LLaVA: pixels [N, 3, H, W] to features [N, T, D + 1]; LLaVA-OneVision's end with the new-line vector."""

    def __init__(self, base: Any, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = TowerAndProjector(base, config), dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """The features, marked as visual."""
        features, *newline = self.inner(tensors[0].to(self.dtype))
        if newline:
            features = torch.cat([features, newline[0].expand(features.shape[0], 1, -1)], 1)
        return (marked(features, 1.0),)


class MarkedTiles(nn.Module):
    """Idefics3 and SmolVLM: tiles [B, n, 3, H, W] and which pixels are image [B, n, H, W] to features [N, T, D + 1],
    flat over B and n, [N T, D + 1]."""

    def __init__(self, base: Any, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype, self.patch = MaskedTower(base, config), dtype, config.vision_config.patch_size

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """The features, marked as visual."""
        pixels, inside = (x.flatten(0, 1) for x in tensors)
        count, high, wide = inside.shape
        size = self.patch
        # counted, since every type of ONNX Runtime sums int32
        patches = (
            inside.to(torch.int32).reshape(count, high // size, size, wide // size, size).sum((2, 4)) > 0
        )
        (features,) = self.inner(pixels.to(self.dtype), patches)
        return (marked(features.flatten(0, 1), 1.0),)


class MarkedPatches(nn.Module):
    """Qwen2-VL and Qwen2.5-VL: the patches of all images [N, C] and their grids [I, 3] to features [T, D + 1]."""

    def __init__(self, base: Any, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = PatchTower(base, config), dtype
        vision = config.vision_config
        self.merge = vision.spatial_merge_size
        window = getattr(vision, "window_size", None)
        self.window = window // self.merge // vision.patch_size if window else None

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """The features, marked as visual."""
        pixels, grids = tensors
        return (marked(self.inner(pixels.to(self.dtype), *self.places(pixels.shape[0], grids))[0], 1.0),)

    def places(self, patches: Any, grids: Tensor) -> list[Tensor]:
        """What ``PatchTower`` takes behind the pixels."""
        m = self.merge
        frame, row, column, first, high, wide = locate(patches, grids, m)
        where = [torch.stack([row, column], 1), frame]
        if self.window is None:
            return where
        # of each merged patch, by its first patch: windows are numbered over all frames of all images
        at = torch.arange(patches // (m * m), device=grids.device) * (m * m)
        across, down = -(-(wide[at] // m) // self.window), -(-(high[at] // m) // self.window)
        # frames before this image's first hold as many windows as their images do
        t, h, w = (grids[:, axis] for axis in range(3))
        each = t * -(-(h // m) // self.window) * -(-(w // m) // self.window)
        begins = torch.cumsum(each, 0) - each
        image, in_image = first[0][at], frame[at] - first[1][at]
        number = begins[image] + (in_image * down + row[at] // m // self.window) * across
        number = number + column[at] // m // self.window
        order = torch.sort(number * at.shape[0] + torch.arange(at.shape[0], device=grids.device))[1]
        windows = number[order][:, None].expand(-1, m * m).reshape(-1)
        return [*where, order, windows]


def locate(
    patches: Any, grids: Tensor, m: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Where each of the N patches is: its frame (counted over all images), row and column; the number of its image and
    of that image's first frame; its image's height and width in patches. All [N].

    Args:
        patches: N.
        grids: time, rows and columns of each image in patches [I, 3].
        m: patches merged along each side of a visual token; those of one stand together.
    """
    number = torch.arange(patches, device=grids.device)
    t, h, w = (grids[:, axis] for axis in range(3))
    ends, frames = torch.cumsum(t * h * w, 0), torch.cumsum(t, 0) - t
    image = (ends[None] <= number[:, None]).to(torch.int64).sum(1)
    high, wide = h[image], w[image]
    rest = number - (ends - t * h * w)[image]
    frame, rest = rest // (high * wide), rest % (high * wide)
    block, inner = rest // (m * m), rest % (m * m)
    row, column = block // (wide // m) * m + inner // m, block % (wide // m) * m + inner % m
    return frames[image] + frame, row, column, (image, frames[image]), high, wide


class StagedDecoder(nn.Module):
    """All layers in one graph, with visual rows leaving between stages.

    Inputs in order: hidden states [B, S, D]; ``attention_mask`` [B, P + S]; ``position_ids`` [B, S] or [3, B, S];
    ``logits_index`` [B, 1]; for each stage behind the first ``keep_index`` and its mask; for each with frozen layers
    ``text_index`` and ``visual_index``; for each that takes scores ``score_index`` [B, 1]; past keys and values.
    """

    def __init__(self, parts: Sequence[Layers], head: nn.Module) -> None:
        super().__init__()
        self.inside, self.head = nn.ModuleList(parts), head  # where torch looks for their parameters
        self.parts = tuple(parts)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, 1, V] in float32; present keys and values; the scores of each stage that takes them."""
        given = iter(tensors)
        hidden, attended, positions, logits_index = (next(given) for _ in range(4))
        keeps = [(next(given), next(given)) for _ in self.parts[1:]]
        for part in self.parts:
            if part.frozen:
                part.parts.text, part.parts.visual = next(given), next(given)
        for part in self.parts:
            if part.probe is not None:
                part.probe.row = next(given)
        past = list(given)
        present: list[Tensor] = []
        for index, part in enumerate(self.parts):
            if index:
                keep, attended = keeps[index - 1]
                rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
                hidden, positions = gather(hidden, keep), positions[..., rows, keep]
            count = 2 * (part.hi - part.lo)
            hidden, more = part(hidden, attended, positions, past[:count])
            past = past[count:]
            present += more
        logits = self.head(gather(hidden, logits_index)).float()
        scores = [part.probe.scores for part in self.parts if part.probe is not None]
        return logits, *present, *(taken for taken in scores if taken is not None)


def embedding_graph(model: Any, family: Family) -> Graph:
    """``input_ids`` to ``inputs_embeds``."""
    embed_tokens = model.get_submodule(family.text_model).embed_tokens
    width = model.config.get_text_config().hidden_size
    dims = ("batch_size", "sequence_length")
    return Graph(
        "embed_tokens",
        MarkedEmbedding(embed_tokens),
        (Port("input_ids", torch.int64, dims),),
        (Port("inputs_embeds", FLOAT, (*dims, width + 1)),),
    )


def vision_graph(model: Any, family: Family, dtype: torch.dtype) -> Graph:
    """What the library's image processor returns to ``image_features``."""
    config, vision = model.config, model.config.vision_config
    width, kind = config.get_text_config().hidden_size + 1, graphs.VISION[family.model_type].arrange
    flat = Port("image_features", FLOAT, ("num_features", width))
    if kind == "patches":
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        inputs = (
            Port("pixel_values", FLOAT, ("num_patches", patch)),
            Port(GRIDS[family.model_type], torch.int64, ("num_images", 3)),
        )
        return Graph(
            "vision_encoder",
            MarkedPatches(model.model, config, dtype),
            inputs,
            (flat,),
            scale={"num_patches": ("num_features", vision.spatial_merge_size**2)},
        )
    side = vision.image_size
    if kind == "tiles":
        count = ("batch_size", "num_images")
        inputs = (
            Port("pixel_values", FLOAT, (*count, 3, side, side)),
            Port("pixel_attention_mask", torch.bool, (*count, side, side)),
        )
        return Graph("vision_encoder", MarkedTiles(model.model, config, dtype), inputs, (flat,))
    return Graph(
        "vision_encoder",
        MarkedImages(model.model, config, dtype),
        (Port("pixel_values", FLOAT, ("num_images", 3, side, side)),),
        (Port("image_features", FLOAT, ("num_images", "num_features", width)),),
    )


def decoder_graph(
    model: Any, family: Family, stages: Sequence[Stage], dtype: torch.dtype, frozen: Collection[int]
) -> Graph:
    """The decoder, with the inputs that ``marker`` computes and the library does not have."""
    text_model, head = model.get_submodule(family.text_model), model.get_submodule(family.head)
    width, depth = model.config.get_text_config().hidden_size, len(text_model.layers)
    parts = [
        Layers(text_model, *stage.layers, stage.layers[1] == depth, range(0), stage.score, frozen)
        for stage in stages
    ]
    new, past = lengths(len(stages))
    inputs = [
        Port("inputs_embeds", dtype, ("batch_size", new[0], width)),
        Port("attention_mask", torch.int64, ("batch_size", f"{past[0]} + {new[0]}")),
        Port("position_ids", torch.int64, graphs.position_dims(family, new[0])),
        Port("logits_index", torch.int64, ("batch_size", 1)),
    ]
    outputs = [Port("logits", FLOAT, ("batch_size", 1, head.weight.shape[0]))]
    for i in range(1, len(stages)):
        inputs.append(Port(f"keep_index_{i}", torch.int64, ("batch_size", new[i])))
        inputs.append(Port(f"attended_{i}", torch.int64, ("batch_size", f"{past[i]} + {new[i]}")))
    for i, stage in enumerate(stages):
        if stage.frozen:
            inputs.append(Port(f"text_index_{i}", torch.int64, ("batch_size", f"text_length_{i}")))
            inputs.append(Port(f"visual_index_{i}", torch.int64, ("batch_size", f"visual_length_{i}")))
    inputs += [
        Port(f"score_index_{i}", torch.int64, ("batch_size", 1)) for i, s in enumerate(stages) if s.score
    ]
    for i, stage in enumerate(stages):
        inputs += graphs.cache_ports(model, "past_key_values", *stage.layers, past[i], dtype)
        outputs += graphs.cache_ports(model, "present", *stage.layers, f"{past[i]} + {new[i]}", dtype)
    outputs += [
        Port(f"scores_{i}", FLOAT, ("batch_size", f"{past[i]} + {new[i]}"))
        for i, s in enumerate(stages)
        if s.score
    ]
    return Graph(DECODER, StagedDecoder(parts, head), tuple(inputs), tuple(outputs), (0, depth))


def lengths(stages: int) -> tuple[list[str], list[str]]:
    """Names of each stage's numbers of new tokens and of past ones."""
    behind = range(1, stages)
    return (
        ["sequence_length", *(f"kept_length_{i}" for i in behind)],
        ["past_length", *(f"kept_past_length_{i}" for i in behind)],
    )
