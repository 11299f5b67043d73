"""A failed upload never ends a run: it is logged at once, and at the end."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from lowrank.config.flags_output import Hub
from lowrank.train import hub

FAILURES = {
    "no network": ConnectionError("Name or service not known"),
    "offline": OfflineModeIsEnabled("offline mode is enabled"),
    "time": TimeoutError("timed out"),
    "status": HTTPError("401 Unauthorized\nmore"),
    "transfer": RuntimeError("Data processing error"),
    "name": ValueError("Repo id must be in the form"),
}


class Api:
    """The two calls of a hub that fails, at once or in the background."""

    def __init__(self, error: BaseException | None, background: bool = False) -> None:
        self.error, self.background, self.uploaded = error, background, []

    def create_repo(self, *_, **__) -> None:
        if self.error and not self.background:
            raise self.error

    def upload_file(self, *, path_in_repo, run_as_future, **_):
        future: Future = Future()
        if self.error:
            future.set_exception(self.error)
        else:
            self.uploaded.append(path_in_repo)
            future.set_result(None)
        return future if run_as_future else None


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", FAILURES)
def test_failed_upload_is_logged_and_the_run_goes_on(kind, background, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hub, "HfApi", lambda token: Api(FAILURES[kind], background))
    uploads = hub.Uploads(Hub(huggingface_repo_id="me/cat", async_upload=background))
    for name in ("a", "b"):
        uploads.upload(tmp_path / name)
    uploads.finish()
    lines = [line for line in caplog.messages if "were not uploaded" in line]
    reason = str(FAILURES[kind]).splitlines()[0]
    assert len(lines) == 1 and "2 files were not uploaded to me/cat" in lines[0] and reason in lines[0]
    assert "more" not in caplog.text  # one line of the reason


def test_bug_in_a_background_upload_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda token: Api(KeyError("x"), background=True))
    uploads = hub.Uploads(Hub(huggingface_repo_id="me/cat", async_upload=True))
    uploads.upload(tmp_path / "a")
    with pytest.raises(KeyError):
        uploads.finish()


def test_uploads_have_the_path_in_the_repository(tmp_path, monkeypatch, caplog):
    api = Api(None)
    monkeypatch.setattr(hub, "HfApi", lambda token: api)
    uploads = hub.Uploads(Hub(huggingface_repo_id="me/cat", huggingface_path_in_repo="x"))
    uploads.upload(tmp_path / "cat.safetensors")
    uploads.finish()
    assert api.uploaded == ["x/cat.safetensors"] and not caplog.messages
    hub.Uploads(Hub()).upload(tmp_path / "cat.safetensors")
    assert len(api.uploaded) == 1
