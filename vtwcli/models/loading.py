"""Loading a vision-language model with its processor, with errors that say what to do."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtwcli.errors import NotFoundError, UsageError, VtwError, first_line
from vtwcli.io import console
from vtwcli.machine import threads
from vtwcli.machine.libraries import quiet_libraries, quiet_quantizers
from vtwcli.machine.memory import memory_available
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.dtypes import RUN, asked, name_of
from vtwcli.models.families import Family, placeholder_ids
from vtwcli.models.filling import fill
from vtwcli.models.hub import resolve
from vtwcli.models.jsonfiles import CONFIG, GENERATION, broken
from vtwcli.models.processor import load_processor
from vtwcli.models.quantized import Quantization, make_ready, quantize_activations

_OVERHEAD = 1.1  # activations, the cache and the allocator, on top of the weights


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, or its skeleton.

    Attributes:
        model: the transformers model, in evaluation mode.
        processor: its processor (tokenizer, image processor and chat template).
        family: its row of the family table.
        name: what the user asked for.
        revision: the Hub commit, or None.
        path: the directory that holds its files.
        device: where inputs go.
        dtype: type of the weights.
        checkpoint: its files, where it came from files.
    """

    model: Any
    processor: Any
    family: Family
    name: str
    revision: str | None
    path: Path
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint | None = None

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def text_model(self) -> Any:
        """The text model: ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``."""
        return self.model.get_submodule(self.family.text_model)

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self.text_model.layers

    @property
    def embedding_rows(self) -> int:
        """How many token ids the text model embeds: 0 to this less one."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The token ids that stand for visual tokens in ``input_ids``."""
        return placeholder_ids(self.family, self.model.config)


def load(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    unpacked: bool = False,
) -> LoadedModel:
    """Load a model and its processor.

    Args:
        name: a directory, a Hub id with an optional ``@revision``, or ``demo``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``. ``auto`` takes the first GPU, or spreads a model
            that is larger than it over all of them.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see ``choose_dtype``.
        attn: attention implementation of transformers (``sdpa``, ``eager``, ``flash_attention_2``); None is its
            default.
        trust_remote_code: whether code that comes with the model may run.
        weights: False gives the skeleton: parameters on the meta device, for layer streaming.
        unpacked: unpack quantized weights into ``dtype`` and leave activations as they are, instead of running them as
            their library does.

    Raises:
        NotFoundError: missing, unreachable, unsupported, incomplete, larger than the memory, or quantized by a
            library that is not installed.
        UsageError: a device, dtype or attention implementation that does not exist here.
    """
    place, wanted = choose_device(device), asked(dtype)
    checkpoint = resolve(name, trust_remote_code=trust_remote_code)
    processor = load_processor(checkpoint)
    kind = wanted or choose_dtype(checkpoint, place)
    quantization = checkpoint.quantization
    try:
        if weights:
            _check_memory(checkpoint, place, kind, device == "auto", unpacked)
            unpack = unpacked or (quantization is not None and quantization.unpacked)
            if quantization is not None and unpack:
                model = _unpack_weights(checkpoint, quantization, place, kind, attn)
            else:
                model = _load_weights(checkpoint, place, kind, attn, spread=device == "auto")
        else:
            model = checkpoint.skeleton(kind, attn)
            if quantization is not None and not unpacked:
                quantize_activations(model, quantization, checkpoint.sparing_quantization())
    except VtwError:
        raise
    except Exception as error:  # there is no telling what unusual files make transformers raise
        if attn is not None and ("attention" in str(error).lower() or attn in str(error)):
            raise UsageError(f"attention {attn!r} cannot be used here: {first_line(error)}") from error
        raise (
            broken(checkpoint.path, (GENERATION,))
            or NotFoundError(
                f"{name!r} cannot be loaded: {first_line(error)}",
                "another attention than its config's: --attn sdpa"
                if "attention" in str(error).lower()
                else None,
            )
        ) from error
    _check_tokens(model.generation_config, checkpoint.path)
    loaded = LoadedModel(
        model,
        processor,
        checkpoint.family,
        name,
        checkpoint.revision,
        checkpoint.path,
        place,
        kind,
        checkpoint,
    )
    size = sum(weight.numel() for weight in loaded.layers[0].parameters())
    if quantization is not None:  # what is packed has more weights than numbers
        first = f"{checkpoint.family.text_model}.layers.0."
        size = sum(math.prod(w.shape) for name, w in checkpoint.key_map.items() if name.startswith(first))
    if place.type == "cpu" and (said := threads.fit(size)):
        console.detail(said)
    return loaded


