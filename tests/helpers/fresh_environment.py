"""One fresh environment with the package as users get it: built as a wheel, installed, away from the clone.

The environment is shared by all tests and all workers of a session (`fresh_environment` in tests/conftest.py). Its
libraries are those of the running interpreter, which a `.pth` file makes visible, so that it takes seconds to make.
Only the package itself is new. The editable install of the running interpreter does not come along: Python reads the
`.pth` files of an environment's own folder, but not those of a folder that a `.pth` file names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tests.helpers.paths import ROOT

_BUILT_FROM = ("sparseift_llm", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class FreshEnvironment:
    """A virtual environment with the installed wheel.

    Args:
        folder: of the environment.
        wheel: the file that was installed.
    """

    folder: Path
    wheel: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *words: str | Path, cwd: Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, offline, without the clone on its path. The caller checks its exit status.

        Args:
            words: the program's name, e.g. `sparseift` or `python`, and its arguments.
            cwd: a folder away from the clone.
            timeout: in seconds.
        """
        assert not cwd.resolve().is_relative_to(ROOT)
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment = {
            **kept,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [str(self.folder / "bin" / words[0]), *map(str, words[1:])]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )


def shared_environment(folder: Path) -> FreshEnvironment:
    """The environment in `folder`, which the first process that asks for it makes.

    Args:
        folder: shared by all workers of a session.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "ready").exists():
            _make(folder)
            (folder / "ready").touch()
    (wheel,) = (folder / "dist").glob("*.whl")
    return FreshEnvironment(folder / "environment", wheel)


def _make(folder: Path) -> None:
    source = folder / "source"  # a copy, because building leaves files behind
    for name in _BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, source / name)
    # without isolation, because an isolated build would download setuptools; pyproject.toml says which version it needs
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", source)
    shutil.rmtree(source)
    (wheel,) = (folder / "dist").glob("*.whl")
    environment = folder / "environment"
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(found.stdout.strip()) / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n", encoding="utf-8")


def _run(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
