"""Every function and class of 0.1.0 is found where it was, and says where it is now."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm import _moved
from sparseift_llm._moved import GONE_IN, MODULES, NAMES
from tests.helpers.paths import ROOT
from tests.helpers.processes import output_of

# All public functions and classes at the top level of modules, written by a walk over the source of 0.1.0.
OLD_NAMES = (Path(__file__).parent / "names_of_0_1_0.txt").read_text(encoding="utf-8").split()
OLD_MODULES = sorted({name.rpartition(".")[0] for name in OLD_NAMES})
# What modules of the package shared with each other, and what is now an object with other arguments or pydantic's work.
REPLACED = {
    "sparseift_llm.config": {"check_family_options"},
    "sparseift_llm.strict": {"check_fields", "convert"},
    "sparseift_llm.layout": {"has_own_layout"},
    "sparseift_llm.planning": {"plan_of", "record"},
    "sparseift_llm.families.wide": {"start", "wide_config"},
    "sparseift_llm.families.parallel": {"num_norm_params", "parts", "start"},
    "sparseift_llm.families.factorized": {"num_norm_params", "parts", "start"},
    "sparseift_llm.families.doped": {"num_norm_params", "parts", "start"},
    "sparseift_llm.layers.block": {"AppliedByNextLayer"},
    "sparseift_llm.dst.zero": {"ZeroState"},
    "sparseift_llm.topology.blocks": {"drop_and_grow_per_row"},
    "sparseift_llm.topology.heads": {"HeadGroups", "drop_and_grow_per_head", "random_mask_per_head"},
    "sparseift_llm.topology.masks": {"drop_and_grow", "magnitude_mask"},
    "sparseift_llm.families.drop_in": {"build", "num_norm_params", "parts_of", "start"},
}


def taken(module: str, name: str) -> tuple[Any, list[str]]:
    """`from module import name` of a user, and the deprecation warnings that it causes."""
    scope: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"from {module} import {name}", scope)
    return scope[name], [str(entry.message) for entry in caught if entry.category is DeprecationWarning]


@pytest.mark.parametrize("module", OLD_MODULES)
def test_names_are_found_where_they_were(module: str) -> None:
    old = module.removeprefix("sparseift_llm.")
    names = {name.rpartition(".")[2] for name in OLD_NAMES if name.rpartition(".")[0] == module}
    for name in sorted(names - REPLACED.get(module, set())):
        value, said = taken(module, name)
        assert callable(value), name
        place = NAMES.get(f"{old}.{name}") or (f"{MODULES[old]}.{name}" if old in MODULES else None)
        if place is not None and name not in vars(sys.modules[module]):
            assert set(said) == {
                f"{module}.{name} has moved to sparseift_llm.{place}; the old path goes with version {GONE_IN}"
            }
            assert value == _moved._import(place)
        else:
            assert not said


def test_replaced_names_are_missing_by_name() -> None:
    for module, names in REPLACED.items():
        for name in names:
            with pytest.raises(ImportError, match=name):
                taken(module, name)


def test_the_tables_point_to_what_exists() -> None:
    for old, new in MODULES.items():
        assert importlib.import_module(f"sparseift_llm.{new}"), old
    for old, place in NAMES.items():
        assert _moved._import(place) is not None, old


def test_old_modules_need_no_other_import() -> None:
    """In a fresh process, as a user's script begins; the warning names the line of the script."""
    program = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from sparseift_llm.dst.callback import SparseTrainingCallback\n"
        "    import sparseift_llm\n"
        "    assert sparseift_llm.surgery.sparsify is sparseift_llm.sparsify\n"
        "    assert sparseift_llm.SparseTrainingCallback is SparseTrainingCallback\n"
        "print(*(entry.filename for entry in caught if entry.category is DeprecationWarning))\n"
    )
    assert output_of(program).split() == ["<string>"] * 2


def test_modules_and_names_that_never_were_are_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match="surgeon"):
        importlib.import_module("sparseift_llm.surgeon")
    for module in ("sparseift_llm.surgery", "sparseift_llm.planning", "sparseift_llm.dst"):
        for name in ("nonsense", "_private"):
            with pytest.raises(ImportError, match=f"cannot import name '{name}'"):
                taken(module, name)


def test_a_submodule_is_not_taken_for_an_old_name() -> None:
    printed = output_of("from sparseift_llm.planning import allocation; import sys; print('torch' in sys.modules)")
    assert printed.split()  # and no DeprecationWarning, which would be an error there
    module, said = taken("sparseift_llm.planning", "planner")
    assert module.__name__ == "sparseift_llm.planning.planner"
    assert not said


def test_nothing_in_the_package_uses_old_paths() -> None:
    folder = ROOT / "sparseift_llm"
    old = {f"sparseift_llm.{name}" for name in MODULES if not (folder / name.replace(".", "/")).is_dir()}
    for path in [*(ROOT / "sparseift_llm").rglob("*.py"), *(ROOT / "recipes").glob("*.py"), *(ROOT / "eval").glob("*")]:
        if path.suffix != ".py" or path.name == "_moved.py":
            continue
        words = {word.strip("`,:()") for word in path.read_text(encoding="utf-8").split()}
        assert not words & old, path
