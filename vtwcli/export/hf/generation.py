"""What the generation settings of a checkpoint may ask for that its pruned export cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtwcli.models.jsonfiles import read_json
from vtwcli.schedule.schedule import Schedule

_CACHES = (None, "dynamic", "offloaded")
_OF_CACHES = ("cache_implementation", "cache_config", "max_cache_len", "compile_config")
_GUESSING = ("prompt_lookup_num_tokens", "assistant_early_exit")
REFUSED = (*_OF_CACHES, *_GUESSING)
"""Settings that are taken out where the runtime refuses what they say."""


def clean(settings: dict[str, Any], schedule: Schedule) -> dict[str, Any]:
    """Take out of a generation config, in place, what a model under ``schedule`` refuses; what was taken out.

    A quantized cache cannot lose visual tokens, a static one not by what each prompt decides; what belongs to such a
    cache goes with it. Guessed
    tokens behind a prompt do not go with a schedule that decides by the prompt's last row.
    """
    names: list[str] = []
    if settings.get("cache_implementation") not in (*_CACHES, *(("static",) if schedule.is_static else ())):
        names += _OF_CACHES
    if _measures(schedule):
        names += _GUESSING
    return {name: settings.pop(name) for name in names if settings.get(name) is not None}


def clean_files(folder: Path, config: dict[str, Any], schedule: Schedule) -> dict[str, dict[str, Any]]:
    """``clean`` the generation config in ``folder``, and the old-style settings in a model's ``config``.

    A file in which nothing has to change stays as it is, byte for byte.

    Args:
        config: of the whole model; changed in place, to be written by the caller.

    Returns:
        By file, what was taken out: the setting and its value.
    """
    changed: dict[str, dict[str, Any]] = {}
    file = folder / "generation_config.json"
    if file.is_file():
        settings = read_json(file)
        if gone := clean(settings, schedule):
            changed[file.name] = gone
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = config.get("text_config")
    parts = {"": config, "text_config.": text if isinstance(text, dict) else {}}
    for prefix, part in parts.items():
        for name, value in clean(part, schedule).items():
            changed.setdefault("config.json", {})[f"{prefix}{name}"] = value
    return changed


def sentences(changed: dict[str, dict[str, Any]]) -> list[str]:
    """What was taken out, in words."""
    return [
        f"{file}: {name} {json.dumps(value)} was taken out: a model under a schedule cannot follow it"
        for file, gone in changed.items()
        for name, value in gone.items()
    ]


def _measures(schedule: Schedule) -> bool:
    """Whether where or what leaves is decided by the prompt's last row."""
    actions = schedule.to_dict()["actions"]
    scores = (action.get("select", {}).get("score") for action in actions)
    return any(action["at"] == "auto" for action in actions) or bool(
        {"contribution", "attention"} & set(scores)
    )
