"""What test_fsdp.py runs under torchrun: models sharded with `fully_shard` by hand.

Usage: see torchrun.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from transformers import PreTrainedModel

import sparseift_llm.training.backends.torch as backend_module
from sparseift_llm import SparseTrainingController, load_pretrained
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.sharding import local, part_of, reshard, whole
from tests.distributed.ddp_modes_script import STEPS, message_of, part
from tests.distributed.torchrun import main
from tests.helpers.tiny_runs import (
    batches,
    differences,
    first_sparse,
    masks,
    sparse_gpt2,
    train,
)

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Each block a unit of its own, then the rest."""
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def setting(model: PreTrainedModel, total_steps: int = STEPS, **options: Any) -> tuple[Any, Any]:
    """Optimizer and controller of a sharded model."""
    optimizer = AdamW(model.parameters(), lr=0.01, **options)
    return optimizer, SparseTrainingController(model, optimizer, total_steps=total_steps)


def steps(model: Any, optimizer: Any, start: int = 0, stop: int = STEPS, num_micro: int = 2) -> list[dict[str, Tensor]]:
    """Masks after each step; this rank's rows of the global batches."""
    history: list[dict[str, Tensor]] = []
    data = [part(batch) for batch in list(batches(STEPS))[start:stop]]
    train(model, optimizer, iter(data), num_micro, lambda: history.append(masks(model)))
    return history


