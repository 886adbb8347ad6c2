"""What test_deepspeed.py runs under torchrun: DeepSpeed engines with ZeRO stages 1 to 3 on CPU processes.

Usage: see torchrun.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.training.backends.zero import ZeroBackend
from tests.distributed.ddp_modes_script import STEPS, message_of, part
from tests.distributed.torchrun import main
from tests.helpers.kind_rows import sparse_decoder
from tests.helpers.models import shake
from tests.helpers.patterns import wrong_groups
from tests.helpers.tiny_runs import batches, differences, masks, sparse_gpt2


def engine_of(model: Any, stage: int, micro: int = 2, optimizer: Any = None, **config: Any) -> Any:
    """A DeepSpeed engine in float32 with ZeRO."""
    import deepspeed

    optimizer = AdamW(model.parameters(), lr=0.01) if optimizer is None else optimizer
    options = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]


def steps(engine: Any, model: Any, start: int = 0, stop: int = STEPS) -> list[dict[str, Tensor]]:
    """Masks after each step; this rank's rows of the global batches, in two micro-batches."""
    history: list[dict[str, Tensor]] = []
    for batch in list(batches(STEPS))[start:stop]:
        for rows in part(batch).chunk(2):
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()
        history.append(masks(model))
    return history


def run(stage: int, **config: Any) -> dict[str, Any]:
    model = sparse_gpt2("rigl").float()
    engine = engine_of(model, stage, **config)
    controller = SparseTrainingController(engine, engine.optimizer, total_steps=STEPS)
    history = steps(engine, model)
    return {
        "history": history,
        "digest": controller.masks_digest(),
        "counters": controller.counters(),
        "leftovers": leftovers(model),
        "weights": whole_weights(model),
        "bytes": controller.cost.num_bytes,
    }


def whole_weights(model: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(value).clone() for name, value in model.named_parameters()}


def leftovers(model: Any) -> list[str]:
    """Inactive weights, or state of them, that are not 0 in what DeepSpeed holds."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = []
    for name, layer in sparse_layers(model).items():
        values = {"weight": safe_get_full_fp32_param(layer.weight)}
        values |= {key: safe_get_full_optimizer_state(layer.weight, key) for key in ("exp_avg", "exp_avg_sq")}
        if layer.unit_size == 1:
            found += [f"{name}.{key}" for key, value in values.items() if value[~layer.mask].any()]
    return found


def stage1(rank: int, folder: Path) -> dict[str, Any]:
    return run(1)


def stage2(rank: int, folder: Path) -> dict[str, Any]:
    return run(2)


def stage3(rank: int, folder: Path) -> dict[str, Any]:
    return run(3)


def bf16(rank: int, folder: Path) -> dict[str, Any]:
    """Weights in bfloat16, their masters in float32."""
    return run(2, bf16={"enabled": True})


def n_of_m(rank: int, folder: Path) -> dict[str, Any]:
    """Masks of 2:4, and of 2:4 along both sides, under ZeRO-2: the layers with another pattern after any step."""
    found: dict[str, Any] = {}
    for transposable in (False, True):
        model: Any = sparse_decoder("gpt2", structure="2:4", transposable=transposable).float()  # type: ignore[arg-type]
        engine = engine_of(model, 2)
        controller = SparseTrainingController(engine, engine.optimizer, total_steps=STEPS)
        wrong, digests = wrong_groups(model, 2, 4, transposable), [controller.masks_digest()]
        for stop in range(1, 5):
            steps(engine, model, stop - 1, stop)
            wrong += wrong_groups(model, 2, 4, transposable)
            digests.append(controller.masks_digest())
        found[f"{transposable=}"] = {"wrong": wrong + leftovers(model), "digests": digests}
    return found


def state_kept(rank: int, folder: Path) -> dict[str, Any]:
    """A fault: master weights and state of changed positions stay."""
    reset = ZeroBackend.reset
    ZeroBackend.reset = lambda *_: 0  # type: ignore[method-assign]
    try:
        return run(1)
    finally:
        ZeroBackend.reset = reset  # type: ignore[method-assign]


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Engines of ZeRO-2 and ZeRO-3 that go on from a checkpoint of step 6, and from one that was never left."""
    results: dict[str, Any] = {}
    for stage in (2, 3):
        model = sparse_gpt2("rigl").float()  # type: ignore[arg-type]
        engine = engine_of(model, stage)
        controller = SparseTrainingController(engine, engine.optimizer, total_steps=STEPS)
        steps(engine, model, stop=6)
        engine.save_checkpoint(str(folder / f"zero{stage}"), client_state={"controller": controller.state_dict()})
        other: Any = sparse_gpt2("rigl").float()  # type: ignore[arg-type]
        shake(other)
        again = engine_of(other, stage)
        second = SparseTrainingController(again, again.optimizer, total_steps=STEPS)
        _, state = again.load_checkpoint(str(folder / f"zero{stage}"))
        second.load_state_dict(state["controller"])
        expected = {"history": steps(engine, model, start=6), "weights": whole_weights(model)}
        found = {"history": steps(again, other, start=6), "weights": whole_weights(other)}
        results[f"zero{stage}"] = {
            "differences": differences(expected, found),
            "counters": [controller.counters(), second.counters()],
            "saving": message_of(lambda model=model: model.save_pretrained(folder / "no")) if stage == 3 else "",
        }
    return results


def refused(rank: int, folder: Path) -> dict[str, str]:
    """Engines without ZeRO, other optimizers, and engines made before the weights were sparse."""
    model = sparse_gpt2("rigl").float()
    plain = engine_of(model, 0)
    muon = Muon([layer.weight for layer in sparse_layers(model).values() if layer.weight.ndim == 2] or [torch.eye(2)])
    other = sparse_gpt2("rigl").float()
    engine = engine_of(other, 1)
    stray = sparse_gpt2("rigl").float()
    return {
        "no_zero": message_of(lambda: SparseTrainingController(plain, plain.optimizer, STEPS)),
        "stray": message_of(lambda: SparseTrainingController(stray, engine.optimizer, STEPS)),
        "muon": message_of(lambda: ZeroBackend(type("ZeRO", (), {"optimizer": muon}), {})),
    }


if __name__ == "__main__":
    main("tests.distributed.deepspeed_script")
