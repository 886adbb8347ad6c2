"""The record of a Sparse-IFT model: what stands under `sparse_ift` in its config.json, in format 2.

Everything that loading needs is written down, so that a checkpoint never depends on how sizes are computed today::

    {
      "format": 2,
      "transformation": {"family": "wide", "sparsity": 0.75, ...},      SparseIFTConfig.to_dict()
      "dense_model": {"hidden": 768, "ffn": 3072, "head_dim": 64, "vocab": 50257},
      "layers": [
        {
          "name": "transformer.h.0.mlp.c_fc", "kind": "mlp_in", "family": "wide", "layer_index": 0,
          "dense_shape": [3072, 768],
          "matrices": [{"shape": [6144, 1536], "num_active": 2359296, "structure": "unstructured", "transposed": true}]
        },
        ...
      ]
    }

`layers` has an entry for every projection of the decoder layers, those that stay dense included. With scope `residual`
it has two more, of the kinds `embedding` and `logits`; where the model uses one weight for both, the logits have no
matrices, and `tied_to` names the embedding. The fields of an entry are those of `LayerSpec`, `MatrixSpec` and
`RowGroup` in specs.py, which say what each means. Where one is absent, it has the default that stands there.

A field that this version does not know, or a later format, is an error. Format 1 had no field `format`; it held the
options of the transformation and the dense sizes alone, and `checkpoints/upgrade.py` makes format 2 of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparseift_llm.config.as_begun import as_begun
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.record.fields import LATER_VERSION, Fields, damaged, is_integer
from sparseift_llm.record.specs import LayerSpec

RECORD_KEY = "sparse_ift"
FORMAT = 2


@dataclass(frozen=True)
class DenseSizes:
    """Widths and vocabulary of the dense model, as it was when `sparsify` was given it."""

    hidden: int
    ffn: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class ModelRecord:
    """What is recorded of one Sparse-IFT model.

    Args:
        transformation: what `sparsify` was asked for, a tile size chosen by itself filled in.
        dense_model: sizes of the dense model.
        layers: every projection of the decoder layers, layer by layer, perhaps with embedding and logits around them.
    """

    transformation: SparseIFTConfig
    dense_model: DenseSizes
    layers: tuple[LayerSpec, ...]

    @property
    def has_own_layout(self) -> bool:
        """Whether the model has parameters that no stock class has: all do but Wide ones without tiles."""
        return any(
            layer.is_replaced or matrix.block_size is not None for layer in self.layers for matrix in layer.matrices
        )

    @property
    def has_masked_weights(self) -> bool:
        """Whether a matrix is stored with its zeros, so that its mask is in the mask file alone."""
        return any(matrix.is_sparse and not matrix.block_size for layer in self.layers for matrix in layer.matrices)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json, from which `from_dict` gives back an equal record."""
        sizes = self.dense_model
        return {
            "format": FORMAT,
            "transformation": self.transformation.to_dict(),
            "dense_model": {"hidden": sizes.hidden, "ffn": sizes.ffn, "head_dim": sizes.head_dim, "vocab": sizes.vocab},
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, values: Any) -> ModelRecord:
        """The record from its JSON object in format 2.

        Raises:
            ValueError: a field is missing, damaged or unknown, naming it; or the format is a later one.
        """
        fields = Fields(values, RECORD_KEY)
        number = fields.take("format")
        if not is_integer(number, FORMAT):
            raise damaged(fields.path("format"), f"must be {FORMAT}, got {number!r}")
        if number > FORMAT:
            raise ValueError(
                f"the sparse_ift record in config.json has format {number}, and this version reads formats up to "
                f"{FORMAT}; {LATER_VERSION}"
            )
        try:
            transformation = SparseIFTConfig.from_dict(as_begun(fields.take("transformation")))
        except ValueError as error:
            raise damaged(fields.path("transformation"), f"is refused ({error}), or {LATER_VERSION}") from error
        sizes = Fields(fields.take("dense_model"), fields.path("dense_model"))
        dense_model = DenseSizes(*(sizes.integer(name) for name in ("hidden", "ffn", "head_dim", "vocab")))
        sizes.end()
        layers = tuple(LayerSpec.from_dict(*entry) for entry in fields.objects("layers"))
        fields.end()
        _check_names(layers, fields.path("layers"))
        return cls(transformation, dense_model, layers)


def has_record(hf_config: Any) -> bool:
    """Whether a transformers config, or None, is that of a Sparse-IFT model."""
    return bool(getattr(hf_config, RECORD_KEY, None))


def missing_layers(hf_config: Any) -> str:
    """The error message for a model without sparse layers, by its transformers config (or None)."""
    if has_record(hf_config):
        return "the Sparse-IFT model was loaded without its masks: load it with sparseift_llm.load_pretrained(folder)"
    return "the model has no sparse layers: call sparsify(model, config) first"


def transformation_values(values: Any) -> Mapping[str, Any]:
    """The options of the transformation in a record of any format, unchecked; empty where there are none."""
    if isinstance(values, Mapping) and "format" in values:
        values = values.get("transformation")
    return values if isinstance(values, Mapping) else {}


def _check_names(layers: tuple[LayerSpec, ...], where: str) -> None:
    owners = {layer.name for layer in layers if layer.tied_to is None}
    if len({layer.name for layer in layers}) < len(layers):
        raise damaged(where, "names a layer twice")
    for layer in layers:
        if layer.tied_to is not None and layer.tied_to not in owners:
            raise damaged(
                f"{where} ({layer.name}).tied_to", f"must name a layer with matrices of its own, got {layer.tied_to!r}"
            )
