"""Upload of saved files to the Hugging Face hub, when a repository is named."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from lowrank.config.flags_output import Hub
from lowrank.errors import shortened

logger = logging.getLogger(__name__)

# HTTPError is that of the hub's own HTTP library; a repository's name that is not valid is a ValueError, and
# the hub's transfer library raises RuntimeErrors
_FAILURES = (HTTPError, OSError, RuntimeError, ValueError)


class Uploads:
    """Uploads files to `--huggingface_repo_id`. A failure is logged, and the run goes on."""

    def __init__(self, options: Hub) -> None:
        self._options, self._failed = options, dict[Path, str]()
        self._running: list[tuple[Path, Future]] = []

    def upload(self, path: Path) -> None:
        """Upload a saved file, or with --async_upload start to; nothing without a repository."""
        options = self._options
        if not options.huggingface_repo_id:
            return
        kind = options.huggingface_repo_type or "model"
        try:
            api = HfApi(token=options.huggingface_token)
            api.create_repo(
                options.huggingface_repo_id,
                repo_type=kind,
                exist_ok=True,
                private=options.huggingface_repo_visibility != "public",
            )
            started = api.upload_file(
                path_or_fileobj=str(path),
                repo_id=options.huggingface_repo_id,
                repo_type=kind,
                path_in_repo="/".join(filter(None, (options.huggingface_path_in_repo, path.name))),
                run_as_future=options.async_upload,
            )
        except _FAILURES as error:
            self._fail(path, error)
            return
        if isinstance(started, Future):
            self._running.append((path, started))

    def _fail(self, path: Path, error: BaseException) -> None:
        reason = shortened((str(error).strip() or type(error).__name__).splitlines()[0], 300)
        self._failed[path] = reason
        logger.warning(
            "%s could not be uploaded to %s (%s); the file is kept and the run goes on",
            *(path, self._options.huggingface_repo_id, reason),
        )

    def finish(self) -> None:
        """Wait for uploads in the background, and log which files are not on the hub."""
        for path, future in self._running:
            error = future.exception()
            if isinstance(error, _FAILURES):
                self._fail(path, error)
            elif error is not None:
                raise error
        self._running.clear()
        if self._failed:
            logger.warning(
                "%d files were not uploaded to %s: %s; the last reason is: %s; upload them with hf upload",
                *(len(self._failed), self._options.huggingface_repo_id),
                *(", ".join(map(str, self._failed)), list(self._failed.values())[-1]),
            )
        self._failed.clear()
