"""Refuses checkpoint indexes whose pickle names anything but what torch.distributed.checkpoint writes, before torch loads them.

A torch distributed checkpoint keeps its index, `.metadata`, as a pickle that torch loads without restriction. It is read here first, by
an unpickler that knows no other globals than the data classes of such an index. All other files are read by torch.load(weights_only=True).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from poet_megatron.errors import UserError

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    f"{_CHECKPOINT}.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles data classes of a checkpoint index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve an allowed global; anything else is refused without being imported."""
        if name not in _ALLOWED.get(module, ()):
            raise UserError(f"{module}.{name}")
        return super().find_class(module, name)


def check_metadata(path: Path) -> None:
    """Raise UserError if the pickle at `path` names a global that a checkpoint index has no use for; none of its code is run.

    Args:
        path: the `.metadata` file of a torch distributed checkpoint.
    """
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{path} names {error}, which no checkpoint index needs: the file is not trustworthy and was not loaded") from None
    except Exception as error:  # a broken pickle fails in as many ways as there are opcodes
        raise UserError(f"{path} is not a checkpoint index ({type(error).__name__}: {error})") from error
    entries = index.state_dict_metadata.values() if isinstance(index, Metadata) else [index]
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
        raise UserError(f"{path} lists something else than tensors: torch would unpickle it without restriction, so it was not loaded")
