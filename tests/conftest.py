"""Settings for all tests: quiet libraries, hypothesis without deadlines, and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def default_compiler_stance() -> Iterator[None]:
    """A controller dropped in the middle of an update step leaves compiled code switched off."""
    yield
    torch.compiler.set_stance("default")
