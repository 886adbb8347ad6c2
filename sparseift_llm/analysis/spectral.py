"""Spectral quantities of masks and weights: is a sparse matrix, seen as a bipartite graph, a good expander?

Legend: the graph of a mask M (out, in) has the input features as left vertices, the output features as right ones,
and one edge per active weight; vertices without an edge are left out, also of the mean degrees d_L and d_R. The
eigenvalues of [[0, M^T], [M, 0]] are plus and minus the singular values of M, so mu_0 = sigma_1 and the largest
non-trivial one is mu_hat = sigma_2. The subgraphs K_i hold all left vertices of one degree and their edges; they
count if they have 3 left vertices and mean degrees of 3 on both sides.

- delta_r = sqrt(d_L - 1) + sqrt(d_R - 1) - mu_hat(M), positive for a Ramanujan graph; delta_r_imdb: its mean over K_i;
- lambda = mu_0(|W|) - mu_hat(|W|); lambda_imsg: its mean over K_i.

Source: arXiv 2303.11525; Hoang et al., ICLR 2023 (IMDB) and NeurIPS 2023 (weighted spectral gap).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from transformers import PreTrainedModel

from sparseift_llm.analysis.matrices import SparseMatrix, matrix_source
from sparseift_llm.utils.progress import progress_bar

logger = logging.getLogger(__name__)
TOLERANCE = 1e-7  # largest error of a singular value, as a share of the largest one
MIN_VERTICES = 3
MIN_MEAN_DEGREE = 3
QUANTITIES = ("delta_r", "delta_r_imdb", "lambda", "lambda_imsg")
_LAPACK_SIDE = 256  # up to here all eigenvalues are computed


@dataclass(frozen=True)
class LayerSpectrum:
    """The quantities of one sparse matrix.

    `delta_r` to `lambda_imsg` are defined at the top of this file. One that could not be computed is None.

    Args:
        name: module path of the matrix.
        kind: what the projection computes, e.g. `qkv`.
        shape: (out, in).
        sparsity: share of zeros in the mask.
        mean_degree_left, mean_degree_right: edges per input and per output feature that has any; 0 without edges.
        excluded: which quantities are missing, and why.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    sparsity: float
    mean_degree_left: float
    mean_degree_right: float
    delta_r: float | None = None
    delta_r_imdb: float | None = None
    lambda_: float | None = None
    lambda_imsg: float | None = None
    excluded: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields but the name, as JSON takes them."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "sparsity": self.sparsity,
            "mean_degree_left": self.mean_degree_left,
            "mean_degree_right": self.mean_degree_right,
            "delta_r": self.delta_r,
            "delta_r_imdb": self.delta_r_imdb,
            "lambda": self.lambda_,
            "lambda_imsg": self.lambda_imsg,
            "excluded": self.excluded,
        }


@dataclass(frozen=True)
class SpectralReport:
    """The quantities of a model, layer by layer.

    Args:
        masks_digest: of all masks of the model, see `mask_file.digest`.
        layers: in the model's order.
    """

    masks_digest: str
    layers: tuple[LayerSpectrum, ...]

    @property
    def model(self) -> dict[str, float | int | None]:
        """The mean of each quantity over the layers that have it, None if no layer has it.

        `num_layers` counts all layers, `num_excluded` those that lack a quantity.
        """
        rows = [layer.to_dict() for layer in self.layers]
        return {
            **{key: _mean([row[key] for row in rows if row[key] is not None]) for key in QUANTITIES},
            "num_layers": len(rows),
            "num_excluded": sum(layer.excluded is not None for layer in self.layers),
        }

    def to_dict(self) -> dict[str, Any]:
        """What `spectral.json` holds of one checkpoint: `masks_digest`, `layers` by name, `model`."""
        layers = {layer.name: layer.to_dict() for layer in self.layers}
        return {"masks_digest": self.masks_digest, "layers": layers, "model": self.model}


def spectral_report(model_or_folder: PreTrainedModel | str | Path, every_nth_layer: int = 1) -> SpectralReport:
    """Spectral quantities of all sparse matrices of a model: equal masks and weights give equal numbers.

    Args:
        model_or_folder: a Sparse-IFT model, or a folder with one; from a folder one layer at a time is read.
        every_nth_layer: analyse decoder layers 0, n, 2n, ... only, for large models.

    Returns:
        The report; singular values are right to `TOLERANCE` times the largest. Progress goes to the log (INFO).

    Raises:
        ValueError: no Sparse-IFT model, or its masks or weights are missing or damaged.

    Source: see the top of this file.
    """
    source = matrix_source(model_or_folder, every_nth_layer)
    layers = []
    with progress_bar("analysing", source.num_matrices, "matrix") as bar:
        for matrix in source.read():
            layers.append(layer_spectrum(matrix))
            logger.info("%d of %d: %s", len(layers), source.num_matrices, matrix.name)
            bar.update()
    return SpectralReport(source.masks_digest, tuple(layers))


