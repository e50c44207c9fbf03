"""Folders of runs on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bvpo_stats.errors import UserError


def push_folder(folder: Path, repository: str, kind: Literal["model", "dataset"], patterns: list[str]) -> str:
    """Puts files of a folder into a repository on the hub, made private where it is not there yet.

    Args:
        folder: Holds the files, README.md (the card) among them.
        repository: ``OWNER/NAME`` or ``NAME``.
        kind: Of the repository.
        patterns: Which files.

    Returns:
        Where they are.

    Raises:
        UserError: No access, no network, or a name that cannot be.
    """
    from huggingface_hub import HfApi

    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md, so there is no card to push. Write the run again.")
    try:
        api = HfApi()
        name = api.create_repo(repository, repo_type=kind, private=True, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            repo_type=kind,
            folder_path=str(folder),
            allow_patterns=patterns,
            commit_message="Written by bvpo-stats",
        )
    except Exception as error:  # of the network, of access, of the name: huggingface_hub has a dozen
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"`push_to_hub={repository!r}`: {reason} What was to be pushed is in {folder}; the same command tries it "
            "again."
        ) from error
    return str(name)
