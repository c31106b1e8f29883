"""Sixteen repositories of the Hub in miniature: the files that they have, named and written as theirs, quirks included.

Each is a tiny model with random weights of whom the right state dict is known. Names of tensors, places of settings and
of chat templates are those of the repositories; nothing here goes through ``save_pretrained`` of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import tiny
from tests.conftest import TEMPLATE, build_processor
from tests.processors import SMALLEST, SPECIAL, TWO_FRAMES

LAYERS = 3
Json = dict[str, Any]

# --- names of tensors: a beginning in the model -> the beginning on disk
LLAVA = {
    "lm_head": "language_model.lm_head",
    "model.language_model": "language_model.model",
    "model.vision_tower": "vision_tower.vision_model",
    "model.multi_modal_projector": "multi_modal_projector",
    "model.image_newline": "image_newline",
}
PLAIN_TOWER = LLAVA | {"model.vision_tower": "vision_tower"}
WITHIN = {"model.vision_tower": "model.vision_tower.vision_model"}
QWEN = {"model.language_model": "model", "model.visual": "visual"}

# --- settings of image processors
CLIP = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}, "do_center_crop": True}
SQUARE = {"size": {"height": 8, "width": 8}}
QWEN_PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
TILES = {"size": {"height": 8, "width": 8}, "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
PATCHES = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}

SAMPLING = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001}


def _same(config: Json) -> Json:
    return config


@dataclass(frozen=True)
class Layout:
    """How a repository lays out its files.

    Attributes:
        family: of the model.
        images: type and settings of the image processor.
        names: beginnings of tensors' names, in the model -> on disk.
        dtype: of the weights.
        shards: weight files; with more than one there is an index.
        head: ``stored``; ``tied``: not stored, as the table of embeddings is; ``listed``: so, but the index lists it.
        config: from the model's settings to config.json.
        generation: generation_config.json, or None where there is none.
        whole: processor_config.json, or None where there is none.
        template: the file that holds the chat template, ``list`` for named ones in tokenizer_config.json, or None.
        tokens: what tokens of the vocabulary are called instead.
        special: tokens that the tokenizer knows by a name of their own.
        extra: further files.
    """

    family: str
    images: Json
    names: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    shards: int = 1
    head: str = "stored"
    config: Callable[[Json], Json] = _same
    generation: Json | None = field(default_factory=lambda: {"bos_token_id": 1, "eos_token_id": 2})
    whole: Json | None = None
    template: str | None = "chat_template.json"
    tokens: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=lambda: SPECIAL)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> dict[str, torch.Tensor]:
        """Write the repository; gives the state dict that loading it must lead to, in the type on disk."""
        model = tiny.TINY[self.family].build(layers=LAYERS)
        state = {name: x.detach().to(self.dtype).contiguous() for name, x in model.state_dict().items()}
        table = next(name for name in state if name.endswith("embed_tokens.weight"))
        state["lm_head.weight"] = state[table] if self.head != "stored" else state["lm_head.weight"].clone()
        self._write_weights(folder, state)
        settings = json.loads(model.config.to_json_string())
        settings["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        settings.pop("dtype", None)
        settings["architectures"] = [type(model).__name__]
        settings["transformers_version"] = "4.41.2"
        write_json(folder / "config.json", self.config(settings))
        if self.generation is not None:
            write_json(folder / "generation_config.json", {"pad_token_id": 0} | self.generation)
        self.write_processor(folder)
        for name, content in self.extra.items():
            write_json(folder / name, content)
        return state

    def _write_weights(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        stored = {self._on_disk(name): x for name, x in state.items() if self._is_stored(name)}
        if self.shards == 1:
            save_file(stored, folder / "model.safetensors", {"format": "pt"})
            return
        index: dict[str, str] = {}
        for part in range(self.shards):
            file = f"model-{part + 1:05d}-of-{self.shards:05d}.safetensors"
            names = list(stored)[part :: self.shards]
            save_file({name: stored[name] for name in names}, folder / file, {"format": "pt"})
            index |= dict.fromkeys(names, file)
        if self.head == "listed":
            index[self._on_disk("lm_head.weight")] = file
        size = sum(x.nbytes for x in stored.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index}
        )

    def _is_stored(self, name: str) -> bool:
        return name != "lm_head.weight" or self.head == "stored"

    def _on_disk(self, name: str) -> str:
        for own, old in self.names.items():
            if name.startswith(own):
                return name.replace(own, old, 1)
        return name

    def write_processor(self, folder: Path) -> None:
        """Write the files of tokenizer, processor and chat template."""
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

        name = {"processor_class": PROCESSOR_MAPPING_NAMES[self.family]}
        build_processor(None).tokenizer.save_pretrained(folder)
        vocabulary = (folder / "tokenizer.json").read_text()
        for old, new in self.tokens.items():
            vocabulary = vocabulary.replace(f'"{old}"', f'"{new}"')
        (folder / "tokenizer.json").write_text(vocabulary)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | name
        settings["extra_special_tokens"] = dict(self.special)
        whole = None if self.whole is None else self.whole | name
        template = TEMPLATE.replace(
            "<image>", "<image>" if self.special is SPECIAL else self.special.get("boi_token", "<image>")
        )
        match self.template:
            case "list":
                other = {"name": "tool_use", "template": "{{ raise_exception('no tools') }}"}
                settings["chat_template"] = [{"name": "default", "template": template}, other]
            case "tokenizer_config.json":
                settings["chat_template"] = template
            case "processor_config.json":
                whole = (whole or name) | {"chat_template": template}
            case "chat_template.json":
                write_json(folder / self.template, {"chat_template": template})
            case "chat_template.jinja":
                (folder / self.template).write_text(template)
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "preprocessor_config.json", {"do_convert_rgb": True} | name | self.images)
        if whole is not None:
            write_json(folder / "processor_config.json", whole)


def write_json(file: Path, content: Any) -> None:
    """Write what the Hub's files hold: indented JSON."""
    file.write_text(json.dumps(content, indent=2))


