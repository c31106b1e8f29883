"""Models of true shapes with random weights, for benchmarks: in memory, or as checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

VOCABULARY = 32064
IMAGE_ID = 32000
IMAGE_TOKENS = 576  # 336 pixels in patches of 14


class Shape(NamedTuple):
    """Sizes of a LLaVA-1.5-like model; the vision tower is a CLIP ViT over 336 pixels."""

    layers: int
    width: int
    mlp: int
    heads: int
    vision_layers: int
    vision_width: int


SHAPES = {
    "quick": Shape(12, 512, 1376, 8, 1, 32),
    "1gb": Shape(12, 1536, 4096, 12, 12, 768),
    "7b": Shape(32, 4096, 11008, 32, 24, 1024),
}


def config(shape: Shape) -> LlavaConfig:
    """The transformers config of a shape."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_width,
            intermediate_size=4 * shape.vision_width,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=max(1, shape.vision_width // 64),
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.width,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-2 if shape.vision_layers > 1 else -1,
        image_seq_length=IMAGE_TOKENS,
    )


def inputs(prefix: int, suffix: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict:
    """One prompt with an image: ``prefix`` text tokens, 576 visual tokens, ``suffix`` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_ID, (prefix + IMAGE_TOKENS + suffix,), generator=generator)
    ids[prefix : prefix + IMAGE_TOKENS] = IMAGE_ID
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids[None].to(device), "pixel_values": pixels.to(device, dtype)}


def write_checkpoint(directory: Path, shape: Shape, shard_bytes: int = 1 << 30) -> Path:
    """Random bfloat16 weights as sharded safetensors; an existing directory of the same config is kept as it is."""
    layout = config(shape)
    marker = directory / "model.safetensors.index.json"
    if marker.exists() and json.loads((directory / "shape.json").read_text()) == list(shape):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(layout, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 24, generator=generator).mul_(0.02).to(torch.bfloat16)
    files: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    total = number = 0
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for place, (name, empty) in enumerate(state.items()):
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight")):
            tensor = torch.ones(empty.shape, dtype=torch.bfloat16)
        else:  # every tensor starts at another place of one random block
            count = empty.numel()
            tensor = block.roll(-997 * place).repeat(-(-count // len(block)))[:count].reshape(empty.shape)
        pending[name] = tensor
        total += tensor.nbytes
        if sum(x.nbytes for x in pending.values()) >= shard_bytes or place == len(state) - 1:
            file = f"model-{number:05}.safetensors"
            save_file({key: value.contiguous() for key, value in pending.items()}, directory / file)
            files |= dict.fromkeys(pending, file)
            pending, number = {}, number + 1
    layout.dtype = torch.bfloat16
    layout.save_pretrained(directory)
    (directory / "shape.json").write_text(json.dumps(list(shape)))
    marker.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    return directory
