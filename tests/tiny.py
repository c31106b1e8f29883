"""Tiny real models built from config, one builder per family, and random inputs laid out by hand.

A *layout* is a list of rows; a row is a string of segments such as ``"t3 i t5"``: three text tokens, one
image, five text tokens. Builders return real transformers models with random weights; nothing is downloaded.
"""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VOCAB = 99
IMAGE_ID = 98
PAD_ID = 0
LAYERS = 6


def llava(seed: int = 0, layers: int = LAYERS, dtype: torch.dtype = torch.float32, attn: str = "sdpa"):
    """A six-layer LLaVA with grouped-query attention; an image of 12x12 pixels gives nine visual tokens."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=12,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=PAD_ID,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        ),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        image_seq_length=9,
    )
    config._attn_implementation = attn
    model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attn)
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.eos_token_id = None  # random models must not stop early
    return model.eval()


def llava_batch(rows: list[str], seed: int = 0, side: str = "left", dtype: torch.dtype = torch.float32) -> dict:
    """Inputs for a layout, padded on ``side``: input_ids, attention_mask [B, S], pixel_values [N, 3, 12, 12]."""
    generator = torch.Generator().manual_seed(seed)
    sequences, images = [], 0
    for row in rows:
        ids: list[int] = []
        for segment in row.split():
            if segment == "i":
                ids += [IMAGE_ID] * 9
                images += 1
            else:
                ids += torch.randint(3, IMAGE_ID, (int(segment[1:]),), generator=generator).tolist()
        sequences.append(ids)
    width = max(map(len, sequences))
    input_ids = torch.full((len(rows), width), PAD_ID)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, ids in enumerate(sequences):
        place = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        input_ids[b, place] = torch.tensor(ids)
        attention_mask[b, place] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    return batch
