"""What every test of training leaves behind is taken back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _compiler_stance() -> Iterator[None]:
    """Controllers that a test leaves armed must not change the compiler's stance for the next test."""
    yield
    torch.compiler.set_stance("default")
