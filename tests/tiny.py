"""Tiny real models built from config, one builder per family, and random inputs laid out by hand.

A *layout* is a list of rows; a row is a string of segments such as ``"t3 i t5"``: three text tokens, one
image, five text tokens; ``v`` is a video where the family has them. Builders return real transformers models with
random weights; nothing is downloaded. Images of the same batch differ in size wherever the family allows it.

``TINY`` maps each model type of the family table to its builder and batch function; ``VARIANTS`` holds further
models of the same families that take another path through the library (sliding windows, another vision tower).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.wide import widen

VOCAB = 99
IMAGE_ID = 98
VIDEO_ID = 97
BREAK_ID = 96  # a text token that some families put between the visual tokens of one image
START_ID = 95  # a text token that some families put in front of an image
PAD_ID = 0
LAYERS = 6

Tensors = dict[str, torch.Tensor]


class Medium(NamedTuple):
    """One image or video: the token ids that stand for it, its tensors, and the batch row it belongs to."""

    ids: list[int]
    tensors: Tensors
    row: int = 0


class Tiny(NamedTuple):
    """A tiny model and its inputs.

    Attributes:
        build: ``(seed, layers, dtype, attn)`` -> model.
        batch: ``(rows, seed, side, dtype)`` -> model inputs.
        video: whether layouts may have ``v``, not always in one batch with ``i``.
        own_positions: whether the model finds position ids of several axes by itself.
    """

    build: Callable[..., Any]
    batch: Callable[..., Tensors]
    video: bool = False
    own_positions: bool = False


def text(layers: int, **more: Any) -> dict[str, Any]:
    """Settings that all text models share: 4 heads over 2 key/value heads, weights large enough to matter."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD_ID,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    } | more


def vision(image_size: int, **more: Any) -> dict[str, Any]:
    """Settings of the usual vision transformers; patches are 4 x 4 pixels."""
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 4,
        "initializer_range": 0.3,
    } | more


def builder(config: Callable[[int], Any], eager: bool) -> Callable[..., Any]:
    """A function that builds the model of ``config(layers)`` with weights drawn from ``seed``; ``eager`` overrides
    the attention of text models that have no other."""

    def build(
        seed: int = 0, layers: int = LAYERS, dtype: torch.dtype = torch.float32, attn: str = "sdpa"
    ) -> Any:
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(
            config(layers),
            dtype=dtype,
            attn_implementation={
                "": "eager",
                "text_config": "eager" if eager else attn,
                "vision_config": "eager",
            },
            experts_implementation="eager",
        )
        for parameter in model.parameters():
            # Projections that start at zero or near it would make all images alike.
            if parameter.ndim > 1 and parameter.std() < 0.1:
                torch.nn.init.normal_(parameter, std=0.3)
        # A placeholder that is generated cannot be told from an image when everything is computed again.
        replaced = [IMAGE_ID, VIDEO_ID, *getattr(model.config, "visual_indicator_token_ids", ())]
        replaced += [START_ID] * (getattr(model.config, "vision_start_token_id", None) == START_ID)
        with torch.no_grad():
            model.get_output_embeddings().weight[replaced] = 0
        model.generation_config.pad_token_id = PAD_ID
        model.generation_config.eos_token_id = None  # random models must not stop early
        if dtype == torch.float64:
            widen(model)
        return model.eval()

    return build


def join(media: list[Medium], rows: int) -> Tensors:
    """Concatenate the tensors of all images and of all videos along their first axis."""
    names = dict.fromkeys(name for medium in media for name in medium.tensors)
    return {name: torch.cat([m.tensors[name] for m in media if name in m.tensors]) for name in names}


