"""What test_ddp_modes.py runs under torchrun: options of DistributedDataParallel, uneven data, steps that are skipped.

Usage: see torchrun.py. Every scenario works with any number of ranks that divides 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import PreTrainedModel

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.training.collectives import Ranks
from tests.distributed.torchrun import main
from tests.helpers.tiny_runs import batches, masks, snapshot, sparse_gpt2, train, violations

STEPS = 10
SKIPPED_ON_LAST_RANK = {2, 5, 6}  # steps (from 1) on which the last rank does not use the model's only block
UNEVEN = (7, 4)  # batches of the first and of all other ranks
OVERFLOW = 4  # the step on which the last rank's loss is infinite


def part(batch: Tensor) -> Tensor:
    """This rank's rows of a global batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def loop(wrapped: Any, optimizer: Any, num_micro: int = 2, sync_each: bool = True) -> list[dict[str, Tensor]]:
    """Masks after each of STEPS steps."""
    history = []
    for batch in batches(STEPS):
        parts = part(batch).chunk(num_micro)
        for index, rows in enumerate(parts):
            is_last = index == num_micro - 1
            with nullcontext() if sync_each or is_last else wrapped.no_sync():
                (wrapped(input_ids=rows, labels=rows).loss / num_micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(masks(wrapped))
    return history


def mode(num_micro: int = 1, sync_each: bool = True, **options: Any) -> dict[str, Any]:
    model = sparse_gpt2("rigl")
    wrapped = DistributedDataParallel(model, **options)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=STEPS)
    history = loop(wrapped, optimizer, num_micro, sync_each)
    return {
        "history": history,
        "digest": controller.masks_digest(),
        "bytes": controller.cost.num_bytes,
        "seconds": controller.cost.seconds,
        "updates": controller.cost.num_updates,
        "violations": violations(model, optimizer),
        **snapshot(model, optimizer),
    }


def default(rank: int, folder: Path) -> dict[str, Any]:
    return mode()


def no_sync(rank: int, folder: Path) -> dict[str, Any]:
    return mode(num_micro=2, sync_each=False)


def sync_each_micro_batch(rank: int, folder: Path) -> dict[str, Any]:
    return mode(num_micro=2)


def find_unused(rank: int, folder: Path) -> dict[str, Any]:
    return mode(find_unused_parameters=True)


def static_graph(rank: int, folder: Path) -> dict[str, Any]:
    return mode(num_micro=2, static_graph=True)


def bucket_view(rank: int, folder: Path) -> dict[str, Any]:
    return mode(num_micro=2, sync_each=False, gradient_as_bucket_view=True)


def magnitudes_first(rank: int, folder: Path) -> dict[str, Any]:
    """A fault: absolute values are taken before the mean over ranks."""
    mean = Ranks.mean
    Ranks.mean = lambda self, tensor: mean(self, tensor.abs_())  # type: ignore[method-assign]
    try:
        return mode()
    finally:
        Ranks.mean = mean  # type: ignore[method-assign]


def own_gradient_only(rank: int, folder: Path) -> dict[str, Any]:
    """A fault: every rank grows by the gradient of its own rows; the message on each rank."""
    mean = Ranks.mean
    Ranks.mean = lambda self, tensor: tensor  # type: ignore[method-assign]
    try:
        return {"message": message_of(mode)}
    finally:
        Ranks.mean = mean  # type: ignore[method-assign]


def skippable(model: PreTrainedModel) -> Callable[[bool], None]:
    """A switch that takes the model's block out of the forward pass."""
    block = model.transformer.h[0]  # type: ignore[union-attr, index]
    forward = block.forward

    def switch(is_used: bool) -> None:
        block.forward = forward if is_used else lambda hidden, *_, **__: hidden

    return switch


