"""Loads an exported model whole, in whatever release of transformers is installed, or says why it cannot.

This file is self-contained (transformers only): an exported model directory carries a copy of it. Releases differ in
the names of weights, in what a config says where it says nothing, and in the forms of rotary settings; a model that
loads with random weights or another config answers without an error, so here these are errors.

``config.vtw`` of an export holds ``transformers`` (the release it was exported with), ``config`` (what that release
read from the config, see ``settings_of``) and ``unused`` (stored tensors that it uses nowhere).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

_PARTS = ("text_config", "vision_config")
# of the run, the file or training, or told otherwise from release to release
_NOT_COMPARED = re.compile(
    r"_.*|transformers_version|cache_implementation|dtype|torch_dtype|use_cache|output_.*|return_dict|use_return_dict|is_.*|.*dropout.*|"
    r"initializer_.*|.*_token_id|.*_token_index|rope_theta|partial_rotary_factor|pretraining_tp|chunk_size_.*|"
    r"problem_type|tokenizer_class|prefix|model_type|attn_implementation|base_model_.*|image_seq_length|num_labels"
)


class LoadingError(ValueError):
    """This release of transformers does not read the exported model as it was written; the message says what to do."""


def settings_of(config: Any) -> dict[str, Any]:
    """The numbers and words of a config that a model is built by, as the installed release reads them.

    Args:
        config: the transformers config of a whole model.

    Returns:
        ``{"hidden_size": ..., ...}`` of the config itself under ``""`` and of its parts under their names.
    """
    found = {}
    for name in ("", *_PARTS):
        part = config if not name else getattr(config, name, None)
        if part is not None:
            found[name] = {key: value for key, value in sorted(vars(part).items()) if _plain(key, value)}
    return found


def _plain(key: str, value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and not _NOT_COMPARED.fullmatch(key)


def prepare_config(config: Any) -> None:
    """Give the config the forms that the installed release reads, and refuse one that it reads otherwise.

    Raises:
        LoadingError: a setting that differs from the one the model was exported with.
    """
    written = config.vtw.get("config", {})
    for name in written:
        part = config if not name else getattr(config, name, None)
        if part is None:
            raise _refused(config, f"reads no {name}")
        _rotary(config, part)
        for key, value in written[name].items():
            # what differs from layer to layer cannot be asked for by its name
            here = vars(part)[key] if key in vars(part) else getattr(part, key, None)
            if here is not None and here != value:
                where = f"{name}.{key}" if name else key
                raise _refused(config, f"reads {where} of config.json as {here!r}, not {value!r}")


def _rotary(config: Any, part: Any) -> None:
    """Tell releases before 5.0, whose configs have ``rope_theta``, what newer ones say by ``rope_parameters``."""
    names = inspect.signature(type(part).__init__).parameters
    given = vars(part).get("rope_parameters")
    if "rope_theta" not in names or "rope_parameters" in names or not isinstance(given, dict):
        return
    if "rope_theta" in given:
        rope = given
    elif {"full_attention", "sliding_attention"} == given.keys() and "rope_local_base_freq" in names:
        rope = given["full_attention"]
        local = given["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise _refused(config, "knows no scaling of rotary embeddings in sliding layers")
        part.rope_local_base_freq = local["rope_theta"]
    else:
        raise _refused(config, "does not read rope_parameters of config.json")
    part.rope_theta = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        part.partial_rotary_factor = rope["partial_rotary_factor"]
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if rest.get("rope_type", "default") != "default" or len(rest) > 1:
        part.rope_scaling = {**rest, "type": rest.get("rope_type", "default")}


def load(cls: Any, plain: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
    """``cls.from_pretrained`` that refuses weights which are missing or not used.

    Args:
        cls: the class of the exported model.
        plain: the ``from_pretrained`` of its base class, bound to ``cls``.
        name: directory or Hub id.

    Raises:
        LoadingError: weights, tokenizer or processor that the installed release does not read.
    """
    told = kwargs.pop("output_loading_info", False)
    model, info = plain(name, *args, output_loading_info=True, **kwargs)
    renamed = {} if kwargs.get("key_mapping") else _renamed(info)
    if renamed:
        mapping = {**renamed, **(getattr(cls, "_checkpoint_conversion_mapping", None) or {})}
        del model
        model, info = plain(name, *args, output_loading_info=True, key_mapping=mapping, **kwargs)
    _check_weights(model.config, info)
    _check_processor(model.config, name, kwargs)
    return (model, info) if told else model


def _renamed(info: dict[str, Any]) -> dict[str, str]:
    """Patterns that put a part into the names of all weights that are missing for want of it; none if that is not
    what is wrong. Releases before 5.10 have ``vision_tower.vision_model.``, where newer ones have ``vision_tower.``"""
    missing, unexpected = set(map(str, info["missing_keys"])), set(map(str, info["unexpected_keys"]))
    patterns: dict[str, str] = {}
    explained = set()
    for key in missing:
        parts = key.split(".")
        for at in range(1, len(parts) - 1):
            if ".".join(parts[:at] + parts[at + 1 :]) in unexpected:
                home, part = ".".join(parts[:at]), parts[at]
                stored = home.removeprefix("model.")
                patterns[rf"^(?:model\.)?{re.escape(stored)}\.(?!{part}\.)"] = f"{home}.{part}."
                explained.add(key)
                break
    return patterns if missing and explained == missing else {}


def _check_weights(config: Any, info: dict[str, Any]) -> None:
    unused = {_tail(key) for key in config.vtw.get("unused", ())}
    surplus = [key for key in map(str, info["unexpected_keys"]) if _tail(key) not in unused]
    for keys, what in (
        (info["missing_keys"], "finds no values for {} of this model's weights, which would be random"),
        (surplus, "has no place for {} of the stored weights"),
        (info["mismatched_keys"], "expects other shapes of {} of the stored weights"),
        (info.get("error_msgs") or (), "reports {} errors on loading the weights"),
    ):
        if bad := sorted(map(str, keys)):
            raise _refused(config, f"{what.format(len(bad))} (first {bad[0]})")


def _tail(key: str) -> str:
    """What stays of a weight's name through all renaming."""
    return ".".join(key.rsplit(".", 2)[-2:])


def _check_processor(config: Any, name: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a tokenizer or processor whose class the release does not have; the library's own message names no
    remedy."""
    given = ("revision", "cache_dir", "local_files_only", "token", "subfolder")
    options: dict[str, Any] = {key: kwargs[key] for key in given if kwargs.get(key) is not None}
    for stored, what in (("tokenizer_config.json", "tokenizer"), ("processor_config.json", "processor")):
        try:
            file = transformers.utils.cached_file(name, stored, **options)
            wanted = json.loads(Path(file or "").read_text(encoding="utf-8")).get(f"{what}_class")
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # there is none
        if wanted and not any(hasattr(transformers, kind) for kind in (wanted, f"{wanted}Fast")):
            raise _refused(config, f"has no {wanted}, the class of the stored {what}")


def _refused(config: Any, what: str) -> LoadingError:
    exported = config.vtw.get("transformers", "a newer one")
    return LoadingError(
        f"transformers {transformers.__version__} {what}, so it is not run; the model was exported with transformers "
        f"{exported}: install that or a newer release, or export again from the base model as the Hub has it"
    )
