"""Exported models are the trained models, and both perplexities are what they say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.indexed import read_indexed
from poet_megatron.checkpoint.hf_tokenizer import USER_DEFINED
from poet_megatron.cli.main import main
from poet_megatron.errors import UserError
from poet_megatron.optim.merge import rotated_matrices
from poet_megatron.train.evaluate_run import evaluate_run
from poet_megatron.train.export_run import export_run
from poet_megatron.train.restore import open_run
from poet_megatron.train.run import pretrain

VARIANTS = {
    "bs": {},
    "fs": {"poet.variant": "fs", "poet.block_size": "0.5", "poet.compute": "weight"},
    "adamw": {"method": "adamw"},
    "bf16": {"train.precision": "bf16"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def finished(request, tiny_data, tmp_path_factory):
    """A run stopped between two merges, so that skews are not zero."""
    from conftest import TINY

    from poet_megatron.config.load import load_config

    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    settings = {**TINY, "data.path": str(tiny_data), "train.run_dir": str(run_dir), "train.steps": "15", **VARIANTS[request.param]}
    pretrain(load_config(None, [f"--{key}={value}" for key, value in settings.items()]))
    return request.param, run_dir


def both_logits(run_dir: Path, in_fp32: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [3, 32, vocabulary] of the same tokens by our model and, through transformers, by its fp32 export.

    Args:
        run_dir: a run.
        in_fp32: compute ours in fp32, with the fp32 masters of a bf16 run's weights in place of the rounded ones.
    """
    tokens = torch.randint(4, 320, (3, 32), generator=torch.Generator().manual_seed(0))
    with open_run(run_dir, None) as (engine, _), torch.no_grad():
        (model,) = engine.chunks
        if in_fp32:
            masters = {matrix: matrix.master for matrix in rotated_matrices([model])}
            model.float()
            for matrix, master in masters.items():
                matrix.load_canonical(matrix.canonical(matrix.weight) if master is None else master)
        ours = model(tokens, torch.arange(32).expand(3, -1), None)[..., : engine.run.model.vocab_size]
    folder = export_run(run_dir, None, None, "fp32")
    assert folder == run_dir / "export"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert ours.shape == theirs.shape == (3, 32, 320)
    return ours.float(), theirs.detach()


def test_exported_logits_equal_ours(finished):
    """Through transformers' LlamaForCausalLM, in fp32; logits are of order 1, so 1e-5 is a hundred roundings of 2^-24."""
    ours, theirs = both_logits(finished[1], in_fp32=True)
    assert (ours - theirs).abs().max() < 1e-5


def test_a_bf16_run_differs_from_its_fp32_export_by_its_rounding(finished):
    """Every rounding is a relative error of 2^-9 / sqrt(3) rms at most, and they add up independently along the way of a token.

    A layer has 22: norm, R, W0, P, attention, R, W0, P, addition; norm, R, W0, P, gate times up, R, W0, P, addition; and the rounding of
    four W0. Embedding, last norm and lm_head make it 47 in two layers: 7.7e-3 of the logits' rms. (The branches of a layer are smaller than
    what they are added to, so the error found is below that: 3.7e-3.)
    """
    variant, run_dir = finished
    if variant != "bf16":
        pytest.skip("computes in fp32")
    ours, theirs = both_logits(run_dir, in_fp32=False)
    assert (ours - theirs).square().mean().sqrt() < 47**0.5 * 2**-9 / 3**0.5 * theirs.square().mean().sqrt()


def with_user_defined_piece(model: Path) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    proto.pieces[-1].type = USER_DEFINED
    return proto.SerializeToString()


def test_weights_alone(finished, tmp_path, capsys):
    """For a tokenizer that cannot be converted: the same weights, nothing of the tokenizer, no special tokens in the configurations."""
    _, run_dir = finished
    broken = tmp_path / "run"
    shutil.copytree(run_dir, broken)
    (broken / "tokenizer.model").write_bytes(b"no model")
    assert main(["export", "--run", str(broken), "--no-tokenizer", "--output", str(tmp_path / "alone")]) == 0, capsys.readouterr().err
    whole = export_run(run_dir, tmp_path / "whole", None, "fp32")
    assert {path.name for path in whole.iterdir()} - {path.name for path in (tmp_path / "alone").iterdir()} == {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["eos_token_id"] is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match="export with --no-tokenizer"):
        (broken / "tokenizer.model").write_bytes(with_user_defined_piece(run_dir / "tokenizer.model"))
        export_run(broken, tmp_path / "not", None, "fp32")