def _check_tokens(generation: Any, path: Path) -> None:
    """Refuse token ids that transformers cannot make a tensor of once it generates."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation, key, None)
        if value is not None:
            try:
                torch.tensor(value, dtype=torch.long)
            except (TypeError, ValueError, RuntimeError) as error:
                file = path / (GENERATION if (path / GENERATION).is_file() else CONFIG)
                raise NotFoundError(f"{file}: {key} is {value!r}, which is no token id") from error


def choose_device(device: str | torch.device) -> torch.device:
    """The torch device for ``--device``; ``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        UsageError: not a device, or one that this machine does not have.
    """
    text = str(device)
    if text == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise UsageError(f"{text!r} is not a device", "use auto, cpu, cuda, cuda:N or mps")
    place = torch.device(text)
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            raise UsageError(
                f"there is no device {text!r}: torch sees {count} CUDA devices", "use --device cpu"
            )
        return torch.device("cuda", place.index or 0)
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("there is no device 'mps' on this machine", "use --device cpu")
    return place


def choose_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype for ``--dtype auto``.

    On a GPU the checkpoint's own. On a CPU float32, because half precision is slow on most; bfloat16 for a model
    that is too large for memory in float32, where the CPU computes it natively (AVX512-BF16 or AMX): then it is
    twice as fast, whether the model fits now or is streamed.
    """
    if device.type != "cpu":
        return checkpoint.dtype if name_of(checkpoint.dtype) in RUN else torch.float32
    large = memory_needed(checkpoint, torch.float32) > memory_available(device)
    return torch.bfloat16 if large and _fast_bfloat16() else torch.float32


def memory_needed(checkpoint: Checkpoint, dtype: torch.dtype, unpacked: bool = False) -> int:
    """Bytes for the weights in ``dtype`` and a tenth more to run with; ``unpacked`` as for ``load``."""
    return int(checkpoint.bytes_in(dtype, unpacked) * _OVERHEAD)


def fits(
    model: Checkpoint | str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    trust_remote_code: bool = False,
) -> bool:
    """Whether ``load`` with the same arguments has the memory for all weights at once.

    Raises:
        NotFoundError: a name that leads to no checkpoint.
    """
    checkpoint = (
        model if isinstance(model, Checkpoint) else resolve(model, trust_remote_code=trust_remote_code)
    )
    place = choose_device(device)
    kind = asked(dtype) or choose_dtype(checkpoint, place)
    return memory_needed(checkpoint, kind) <= memory_available(place, spread=device == "auto")


def _check_memory(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, spread: bool, unpacked: bool
) -> None:
    needed, free = memory_needed(checkpoint, dtype, unpacked), memory_available(device, spread)
    if needed > free:
        raise NotFoundError(
            f"not enough memory for {checkpoint.name!r}: {_gb(needed)} are needed in "
            f"{name_of(dtype)}, {_gb(free)} are free on {device.type}",
            "with --stream one layer at a time is loaded",
        )


def _unpack_weights(
    checkpoint: Checkpoint,
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
    attn: str | None,
) -> Any:
    """The model with its quantized weights unpacked into ``dtype``."""
    if quantization.sealed is not None:
        raise NotFoundError(f"the weights of {checkpoint.name!r} cannot be unpacked: {quantization.sealed}")
    if quantization.missing:
        console.detail(
            f"weights unpacked into {name_of(dtype)}: without {' and '.join(quantization.missing)} they cannot be run "
            "as they are stored"
        )
    model = checkpoint.skeleton(dtype, attn)
    with console.progress("unpacking weights"):
        fill(model, checkpoint, device)
    return model


def _load_weights(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attn: str | None, spread: bool
) -> Any:
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {}
    quantization = checkpoint.quantization
    if quantization is not None:
        quantization.check_library(checkpoint.name)
        options["config"] = config = deepcopy(checkpoint.config)
        config.quantization_config = checkpoint.sparing_quantization()
    if device.type != "cpu" or quantization is not None:  # bitsandbytes would look for a device of its own
        alone = memory_needed(checkpoint, dtype) <= memory_available(device)
        options["device_map"] = {"": device} if alone else "auto"
    if attn is not None:
        options["attn_implementation"] = attn
    with quiet_libraries(), quiet_quantizers() if quantization is not None else nullcontext():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            trust_remote_code=checkpoint.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            bad = sorted(map(str, info[kind]))
            raise NotFoundError(
                f"the weights of {checkpoint.name!r} do not fit the model: {len(bad)} "
                f"{kind.replace('_', ' ')}, first {bad[0]}",
                "the checkpoint is incomplete or belongs to another model",
            )
    if quantization is not None:
        with quiet_quantizers():
            make_ready(model)
    return model.eval()


def _fast_bfloat16() -> bool:
    supported: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(supported.get("avx512_bf16") or supported.get("amx_tile") or supported.get("amx_bf16"))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
