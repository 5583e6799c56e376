"""What conversions of tokenizers of all kinds share: texts on which they are checked, and the special ids that they return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poet_megatron.errors import UserError
from poet_megatron.model.config import ModelConfig

PROBES = (
    "Hello world.",
    " one leading space",
    "   three, and two trailing  ",
    "a  b   c",
    "line\nbreak\n\nparagraph\ttab\r\n",
    "<s></s><unk><pad> <0x0A>x<0xE2>",
    "na\u00efve caf\u00e9 \u4e2d\u6587 \u0440\u0443\u0441 \u0639\u0631\u0628\u064a",
    "\U0001f600\U0001f469\u200d\U0001f4bb \ufe0f \u00a0\u3000\u200b",
    "the quick (brown) fox; 3.14 * 2,000 = $6,280 -- isn't it?",
    "aaaaaaa abababab \u2581\u2581",
)
"""Texts on which a converted tokenizer must give the ids of the original."""


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; None where the tokenizer has none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None


def check_vocabulary(model: Path, tokens: int, config: ModelConfig) -> None:
    """A model has an embedding for each token of its tokenizer, or its tokenizer is the wrong one."""
    if tokens > config.vocab_size:
        raise UserError(
            f"tokenizer {model} has {tokens} tokens, more than model.vocab_size = {config.vocab_size}; give the one that prepared the data"
        )
