"""Proves that an exported directory is whole, loads pruned, and computes what the runtime computes."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtwcli.data.sample import Sample
from vtwcli.errors import GateError, NotFoundError, UsageError, first_line
from vtwcli.export.directory.manifest import at_hand, check_files, file_totals, read_manifest
from vtwcli.export.directory.own_code import read_own_code
from vtwcli.export.hf.generation import REFUSED
from vtwcli.export.hf.remote import auto_map, remote_code
from vtwcli.io import console
from vtwcli.judge.kl import is_distribution, not_finite
from vtwcli.machine.libraries import quiet_libraries, quiet_quantizers
from vtwcli.machine.releases import installed
from vtwcli.models.dtypes import asked, name_of
from vtwcli.models.families import FAMILIES
from vtwcli.models.generation import cache_of
from vtwcli.models.hub import resolve
from vtwcli.models.inputs import encode
from vtwcli.models.jsonfiles import CONFIG, read_json
from vtwcli.models.loading import LoadedModel, choose_device, choose_dtype, load
from vtwcli.models.quantized import make_ready
from vtwcli.schedule.schedule import Schedule

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest logit; half precision: 1e-2


@dataclass(frozen=True)
class Generation:
    """One greedy generation.

    Attributes:
        tokens: new token ids [A].
        logits: of each new token, [A, V] float32, on the CPU.
        entries: entries in each layer's KV cache at the end.
    """

    tokens: Tensor
    logits: Tensor
    entries: list[int]


def verify_hf(
    directory: Path,
    sample: Sample,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 16,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check an exported directory, from its digests to what it generates.

    In order: every file against the manifest; all code in it against what this tool writes; loading as a user does,
    with ``trust_remote_code=True``; a greedy answer about an image; that visual tokens are gone where the schedule
    says so; and that tokens and logits are those of the base model under the runtime of this package. Where the base
    is not at hand, the directory's own weights take its place, loaded as the plain model.

    Args:
        directory: what ``export_hf`` made.
        sample: what to ask.
        base: the base model; by default the one in the manifest, if it is on this machine.
        device: as for ``load``.
        dtype: as for ``load``.
        max_new_tokens: length of the answer.
        trust_remote_code: run the directory's code also where it is not this tool's own, byte for byte.

    Returns:
        The report: ``directory``, ``model``, ``schedule``, ``files``, ``transformers`` (its releases), ``smoke``,
        ``compared_with``, ``max_logit_difference``, ``device`` and ``dtype``.

    Raises:
        GateError: a check failed; the message says which.
        NotFoundError: not an export, or it or the base cannot be read.
        UsageError: some code in the directory is not this tool's, and is not trusted; then nothing of it ran.
    """
    manifest = read_manifest(directory)
    files = check_files(directory, manifest)
    checked = None if trust_remote_code else _own_code(directory, manifest)
    quantization = resolve(str(directory)).quantization
    if quantization is not None:
        quantization.check_library(str(directory))
    loaded, name = _reference(directory, manifest, base, device, dtype)
    schedule = Schedule.from_dict(manifest["schedule"], "the manifest's schedule")
    encoded = encode(loaded, sample)
    wanted = _expected(loaded, encoded.inputs, schedule, max_new_tokens)
    processor, place, kind = loaded.processor, loaded.device, loaded.dtype
    spread = len(set(getattr(loaded.model, "hf_device_map", {}).values())) > 1
    del loaded
    gc.collect()  # two models of this size may not fit together
    with _only_checked(directory, checked) as source:
        model = _load_exported(source, directory, manifest, "auto" if spread else place, kind)
    try:
        with console.progress("generating"):
            got = _generate(model, encoded.inputs, max_new_tokens)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError, IndexError, KeyError) as error:
        raise GateError(
            f"{directory} loads, but does not generate: {first_line(error)}", "export it again"
        ) from error
    visual_tokens = int(encoded.visual.sum())
    text_tokens = encoded.prompt_length - visual_tokens
    trace = model.vtw_pruning.trace  # none where the schedule never acts
    present = trace.samples[0].visual_per_layer if trace else [visual_tokens] * len(got.entries)
    _check_gone(got, present, schedule, text_tokens, visual_tokens)
    difference = _check_same(got, wanted, kind, name)
    return {
        "directory": str(directory),
        "model": manifest["model"],
        "schedule": manifest["schedule"],
        "files": {**file_totals(manifest), **files},
        "transformers": {
            "installed": installed("transformers"),
            "exported_with": manifest["versions"]["transformers"],
            "tested": manifest.get("tested", {}).get("transformers", []),
        },
        "smoke": {
            "image": sample.id,
            "prompt": sample.prompt,
            "answer": processor.tokenizer.decode(got.tokens, skip_special_tokens=True).strip(),
            "tokens": got.tokens.tolist(),
            "text_tokens": text_tokens,
            "visual_tokens": visual_tokens,
            "visual_per_layer": present,
            "cache_entries": got.entries,
        },
        "compared_with": name,
        "max_logit_difference": difference,
        "device": str(place),
        "dtype": name_of(kind),
    }


