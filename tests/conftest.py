"""Settings for all tests: quiet libraries, hypothesis without deadlines, and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from sparseift_llm.training import compiler_stance

if TYPE_CHECKING:
    from tests.helpers.fresh_environment import FreshEnvironment

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# of .ci/run: the same examples in every run, so that a change fails for what it changed
settings.register_profile("ci", parent=settings.get_profile("shared"), derandomize=True)
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def default_compiler_stance() -> Iterator[None]:
    """A controller that a test leaves in the middle of an update keeps compiled code switched off while it lives."""
    yield
    for holder in list(compiler_stance._holders.values()):
        holder()
    torch.compiler.set_stance("default")


@contextmanager
def tiny_models_of(structure: str) -> Iterator[str]:
    """`tiny_runs.sparse_gpt2` builds models of this structure, also in processes that are started meanwhile."""
    from sparseift_llm.ops.kernels.native import NATIVE

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.tiny_runs.STRUCTURE", structure)
        patch.setenv("SPARSEIFT_TEST_STRUCTURE", structure)
        # forced, so that it does not warn of small tiles in processes that turn warnings into errors
        patch.setenv("SPARSEIFT_BLOCK_KERNEL", "native" if NATIVE.is_available() else "blas")
        yield structure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per structure, or per structure named in its `structures` mark."""
    from tests.helpers.tiny_runs import STRUCTURES

    mark = metafunc.definition.get_closest_marker("structures")
    chosen = mark.args if mark else STRUCTURES
    assert set(chosen) <= set(STRUCTURES), chosen
    for name, scope in (("either_structure", "function"), ("every_structure", "module")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, chosen, indirect=True, scope=scope)  # type: ignore[arg-type]


@pytest.fixture
def either_structure(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once per structure of tiny models, see `pytest_generate_tests`."""
    with tiny_models_of(request.param):
        yield request.param


@pytest.fixture(scope="module")
def every_structure(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs all tests of a module once per structure; for modules in which every test asks for it."""
    with tiny_models_of(request.param):
        yield request.param


@pytest.fixture(scope="session")
def fresh_environment(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """The package as users install it, see tests/helpers/fresh_environment.py; one for all workers of a session."""
    from tests.helpers.fresh_environment import shared_environment

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose folder is one of several in the folder of the session
        folder = folder.parent
    return shared_environment(folder / "fresh_environment")
