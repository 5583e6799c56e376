"""Training sequences by the protocol of published tables: each document is one sequence, truncated or padded."""

from __future__ import annotations

import hashlib

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from poet_megatron.data.batch import Batch, padded
from poet_megatron.data.order import ORDER_VERSION, epoch_order
from poet_megatron.data.prepared import PreparedData
from poet_megatron.errors import UserError


class DocumentSequences:
    """`samples` sequences: every document once per epoch, each epoch in an order of its own; the last epoch may be cut short.

    A longer document loses its end but keeps its end-of-sequence token, as in `eval_data.reference_protocol_batches`. Both files are memory
    maps; nothing is built or cached.
    """

    def __init__(self, data: PreparedData, *, seq_length: int, samples: int, seed: int):
        self.num_samples, self.seq_length, self.seed = samples, seq_length, seed
        split = data.manifest.splits["train"]
        if not split.documents:
            raise UserError(f"{data.train_prefix}.bin has no documents: prepare more text")
        self._content, self._tokens = split.bin_sha256, IndexedDataset(str(data.train_prefix), mmap=True)
        self.documents = len(self._tokens)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Batch:
        """Sequence `index` of the run; epochs follow each other."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sequence {index} is not in 0..{self.num_samples - 1}")
        document = self._document(self.document_at(index))
        return padded(document[:-1], document[1:], self.seq_length)

    def document_at(self, index: int) -> int:
        """Number of the document that is sequence `index`."""
        epoch, place = divmod(int(index), self.documents)
        return epoch_order(self.seed, epoch, self.documents)[place]

    @property
    def fingerprint(self) -> str:
        """A short hash of everything the order depends on; the number of samples is not part of it."""
        facts = ("documents", ORDER_VERSION, self._content, self.documents, self.seq_length, self.seed)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _document(self, number: int) -> np.ndarray:
        """A document's tokens, at most seq_length of them, the last one being its last."""
        length = int(self._tokens.sequence_lengths[number])
        if length <= self.seq_length:
            return self._tokens.get(number)
        return np.concatenate([self._tokens.get(number, 0, self.seq_length - 1), self._tokens.get(number, length - 1, 1)])
