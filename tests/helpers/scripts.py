"""Loading the project's scripts (recipes, eval, benchmarks), which are no package, as modules. No tests stand here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.helpers.paths import ROOT


def load_script(path: str | Path) -> ModuleType:
    """A fresh module of the script at `path`, from the project's folder, as a user's copy of it would be.

    Modules beside it are found, as they are when Python runs the script.
    """
    name = "script_" + "_".join(Path(path).with_suffix("").parts[-2:])
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