# --- configs as releases of transformers before 5 wrote them


def _old_llava(config: Json) -> Json:
    """The placeholder under its older name, and what the class no longer reads."""
    config["image_token_index"] = config.pop("image_token_id", tiny.IMAGE_ID)
    return config | {"ignore_index": -100, "projector_hidden_act": "gelu", "pad_token_id": 0}


def _tied(config: Json, where: str | None = None) -> Json:
    """Tied, at the top or in a part; the other place says nothing."""
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (config[where] if where else config)["tie_word_embeddings"] = True
    return config


def _flat(config: Json) -> Json:
    """The text model's settings at the top, as Qwen2-VL and Qwen2.5-VL were published."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type", None)
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "use_sliding_window": False,
        "max_window_layers": LAYERS,
        "sliding_window": 512,
    }
    config["vision_config"] = config["vision_config"] | {"spatial_patch_size": 4}
    return text | config


def _silent(config: Json) -> Json:
    """No word about ties at the top, where the class's default is that they are; the text model says they are not."""
    config.pop("tie_word_embeddings", None)
    config["text_config"]["tie_word_embeddings"] = False
    return config


def _gemma3(config: Json) -> Json:
    config["image_token_index"] = config.pop("image_token_id", tiny.IMAGE_ID)
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    return config | {"eos_token_id": [2, 95], "boi_token_index": 96, "eoi_token_index": 94}


def _without_architectures(config: Json) -> Json:
    config.pop("architectures")
    return _old_llava(config) | {"_name_or_path": "../models/checkpoint-1200"}


