"""What training, checkpoints and reports ask of an engine, whichever library updates the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from poet_megatron.config.run import RunConfig
from poet_megatron.optim.state import MOMENTS, AdamState
from poet_megatron.parallel.context import ParallelContext

Batch = dict[str, Tensor]


class Engine(ABC):
    """The trainable state of this rank.

    Attributes:
        run: the run's settings.
        context: this process's place in the layout.
        config: Megatron's settings of the model.
        chunks: this rank's LlamaModels, one per virtual pipeline stage, not wrapped.
        scheduler: learning rates and weight decay.
    """

    run: RunConfig
    context: ParallelContext
    config: TransformerConfig
    chunks: list[MegatronModule]
    scheduler: OptimizerParamScheduler

    @property
    def micro_batches(self) -> int:
        """Micro-batches per rank and optimizer step."""
        train = self.run.train
        return train.global_batch_size // (train.micro_batch_size * self.context.data_size)

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""

    @property
    @abstractmethod
    def state_group(self) -> ProcessGroup | None:
        """The ranks over which the optimizer state of a parameter is spread; None where every rank has all of its own parameters'."""

    @abstractmethod
    def accumulate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Run the step's micro-batches forward and backward, and reduce the gradients of the mean loss over the global batch's tokens.

        Args:
            batches: this rank's micro-batches.

        Returns:
            [sum of token losses, tokens] of every micro-batch, on the last pipeline stage; elsewhere nothing.
        """

    @abstractmethod
    def gradients(self) -> Iterator[Tensor]:
        """The gradients this rank holds after `accumulate`, in as few tensors as there are, to see whether they are finite."""

    @abstractmethod
    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The same by parameter name, to say which are not."""

    @abstractmethod
    def update(self, clip_grad: float) -> float:
        """Clip the gradients to a global norm (0: do not), update the parameters; returns the norm before clipping."""

    @abstractmethod
    def states(self) -> dict[str, AdamState]:
        """Adam's state of the (parts of) trainable parameters that this rank updates, by parameter name."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of this rank, {"<chunk>.<name>": parameter}."""
        return {
            f"{index}.{name}": parameter
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        }

    def replicated_state(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name, tensor, whether tensor-parallel ranks hold different parts) of optimizer state that is not sharded over replicas."""
        if self.state_group is not None:
            return
        parameters = self.trainable()
        for name, state in self.states().items():
            split = getattr(parameters[name], "tensor_model_parallel", False)
            if state.param is not parameters[name]:
                yield f"master of {name}", state.param, split
            for moment in MOMENTS:
                if moment in state.slots:
                    yield f"{moment} of {name}", state.slots[moment], split
