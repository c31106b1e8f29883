"""The family table: one row per ``model_type`` that the tool understands.

A row says where things live inside the stock transformers model and which assumptions hold, so that no other
module knows a family by name. Torch-free: the command line reads it for help and error messages.

To add a family: write its row here, and a tiny model built from config beside the others in ``tests/tiny.py``.
The tests find both and check them: paths, placeholder ids, runtime and sweep against the slow reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vtwcli.errors import NotFoundError

_SEQUENTIAL = "its recurrent or convolutional layers carry visual tokens on in their state"
_CROSS = "its text reads images by cross-attention, so there are no visual tokens in the text"
_NO_ENCODER = "its vision encoder has no export yet"
_RESAMPLED = "its visual tokens are not of single patches, they each gather from the whole image"
_STREAMS = "by AltUp its layers hand on several streams for each token, which are not taken apart yet"
_BLOCKS = "its image tokens attend to each other in both directions, which the exported graphs do not"
_CLASS_TOKENS = {"clip_vision_model", "internvl_vision"}  # vision towers that have one
_ATTENTION = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
}  # layer types that withdrawal is proved for


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, and what may be done with it.

    Attributes:
        model_type: ``config.model_type`` of its checkpoints.
        title: name for people.
        example: a public checkpoint.
        architecture: class name in transformers.
        text_model: attribute path from the top-level model to the text model, which has ``embed_tokens``,
            ``layers``, ``norm`` and ``rotary_emb``.
        head: attribute path of the output projection.
        vision: attribute paths of everything needed to turn pixels into visual tokens: modules or parameters.
        placeholders: config attributes that hold the ids of visual tokens in ``input_ids``. Separators whose
            embedding is text (row breaks, image start and end) are text tokens and stay.
        video: whether videos have visual tokens too.
        first_withdrawal: the first layer at which withdrawal is exact (above 0 where early layers add vision again).
        deepstack: dotted config attribute with the list of vision layers that feed the first text layers; where
            it is set, ``family_of`` gives its length as ``first_withdrawal``.
        answer_token_type: what ``token_type_ids`` hold for answer tokens, as ``generate`` continues them.
        prompt: the prompt of checkpoints that come without a chat template; ``{images}`` are the placeholders.
        placeholder_apart: whether the model takes the image placeholder out of ``input_ids`` before they are embedded,
            so that its id may lie outside the embedding.
        no_withdraw: reason why withdrawal is refused, or None.
        no_onnx: reason why there is no ONNX export, or None.
        no_tower: reason why scores of its vision tower are refused, or None.
        caveat: a sentence for the table of families.
    """

    model_type: str
    title: str
    example: str
    architecture: str
    text_model: str = "model.language_model"
    head: str = "lm_head"
    vision: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector")
    placeholders: tuple[str, ...] = ("image_token_id",)
    video: bool = False
    first_withdrawal: int = 0
    deepstack: str | None = None
    answer_token_type: int = 0
    prompt: str | None = None
    placeholder_apart: bool = False
    no_withdraw: str | None = None
    no_onnx: str | None = None
    no_tower: str | None = None
    caveat: str = ""


def _refused(reason: str) -> dict[str, Any]:
    """The flags of a family that is in the table only to say why nothing can be withdrawn from it."""
    return {"no_withdraw": reason, "no_onnx": reason}


