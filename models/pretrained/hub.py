"""The Hugging Face Hub: from it by name and revision, to it when asked.

Not here: what the files hold (checkpoint_files.py), the words of a model card (engine/publishing/model_card.py,
engine/publishing/classifier_card.py).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from config_tools import HUB_NAME, InputError

# Of a repository's files; never those of its folders, pickles, code.
WANTED = ["*.json", "*.safetensors", "*.jinja"]


def find(source: str | Path, revision: str | None = None) -> Path:
    """A directory as it is, or the snapshot of a Hub repository, from the cache where it is there.

    Raises `InputError`. What lies in folders, pickles and code are never downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(rf"{HUB_NAME}(/{HUB_NAME})?", str(source)):
        raise InputError(f"{source}: no such checkpoint directory.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(source), revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # those of the HTTP library have no base that all versions share
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{source}: no such checkpoint directory, and from the Hub{at} it cannot be had: "
            f"{reason(error)}."
        ) from None


def push(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload a folder's files as one commit, into a new private repository if there is none.

    Returns its address. What an interrupted upload has brought there is not sent again.
    Raises `InputError`.
    """
    if not re.fullmatch(rf"{HUB_NAME}/{HUB_NAME}", repo_id):
        raise InputError(f"{repo_id!r}: is not the name of a repository, as in user/name.")
    require_login()
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload picoVLM checkpoint"
        )
    except Exception as error:  # as above
        raise InputError(
            f"{repo_id}: not pushed: {reason(error)}; a new try sends only what is missing."
        ) from None
    return done.repo_url.url if done.repo_url else repo_id


def push_saved(save: Callable[[str], None], repo_id: str, private: bool) -> str:
    """Upload what `save(folder)` writes; `push` says how."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return push(folder, repo_id, private)


def require_login() -> None:
    """Raise `InputError` unless there is a token to push with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError("a push needs a login to the Hub, so run `hf auth login`.")


def reason(error: BaseException) -> str:
    """Why the Hub refused, in words that say what to do."""
    from huggingface_hub import constants, errors

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # what went wrong within one file's upload
    known = {
        errors.LocalTokenNotFoundError: "there is no login, so run `hf auth login`",
        errors.GatedRepoError: "its owners must grant access first, on its page",
        errors.RevisionNotFoundError: "it has no such revision",
        errors.HFValidationError: "that is not the name of a repository",
    }
    status = getattr(getattr(error, "response", None), "status_code", None)
    by_status = {
        401: "the login is missing or not valid, so run `hf auth login`",
        403: "the login has no right to it",
        404: "there is none of that name that the login may see",
    }
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    cause = getattr(error.__cause__, "response", None) if status is None else None
    status = status or getattr(cause, "status_code", None)
    if status is not None:
        return by_status.get(status, f"the Hub answered {status}, try again later")
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set and it is not in the cache"
    said = str(error).splitlines()
    return f"no connection to {constants.ENDPOINT} ({said[0] if said else type(error).__name__})"
