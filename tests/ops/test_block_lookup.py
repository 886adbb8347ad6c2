"""Rows of a block-sparse matrix by number against rows of the dense float64 matrix, and as an operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.ops import block_lookup
from sparseift_llm.ops.block_lookup import NO_PADDING, block_lookup_gradient_op, block_lookup_op
from sparseift_llm.topology.blocks import random_columns
from tests.helpers.block_cases import normal_source


@dataclass
class Lookup:
    """Operands of one look-up, and of its gradient."""

    weight: Tensor
    ids: Tensor
    columns: Tensor
    grad: Tensor
    num_embeddings: int
    num_columns: int
    padding_idx: int

    @property
    def in_features(self) -> int:
        return self.num_columns * self.weight.shape[1]

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.weight, self.ids, self.columns, self.num_embeddings, self.in_features, self.padding_idx

    def computed(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.clone().requires_grad_()
        output = block_lookup_op(weight, *self.operands[1:])
        output.backward(self.grad)
        assert weight.grad is not None
        return output.detach(), weight.grad

    def expected(self, absolute: bool = False) -> tuple[Tensor, Tensor]:
        """Both, in float64, token by token with the slowest code there is; or of the operands' absolute values."""
        weight, grad = self.weight.double(), self.grad.double()
        if absolute:
            weight, grad = weight.abs(), grad.abs()
        size, num_tiles = weight.shape[1], len(weight)
        num_rows = -(-self.num_embeddings // size)
        starts = [row * num_tiles // num_rows for row in range(num_rows + 1)]
        output = torch.zeros(len(self.ids), self.in_features, dtype=torch.float64)
        grad_weight = torch.zeros_like(weight)
        for token, id in enumerate(self.ids.tolist()):
            row, inside = divmod(id, size)
            for slot in range(starts[row], starts[row + 1]):
                first = int(self.columns[slot]) * size
                output[token, first : first + size] = weight[slot, inside]
                if id != self.padding_idx:
                    grad_weight[slot, inside] += grad[token, first : first + size]
        return output, grad_weight


def make_lookup(
    tokens: int = 40,
    num_embeddings: int = 22,
    columns: int = 5,
    num_tiles: int = 14,
    size: int = 4,
    dtype: torch.dtype = torch.float64,
    padding_idx: int = NO_PADDING,
    seed: int = 0,
) -> Lookup:
    normal, generator = normal_source(dtype, seed), torch.Generator().manual_seed(seed)
    num_rows = -(-num_embeddings // size)
    return Lookup(
        weight=normal(num_tiles, size, size),
        ids=torch.randint(num_embeddings, (tokens,), generator=generator),
        columns=random_columns(num_rows, columns, num_tiles, seed),
        grad=normal(tokens, columns * size),
        num_embeddings=num_embeddings,
        num_columns=columns,
        padding_idx=padding_idx,
    )


@st.composite
def lookups(draw: st.DrawFn) -> Lookup:
    size, num_embeddings = draw(st.sampled_from([1, 4, 8, 16])), draw(st.integers(1, 60))
    columns = draw(st.integers(1, 6))
    return make_lookup(
        tokens=draw(st.sampled_from([0, 1, 2, 33, 200])),  # 200 tokens of 60: with repeats
        num_embeddings=num_embeddings,
        columns=columns,
        num_tiles=draw(st.integers(1, -(-num_embeddings // size) * columns)),  # rows without a tile, and dense
        size=size,
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        padding_idx=draw(st.sampled_from([NO_PADDING, 0, num_embeddings - 1])),
        seed=draw(st.integers(0, 2**20)),
    )


def check(case: Lookup) -> None:
    """Rows are copied, to the bit; sums are those of float32 or wider and are rounded once."""
    (output, grad), (expected, expected_grad) = case.computed(), case.expected()
    assert output.dtype == grad.dtype == case.weight.dtype
    assert torch.equal(output.double(), expected)
    sums = torch.finfo(torch.promote_types(case.weight.dtype, torch.float32))
    bound = len(case.ids) * sums.eps / 2 * case.expected(absolute=True)[1]
    bound += torch.finfo(grad.dtype).eps / 2 * expected_grad.abs()
    assert ((grad.double() - expected_grad).abs() <= bound).all()


@settings(max_examples=80)
@given(case=lookups())
def test_rows_and_gradients_are_the_dense_ones(case: Lookup) -> None:
    check(case)


@pytest.mark.parametrize("fault", ["column", "slot", "repeats", "padding"])
def test_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_lookup(padding_idx=3)
    check(case)
    if fault == "repeats":  # the last of equal ids wins

        def overwrite(rows: Tensor, targets: Tensor, num_rows: int, padding_idx: int) -> Tensor:
            return rows.new_zeros(num_rows, rows.shape[1]).index_put_((targets,), rows)

        monkeypatch.setattr(block_lookup, "sum_rows", overwrite)
        with pytest.raises(AssertionError):
            check(case)
        return
    wrong, found = make_lookup(padding_idx=3), case.computed()
    if fault == "column":
        wrong.columns = (case.columns + 1) % case.num_columns
    elif fault == "slot":
        wrong.weight = case.weight.roll(1, 0)
    else:
        wrong.padding_idx = 4
    expected = wrong.expected()
    assert not all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_equal_calls_give_equal_bits() -> None:
    """Many tokens are one id; more threads than one would add their rows in any order."""
    case = make_lookup(tokens=20_000, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = case.computed()[1]
        assert all(torch.equal(first, case.computed()[1]) for _ in range(3))
    finally:
        torch.set_num_threads(before)


def test_sums_in_bfloat16_are_rounded_once() -> None:
    """256 + 1 is 256 in bfloat16, so a sum of ones that is rounded at each addition stays there."""
    case = make_lookup(tokens=1000, num_embeddings=1, num_tiles=1, dtype=torch.bfloat16)
    case.grad = torch.ones_like(case.grad)
    assert float(case.computed()[1].max()) == 1000


@pytest.mark.parametrize("wrong", [-1, 22, 23, 24])
def test_ids_outside_of_the_vocabulary_are_refused(wrong: int) -> None:
    """22 and 23 have rows in the last tile."""
    case = make_lookup()
    case.ids[7] = wrong
    with pytest.raises(IndexError, match="vocabulary of 22"):
        case.computed()


def test_ids_of_32_bits() -> None:
    case = make_lookup()
    expected = case.computed()
    case.ids = case.ids.int()
    assert all(torch.equal(a, b) for a, b in zip(case.computed(), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_ids_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    case = make_lookup()
    case.ids = case.ids.to(dtype)
    with pytest.raises(ValueError, match="token ids must be int32 or int64"):
        case.computed()


def test_ids_on_another_device_are_refused() -> None:
    case = make_lookup()
    case.ids = case.ids.to("meta")
    with pytest.raises(ValueError, match="on one device"):
        block_lookup_op(*case.operands)


@pytest.mark.parametrize("tokens", [0, 6])
def test_opcheck(tokens: int) -> None:
    case = make_lookup(tokens=tokens, padding_idx=3)
    case.weight.requires_grad_()
    torch.library.opcheck(block_lookup_op, case.operands)
    torch.library.opcheck(block_lookup_gradient_op, (case.grad, case.ids, case.columns, 4, 22, 3))


def test_gradcheck() -> None:
    case = make_lookup()
    assert torch.autograd.gradcheck(
        lambda weight: block_lookup_op(weight, *case.operands[1:]), case.weight.requires_grad_()
    )
