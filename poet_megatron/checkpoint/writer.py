"""Writes the tensors of a checkpoint from the processes that hold them, data-parallel replicas sharing the work.

Megatron's own writer hands the tensors to forked children and collects their answers through a manager process. A signal to the process
group (a batch system's SIGTERM, Ctrl-C) ends the manager, and a child that is killed leaves its parent waiting for ever; torch's
writer, used here, writes from threads of the process itself.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import _replace_state_dict_keys_with_sharded_keys, mcore_to_pyt_state_dict

THREADS = 2  # and files, per rank


class InProcessSave(SaveShardedStrategy):
    """The torch_dist format of megatron-core, without helper processes."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Only tensors are written: loading any other object would unpickle it."""
        return False

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write the main replicas that this rank holds. Collective."""
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(tensors),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=THREADS),
            planner=torch_checkpoint.DefaultSavePlanner(flatten_state_dict=False),
        )


def save_strategy() -> SaveShardedStrategy:
    """Every rank writes a fair share of what data-parallel replicas have in common, and all of what it alone has."""
    return FullyParallelSaveStrategyWrapper(InProcessSave(), parallel_state.get_data_parallel_group(with_context_parallel=True))
