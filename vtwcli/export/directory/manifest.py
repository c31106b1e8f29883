"""The manifest of an exported directory: what it is, what made it, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vtwcli.errors import GateError, NotFoundError, UsageError
from vtwcli.io import console, documents
from vtwcli.io.files import document, regular

MANIFEST = "manifest.json"
CARD = "README.md"
FORMAT = "vtw-hf"
FORMAT_VERSION = 1

_MIB = 1 << 20
# what transformers looks for in a model directory, besides code
_READ = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "*tokenizer*",
    "*chat_template*",
    "*.jinja",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.onnx",
    "*.onnx_data*",
)


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
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # a lone surrogate as JSON spells it


class _Part(BaseModel):
    # strict: what passes is used as it stands in the file; what nobody reads may be there
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, defer_build=True)


Count = Annotated[int, Field(ge=0)]


class _File(_Part):
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Model(_Part):
    name: Annotated[str, Field(min_length=1)]
    revision: str | None
    model_type: str


class _Manifest(_Part):
    model: _Model
    schedule: dict[str, Any]
    versions: dict[str, str] = Field(default_factory=dict)
    tested: dict[str, list[str]] = Field(default_factory=dict)
    files: dict[str, _File]

    @field_validator("files", mode="before")
    @classmethod
    def _inside(cls, files: Any) -> Any:
        for name in files if isinstance(files, dict) else ():
            parts = Path(name).parts
            if not parts or Path(name).is_absolute() or ".." in parts or str(Path(name)) != name:
                raise ValueError(f"{name!r}: a file lies outside the directory")
            if "\0" in name or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
                raise ValueError("a file has a name that no file can have")
        return files


class _HfManifest(_Manifest):
    weights: Literal["linked", "copied", "converted"]
    dtype: str

    @model_validator(mode="after")
    def _whole(self) -> _HfManifest:
        if self.weights == "converted" and self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: {self.dtype!r} is not a type that weights are converted to")
        if "config.json" not in self.files or not any(name.endswith(".safetensors") for name in self.files):
            raise ValueError("files: config.json and weights are not among them")
        return self


class _Port(_Part):
    name: str
    dtype: Literal["float32", "float16", "int64", "bool"]
    shape: list[int | str]


class _Removal(_Part):
    action: Literal["withdraw", "keep"]
    select: dict[str, Any] | None = None


class _Graph(_Part):
    role: str
    file: Annotated[str, Field(pattern=r"^[\w.-]+\.onnx$")]
    layers: Annotated[list[Count], Field(min_length=2, max_length=2)] | None
    removal: _Removal | None
    inputs: list[_Port]
    outputs: Annotated[list[_Port], Field(min_length=1)]


class _Text(_Part):
    layers: Annotated[int, Field(ge=1)]
    max_length: Annotated[int, Field(ge=1)]


class _Vision(_Part):
    arrange: Literal["rows", "tiles", "patches", "anyres"]


class _Tokens(_Part):
    placeholder_ids: list[Count]
    eos_ids: list[Count]
    pad_id: Count


class _WebGraph(_Part):
    role: Literal["embed_tokens", "vision_encoder", "decoder_model_merged"]
    file: Annotated[str, Field(pattern=r"^onnx/[\w.-]+\.onnx$")]


class _WebTokens(_Part):
    placeholder_ids: list[Count]
    eos_ids: list[Count]


class _WebManifest(_Manifest):
    dtype: Literal["fp32", "fp16"]
    quantize: Literal["int8", "int4"] | None
    graphs: Annotated[list[_WebGraph], Field(min_length=3, max_length=3)]
    text: _Text
    vision: _Vision
    positions: Literal["grid", "count"]
    tokens: _WebTokens

    @field_validator("graphs")
    @classmethod
    def _all(cls, graphs: list[_WebGraph]) -> list[_WebGraph]:
        if len({graph.role for graph in graphs}) < len(graphs):
            raise ValueError("a graph is missing")
        return graphs


class _OnnxManifest(_Manifest):
    dtype: Literal["fp32", "fp16"]
    graphs: list[_Graph]
    text: _Text
    vision: _Vision
    positions: Literal["grid", "count"]
    tokens: _Tokens

    @model_validator(mode="after")
    def _whole(self) -> _OnnxManifest:
        roles = [graph.role for graph in self.graphs]
        if not {"embed_tokens", "vision_encoder"} <= set(roles) or len(set(roles)) != len(roles):
            raise ValueError(
                "graphs: embed_tokens and vision_encoder are not among them, or one is there twice"
            )
        ends = [graph.layers for graph in self.graphs if graph.layers is not None]
        if not ends or [0, *(end[1] for end in ends)] != [*(end[0] for end in ends), self.text.layers]:
            raise ValueError("graphs: they do not run all layers one after the other")
        absent = {"config.json", *(graph.file for graph in self.graphs)} - self.files.keys()
        if absent:
            raise ValueError(f"files: {min(absent)} is not among them")
        return self


_KINDS: dict[str, type[_Manifest]] = {
    FORMAT: _HfManifest,
    "vtw-onnx": _OnnxManifest,
    "vtw-transformers.js": _WebManifest,
}


def read_manifest(folder: Path, kind: str = FORMAT) -> dict[str, Any]:
    """The manifest of an exported directory of a kind, with every part that is read of it.

    Raises:
        NotFoundError: there is none, or it cannot be read; names the key.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise NotFoundError(f"there is no directory {folder}")
    wrong = f"{file} is not a readable manifest"
    try:
        manifest = documents.parse_json(regular(file).read_text(encoding="utf-8"), wrong)
        found, version = manifest["format"], manifest["format_version"]
        if found != kind:
            raise NotFoundError(f"{folder} is an export of the kind {found!r}, not {kind!r}")
        if version != FORMAT_VERSION or type(version) is not int:
            raise NotFoundError(
                f"{file} has format version {version}, this tool knows {FORMAT_VERSION}", "update vtwcli"
            )
        documents.validate(manifest, _KINDS[kind], wrong, "manifest")
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{folder} has no {MANIFEST}", "is it a directory that vtw export made?"
        ) from error
    except UsageError as error:
        raise NotFoundError(error.message) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotFoundError(f"{wrong}: {error}") from error
    return dict(manifest)


