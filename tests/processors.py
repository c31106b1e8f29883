"""Processors of families whose class has a video part, as files beside a tiny model."""

from __future__ import annotations

import json

from tests.conftest import TEMPLATE, build_processor

SMALLEST = {"shortest_edge": 64, "longest_edge": 256}  # pixels of an image, as Qwen's processors count
TWO_FRAMES = {"shortest_edge": 512, "longest_edge": 512}  # GLM counts an image as two frames
SIDE = {"height": 16, "width": 16}
TILES = {"size": {"height": 8, "width": 8}, "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}

# family -> image processor, its settings, the settings of the whole processor, and how many visual tokens one
# and two images of 16 x 16 pixels have
FAMILIES = {
    "qwen2_vl": ("Qwen2VLImageProcessor", {"patch_size": 4, "merge_size": 2, "size": SMALLEST}, {}, (4, 8)),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", {"patch_size": 4, "merge_size": 2, "size": SMALLEST}, {}, (4, 8)),
    "qwen3_vl": ("Qwen2VLImageProcessor", {"patch_size": 4, "merge_size": 2, "size": SMALLEST}, {}, (4, 8)),
    "glm4v": ("Glm4vImageProcessor", {"patch_size": 4, "merge_size": 2, "size": TWO_FRAMES}, {}, (4, 8)),
    "video_llama_3": (
        "VideoLlama3ImageProcessor",
        {"patch_size": 4, "merge_size": 1, "size": SMALLEST},
        {},
        (16, 32),
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        TILES,
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        (4 + 4 * 5, 2 * 5),  # several images are not cut into tiles
    ),
    "internvl": (
        "GotOcr2ImageProcessor",
        {"size": SIDE, "crop_to_patches": False},
        {"image_seq_length": 4},
        (4, 8),
    ),
    "gemma4": (
        "Gemma4ImageProcessor",
        {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},  # the fewest that it knows
        {"feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}},
        (64, 128),
    ),
    "smolvlm": (
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": False},
        {"image_seq_len": 4},
        (4, 8),
    ),
}
SPECIAL = {
    "image_token": "<image>",
    "context_image_token": "<image>",
    "video_token": "<unused97>",
    "start_image_token": "<unused96>",
    "end_image_token": "<unused95>",
    "boi_token": "<unused96>",
    "eoi_token": "<unused95>",
    "audio_token": "<unused94>",
    "boa_token": "<unused93>",
    "eoa_token": "<unused92>",
}


def save_processor(family, folder):
    """Write the files of a family's processor as its checkpoints on the Hub have them."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    kind, settings, more, _ = FAMILIES[family]
    whole = {"processor_class": PROCESSOR_MAPPING_NAMES[family]}
    tokenizer = build_processor().tokenizer
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"extra_special_tokens": SPECIAL}))
    image = {"image_processor_type": kind, "do_convert_rgb": True, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(image | whole))
    video = {"video_processor_type": kind.replace("Image", "Video"), **settings}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video | whole))
    (folder / "processor_config.json").write_text(json.dumps(whole | more))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
