"""What a user asks `sparsify` for: `SparseIFTConfig`."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs, to_jsonable_python

from sparseift_llm.config.dst import DSTConfig
from sparseift_llm.config.families import Family, Wide, with_family_mapping
from sparseift_llm.config.fields import Words
from sparseift_llm.config.goals import GOALS
from sparseift_llm.config.parsing import config_class, from_dict, keyword_arguments
from sparseift_llm.config.rules import KINDS, FamilyRule, Kinds
from sparseift_llm.config.structures import MAX_TRANSPOSABLE_M, STRUCTURES, pattern_of, sparsity_of
from sparseift_llm.config.yaml_files import load_yaml
from sparseift_llm.isoflop import BLOCK_SIZES
from sparseift_llm.utils.words import check_choice

__all__ = ["KINDS", "DSTConfig", "FamilyRule", "SparseIFTConfig"]


@config_class
class SparseIFTConfig:
    """What `sparsify` makes of a dense GPT.

    Options of a family belong to the family: `family=Parallel(nonlinearity="none")`, or in YAML
    `family: {name: parallel, nonlinearity: none}`. The name alone means its defaults. The keys `scope`, `nonlinearity`
    and `sparse_u_only` are also accepted beside `family`, and can be read there.

    Raises:
        ValueError: a value outside its range or a contradictory combination, naming it.

    Source: Sparse-IFT, arXiv 2303.11525.

    >>> SparseIFTConfig(family="parallel", nonlinearity="none").family
    Parallel(nonlinearity='none', name='parallel')
    """

    family: Family = Wide()
    """`wide` (wider sides), or in place of each projection and with its sides: `parallel` (a sum of sparse branches),
    `factorized` (two sparse factors around a wider inner side), `doped` (a sparse matrix plus a dense low-rank one). A
    name, or a mapping of its options with its name."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Zero fraction s that sets the widths, above 0 except for `wide`. After rounding the widths, each layer's sparsity
    is solved again so that its multiply-adds equal the dense layer's. Structure `n:m` says it: leave it out there."""
    structure: Annotated[str, Words(STRUCTURES)] = "unstructured"
    """`unstructured` (a dense weight, zeros and a mask; costs dense time and memory), `block` (only active tiles are
    stored and multiplied) or `n:m`, e.g. `2:4` (stored as `unstructured`, with n active ones of every m neighbouring
    inputs; multiply-adds are as near to the dense layer's as rounded widths come)."""
    block_size: int | None = None
    """Side of a tile, 4 to 256 (a power of 2), with structure `block` only; widths are rounded to multiples of it.
    Null: chosen by width. Tiles below 16 have no fast kernel."""
    transposable: bool = False
    """With structure `n:m` (m of at most 4) only: masks are n:m along the outputs, too, so that the gradient of the
    input can be computed on the semi-structured kernels as well. Mask updates exchange fewer weights then."""
    distribution: Literal["uniform", "erk"] = "uniform"
    """`uniform` (each layer keeps its dense twin's multiply-adds) or `erk` (Erdos-Renyi; the total is kept, layers
    differ)."""
    accounting: Literal["linears", "whole_model"] = "linears"
    """`linears` makes the sparse projections iso-FLOP; `whole_model` solves the sparsity so that forward FLOPs with
    attention and logits, at `seq_len`, equal the dense model's."""
    seq_len: Annotated[int, Field(ge=1)] | None = None
    """Tokens per sequence, needed by accounting `whole_model` only."""
    init: Literal["paper", "preserve", "supar", "pretrained"] | None = None
    """`paper` (stock init), `preserve` (output variance of the dense layer), `supar` (sparse maximal update; train with
    `optimizer_param_groups`) or `pretrained` (the weights of a trained dense model; of `wide` with scope `ffn` or
    `residual` only, and not with a non-linearity). Null means `preserve`, and is refused for a model that was loaded
    with its weights, which would be lost."""
    targets: Kinds | None = None
    """Projection kinds to make sparse, any of q, k, v, o, mlp_in, mlp_out; null means all that the scope widens."""
    exclude: Kinds = ()
    """Projection kinds to leave dense."""
    width_multiple: Annotated[int, Field(ge=1)] = 1
    """The widened hidden and FFN sizes are rounded to a multiple of this, and of what the architecture itself needs.
    With structure `n:m` the widths of queries, keys and values are, too."""
    balance_heads: bool = False
    """Every attention head keeps the same number of active weights (to within one), at the start and in every update:
    per head the rows of q, of k and of v, fused or not, and the input columns of o. With tiles, whose block-rows have
    as many tiles anyway, a head must be whole block-rows, and o stays as it is."""
    kinds_apart: bool = True
    """Projections that share a matrix (queries, keys and values; an FFN's gate and up) are counted as if each had a
    matrix of its own: each keeps its number of active weights at the start and in every update, and `erk` looks at its
    shape. False: the matrix has one number, and mask updates may move density between them. Block-rows of tiles have
    constant numbers anyway."""
    rules: tuple[FamilyRule, ...] = ()
    """Other families for some projections, see `FamilyRule`; the first rule that covers one counts."""
    seed: int = 0
    """Seeds mask initialisation and random growth."""
    dst: DSTConfig = field(default_factory=DSTConfig)
    """The mask updates during training."""

    @model_validator(mode="before")
    @classmethod
    def _options_beside_family(cls, values: Any) -> Any:
        given = keyword_arguments(cls, values)
        return values if given is None else ArgsKwargs((), _with_sparsity(with_family_mapping(given)))

    def __post_init__(self) -> None:
        self._check_block()
        self._check_pattern()
        self._check_families()
        self._check_heads()
        if self.targets == ():
            raise ValueError("targets is empty, so nothing would be sparse; leave it out to mean all projections")
        if self.scope == "ffn":
            for kind in self.targets or ():
                if kind not in ("mlp_in", "mlp_out"):
                    raise ValueError(
                        f"targets: scope='ffn' widens only mlp_in and mlp_out, so {kind!r} cannot be sparse; "
                        "use scope='model' or leave it out"
                    )
        self._check_embedding()
        if self.init == "supar" and self.dst.starts_dense:
            raise ValueError(
                f"init='supar' assumes a constant sparsity, unlike algorithm={self.dst.algorithm!r}; "
                "use init='preserve'"
            )
        if self.accounting == "whole_model" and self.seq_len is None:
            raise ValueError("accounting='whole_model' needs seq_len: attention FLOPs depend on it")

    def _check_block(self) -> None:
        if self.block_size is not None and self.structure != "block":
            raise ValueError(f"block_size={self.block_size} needs structure='block'; set it or leave block_size out")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size}")
        if self.structure == "block" and self.dst.starts_dense:
            raise ValueError(
                f"algorithm={self.dst.algorithm!r} starts dense, but structure='block' stores a fixed number of tiles; "
                "use structure='unstructured', or static, set or rigl"
            )

    def _check_pattern(self) -> None:
        """What n:m masks, whose number of active weights follows from their shape, cannot be combined with."""
        if self.pattern is None:
            if self.transposable:
                raise ValueError(
                    f"transposable=True needs structure='n:m', e.g. '2:4', not {self.structure!r}; set it or leave "
                    "transposable out"
                )
            return
        if self.transposable and self.pattern[1] > MAX_TRANSPOSABLE_M:
            raise ValueError(
                f"transposable=True chooses among all patterns of an m x m block, which are too many with "
                f"structure={self.structure!r}; use an m of at most {MAX_TRANSPOSABLE_M}, e.g. '2:4', or leave it out"
            )
        name, (n, m) = f"structure={self.structure!r}", self.pattern
        for sparsity in (self.sparsity, *(rule.sparsity for rule in self.rules)):
            if sparsity is not None and abs(sparsity - sparsity_of(self.pattern)) > 1e-9:
                raise ValueError(
                    f"sparsity={sparsity} contradicts {name}, in which {m - n} of {m} weights are zero "
                    f"({sparsity_of(self.pattern):g}); leave sparsity out, or use another n:m"
                )
        fixed = f"but {name} fixes the density of every row at {n} of {m}"
        if self.distribution != "uniform":
            raise ValueError(
                f"distribution={self.distribution!r} gives layers different densities, {fixed}; leave it out"
            )
        if self.accounting == "whole_model":
            raise ValueError(
                f"accounting='whole_model' solves the sparsity, {fixed}; use accounting='linears', and see in the plan "
                "(`sparseift plan`, ratio_whole_model) what the whole model costs"
            )
        if self.dst.starts_dense:
            raise ValueError(
                f"algorithm={self.dst.algorithm!r} starts dense and prunes wherever weights are small, {fixed}; use "
                "static, set or rigl, or structure='unstructured'"
            )
        if self.balance_heads:
            raise ValueError(
                f"balance_heads evens out how many active weights heads have, {fixed}, so that heads of q, k and v are "
                "even anyway; leave it out"
            )
        if self.init == "pretrained" and self.scope == "residual":
            raise ValueError(
                f"init='pretrained' of scope='residual' keeps the trained weights of old channels, {fixed}, which "
                "drops some of them; use scope='ffn', family='parallel', or structure='unstructured'"
            )
        if isinstance(self.family, Wide) and self.family.reserve != Wide.reserve:
            raise ValueError(
                f"reserve={self.family.reserve} shares active weights out to new units, {fixed}; leave it out"
            )

    def _check_heads(self) -> None:
        if not self.balance_heads:
            return
        if self.family != "wide" or not {"q", "k", "v", "o"} & set(self.target_kinds):
            raise ValueError(
                "balance_heads needs sparse attention projections: family='wide' with scope='model' or 'residual', and "
                "any of q, k, v, o in targets; or leave it out"
            )
        if self.dst.starts_dense:
            raise ValueError(
                f"algorithm={self.dst.algorithm!r} prunes the smallest weights wherever they are, so balance_heads "
                "cannot hold; use static, set or rigl"
            )

    def _check_families(self) -> None:
        if self.family != "wide":
            if self.distribution != "uniform":
                raise ValueError(f"distribution={self.distribution!r} goes with family='wide' only; leave it out")
            if self.sparsity == 0:
                raise ValueError(f"family={self.family.name!r} needs a sparsity above 0")
        if self.init == "supar" and (self.family != "wide" or self.rules):
            raise ValueError("init='supar' is derived for family='wide' alone; use init='preserve'")
        if self.init == "pretrained":
            self._check_pretrained()
        elif isinstance(self.family, Wide) and self.family.reserve != Wide.reserve:
            raise ValueError(
                f"reserve={self.family.reserve} is for init='pretrained', not for init={self.init!r}; leave it out"
            )
        if self.rules and self.widens_hidden:
            raise ValueError("rules need sides of the dense model's size; use scope='ffn' or another family")
        for rule in self.rules:
            if self.family == "wide" and set(self.target_kinds) & set(rule.targets or KINDS):
                raise ValueError(
                    f"rules: family='wide' with scope='ffn' gives every layer's FFN one width, so rules can be for "
                    f"attention only; give targets other than {', '.join(self.target_kinds)}"
                )

    def _check_embedding(self) -> None:
        """Options of the embedding are for scope `residual`, and what they say must have an effect."""
        family = self.family
        if not isinstance(family, Wide):
            return
        if self.scope != "residual":
            for name, default in (("embedding", "sparse"), ("embedding_updates", False)):
                if getattr(family, name) != default:
                    raise ValueError(
                        f"{name}={getattr(family, name)!r} goes with scope='residual' only, not with "
                        f"scope={self.scope!r}, which leaves embeddings dense; leave it out"
                    )
        elif family.embedding == "unstructured" and self.structure != "block":
            raise ValueError(
                "embedding='unstructured' keeps single weights at the ends of a model whose projections are in tiles, "
                f"and with structure={self.structure!r} embedding='sparse' does so, too; write embedding='sparse' or "
                "leave it out, or set structure='block'"
            )
        elif family.embedding_updates and family.embedding == "dense":
            raise ValueError("embedding_updates=True needs embedding='sparse': a dense embedding has no mask")
        elif family.embedding_updates and self.dst.algorithm not in ("set", "rigl"):
            raise ValueError(
                f"embedding_updates=True needs algorithm='set' or 'rigl', not {self.dst.algorithm!r}; leave it out, "
                "and the masks of embeddings stay as they are"
            )

    def _check_pretrained(self) -> None:
        if self.family == "wide" and self.scope == "model":
            raise ValueError(
                "init='pretrained' cannot widen heads, whose rotary embeddings would compute something else; use "
                "scope='ffn' or 'residual', or family='parallel', 'factorized' or 'doped'"
            )
        parts: tuple[SparseIFTConfig | FamilyRule, ...] = (self, *self.rules)
        for part in parts:
            if part.nonlinearity not in (None, "none"):
                raise ValueError(
                    f"init='pretrained' needs linear maps, but family={part.family.name!r} has "
                    f"nonlinearity={part.nonlinearity!r} in place of a trained projection; use nonlinearity='none'"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparseIFTConfig:
        """The config from a mapping, as `to_dict` gives it, or as version 0.1 did. Raises ValueError as `from_dict`."""
        return from_dict(cls, values, "sparse_ift")

    @classmethod
    def from_yaml(cls, path: str | Path) -> SparseIFTConfig:
        """The config from a YAML file. Raises ValueError as `from_dict` does."""
        return cls.from_dict(load_yaml(path))

    @classmethod
    def recommended(cls, goal: str, **changes: Any) -> SparseIFTConfig:
        """The config that is recommended for a goal; docs/guides/choose.md says what to expect of it.

        Args:
            goal: `dense_cost` (about the dense model's time and memory), `equal_flops` (a lower loss for the whole
                model's FLOPs), `balanced` (most of the gain per token, in tiles), `lowest_loss` (per token, whatever
                it costs), `from_trained` (a trained dense model's weights) or `paper` (the authors' recipe for GPT).
            changes: options that differ, e.g. `sparsity=0.5`.

        Raises:
            ValueError: an unknown goal, or options that contradict it.

        >>> SparseIFTConfig.recommended("balanced").structure
        'block'
        """
        check_choice("goal", goal, tuple(GOALS))
        return cls(**{**GOALS[goal], **changes})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable mapping from which `from_dict` gives back an equal config.

        The family is a mapping of its own options with its name, so that options of other families are not in it.
        """
        values: dict[str, Any] = to_jsonable_python(self)
        return values

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) of the structure `n:m`; None with others."""
        return pattern_of(self.structure)

    @property
    def side_multiple(self) -> int:
        """What the sides of sparse matrices are multiples of: the side of a tile, or m of n:m; else 1."""
        return self.block_size or (self.pattern[1] if self.pattern else 1)

    @property
    def scope(self) -> Literal["model", "ffn", "residual"]:
        """What Wide widens; `model` for the other families, of which all projections may become sparse."""
        return self.family.scope if isinstance(self.family, Wide) else "model"

    @property
    def widens_hidden(self) -> bool:
        """Whether the hidden size becomes wider, and all that is as wide with it."""
        return isinstance(self.family, Wide) and self.scope != "ffn"

    @property
    def nonlinearity(self) -> str | None:
        """The family's non-linearity; None if it knows none."""
        return getattr(self.family, "nonlinearity", None)

    @property
    def sparse_u_only(self) -> bool:
        """Whether the outer factor of `factorized` stays dense."""
        return getattr(self.family, "sparse_u_only", False)

    @property
    def all_rules(self) -> tuple[FamilyRule, ...]:
        """The rules, and a last one that gives the config's own family to what they leave; Wide needs none."""
        if isinstance(self.family, Wide):
            return self.rules
        return (*self.rules, FamilyRule(self.family, self.target_kinds))

    @property
    def target_kinds(self) -> Kinds:
        """The projection kinds that become sparse, `exclude` taken off."""
        default = ("mlp_in", "mlp_out") if self.scope == "ffn" else KINDS
        return tuple(kind for kind in self.targets or default if kind not in self.exclude)


def _with_sparsity(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a config with the sparsity that a structure `n:m` implies, where none is given."""
    structure = values.get("structure")
    if "sparsity" in values or not isinstance(structure, str):
        return values
    pattern = pattern_of(structure)
    return values if pattern is None else {**values, "sparsity": sparsity_of(pattern)}
