"""The manifest of an exported directory: what it is, what made it, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtwcli import console
from vtwcli.errors import GateError, NotFoundError
from vtwcli.files import document

MANIFEST = "manifest.json"
CARD = "README.md"
FORMAT = "vtw-hf"
FORMAT_VERSION = 1

_MIB = 1 << 20


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """``{"bytes", "sha256"}`` of every file below ``folder`` but the manifest, by its relative name."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files.pop(MANIFEST, None)
    digests = digest(list(files.values()))
    return {name: {"bytes": file.stat().st_size, "sha256": digests[file]} for name, file in files.items()}


def digest(files: list[Path]) -> dict[Path, str]:
    """The SHA-256 of files, in hexadecimal."""
    digests = {}
    with console.progress("hashing, MiB", sum(file.stat().st_size for file in files) // _MIB) as bar:
        for file in files:
            sha256, left = hashlib.sha256(), 0
            with file.open("rb") as stream:
                while block := stream.read(8 * _MIB):
                    sha256.update(block)
                    left += len(block)
                    bar.advance(left // _MIB)
                    left %= _MIB
            digests[file] = sha256.hexdigest()
    return digests


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of everything that is in ``folder`` by now; returns it."""
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts, "files": file_entries(folder)}
    (folder / MANIFEST).write_text(document(manifest), encoding="utf-8")
    return manifest


def save_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a document of an exported directory that people may read."""
    path.write_text(document(data, indent=2), encoding="utf-8")


def save_settings(path: Path, data: Mapping[str, Any]) -> None:
    """Write settings of the base model, which may hold the Infinity that transformers writes and reads."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path, kind: str = FORMAT) -> dict[str, Any]:
    """The manifest of an exported directory of a kind.

    Raises:
        NotFoundError: there is none, or it cannot be read.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise NotFoundError(f"there is no directory {folder}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found, version, files = manifest["format"], manifest["format_version"], manifest["files"]
        if not all({"bytes", "sha256"} <= entry.keys() for entry in files.values()):
            raise ValueError("a file has no size or digest")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a file lies outside the directory")
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{folder} has no {MANIFEST}", "is it a directory that vtw export made?"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotFoundError(f"{file} is not a readable manifest: {error}") from error
    if found != kind:
        raise NotFoundError(f"{folder} is an export of the kind {found!r}, not {kind!r}")
    if version != FORMAT_VERSION:
        raise NotFoundError(
            f"{file} has format version {version}, this tool knows {FORMAT_VERSION}", "update vtwcli"
        )
    return dict(manifest)


def exported_from(folder: Path) -> str | None:
    """The base model's name in the manifest of an export of any kind; None for any other directory."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["model"]["name"]) if str(manifest["format"]).startswith("vtw-") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def file_totals(manifest: dict[str, Any]) -> dict[str, int]:
    """``count`` of the files that a manifest lists, and their ``bytes``."""
    listed = manifest["files"].values()
    return {"count": len(listed), "bytes": sum(entry["bytes"] for entry in listed)}


def check_files(folder: Path, manifest: dict[str, Any]) -> dict[str, list[str]]:
    """Compare a directory with its manifest: sizes first, then digests.

    The model card is for people, who may edit it: a change there is told, not refused.

    Returns:
        ``edited`` (the card, if it differs) and ``unlisted`` (files that the manifest does not know, but for what
        Python leaves behind where a script of the directory was run).

    Raises:
        GateError: a file is missing or differs.
    """
    listed = manifest["files"]
    bad = [name for name in listed if not (folder / name).is_file() and name != CARD]
    if bad:
        raise _broken(folder, "missing", bad)
    present = [name for name in listed if (folder / name).is_file()]
    differs = [name for name in present if (folder / name).stat().st_size != listed[name]["bytes"]]
    if bad := [name for name in differs if name != CARD]:
        raise _broken(folder, "of another size", bad)
    digests = digest([folder / name for name in present])
    differs += [name for name in present if digests[folder / name] != listed[name]["sha256"]]
    if bad := [name for name in differs if name != CARD]:
        raise _broken(folder, "changed", bad)
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    found = {str(file) for file in files if "__pycache__" not in file.parts}
    edited = [CARD] if CARD in listed and (CARD not in found or CARD in differs) else []
    return {"edited": edited, "unlisted": sorted(found - set(listed) - {MANIFEST})}


def _broken(folder: Path, how: str, names: list[str]) -> GateError:
    more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
    are = "are" if len(names) > 1 else "is"
    return GateError(
        f"{folder} does not match its manifest: {names[0]}{more} {are} {how}", "export or download it again"
    )


def at_hand(model: dict[str, Any]) -> str | None:
    """The base model, if it is on this machine; nothing is fetched."""
    if model["revision"] is None:
        from vtwcli.demo import model_dir

        return "demo" if model["name"] == "demo" and model_dir().is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model["name"], "config.json", revision=model["revision"])
    return f"{model['name']}@{model['revision']}" if isinstance(found, str) else None
