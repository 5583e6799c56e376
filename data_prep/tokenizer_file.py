"""The file of a tokenizer, and what a folder of prepared data keeps of it under the name tokenizer.model.

A SentencePiece model is kept as it is. A tokenizer.json does not say which of its tokens ends a document, and neither it nor a .tiktoken
file can be told from a model once it is called tokenizer.model: of these a *packed* file is kept, JSON with the file's content, the special
ids that the data was made with and the tokenizer_config.json that lay beside it. It can be given to `--tokenizer` like any other.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from poet_megatron.errors import UserError

SENTENCEPIECE, HUGGING_FACE, TIKTOKEN = "sentencepiece", "tokenizer.json", "tiktoken"
KINDS = (SENTENCEPIECE, HUGGING_FACE, TIKTOKEN)
PACKED = "poet_megatron tokenizer"
FORMAT = 1
CONFIG_NAME = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer as somebody made it."""

    kind: str
    content: bytes
    """Of the file itself, also if it was read from a packed one."""
    eos_id: int = -1
    """Known of packed ones only, like the next two."""
    bos_id: int = -1
    packed: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    """Content of tokenizer_config.json, empty if there is none."""

    @property
    def sha256(self) -> str:
        """Hash of the file itself, by which a plan knows its tokenizer."""
        return hashlib.sha256(self.content).hexdigest()

    def ranks(self, path: Path) -> dict[bytes, int]:
        """Tokens and ranks of a .tiktoken file: each line is a token in base64 and its rank."""
        try:
            pairs = (line.split() for line in self.content.splitlines() if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError as error:
            raise UserError(f"{path} is not a file of tiktoken ranks ({error}): each line is a token in base64 and its rank") from error
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise UserError(f"{path} has no rank for byte {missing[0]} ({len(ranks)} tokens): a whole file has one for each of the 256")
        if len(set(ranks.values())) < len(ranks):
            raise UserError(f"{path} gives one rank to two tokens: fetch the file again")
        return ranks

    def kept(self, eos_id: int, bos_id: int) -> bytes:
        """What a folder of data made with these special ids keeps."""
        if self.kind == SENTENCEPIECE:
            return self.content
        found = asdict(self) | {"format": FORMAT, "content": self.content.decode("utf-8"), "eos_id": eos_id, "bos_id": bos_id}
        del found["packed"]
        return (json.dumps({"packed": PACKED} | found) + "\n").encode()


def read_tokenizer(path: Path) -> TokenizerFile:
    """Read a tokenizer of any kind: by the ending, or by the content if it is a packed one."""
    content = read_content(path)
    if content.startswith(b"{") and f'"{PACKED}"'.encode() in content[:100]:
        return _unpack(path, content)
    if path.suffix == ".json":
        return TokenizerFile(kind=HUGGING_FACE, content=content, config=_config_beside(path))
    return TokenizerFile(kind=TIKTOKEN if path.suffix == ".tiktoken" else SENTENCEPIECE, content=content)


def read_content(path: Path) -> bytes:
    """Content of a tokenizer's file, which must be there and not empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read ({error.strerror}): check --tokenizer") from error
    if not content:
        raise UserError(f"tokenizer {path} is empty (0 bytes): copy it again")
    return content


def _unpack(path: Path, content: bytes) -> TokenizerFile:
    try:
        found = json.loads(content)
        if found.pop("format") > FORMAT:
            raise UserError(f"{path} was packed by a later release: upgrade poet-megatron")
        found["content"] = found["content"].encode("utf-8")
        del found["packed"]
        packed = TokenizerFile(**found, packed=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r}): merge the parts again, or give the tokenizer's own file") from error
    if packed.kind not in KINDS:
        raise UserError(f"{path} holds a tokenizer of kind {packed.kind!r}; this release knows {', '.join(KINDS)}: upgrade poet-megatron")
    return packed


def _config_beside(path: Path) -> dict[str, Any]:
    beside = path.with_name(CONFIG_NAME)
    if not beside.exists():
        return {}
    try:
        config = json.loads(read_content(beside))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{beside} is not JSON ({error}): correct it or move it away") from error
    if not isinstance(config, dict):
        raise UserError(f"{beside} is not a JSON object: correct it or move it away")
    return config
