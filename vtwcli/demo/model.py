"""The demo model's parts before training: tokenizer, processor and an initialised LLaVA model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vtwcli.data.scenes import SIDE, TRAINED_TASKS, ask, draw_scene, scene_seed

VOCAB = 512
PATCH = 14
PATCHES = SIDE // PATCH
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}

# The form of LLaVA-1.5's own template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} {% else %}"
    "{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def text_of_scenes(count: int) -> Iterator[str]:
    """Prompts and answers of all tasks over the first ``count`` training scenes."""
    for index in range(count):
        rng = np.random.default_rng(scene_seed("train", 0, index))
        scene = draw_scene(rng)
        for task in TRAINED_TASKS:
            if asked := ask(scene, task, rng):
                yield f"USER: \n{asked[0]} ASSISTANT: {asked[1]}"


def build_tokenizer(scenes: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``VOCAB`` tokens; every word of the questions and answers becomes one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        text_of_scenes(scenes),
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bos = SPECIAL["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in SPECIAL.items() if name != "image_token"},
        extra_special_tokens={"image_token": SPECIAL["image_token"]},
    )


def build_processor() -> LlavaProcessor:
    """CLIP's preprocessing at ``SIDE`` pixels with PIL alone, the tokenizer and the chat template."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, layers: int, width: int = 128, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A CLIP vision tower, a projector and a Llama text model of ``layers`` x ``width``, before training."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=64,
    )
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[SPECIAL["image_token"]],
        image_seq_length=PATCHES * PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    # plain matrix products: at this size three times as fast in training on a CPU as the fused kernel
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(**special)
    position = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        position[1:] = _grid_positions(position.shape[1])
    return model


def _grid_positions(width: int) -> Tensor:
    """Sines and cosines of row and column of each patch, [PATCHES * PATCHES, width] (ViT-style 2-D positions)."""
    rate = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(PATCHES)[:, None] * rate
    one = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = one[:, None].expand(-1, PATCHES, -1), one[None].expand(PATCHES, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(PATCHES * PATCHES, width)


class PatchReader(nn.Module):
    """Two linear heads on patch features [B, patches, width]: the colour and the shape that a patch shows."""

    def __init__(self, width: int, colours: int, shapes: int) -> None:
        super().__init__()
        self.colour = nn.Linear(width, colours)
        self.shape = nn.Linear(width, shapes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, colours, patches] and [B, shapes, patches]; the last class is "nothing"."""
        return self.colour(features).transpose(1, 2), self.shape(features).transpose(1, 2)
