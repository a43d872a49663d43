"""Get a model's config.json by Hub id: from the local Hugging Face cache, else from the Hub. No other file is fetched.

The cache is read by its documented layout, so that a cached model needs no extra; the Hub needs `huggingface_hub` (extra `hub`),
which honours HF_ENDPOINT, HF_TOKEN and HF_HOME.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

from peftplan import files
from peftplan.arch.configfile import CONFIG_NAME, MAX_CONFIG_BYTES
from peftplan.errors import InputError, MissingExtraError, PeftplanError

_REPO_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*/\w[\w.-]*", re.ASCII)
MOST_OF_A_COMMIT = 100
"""Bytes of a file that holds a commit: 40 hexadecimal digits."""
MAX_REPO_ID = 96
"""The Hub's own limit (`validate_repo_id`, huggingface_hub/utils/_validators.py)."""

UNREACHABLE = "cannot be reached"
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


class HubError(PeftplanError):
    """A config that cannot be fetched: a gated or missing repository, no config.json in it, no connection."""


class UnreachableError(HubError):
    """The Hub does not answer, or may not be asked: whether it has the repository is not known."""


def is_repo_id(text: str) -> bool:
    """Whether a text has the form `owner/name` that the Hub accepts."""
    return len(text) <= MAX_REPO_ID and _REPO_ID.fullmatch(text) is not None and not text.endswith((".", "-", ".git"))


def cached_config(repo_id: str) -> Path | None:
    """The config.json of `main` in the local Hugging Face cache, or None if it is not there."""
    repo = _cache_folder() / f"models--{repo_id.replace('/', '--')}"
    try:
        commit = files.text(repo / "refs" / "main", field="refs/main", most=MOST_OF_A_COMMIT).strip()
    except InputError:
        return None
    path = repo / "snapshots" / commit / CONFIG_NAME
    return path if files.is_file(path) else None


def fetch_config(repo_id: str) -> Path:
    """Fetch the config.json of `main` from the Hub into the local cache and return its path.

    Raises HubError, one line, if it cannot be fetched, UnreachableError without a connection; MissingExtraError without
    `huggingface_hub`.
    """
    if _offline():
        raise UnreachableError(f"{repo_id}: not in the local Hugging Face cache, and HF_HUB_OFFLINE forbids asking the Hub")
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtraError(f"{repo_id} is not built in and not in the local cache; reading it from the Hub", "hub") from None
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        size = hub.get_hf_file_metadata(hub.hf_hub_url(repo_id, CONFIG_NAME, endpoint=endpoint)).size
        if size is not None and size > MAX_CONFIG_BYTES:
            raise InputError("model", repo_id, f"its config.json has {size} bytes; accepted: at most {MAX_CONFIG_BYTES}")
        return Path(hub.hf_hub_download(repo_id, CONFIG_NAME, endpoint=endpoint, cache_dir=_cache_folder()))
    except InputError:
        raise
    except Exception as error:
        # The HTTP client's own errors (requests or httpx, by version) share no base class with the Hub's.
        reason = _reason(error, errors)
        raise (UnreachableError if UNREACHABLE in reason else HubError)(f"{repo_id}: {reason}") from None


def _reason(error: Exception, errors: ModuleType) -> str:
    """The reason of a failed request in one line, without the server's text, which can be long and contain a token."""
    site = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"gated: request access on its page at {site}, then set HF_TOKEN (or run `hf auth login`)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model at {site}, or it is private (if so, set HF_TOKEN)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"not in the local Hugging Face cache, and {site} {UNREACHABLE}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository has no {CONFIG_NAME} (a GGUF, adapter or original-format repository?); name its base model"
    if status == 401:
        return f"{site} requires a valid token: check HF_TOKEN"
    if status is not None:
        return f"{site} answers with HTTP status {status}"
    instead = f"without a connection, name a built-in model or the path of a {CONFIG_NAME}"
    return f"{site} {UNREACHABLE} ({type(error).__name__}); {instead}"


def _offline() -> bool:
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _cache_folder() -> Path:
    """Where huggingface_hub keeps repositories (`HF_HUB_CACHE`, huggingface_hub/constants.py)."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(folder)).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"
