"""Settings of the Llama architecture and of its initialization."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least, divides, one_of

INITS = ("normalized", "standard", "xavier", "uniform-spectrum")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama decoder: RMSNorm, rotary positions, SwiGLU, no biases, untied embeddings (POET, Table 7)."""

    num_layers: int = 8
    """Transformer layers."""
    hidden_size: int = 512
    """Width of the residual stream."""
    ffn_hidden_size: int = 1280
    """Width of the feed-forward layer (gate and up)."""
    num_attention_heads: int = 8
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads; None means one per query head."""
    seq_length: int = 256
    """Tokens per training sequence."""
    vocab_size: int = 32000
    """Tokens of the tokenizer; must equal the vocabulary of the prepared data (T5's has 32,000)."""
    vocab_divisible_by: int = 128
    """The embedding is padded to a multiple of this; the padding is stripped on export."""
    norm_epsilon: float = 1e-6
    """Epsilon of RMSNorm."""
    rotary_base: int = 10000
    """Base of the rotary position embedding."""
    init: str = "normalized"
    """Linear layers: normalized (unit-norm Gaussian neurons), standard (N(0, init_std)), xavier, uniform-spectrum (singular values 1)."""
    init_std: float = 0.02
    """Standard deviation of the standard initialization, of the embedding and of lm_head."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length", "vocab_divisible_by"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.vocab_size", self.vocab_size, 2)
        one_of("model.init", self.init, INITS)
        divides("model.num_attention_heads", self.num_attention_heads, "model.hidden_size", self.hidden_size)
        divides("model.num_query_groups", self.query_groups, "model.num_attention_heads", self.num_attention_heads)
        if self.head_size % 2:
            raise ValueError(f"model.hidden_size / model.num_attention_heads is {self.head_size}; rotary positions need an even head size")

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_divisible_by."""
        return -(-self.vocab_size // self.vocab_divisible_by) * self.vocab_divisible_by