LAYOUTS: dict[str, Layout] = {
    "llava-hf/llava-1.5-7b-hf": Layout(
        "llava",
        {"image_processor_type": "CLIPImageProcessor", **CLIP},
        LLAVA,
        torch.float16,
        shards=3,
        config=_old_llava,
        whole=PATCHES,
    ),
    "a fine-tuned LLaVA-1.5, saved by transformers 5": Layout(
        "llava",
        {"image_processor_type": "CLIPImageProcessor", **CLIP},
        WITHIN,
        torch.float32,
        whole=PATCHES,
        template="chat_template.jinja",
        extra={"training_args.json": {"seed": 42}},
    ),
    "llava-hf/vip-llava-7b-hf": Layout(
        "vipllava",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 8},
            "crop_size": {"height": 8, "width": 8},
        },
        LLAVA,
        torch.float16,
        config=_without_architectures,
        generation=None,
        whole=PATCHES,
        template="processor_config.json",
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": Layout(
        "llava_next",
        {"image_processor_type": "LlavaNextImageProcessor", **TILES, "crop_size": {"height": 8, "width": 8}},
        LLAVA,
        torch.float16,
        shards=2,
        config=_old_llava,
        whole=PATCHES,
        template="tokenizer_config.json",
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Layout(
        "llava_onevision",
        {"image_processor_type": "LlavaOnevisionImageProcessor", **TILES},
        LLAVA,
        torch.float16,
        head="tied",
        config=lambda config: _tied(_old_llava(config), "text_config"),
        generation={"eos_token_id": 2, "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        whole={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        extra={"video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor"}},
    ),
    "Qwen/Qwen2-VL-2B-Instruct": Layout(
        "qwen2_vl",
        {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_PIXELS, "min_pixels": 64, "max_pixels": 256},
        QWEN,
        shards=2,
        head="listed",
        config=lambda config: _flat(_tied(config)),
        generation={"eos_token_id": [2, 95], **SAMPLING},
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": Layout(
        "qwen2_5_vl",
        {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_PIXELS, "size": SMALLEST},
        QWEN,
        shards=2,
        config=_flat,
        generation={
            "eos_token_id": [2, 95],
            "repetition_penalty": 1.05,
            "do_sample": True,
            "temperature": 1e-6,
        },
    ),
    "a fine-tuned Qwen2.5-VL, saved by transformers 4.52": Layout(
        "qwen2_5_vl",
        {"image_processor_type": "Qwen2VLImageProcessorFast", **QWEN_PIXELS, "size": SMALLEST},
        {},
        generation={"eos_token_id": [2, 95], **SAMPLING},
        template="chat_template.jinja",
        extra={"video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"}},
    ),
    "Qwen/Qwen3-VL-4B-Instruct": Layout(
        "qwen3_vl",
        {"image_processor_type": "Qwen2VLImageProcessorFast", **QWEN_PIXELS, "size": SMALLEST},
        head="tied",
        config=_tied,
        generation={
            "eos_token_id": [2, 95],
            "do_sample": True,
            "top_p": 0.8,
            "top_k": 20,
            "temperature": 0.7,
        },
        extra={"video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"}},
    ),
    "OpenGVLab/InternVL3-8B-hf": Layout(
        "internvl",
        {"image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 16, "width": 16}}
        | {"crop_to_patches": False, "min_patches": 1, "max_patches": 12},
        PLAIN_TOWER,
        shards=2,
        config=_silent,
        whole={"image_seq_length": 4},
        template="chat_template.jinja",
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": Layout(
        "smolvlm",
        {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 16}}
        | {"max_image_size": {"longest_edge": 16}, "do_image_splitting": False},
        dtype=torch.float32,
        whole={"image_seq_len": 4},
        generation={"eos_token_id": 95},
        tokens={"<unused92>": "<fake_token_around_image>", "<unused93>": "<global-img>"}
        | {"<unused95>": "<end_of_utterance>"},
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": Layout(
        "idefics3",
        {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 16}}
        | {"max_image_size": {"longest_edge": 16}, "do_image_splitting": False},
        shards=4,
        whole={"image_seq_len": 4},
        generation={"eos_token_id": [2, 95]},
        tokens={"<unused92>": "<fake_token_around_image>", "<unused93>": "<global-img>"}
        | {"<unused95>": "<end_of_utterance>"},
    ),
    "google/paligemma-3b-mix-224": Layout(
        "paligemma",
        {"image_processor_type": "SiglipImageProcessor", **SQUARE, "image_seq_length": 4},
        LLAVA,
        torch.float32,
        head="tied",
        config=_old_llava,
        template=None,
        tokens={"<unused91>": "<bos>"},
    ),
    "google/gemma-3-4b-it": Layout(
        "gemma3",
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}},
        LLAVA,
        shards=2,
        head="tied",
        config=_gemma3,
        generation={"eos_token_id": [2, 95], "do_sample": True, "top_k": 64, "top_p": 0.95}
        | {"cache_implementation": "hybrid"},
        whole={"image_seq_length": 4},
        tokens={"<unused96>": "<start_of_image>", "<unused94>": "<end_of_image>"},
        special={"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    ),
    "CohereLabs/aya-vision-8b": Layout(
        "aya_vision",
        {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 16, "width": 16}}
        | {"crop_to_patches": False},
        LLAVA,
        torch.float16,
        shards=2,
        head="tied",
        config=_old_llava,
        whole={"patch_size": 4, "img_size": 16, "downsample_factor": 2},
        template="list",
        tokens={"<image>": "<|IMG_PATCH|>", "<unused97>": "<image>", "<unused96>": "<|START_OF_IMG|>"}
        | {"<unused95>": "<|END_OF_IMG|>"},
        special={},
    ),
    "zai-org/GLM-4.1V-9B-Thinking": Layout(
        "glm4v",
        {"image_processor_type": "Glm4vImageProcessor", **QWEN_PIXELS, "size": TWO_FRAMES},
        shards=2,
        generation={"eos_token_id": [2, 93, 95], "do_sample": True, "temperature": 0.8, "top_p": 0.6},
        template="chat_template.jinja",
        extra={"video_preprocessor_config.json": {"video_processor_type": "Glm4vVideoProcessor"}},
    ),
}