def layer_spectrum(matrix: SparseMatrix) -> LayerSpectrum:
    """The quantities of one matrix, computed in one thread."""
    graph = _Graph(matrix)
    d_left, d_right = graph.mean_degrees
    about = (matrix.name, matrix.kind, matrix.shape, graph.sparsity, d_left, d_right)
    if min(graph.num_connected) < MIN_VERTICES:
        return LayerSpectrum(*about, excluded=f"all: fewer than {MIN_VERTICES} vertices with an edge on a side")
    with _one_thread():
        groups = list(graph.groups())
        gap, gaps = graph.ramanujan_gap(), [group.ramanujan_gap() for group in groups]
        reasons = [] if groups else ["delta_r_imdb, lambda_imsg: no subgraph of equal left degree is large enough"]
        if not graph.weights.isfinite().all():
            reasons.insert(0, "lambda, lambda_imsg: the weights are not finite")
            return LayerSpectrum(*about, gap, _mean(gaps), excluded="; ".join(reasons))
        weighted, weighted_gaps = graph.weighted_gap(), [group.weighted_gap() for group in groups]
    return LayerSpectrum(*about, gap, _mean(gaps), weighted, _mean(weighted_gaps), "; ".join(reasons) or None)


class _Graph:
    """The bipartite graph of a matrix, or of some of its left vertices.

    The mask of a layer of tiles is that of the tiles, each vertex replaced by b and each edge by b x b, so its
    degrees and singular values are b times those of the tile mask: exact, and small.
    """

    def __init__(self, matrix: SparseMatrix) -> None:
        self.edges, self.size = matrix.mask.T.contiguous(), matrix.block_size  # left x right
        self.weights = matrix.weight.T.abs()
        self.left_degrees = self.edges.sum(1)

    def _part(self, rows: Tensor) -> _Graph:
        part = object.__new__(_Graph)
        part.edges, part.size, part.left_degrees = self.edges[rows], self.size, self.left_degrees[rows]
        part.weights = self.weights.unflatten(0, (-1, self.size))[rows].flatten(0, 1)
        return part

    @property
    def sparsity(self) -> float:
        return 1 - float(self.left_degrees.sum()) / self.edges.numel()

    @property
    def num_connected(self) -> tuple[int, int]:
        """Left and right vertices with an edge."""
        right = int(self.edges.any(0).sum())
        return int(self.left_degrees.count_nonzero()) * self.size, right * self.size

    @property
    def mean_degrees(self) -> tuple[float, float]:
        """Mean degrees of these vertices, left and right."""
        num_edges = int(self.left_degrees.sum()) * self.size**2
        left, right = self.num_connected
        return (num_edges / left, num_edges / right) if num_edges else (0.0, 0.0)

    def groups(self) -> Iterator[_Graph]:
        """The subgraphs K_i that count, by degree."""
        order = self.left_degrees.argsort(stable=True)
        counts = self.left_degrees.unique(return_counts=True)[1]
        for rows in order.split(counts.tolist()):
            if len(rows) * self.size < MIN_VERTICES or self.left_degrees[rows[0]] * self.size < MIN_MEAN_DEGREE:
                continue
            part = self._part(rows.sort().values)
            if part.mean_degrees[1] >= MIN_MEAN_DEGREE:
                yield part

    def ramanujan_gap(self) -> float:
        left, right = self.mean_degrees
        return math.sqrt(left - 1) + math.sqrt(right - 1) - self.size * two_singular_values(self.edges)[1]

    def weighted_gap(self) -> float:
        first, second = two_singular_values(self.weights)
        return first - second


def two_singular_values(matrix: Tensor) -> tuple[float, float]:
    """The two largest singular values of a non-negative matrix, the larger first; 0 where there is none.

    Args:
        matrix: (m, n), bool, or of a float dtype; computed in float64.

    Returns:
        Both to `TOLERANCE` times the first.
    """
    # counts of common neighbours are whole numbers far below 2**24, so a mask's Gram matrix is exact in float32
    matrix = matrix.float() if matrix.dtype == torch.bool else matrix.double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    first, second = _two_eigenvalues((matrix @ matrix.T).double())
    return math.sqrt(max(first, 0.0)), math.sqrt(max(second, 0.0))


def _two_eigenvalues(gram: Tensor) -> tuple[float, float]:
    """The two largest eigenvalues of a non-negative, positive semi-definite matrix, the larger first."""
    if len(gram) <= _LAPACK_SIDE:
        values = [0.0, 0.0, *torch.linalg.eigvalsh(gram).tolist()] if len(gram) else [0.0, 0.0]
        return values[-1], values[-2] if len(gram) > 1 else 0.0
    parts = _components(gram)
    if len(parts) > 1:
        found = [value for part in parts for value in _two_eigenvalues(gram[part][:, part])]
        second, first = sorted(found)[-2:]
        return first, second
    # The matrix is irreducible now, so that its largest eigenvalue is simple (Perron and Frobenius): a Krylov space
    # holds one vector of each eigenspace only, and would miss the second of two equal first ones.
    operator = LinearOperator(gram.shape, lambda x: gram.mv(torch.from_numpy(x.reshape(-1))).numpy(), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(gram)) + 1
    try:
        second, first = sorted(eigsh(operator, k=2, v0=start, tol=1e-9, return_eigenvectors=False).tolist())
    except ArpackNoConvergence:
        second, first = torch.linalg.eigvalsh(gram)[-2:].tolist()
    return first, second


def _components(gram: Tensor) -> list[Tensor]:
    """Indices of the connected components of the graph whose edges are the non-zero entries."""
    edges = gram > 0
    if edges[gram.diagonal().argmax()].all():  # one vertex sees all others: the usual case
        return [torch.arange(len(gram))]
    _, labels = connected_components(csr_array(edges.numpy()), directed=False)
    labels = torch.from_numpy(labels)
    return list(labels.argsort(stable=True).split(labels.bincount().tolist()))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for many small products, which several would only disturb."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