def unused_on_one_rank(rank: int, folder: Path) -> dict[str, Any]:
    model = sparse_gpt2("rigl")
    use = skippable(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    SparseTrainingController(wrapped, optimizer, total_steps=STEPS)
    history = []
    for step, batch in enumerate(batches(STEPS), start=1):
        use(rank != dist.get_world_size() - 1 or step not in SKIPPED_ON_LAST_RANK)
        rows = part(batch)
        wrapped(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(masks(wrapped))
    return {"history": history}


def unused_everywhere(rank: int, folder: Path) -> dict[str, Any]:
    """A layer that no rank used at an update step: the message on each rank."""
    model = sparse_gpt2("rigl")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    SparseTrainingController(wrapped, optimizer, total_steps=STEPS)
    skippable(model)(False)
    return {"message": message_of(lambda: train(wrapped, optimizer, batches(3)))}


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def join(rank: int, folder: Path) -> dict[str, Any]:
    """The first rank has more batches than the others; then all go on together."""
    model = sparse_gpt2("rigl", stop_fraction=1.0)
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=STEPS + 2, micro_batches=1)
    number = UNEVEN[0] if rank == 0 else UNEVEN[1]
    history = []
    with Join([wrapped, controller]):
        for batch in list(batches(UNEVEN[0]))[:number]:
            train(wrapped, optimizer, iter([part(batch)]), after_step=lambda: history.append(masks(wrapped)))
    after = {**snapshot(model, optimizer), "counters": controller.counters(), "digest": controller.masks_digest()}
    with Join([wrapped, controller]):  # again, with as many batches everywhere
        train(wrapped, optimizer, (part(batch) for batch in batches(4, seed=1)))
    return {"history": history, "after": after, "end": snapshot(model, optimizer), "counters": controller.counters()}


def join_refused(rank: int, folder: Path) -> dict[str, Any]:
    """Join contexts that would hang: messages of each rank."""
    messages = []
    for kind in ("without", "first", "accumulating"):
        wrapped = DistributedDataParallel(sparse_gpt2("rigl"))
        optimizer = AdamW(wrapped.parameters(), lr=0.01)
        micro = None if kind == "accumulating" else 1
        controller = SparseTrainingController(wrapped, optimizer, total_steps=STEPS, micro_batches=micro)
        joined = {"without": [wrapped], "first": [controller, wrapped], "accumulating": [wrapped, controller]}[kind]

        def run(joined: list[Any] = joined, wrapped: nn.Module = wrapped, optimizer: Any = optimizer) -> None:
            with Join(joined):
                train(wrapped, optimizer, batches(2 + rank))

        messages.append(message_of(run))
    return {"messages": messages}


def float32_digests(rank: int, folder: Path) -> dict[str, Any]:
    """Digests after every step in float32, in bfloat16 autocast, and with gradients compressed to float16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    found = {}
    for name in ("float32", "autocast", "compressed"):
        model = sparse_gpt2("rigl").float()
        wrapped = DistributedDataParallel(model)
        if name == "compressed":
            wrapped.register_comm_hook(None, fp16_compress_hook)
        optimizer = AdamW(wrapped.parameters(), lr=0.01)
        controller = SparseTrainingController(wrapped, optimizer, total_steps=STEPS)
        digests = [controller.masks_digest()]
        for batch in batches(STEPS):
            rows = part(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
                loss = wrapped(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            digests.append(controller.masks_digest())
        found[name] = digests
    return found


def fp16_overflow(rank: int, folder: Path) -> dict[str, Any]:
    """A loss that overflows on the last rank only: the gradient scaler skips the step on all."""
    model = sparse_gpt2("rigl")
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    history = []
    for step, batch in enumerate(batches(STEPS + 1), start=1):
        controller.begin_step()
        rows = part(batch)
        loss = wrapped(input_ids=rows, labels=rows).loss
        if step == OVERFLOW and rank == dist.get_world_size() - 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append(masks(wrapped))
    return {"history": history, "steps": controller.step, "violations": violations(model, optimizer)}


def other_masks(rank: int, folder: Path) -> dict[str, Any]:
    """Ranks that start, or resume, with other masks or other layers: messages of each rank."""
    last = rank == dist.get_world_size() - 1

    def start(model: PreTrainedModel, total_steps: int = STEPS) -> SparseTrainingController:
        return SparseTrainingController(model, AdamW(model.parameters(), lr=0.01), total_steps)

    same, other = sparse_gpt2("rigl"), sparse_gpt2("rigl")
    for layer in sparse_layers(other).values():
        layer.set_mask(layer.current_mask().roll(1, dims=1) if layer.unit_size > 1 else ~layer.current_mask())
    fewer = sparse_gpt2("rigl")
    fewer.transformer.h[0].mlp.c_proj = nn.Identity()  # type: ignore[union-attr, index]
    controller = start(same)
    controller.close()
    state = controller.state_dict()
    later = {**state, "step": 3 if last else 0}
    if last:
        sparse = start_alone(other)
        state["masks"] = sparse["masks"]
    return {
        "masks": message_of(lambda: start(other if last else same)),
        "layers": message_of(lambda: start(fewer if last else same)),
        "schedule": message_of(lambda: start(same, STEPS + last)),
        "step": message_of(lambda: controller.load_state_dict(later)),
        "resumed": message_of(lambda: controller.load_state_dict(state)),
    }


def start_alone(model: PreTrainedModel) -> dict[str, Any]:
    """The state of a controller of a model whose masks are this rank's own."""
    from sparseift_llm.checkpoints.mask_file import pack

    return {"masks": {name: pack(layer.current_mask()) for name, layer in sparse_layers(model).items()}}


def uneven_reference() -> Iterator[list[Tensor]]:
    """For one process: per step, the parts of the global batch that two ranks had data for."""
    for step, batch in enumerate(batches(UNEVEN[0])):
        first, second = batch.chunk(2)
        yield [first, second] if step < UNEVEN[1] else [first]


if __name__ == "__main__":
    main("tests.distributed.ddp_modes_script")
