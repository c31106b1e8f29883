"""Numbers that published methods' own code gave on small random weights, and the model they were made with.

Each file holds what one repository's unmodified modules computed in float32; the decoder ``gqa`` is shared. Layers
count from 0; the prompt is 35 rows of text, 576 of the image, 20 of text.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
BEFORE, VISUAL = 35, 576
PLACEHOLDER = 254  # an id that none of the texts has


class Given(torch.nn.Module):
    """Stands where the projector stands, and hands out features that are given."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.empty(0)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.features[None]


def numbers(method: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A method's document and arrays."""
    return json.loads((HERE / f"{method}.json").read_text()), load_file(HERE / f"{method}.safetensors")


def model(dtype: torch.dtype = torch.float32, mha: bool = False) -> Any:
    """The decoder ``gqa`` inside a LLaVA whose projector is a ``Given``; ``mha``: with as many heads of keys and values
    as of queries, the further ones made of the others."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    given = json.loads((HERE / "gqa.config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
    del given["seed"]
    given |= {"num_key_value_heads": 4} if mha else {}
    text = LlamaConfig(**given, rope_parameters=rope, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4,
        patch_size=4,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=PLACEHOLDER)
    found: Any = LlavaForConditionalGeneration(config).eval()
    weights = load_file(HERE / "gqa.safetensors")
    for name, one in weights.items() if mha else ():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = torch.cat([one, one.flip(1)])
    named = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: one
        for name, one in weights.items()
    }
    missing, unexpected = found.load_state_dict(named, strict=False)
    assert not unexpected
    assert all("language_model" not in name and "lm_head" not in name for name in missing)
    found.model.multi_modal_projector = Given()
    found.generation_config.eos_token_id = None
    return found.to(dtype)


def inputs(model: Any, sample: int) -> dict[str, torch.Tensor]:
    """The model's inputs for a sample; its image's features are laid into the projector."""
    embeds = load_file(HERE / "gqa.inputs.safetensors")[f"inputs_embeds.{sample}"][0]
    model.model.multi_modal_projector.features = embeds[BEFORE : BEFORE + VISUAL].to(model.dtype)
    return {**inputs_ids(sample), "pixel_values": torch.zeros(1, 3, 4, 4, dtype=model.dtype)}


def seeing(dtype: torch.dtype = torch.float32) -> Any:
    """The decoder ``gqa`` inside a LLaVA whose vision tower is ``clip``; the projector is drawn."""
    from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

    config = model().config
    given = json.loads((HERE / "clip.config.json").read_text())
    config.vision_config = CLIPVisionConfig(**given)
    torch.manual_seed(0)
    found: Any = LlavaForConditionalGeneration(config).eval()
    found.load_state_dict(
        model().model.language_model.state_dict(prefix="model.language_model."), strict=False
    )
    found.lm_head.load_state_dict(model().lm_head.state_dict())
    tower = found.model.vision_tower
    named = {
        name.removeprefix("vision_model."): one for name, one in load_file(HERE / "clip.safetensors").items()
    }
    own = tower if hasattr(tower, "embeddings") else tower.vision_model  # older releases
    own.load_state_dict(named)
    found.generation_config.eos_token_id = None
    return found.to(dtype)


def pictured(model: Any, sample: int) -> dict[str, torch.Tensor]:
    """The inputs of ``seeing`` for a sample."""
    pixels = load_file(HERE / "clip.inputs.safetensors")["pixel_values"][sample : sample + 1]
    return {**inputs_ids(sample), "pixel_values": pixels.to(model.dtype)}


def inputs_ids(sample: int) -> dict[str, torch.Tensor]:
    """The prompt of a sample, with placeholders."""
    text = load_file(HERE / "gqa.inputs.safetensors")[f"text_ids.{sample}"].long()
    ids = torch.cat([text[:BEFORE], torch.full((VISUAL,), PLACEHOLDER), text[BEFORE:]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
