"""What many tests share: one tiny FLUX, one basis cache for the session, a clean accelerate for each test."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import HealthCheck, settings

from lowrank.models.family import Source
from lowrank.models.flux import FLUX
from tools import make_tiny_sd
from tools.make_tiny_flux import make

# The same examples in every run; no deadline, because a busy machine is no bug.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=20,
    database=None,
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """A folder with a tiny FLUX; not to be written to."""
    return make(tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A folder with a tiny SD 1.5, also as one file in `single`; not to be written to."""
    return make_tiny_sd.make(tmp_path_factory.mktemp("models") / "tiny-sd", "sd15", single=True)


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory):
    """A folder with a tiny SD 2 that predicts v, also as one file in `single`; not to be written to."""
    return make_tiny_sd.make(tmp_path_factory.mktemp("models") / "tiny-sd2", "sd2", single=True)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A folder with a tiny SDXL, also as one file in `single`; not to be written to."""
    return make_tiny_sd.make(tmp_path_factory.mktemp("models") / "tiny-sdxl", "sdxl", single=True)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A basis cache: the toys' and the tiny model's weights are always the same."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="session")
def folder(tiny_flux):
    """The tiny FLUX under the name of what `Source` takes."""
    return tiny_flux


@pytest.fixture(scope="module")
def models(folder):
    """The tiny FLUX with all its parts, in fp32."""
    return FLUX.load(Source(str(folder), dtype=torch.float32))


@pytest.fixture
def cache(bases):
    """The basis cache under the name that the networks give it."""
    return bases


@pytest.fixture(autouse=True)
def _caches_in_tmp(tmp_path_factory, monkeypatch, bases):
    """Nothing is read from or written to the user's cache; accelerate forgets the run before."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
