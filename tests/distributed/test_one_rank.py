"""Wrappers of torch.distributed around sparse models that one rank is enough to see."""

from __future__ import annotations

import copy
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
from sparseift_llm.layers.block_ffn import BlockFeedForward
from sparseift_llm.layers.sharding import whole
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


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of stock layers, too: they return a view
def test_fsdp_of_single_projections_computes_an_ffn_one_by_one() -> None:
    """A shard is whole only while the module that was sharded is called."""
    model, mesh = sparse_model("block"), init_device_mesh("cpu", (1,))
    tokens = torch.arange(4)[None]
    expected = copy.deepcopy(model)
    expected(tokens, labels=tokens).loss.backward()
    for layer in sparse_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ffns = [module for module in model.modules() if isinstance(module, BlockFeedForward)]
    assert ffns
    assert not any(ffn.is_fused for ffn in ffns)
    model(tokens, labels=tokens).loss.backward()
    for (name, found), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(found.grad), parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # of stock layers, too: they return a view
def test_fsdp_of_the_mlp_keeps_it_fused() -> None:
    model, mesh = sparse_model("block"), init_device_mesh("cpu", (1,))
    tokens = torch.arange(4)[None]
    expected = copy.deepcopy(model)
    expected(tokens, labels=tokens).loss.backward()
    for block in model.transformer.h:
        fully_shard(block.mlp, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(block.mlp.is_fused for block in model.transformer.h)
    model(tokens, labels=tokens).loss.backward()
    for (name, found), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(whole(found.grad), parameter.grad), name