def test_exported_model_generates(finished):
    _, run_dir = finished
    folder = export_run(run_dir, run_dir / "other", None, "bf16")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("The model", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("The model")


def test_perplexities_against_transformers(finished, tiny_data):
    """Both protocols recomputed from the exported model, document by document."""
    variant, run_dir = finished
    if variant == "bf16":
        pytest.skip("the exported fp32 model computes in another precision")
    result = evaluate_run(run_dir, None, None, 0)
    model = AutoModelForCausalLM.from_pretrained(export_run(run_dir, None, None, "fp32"), dtype=torch.float32)
    data = read_indexed(tiny_data / "valid")
    assert result["tokens"] == len(data.tokens)
    assert result["loss"] == pytest.approx(_packed_loss(model, torch.tensor(data.tokens.astype("int64"))), abs=1e-3)
    means = [_document_losses(model, data, first) for first in range(0, len(data), 2)]
    biased = sum(loss for loss, _ in means) / (len(means) + 1)
    assert result["ppl_reference_protocol"] == pytest.approx(math.exp(biased), rel=2e-3)
    assert result["tokens_reference_protocol"] == sum(count for _, count in means)


def _packed_loss(model, tokens: torch.Tensor) -> float:
    """Every token once, windows of 32, the first token after the last (an eos)."""
    inputs, total = torch.cat([tokens[-1:], tokens[:-1]]), 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), 32):
            logits = model(inputs[None, start : start + 32]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, tokens[start : start + 32], reduction="sum").item()
    return total / len(tokens)


def _document_losses(model, data, first: int) -> tuple[float, int]:
    """Mean loss of a batch of two documents, each cut to 32 tokens (its eos kept), and its tokens."""
    total, count = 0.0, 0
    for index in range(first, min(first + 2, len(data))):
        document = torch.tensor(data.document(index).astype("int64"))
        document = document if len(document) <= 32 else torch.cat([document[:31], document[-1:]])
        with torch.no_grad():
            logits = model(document[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum").item()
        count += len(document) - 1
    return total / count, count


def test_evaluation_before_and_after_are_in_the_metrics(finished):
    _, run_dir = finished
    entries = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    ppl = {entry["step"]: entry["eval/ppl"] for entry in entries if "eval/ppl" in entry}
    assert set(ppl) == {0, 15}
    assert ppl[15] < 0.5 * ppl[0]


def test_a_checkpoint_that_lost_its_settings_is_passed_over(finished, tmp_path, caplog):
    """The newest one's config.yaml is gone: the one before it is opened, as training would."""
    _, run_dir = finished
    checkpoints = tmp_path / "checkpoints"
    for step in (14, 15):
        shutil.copytree(run_dir / "checkpoints" / "step-00000015", checkpoints / f"step-{step:08d}")
    (checkpoints / "step-00000015" / "config.yaml").unlink()
    with open_run(tmp_path, None) as (engine, state):
        assert (engine.run.train.steps, state.step) == (15, 15)  # the copy of step 15
        assert torch.initial_seed() == engine.run.train.seed
    assert "step-00000015 is damaged" in caplog.text


def test_clear_errors(tmp_path, finished):
    _, run_dir = finished
    with pytest.raises(UserError, match="does not exist"):
        export_run(tmp_path / "nothing", None, None, "fp32")
    with pytest.raises(UserError, match="no complete checkpoint"):
        evaluate_run(tmp_path, None, None, 0)
    with pytest.raises(UserError, match=r"no checkpoint of step 7 .* it has \[15\]"):
        export_run(run_dir, None, 7, "fp32")
    with pytest.raises(UserError, match="fp8"):
        export_run(run_dir, None, None, "fp8")
