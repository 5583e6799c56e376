"""Pretraining with POET (Reparameterized LLM Training via Orthogonal Equivalence Transformation) on megatron-core."""

__version__ = "0.1.0"
