"""Writes the tensors of a checkpoint from the processes that hold them, data-parallel replicas sharing the work.

Megatron's own writer hands the tensors to forked children and collects their answers through a manager process. A signal to the process
group (a batch system's SIGTERM, Ctrl-C) ends the manager, and a child that is killed leaves its parent waiting for ever; torch's
writer, used here, writes from the process itself.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import _replace_state_dict_keys_with_sharded_keys, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class OneThreadWriter(torch_checkpoint.FileSystemWriter):
    """torch's writer with one thread and file per rank.

    torch loses what goes wrong in any thread but the first (a full disk, for example) and writes an index without those tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write; an error of the operating system is raised as such, not as what torch makes of it while it closes the file."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise first_cause(error) from error


def first_cause(error: BaseException) -> BaseException:
    """The error of the operating system that another one began with, or the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


class InProcessSave(SaveShardedStrategy):
    """The torch_dist format of megatron-core, without helper processes; afterwards the file `reserve` is deleted, for what follows."""

    def __init__(self, reserve: Path) -> None:
        super().__init__("torch_dist", 1)
        self.reserve = reserve

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Only tensors are written: loading any other object would unpickle it."""
        return False

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write the main replicas that this rank holds. Collective."""
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(tensors),
            storage_writer=OneThreadWriter(checkpoint_dir),
            planner=torch_checkpoint.DefaultSavePlanner(flatten_state_dict=False),
        )
        if dist.get_rank() == 0:
            self.reserve.unlink()


def save_strategy(reserve: Path) -> SaveShardedStrategy:
    """Every rank writes a fair share of what data-parallel replicas have in common, and all of what it alone has."""
    return FullyParallelSaveStrategyWrapper(InProcessSave(reserve), parallel_state.get_data_parallel_group(with_context_parallel=True))