_QWEN: dict[str, Any] = {
    "vision": ("model.visual",),
    "placeholders": ("image_token_id", "video_token_id"),
    "video": True,
}
_DEEPSTACK = _QWEN | {
    "deepstack": "vision_config.deepstack_visual_indexes",
    "no_onnx": "early layers add visual features by position, which the exported graphs do not",
    "caveat": "DeepStack adds vision again in the first layers; withdrawal starts behind them.",
}
_WINDOWS = "Sliding windows count original positions."
_FRAMES = "Frames of a video use the image's placeholder."
_GLM: dict[str, Any] = {
    "vision": ("model.visual",),
    "video": True,
    "no_onnx": _NO_ENCODER,
    "caveat": _FRAMES,
}
_IDEFICS: dict[str, Any] = {
    "text_model": "model.text_model",
    "vision": ("model.vision_model", "model.connector"),
}

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "llava",
            "LLaVA-1.5",
            "llava-hf/llava-1.5-7b-hf",
            "LlavaForConditionalGeneration",
            prompt="USER: {images}\n{text} ASSISTANT:",
            caveat="Also LLaVA-shaped models with another tower, such as Pixtral-12B.",
        ),
        Family(
            "llava_next",
            "LLaVA-NeXT",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            "LlavaNextForConditionalGeneration",
            vision=("model.vision_tower", "model.multi_modal_projector", "model.image_newline"),
            caveat="The number of visual tokens follows the image's shape.",
        ),
        Family(
            "llava_onevision",
            "LLaVA-OneVision",
            "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            "LlavaOnevisionForConditionalGeneration",
            vision=("model.vision_tower", "model.multi_modal_projector", "model.image_newline"),
            placeholders=("image_token_id", "video_token_id"),
            video=True,
            caveat="The number of visual tokens follows the image's shape.",
        ),
        Family(
            "llava_next_video",
            "LLaVA-NeXT-Video",
            "llava-hf/LLaVA-NeXT-Video-7B-hf",
            "LlavaNextVideoForConditionalGeneration",
            vision=(
                "model.vision_tower",
                "model.multi_modal_projector",
                "model.vision_resampler",
                "model.image_newline",
            ),
            placeholders=("image_token_id", "video_token_id"),
            video=True,
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "video_llava",
            "Video-LLaVA",
            "LanguageBind/Video-LLaVA-7B-hf",
            "VideoLlavaForConditionalGeneration",
            vision=("model.video_tower", "model.image_tower", "model.multi_modal_projector"),
            placeholders=("image_token_id", "video_token_id"),
            video=True,
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "vipllava",
            "ViP-LLaVA",
            "llava-hf/vip-llava-7b-hf",
            "VipLlavaForConditionalGeneration",
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "qwen2_vl", "Qwen2-VL", "Qwen/Qwen2-VL-7B-Instruct", "Qwen2VLForConditionalGeneration", **_QWEN
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "Qwen2_5_VLForConditionalGeneration",
            **_QWEN,
        ),
        Family(
            "qwen3_vl",
            "Qwen3-VL",
            "Qwen/Qwen3-VL-8B-Instruct",
            "Qwen3VLForConditionalGeneration",
            **_DEEPSTACK,
        ),
        Family(
            "qwen3_vl_moe",
            "Qwen3-VL MoE",
            "Qwen/Qwen3-VL-30B-A3B-Instruct",
            "Qwen3VLMoeForConditionalGeneration",
            **_DEEPSTACK,
        ),
        Family(
            "glm4v",
            "GLM-4.1V",
            "zai-org/GLM-4.1V-9B-Thinking",
            "Glm4vForConditionalGeneration",
            **_GLM,
        ),
        Family(
            "glm4v_moe",
            "GLM-4.5V",
            "zai-org/GLM-4.5V",
            "Glm4vMoeForConditionalGeneration",
            **_GLM,
        ),
        Family(
            "video_llama_3",
            "VideoLLaMA 3",
            "lkhl/VideoLLaMA3-2B-Image-HF",
            "VideoLlama3ForConditionalGeneration",
            vision=("model.vision_model", "model.projector"),
            placeholders=("image_token_id", "video_token_id"),
            video=True,
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "internvl",
            "InternVL 2.5, 3",
            "OpenGVLab/InternVL3-1B-hf",
            "InternVLForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            caveat=_FRAMES,
        ),
        Family(
            "idefics2",
            "Idefics2",
            "HuggingFaceM4/idefics2-8b",
            "Idefics2ForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            no_tower=_RESAMPLED,
            **_IDEFICS,
        ),
        Family(
            "idefics3",
            "Idefics3, SmolVLM",
            "HuggingFaceM4/Idefics3-8B-Llama3",
            "Idefics3ForConditionalGeneration",
            **_IDEFICS,
        ),
        Family(
            "smolvlm",
            "SmolVLM2",
            "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
            "SmolVLMForConditionalGeneration",
            caveat=_FRAMES,
            **_IDEFICS,
        ),
        Family(
            "mistral3",
            "Mistral Small 3.1",
            "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
            "Mistral3ForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            caveat="The row breaks between visual tokens are text and stay.",
        ),
        Family(
            "lighton_ocr",
            "LightOnOCR",
            "lightonai/LightOnOCR-1B-1025",
            "LightOnOcrForConditionalGeneration",
            vision=("model.vision_encoder", "model.vision_projection"),
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "gemma3",
            "Gemma 3",
            "google/gemma-3-4b-it",
            "Gemma3ForConditionalGeneration",
            no_onnx=_BLOCKS,
            caveat=_WINDOWS,
            placeholder_apart=True,
        ),
        Family(
            "paligemma",
            "PaliGemma, PaliGemma 2",
            "google/paligemma2-3b-mix-224",
            "PaliGemmaForConditionalGeneration",
            answer_token_type=1,
            prompt="{images}{text}",
            no_onnx="its whole prompt attends in both directions, which the exported graphs do not",
            placeholder_apart=True,
        ),
        Family(
            "aya_vision",
            "Aya Vision",
            "CohereLabs/aya-vision-8b",
            "AyaVisionForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            caveat=_WINDOWS,
        ),
        Family(
            "cohere2_vision",
            "Command A Vision",
            "CohereLabs/command-a-vision-07-2025",
            "Cohere2VisionForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            caveat=_WINDOWS,
        ),
        Family(
            "aria",
            "Aria",
            "rhymes-ai/Aria",
            "AriaForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            no_tower=_RESAMPLED,
        ),
        Family(
            "got_ocr2",
            "GOT-OCR 2.0",
            "stepfun-ai/GOT-OCR-2.0-hf",
            "GotOcr2ForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            no_tower="its vision tower adds relative positions inside attention, which is not looked into",
        ),
        Family(
            "ovis2",
            "Ovis2",
            "thisisiron/Ovis2-1B-hf",
            "Ovis2ForConditionalGeneration",
            vision=("model.vision_tower", "model.visual_embeddings_table"),
            no_onnx=_NO_ENCODER,
            caveat="The indicator tokens around an image stay.",
        ),
        Family(
            "deepseek_vl",
            "DeepSeek-VL",
            "deepseek-community/deepseek-vl-1.3b-chat",
            "DeepseekVLForConditionalGeneration",
            vision=("model.vision_model", "model.aligner"),
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "molmo2",
            "Molmo 2",
            "allenai/Molmo2-8B",
            "Molmo2ForConditionalGeneration",
            video=True,
            no_onnx=_BLOCKS,
            no_tower="its visual tokens pool patches by attention",
            caveat=_FRAMES,
        ),
        Family(
            "gemma4",
            "Gemma 4",
            "google/gemma-4-E4B-it",
            "Gemma4ForConditionalGeneration",
            vision=("model.vision_tower", "model.embed_vision"),
            placeholders=("image_token_id", "video_token_id"),
            video=True,
            no_onnx=_NO_ENCODER,
            no_tower="its visual tokens pool patches by their positions, which is not looked into",
            caveat=f"{_WINDOWS} Layers that share keys and values leave out those of withdrawn tokens.",
            placeholder_apart=True,
        ),
        Family(
            "llama4",
            "Llama 4",
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "Llama4ForConditionalGeneration",
            text_model="language_model.model",
            head="language_model.lm_head",
            vision=("vision_model", "multi_modal_projector"),
            no_onnx=_NO_ENCODER,
            no_tower="its vision tower turns patches by a table of its own, which is not looked into",
            caveat="Chunks count original positions.",
        ),
        Family(
            "qwen3_5",
            "Qwen3.5",
            "Qwen/Qwen3.5-27B",
            "Qwen3_5ForConditionalGeneration",
            **_refused(_SEQUENTIAL),
            **_QWEN,
        ),
        Family(
            "lfm2_vl",
            "LFM2-VL",
            "LiquidAI/LFM2-VL-1.6B",
            "Lfm2VlForConditionalGeneration",
            **_refused(_SEQUENTIAL),
        ),
        Family(
            "gemma3n",
            "Gemma 3n",
            "google/gemma-3n-E4B-it",
            "Gemma3nForConditionalGeneration",
            vision=("model.vision_tower", "model.embed_vision"),
            **_refused(_STREAMS),
        ),
        Family(
            "mllama",
            "Llama 3.2 Vision",
            "meta-llama/Llama-3.2-11B-Vision-Instruct",
            "MllamaForConditionalGeneration",
            vision=("model.vision_model", "model.multi_modal_projector"),
            **_refused(_CROSS),
        ),
    )
}


def supported() -> str:
    """The hint of an error: the families that something can be withdrawn from."""
    names = sorted(name for name, row in FAMILIES.items() if not row.no_withdraw)
    return f"supported families: {', '.join(names)}; `vtw docs internals` says how to add one"


def family_of(config: Any) -> Family:
    """The row for a transformers config, with what depends on the config filled in.

    ``first_withdrawal`` follows the number of DeepStack layers, and a text model with layers other than attention
    is refused whatever its family.

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
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None
    if not row.no_withdraw and not _ATTENTION.issuperset(getattr(text_config, "layer_types", None) or ()):
        row = replace(row, **_refused(_SEQUENTIAL))
    return row


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
