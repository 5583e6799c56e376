"""Writes the tensors of a checkpoint from the processes that hold them, data-parallel replicas sharing the work.

Megatron's own writer hands the tensors to forked children and collects their answers through a manager process. A signal to the process
group (a batch system's SIGTERM, Ctrl-C) ends the manager, and a child that is killed leaves its parent waiting for ever; torch's
writer, used here, writes from the process itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import _replace_state_dict_keys_with_sharded_keys, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

BACKEND, VERSION = "torch_dist", 1


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
    """The torch_dist format of megatron-core, without helper processes."""

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Only tensors are written: loading any other object would unpickle it."""
        return False

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write the main replicas that this rank holds. Collective; an error on one rank is raised on all."""
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(tensors),
            storage_writer=OneThreadWriter(checkpoint_dir),
            planner=torch_checkpoint.DefaultSavePlanner(flatten_state_dict=False),
        )


def split(state: dict[str, Any]) -> tuple[ShardedStateDict, dict[str, Any]]:
    """(tensors, everything else) of the state of a run. Collective: what ranks hold of the tensors is checked for gaps and overlaps."""
    return save_preprocess(state)


def write_common(common: dict[str, Any], folder: Path) -> None:
    """Write what is no tensor, and what reading needs to know; on one rank. With `write_tensors` this is dist_checkpointing.save, taken
    apart: there, an error of the rank that writes the common part would leave the others waiting for it."""
    torch.save(common, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig(BACKEND, VERSION), str(folder))


def write_tensors(tensors: ShardedStateDict, folder: Path) -> None:
    """Write the tensors: each rank a fair share of what data-parallel replicas have in common, and all of what it alone has. Collective."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    FullyParallelSaveStrategyWrapper(InProcessSave(), group).save(tensors, folder)
