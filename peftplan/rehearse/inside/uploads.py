"""What a program would send to the Hub is not sent: its calls succeed, and the report says so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport

COMMITS = (
    *("create_commit", "upload_file", "upload_folder", "upload_large_folder", "delete_file", "delete_files", "delete_folder"),
    *("create_pull_request", "preupload_lfs_files", "create_branch", "create_tag", "delete_repo", "update_repo_settings"),
    *("super_squash_history", "delete_branch", "delete_tag"),
)
"""Methods of `huggingface_hub.HfApi` that change a repository."""
WHO = {"type": "user", "name": "rehearsal", "fullname": "rehearsal", "orgs": []}
"""The user that a program is told it runs as."""


def start(say: Callable[[str], None]) -> None:
    """Answer for the Hub, once the program imports its client. `say` is told what was not sent."""
    sys.meta_path.insert(0, AfterImport({"huggingface_hub.hf_api": lambda module: _answer(module, say)}))


def _answer(module: Any, say: Callable[[str], None]) -> None:
    endpoint = module.constants.ENDPOINT

    def create_repo(self: Any, repo_id: str, **_: Any) -> Any:
        say(f"nothing goes to the Hub: {repo_id} was not created")
        owned = repo_id if "/" in repo_id else f"{WHO['name']}/{repo_id}"
        return module.RepoUrl(f"{endpoint}/{owned}", endpoint=endpoint)

    def commit(name: str) -> Callable[..., Any]:
        def not_sent(self: Any, *args: Any, run_as_future: bool = False, **kwargs: Any) -> Any:
            repo_id = kwargs.get("repo_id") or next((arg for arg in args if isinstance(arg, str)), "a repository")
            say(f"nothing goes to the Hub: {name} of {repo_id} was left out")
            fields = {"commit_message": str(kwargs.get("commit_message")), "commit_description": "", "oid": "0" * 40}
            info = module.CommitInfo(commit_url=f"{endpoint}/{repo_id}/commit/{'0' * 40}", **fields)
            if not run_as_future:
                return info
            future: Future[Any] = Future()
            future.set_result(info)
            return future

        return not_sent

    answers = {"create_repo": create_repo, "whoami": lambda self, *args, **kwargs: dict(WHO), **{n: commit(n) for n in COMMITS}}
    for name, answer in answers.items():
        setattr(module.HfApi, name, answer)
        if hasattr(module, name):  # the module's functions are methods of one instance, bound when it was imported
            setattr(module, name, getattr(module.api, name))
