"""Spectral quantities: known graphs, dense eigenvalues by another path, subgraphs by the letter, what has no value."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import ArpackNoConvergence
from torch import Tensor

import sparseift_llm.analysis.spectral
from sparseift_llm.analysis.matrices import SparseMatrix
from sparseift_llm.analysis.spectral import TOLERANCE, LayerSpectrum, layer_spectrum, two_singular_values


def matrix(mask: Any, weight: Tensor | None = None, block_size: int = 1) -> SparseMatrix:
    """A masked matrix (out, in); its weights are 1 by default."""
    mask = torch.as_tensor(mask).bool()
    expanded = mask.double().kron(torch.ones(block_size, block_size, dtype=torch.float64))
    return SparseMatrix("layer", "o", mask, block_size, expanded if weight is None else weight * expanded)


def values(spectrum: LayerSpectrum) -> dict[str, Any]:
    """The numbers and the reason, without what names the layer."""
    return {key: value for key, value in spectrum.to_dict().items() if key not in ("kind", "shape")}


def random_matrix(rows: int, columns: int, seed: int = 0, density: float = 0.4, block_size: int = 1) -> SparseMatrix:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    size = (rows * block_size, columns * block_size)
    return matrix(mask, torch.randn(size, generator=generator, dtype=torch.float64), block_size)


# ---- graphs with known spectra


def complete(left: int, right: int) -> Tensor:
    return torch.ones(left, right)


def cycle(n: int) -> Tensor:
    """C_2n: singular values 2 |cos(pi k / n)|."""
    return torch.eye(n) + torch.eye(n).roll(1, 0)


def hypercube(d: int) -> Tensor:
    """Q_d, vertices with an even number of ones on the left: eigenvalues d - 2i."""
    even, odd = ([v for v in range(2**d) if v.bit_count() % 2 == parity] for parity in (0, 1))
    return torch.tensor([[float((v ^ w).bit_count() == 1) for w in odd] for v in even])


def projective_plane(q: int) -> Tensor:
    """Points and lines of PG(2, q), q prime: (q + 1)-regular, singular values q + 1 and sqrt(q)."""
    vectors = [v for v in itertools.product(range(q), repeat=3) if any(v)]
    points = [v for v in vectors if next(x for x in v if x) == 1]
    on_line = [[sum(a * b for a, b in zip(p, line, strict=True)) % q == 0 for line in points] for p in points]
    return torch.tensor(on_line).float()


KNOWN = {
    "K_3_4": (complete(3, 4), math.sqrt(12), 0.0),
    "K_700_300, by Lanczos": (complete(700, 300), math.sqrt(210_000), 0.0),
    "K_3_4 and K_2_5": (torch.block_diag(complete(3, 4), complete(2, 5)), math.sqrt(12), math.sqrt(10)),
    "two of K_3_3": (torch.block_diag(complete(3, 3), complete(3, 3)), 3.0, 3.0),
    "two of K_300_300, by Lanczos": (torch.block_diag(complete(300, 300), complete(300, 300)), 300.0, 300.0),
    "C_10": (cycle(5), 2.0, 2 * math.cos(math.pi / 5)),
    "Q_4": (hypercube(4), 4.0, 2.0),
    "Q_10, by Lanczos": (hypercube(10), 10.0, 8.0),
    "PG(2, 2), Heawood": (projective_plane(2), 3.0, math.sqrt(2)),
    "PG(2, 3)": (projective_plane(3), 4.0, math.sqrt(3)),
    "PG(2, 17), by Lanczos": (projective_plane(17), 18.0, math.sqrt(17)),
    "one row": (complete(1, 4), 2.0, 0.0),
    "no edge": (torch.zeros(3, 4), 0.0, 0.0),
    "no edge, large": (torch.zeros(300, 400), 0.0, 0.0),
    "no row": (torch.zeros(0, 4), 0.0, 0.0),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
def test_two_singular_values_of_known_graphs(name: str, dtype: torch.dtype) -> None:
    graph, first, second = KNOWN[name]
    found = two_singular_values(graph.to(dtype))
    assert found == pytest.approx((first, second), abs=TOLERANCE * first)
    assert two_singular_values(graph.to(dtype).T) == pytest.approx(found, abs=TOLERANCE * first)


def test_the_quantities_of_a_complete_graph() -> None:
    spectrum = layer_spectrum(matrix(torch.ones(4, 5), torch.full((4, 5), -0.5)))
    bound = math.sqrt(4 - 1) + math.sqrt(5 - 1)
    assert (spectrum.mean_degree_left, spectrum.mean_degree_right, spectrum.sparsity) == (4.0, 5.0, 0.0)
    assert spectrum.delta_r == pytest.approx(bound, abs=1e-6)
    assert spectrum.delta_r_imdb == pytest.approx(bound, abs=1e-6)
    assert spectrum.lambda_ == pytest.approx(0.5 * math.sqrt(20), abs=1e-6)
    assert spectrum.lambda_imsg == pytest.approx(0.5 * math.sqrt(20), abs=1e-6)
    assert spectrum.excluded is None


@pytest.mark.parametrize(("q", "gap"), [(2, 2 * math.sqrt(2) - math.sqrt(2)), (3, 2 * math.sqrt(3) - math.sqrt(3))])
def test_projective_planes_are_ramanujan(q: int, gap: float) -> None:
    spectrum = layer_spectrum(matrix(projective_plane(q)))
    assert spectrum.delta_r == pytest.approx(gap)  # 2 sqrt(d - 1) - mu_hat with d = q + 1, mu_hat = sqrt(q)
    assert spectrum.lambda_ == pytest.approx(q + 1 - math.sqrt(q))


def test_left_vertices_are_inputs() -> None:
    """Inputs 0-2 feed all four outputs, inputs 3-5 three of them: two groups; outputs have degrees 6, 6, 6, 3."""
    mask = torch.ones(4, 6)
    mask[3, 3:] = 0
    spectrum = layer_spectrum(matrix(mask))
    assert spectrum.mean_degree_left == pytest.approx(21 / 6)
    assert spectrum.mean_degree_right == pytest.approx(21 / 4)
    gaps = [math.sqrt(3) + math.sqrt(2), 2 * math.sqrt(2)]  # K_{3,4} and K_{3,3}: mu_hat = 0
    assert spectrum.delta_r_imdb == pytest.approx(sum(gaps) / 2, abs=1e-6)
    assert spectrum.lambda_imsg == pytest.approx((math.sqrt(12) + 3) / 2, abs=1e-6)


# ---- another path: dense eigenvalues of the bipartite matrix, and subgraphs by the letter


def dense_eigenvalues(block: np.ndarray) -> np.ndarray:
    """Eigenvalues of [[0, M^T], [M, 0]], descending."""
    rows, columns = block.shape
    adjacency = np.zeros((rows + columns, rows + columns))
    adjacency[columns:, :columns], adjacency[:columns, columns:] = block, block.T
    return np.linalg.eigvalsh(adjacency)[::-1]


def by_the_letter(mask: np.ndarray, weight: np.ndarray) -> dict[str, float] | None:
    """delta_r and lambda of a graph given as (out, in), vertices without an edge taken off; None without an edge."""
    edges = {(i, o) for o, i in np.argwhere(mask).tolist()}
    inputs, outputs = sorted({i for i, _ in edges}), sorted({o for _, o in edges})
    if not edges:
        return None
    chosen = np.ix_(outputs, inputs)
    spectrum, weighted = dense_eigenvalues(mask[chosen]), dense_eigenvalues(np.abs(weight[chosen]))
    d_left, d_right = len(edges) / len(inputs), len(edges) / len(outputs)
    return {
        "left": d_left,
        "right": d_right,
        "delta_r": math.sqrt(d_left - 1) + math.sqrt(d_right - 1) - spectrum[1],
        "lambda": weighted[0] - weighted[1],
    }


def subgraphs_by_the_letter(mask: np.ndarray, weight: np.ndarray) -> list[dict[str, float]]:
    found = []
    for degree in sorted(set(mask.sum(0).tolist())):
        group = [i for i in range(mask.shape[1]) if mask[:, i].sum() == degree]
        part = by_the_letter(mask[:, group], weight[:, group])
        if len(group) >= 3 and part and part["left"] >= 3 and part["right"] >= 3:
            found.append(part)
    return found


def check(graph: SparseMatrix) -> bool:
    """Compare with the other path; whether there were subgraphs."""
    unit = np.ones((graph.block_size, graph.block_size))
    mask, weight = np.kron(graph.mask.numpy().astype(float), unit), graph.weight.double().numpy()
    spectrum, whole = layer_spectrum(graph), by_the_letter(mask, weight)
    if whole is None or (mask.any(0).sum() < 3 or mask.any(1).sum() < 3):
        assert spectrum.delta_r is None
        assert spectrum.excluded == "all: fewer than 3 vertices with an edge on a side"
        return False
    parts = subgraphs_by_the_letter(mask, weight)
    assert (spectrum.mean_degree_left, spectrum.mean_degree_right) == pytest.approx((whole["left"], whole["right"]))
    assert spectrum.delta_r == pytest.approx(whole["delta_r"], abs=1e-6)
    assert spectrum.lambda_ == pytest.approx(whole["lambda"], abs=1e-6)
    for key, mean in (("delta_r", spectrum.delta_r_imdb), ("lambda", spectrum.lambda_imsg)):
        expected = np.mean([part[key] for part in parts]) if parts else None
        assert mean == (None if expected is None else pytest.approx(expected, abs=1e-6))
    missing = "delta_r_imdb, lambda_imsg: no subgraph of equal left degree is large enough"
    assert spectrum.excluded == (None if parts else missing)
    return bool(parts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 24), st.integers(0, 1000), st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_any_mask_agrees_with_dense_eigenvalues(rows: int, columns: int, seed: int, density: float) -> None:
    check(random_matrix(rows, columns, seed, density))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([0.3, 0.6, 1.0]))
def test_any_mask_of_tiles_agrees_with_dense_eigenvalues(rows: int, columns: int, seed: int, density: float) -> None:
    check(random_matrix(rows, columns, seed, density, block_size=4))


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_with_many_subgraphs_agrees_with_dense_eigenvalues(seed: int) -> None:
    assert check(random_matrix(20, 80, seed))


@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_lanczos_agrees_with_dense_singular_values(shape: tuple[int, int]) -> None:
    graph = random_matrix(*shape, density=0.25)
    for values in (graph.mask, graph.weight.abs()):
        expected = np.linalg.svd(values.double().numpy(), compute_uv=False)[:2].tolist()
        assert two_singular_values(values) == pytest.approx(expected, abs=TOLERANCE * expected[0])


def test_the_second_largest_magnitude_of_the_bipartite_matrix_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eigenvalues come in pairs +-sigma, so the second-largest magnitude is sigma_1 again."""

    def known_fault(block: Tensor) -> tuple[float, float]:
        magnitudes = sorted(map(abs, dense_eigenvalues(block.double().numpy())), reverse=True)
        return magnitudes[0], magnitudes[1]

    graph = random_matrix(20, 80)
    monkeypatch.setattr(sparseift_llm.analysis.spectral, "two_singular_values", known_fault)
    assert known_fault(graph.mask)[1] == pytest.approx(known_fault(graph.mask)[0])
    with pytest.raises(AssertionError):
        check(graph)


