"""The Hugging Face folder computes what the canonical weights say, holds exactly them, and never replaces what is not ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from poet_megatron.checkpoint.hf_export import MARKER, export_hf
from poet_megatron.checkpoint.hf_import import iter_hf_weights
from poet_megatron.checkpoint.hf_layout import tensor_specs
from poet_megatron.errors import UserError
from poet_megatron.model.config import ModelConfig

transformers = pytest.importorskip("transformers")

SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 24,
    "vocab_size": 101,
    "rotary_base": 500,
}
MHA = ModelConfig(**SMALL)
GQA = ModelConfig(**SMALL, num_query_groups=2, norm_epsilon=1e-3)


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Canonical weights, large enough that a wrong layout shows; the vocabulary's padding rows are zero, as an import makes them."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for spec in tensor_specs(config):
        tensor = torch.randn(spec.shape, generator=generator)
        tensor = 1 + 0.3 * tensor if len(spec.shape) == 1 else tensor * 2 / math.sqrt(spec.shape[1])
        if spec.canonical in ("embed", "lm_head"):
            tensor[config.vocab_size :] = 0
        weights[spec.canonical] = tensor.to(dtype)
    return weights


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def rotate(x: Tensor, base: float) -> Tensor:
    """Non-interleaved rotary on [heads, tokens, head_size]: pair (j, j + head_size/2) turns by position * base^(-2j/head_size)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def attention(x: Tensor, weights: dict[str, Tensor], layer: str, config: ModelConfig) -> Tensor:
    tokens, size = len(x), config.head_size
    q, k, v = ((x @ weights[layer + name].T).view(tokens, -1, size).transpose(0, 1) for name in "qkv")
    q, k = rotate(q, config.rotary_base), rotate(k, config.rotary_base)
    group = config.num_attention_heads // config.query_groups
    heads = []
    for head in range(config.num_attention_heads):
        scores = q[head] @ k[head // group].T / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[head // group])
    return torch.cat(heads, -1) @ weights[layer + "o"].T


def llama_logits(tokens: Tensor, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """Independent float64 Llama: tokens [n] -> logits [n, padded_vocab]."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = weights["embed"][tokens]
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        x = x + attention(rms_norm(x, weights[layer + "attention_norm"], config.norm_epsilon), weights, layer, config)
        h = rms_norm(x, weights[layer + "mlp_norm"], config.norm_epsilon)
        gate = h @ weights[layer + "gate"].T
        x = x + (gate * gate.sigmoid() * (h @ weights[layer + "up"].T)) @ weights[layer + "down"].T
    return rms_norm(x, weights["final_norm"], config.norm_epsilon) @ weights["lm_head"].T


def load(folder: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert type(model) is transformers.LlamaForCausalLM
    return model.eval()


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 10_000], ids=["single", "sharded"])
def test_logits_equal_an_independent_llama(tmp_path: Path, config: ModelConfig, max_shard_bytes: int) -> None:
    weights = random_weights(config)
    folder = export_hf(weights, config, None, tmp_path / "hf", torch.float32, max_shard_bytes)
    assert (
        (len(list(folder.glob("*.safetensors"))) > 1) == (folder / "model.safetensors.index.json").exists() == (max_shard_bytes == 10_000)
    )
    model = load(folder)
    tokens = torch.randint(config.vocab_size, (20,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = model(tokens[None]).logits[0].double()
    expected = llama_logits(tokens, weights, config)[:, : config.vocab_size]
    assert got.shape == (20, 101)  # padded_vocab_size is 128
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    generated = model.generate(tokens[None, :4], max_new_tokens=5, do_sample=False, attention_mask=torch.ones(1, 4, dtype=torch.long))
    assert generated.shape == (1, 9)
    assert generated.max() < config.vocab_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 5_000])
def test_import_of_export_is_bitwise_the_same(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    weights = random_weights(GQA, dtype)
    shuffled = iter(sorted(weights.items(), key=lambda item: item[0][::-1]))  # an iterator, in no particular order
    folder = export_hf(shuffled, GQA, None, tmp_path / "hf", dtype, max_shard_bytes)
    back = dict(iter_hf_weights(folder, GQA))
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


def test_shards_respect_the_limit_and_the_index_is_complete(tmp_path: Path) -> None:
    limit = 20_000
    folder = export_hf(random_weights(MHA), MHA, None, tmp_path / "hf", torch.float32, limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {spec.hf for spec in tensor_specs(MHA)}
    assert index["metadata"]["total_size"] == sum(4 * math.prod(spec.hf_shape) for spec in tensor_specs(MHA))
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, framework="pt") as opened:
            names = list(opened.keys())
            assert {name for name, where in index["weight_map"].items() if where == file} == set(names)
            assert sum(4 * opened.get_tensor(name).numel() for name in names) <= limit


def test_only_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    import weakref

    previous: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for spec in tensor_specs(MHA):
            assert len([r for r in previous if r() is not None]) <= 1
            tensor = torch.ones(spec.shape)
            previous.append(weakref.ref(tensor))
            yield spec.canonical, tensor
            del tensor

    export_hf(stream(), MHA, None, tmp_path / "hf", torch.float32)
    assert len(previous) == 21


def test_config_says_what_the_model_is(tmp_path: Path) -> None:
    folder = export_hf(random_weights(GQA), GQA, None, tmp_path / "hf", torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.max_position_embeddings, config.num_key_value_heads, config.rms_norm_eps) == (24, 2, 1e-3)
    assert (config.tie_word_embeddings, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (False, None, None, None)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["rope_theta"] == 500 and stored["rope_parameters"]["rope_theta"] == 500
    assert stored["dtype"] == stored["torch_dtype"] == "bfloat16"
    assert load(folder).dtype == torch.bfloat16


def without(weights: dict[str, Tensor], name: str) -> Iterator[tuple[str, Tensor]]:
    return ((key, tensor) for key, tensor in weights.items() if key != name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "layers.1.up"), "layers.1.up did not arrive"),
        (lambda w: [*w.items(), ("layers.0.q", w["layers.0.q"])], "layers.0.q arrived twice"),
        (lambda w: {**w, "layers.0.k": w["layers.0.q"]}, r"layers.0.k has shape \(32, 32\).*\(16, 32\)"),
        (lambda w: {**w, "embed": w["embed"][:101]}, r"embed has shape \(101, 32\).*\(128, 32\)"),
        (lambda w: {**w, "layers.2.q": w["layers.0.q"]}, "layers.2.q is not part"),
        (lambda w: {**w, "final_norm": w["final_norm"] * math.nan}, "final_norm is not finite"),
        (lambda w: {**w, "final_norm": w["final_norm"].long()}, "final_norm has dtype"),
    ],
    ids=["missing", "duplicate", "misshapen", "unpadded", "unknown", "nan", "integer"],
)
def test_wrong_weights_are_refused_by_name_and_leave_nothing(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_hf(change(random_weights(GQA)), GQA, None, tmp_path / "hf", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_overflow_of_fp16_is_an_error_and_bf16_is_not(tmp_path: Path) -> None:
    weights = random_weights(MHA)
    weights["layers.0.up"][0, 0] = 1e5
    with pytest.raises(UserError, match=r"layers\.0\.up is not finite as torch\.float16"):
        export_hf(weights, MHA, None, tmp_path / "hf", torch.float16)
    export_hf(weights, MHA, None, tmp_path / "hf", torch.bfloat16)


def test_an_earlier_export_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    output = tmp_path / "hf"
    first, second = random_weights(MHA), {name: tensor * 2 for name, tensor in random_weights(MHA).items()}
    export_hf(first, MHA, None, output, torch.float32, 10_000)
    with pytest.raises(UserError, match="did not arrive"):
        export_hf(without(second, "lm_head"), MHA, None, output, torch.float32)
    assert torch.equal(dict(iter_hf_weights(output, MHA))["lm_head"], first["lm_head"])
    export_hf(second, MHA, None, output, torch.float32)
    assert torch.equal(dict(iter_hf_weights(output, MHA))["lm_head"], second["lm_head"])
    assert sorted(p.name for p in output.iterdir()) == ["config.json", "generation_config.json", "model.safetensors", MARKER]
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not an earlier export"):
        export_hf(random_weights(MHA), MHA, None, foreign, torch.float32)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    ours = export_hf(random_weights(MHA), MHA, None, tmp_path / "hf", torch.float32)
    (ours / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"notes\.md"):
        export_hf(random_weights(MHA), MHA, None, ours, torch.float32)
    assert (ours / "notes.md").exists() and (ours / MARKER).exists()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        export_hf(random_weights(MHA), MHA, None, file, torch.float32)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (export_hf(random_weights(MHA), MHA, None, empty, torch.float32) / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "num_hidden_layers is 2.*3.*model.num_layers"),
        ({"ffn_hidden_size": 64}, "model.ffn_hidden_size"),
        ({"num_query_groups": None}, "num_key_value_heads is 2.*4.*model.num_query_groups"),
        ({"vocab_size": 100}, "model.vocab_size"),
        ({"rotary_base": 10000}, "rope_theta is 500.*model.rotary_base"),
        ({"norm_epsilon": 1e-6}, "model.norm_epsilon"),
    ],
)
def test_import_names_the_setting_that_differs(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    folder = export_hf(random_weights(GQA), GQA, None, tmp_path / "hf", torch.float32)
    other = ModelConfig(**{**SMALL, "num_query_groups": 2, "norm_epsilon": 1e-3, **changes})
    with pytest.raises(UserError, match=message):
        next(iter_hf_weights(folder, other))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_import_refuses_other_architectures_and_damaged_folders(tmp_path: Path) -> None:
    folder = export_hf(random_weights(MHA), MHA, None, tmp_path / "hf", torch.float32, 10_000)
    next(iter_hf_weights(folder, MHA))
    good = (folder / "config.json").read_text()
    for change, message in (
        ({"model_type": "mistral"}, "mistral"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_type is 'llama3'"),
        ({"head_dim": 16}, "head_dim is 16"),
    ):
        edit_config(folder, **change)
        with pytest.raises(UserError, match=message):
            next(iter_hf_weights(folder, MHA))
        (folder / "config.json").write_text(good)
    sorted(folder.glob("model-00002-of-*.safetensors"))[0].unlink()
    with pytest.raises(UserError, match="is missing"):
        next(iter_hf_weights(folder, MHA))
    with pytest.raises(UserError, match=r"no config\.json"):
        next(iter_hf_weights(tmp_path, MHA))


def test_import_reads_a_model_that_transformers_saved_and_unties_embeddings(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "tied")
    ours = ModelConfig(**{**SMALL, "rotary_base": 10000})
    weights = dict(iter_hf_weights(tmp_path / "tied", ours))
    assert weights["lm_head"].shape == (128, 32) and torch.equal(weights["lm_head"], weights["embed"])
    tokens = torch.arange(15)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0].double()
    torch.testing.assert_close(llama_logits(tokens, weights, ours)[:, :101], expected, atol=1e-4, rtol=0)
