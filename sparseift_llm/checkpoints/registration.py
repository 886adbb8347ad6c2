"""Registers this package with transformers as soon as, but not before, transformers loads its quantizers.

`from_pretrained` restores checkpoints with a layout of their own through transformers' registry of quantizers
(`transformers.quantizers.auto`). Importing that registry takes longer than importing torch, and few programs need it at
once. So `import sparseift_llm` leaves it alone and puts a finder on `sys.meta_path`. The finder waits for that one
module, and adds the entry of this package directly after the module has run.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers has loaded its quantizers already, and otherwise when it does.

    Calling this again has no further effect.
    """
    registry = sys.modules.get(REGISTRY)
    if registry is not None and hasattr(registry, "register_quantizer"):  # it has run, and is not still running
        _register()
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _register() -> None:
    importlib.import_module("sparseift_llm.checkpoints.registry_entry")
    importlib.import_module("sparseift_llm.layers.unattended")  # before the first model is built


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds only transformers' registry of quantizers, by asking the other finders, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _RegistryFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader)
            if spec is not None:
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """Runs a module with its own loader, and then registers this package."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        """`get_source`, `is_package` and the like, which tracebacks and tools ask a loader for."""
        return getattr(self._loader, name)
