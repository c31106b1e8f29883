"""The JSON files and templates of a model directory: bounded in size, read with errors that name the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vtwcli.errors import NotFoundError
from vtwcli.io.files import regular
from vtwcli.io.nesting import DEEPEST, TooDeepError, check_size
from vtwcli.models.stored import DOWNLOAD_AGAIN

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")

_MIB = 1 << 20
_LIMITS = {
    **dict.fromkeys((CONFIG, GENERATION, ADAPTER, *TOKENIZER, *PROCESSOR, TEMPLATES[1]), 16 * _MIB),
    **dict.fromkeys(("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"), 128 * _MIB),  # a vocabulary
    "model.safetensors.index.json": 128 * _MIB,
    TEMPLATES[0]: _MIB,
}
_BOUNDS = {
    r"(patch|merge)_size": 1_024,  # pixels; patches
    r"height|width|max_image_size\.longest_edge": 16_384,  # pixels
    r"num_image_tokens|image_seq_len(gth)?": 65_536,  # tokens
}
"""What a processor's settings may be: they are lengths of loops and sides of arrays."""


def check_sizes(path: Path) -> None:
    """Refuse a model directory with a file beside its weights that is larger than any model's is.

    Raises:
        NotFoundError: names the file and its bound; or a setting of the processor and its.
    """
    for name, limit in _LIMITS.items():
        file = path / name
        if file.is_file() and file.stat().st_size > limit:
            size = file.stat().st_size / _MIB
            raise NotFoundError(
                f"{file} has {size:,.0f} MiB, and no model needs more than {limit // _MIB} there",
                DOWNLOAD_AGAIN,
            )
    for name in PROCESSOR:
        settings: list[tuple[str, int]] = []
        with suppress(FileNotFoundError, NotFoundError):  # it may not be read at all; who reads it complains
            settings = list(numbers(read_json(path / name)))
        for setting, value in settings:
            for pattern, bound in _BOUNDS.items():
                if value > bound and re.search(rf"(^|[._])({pattern})$", setting):
                    raise NotFoundError(
                        f"{path / name}: {setting} is {value}, and no model has more than {bound:,}",
                        DOWNLOAD_AGAIN,
                    )


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        NotFoundError: it cannot be read, is no JSON, is nested too deeply, or holds no object.
    """
    try:
        content = json.loads(regular(file).read_text(encoding="utf-8"))
        check_size(content)
        if isinstance(content, dict):
            return content
        reason = "it does not hold a JSON object"
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
    except (RecursionError, TooDeepError):
        reason = f"it is nested more than {DEEPEST} levels deep"
    except ValueError as error:
        reason = f"no valid JSON: {error}"
    raise NotFoundError(f"{file} cannot be read: {reason}", DOWNLOAD_AGAIN)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers of a JSON value by their dotted names."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def broken(path: Path, names: tuple[str, ...]) -> NotFoundError | None:
    """What is wrong with the first of a directory's files that holds no JSON object; None where all do."""
    for name in names:
        try:
            read_json(path / name)
        except FileNotFoundError:
            continue
        except NotFoundError as error:
            return error
    return None