def exported_from(folder: Path) -> str | None:
    """The base model's name in the manifest of an export of any kind; None for any other directory."""
    try:
        manifest = json.loads(regular(folder / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["model"]["name"]) if str(manifest["format"]).startswith("vtw-") else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def file_totals(manifest: dict[str, Any]) -> dict[str, int]:
    """``count`` of the files that a manifest lists, and their ``bytes``."""
    listed = manifest["files"].values()
    return {"count": len(listed), "bytes": sum(entry["bytes"] for entry in listed)}


def check_files(folder: Path, manifest: dict[str, Any]) -> dict[str, list[str]]:
    """Compare a directory with its manifest: sizes first, then digests.

    The model card is for people, who may edit it: a change there is told, not refused.

    Returns:
        ``edited`` (the card, if it differs) and ``unlisted`` (files that the manifest does not know).

    Raises:
        GateError: a file is missing or differs, or one that a model is loaded from is not in the manifest.
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
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    edited = [CARD] if CARD in listed and (CARD not in found or CARD in differs) else []
    unlisted = sorted(found - set(listed) - {MANIFEST})
    if bad := [name for name in unlisted if any(fnmatch(name, pattern) for pattern in _READ)]:
        raise _broken(folder, "not in it", bad)
    return {"edited": edited, "unlisted": unlisted}


def _broken(folder: Path, how: str, names: list[str]) -> GateError:
    more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
    are = "are" if len(names) > 1 else "is"
    return GateError(
        f"{folder} does not match its manifest: {names[0]}{more} {are} {how}", "export or download it again"
    )


def at_hand(model: dict[str, Any]) -> str | None:
    """The base model, if it is on this machine; nothing is fetched."""
    if model["revision"] is None:
        from vtwcli.io.files import demo_model

        return "demo" if model["name"] == "demo" and demo_model().is_dir() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model["name"], "config.json", revision=model["revision"])
    except (HFValidationError, ValueError):
        return None
    return f"{model['name']}@{model['revision']}" if isinstance(found, str) else None
