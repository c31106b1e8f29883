"""The settings files beside the graphs, as transformers.js reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtwcli.errors import UsageError
from vtwcli.export.directory.manifest import save_settings
from vtwcli.export.onnx.companions import save_settings_of
from vtwcli.export.onnx.source import Source
from vtwcli.export.web.graphs import GRIDS
from vtwcli.models.jsonfiles import CONFIG, GENERATION, PROCESSOR, TOKENIZER, read_json

TEXT_MODELS = {
    "arcee", "cohere", "cohere2", "gemma", "gemma2", "glm", "granite", "helium", "llama", "ministral", "mistral",
    "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_moe",
    "smollm3", "starcoder2",
}  # fmt: skip
"""Text models whose caches the library knows by ``text_config.model_type``."""

_PROCESSORS = {"llava_onevision": "LlavaProcessor"}  # the library has none of its own, and this one does it
_LAYERS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")


def check_config(source: Source) -> None:
    """Refuse what the library has no names for.

    Raises:
        UsageError: a text model that it does not know.
    """
    kind = source.config.get_text_config().model_type
    if kind not in TEXT_MODELS:
        raise UsageError(f"transformers.js has no cache for text models of the kind {kind}")


def write_settings(source: Source, folder: Path) -> dict[str, Any]:
    """Write config, generation config, processor and tokenizer; returns what a manifest says of tokens.

    Raises:
        NotFoundError: the model has no processor.
    """
    processor, tokens = save_settings_of(source, folder)
    kind = source.family.model_type
    settings = read_json(folder / PROCESSOR[0]) if (folder / PROCESSOR[0]).is_file() else {}
    image = settings.get("image_processor")
    if image is None:  # saved in a file of its own
        image = read_json(folder / PROCESSOR[1])
    name = _PROCESSORS.get(kind, type(processor).__name__)
    save_settings(folder / PROCESSOR[1], {**image, "processor_class": name})
    settings |= _placeholders(source, processor)
    save_settings(folder / PROCESSOR[0], settings)
    tokenizer = read_json(folder / TOKENIZER[1])
    template = getattr(processor, "chat_template", None) or getattr(
        processor.tokenizer, "chat_template", None
    )
    if isinstance(template, str):  # the library looks for it here
        save_settings(folder / TOKENIZER[1], tokenizer | {"chat_template": template})
    generation = read_json(folder / GENERATION)
    ends = {"eos_token_id": tokens["eos_ids"] or None, "pad_token_id": tokens["pad_id"]}
    save_settings(folder / GENERATION, {**generation, **{k: v for k, v in ends.items() if v is not None}})
    return tokens


def _placeholders(source: Source, processor: Any) -> dict[str, Any]:
    """What the library needs to put as many placeholders into a prompt as an image has features."""
    kind, vision = source.family.model_type, source.config.vision_config
    if kind in GRIDS:
        return {}
    if kind in ("idefics3", "smolvlm"):
        return {"image_seq_len": int(processor.image_seq_len)}
    counted = {"image_token": processor.image_token, "patch_size": int(vision.patch_size)}
    if kind == "llava_onevision":  # one more for the new line; transformers does not read it
        return {**counted, "num_additional_image_tokens": 1}
    # the library adds without asking for the strategy, transformers asks: so say it is all that is added
    extra = int(source.config.vision_feature_select_strategy != "default")
    return {**counted, "num_additional_image_tokens": extra, "vision_feature_select_strategy": "full"}


def write_config(source: Source, folder: Path, library: Mapping[str, Any]) -> None:
    """Complete the config: ``library`` is what the library reads on top, types and files of the graphs."""
    config = read_json(folder / CONFIG)
    text = source.config.get_text_config().to_dict()
    if source.family.model_type == "qwen2_vl":  # looked for beside model_type, not in text_config
        config |= {name: text[name] for name in _LAYERS if text.get(name) is not None}
    config["transformers.js_config"] = dict(library)
    save_settings(folder / CONFIG, config)
