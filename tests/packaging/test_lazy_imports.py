"""`import sparseift_llm` is cheap, gives every public name, and still teaches transformers its checkpoints."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

import sparseift_llm
from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.checkpoints.registration import REGISTRY
from tests.helpers.models import tiny_config
from tests.helpers.processes import median_cpu_seconds, output_of

HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "scipy",
    "safetensors",
    "yaml",
    "jinja2",
    "datasets",
    "lm_eval",
}
LOADED = "; import sys; print(*sys.modules)"


# ---- what is imported


def test_the_import_loads_no_library() -> None:
    loaded = {name.partition(".")[0] for name in output_of("import sparseift_llm" + LOADED).split()}
    assert "sparseift_llm" in loaded
    assert not loaded & HEAVY


def test_configs_load_no_torch() -> None:
    loaded = output_of("from sparseift_llm import SparseIFTConfig; SparseIFTConfig(sparsity=0.5)" + LOADED).split()
    assert "sparseift_llm.config.transform" in loaded
    assert not {"torch", "transformers"} & set(loaded)


def test_the_registry_is_entered_before_models_can_be_loaded() -> None:
    program = f"import sparseift_llm, {REGISTRY}, sys; print('sparse_ift' in {REGISTRY}.AUTO_QUANTIZER_MAPPING)"
    printed = output_of(program + LOADED).split()
    assert printed[0] == "True"
    assert "sparseift_llm.checkpoints.registry_entry" in printed
    assert not {"transformers.modeling_utils", "sparseift_llm.checkpoints.transformers_hook"} & set(printed)


def test_the_import_costs_less_than_torch_and_transformers() -> None:
    programs = {"libraries": "import torch, transformers", "package": "import sparseift_llm"}
    seconds = median_cpu_seconds(programs, repeats=3)
    assert seconds["package"] <= 1.3 * seconds["libraries"], seconds
    assert seconds["package"] <= 0.5, seconds


# ---- public names


def declared_for_type_checkers() -> dict[str, str]:
    """Public names and the modules they come from, as mypy and editors see them."""
    tree = ast.parse(Path(sparseift_llm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module).removeprefix("sparseift_llm.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_tables_of_public_names_agree() -> None:
    assert declared_for_type_checkers() == sparseift_llm._PUBLIC
    assert sorted(sparseift_llm._PUBLIC) == sparseift_llm.__all__


@pytest.mark.parametrize("name", sparseift_llm.__all__)
def test_a_public_name_is_that_of_its_module(name: str) -> None:
    module = importlib.import_module(f"sparseift_llm.{sparseift_llm._PUBLIC[name]}")
    assert getattr(sparseift_llm, name) is getattr(module, name)
    assert name in dir(sparseift_llm)


def test_modules_are_attributes_and_unknown_names_are_not() -> None:
    printed = output_of("import sparseift_llm as s; print(s.isoflop.__name__, s.topology.__name__, s.__version__)")
    assert printed.split()[:2] == ["sparseift_llm.isoflop", "sparseift_llm.topology"]
    assert not hasattr(sparseift_llm, "nonsense")
    assert not hasattr(sparseift_llm, "_nonsense")
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from sparseift_llm import nonsense")


# ---- transformers loads checkpoints after the import


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in tiles, which no stock class can load, and its logits."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = sparsify(tiny_config("gpt2"), SparseIFTConfig(structure="block", block_size=4)).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save(model(torch.arange(8)[None]).logits, folder / "logits.pt")
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import sparseift_llm; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import sparseift_llm",
        "import transformers.quantizers; import sparseift_llm; from transformers import AutoModelForCausalLM",
        "import sparseift_llm.checkpoints.registry_entry; from transformers import AutoModelForCausalLM",
        "from sparseift_llm import load_pretrained; from transformers import AutoModelForCausalLM",
    ],
)
def test_transformers_loads_checkpoints_in_any_order_of_imports(imports: str, checkpoint: Path) -> None:
    program = (
        f"{imports}\nimport torch, warnings\n"
        "warnings.filterwarnings('ignore', 'block-sparse')\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}).eval()\n"
        f"logits = torch.load({str(checkpoint / 'logits.pt')!r})\n"
        "print(torch.equal(model(torch.arange(8)[None]).logits, logits))\n"
    )
    assert output_of(program).split()[-1] == "True"


def test_without_the_import_the_checkpoint_is_refused(checkpoint: Path) -> None:
    program = (
        "from transformers import AutoModelForCausalLM\n"
        f"try:\n    AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})\n"
        "except Exception as error:\n    print('refused')\n"
    )
    assert output_of(program).split()[-1] == "refused"
