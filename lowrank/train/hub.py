"""Upload of a finished file to the Hugging Face hub, when a repository is named."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from lowrank.config.flags_output import Hub
from lowrank.errors import Refused


def upload(options: Hub, path: Path) -> None:
    """Upload `path` to `--huggingface_repo_id`; the local file stays whatever happens. Raises `Refused`."""
    if not options.huggingface_repo_id:
        return
    api, kind = HfApi(token=options.huggingface_token), options.huggingface_repo_type or "model"
    try:
        api.create_repo(
            options.huggingface_repo_id,
            repo_type=kind,
            exist_ok=True,
            private=options.huggingface_repo_visibility != "public",
        )
        api.upload_file(
            path_or_fileobj=str(path),
            repo_id=options.huggingface_repo_id,
            repo_type=kind,
            path_in_repo="/".join(filter(None, (options.huggingface_path_in_repo, path.name))),
            run_as_future=options.async_upload,
        )
    except (HfHubHTTPError, OSError) as error:
        raise Refused(
            f"{path} could not be uploaded to {options.huggingface_repo_id}: {str(error).splitlines()[0]}; "
            "the file is kept, check the token and the network"
        ) from error
