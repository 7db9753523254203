"""Sends an exported folder to a repository of the Hugging Face hub, with huggingface_hub's own login."""

from __future__ import annotations

import re

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError


def check_login(repository: str) -> None:
    """Ask the hub whether someone is logged in here. ValueError: nobody is, or the hub cannot be reached."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--push {repository}: give a repository of the Hugging Face hub as OWNER/NAME")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ValueError(
            f"--push {repository}: nobody is logged in to the Hugging Face hub on this machine: run hf auth login"
        ) from None
    except Exception as error:  # networks fail in many ways
        raise ValueError(
            f"--push {repository}: the Hugging Face hub does not answer or does not know the login "
            f"({_one_line(error)}); without a network, leave --push out and send the folder from elsewhere"
        ) from error


def push(folder: str, repository: str) -> str:
    """Send all files in ``folder`` as one commit; the address of ``repository``, which is made if it is not there.

    ValueError: that failed; the folder is complete on this machine.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add model")
    except Exception as error:  # networks fail in many ways
        raise ValueError(
            f"--push {repository}: {folder} is complete on this machine, but it could not be sent "
            f"({_one_line(error)}); send it with hf upload {repository} {folder}"
        ) from error
    return address


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
