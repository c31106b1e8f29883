"""Uploads an exported directory to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.errors import NotFoundError, UsageError, VtwError, first_line
from vtwcli.export.directory.manifest import MANIFEST, check_files, read_manifest
from vtwcli.io import console


def push(directory: Path, repo: str, private: bool = True) -> str:
    """Upload an exported directory as one commit; the repository is made if it does not exist.

    Args:
        directory: what ``export_hf`` made; its files are checked against the manifest first.
        repo: Hub id, ``name/model``.
        private: nobody else may see it. An existing public repository is then refused.

    Returns:
        The address of the commit.

    Raises:
        GateError: the directory does not match its manifest.
        UsageError: not a Hub id, or a public repository where a private one was asked for.
        NotFoundError: not an export, or the Hub cannot be reached.
        VtwError: the Hub refuses.
    """
    from huggingface_hub import errors

    manifest = read_manifest(directory)
    check_files(directory, manifest)
    try:
        return _upload(directory, manifest, repo, private)
    except VtwError:
        raise
    except errors.HFValidationError as error:
        raise UsageError(
            f"{repo!r} is not a Hub id: {first_line(error)}", "it looks like name/model"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise NotFoundError("HF_HUB_OFFLINE forbids pushing", "unset it") from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except Exception as error:  # the client's own errors are not part of its interface
        raise NotFoundError(
            f"could not push to {repo!r}: {first_line(error)}", "check the network and HF_ENDPOINT"
        ) from error


def _upload(directory: Path, manifest: dict[str, Any], repo: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    made = api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.repo_info(made.repo_id).private:
        raise UsageError(
            f"{made.repo_id} exists on the Hub and is public", "choose another name, or push it as public"
        )
    with console.progress(f"uploading to {made.repo_id}"):
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=directory,
            allow_patterns=[*manifest["files"], MANIFEST],  # nothing else that may lie there
            commit_message=f"Visual token schedule over {manifest['model']['name']}",
        )
    return str(commit.commit_url)


def _refused(repo: str, error: Any) -> VtwError:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        hint = "log in with a token that may write: hf auth login"
        return VtwError(f"the Hub does not let you write to {repo!r} (HTTP {status})", hint)
    return VtwError(f"the Hub refused {repo!r}: {first_line(error)}")