def pad_to(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Zeros behind ``x`` along every axis up to ``shape``."""
    padded = x.new_zeros(shape)
    padded[tuple(map(slice, x.shape))] = x
    return padded


def join_padded(media: list[Medium], rows: int) -> Tensors:
    """As ``join``, for images of different sizes: zero pixels fill up to the largest."""
    out = {}
    for name in dict.fromkeys(name for medium in media for name in medium.tensors):
        parts = [m.tensors[name] for m in media if name in m.tensors]
        largest = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
        out[name] = torch.cat([pad_to(p, [len(p), *largest]) for p in parts])
    return out


def join_by_row(media: list[Medium], rows: int) -> Tensors:
    """As ``join_padded``, as [rows, most images of a row, ...]; missing images are all zero."""
    flat = join_padded(media, rows)
    owner = torch.tensor([m.row for m in media for _ in next(iter(m.tensors.values()))])
    most = int(owner.bincount().max())
    out = {}
    for name, x in flat.items():
        out[name] = x.new_zeros(rows, most, *x.shape[1:])
        for row in range(rows):
            own = x[owner == row]
            out[name][row, : len(own)] = own
    return out


def join_by_row_masked(media: list[Medium], rows: int) -> Tensors:
    """As ``join_by_row``, with a mask of the images that there are."""
    out = join_by_row(media, rows)
    return out | {"pixel_attention_mask": out["pixel_values"].flatten(2).any(-1)}


def batcher(
    medium: Callable[..., tuple[list[int], Tensors]],
    collate: Callable[[list[Medium], int], Tensors] = join,
    types: str | None = None,
    mark: Callable[[str, int], int] = lambda kind, token: 0 if token == BREAK_ID else 1 + (kind == "v"),
) -> Callable[..., Tensors]:
    """A function that turns a layout into model inputs.

    Args:
        medium: ``(kind, number, draw)`` -> token ids and tensors; ``number`` counts the batch's images and videos,
            so that sizes can differ, and ``draw(*shape)`` gives random pixels.
        collate: joins the media of a batch.
        types: name of the token type input, or None where the family has none.
        mark: the type of a token of an image or video; text has 0.
    """

    def batch(
        rows: list[str], seed: int = 0, side: str = "left", dtype: torch.dtype = torch.float32
    ) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        sequences, type_rows, media = [], [], []
        for number, row in enumerate(rows):
            ids: list[int] = []
            kinds: list[int] = []
            for segment in row.split():
                if segment[0] == "t":
                    ids += torch.randint(3, 90, (int(segment[1:]),), generator=generator).tolist()
                else:
                    media.append(Medium(*medium(segment, len(media), draw), number))
                    ids += media[-1].ids
                    kinds += [0] * (len(ids) - len(kinds) - len(media[-1].ids))
                    kinds += [mark(segment, token) for token in media[-1].ids]
            sequences.append(ids)
            type_rows.append(kinds + [0] * (len(ids) - len(kinds)))
        width = max(map(len, sequences))
        input_ids = torch.full((len(rows), width), PAD_ID)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
        token_types = torch.zeros(len(rows), width, dtype=torch.long)
        for b, ids in enumerate(sequences):
            place = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
            input_ids[b, place] = torch.tensor(ids)
            attention_mask[b, place] = 1
            token_types[b, place] = torch.tensor(type_rows[b], dtype=torch.long)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if types:
            inputs[types] = token_types
        return inputs | (collate(media, len(rows)) if media else {})

    return batch


def told_twice(batch: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """As ``batch``; which tokens are visual is an input of the layers too."""

    def told(*args: Any, **kwargs: Any) -> Tensors:
        out = batch(*args, **kwargs)
        return out | {"moe_mm_token_type_ids": (out["mm_token_type_ids"] > 0).int()}

    return told


def square(tokens: int, size: int, frames: int = 0, frame_tokens: int = 0) -> Callable[..., Any]:
    """Images of one size, each ``tokens`` tokens; videos of ``frames`` frames, ``frame_tokens`` in all."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        if kind == "v":
            return [VIDEO_ID] * frame_tokens, {"pixel_values_videos": draw(1, frames, 3, size, size)}
        return [IMAGE_ID] * tokens, {"pixel_values": draw(1, 3, size, size)}

    return medium


def nested(tokens: int, size: int, frames: int = 0) -> Callable[..., Any]:
    """As ``square``, each image in a list of its own; every frame of a video has ``tokens`` too."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        if kind == "v":
            return [VIDEO_ID] * tokens * frames, {"pixel_values_videos": draw(1, frames, 3, size, size)}
        return [IMAGE_ID] * tokens, {"pixel_values": draw(1, 1, 3, size, size)}

    return medium


def two_sizes(tokens: int, size: int, large: int) -> Callable[..., Any]:
    """Images of one size, which a second tower gets larger."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        return [IMAGE_ID] * tokens, {
            "pixel_values": draw(1, 3, size, size),
            "high_res_pixel_values": draw(1, 3, large, large),
        }

    return medium


def tiles(tokens: int, size: int) -> Callable[..., Any]:
    """Images cut into one or two tiles of ``tokens`` tokens each, with a text token between them."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        if number % 2:
            return [IMAGE_ID] * tokens, {"pixel_values": draw(1, 3, size, size)}
        ids = [IMAGE_ID] * tokens + [BREAK_ID] + [IMAGE_ID] * tokens
        return ids, {"pixel_values": draw(2, 3, size, size)}

    return medium


def anyres(frames: int, frame_tokens: int, side: int = 8) -> Callable[..., Any]:
    """LLaVA-NeXT's tiles: the whole image and two tiles side by side or on top of each other, 2 x 2 tokens each,
    and a newline feature behind each row of tokens; tiles have ``side`` x ``side`` pixels."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        if kind == "v":
            return [VIDEO_ID] * frame_tokens, {"pixel_values_videos": draw(1, frames, 3, side, side)}
        rows, columns = ((2, 4), (4, 2))[number % 2]
        sizes = torch.tensor([[rows, columns]]) * side // 2
        ids = [IMAGE_ID] * (4 + rows * (columns + 1))
        return ids, {"pixel_values": draw(1, 3, 3, side, side), "image_sizes": sizes}

    return medium


