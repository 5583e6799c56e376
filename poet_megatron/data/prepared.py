"""A folder written by `poet-megatron prepare`, opened and checked against the model that is to be trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.files import sha256_of
from data_prep.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, damage
from poet_megatron.errors import UserError


@dataclass(frozen=True)
class PreparedData:
    """Complete prepared data that fits the model."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, vocab_size: int, seq_length: int) -> PreparedData:
        """Open `path`; what training would stumble over later is a UserError here."""
        if not str(path):
            raise UserError("data.path is empty: set it to a folder made with poet-megatron prepare --output DIR")
        folder = Path(path).resolve()
        manifest = Manifest.load(folder)
        if reason := damage(folder, manifest):
            raise UserError(f"data in {folder} is incomplete ({reason}): run poet-megatron prepare --output {folder} again")
        _check_tokenizer(folder, manifest, vocab_size)
        tokens = manifest.splits["train"].tokens
        if tokens < seq_length + 1:
            raise UserError(
                f"{folder / 'train.bin'} has {tokens} tokens; a sequence of model.seq_length {seq_length} takes {seq_length + 1}: "
                "prepare more text or lower model.seq_length"
            )
        return cls(folder, manifest)

    @property
    def train_prefix(self) -> Path:
        """Training data without its ending (.bin, .idx)."""
        return self.path / "train"

    @property
    def valid_prefix(self) -> Path:
        """Validation data without its ending (.bin, .idx)."""
        return self.path / "valid"

    @property
    def tokenizer_path(self) -> Path:
        """The SentencePiece model that made the tokens."""
        return self.path / TOKENIZER_NAME

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """The token at the end of each document."""
        return self.manifest.eos_id

    @property
    def train_tokens(self) -> int:
        """Training tokens of one epoch."""
        return self.manifest.splits["train"].tokens

    @property
    def valid_tokens(self) -> int:
        """Validation tokens."""
        return self.manifest.splits["valid"].tokens


def _check_tokenizer(folder: Path, manifest: Manifest, vocab_size: int) -> None:
    """The model's vocabulary, tokenizer.model and the tokens of train.bin must belong together."""
    tokenizer = folder / TOKENIZER_NAME
    if sha256_of(tokenizer) != manifest.tokenizer_sha256:
        raise UserError(
            f"wrong tokenizer for the data: {tokenizer} is not the one that made {folder / 'train.bin'} "
            f"(sha256 {sha256_of(tokenizer)[:12]}, {MANIFEST_NAME} says {manifest.tokenizer_sha256[:12]}): "
            f"put the right file back, or prepare the data again with --tokenizer and --force"
        )
    if vocab_size != manifest.vocab_size:
        raise UserError(
            f"wrong tokenizer for the data: model.vocab_size is {vocab_size}, but {folder / 'train.bin'} was made with "
            f"{tokenizer}, which has {manifest.vocab_size} tokens: set model.vocab_size to {manifest.vocab_size}, "
            f"or prepare the data with a tokenizer of {vocab_size} tokens"
        )
