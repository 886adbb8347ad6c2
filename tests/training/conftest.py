"""What every test of training leaves behind is taken back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparseift_llm.training import compiler_stance


@pytest.fixture(autouse=True)
def _compiled_code_runs() -> Iterator[None]:
    """Controllers that a test leaves armed, in whichever file, must not switch compiled code off in the next test."""
    _release_all()
    yield
    _release_all()


def _release_all() -> None:
    for holder in list(compiler_stance._holders.values()):
        holder()
    torch.compiler.set_stance("default")
