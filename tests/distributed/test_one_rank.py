"""Wrappers of torch.distributed around sparse models that one rank is enough to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.models import tiny_model


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sparse_model(structure: str) -> PreTrainedModel:
    tiles = {"block_size": 8} if structure == "block" else {}
    return sparsify(tiny_model("gpt2", activation_function="gelu_new"), SparseIFTConfig(structure=structure, **tiles))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # DistributedDataParallel's own, of a compiled model
@pytest.mark.parametrize("structure", ["unstructured", "block"])
@pytest.mark.parametrize("prepare", [lambda model: model, torch.compile], ids=["as it is", "compiled"])
def test_ddp_broadcasts_neither_masks_nor_indices(structure: str, prepare: Callable[[nn.Module], nn.Module]) -> None:
    model = sparse_model(structure)
    of_layers = {buffer.data_ptr() for layer in sparse_layers(model).values() for buffer in layer.buffers()}
    assert of_layers
    wrapped = DistributedDataParallel(prepare(model))
    assert not of_layers & {buffer.data_ptr() for buffer in wrapped.modules_buffers}
    del model._ddp_params_and_buffers_to_ignore
    assert of_layers <= {buffer.data_ptr() for buffer in DistributedDataParallel(prepare(model)).modules_buffers}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # which the layer before the second returns its input from
def test_fsdp_of_single_projections_of_a_fused_ffn_is_refused() -> None:
    model, mesh = sparse_model("block"), init_device_mesh("cpu", (1,))
    for layer in sparse_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="give fully_shard the MLP or the block"):
        model(torch.ones(1, 4, dtype=torch.long))