def test_lanczos_that_does_not_converge_gives_way_to_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_convergence(*_: Any, **__: Any) -> Any:
        raise ArpackNoConvergence("no convergence", np.zeros(0), np.zeros(0))

    graph = random_matrix(300, 300).mask
    expected = two_singular_values(graph)
    monkeypatch.setattr(sparseift_llm.analysis.spectral, "eigsh", no_convergence)
    assert two_singular_values(graph) == pytest.approx(expected, rel=1e-9)


# ---- invariances


def test_permutations_change_nothing() -> None:
    graph = random_matrix(20, 80)
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(20, generator=generator), torch.randperm(80, generator=generator)
    permuted = layer_spectrum(matrix(graph.mask[rows][:, columns], graph.weight[rows][:, columns]))
    assert values(permuted) == {
        key: pytest.approx(value) if isinstance(value, float) else value
        for key, value in values(layer_spectrum(graph)).items()
    }


def test_the_transpose_swaps_sides_and_keeps_what_needs_no_side() -> None:
    graph = random_matrix(20, 80)
    one, other = layer_spectrum(graph), layer_spectrum(matrix(graph.mask.T, graph.weight.T))
    assert (one.delta_r, one.lambda_) == pytest.approx((other.delta_r, other.lambda_))
    assert (one.mean_degree_left, one.mean_degree_right) == (other.mean_degree_right, other.mean_degree_left)
    assert one.delta_r_imdb != pytest.approx(other.delta_r_imdb or 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_tiles_are_the_expanded_mask(seed: int) -> None:
    tiles = random_matrix(6, 9, seed, density=0.5, block_size=8)
    expanded = tiles.mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    weights = layer_spectrum(SparseMatrix("layer", "o", expanded, 1, tiles.weight))
    assert values(layer_spectrum(tiles)) == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in values(weights).items()
    }


