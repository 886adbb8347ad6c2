"""Dynamic sparse training on tiles against a plain re-implementation on a masked model with the same tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2Config, PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, sparsify, to_dense
from sparseift_llm.conversion.install import _replace
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.masked import masked_projection
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.topology.groups import changes_per_row
from sparseift_llm.topology.masks import derive_seed, random_phase, random_scores
from sparseift_llm.training.backends.torch import zero_state
from sparseift_llm.training.schedules import cosine_drop_fraction
from tests.helpers.tiny_runs import VOCAB, batches, train

SIZE, STEPS = 4, 68  # updates on every step up to 0.75 * 68 = 51, that one not included


def block_gpt2(algorithm: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    dst = DSTConfig(algorithm, update_every_steps=1, keep_connected=False)  # the rule of the reference
    return sparsify(config, SparseIFTConfig(structure="block", block_size=SIZE, dst=dst)).double()


def expanded(tiles: Tensor) -> Tensor:
    """A tile mask (R, C) as a mask of weights, stored (in, out) like GPT-2's."""
    return tiles.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1).T


def masked_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with dense, masked weights."""
    twin = to_dense(model)
    for name, layer in sparse_layers(model).items():
        masked = masked_projection(twin.get_submodule(name), layer.num_active, layer.dense_shape)
        masked.set_mask(expanded(layer.current_mask()))
        _replace(twin, name, masked)
    return twin


def tile_sums(matrix: Tensor) -> list[list[float]]:
    matrix = matrix.T.abs()
    rows, columns = matrix.shape[0] // SIZE, matrix.shape[1] // SIZE
    return [
        [float(matrix[r * SIZE : (r + 1) * SIZE, c * SIZE : (c + 1) * SIZE].sum()) for c in range(columns)]
        for r in range(rows)
    ]


def next_tiles(tiles: Tensor, weights: list[list[float]], growth: list[list[float]], changes: list[int]) -> Tensor:
    """Drop and grow, one block-row at a time, with sorted lists."""
    result = tiles.clone()
    for row, number in enumerate(changes):
        active = [column for column in range(tiles.shape[1]) if tiles[row, column]]
        for column in sorted(active, key=lambda column: (weights[row][column], column))[:number]:
            result[row, column] = False
        inactive = [column for column in range(tiles.shape[1]) if not result[row, column]]
        for column in sorted(inactive, key=lambda column: (-growth[row][column], column))[:number]:
            result[row, column] = True
    return result


class PlainUpdates:
    """RigL or SET on the tiles of a masked model, written without the library's update code."""

    def __init__(self, twin: nn.Module, optimizer: torch.optim.Optimizer, algorithm: str) -> None:
        self.layers = sparse_layers(twin)
        self.optimizer, self.algorithm = optimizer, algorithm
        self.step, self.stop = 0, 51
        self.tiles = {name: layer.current_mask().T[::SIZE, ::SIZE].clone() for name, layer in self.layers.items()}
        self.arm()

    def arm(self) -> None:
        for layer in self.layers.values():
            layer.dense_gradient = DenseGradient()

    def after_step(self) -> None:
        self.step += 1
        if self.step < self.stop:
            for index, (name, layer) in enumerate(self.layers.items()):
                self.update(index, name, layer)
        self.arm()

    def update(self, index: int, name: str, layer: SparseProjection) -> None:
        tiles = self.tiles[name]
        assert layer.dense_gradient is not None
        assert layer.dense_gradient.total is not None
        growth = tile_sums(layer.dense_gradient.total)
        if self.algorithm == "set":
            growth = random_scores(tiles.shape, derive_seed(0, "growth", self.step, index)).tolist()
        fraction = cosine_drop_fraction(self.step, self.stop, 0.3)
        phase = random_phase(derive_seed(0, "phase", self.step, index))
        changes = changes_per_row(tiles.sum(1), fraction, phase).tolist()
        self.tiles[name] = next_tiles(tiles, tile_sums(layer.weight.detach()), growth, changes)
        changed = layer.set_mask(expanded(self.tiles[name]))
        zero_state(self.optimizer, layer.weight, changed, name)


def check_against_masked(algorithm: str, micro_batches: int | None = None) -> None:
    model = block_gpt2(algorithm)
    twin = masked_twin(model)
    optimizer, other = (AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in (model, twin))
    SparseTrainingController(model, optimizer, STEPS, micro_batches)
    plain = PlainUpdates(twin, other, algorithm)
    history: list[dict[str, Tensor]] = []
    train(
        model, optimizer, batches(STEPS),
        after_step=lambda: history.append({name: layer.current_mask() for name, layer in sparse_layers(model).items()}),
    )  # fmt: skip
    step = 0

    def compare() -> None:
        nonlocal step
        plain.after_step()
        for name, tiles in plain.tiles.items():
            assert torch.equal(history[step][name], tiles), f"step {step + 1}, {name}"
        step += 1

    train(twin, other, batches(STEPS), after_step=compare)
    changes = [any((a[name] != b[name]).any() for name in a) for a, b in pairwise(history)]
    assert sum(changes) >= 40
    dense, expected = dict(to_dense(model).named_parameters()), dict(to_dense_masked(twin).named_parameters())
    for name, value in dense.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


def to_dense_masked(twin: PreTrainedModel) -> PreTrainedModel:
    dense = copy.deepcopy(twin)
    for name, layer in sparse_layers(dense).items():
        _replace(dense, name, layer.to_dense())
    return dense


@pytest.mark.parametrize("algorithm", ["rigl", "set"])
def test_fifty_updates_equal_those_of_a_masked_model(algorithm: str) -> None:
    check_against_masked(algorithm)


def test_scores_reduced_at_once_give_the_same_masks() -> None:
    check_against_masked("rigl", micro_batches=1)


def keep_state(*_: object) -> None:
    """A fault: optimizer state of reassigned slots stays."""


def signed(self: BlockSparseLinear, dense_gradient: Tensor) -> Tensor:
    """A fault: gradients of opposite sign in a tile cancel."""
    return dense_gradient.view(self.num_rows, SIZE, self.num_columns, SIZE).sum((1, 3)).abs()


def largest(self: BlockSparseLinear) -> Tensor:
    """A fault: the tiles of largest weights are dropped."""
    return -MAGNITUDE(self)


MAGNITUDE = BlockSparseLinear.magnitude


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("sparseift_llm.training.backends.torch.zero_state", keep_state),
        ("sparseift_llm.layers.block.BlockSparseLinear.growth_scores", signed),
        ("sparseift_llm.layers.block.BlockSparseLinear.magnitude", largest),
    ],
    ids=["state", "signed", "largest"],
)
def test_faults_are_caught(target: str, fault: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, fault)
    with pytest.raises(AssertionError):
        check_against_masked("rigl")


def test_one_micro_batch_keeps_scores_not_gradients() -> None:
    model = block_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, STEPS, micro_batches=1)
    batch = next(batches(1))
    model(input_ids=batch, labels=batch).loss.backward()
    for layer in sparse_layers(model).values():
        assert layer.dense_gradient is not None
        assert layer.dense_gradient.total is not None
        assert layer.dense_gradient.total.shape == layer.current_mask().shape
    with pytest.raises(RuntimeError, match=r"second backward pass .* micro_batches=1"):
        model(input_ids=batch, labels=batch).loss.backward()


def test_the_number_of_micro_batches_is_checked() -> None:
    model = block_gpt2("rigl")
    with pytest.raises(ValueError, match="micro_batches must be a whole number of at least 1, got 0"):
        SparseTrainingController(model, AdamW(model.parameters()), STEPS, micro_batches=0)
