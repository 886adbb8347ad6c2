"""The two configuration objects of the library, without torch.

`SparseIFTConfig` says what a model becomes, `DSTConfig` how its masks evolve.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseift_llm.config.families import Doped, Factorized, FamilyOptions, Parallel, Wide
from sparseift_llm.config.parsing import check_choice, check_fields, from_dict, load_yaml
from sparseift_llm.isoflop import BLOCK_SIZES

KINDS = ("q", "k", "v", "o", "mlp_in", "mlp_out")
FAMILIES = ("wide", "parallel", "factorized", "doped")
INITS = ("paper", "preserve", "supar", "pretrained")
NONLINEARITIES = {"parallel": ("layernorm", "none"), "factorized": ("none", "layernorm", "gelu"), "doped": ("none",)}
_LAYER_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class DSTConfig:
    """How masks change during training (dynamic sparse training).

    Args:
        algorithm: `static` (never), `set` (grow at random), `rigl` (grow by the largest dense
            gradient of the global batch) or `gmp` (start dense, prune by magnitude).
        update_every_steps: optimizer steps between mask updates.
        drop_fraction: share of a layer's active weights dropped at the first update, in (0, 1);
            follows a cosine to 0. Not used by `static` and `gmp`.
        stop_fraction: share of all optimizer steps after which masks stay fixed, in (0, 1].

    Raises:
        ValueError: a value outside its range, naming it.

    Source: RigL, arXiv 1911.11134, eq. 1; GMP, arXiv 1710.01878.
    """

    algorithm: str = "rigl"
    update_every_steps: int = 100
    drop_fraction: float = 0.3
    stop_fraction: float = 0.75

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("algorithm", self.algorithm, ("static", "set", "rigl", "gmp"))
        if self.update_every_steps < 1:
            raise ValueError(f"update_every_steps must be at least 1, got {self.update_every_steps}")
        if not 0 < self.drop_fraction < 1:
            raise ValueError(f"drop_fraction must be in (0, 1), got {self.drop_fraction}")
        if not 0 < self.stop_fraction <= 1:
            raise ValueError(f"stop_fraction must be in (0, 1], got {self.stop_fraction}")


@dataclass(frozen=True)
class FamilyRule:
    """Another family for some projections.

    Args:
        family: `parallel`, `factorized`, `doped`, or `dense` to leave them as they are.
        targets: projection kinds it is for; None means all.
        layers: decoder layers it is for, counted from 0, e.g. `0-3,11`; None means all.
        sparsity: zero fraction in (0, 1); None means the config's.
        nonlinearity: see `SparseIFTConfig`.
        sparse_u_only: see `SparseIFTConfig`.

    Raises:
        ValueError: a value outside its range, naming it.
    """

    family: str
    targets: tuple[str, ...] | None = None
    layers: str | None = None
    sparsity: float | None = None
    nonlinearity: str | None = None
    sparse_u_only: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("family", self.family, (*FAMILIES[1:], "dense"))
        for kind in self.targets or ():
            check_choice("targets", kind, KINDS)
        if self.layers is not None and not _LAYER_RANGES.fullmatch(self.layers):
            raise ValueError(f"layers must be numbers and ranges such as '0-3,11', got {self.layers!r}")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must be in (0, 1), got {self.sparsity}")
        check_family_options(self.family, self.nonlinearity, self.sparse_u_only)

    @property
    def options(self) -> FamilyOptions | None:
        """The family with its options; None for `dense`."""
        return None if self.family == "dense" else family_options(self.family, self.nonlinearity, self.sparse_u_only)

    def covers(self, kind: str, layer_index: int) -> bool:
        """Whether this rule is for a projection of `kind` in decoder layer `layer_index`."""
        ranges = [part.partition("-") for part in self.layers.split(",")] if self.layers else []
        in_range = not ranges or any(int(low) <= layer_index <= int(high or low) for low, _, high in ranges)
        return in_range and (self.targets is None or kind in self.targets)


def family_options(family: str, nonlinearity: str | None, sparse_u_only: bool, scope: str = "model") -> FamilyOptions:
    """The options of a family from the flat keys, of which None means the default."""
    if family == "wide":
        return Wide(scope)
    if family == "parallel":
        return Parallel(nonlinearity or "layernorm")
    return Factorized(nonlinearity or "none", sparse_u_only) if family == "factorized" else Doped()


def check_family_options(family: str, nonlinearity: str | None, sparse_u_only: bool) -> None:
    """Raise ValueError where an option does not belong to the family."""
    allowed = NONLINEARITIES.get(family, ())
    if nonlinearity is not None and nonlinearity not in allowed:
        choices = f"one of {', '.join(allowed)}" if allowed else "left out"
        raise ValueError(f"nonlinearity={nonlinearity!r} does not go with family={family!r}; it must be {choices}")
    if sparse_u_only and family != "factorized":
        raise ValueError(f"sparse_u_only goes with family='factorized' only, not with {family!r}; leave it out")


@dataclass(frozen=True)
class SparseIFTConfig:
    """What `sparsify` makes of a dense GPT.

    Args:
        family: `wide` (wider sides), or in place of each projection and with its sides: `parallel` (a sum of sparse
            branches), `factorized` (two sparse factors around a wider inner side), `doped` (a sparse matrix
            plus a dense low-rank one).
        scope: of `wide`: `model` widens hidden and FFN size by sqrt(1/(1-s)); `ffn` widens only the FFN's
            inner size, by 1/(1-s), and leaves everything else as it was.
        sparsity: zero fraction s in [0, 1), that sets the widths, above 0 except for `wide`. After rounding the widths,
            each layer's sparsity is solved again so that its multiply-adds equal the dense layer's.
        structure: `unstructured` (a dense weight, zeros and a mask; costs dense time and memory) or
            `block` (only active tiles are stored and multiplied).
        block_size: side of a tile, 4 to 256 (a power of 2), with `structure="block"` only; widths are
            rounded to multiples of it. None: chosen by width, see `isoflop.default_block_size`.
            Tiles below 16 have no fast kernel.
        distribution: `uniform` (each layer keeps its dense twin's multiply-adds) or `erk`
            (Erdos-Renyi; the total is kept, layers differ).
        accounting: `linears` makes the sparse projections iso-FLOP; `whole_model` solves the
            sparsity so that forward FLOPs with attention and logits, at `seq_len`, equal the
            dense model's.
        seq_len: tokens per sequence, needed by `accounting="whole_model"` only.
        init: `paper` (stock init), `preserve` (output variance of the dense layer), `supar`
            (sparse maximal update; train with `optimizer_param_groups`) or `pretrained` (the weights of a trained
            dense model, see pretrained_start.py; not with `wide` and scope `model`, nor with a non-linearity).
        targets: projection kinds to make sparse, any of q, k, v, o, mlp_in, mlp_out; `None` means
            all that the scope widens.
        exclude: projection kinds to leave dense.
        width_multiple: the widened hidden and FFN sizes are rounded to a multiple of this (and of
            what the architecture itself needs).
        balance_heads: every attention head keeps the same number of active weights (to within one), at the start and in
            every update: per head the rows of q, of k and of v, fused or not, and the input columns of o. With tiles,
            whose block-rows have as many tiles anyway, a head must be whole block-rows, and o stays as it is.
        nonlinearity: in every branch of `parallel` (`layernorm`, the default, or `none`: then the branches sum to one
            linear map); between the factors of `factorized` (`none`, the default, `layernorm`, `gelu`).
        sparse_u_only: `factorized` keeps its outer factor dense.
        rules: other families for some projections, see `FamilyRule`; the first rule that covers one counts.
        seed: seeds mask initialisation and random growth.
        dst: the mask updates during training.

    Raises:
        ValueError: a value outside its range or a contradictory combination, naming it.

    Source: Sparse-IFT, arXiv 2303.11525.
    """

    family: str = "wide"
    scope: str = "model"
    sparsity: float = 0.75
    structure: str = "unstructured"
    block_size: int | None = None
    distribution: str = "uniform"
    accounting: str = "linears"
    seq_len: int | None = None
    init: str = "preserve"
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    width_multiple: int = 1
    balance_heads: bool = False
    nonlinearity: str | None = None
    sparse_u_only: bool = False
    rules: tuple[FamilyRule, ...] = ()
    seed: int = 0
    dst: DSTConfig = field(default_factory=DSTConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("family", self.family, FAMILIES)
        check_choice("scope", self.scope, ("model", "ffn"))
        check_choice("structure", self.structure, ("unstructured", "block"))
        check_choice("distribution", self.distribution, ("uniform", "erk"))
        check_choice("accounting", self.accounting, ("linears", "whole_model"))
        check_choice("init", self.init, INITS)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        self._check_block()
        self._check_families()
        self._check_heads()
        if self.width_multiple < 1:
            raise ValueError(f"width_multiple must be at least 1, got {self.width_multiple}")
        if self.targets == ():
            raise ValueError("targets is empty, so nothing would be sparse; leave it out to mean all projections")
        for kind in (*(self.targets or ()), *self.exclude):
            check_choice("targets/exclude", kind, KINDS)
        if self.scope == "ffn":
            for kind in self.targets or ():
                if kind not in ("mlp_in", "mlp_out"):
                    raise ValueError(
                        f"targets: scope='ffn' widens only mlp_in and mlp_out, so {kind!r} cannot be sparse; "
                        "use scope='model' or leave it out"
                    )
        if self.init == "supar" and self.dst.algorithm == "gmp":
            raise ValueError("init='supar' assumes a constant sparsity, unlike algorithm='gmp'; use init='preserve'")
        if self.accounting == "whole_model" and self.seq_len is None:
            raise ValueError("accounting='whole_model' needs seq_len: attention FLOPs depend on it")
        if self.seq_len is not None and self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {self.seq_len}")

    def _check_block(self) -> None:
        if self.block_size is not None and self.structure != "block":
            raise ValueError(f"block_size={self.block_size} needs structure='block'; set it or leave block_size out")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size}")
        if self.structure == "block" and self.dst.algorithm == "gmp":
            raise ValueError(
                "algorithm='gmp' starts dense, but structure='block' stores a fixed number of tiles; use "
                "structure='unstructured', or static, set or rigl"
            )

    def _check_heads(self) -> None:
        if not self.balance_heads:
            return
        if self.family != "wide" or not {"q", "k", "v", "o"} & set(self.target_kinds):
            raise ValueError(
                "balance_heads needs sparse attention projections: family='wide' with scope='model', and any of q, k, "
                "v, o in targets; or leave it out"
            )
        if self.dst.algorithm == "gmp":
            raise ValueError(
                "algorithm='gmp' prunes the smallest weights wherever they are, so balance_heads cannot hold; use "
                "static, set or rigl"
            )

    def _check_families(self) -> None:
        check_family_options(self.family, self.nonlinearity, self.sparse_u_only)
        if self.family != "wide":
            for name, value, default in (
                ("scope", self.scope, "model"),
                ("distribution", self.distribution, "uniform"),
            ):
                if value != default:
                    raise ValueError(f"{name}={value!r} goes with family='wide' only; leave it out")
            if self.sparsity == 0:
                raise ValueError(f"family={self.family!r} needs a sparsity above 0")
        if self.init == "supar" and (self.family != "wide" or self.rules):
            raise ValueError("init='supar' is derived for family='wide' alone; use init='preserve'")
        if self.init == "pretrained":
            self._check_pretrained()
        if self.rules and self.family == "wide" and self.scope == "model":
            raise ValueError("rules need sides of the dense model's size; use scope='ffn' or another family")
        for rule in self.rules:
            if self.family == "wide" and set(self.target_kinds) & set(rule.targets or KINDS):
                raise ValueError(
                    f"rules: family='wide' with scope='ffn' gives every layer's FFN one width, so rules can be for "
                    f"attention only; give targets other than {', '.join(self.target_kinds)}"
                )

    def _check_pretrained(self) -> None:
        if self.family == "wide" and self.scope == "model":
            raise ValueError(
                "init='pretrained' cannot widen the hidden side, because norms, tied embeddings and rotary heads would "
                "compute something else there; use scope='ffn' or family='parallel', 'factorized' or 'doped'"
            )
        chosen = [(self.family, self.nonlinearity), *((rule.family, rule.nonlinearity) for rule in self.rules)]
        for family, nonlinearity in chosen:
            actual = nonlinearity or NONLINEARITIES.get(family, ("none",))[0]
            if actual != "none":
                raise ValueError(
                    f"init='pretrained' needs linear maps, but family={family!r} has nonlinearity={actual!r} in place "
                    "of a trained projection; use nonlinearity='none'"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparseIFTConfig:
        """The config from a mapping, as `to_dict` gives it. Raises ValueError as `from_dict` does."""
        return from_dict(cls, values, "sparse_ift")

    @classmethod
    def from_yaml(cls, path: str | Path) -> SparseIFTConfig:
        """The config from a YAML file. Raises ValueError as `from_dict` does."""
        return cls.from_dict(load_yaml(path))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping from which `from_dict` gives back an equal config."""
        values = dataclasses.asdict(self)
        values["targets"] = None if self.targets is None else list(self.targets)
        values["exclude"] = list(self.exclude)
        values["rules"] = [{**rule, "targets": rule["targets"] and list(rule["targets"])} for rule in values["rules"]]
        return values

    @property
    def options(self) -> FamilyOptions:
        """The family with its options."""
        return family_options(self.family, self.nonlinearity, self.sparse_u_only, self.scope)

    @property
    def all_rules(self) -> tuple[FamilyRule, ...]:
        """The rules, and a last one that gives the config's own family to what they leave; Wide needs none."""
        if self.family == "wide":
            return self.rules
        own = FamilyRule(
            self.family, self.target_kinds, nonlinearity=self.nonlinearity, sparse_u_only=self.sparse_u_only
        )
        return (*self.rules, own)

    @property
    def target_kinds(self) -> tuple[str, ...]:
        """The projection kinds that become sparse, `exclude` taken off."""
        default = KINDS if self.scope == "model" else ("mlp_in", "mlp_out")
        return tuple(kind for kind in self.targets or default if kind not in self.exclude)
