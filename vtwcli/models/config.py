"""A model's config.json: what it says, and how messages name what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.errors import NotFoundError, first_line
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.broken_torchvision import hide_if_broken
from vtwcli.models.families import FAMILIES, OTHERS, Family, family_of, placeholder_ids, supported
from vtwcli.models.jsonfiles import CONFIG, numbers, read_json
from vtwcli.models.quantized import quantization_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MANY = 100_000
"""Layers, of anything; no model has a hundredth of it."""
COUNTS = re.compile(r"layer|depth|block|stage|num_labels", re.IGNORECASE)
"""Settings that are counted up to."""
SIZES = re.compile(r"size|num_|heads|channels|dim|expert|depth", re.IGNORECASE)
"""Settings that are lengths of tensors."""


@dataclass(frozen=True)
class ConfigFile:
    """config.json of a model directory, for messages: its path, and the settings that they are about."""

    path: Path

    @classmethod
    def of(cls, folder: Path) -> ConfigFile:
        """The file of a directory."""
        return cls(folder / CONFIG)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def raw(self) -> dict[str, Any]:
        """What it holds; empty where it cannot be read, which is for others to tell."""
        try:
            return read_json(self.path)
        except (NotFoundError, FileNotFoundError):
            return {}

    def named(self, which: Callable[[str, int], object]) -> str:
        """The settings that ``which`` takes, in brackets, the three largest; empty where there are none."""
        found = sorted((-value, name) for name, value in numbers(self.raw) if which(name, value))
        return f" ({', '.join(f'{name} is {-value}' for value, name in found[:3])})" if found else ""


def is_odd(name: str, value: int) -> bool:
    """Whether a setting is a size that no model has."""
    return SIZES.search(name) is not None and not 0 < value < 10**9


def read_config(path: Path, name: str, trust_remote_code: bool = False) -> tuple[PretrainedConfig, Family]:
    """The config of a model directory and its family row.

    Raises:
        NotFoundError: no config, an unreadable one, not a vision-language model, or an unsupported family.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    hide_if_broken()
    file = ConfigFile.of(path)
    try:
        raw = read_json(file.path)
    except FileNotFoundError as error:
        raise NotFoundError(f"{name!r} is not a model directory: it has no config.json") from error
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    named = (
        [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    )
    for setting, value in numbers(raw):
        if value > MANY and COUNTS.search(setting):  # transformers would make a list of so many
            raise NotFoundError(f"{file}: {setting} is {value}, which is more than any model has")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if str(model_type) in {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *OTHERS}:
            reason = f": {OTHERS[str(model_type)]}" if model_type in OTHERS else ""
            raise NotFoundError(
                f"{name!r} is of the family {model_type!r}, which is not supported{reason}", supported()
            )
        raise NotFoundError(
            f"{name!r} is not a vision-language model that transformers knows: its model type is {model_type!r}",
            supported(),
        )
    family = FAMILIES[model_type]
    if named and family.architecture not in named and not trust_remote_code:
        raise NotFoundError(
            f"{name!r} was saved for {named[0]}, not for transformers' {family.architecture}",
            f"use a checkpoint in transformers' format, for example {family.example}",
        )
    quantization_of(raw.get("quantization_config"), name)
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        family, depth = family_of(config), config.get_text_config().num_hidden_layers
        if depth < 1 or any(not 0 <= i < 2**31 for i in placeholder_ids(family, config)):
            raise ValueError(f"{depth} layers, placeholders {placeholder_ids(family, config)}")
        return config, family
    except Exception as error:  # there is no telling what a broken config makes transformers raise
        raise NotFoundError(
            f"{file} is not a valid {model_type} config{file.named(is_odd)}: {first_line(error)}"
        ) from error
