"""From what a user typed to a checkpoint: a directory of this machine, the Hub's cache, or the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vtwcli.errors import NotFoundError, first_line
from vtwcli.io import console
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.adapters import ADAPTER_WEIGHTS, base_of, is_adapter, merged
from vtwcli.models.broken_torchvision import hide_if_broken
from vtwcli.models.checkpoint import COMPANIONS, Checkpoint
from vtwcli.models.config import read_config
from vtwcli.models.jsonfiles import ADAPTER, check_sizes
from vtwcli.models.names import directory_of

_CONFIG_FILES = [*COMPANIONS, "README.md"]


def resolve(name: str, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Find a model's files, downloading from the Hub what is needed and not there.

    Args:
        name: a directory, a Hub id with an optional ``@revision``, or ``demo`` (use ``./demo`` for a directory of
            that name).
        trust_remote_code: whether code that comes with the model may run. An exported directory's own code never
            does: it would prune a model that is to be measured whole, and transformers' class is all it needs.
        weights: also fetch and check the weight files; without, config and processor files only.

    Raises:
        NotFoundError: for every reason why there is nothing to work with; message and hint say which.
    """
    hide_if_broken()
    path, revision = _locate(name, [*_CONFIG_FILES, "*.py"] if trust_remote_code else _CONFIG_FILES)
    check_sizes(path)
    if is_adapter(path):
        return _adapter(name, path, revision)
    config, family = read_config(path, name, trust_remote_code)
    trusted = trust_remote_code and getattr(config, "vtw", None) is None
    checkpoint = Checkpoint(name, path, revision, config, family, trusted)
    if weights:
        if revision is not None:
            _fetch_weights(checkpoint)
        checkpoint.check()
    return checkpoint


def _adapter(name: str, path: Path, revision: str | None) -> Checkpoint:
    """An adapter's checkpoint: what it makes of its base model."""
    base = base_of(path, name)
    if revision is not None and not (path / ADAPTER_WEIGHTS).exists():
        _snapshot(name, name.partition("@")[0], revision, [ADAPTER_WEIGHTS])
    try:
        if is_adapter(_locate(base, _CONFIG_FILES)[0]):
            raise NotFoundError("which is an adapter itself")
        found = resolve(base)
    except NotFoundError as error:
        raise NotFoundError(
            f"{name!r} is an adapter of {base!r}: {error.message}",
            f"base_model_name_or_path in {path / ADAPTER} says where the model is",
        ) from error
    return merged(path, name, revision, found)


def _locate(name: str, patterns: list[str]) -> tuple[Path, str | None]:
    """The local directory of a model with the files of ``patterns``, and the Hub commit if it has one."""
    folder = directory_of(name)
    if folder is not None:
        return folder, None
    repo, _, revision = name.partition("@")
    folder = _snapshot(name, repo, revision or None, patterns)
    return folder, folder.name


def _fetch_weights(checkpoint: Checkpoint) -> None:
    """Download the weight files that the (already present) index names, or the single file."""
    from huggingface_hub import constants

    wanted = checkpoint.shards
    if all((checkpoint.path / file).exists() for file in wanted):
        return
    if constants.HF_HUB_OFFLINE:
        raise NotFoundError(
            f"the weights of {checkpoint.name!r} are not on this machine, and HF_HUB_OFFLINE forbids fetching them",
            "unset HF_HUB_OFFLINE",
        )
    _snapshot(checkpoint.name, checkpoint.name.partition("@")[0], checkpoint.revision, wanted)


def _snapshot(name: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a Hub repository's top level, from the local cache or the Hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        with quiet_libraries(bars=sys.stderr.isatty() and not console.settings.quiet):
            folder = snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        return Path(folder)
    except errors.GatedRepoError as error:
        raise NotFoundError(
            f"the model {repo!r} is gated",
            f"ask for access on its page on the Hub, then log in with: hf auth login ({_status(error)})",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"the model {repo!r} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"there is no directory and no public model {repo!r} on the Hub",
            f"check the spelling; for a private model log in with: hf auth login ({_status(error)})",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(name, error) from error
    except errors.HFValidationError as error:
        raise NotFoundError(f"{name!r} is neither a directory nor a Hub id", first_line(error)) from error
    except errors.HfHubHTTPError as error:
        raise NotFoundError(f"the Hub refused {repo!r}: {_status(error)}", first_line(error)) from error
    except Exception as error:  # a transfer that breaks off; the classes belong to the network library
        raise NotFoundError(f"could not fetch {repo!r}: {first_line(error)}") from error


def _unreachable(name: str, error: Exception) -> NotFoundError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return NotFoundError(
            f"the model {name!r} is not on this machine, and HF_HUB_OFFLINE forbids fetching it",
            "unset HF_HUB_OFFLINE, or give a local directory",
        )
    return NotFoundError(
        f"the model {name!r} is not on this machine, and the Hub cannot be reached",
        f"check the network and HF_ENDPOINT, or give a local directory ({first_line(error.__cause__ or error)})",
    )


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__
