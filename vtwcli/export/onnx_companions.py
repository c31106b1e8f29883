"""What lies beside exported ONNX graphs: config, processor, licence, the runtime, its example script, and the words
that tell others how to drive the graphs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.export.manifest import save_json
from vtwcli.models import templates
from vtwcli.models.checkpoint import LEGAL, quiet_libraries
from vtwcli.ort import MANIFEST

if TYPE_CHECKING:
    from vtwcli.export.onnx_source import Source

_PROCESSOR, _VIDEO = "processor_config.json", "video_preprocessor_config.json"
_QUESTION = "\0question\0"


def write_companions(source: Source, manifest: dict[str, Any], folder: Path) -> None:
    """Write everything beside the graphs, and complete the manifest with what comes from it; both are saved.

    Args:
        source: the model.
        manifest: as ``write_graphs`` made it; gets token ids, prompts and ``how_to``.
        folder: where to write.

    Raises:
        NotFoundError: the model has no processor.
    """
    from vtwcli import ort

    processor, generation, config = (
        source.processor(),
        source.generation_config(),
        copy.deepcopy(source.config),
    )
    for name in ("vtw", "auto_map"):  # of a model that was exported before; no code comes along here
        if hasattr(config, name):
            delattr(config, name)
    with quiet_libraries():
        processor.save_pretrained(folder)
        generation.save_pretrained(folder)
        config.save_pretrained(folder)
    if source.checkpoint is not None:
        for file in (file for pattern in LEGAL for file in source.checkpoint.path.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
        _keep_video_part(source.checkpoint.path, folder)
    tokenizer = processor.tokenizer
    ends = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, Sequence) else [ends]
    pads = (generation.pad_token_id, tokenizer.pad_token_id, *ends, 0)
    manifest["tokens"] |= {
        "eos_ids": [int(i) for i in ends],
        "pad_id": int(next(i for i in pads if i is not None)),
        "bos": tokenizer.bos_token,
        "image": getattr(processor, "image_token", None),
    }
    manifest["prompt"] = _prompts(processor, source.checkpoint.path if source.checkpoint else None)
    manifest["how_to"] = _how_to(manifest)
    shutil.copyfile(Path(ort.__file__), folder / "vtw_ort.py")
    shutil.copyfile(Path(__file__).with_name("run_onnx.py"), folder / "run_onnx.py")
    save_json(folder / MANIFEST, manifest)


def _keep_video_part(path: Path, folder: Path) -> None:
    """Carry along the settings of the processor's video part, without which it may have been read."""
    if (path / _VIDEO).is_file():
        shutil.copyfile(path / _VIDEO, folder / _VIDEO)
    elif (path / _PROCESSOR).is_file():
        settings = json.loads((path / _PROCESSOR).read_text(encoding="utf-8"))
        if "video_processor" in settings:
            save_json(folder / _VIDEO, settings["video_processor"])


def _prompts(processor: Any, path: Path | None) -> dict[str, str] | None:
    """The chat template's text before and behind a question, with one image and without; None without a template."""
    template = templates.template_of(processor)
    if template is None:
        return None
    texts = {}
    for name, parts in (("image", [{"type": "image"}]), ("text", [])):
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": _QUESTION}]}
        templates.check(processor, template, path, [turn], True)
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        texts[name] = text.replace(_QUESTION, "{question}")
    return texts


def _how_to(manifest: Mapping[str, Any]) -> list[str]:
    """The steps of a generation in words, for those who drive the graphs from another language."""
    decoders = [graph for graph in manifest["graphs"] if graph["layers"] is not None]
    inputs = {port["name"] for graph in decoders for port in graph["inputs"]}
    steps = [
        "vision_encoder: pixel values to features; one feature row for each placeholder token of the prompt, in order",
        "embed_tokens: input_ids [B, S] to inputs_embeds; put the feature rows in the place of the placeholders",
        f"then {', '.join(graph['role'] for graph in decoders)}: each takes the hidden states of the one before it, "
        "the first the embeddings",
        "attention_mask covers a graph's past and new tokens, 1 for tokens and 0 for padding; position_ids count the "
        "tokens of the row from 0, padding apart"
        + (", on three axes (time, row, column)" if manifest["positions"] == "grid" else ""),
        "past_key_values start with length 0; each present is the past of the next step",
        "logits_index [B, M]: the rows whose logits are wanted; for generation the last token of each row",
    ]
    if "keep_index" in inputs:
        steps.append(
            "keep_index [B, T]: the places of the tokens that stay, in rising order; rows with fewer are filled in "
            "front with any place, and masked there. All text stays, and of n visual tokens what the graph's removal "
            "says: withdraw none; keep m, the count (at most n) or the ratio of n rounded up: uniform those at "
            "ceil(i n / m) for i = 0..m-1, else those with the highest scores, the earlier among equals. In a step "
            "with one new token keep_index is [[0]]"
        )
        if manifest["merged"]:
            steps.append(
                "attention_mask and position_ids are those of all S tokens, kept_attention_mask covers the kept past "
                "and the T places; logits_index counts in the T places"
            )
        else:
            steps.append(
                "attention_mask, position_ids and logits_index of a graph with keep_index are those of the T places"
            )
    if "score_index" in inputs:
        steps.append(
            "score_index [B, 1]: the last token of each row; the scores are for the choice of the next graph's "
            "keep_index, in the prompt only"
        )
    return steps
