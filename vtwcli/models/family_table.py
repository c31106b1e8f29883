"""The rows of the family table, and what is no row; ``families`` is how others read them."""

from __future__ import annotations

from typing import Any

from vtwcli.models.family import Family

SEQUENTIAL = "its recurrent or convolutional layers carry visual tokens on in their state"
_CROSS = "its text reads images by cross-attention, so there are no visual tokens in the text"
_NO_ENCODER = "its vision encoder has no export yet"
_RESAMPLED = "its visual tokens are not of single patches, they each gather from the whole image"
_RELATIVE = "its vision tower adds relative positions inside attention, which is not looked into"
_BLOCKS = "its image tokens attend to each other in both directions, which the exported graphs do not"


def refused(reason: str) -> dict[str, Any]:
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
            no_tower=_RELATIVE,
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
            "glm46v",
            "GLM-4.6V",
            "zai-org/GLM-4.6V-Flash",
            "Glm46VForConditionalGeneration",
            **_GLM,
        ),
        Family(
            "glmga",
            "GLM-4.1V, later layout",
            "zai-org/GLM-4.1V-9B-Thinking",
            "Glm46VForConditionalGeneration",
            **_GLM,
        ),
        Family("glm_ocr", "GLM-OCR", "zai-org/GLM-OCR", "GlmOcrForConditionalGeneration", **_GLM),
        Family(
            "qianfan_ocr",
            "Qianfan-OCR",
            "baidu/Qianfan-OCR",
            "QianfanOCRForConditionalGeneration",
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "exaone4_5",
            "EXAONE 4.5",
            "LGAI-EXAONE/EXAONE-4.5-33B",
            "Exaone4_5_ForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            caveat=_WINDOWS,
            **_QWEN,
        ),
        Family(
            "paddleocr_vl",
            "PaddleOCR-VL",
            "PaddlePaddle/PaddleOCR-VL",
            "PaddleOCRVLForConditionalGeneration",
            vision=("model.visual", "model.projector"),
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "hunyuan_vl",
            "HunyuanOCR, HunyuanVL",
            "tencent/HunyuanOCR",
            "HunYuanVLForConditionalGeneration",
            vision=("model.vision_tower",),
            no_onnx=_NO_ENCODER,
            caveat="Row breaks, begin and end of an image are visual tokens and leave too.",
        ),
        Family(
            "hyperclovax_vision_v2",
            "HyperCLOVA X SEED Think",
            "naver-hyperclovax/HyperCLOVAX-SEED-Think-32B",
            "HyperCLOVAXVisionV2ForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            **_QWEN | {"vision": ("model.vision_model", "model.projector")},
        ),
        Family(
            "perception_lm",
            "PerceptionLM",
            "facebook/Perception-LM-1B",
            "PerceptionLMForConditionalGeneration",
            placeholders=("image_token_id", "video_token_id"),
            video=True,
            no_onnx=_NO_ENCODER,
        ),
        Family(
            "fast_vlm",
            "FastVLM",
            "KamilaMila/FastVLM-0.5B",
            "FastVlmForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            no_tower="most of its vision tower is convolutions, which have no attention to look at",
        ),
        Family(
            "deepseek_vl_hybrid",
            "DeepSeek-VL 7B",
            "deepseek-community/deepseek-vl-7b-chat",
            "DeepseekVLHybridForConditionalGeneration",
            vision=(
                "model.vision_model",
                "model.high_res_vision_model",
                "model.high_res_vision_neck",
                "model.high_res_vision_proj",
                "model.high_res_vision_alpha",
                "model.aligner",
            ),
            no_onnx=_NO_ENCODER,
            no_tower="two vision towers share each of its visual tokens",
        ),
        Family(
            "janus",
            "Janus-Pro",
            "deepseek-community/Janus-Pro-1B",
            "JanusForConditionalGeneration",
            vision=("model.vision_model", "model.aligner"),
            beside=(
                "model.vqmodel",
                "model.generation_embeddings",
                "model.generation_aligner",
                "model.generation_head",
            ),
            no_onnx=_NO_ENCODER,
            caveat="Answers in text; what draws images is left as it is.",
        ),
        Family(
            "kimi_k25",
            "Kimi K2.5, K2.6",
            "moonshotai/Kimi-K2.6",
            "Kimi_K25ForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            placeholder_apart=True,
            **_QWEN | {"vision": ("model.vision_tower", "model.mm_projector")},
        ),
        Family(
            "pp_chart2table",
            "PP-Chart2Table",
            "PaddlePaddle/PP-Chart2Table_safetensors",
            "GotOcr2ForConditionalGeneration",
            no_onnx=_NO_ENCODER,
            no_tower=_RELATIVE,
        ),
        Family(
            "cohere_compass",
            "North Micro Vision",
            "CohereLabs/North-Micro-Vision-Instruct",
            "CohereCompassForConditionalGeneration",
            **_DEEPSTACK,
        ),
        Family(
            "qwen3_5",
            "Qwen3.5",
            "Qwen/Qwen3.5-27B",
            "Qwen3_5ForConditionalGeneration",
            **refused(SEQUENTIAL),
            **_QWEN,
        ),
        Family(
            "lfm2_vl",
            "LFM2-VL",
            "LiquidAI/LFM2-VL-1.6B",
            "Lfm2VlForConditionalGeneration",
            **refused(SEQUENTIAL),
        ),
        Family(
            "mllama",
            "Llama 3.2 Vision",
            "meta-llama/Llama-3.2-11B-Vision-Instruct",
            "MllamaForConditionalGeneration",
            vision=("model.vision_model", "model.multi_modal_projector"),
            **refused(_CROSS),
        ),
    )
}
