"""Every recipe loads, and the published ones hold what Tables 7 to 9 of the paper print."""

from __future__ import annotations

from pathlib import Path

import pytest

from poet_megatron.config.load import load_config

CONFIGS = Path(__file__).parents[3] / "configs"

# Table 7: hidden dimension, attention heads, hidden layers, intermediate dimension as printed (POET-BS);
# then those of POET-FS and of AdamW, which follow from Table 2's counts.
TABLE_7 = {
    "60m": (512, 8, 8, 1280, 1376, 1376),
    "130m": (768, 12, 12, 2048, 2048, 2048),
    "350m": (1024, 16, 24, 2816, 2736, 2736),
    "1b3": (2048, 32, 24, 5376, 5464, 5461),
}

# Tables 8 and 9: model, spec, GPUs, lr (base), lr (POET), training steps, batch size, gradient accumulation.
TABLES_8_9 = """
60m   fs2    1  1e-2  1e-3  300,000  256  2
60m   fs4    1  1e-2  2e-3  300,000  256  2
60m   fs8    1  1e-2  4e-3  300,000  256  2
130m  fs2    1  5e-3  1e-3  400,000  128  2
130m  fs4    1  5e-3  2e-3  400,000  128  2
130m  fs8    1  5e-3  4e-3  400,000  128  2
350m  fs2    4  5e-3  1e-3  400,000  128  1
350m  fs4    4  5e-3  2e-3  400,000  128  1
350m  fs8    4  5e-3  4e-3  400,000  128  1
1b3   fs2    8  1e-3  1e-3  500,000   64  1
1b3   fs4    8  1e-3  2e-3  500,000   64  1
1b3   fs8    8  1e-3  4e-3  500,000   64  1
60m   bs256  1  1e-2  1e-3  300,000  256  2
60m   bs128  1  1e-2  2e-3  300,000  256  2
60m   bs64   1  1e-2  4e-3  300,000  256  2
130m  bs256  1  5e-3  1e-3  400,000  256  2
130m  bs128  1  5e-3  2e-3  400,000  256  2
130m  bs64   1  5e-3  4e-3  400,000  256  2
350m  bs256  4  5e-3  1e-3  400,000  128  1
350m  bs128  4  5e-3  2e-3  400,000  128  1
350m  bs64   4  5e-3  4e-3  400,000  128  1
1b3   bs256  8  1e-3  1e-3  500,000   64  1
1b3   bs128  8  1e-3  2e-3  500,000   64  1
1b3   bs64   8  1e-3  4e-3  500,000   64  1
"""
ROWS = [line.split() for line in TABLES_8_9.strip().splitlines()]
BLOCKS = {"fs2": 1 / 2, "fs4": 1 / 4, "fs8": 1 / 8, "bs256": 256, "bs128": 128, "bs64": 64}
ALL = sorted(CONFIGS.rglob("*.yaml"))


def test_recipes_are_there():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    paper = {f"llama_{size}_poet_{spec}" for size, spec, *_ in ROWS} | {f"llama_{size}_adamw" for size in TABLE_7}
    small = {f"llama_5m_{method}" for method in ("adamw", "poet_bs64", "poet_bs128", "poet_fs2")}
    assert len(paper) == 28 and names >= paper | small | {"demo"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_loads(path):
    load_config(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_has_its_own_run_dir(path):
    config = load_config(path)
    assert config.train.run_dir == f"runs/{path.stem}"
    assert config.data.path


def check_architecture(model, size, ffn_column):
    hidden, heads, layers, *ffn = TABLE_7[size]
    assert (model.hidden_size, model.num_attention_heads, model.num_layers) == (hidden, heads, layers)
    assert model.ffn_hidden_size == ffn[ffn_column]
    assert (model.seq_length, model.vocab_size, model.query_groups) == (256, 32000, heads)


def check_shared(config):
    optim = config.optim
    assert (optim.weight_decay, optim.poet_weight_decay, optim.clip_grad) == (0.01, 0.01, 0.1)
    assert (optim.schedule, optim.min_lr_ratio, optim.warmup_steps) == ("cosine", 0.01, 0)
    assert (config.train.precision, config.data.path) == ("bf16", "data/c4-t5")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_poet_recipe_is_the_published_row(row):
    size, spec, gpus, lr, poet_lr, steps, batch, accumulation = row
    config = load_config(CONFIGS / f"llama_{size}_poet_{spec}.yaml")
    check_architecture(config.model, size, 0 if spec.startswith("bs") else 1)
    check_shared(config)
    assert (config.method, config.poet.variant, config.poet.block_size) == ("poet", spec[:2], BLOCKS[spec])
    assert (config.optim.lr, config.optim.poet_lr) == (float(lr), float(poet_lr))
    assert config.train.steps == int(steps.replace(",", ""))
    assert config.train.micro_batch_size == int(batch)
    assert config.train.global_batch_size == int(batch) * int(accumulation) * int(gpus)
    poet = config.poet
    assert (poet.orthogonal_map, poet.neumann_terms, poet.merge_interval, config.model.init) == ("cayley-neumann", 4, 400, "normalized")


@pytest.mark.parametrize("size", TABLE_7)
def test_adamw_recipe_matches_poet_bs_in_steps_and_batch(size):
    config = load_config(CONFIGS / f"llama_{size}_adamw.yaml")
    check_architecture(config.model, size, 2)
    check_shared(config)
    _, _, gpus, lr, _, steps, batch, accumulation = next(row for row in ROWS if row[:2] == [size, "bs256"])
    assert (config.method, config.optim.lr, config.train.steps) == ("adamw", float(lr), int(steps.replace(",", "")))
    assert (config.train.micro_batch_size, config.train.global_batch_size) == (int(batch), int(batch) * int(accumulation) * int(gpus))


@pytest.mark.parametrize("method", ["adamw", "poet_bs64", "poet_bs128", "poet_fs2"])
def test_small_recipes_have_about_four_million_parameters(method):
    model = load_config(CONFIGS / f"llama_5m_{method}.yaml").model
    linear = model.num_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.ffn_hidden_size)
    assert linear + 2 * model.padded_vocab_size * model.hidden_size == pytest.approx(4.2e6, rel=0.01)


def test_small_recipes_differ_only_in_method():
    models = {load_config(CONFIGS / f"llama_5m_{method}.yaml").train.global_batch_size for method in ("adamw", "poet_bs64", "poet_fs2")}
    steps = {load_config(CONFIGS / f"llama_5m_{method}.yaml").train.steps for method in ("adamw", "poet_bs64", "poet_fs2")}
    assert len(models) == len(steps) == 1