def patches(
    *shape: int,
    frame_break: bool = False,
    video_id: int = VIDEO_ID,
    merge_sizes: bool = False,
    frames: int = 2,
    merged: int = 1,
    more: Callable[[int, int], int] = lambda rows, columns: 0,
) -> Callable[..., Any]:
    """Qwen's packed patches of ``shape``: grids of 2 x 2, 2 x 4 or 4 x 2 merged patches; videos of ``frames``.

    Args:
        frame_break: text separates the frames of a video.
        video_id: the placeholder of video.
        merge_sizes: the family takes the merge size as an input.
        merged: how many frames share their tokens.
        more: how many visual tokens an image has beside those of its grid.
    """

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        height, wide = ((4, 4), (4, 8), (8, 4))[number % 3]
        times = frames if kind == "v" else 1
        pixels = draw(times * height * wide, *shape)
        grid = torch.tensor([[times, height, wide]])
        tokens = height * wide // 4
        if kind == "i":
            tensors = {"pixel_values": pixels, "image_grid_thw": grid}
            ids = [IMAGE_ID] * (tokens + more(height // 2, wide // 2))
        else:
            tensors = {"pixel_values_videos": pixels, "video_grid_thw": grid}
            ids = [video_id] * tokens
            ids += ([BREAK_ID] * frame_break + ids) * (frames // merged - 1)
        if merge_sizes:
            tensors["image_merge_sizes" if kind == "i" else "video_merge_sizes"] = torch.tensor([2])
        return ids, tensors

    return medium


def started(inner: Callable[..., Any]) -> Callable[..., Any]:
    """As ``inner``, with a text token in front of each image or video, by which the model finds it, one behind it, and
    how many seconds apart a video's frames are."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        ids, tensors = inner(kind, number, draw)
        seconds = {"video_second_per_grid": torch.ones(1)} if kind == "v" else {}
        return [START_ID, *ids, BREAK_ID], tensors | seconds

    return medium


def pixtral(row_break: bool, merge: int = 2) -> Callable[..., Any]:
    """Pixtral's images of any size, ``merge`` x ``merge`` patches merged; ``row_break`` puts text behind each row."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        height, width = ((16, 16), (8, 24), (16, 8))[number % 3]
        row = [IMAGE_ID] * (width // 4 // merge) + [BREAK_ID] * row_break
        return row * (height // 4 // merge), {
            "pixel_values": draw(1, 3, height, width),
            "image_sizes": torch.tensor([[height, width]]),
        }

    return medium


def tiles_apart(tokens: int, size: int) -> Callable[..., Any]:
    """As ``tiles``, with the first tile in an input of its own and no text between them."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        local = 1 - number % 2
        return [IMAGE_ID] * tokens * (1 + local), {
            "pixel_values": draw(1, 3, size, size),
            "pixel_values_local": draw(local, 3, size, size),
            "num_local_patches": torch.tensor([local]),
        }

    return medium


def masked_pixels(tokens: int, name: str = "pixel_attention_mask", ragged: bool = True) -> Callable[..., Any]:
    """Images with a mask of real pixels, each ``tokens`` tokens; Idefics2 resamples any size to as many."""

    def medium(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
        height, width = ((16, 16), (8, 16), (16, 8))[number % 3] if ragged else (16, 16)
        return [IMAGE_ID] * tokens, {
            "pixel_values": draw(1, 3, height, width),
            name: torch.ones(1, height, width, dtype=torch.bool),
        }

    return medium


def molmo_crops(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
    """Molmo's crops of 4 x 4 patches, pooled by index 2 x 2: images of one crop or two, videos of two frames,
    each four tokens with a separator behind it."""
    crops = 2 if kind == "v" else 1 + number % 2
    grid = torch.arange(16).view(4, 4).unfold(0, 2, 2).unfold(1, 2, 2).reshape(4, 4)
    pooling = torch.cat([grid + 16 * crop for crop in range(crops)])
    ids = ([IMAGE_ID] * 4 + [BREAK_ID]) * crops
    if kind == "v":
        return ids, {
            "pixel_values_videos": draw(crops, 16, 48),
            "video_token_pooling": pooling,
            "video_grids": torch.tensor([[crops, 2, 2]]),
        }
    return ids, {
        "pixel_values": draw(crops, 16, 48),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 2 * (crops - 1), 2]]),
        "image_num_crops": torch.tensor([crops]),
    }


def join_molmo(media: list[Medium], rows: int) -> Tensors:
    """As ``join``; the pooling indices count through the patches of the whole batch."""
    out = join(media, rows)
    for name in {"image_token_pooling", "video_token_pooling"} & set(out):
        counts = [m.tensors[name].shape[0] * 4 for m in media if name in m.tensors]  # four patches a token
        starts = torch.tensor([0, *counts[:-1]]).cumsum(0).repeat_interleave(torch.tensor(counts) // 4)
        out[name] = out[name] + starts[:, None]
    return out


def pooled(kind: str, number: int, draw: Callable[..., torch.Tensor]) -> tuple[list[int], Tensors]:
    """Gemma 4's flat patches with their places, 2 x 2 of them a token: images of 4 x 4, 4 x 8 or 8 x 4 patches filled
    up to 32; videos of two frames with text between them."""
    height, wide = ((4, 4), (4, 8), (8, 4))[number % 3]
    frames = 2 if kind == "v" else 1
    y, x = torch.meshgrid(torch.arange(height), torch.arange(wide), indexing="ij")
    places = torch.full((frames, 32, 2), -1)
    places[:, : height * wide] = torch.stack([x.flatten(), y.flatten()], -1)
    pixels, tokens = draw(frames, 32, 48), height * wide // 4
    if kind == "i":
        return [IMAGE_ID] * tokens, {"pixel_values": pixels, "image_position_ids": places}
    return [VIDEO_ID] * tokens + [BREAK_ID] + [VIDEO_ID] * tokens, {
        "pixel_values_videos": pixels,
        "video_position_ids": places,
        "num_frames_per_video": torch.tensor([frames]),
    }


def gemma4(shared: int, window: int = 512, **more: Any) -> Callable[[int], dict[str, Any]]:
    """Text settings of Gemma 4, every other layer sliding; the last ``shared`` layers have no keys of their own."""
    return lambda layers: sliding(
        window,
        head_dim=8,
        global_head_dim=16,
        num_kv_shared_layers=shared,
        vocab_size_per_layer_input=VOCAB,
        **more,
    )(layers)


CLIP = {"model_type": "clip_vision_model"}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = {"model_type": "pixtral", "head_dim": 8}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "patch_size": 4,
    "out_hidden_size": 32,
    "initializer_range": 0.3,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def family(
    model_type: str, text_more: Any, vision_config: dict[str, Any], eager: bool = False, **top: Any
) -> Callable[..., Any]:
    """The builder of a family from the settings of its parts.

    Args:
        text_more: what differs from ``text``, as a dict or a function of the number of layers.
        top: settings of the config itself.
    """

    def config(layers: int) -> Any:
        more = text_more(layers) if callable(text_more) else text_more
        parts = {"text_config": text(layers, **more), "vision_config": vision_config}
        # configs write into the dicts they are given
        return AutoConfig.for_model(model_type, **deepcopy(parts | {"image_token_id": IMAGE_ID} | top))

    return builder(config, eager)


def sliding(window: int, **more: Any) -> Callable[[int], dict[str, Any]]:
    """Text settings with every other layer sliding; in most tests the window is longer than the sequence."""
    return lambda layers: {
        "sliding_window": window,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        **more,
    }


LLAMA = {"model_type": "llama"}
QWEN2 = {"model_type": "qwen2"}
QWEN3 = {"model_type": "qwen3", "head_dim": 8}
MISTRAL = {"model_type": "mistral", "sliding_window": None}
GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 8}
GEMMA2 = {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8}
OMNI_AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "output_dim": 32,
}
MUSE_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "layer_types": ["window_attention", "full_attention"],
}
GEMMA4_VISION = {name: value for name, value in vision(0).items() if name != "image_size"} | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
BOTH = {"video_token_id": VIDEO_ID}
MUSE_PROJECTOR = {"projector_hidden_size": 16, "out_hidden_size": 64, **BOTH}
ANYRES = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}

TINY: dict[str, Tiny] = {
    "llava": Tiny(
        family("llava", LLAMA, CLIP | vision(12), vision_feature_layer=-1, image_seq_length=9),
        batcher(square(9, 12)),
    ),
    "vipllava": Tiny(
        family("vipllava", LLAMA, CLIP | vision(8), vision_feature_layers=[-1, -2]), batcher(square(4, 8))
    ),
    "llava_next": Tiny(
        family("llava_next", LLAMA, CLIP | vision(8), vision_feature_layer=-1, **ANYRES),
        batcher(anyres(0, 0)),
    ),
    "llava_next_video": Tiny(
        family("llava_next_video", LLAMA, CLIP | vision(8), vision_feature_layer=-1, **ANYRES, **BOTH),
        batcher(anyres(3, 3)),
        video=True,
    ),
    "llava_onevision": Tiny(
        family("llava_onevision", QWEN2, SIGLIP | vision(8), **ANYRES, **BOTH),
        batcher(anyres(3, 4)),
        video=True,
    ),
    "video_llava": Tiny(
        family("video_llava", LLAMA, CLIP | vision(8), vision_feature_layer=-1, **BOTH),
        batcher(square(4, 8, frames=2, frame_tokens=10)),
        video=True,
    ),
    "qwen2_vl": Tiny(
        family("qwen2_vl", MROPE, QWEN_VISION | {"embed_dim": 16, "hidden_size": 32}, **BOTH),
        batcher(patches(96), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "qwen2_5_vl": Tiny(
        family("qwen2_5_vl", MROPE, QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]}, **BOTH),
        batcher(patches(96), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "qwen3_vl": Tiny(
        family(
            "qwen3_vl",
            MROPE | {"head_dim": 8},
            QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "qwen3_vl_moe": Tiny(
        family(
            "qwen3_vl_moe",
            MROPE | MOE | {"head_dim": 8},
            QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "glm4v": Tiny(
        family("glm4v", MROPE, QWEN_VISION | {"image_size": 16}, **BOTH),
        batcher(patches(96, frame_break=True, video_id=IMAGE_ID), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "glm4v_moe": Tiny(
        family(
            "glm4v_moe",
            MROPE
            | {"head_dim": 16, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
            | {"n_routed_experts": 4, "first_k_dense_replace": 1},
            QWEN_VISION | {"image_size": 16},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True, video_id=IMAGE_ID), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "video_llama_3": Tiny(
        family("video_llama_3", QWEN2, {k: v for k, v in vision(0).items() if k != "image_size"}, **BOTH),
        batcher(patches(48, merge_sizes=True)),
        video=True,
    ),
    "internvl": Tiny(
        family(
            "internvl", QWEN2, vision(16) | {"image_size": [16, 16], "patch_size": [4, 4]}, image_seq_length=4
        ),
        batcher(tiles(4, 16)),
    ),
    "idefics2": Tiny(
        family(
            "idefics2",
            MISTRAL,
            vision(16),
            perceiver_config={
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
        ),
        batcher(masked_pixels(3), join_by_row),
    ),
    "idefics3": Tiny(family("idefics3", LLAMA, vision(16)), batcher(tiles(4, 16), join_by_row)),
    "smolvlm": Tiny(family("smolvlm", LLAMA, vision(16)), batcher(tiles(4, 16), join_by_row)),
    "mistral3": Tiny(family("mistral3", MISTRAL, PIXTRAL | vision(64)), batcher(pixtral(True), join_padded)),
    "lighton_ocr": Tiny(
        family("lighton_ocr", QWEN3, PIXTRAL | vision(64)), batcher(pixtral(False), join_padded)
    ),
    "gemma3": Tiny(
        family("gemma3", sliding(512, **GEMMA3), SIGLIP | vision(16), mm_tokens_per_image=4),
        batcher(square(4, 16), types="token_type_ids"),
    ),
    "paligemma": Tiny(
        family("paligemma", {"model_type": "gemma", "head_dim": 8}, SIGLIP | vision(8), projection_dim=32),
        batcher(square(4, 8), types="token_type_ids", mark=lambda kind, token: 0),
    ),
    "aya_vision": Tiny(
        family("aya_vision", sliding(512, model_type="cohere2"), SIGLIP | vision(16)), batcher(tiles(4, 16))
    ),
    "cohere2_vision": Tiny(
        family(
            "cohere2_vision",
            sliding(512, model_type="cohere2"),
            SIGLIP | vision(16),
            alignment_intermediate_size=32,
        ),
        batcher(tiles(4, 16)),
    ),
    "aria": Tiny(
        family(
            "aria",
            {"moe_num_experts": 4, "moe_topk": 2},
            {"model_type": "idefics3_vision"} | vision(16),
            projector_patch_to_query_dict={16: 4},
        ),
        batcher(masked_pixels(4, "pixel_mask", ragged=False)),
    ),
    "got_ocr2": Tiny(
        family(
            "got_ocr2",
            QWEN2,
            {"output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32} | vision(32),
        ),
        batcher(square(4, 32)),
    ),
    "ovis2": Tiny(
        family(
            "ovis2",
            QWEN2,
            vision(8, vocab_size=20),
            hidden_size=32,
            vocab_size=VOCAB,
            visual_indicator_token_ids=[91, 92, 93, 94, 95],
        ),
        batcher(square(4, 8)),
    ),
    "deepseek_vl": Tiny(family("deepseek_vl", LLAMA, SIGLIP | vision(8)), batcher(square(4, 8))),
    "molmo2": Tiny(
        family(
            "molmo2",
            {"head_dim": 8, "additional_vocab_size": 4},
            vision(16)
            | {
                "image_size": [16, 16],
                "num_position_embeddings": 16,
                "head_dim": 8,
                "num_key_value_heads": 2,
            },
            adapter_config={
                "vision_feature_layer": [-1, -2],
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 32,
                "text_hidden_size": 32,
            },
            image_patch_id=IMAGE_ID,
        ),
        batcher(molmo_crops, join_molmo, types="mm_token_type_ids", mark=lambda kind, token: 1),
        video=True,
    ),
    "gemma4": Tiny(
        family(
            "gemma4",
            gemma4(3, hidden_size_per_layer_input=8, use_double_wide_mlp=True),
            GEMMA4_VISION,
            **BOTH,
        ),
        batcher(pooled, types="mm_token_type_ids"),
        video=True,
    ),
    "llama4": Tiny(
        family(
            "llama4",
            {
                "head_dim": 8,
                "intermediate_size_mlp": 48,
                "num_local_experts": 4,
                "interleave_moe_layer_step": 2,
            }
            | {"no_rope_layer_interval": 3, "attention_chunk_size": 512, "attn_temperature_tuning": False},
            vision(
                16,
                intermediate_size=64,
                vision_output_dim=16,
                projector_input_dim=16,
                projector_output_dim=16,
            ),
        ),
        batcher(tiles(4, 16)),
    ),
    "qwen3_5": Tiny(
        family(
            "qwen3_5",
            MROPE
            | {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
            | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            QWEN_VISION | {"num_position_embeddings": 16},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "lfm2_vl": Tiny(
        family(
            "lfm2_vl",
            lambda layers: {
                "model_type": "lfm2",
                "layer_types": [("conv", "full_attention")[i % 2] for i in range(layers)],
                "block_multiple_of": 16,
            },
            {"model_type": "siglip2_vision_model", "vision_use_head": False, "num_patches": 16} | vision(16),
        ),
        batcher(square(4, 16)),  # withdrawal is refused, so text alone will do
    ),
    "mllama": Tiny(
        family(
            "mllama",
            {"cross_attention_layers": [1, 3]},
            {
                "image_size": 8,
                "patch_size": 4,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
            }
            | {"num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32, "max_num_tiles": 1}
            | {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        ),
        batcher(square(4, 8)),
    ),
    "glm46v": Tiny(
        family(
            "glm46v",
            MROPE | {"model_type": "glm4v_text"},
            QWEN_VISION | {"model_type": "glm4v_vision", "image_size": 16},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True, video_id=IMAGE_ID), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "glmga": Tiny(
        family(
            "glmga",
            MROPE | {"model_type": "glm4v_text"},
            QWEN_VISION | {"model_type": "glm4v_vision", "image_size": 16},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True, video_id=IMAGE_ID), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "glm_ocr": Tiny(
        family("glm_ocr", MROPE, QWEN_VISION | {"image_size": 16}, **BOTH),
        batcher(patches(96, frame_break=True, video_id=IMAGE_ID), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "qianfan_ocr": Tiny(
        family(
            "qianfan_ocr",
            QWEN3,
            vision(16) | {"image_size": [16, 16], "patch_size": [4, 4]},
            image_seq_length=4,
        ),
        batcher(tiles(4, 16)),
    ),
    "exaone4_5": Tiny(
        family(
            "exaone4_5",
            sliding(512, model_type="exaone4"),
            QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 1},
            **BOTH,
        ),
        batcher(patches(96)),
        video=True,
    ),
    "paddleocr_vl": Tiny(
        family(
            "paddleocr_vl",
            MROPE | {"head_dim": 8},
            {k: v for k, v in vision(16).items() if k != "initializer_range"},
        ),
        batcher(patches(3, 4, 4), types="mm_token_type_ids"),
        own_positions=True,
    ),
    "hunyuan_vl": Tiny(
        family(
            "hunyuan_vl",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}}
            | {"head_dim": 8},
            {"num_key_value_heads": 2, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 16}
            | {k: v for k, v in vision(16).items() if k not in ("image_size", "initializer_range")},
        ),
        batcher(patches(48, more=lambda rows, columns: rows + 2), types="mm_token_type_ids"),
        own_positions=True,
    ),
    "hyperclovax_vision_v2": Tiny(
        family(
            "hyperclovax_vision_v2",
            {"model_type": "hyperclovax"},
            QWEN_VISION
            | {"model_type": "qwen2_5_vl_vision", "window_size": 16, "fullatt_block_indexes": [1]},
            **BOTH,
        ),
        batcher(patches(96)),
        video=True,
    ),
    "perception_lm": Tiny(  # the real tower is timm's
        family(
            "perception_lm", LLAMA, CLIP | vision(8, model_args={"embed_dim": 16}), video_token_id=VIDEO_ID
        ),
        batcher(nested(4, 8, frames=2)),
        video=True,
    ),
    "fast_vlm": Tiny(  # the real tower is timm's
        family(
            "fast_vlm",
            QWEN2,
            {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
            | {"hidden_size": 16, "layer_type": "basic"},
            image_seq_length=4,
        ),
        batcher(square(4, 16)),
    ),
    "deepseek_vl_hybrid": Tiny(
        family(
            "deepseek_vl_hybrid",
            LLAMA,
            SIGLIP | vision(8),
            high_res_vision_config={"output_channels": 8, "window_size": 4, "global_attn_indexes": [1]}
            | {"model_type": "sam_vision_model", "mlp_dim": 32}
            | vision(32),
        ),
        batcher(two_sizes(4, 8, 32)),
    ),
    "janus": Tiny(
        family(
            "janus",
            LLAMA,
            {k: v for k, v in vision(8).items() if k != "intermediate_size"}
            | {"projection_dim": 32, "num_image_tokens": 4, "mlp_ratio": 2.0},
            vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "num_patches": 2}
            | {"latent_channels": 32, "projection_dim": 32, "image_token_embed_dim": 32, "num_embeddings": 8},
        ),
        batcher(square(4, 8)),
    ),
    "kimi_k25": Tiny(
        family(
            "kimi_k25",
            {"model_type": "deepseek_v3", "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1}
            | {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16}
            | {"q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
            | {"num_key_value_heads": 4},
            {k: v for k, v in vision(0).items() if k not in ("image_size", "initializer_range")}
            | {"pos_emb_height": 4, "pos_emb_width": 4},
            projection_hidden_size=16,
            **BOTH,
        ),
        batcher(patches(3, 4, 4, frames=1)),
        video=True,
    ),
    "pp_chart2table": Tiny(
        family(
            "pp_chart2table",
            QWEN2,
            {"output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32} | vision(32),
        ),
        batcher(square(4, 32)),
    ),
    "cohere_compass": Tiny(
        family(
            "cohere_compass",
            sliding(
                512,
                head_dim=8,
                rope_parameters={"full_attention": None, "sliding_attention": MROPE["rope_parameters"]},
            ),
            QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "qwen2_5_omni_thinker": Tiny(
        family(
            "qwen2_5_omni_thinker",
            MROPE,
            QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
            audio_config=OMNI_AUDIO,
            vision_start_token_id=START_ID,
            **BOTH,
        ),
        batcher(started(patches(96))),
        video=True,
        own_positions=True,
    ),
    "qwen3_omni_moe_thinker": Tiny(
        family(
            "qwen3_omni_moe_thinker",
            MROPE | MOE | {"head_dim": 8},
            QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            audio_config=OMNI_AUDIO | {"downsample_hidden_size": 8},
            vision_start_token_id=START_ID,
            **BOTH,
        ),
        batcher(started(patches(96))),
        video=True,
        own_positions=True,
    ),
    "step3p7": Tiny(
        family(
            "step3p7",
            lambda layers: (
                sliding(512)(layers)
                | {
                    "rope_parameters": {
                        kind: {"rope_type": "default", "rope_theta": 1e4}
                        for kind in ("full_attention", "sliding_attention")
                    },
                    "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16,
                    "share_expert_dim": 16,
                    "head_dim": 8,
                    "num_sliding_attention_heads": 4,
                }
            ),
            {k: v for k, v in vision(32).items() if k != "initializer_range"},
        ),
        batcher(tiles_apart(4, 32)),
    ),
    "deepseek_ocr2": Tiny(
        family(
            "deepseek_ocr2",
            lambda layers: {
                "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
            },
            {
                "sam_config": {"output_channels": 16, "window_size": 4, "global_attn_indexes": [1]}
                | {"mlp_dim": 32, "downsample_channels": [8, 16]}
                | vision(32),
                "encoder_config": text(2, hidden_size=16, intermediate_size=32, num_attention_heads=2),
            },
        ),
        batcher(square(145, 32)),
    ),
    "granite_docling": Tiny(
        family(
            "granite_docling",
            {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
            vision(16, out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0, 1]),
        ),
        batcher(square(4, 16), join_by_row_masked),
    ),
    "granite4_vision": Tiny(
        family(
            "granite4_vision",
            {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
            CLIP | vision(16, hidden_size=64),
            qformer_config={"model_type": "blip_2_qformer", "hidden_size": 64, "num_attention_heads": 2}
            | {"num_hidden_layers": 1, "intermediate_size": 32, "encoder_hidden_size": 64}
            | {"cross_attention_frequency": 1, "use_qformer_text_input": False},
            deepstack_layer_map=[[0, 0], [1, 2]],
            spatial_vision_layer=-1,
            spatial_target_layers=[0, 1, 2, 3],
            downsample_rate="1/2",
            image_grid_pinpoints=[[16, 32], [32, 16]],
        ),
        batcher(anyres(0, 0, side=16)),
    ),
    "muse_glimmer": Tiny(
        family(
            "muse_glimmer", sliding(512, head_dim=8, output_multiplier=1.0), MUSE_VISION, **MUSE_PROJECTOR
        ),
        batcher(patches(96)),
        video=True,
    ),
    "muse_spark": Tiny(
        family(
            "muse_spark",
            lambda layers: (
                sliding(512, head_dim=8, output_multiplier=1.0)(layers)
                | {"mlp_layer_types": ["dense", *["sparse"] * (layers - 1)], "num_local_experts": 4}
                | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_hidden_size": 16}
            ),
            MUSE_VISION,
            audio_config={"patch_sizes": [2, 2], "hidden_sizes": [8, 8], "depths": [1, 1]}
            | {"num_hidden_layers": 2, "conv_kernel_size": 3, "out_hidden_size": 32},
            **MUSE_PROJECTOR,
        ),
        batcher(patches(96)),
        video=True,
    ),
    "cosmos3_edge": Tiny(
        family(
            "cosmos3_edge",
            MROPE | {"head_dim": 8},
            {"num_patches": 16}
            | {k: v for k, v in vision(0).items() if k not in ("image_size", "initializer_range")},
            projector_hidden_size=32,
            **BOTH,
        ),
        batcher(patches(48, frame_break=True), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "cosmos3_omni": Tiny(
        family(
            "cosmos3_omni",
            MROPE | {"head_dim": 8},
            QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **BOTH,
        ),
        batcher(patches(96, frame_break=True), types="mm_token_type_ids"),
        video=True,
        own_positions=True,
    ),
    "ernie4_5_vl_moe": Tiny(
        family(
            "ernie4_5_vl_moe",
            lambda layers: (
                MROPE
                | {"moe_intermediate_size": [16, 8], "moe_k": 2, "moe_num_experts": 4}
                | {"moe_num_shared_experts": 1, "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)]}
            ),
            {k: v for k, v in QWEN_VISION.items() if k != "out_hidden_size"},
            **BOTH,
        ),
        told_twice(batcher(patches(48, merged=2), types="mm_token_type_ids")),
        video=True,
        own_positions=True,
    ),
}

VARIANTS: dict[str, Tiny] = {
    "pixtral": Tiny(
        family(
            "llava",
            MISTRAL,
            PIXTRAL | vision(64),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        batcher(pixtral(True, merge=1), join_padded),
    ),
    "llava-mistral-window": Tiny(
        family(
            "llava", {"model_type": "mistral", "sliding_window": 8}, CLIP | vision(8), vision_feature_layer=-1
        ),
        batcher(square(4, 8)),
    ),
    "gemma4-moe": Tiny(  # as those of more than 20 billion parameters
        family(
            "gemma4",
            gemma4(
                0,
                8,
                hidden_size_per_layer_input=0,
                use_bidirectional_attention="vision",
                attention_k_eq_v=True,
                num_global_key_value_heads=1,
                enable_moe_block=True,
                num_experts=4,
                top_k_experts=2,
                moe_intermediate_size=16,
            ),
            GEMMA4_VISION,
            **BOTH,
        ),
        batcher(pooled, types="mm_token_type_ids"),
        video=True,
    ),
    "llama4-chunks": Tiny(
        family(
            "llama4",
            {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"no_rope_layer_interval": 2, "attention_chunk_size": 8, "attn_temperature_tuning": False},
            vision(
                16,
                intermediate_size=64,
                vision_output_dim=16,
                projector_input_dim=16,
                projector_output_dim=16,
            ),
        ),
        batcher(tiles(4, 16)),
    ),
    "gemma3-window": Tiny(
        family("gemma3", sliding(8, **GEMMA3), SIGLIP | vision(16), mm_tokens_per_image=4),
        batcher(square(4, 16), types="token_type_ids"),
    ),
    "aya_vision-window": Tiny(
        family("aya_vision", sliding(8, model_type="cohere2"), SIGLIP | vision(16)), batcher(tiles(4, 16))
    ),
    "paligemma2": Tiny(
        family("paligemma", sliding(512, **GEMMA2), SIGLIP | vision(8), eager=True, projection_dim=32),
        batcher(square(4, 8), types="token_type_ids", mark=lambda kind, token: 0),
    ),
}


_RELEASE = transformers.__version__.rpartition(".")[0]


def _absent() -> dict[str, str]:
    """Models that the installed release of transformers does not have or does not run, and why."""
    found = {name: "another release of transformers has it" for name in TINY if name not in CONFIG_MAPPING}
    if _RELEASE == "5.20":
        thinkers = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
        found |= dict.fromkeys(thinkers, "its text model stands elsewhere there")
        found |= dict.fromkeys(("gemma4", "gemma4-moe"), "its videos come with another argument there")
    if _RELEASE == "5.24":
        found |= dict.fromkeys(
            ("llama4", "llama4-chunks"), "its forward there reads a field that its output lacks"
        )
    return found


def _skipped(reason: str) -> Callable[..., Any]:
    def build(*_: object, **__: object) -> None:
        pytest.skip(reason)

    return build


ABSENT = _absent()
for _models in (TINY, VARIANTS):
    for _name in ABSENT.keys() & _models.keys():
        _models[_name] = _models[_name]._replace(build=_skipped(ABSENT[_name]))

llava, llava_batch = TINY["llava"][:2]
LONG = {"deepseek_ocr2"}
"""Models whose images have so many tokens that slow tests leave them out."""
COMPRESSED = {"kimi_k25"}
"""Models whose cache holds compressed keys and values."""
