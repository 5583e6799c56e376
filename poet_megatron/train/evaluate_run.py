"""`poet-megatron evaluate`: perplexity of a run's checkpoint on validation data."""

from __future__ import annotations

from pathlib import Path

from poet_megatron.data.eval_data import packed_eval_batches, reference_protocol_batches
from poet_megatron.data.prepared import PreparedData
from poet_megatron.train.evaluate import evaluate
from poet_megatron.train.restore import open_run


def evaluate_run(run: Path, step: int | None, data: Path | None, tokens: int) -> dict[str, float]:
    """Evaluate a checkpoint by both protocols.

    Args:
        run: run directory.
        step: which checkpoint; the newest intact one by default.
        data: prepared data whose validation part is used; the run's own by default.
        tokens: validation tokens at most; 0 uses them all.

    Returns:
        step, loss, ppl, tokens (token-weighted over packed sequences), and ppl_reference_protocol, loss_reference_protocol,
        tokens_reference_protocol (one padded sequence per document; see train.evaluate).
    """
    with open_run(run, step) as (engine, state):
        settings, context = engine.run, engine.context
        prepared = PreparedData.open(data or settings.data.path, settings.model.vocab_size, settings.model.seq_length)
        batch = settings.train.eval_batch_size or settings.train.micro_batch_size
        place = (settings.model.seq_length, batch, context.data_rank, context.data_size, tokens, context.device)
        packed = evaluate(engine, packed_eval_batches(prepared.valid_prefix, *place))
        reference = evaluate(engine, reference_protocol_batches(prepared.valid_prefix, *place))
    return {
        "step": state.step,
        "loss": packed.loss,
        "ppl": packed.ppl,
        "tokens": packed.tokens,
        "ppl_reference_protocol": reference.ppl_reference_protocol,
        "loss_reference_protocol": reference.batch_mean_loss,
        "tokens_reference_protocol": reference.tokens,
    }
