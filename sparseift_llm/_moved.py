"""Names of version 0.1 at the modules where they used to be. They go with version 0.3.0, and this file with them.

Modules that are gone (`sparseift_llm.surgery`) are found by a finder on `sys.meta_path`. Modules in whose place there
is a folder now (`sparseift_llm.planning`), and modules that some names have left, give their old names by
`__getattr__ = old_names(__name__)`. Both import the name from its new module at that moment, and warn.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

GONE_IN = "0.3.0"
_PACKAGE = "sparseift_llm"

# old module -> new module
MODULES = {
    "allocation": "planning.allocation",
    "analysis": "analysis.across_runs",
    "architectures": "models.architectures",
    "bench": "bench.rows",
    "checkpoint": "checkpoints.loading",
    "config": "config.transform",
    "corpora": "data.corpora",
    "correlation": "analysis.correlation",
    "data": "data.loading",
    "dst.algorithms": "training.algorithms",
    "dst.averages": "training.averages",
    "dst.callback": "trainer.callback",
    "dst.controller": "training.controller",
    "dst.distributed": "training.collectives",
    "dst.join": "training.join",
    "dst.optimizer_state": "training.backends.torch",
    "dst.report": "trainer.log",
    "dst.support": "training.compatibility",
    "dst.throughput": "metrics.throughput",
    "dst.tracking": "metrics.mask_history",
    "dst.zero": "training.backends.zero",
    "export": "api",
    "families.drop_in": "families.base",
    "families.pass_through": "families.sparse_factors",
    "families.start": "families.trained_start",
    "html_report.charts": "reporting.page.charts",
    "html_report.curves": "reporting.page.curves",
    "html_report.degrees": "reporting.page.degrees",
    "html_report.heat": "reporting.page.heat",
    "html_report.layer_maps": "reporting.page.layer_maps",
    "html_report.markup": "reporting.page.markup",
    "html_report.overview": "reporting.page.overview",
    "html_report.page": "reporting.page.page",
    "html_report.reading": "runs.lenient_json",
    "html_report.runs": "reporting.page.runs",
    "json_lines": "utils.json_lines",
    "layers.shards": "layers.sharding",
    "layout": "record.quantization_mark",
    "loading": "checkpoints.transformers_hook",
    "mask_file": "checkpoints.mask_file",
    "matrices": "analysis.matrices",
    "measure": "bench.measure",
    "metrics": "metrics.counts",
    "model_card": "checkpoints.card",
    "norms": "models.norms",
    "ops.block_blas": "ops.kernels.blas",
    "ops.block_kernels": "ops.kernels.base",
    "ops.block_native": "ops.kernels.native",
    "ops.block_reference": "ops.kernels.reference",
    "ops.block_triton": "ops.kernels.triton",
    "outputs": "utils.outputs",
    "packing": "data.packing",
    "planning": "planning.planner",
    "presets": "models.presets",
    "pretrained_start": "conversion.from_trained",
    "projections": "models.projections",
    "recipe": "runs.recipe",
    "report": "reporting.comparison",
    "run_record": "runs.metrics_log",
    "samples": "metrics.step_probe",
    "saving": "checkpoints.saving",
    "scaling": "conversion.scaling",
    "schedules": "training.schedules",
    "spectral": "analysis.spectral",
    "spectral_pictures": "analysis.pictures",
    "strict": "config.parsing",
    "surgery": "api",
    "token_cache": "data.cache",
    "topology.heads": "topology.groups",
}

# old name -> new place, of names that are not in the new module of the others, or under another name there
NAMES = {
    "evaluation.comparison.markdown": "evaluation.comparison_table.markdown",
    "evaluation.harness.LoadedSuite": "evaluation.task_loading.LoadedSuite",
    "evaluation.harness.load_suite": "evaluation.task_loading.load_suite",
    "evaluation.harness.named_suite": "evaluation.task_loading.named_suite",
    "evaluation.harness.requirements_of": "evaluation.task_loading.requirements_of",
    "evaluation.results.ResultFile": "evaluation.result_file.ResultFile",
    "evaluation.results.check_held_out": "evaluation.model_facts.check_held_out",
    "evaluation.results.describe_model": "evaluation.model_facts.describe_model",
    "evaluation.results.weights_digest": "evaluation.model_facts.weights_digest",
    "html_report.overview.difference_table": "reporting.page.settings.difference_table",
    "html_report.overview.evaluation_tables": "reporting.page.evaluations.evaluation_tables",
    "html_report.overview.setting_tables": "reporting.page.settings.setting_tables",
    "html_report.overview.settings": "reporting.page.settings.settings",
    "report.loss_picture": "reporting.loss_picture.loss_picture",
    "analysis.Analysis": "analysis.results.Analysis",
    "analysis.ANALYSIS_BEGINNING": "analysis.results.ANALYSIS_BEGINNING",
    "analysis.ANALYSIS_FORMAT": "analysis.results.ANALYSIS_FORMAT",
    "analysis.RunAnalysis": "analysis.results.RunAnalysis",
    "analysis.labels": "analysis.results.labels",
    "analysis.make_settings": "analysis.checkpoints.make_settings",
    "analysis.render": "analysis.tables.render",
    "bench.FeedForward": "bench.layer.FeedForward",
    "bench.bench": "bench.run.bench",
    "bench.render": "bench.tables.render",
    "bench.render_crossover": "bench.tables.render_crossover",
    "checkpoint.INCOMPLETE_PREFIX": "checkpoints.trainer_folder.INCOMPLETE_PREFIX",
    "checkpoint.find_resumed_checkpoint": "checkpoints.trainer_folder.find_resumed_checkpoint",
    "checkpoint.is_complete": "checkpoints.trainer_folder.is_complete",
    "checkpoint.last_complete_checkpoint": "checkpoints.trainer_folder.last_complete_checkpoint",
    "checkpoint.numbered_checkpoints": "checkpoints.trainer_folder.numbered_checkpoints",
    "checkpoint.read_trainer_state": "checkpoints.trainer_folder.read_trainer_state",
    "checkpoint.recorded_by_callback": "checkpoints.trainer_folder.recorded_by_callback",
    "checkpoint.set_aside_incomplete": "checkpoints.trainer_folder.set_aside_incomplete",
    "cli.render_plan": "cli.plan.render_plan",
    "config.DSTConfig": "config.dst.DSTConfig",
    "config.FamilyRule": "config.rules.FamilyRule",
    "corpora.builtin_source": "data.standard_library.builtin_source",
    "corpora.hold_out": "data.held_out.hold_out",
    "data.DataConfig": "data.options.DataConfig",
    "data.EOS": "data.options.EOS",
    "data.load_tokenizer": "data.tokenizer.load_tokenizer",
    "export.FORMATS": "checkpoints.export.FORMATS",
    "families.drop_in.rule_for": "families.registry.rule_for",
    "layout.missing_layers": "record.model_record.missing_layers",
    "html_report.reading.flattened": "reporting.page.words.flattened",
    "html_report.reading.text": "reporting.page.words.text",
    "html_report.reading.unique_names": "reporting.page.words.unique_names",
    "loading.LayoutConfig": "checkpoints.registry_entry.LayoutConfig",
    "ops.block_blas.forward": "ops.kernels.blas.BLAS.forward",
    "ops.block_blas.input_gradient": "ops.kernels.blas.BLAS.input_gradient",
    "ops.block_blas.weight_gradient": "ops.kernels.blas.BLAS.weight_gradient",
    "ops.block_kernels.check_operands": "ops.operands.check_operands",
    "ops.block_kernels.kernel_for": "ops.kernels.choice.kernel_for",
    "ops.block_kernels.kernel_name": "ops.kernels.choice.kernel_name",
    "ops.block_kernels.use_block_kernel": "ops.kernels.choice.use_block_kernel",
    "ops.block_native.feed_forward": "ops.kernels.native.NATIVE.fused.forward",
    "ops.block_native.feed_forward_gradient": "ops.kernels.native.NATIVE.fused.gradient",
    "ops.block_native.forward": "ops.kernels.native.NATIVE.forward",
    "ops.block_native.input_gradient": "ops.kernels.native.NATIVE.input_gradient",
    "ops.block_native.is_available": "ops.kernels.native.NATIVE.is_available",
    "ops.block_native.release_scratch": "ops.kernels.native.NATIVE.release_scratch",
    "ops.block_native.scratch_bytes": "ops.kernels.native.NATIVE.scratch_bytes",
    "ops.block_native.weight_gradient": "ops.kernels.native.NATIVE.weight_gradient",
    "ops.block_reference.forward": "ops.kernels.reference.REFERENCE.forward",
    "ops.block_reference.input_gradient": "ops.kernels.reference.REFERENCE.input_gradient",
    "ops.block_reference.weight_gradient": "ops.kernels.reference.REFERENCE.weight_gradient",
    "ops.block_triton.forward": "ops.kernels.triton.TRITON.forward",
    "ops.block_triton.input_gradient": "ops.kernels.triton.TRITON.input_gradient",
    "ops.block_triton.is_available": "ops.kernels.triton.TRITON.is_available",
    "ops.block_triton.weight_gradient": "ops.kernels.triton.TRITON.weight_gradient",
    "outputs.set_aside": "utils.files.set_aside",
    "outputs.written_whole": "utils.files.written_whole",
    "planning.LayerPlan": "record.specs.LayerSpec",
    "planning.ModelCost": "planning.cost.ModelCost",
    "planning.cost_of": "planning.cost.cost_of",
    "planning.count_flops": "planning.cost.count_flops",
    "planning.read_record": "checkpoints.records.read_record",
    "outputs.write_json": "utils.files.write_json",
    "report.differing_data": "runs.same_data.differing_data",
    "run_record.RunRecord": "runs.metrics_log.MetricsLog",
    "run_record.commit": "utils.provenance.commit",
    "run_record.machine": "utils.provenance.machine",
    "run_record.versions": "utils.provenance.versions",
    "run_record.write_json": "utils.files.write_json",
    "scaling.cosine_to_plateau": "training.learning_rates.cosine_to_plateau",
    "scaling.learning_rate_factors": "training.learning_rates.learning_rate_factors",
    "scaling.optimizer_param_groups": "training.learning_rates.optimizer_param_groups",
    "strict.check_choice": "utils.words.check_choice",
    "strict.load_yaml": "config.yaml_files.load_yaml",
    "strict.nearest": "utils.words.nearest",
    "strict.parse_yaml": "config.yaml_files.parse_yaml",
    "surgery.install_sparse_layers": "conversion.install.install_sparse_layers",
    "topology.blocks.changes_per_row": "topology.groups.changes_per_row",
    "topology.blocks.largest_per_row": "topology.masks.largest_per_row",
    "topology.blocks.row_starts": "topology.groups.row_starts",
}

# folders that were folders in 0.1, too, and whose modules have all moved
_FOLDERS = ("dst", "html_report")


def old_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of an old module: it warns, and gives the name from its new place.

    Args:
        module: dotted name of the old module.
    """
    old = module.removeprefix(f"{_PACKAGE}.")

    def get(name: str) -> Any:
        place = NAMES.get(f"{old}.{name}")
        if place is None and old in MODULES:
            place = f"{MODULES[old]}.{name}"
        if name.startswith("_") or place is None or _is_module(f"{module}.{name}"):  # which the import system imports
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        try:
            value = _import(place)
        except AttributeError:
            raise AttributeError(f"module {module!r} has no attribute {name!r}") from None
        warnings.warn(
            f"{module}.{name} has moved to {_PACKAGE}.{place}; the old path goes with version {GONE_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return get


def _is_module(name: str) -> bool:
    """Whether there is a module of this dotted name. The folder that it would be in is imported."""
    is_folder = hasattr(importlib.import_module(name.rpartition(".")[0]), "__path__")
    return is_folder and importlib.util.find_spec(name) is not None


def _import(place: str) -> Any:
    """The object at a dotted path below the package, which may end in attributes of an object."""
    names = place.split(".")
    module, rest = _PACKAGE, names
    while rest and _is_module(f"{module}.{rest[0]}"):
        module, rest = f"{module}.{rest[0]}", rest[1:]
    value: Any = importlib.import_module(module)
    for name in rest:
        value = getattr(value, name)
    return value


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of `MODULES` that do not exist any more, and makes modules that hold nothing but `old_names`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != _PACKAGE or (old not in MODULES and old not in _FOLDERS):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=old in _FOLDERS)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"The modules of sparseift_llm have moved; this one goes with version {GONE_IN}."
        module.__dict__["__getattr__"] = old_names(module.__name__)


def find_old_modules() -> None:
    """Put the finder behind all others, so that it is asked only for modules that nobody else finds."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