def _reference(
    directory: Path, manifest: dict[str, Any], base: str | None, device: str, dtype: str
) -> tuple[LoadedModel, str]:
    """The model to compare with and what to call it: the base, or the directory's weights without its code."""
    kind = asked(dtype) or choose_dtype(resolve(str(directory)), choose_device(device))
    name = base or at_hand(manifest["model"])
    if name is None:
        return load(str(directory), device=device, dtype=kind), "its own weights under the runtime"
    converted = manifest["weights"] == "converted"
    loaded = load(name, device=device, dtype=manifest["dtype"] if converted else kind)
    if loaded.family.model_type != manifest["model"]["model_type"]:
        raise UsageError(f"{name!r} is not of the family {manifest['model']['model_type']!r}")
    if converted:
        # The export holds rounded weights, so those of the base were rounded alike, whatever computes with them.
        loaded = replace(loaded, model=loaded.model.to(kind), dtype=kind)
    return loaded, name


def _own_code(directory: Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    family = FAMILIES.get(manifest["model"]["model_type"])
    if family is None:
        raise NotFoundError(
            f"{directory}: unknown family {manifest['model']['model_type']!r}", "update vtwcli"
        )
    return read_own_code(directory, remote_code(family), auto_map(family))


@contextmanager
def _only_checked(directory: Path, checked: dict[str, bytes] | None) -> Iterator[Path]:
    """A place that holds the weights and what was checked, as it was then; the directory itself where it is trusted.

    Loading from the directory would run whatever lies there by then.
    """
    if checked is None:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="vtw-verify-") as place:
        folder = Path(place) / (directory.resolve().name or "export")  # transformers caches code by this name
        folder.mkdir()
        for name, data in checked.items():
            (folder / name).write_bytes(data)
        for pattern in ("*.safetensors", "*.safetensors.index.json"):
            for file in directory.resolve().glob(pattern):
                (folder / file.name).symlink_to(file)
        yield folder


def _expected(
    loaded: LoadedModel, inputs: dict[str, Tensor], schedule: Schedule, max_new_tokens: int
) -> Generation:
    from vtwcli.runtime import pruned

    with pruned(loaded.model, schedule), console.progress("generating with the runtime"):
        # the base may ask for what a schedule refuses and the export has taken out
        return _generate(loaded.model, inputs, max_new_tokens, **dict.fromkeys(REFUSED))


def _load_exported(
    source: Path, directory: Path, manifest: dict[str, Any], device: torch.device | str, dtype: torch.dtype
) -> Any:
    """The model as a user loads it, from ``source``.

    Raises:
        GateError: it does not load, not wholly, or not pruned.
    """
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"device_map": device if device == "auto" else {"": device}}
    quantized = "quantization_config" in read_json(source / CONFIG)
    if device == torch.device("cpu") and not quantized:
        options = {}
    try:
        with (
            quiet_libraries(),
            quiet_quantizers() if quantized else nullcontext(),
            console.progress("loading"),
        ):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=True,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        raise GateError(f"{directory} does not load with its code: {first_line(error)}") from error
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if bad := sorted(map(str, info[kind])):
            raise GateError(f"{directory} loads with {len(bad)} {kind.replace('_', ' ')}, first {bad[0]}")
    if getattr(model, "vtw_pruning", None) is None:
        raise GateError(f"{directory} loads without its schedule: transformers did not take its code")
    if model.config.vtw["schedule"] != manifest["schedule"]:
        raise GateError(f"{directory}: the schedules in config.json and in the manifest differ")
    if quantized:
        with quiet_quantizers():
            make_ready(model)
    return model.eval()


@torch.no_grad()
def _generate(model: Any, inputs: dict[str, Tensor], max_new_tokens: int, **settings: Any) -> Generation:
    with quiet_libraries():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=True,  # also where the settings leave it out: what it holds is looked at
            **settings,
        )
    return Generation(
        tokens=output.sequences[0, inputs["input_ids"].shape[1] :].cpu(),
        logits=torch.cat(output.logits).float().cpu(),
        # free slots of a static cache are zero
        entries=[int(layer.keys.ne(0).any(3).any(1).any(0).sum()) for layer in cache_of(output).layers],
    )


def _check_gone(got: Generation, present: list[int], schedule: Schedule, text: int, visual: int) -> None:
    """The caches hold no more than the text, the generated tokens and the visual tokens that are left."""
    if schedule.is_static and present != schedule.visual_per_layer(len(present), visual):
        raise GateError(
            f"visual tokens by layer are {present}, but the schedule says "
            f"{schedule.visual_per_layer(len(present), visual)}"
        )
    held = len(got.tokens) - 1  # the last token was not fed back
    for layer, (entries, left) in enumerate(zip(got.entries, present, strict=True)):
        if entries > text + left + held:  # a sliding window may hold fewer
            raise GateError(
                f"layer {layer} holds {entries} entries in its KV cache, more than {text} text, {held} generated and "
                f"{left} visual tokens"
            )


def _check_same(got: Generation, wanted: Generation, dtype: torch.dtype, name: str) -> float:
    """The largest difference of a logit while the answers agree."""
    for answer, whose in ((got, "the exported model"), (wanted, name)):
        if not bool(is_distribution(answer.logits).all()):
            error = not_finite(whose, "the logits are", dtype)
            raise GateError(error.message, error.hint)
    if got.tokens.tolist() != wanted.tokens.tolist():
        raise GateError(
            f"the exported model generates {got.tokens.tolist()}, but {name} generates {wanted.tokens.tolist()}"
        )
    apart = torch.where(
        got.logits == wanted.logits, 0.0, got.logits - wanted.logits
    )  # -inf less -inf is no number
    difference = float(apart.abs().max())
    bound = _TOLERANCE.get(dtype, 1e-2) * float(wanted.logits[wanted.logits.isfinite()].abs().max())
    if not difference <= bound:
        raise GateError(
            f"the exported model's logits differ from those of {name} by {difference:.2e}, more than {bound:.2e}"
        )
    return difference
