"""What lies beside exported ONNX graphs: config, processor, licence, the runtime, its example script, and the words
that tell others how to drive the graphs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vtwcli.export.directory.manifest import save_json, save_settings
from vtwcli.export.directory.own_code import without_code_map
from vtwcli.export.directory.source import own_files
from vtwcli.io import text
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.checkpoint import LEGAL
from vtwcli.models.jsonfiles import read_json
from vtwcli.ort import MANIFEST
from vtwcli.schedule import Schedule
from vtwcli.schedule.sentences import describe

if TYPE_CHECKING:
    from vtwcli.export.onnx.source import Source

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
    processor, tokens = save_settings_of(source, folder)
    manifest["tokens"] |= tokens
    manifest["prompt"] = _prompts(source, processor)
    manifest["how_to"] = _how_to(manifest)
    for name, script in scripts().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(script, encoding="utf-8")
    save_json(folder / MANIFEST, manifest)


def save_settings_of(source: Source, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Write a model's processor, configs and licence; returns the processor and what a manifest says of tokens.

    Raises:
        NotFoundError: the model has no processor.
    """
    processor, generation, config = (
        source.processor(),
        source.generation_config(),
        copy.deepcopy(source.config),
    )
    if hasattr(config, "vtw"):  # of a model that was exported before
        del config.vtw
    if hasattr(config, "quantization_config"):  # the graphs hold the weights unpacked
        del config.quantization_config
    with quiet_libraries():
        processor.save_pretrained(folder)
        generation.save_pretrained(folder)
        config.save_pretrained(folder)
    for file in folder.glob("*config.json"):
        without_code_map(file)
    if source.checkpoint is not None:
        for file in own_files(source.checkpoint, LEGAL, warn=False):
            shutil.copyfile(file, folder / file.name)
        _keep_video_part(source.checkpoint.path, folder)
    tokenizer = processor.tokenizer
    ends = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, Sequence) else [ends]
    pads = (generation.pad_token_id, tokenizer.pad_token_id, *ends, 0)
    return processor, {
        "eos_ids": [int(i) for i in ends],
        "pad_id": int(next(i for i in pads if i is not None)),
        "bos": tokenizer.bos_token,
        "image": getattr(processor, "image_token", None),
    }


def onnx_card(name: str, manifest: Mapping[str, Any]) -> str:
    """The model card of a directory of graphs: what they are, what made them, with what they were checked.

    Args:
        name: of the directory.
        manifest: complete but for ``files``.
    """
    model, made, layers = manifest["model"], manifest["versions"], manifest["text"]["layers"]
    base = text.code(model["name"]) + (
        f" at revision {text.code(model['revision'])}" if model["revision"] else ""
    )
    actions = Schedule.from_dict(manifest["schedule"]).actions
    libraries = ", ".join(
        f"{library} {made[library]}" for library in ("transformers", "torch", "onnx", "onnxscript")
    )
    return f"""# {text.markdown(name)}

ONNX graphs of {base} with a visual token schedule baked in.

{chr(10).join(f"- {describe(action, layers)}" for action in actions) or "Nothing is pruned."}

Made by {manifest["producer"]} with {libraries}, and checked against torch with ONNX Runtime
{", ".join(manifest["tested"]["onnxruntime"])} (`parity.json`). To run, the graphs need ONNX Runtime or OpenVINO, but
neither torch nor transformers: `run_onnx.py` asks about a picture. `manifest.json` says how to drive the graphs and
holds the digest of every file; `vtw verify .` checks them.
"""


def scripts() -> dict[str, str]:
    """Name -> text of the Python files beside the graphs: the runtime, the reading of pictures, the script."""
    from vtwcli import ort
    from vtwcli.data import pixels
    from vtwcli.schedule import words

    own = {f"vtw_ort/{file.name}": file for file in sorted(Path(ort.__file__).parent.glob("*.py"))}
    own |= {
        "vtw_ort/words.py": Path(words.__file__),
        "vtw_pixels.py": Path(pixels.__file__),
        "run_onnx.py": Path(__file__).with_name("run_onnx.py"),
    }
    texts = {name: file.read_text(encoding="utf-8") for name, file in own.items()}
    moved = "from vtwcli.schedule.words import", "from .words import"
    return {name: text.replace(*moved) for name, text in texts.items()}


def _keep_video_part(path: Path, folder: Path) -> None:
    """Carry along the settings of the processor's video part, without which it may have been read."""
    if (path / _VIDEO).is_file():
        shutil.copyfile(path / _VIDEO, folder / _VIDEO)
    elif (path / _PROCESSOR).is_file():
        settings = read_json(path / _PROCESSOR)
        if "video_processor" in settings:
            save_settings(folder / _VIDEO, settings["video_processor"])


def _prompts(source: Source, processor: Any) -> dict[str, str] | None:
    """The chat template's text before and behind a question, with one image and without; None without a template.

    Raises:
        NotFoundError: the template fails, or drops the question.
    """
    import torch
    from PIL import Image

    from vtwcli.data.sample import Sample
    from vtwcli.models.inputs import prompt_text
    from vtwcli.models.loading import LoadedModel
    from vtwcli.models.templates import template_of

    if template_of(processor) is None:
        return None
    path = source.checkpoint.path if source.checkpoint is not None else Path()
    reader = LoadedModel(
        SimpleNamespace(config=source.config),
        processor,
        source.family,
        source.name,
        source.revision,
        path,
        torch.device("cpu"),
        torch.float32,
    )
    images = {"image": (Image.new("RGB", (1, 1)),), "text": ()}
    texts = {
        name: prompt_text(reader, Sample("prompt", name, some, _QUESTION)) for name, some in images.items()
    }
    return {name: text.replace(_QUESTION, "{question}") for name, text in texts.items()}


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
    for prefix, which in (("", "new"), ("kept_", "kept")):
        if f"{prefix}text_index" in inputs:
            steps.append(
                f"{prefix}text_index [B, T] and {prefix}visual_index [B, V]: the places of text and of visual tokens "
                f"among the {which} ones, padding apart; rows with fewer of a kind, or none, begin with the place of "
                "their last token. In a step with one new token both are [[0]]"
            )
    if "score_index" in inputs:
        steps.append(
            "score_index [B, 1]: the last token of each row; the scores are for the choice of the next graph's "
            "keep_index, in the prompt only"
        )
    return steps
