"""What the tests of kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter adds a dot product's terms one after the other, as a GPU does for every size of a block.

    The interpreter takes numpy's product, and on some CPUs the BLAS behind it adds in an order that depends on the
    shapes. Tests that compare bits between configurations would then test the BLAS.
    """
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def dot(self: Any, left: Any, right: Any, total: Any, *precision: Any) -> Any:
        """left (m, k) @ right (k, n) + total (m, n)"""
        product = np.zeros_like(total.data)
        for column, row in zip(left.data.T, right.data, strict=True):
            product += np.multiply.outer(column, row)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
