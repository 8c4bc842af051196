"""Files of a repository on the hub, downloaded or found in the hub's cache."""

from collections.abc import Sequence
from pathlib import Path


def hub_files(
    hub_id: str,
    patterns: Sequence[str],
    *,
    named: str,
    remedy: str,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder with the files of a repository that match `patterns`.

    Args:
        hub_id: Such as facebook/dinov2-base.
        patterns: Names of files, with * for any characters.
        named: What the setting is and what it names, for messages.
        remedy: What to do instead, for messages.
        revision: Commit, tag or branch; None for the default branch.
        local_files_only: Look in the cache only.

    Raises:
        ValueError: There is no such repository, the hub cannot be reached, or the repository is
            gated; then the message says where to accept its terms.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=local_files_only,
            )
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{named} is gated: accept its terms at https://huggingface.co/{hub_id} with your "
            "account, then sign in on this machine with hf auth login, or set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if local_files_only:
            found = f"{named} is not a local folder, and downloads are disabled"
        else:
            found = (
                f"{named} is not a local folder, and it could not be downloaded as a hub id "
                f"({error})"
            )
        raise ValueError(f"{found}; {remedy}") from error


def download_command(hub_id: str) -> str:
    """The command that downloads a repository to a folder of its name."""
    return f"hf download {hub_id} --local-dir checkpoints/{Path(hub_id).name}"