def test_a_scale_of_the_weights_scales_lambda_only() -> None:
    graph = random_matrix(20, 80)
    one, other = layer_spectrum(graph), layer_spectrum(matrix(graph.mask, -3 * graph.weight))
    assert (other.lambda_, other.lambda_imsg) == pytest.approx((3 * (one.lambda_ or 0), 3 * (one.lambda_imsg or 0)))
    assert (other.delta_r, other.delta_r_imdb) == (one.delta_r, one.delta_r_imdb)


# ---- what has no value says why


def test_isolated_vertices_are_no_part_of_the_graph() -> None:
    graph = random_matrix(8, 12, density=0.7)
    padded = torch.zeros(20, 30)
    padded[4:12, 5:17] = graph.mask
    with_padding = layer_spectrum(matrix(padded))
    assert with_padding.sparsity > 0.8
    assert (with_padding.delta_r, with_padding.mean_degree_left) == pytest.approx(
        (layer_spectrum(matrix(graph.mask)).delta_r, layer_spectrum(matrix(graph.mask)).mean_degree_left)
    )


@pytest.mark.parametrize("mask", [torch.zeros(4, 4), torch.ones(2, 9), torch.ones(9, 2), torch.ones(1, 1)])
def test_graphs_too_small_are_excluded(mask: Tensor) -> None:
    spectrum = layer_spectrum(matrix(mask))
    assert spectrum.excluded == "all: fewer than 3 vertices with an edge on a side"
    assert (spectrum.delta_r, spectrum.delta_r_imdb, spectrum.lambda_, spectrum.lambda_imsg) == (None,) * 4
    assert spectrum.sparsity in (0.0, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_excluded(value: float) -> None:
    graph = random_matrix(20, 80)
    graph.weight[tuple(graph.mask.nonzero()[0])] = value
    spectrum = layer_spectrum(graph)
    assert spectrum.excluded == "lambda, lambda_imsg: the weights are not finite"
    assert (spectrum.lambda_, spectrum.lambda_imsg) == (None, None)
    assert spectrum.delta_r is not None
    assert spectrum.delta_r_imdb is not None