def gathered(model: PreTrainedModel, optimizer: Any) -> dict[str, Any]:
    """Whole weights, masks and optimizer state, by parameter name."""
    state = {
        name: {key: whole(value).clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }
    weights = {name: whole(value.detach()).clone() for name, value in model.named_parameters()}
    return {"weights": weights, "masks": masks(model), "optimizer": state}


def leftovers(model: PreTrainedModel, optimizer: Any) -> list[str]:
    """Inactive weights, or state of them, that are not 0 on this rank's part; whether parts are parts at all."""
    reshard(model)
    found = []
    for name, layer in sparse_layers(model).items():
        if not isinstance(layer.weight, DTensor) or local(layer.weight).numel() >= layer.weight.numel():
            found.append(f"{name} is not sharded")
        if layer.unit_size > 1:
            continue
        inactive = part_of(~layer.mask, layer.weight)
        values = {"weight": layer.weight, **optimizer.state[layer.weight]}
        found += [
            f"{name}.{key}"
            for key, value in values.items()
            if value.shape == layer.weight.shape and local(value)[inactive].any()
        ]
    return found


def run(**options: Any) -> dict[str, Any]:
    model = sharded(sparse_gpt2("rigl"), **options)
    optimizer, controller = setting(model)
    history = steps(model, optimizer)
    return {
        "history": history,
        "digest": controller.masks_digest(),
        "bytes": controller.cost.num_bytes,
        "leftovers": leftovers(model, optimizer),
        **gathered(model, optimizer),
    }


def default(rank: int, folder: Path) -> dict[str, Any]:
    return run()


def state_kept(rank: int, folder: Path) -> dict[str, Any]:
    """A fault: optimizer state of changed weights stays."""
    zero_state = backend_module.zero_state
    backend_module.zero_state = lambda *_: None  # type: ignore[attr-defined]
    try:
        return run()
    finally:
        backend_module.zero_state = zero_state  # type: ignore[attr-defined]


def keep_gathered(rank: int, folder: Path) -> dict[str, Any]:
    """Weights that stay gathered after forward passes, evaluations between steps, a fused optimizer."""
    model = sharded(sparse_gpt2("rigl"), reshard_after_forward=False)
    optimizer, _ = setting(model, fused=True)
    history: list[dict[str, Tensor]] = []

    def evaluate() -> None:
        history.append(masks(model))
        with torch.no_grad():
            model(input_ids=next(batches(1)))

    evaluate()
    train(model, optimizer, (part(batch) for batch in batches(STEPS)), 2, evaluate)
    return {"history": history[1:], "leftovers": leftovers(model, optimizer)}


def root_only(rank: int, folder: Path) -> dict[str, Any]:
    """One unit, whose weights FSDP keeps gathered after a forward pass; the optimizer's plain loop."""
    model = sparse_gpt2("rigl")
    fully_shard(model)
    model.set_reshard_after_backward(False)
    optimizer, _ = setting(model, foreach=False)
    history = steps(model, optimizer)
    return {"history": history, "leftovers": leftovers(model, optimizer)}


def second_dimension(rank: int, folder: Path) -> dict[str, Any]:
    """Sparse weights split along another dimension than the first."""
    from torch.distributed.tensor import Shard

    return run(shard_placement_fn=lambda parameter: Shard(1) if parameter.ndim > 1 else Shard(0))


def no_sync(rank: int, folder: Path) -> dict[str, Any]:
    """Gradients reduced with the last micro-batch only; activation checkpointing."""
    model = sharded(sparse_gpt2("rigl"))
    # the newer name first: the older one warns
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.train()
    optimizer, _ = setting(model)
    history = []
    for batch in batches(STEPS):
        first, second = part(batch).chunk(2)
        for rows in (first, second):
            model.set_requires_gradient_sync(rows is second)  # type: ignore[operator]
            (model(input_ids=rows, labels=rows).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(masks(model))
    return {"history": history, "leftovers": leftovers(model, optimizer)}


def hybrid(rank: int, folder: Path) -> dict[str, Any]:
    """Replicas of shards, on four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return run(mesh=mesh)


def mixed_precision(rank: int, folder: Path) -> dict[str, Any]:
    """Float32 weights, bfloat16 arithmetic: digests after every step."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(sparse_gpt2("rigl").float(), mp_policy=policy)
    optimizer, controller = setting(model)
    digests = [controller.masks_digest()]
    for batch in batches(STEPS):
        train(model, optimizer, iter([part(batch)]))
        digests.append(controller.masks_digest())
    return {"digests": digests, "leftovers": leftovers(model, optimizer)}


def full_state(rank: int, folder: Path) -> dict[str, Any]:
    """Save whole weights, load them into an ordinary model, and shard that one again; `masks` come along."""
    model = sharded(sparse_gpt2("rigl"))
    optimizer, controller = setting(model)
    steps(model, optimizer, stop=6)
    without = message_of(lambda: model.save_pretrained(folder / "refused", is_main_process=rank == 0))
    weights = get_model_state_dict(model, options=FULL)
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    target = folder / "full"
    model.save_pretrained(target, is_main_process=rank == 0, state_dict=weights)
    if rank == 0:
        torch.save({"optimizer": state, "controller": controller.state_dict()}, folder / "full.pt")
    dist.barrier()
    loaded = load_pretrained(target, dtype=torch.float64)
    same = differences(gathered(model, optimizer)["masks"], masks(loaded))
    sharded(loaded)
    again, second = setting(loaded)
    saved = torch.load(folder / "full.pt", weights_only=False)
    set_optimizer_state_dict(loaded, again, saved["optimizer"], options=FULL)
    second.load_state_dict(saved["controller"])
    return {
        "refused": without,
        "masks": same,
        "expected": {"history": steps(model, optimizer, start=6), **gathered(model, optimizer)},
        "found": {"history": steps(loaded, again, start=6), **gathered(loaded, again)},
    }


def sharded_state(rank: int, folder: Path) -> dict[str, Any]:
    """torch.distributed.checkpoint: each rank writes its part; a fresh model goes on from it."""
    model = sharded(sparse_gpt2("rigl"))
    optimizer, controller = setting(model)
    steps(model, optimizer, stop=6)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    if rank == 0:
        torch.save(controller.state_dict(), folder / "controller.pt")
    dist.barrier()
    other = sharded(sparse_gpt2("rigl", seed=1))
    again, second = load_sharded(other, folder)
    return {
        "expected": {"history": steps(model, optimizer, start=6), **gathered(model, optimizer)},
        "found": {"history": steps(other, again, start=6), **gathered(other, again)},
        "counters": [controller.counters(), second.counters()],
    }


def load_sharded(model: PreTrainedModel, folder: Path) -> tuple[Any, SparseTrainingController]:
    """Optimizer and controller of `model`, all three from what `sharded_state` left; on any number of ranks."""
    optimizer, controller = setting(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    controller.load_state_dict(torch.load(folder / "controller.pt", weights_only=True))
    return optimizer, controller


def resumed_elsewhere(rank: int, folder: Path) -> dict[str, Any]:
    """As many ranks as there are now, from what two ranks left in the folder `from_two`."""
    model = sharded(sparse_gpt2("rigl", seed=2))
    optimizer, _ = load_sharded(model, folder / "from_two")
    return {"history": steps(model, optimizer, start=6), **gathered(model, optimizer)}


def corrupted(rank: int, folder: Path) -> dict[str, Any]:
    """One mask is another on the last rank: the message each rank gets at an update."""
    model = sharded(sparse_gpt2("set", every=3))
    optimizer, controller = setting(model)
    steps(model, optimizer, stop=4)
    if rank == dist.get_world_size() - 1:
        layer = sparse_layers(model)[first_sparse(model, "mlp.c_fc")]
        layer.load_topology(
            layer.topology.roll(1, dims=-1) if layer.unit_size == 1 else (layer.topology + 1) % layer.num_columns
        )
    return {"message": message_of(lambda: steps(model, optimizer, start=4)), "step": controller.step}


def refused(rank: int, folder: Path) -> dict[str, str]:
    """Other ways of sharding, and what a sharded model cannot do."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import distribute_module

    from sparseift_llm import to_dense

    first: Any = FullyShardedDataParallel(sparse_gpt2("rigl"), use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor_parallel: Any = distribute_module(sparse_gpt2("rigl"), mesh)
    if rank == 0:
        sparse_gpt2("rigl").save_pretrained(folder)
    dist.barrier()
    return {
        "fsdp1": message_of(lambda: setting(first)),
        "tensor_parallel": message_of(lambda: setting(tensor_parallel)),
        "to_dense": message_of(lambda: to_dense(sharded(sparse_gpt2("rigl")))),
        "early_optimizer": message_of(early_optimizer),
        "loading": message_of(lambda: load_pretrained(folder, tp_plan="auto")),
        "tensor_parallel_config": message_of(lambda: load_pretrained(folder, distributed_config={"tp_size": 2})),
    }


def early_optimizer() -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    sharded(model)
    SparseTrainingController(model, optimizer, total_steps=STEPS)


if __name__ == "__main__":
    main("tests.distributed.fsdp_script", "tests.distributed.fsdp_frameworks_script")
