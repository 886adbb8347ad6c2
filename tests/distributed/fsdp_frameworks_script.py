"""What test_fsdp.py runs under torchrun: models sharded by accelerate, by the Trainer and by `from_pretrained`.

Usage: see torchrun.py; the names are looked up here after fsdp_script.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from sparseift_llm import SparseTrainingController, load_pretrained
from tests.distributed.ddp_modes_script import STEPS
from tests.distributed.fsdp_script import gathered, leftovers, setting, steps
from tests.helpers.models import shake
from tests.helpers.tiny_runs import STRUCTURE, controller_of, differences, sparse_gpt2, sparse_trainer


def accelerate_state(ram_efficient: bool) -> Any:
    """accelerate's own FSDP2 code on CPU processes, where its launcher would choose DistributedDataParallel."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=ram_efficient,
    )
    force_fsdp(plugin)
    return accelerator


def force_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


class ShardedTrainer(Trainer):
    """The Trainer with its FSDP options on CPU processes, see `accelerate_state`."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        force_fsdp(FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


def with_trainer(rank: int, folder: Path) -> dict[str, Any]:
    """Whole runs, and the same resumed from their checkpoints at step 4 by a model of other weights."""
    results: dict[str, Any] = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        ends = []
        for resume in (None, str(folder / kind / "checkpoint-4")):
            AcceleratorState._reset_state(reset_partial_state=True)
            model = sparse_gpt2("rigl")
            if resume:
                shake(model)
            fsdp: dict[str, Any] = {"transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": kind}
            run = sparse_trainer(
                model, folder / (f"{kind}-resumed" if resume else kind), trainer_class=ShardedTrainer,
                per_device_train_batch_size=2,
                save_strategy="steps", save_steps=4, fsdp=True, fsdp_config=fsdp,
            )  # fmt: skip
            run.train(resume_from_checkpoint=resume)
            assert leftovers(run.model, run.optimizer.optimizer) == []  # type: ignore[arg-type, union-attr]
            log = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
            end = gathered(run.model, run.optimizer.optimizer)  # type: ignore[arg-type, union-attr]
            ends.append({**end, "log": log, "counters": controller_of(run).counters()})
        results[kind] = {"end": ends[0], "resumed": differences(*ends), "digest": controller_of(run).masks_digest()}
    return results


def with_accelerate(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, ram_efficient in (("plain", False), ("ram_efficient", True)):
        accelerator = accelerate_state(ram_efficient)
        model = sparse_gpt2("rigl")
        model.lm_head.weight = model.transformer.wte.weight  # type: ignore[union-attr]
        if ram_efficient and rank:
            shake(model)  # the first rank's weights count
        optimizer = AdamW(model.parameters(), lr=0.01)

        def prepare(accelerator: Any = accelerator, model: Any = model, optimizer: Any = optimizer) -> dict[str, Any]:
            wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
            controller = SparseTrainingController(wrapped, wrapped_optimizer, total_steps=STEPS)
            accelerator.register_for_checkpointing(controller)
            history = steps(wrapped, wrapped_optimizer)
            return {"history": history, "leftovers": leftovers(wrapped, wrapped_optimizer)}

        results[name] = prepare()
    return results


def load_sharded(folder: Path) -> PreTrainedModel:
    """transformers' own FSDP2: each rank keeps its part of the weights while they are read."""
    from transformers.distributed import DistributedConfig

    distributed = DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_plan={"transformer.h.*": "free_full_weight"})
    # a stock class would load an unstructured Wide model, as a stock model
    load = load_pretrained if STRUCTURE == "unstructured" else AutoModelForCausalLM.from_pretrained
    model: PreTrainedModel = load(folder, distributed_config=distributed, dtype=torch.float64)
    return model


def native(rank: int, folder: Path) -> dict[str, Any]:
    """A plain loop and a Trainer on models that `from_pretrained` has sharded; then saving one and loading it whole."""
    source = folder / "stored"
    if rank == 0:
        sparse_gpt2("rigl").save_pretrained(source)
    dist.barrier()
    model = load_sharded(source)
    optimizer, _ = setting(model)
    history = steps(model, optimizer)
    end = gathered(model, optimizer)
    model.save_pretrained(folder / "saved")
    saved: Any = load_pretrained(folder / "saved", dtype=torch.float64)
    same = differences(end["weights"], {name: value.detach() for name, value in saved.named_parameters()})
    AcceleratorState._reset_state(reset_partial_state=True)
    run = sparse_trainer(load_sharded(source), folder / "native", per_device_train_batch_size=2)
    run.train()
    return {
        "history": history,
        "leftovers": leftovers(model, optimizer),
        "weights": end["weights"],
        "saved": same,
        "trainer": gathered(run.model, run.optimizer.optimizer)["masks"],  # type: ignore[arg-type, union-attr]
        "counters": controller_of(run).counters(),
    }
