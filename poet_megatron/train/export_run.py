"""`poet-megatron export`: a run's checkpoint, merged, as a Hugging Face Llama folder."""

from __future__ import annotations

from pathlib import Path

import torch

from data_prep.manifest import TOKENIZER_NAME
from poet_megatron.checkpoint.hf_export import export_hf
from poet_megatron.errors import UserError
from poet_megatron.model.canonical import canonical_slots
from poet_megatron.monitor.run_dir import RunDirectory
from poet_megatron.train.restore import check_one_process, open_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(run: Path, output: Path | None, step: int | None, dtype: str, tokenizer: bool = True) -> Path:
    """Export a checkpoint; R and P are folded into the weights, so the model runs like any dense Llama.

    Args:
        run: run directory.
        output: folder to write; <run>/export by default.
        step: which checkpoint; the newest intact one by default.
        dtype: "fp32", "bf16" or "fp16".
        tokenizer: whether to convert the tokenizer as well; without, the configuration names no special tokens either.

    Returns:
        The folder.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    check_one_process("export")
    with open_run(run, step) as (engine, _):
        settings = engine.run
        tensors = ((slot.name, slot.read()) for slot in canonical_slots(engine.chunks[0], settings.model))
        model = run / TOKENIZER_NAME if tokenizer else None
        return export_hf(tensors, settings.model, model, output or RunDirectory(run).export_path, DTYPES[dtype])
