"""The Hugging Face Hub: download a repository by name and revision, upload a folder.

Not here: what the files hold (load.py, save.py), model cards (engine/publishing).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from config_tools import HUB_ID, HUB_NAME, InputError

# Files at the top of a repository; no pickles, no code.
ALLOW_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


def find(source: str | Path, revision: str | None = None) -> Path:
    """The directory `source`, or a snapshot of the Hub repository of that name.

    Subfolders, pickles and code are not downloaded; cached files are reused. Raises `InputError`.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(rf"{HUB_NAME}(/{HUB_NAME})?", str(source)):
        raise InputError(f"{source}: no such checkpoint directory.")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            str(source), revision=revision, allow_patterns=ALLOW_PATTERNS, ignore_patterns=["*/*"]
        )
    except Exception as error:  # HTTP errors have no base class common to all versions
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{source}: no such checkpoint directory, and downloading it from the Hub{at} failed: "
            f"{_reason(error)}."
        ) from None
    return Path(folder)


def push(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload a folder's files as one commit; returns the URL of the repository.

    Creates the repository if it does not exist. After an interruption, files that have arrived are
    not sent again. Raises `InputError`.
    """
    if not re.fullmatch(HUB_ID, repo_id):
        raise InputError(f"{repo_id!r} is not a repository name; expected user/name.")
    require_login()
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload picoVLM checkpoint"
        )
    except Exception as error:  # as in `find`
        raise InputError(
            f"{repo_id}: not pushed: {_reason(error)}; push again to send the missing files."
        ) from None
    return done.repo_url.url if done.repo_url else repo_id


def push_saved(save: Callable[[str], None], repo_id: str, private: bool) -> str:
    """`push` the files that `save(folder)` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return push(folder, repo_id, private)


def require_login() -> None:
    """Raise `InputError` unless a Hub token is stored."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError("a push needs a login to the Hub; run `hf auth login`.")


def _reason(error: BaseException) -> str:
    """Why a request failed and what to do, for the end of a sentence."""
    from huggingface_hub import constants, errors

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # of one file's upload
    known = {
        errors.LocalTokenNotFoundError: "no login was found; run `hf auth login`",
        errors.GatedRepoError: "the repository is gated; request access on its page",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.HFValidationError: "it is not a repository name",
    }
    status = getattr(getattr(error, "response", None), "status_code", None)
    by_status = {
        401: "the login is missing or not valid; run `hf auth login`",
        403: "the login has no access to the repository",
        404: "no such repository is visible to this login",
    }
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    cause = getattr(error.__cause__, "response", None) if status is None else None
    status = status or getattr(cause, "status_code", None)
    if status is not None:
        return by_status.get(status, f"the Hub answered {status}; try again later")
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set and the cache has no copy"
    lines = str(error).splitlines()
    return f"no connection to {constants.ENDPOINT} ({lines[0] if lines else type(error).__name__})"
