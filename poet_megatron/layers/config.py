"""Settings of the POET reparameterization (what is rotated, how, and when it is merged)."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least, one_of

VARIANTS = ("bs", "fs")
ORTHOGONAL_MAPS = ("cayley-neumann", "cayley", "exp")
NEUMANN_TAILS = ("paper", "doubled")
COMPUTE_MODES = ("auto", "input", "weight")
TP_PLACEMENTS = ("auto", "outside", "inside")
MERGE_POLISHES = ("off", "exact")


@dataclass(frozen=True, kw_only=True)
class PoetConfig:
    """How W = R W0 P is parameterized (POET, Qiu et al., sections 3.2 and 5.2)."""

    variant: str = "bs"
    """bs: block-stochastic, a permutation around a block diagonal (Eq. 5); fs: fully-stochastic, a block on a random index set (Eq. 4)."""
    block_size: float = 256
    """Block size b of both sides: an integer above 1 is a size, one in (0, 1] a fraction of the width (fs only), 0 freezes the side."""
    block_size_in: float | None = None
    """Block size of the input side (R); overrides block_size."""
    block_size_out: float | None = None
    """Block size of the output side (P); overrides block_size."""
    orthogonal_map: str = "cayley-neumann"
    """cayley-neumann: truncated series (Eq. 6); cayley: exact, by Cholesky; exp: matrix exponential."""
    neumann_terms: int = 4
    """k of Eq. 6. Prefer even values: the orthogonality defect is |Q|^(2k+2) for even k, about 2|Q|^(k+1) for odd k."""
    neumann_tail: str = "paper"
    """Coefficient of the last power Q^(k+1): paper = 1 (Eq. 6), doubled = 2, so that every coefficient is 2."""
    compute: str = "auto"
    """input: rotate activations; weight: form the effective weight once per step; auto: whichever needs fewer flops."""
    share_input_rotation: bool = False
    """One R for q, k and v, and one for gate and up, instead of one each (fewer parameters; a departure from the paper)."""
    tp_placement: str = "auto"
    """Rotate the input of q, k, v (gate, up) outside (before a gather for each) or inside (on every rank, after one); auto: the cheaper."""
    merge_interval: int = 400
    """T_m: optimizer steps between merge-then-reinitialize; 0 never merges."""
    merge_polish: str = "off"
    """off: merge the map that the forward pass used (keeps the function); exact: merge its exact Cayley map (keeps the spectrum)."""
    merge_reset_moments: bool = True
    """Reset Adam's moments and step of the skews at every merge, as the paper does."""
    merge_clip_warmup: int = 10
    """Steps after a merge over which the gradient clipping threshold ramps back to optim.clip_grad; 0 disables the ramp."""
    merge_clip_scale: float = 0.1
    """Fraction of optim.clip_grad that the ramp starts from."""
    merge_at_skew_norm: float = 0.0
    """Merge early when the largest |Q|_2 passes this; 0 disables. Checked every 10 steps."""
    master_weights: bool = True
    """Keep an fp32 master of every rotated weight when training in bf16, so that merges do not accumulate rounding."""
    shard_groups: int = 0
    """Groups of features that permutations and blocks never leave; 0 means the tensor-parallel size, which must divide it."""

    def __post_init__(self) -> None:
        one_of("poet.variant", self.variant, VARIANTS)
        one_of("poet.orthogonal_map", self.orthogonal_map, ORTHOGONAL_MAPS)
        one_of("poet.neumann_tail", self.neumann_tail, NEUMANN_TAILS)
        one_of("poet.compute", self.compute, COMPUTE_MODES)
        one_of("poet.tp_placement", self.tp_placement, TP_PLACEMENTS)
        one_of("poet.merge_polish", self.merge_polish, MERGE_POLISHES)
        for name in ("block_size", "block_size_in", "block_size_out"):
            self._check_block(f"poet.{name}", getattr(self, name))
        at_least("poet.neumann_terms", self.neumann_terms, 1)
        for name in ("merge_interval", "merge_clip_warmup", "merge_at_skew_norm", "shard_groups"):
            at_least(f"poet.{name}", getattr(self, name), 0)
        if not 0 < self.merge_clip_scale <= 1:
            raise ValueError(f"poet.merge_clip_scale is {self.merge_clip_scale}; it must lie in (0, 1]")

    def _check_block(self, name: str, value: float | None) -> None:
        if value is None or value == 0:
            return
        if value < 0 or (value > 1 and value != int(value)):
            raise ValueError(f"{name} is {value}; give an integer size of at least 2, a fraction in (0, 1], or 0 to freeze the side")
        if value <= 1 and self.variant == "bs":
            raise ValueError(
                f"{name} is {value}, a fraction, with poet.variant 'bs'; block-stochastic layers take an integer block size such as 256"
            )

    def side_block(self, side: str) -> float:
        """Block size setting of one side, "in" (R) or "out" (P)."""
        own = self.block_size_in if side == "in" else self.block_size_out
        return self.block_size if own is None else own
