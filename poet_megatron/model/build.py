"""RunConfig -> megatron-core GPTModel with POET (or dense) linear layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from poet_megatron.config.run import RunConfig
from poet_megatron.layers.parallel import Part, PoetQkvLinear, PoetRowParallelLinear, PoetSpec
from poet_megatron.layers.parallel import PoetColumnParallelLinear as PoetGateUpLinear
from poet_megatron.model.attention import SdpaAttention
from poet_megatron.model.config import ModelConfig
from poet_megatron.model.llama import LlamaModel
from poet_megatron.model.naming import MATRIX_IDS
from poet_megatron.model.norm import RMSNorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(run: RunConfig) -> TransformerConfig:
    """Megatron's TransformerConfig for a run: Llama without biases or dropout, loss as a mean over the global batch's tokens."""
    model, parallel = run.model, run.parallel
    dtype = DTYPES[run.train.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=run.train.precision == "bf16",
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        sequence_parallel=parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if parallel.virtual_stages > 1 else None,
        overlap_p2p_comm=parallel.virtual_stages > 1,
        batch_p2p_comm=parallel.virtual_stages == 1,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        **_RECOMPUTE[parallel.recompute],
    )


def build_chunks(run: RunConfig, config: TransformerConfig) -> list[MegatronModule]:
    """Build this rank's model chunks, one per virtual pipeline stage (see build_model)."""
    stages = run.parallel.virtual_stages
    return [build_model(run, config, stage if stages > 1 else None) for stage in range(stages)]


def build_model(run: RunConfig, config: TransformerConfig, vp_stage: int | None = None) -> MegatronModule:
    """Build a LlamaModel of this rank, uninitialized (see model.init), in the dtype of the run.

    Args:
        run: the run's settings.
        config: Megatron's settings of the model.
        vp_stage: which virtual pipeline stage, from 0; None where stages are not interleaved.

    Raises:
        ValueError: shard groups or block sizes that do not fit the layers.
    """
    count = get_num_layers_to_build(config, vp_stage)
    first = get_transformer_layer_offset(config, vp_stage)
    specs = [_layer_spec(run, first + index) for index in range(count)]
    model = LlamaModel(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
        vocab_size=run.model.padded_vocab_size,
        real_vocab_size=run.model.vocab_size,
        max_sequence_length=run.model.seq_length,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
    )
    _mark_split(model)
    return model.to(config.params_dtype)


def _mark_split(model: MegatronModule) -> None:
    """Mark Megatron's own split weights, as its initialization (which we do not use) would: gradient norms count replicated ones once."""
    split = {tensor_parallel.VocabParallelEmbedding: 0, tensor_parallel.ColumnParallelLinear: 0, tensor_parallel.RowParallelLinear: 1}
    for module in model.modules():
        if (axis := split.get(type(module))) is not None:
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def tokens_per_rank(run: RunConfig, data_parallel: int) -> int:
    """Tokens that one rank sees in one optimizer step."""
    return run.train.global_batch_size * run.model.seq_length // data_parallel


def _layer_spec(run: RunConfig, layer: int) -> ModuleSpec:
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.core_attention = SdpaAttention
    if run.method == "poet":
        sizes = part_sizes(run.model)
        attention.linear_qkv = _poet(run, layer, PoetQkvLinear, {name: sizes[name] for name in ("q", "k", "v")})
        attention.linear_proj = _poet(run, layer, PoetRowParallelLinear, {"o": sizes["o"]})
        mlp.linear_fc1 = _poet(run, layer, PoetGateUpLinear, {name: sizes[name] for name in ("gate", "up")})
        mlp.linear_fc2 = _poet(run, layer, PoetRowParallelLinear, {"down": sizes["down"]})
    return spec


def part_sizes(model: ModelConfig) -> dict[str, int]:
    """Outputs of every linear layer of a transformer layer."""
    keys = model.query_groups * model.head_size
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    return {"q": hidden, "k": keys, "v": keys, "o": hidden, "gate": ffn, "up": ffn, "down": hidden}


def _poet(run: RunConfig, layer: int, module: type, sizes: dict[str, int]) -> ModuleSpec:
    parts = tuple(Part(name, MATRIX_IDS[name], size) for name, size in sizes.items())
    tokens = tokens_per_rank(run, parallel_state.get_data_parallel_world_size())
    return ModuleSpec(module=module, params={"poet": PoetSpec(run.poet, run.train.seed, layer, parts, tokens)})
