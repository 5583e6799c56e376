"""load_config: precedence, base files, errors, and writing configurations back."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from poet_megatron.config.load import config_hash, describe_fields, diff_configs, load_config, to_yaml
from poet_megatron.config.run import RunConfig
from poet_megatron.data.config import DataConfig
from poet_megatron.optim.config import OptimConfig


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def fails(path, overrides=()):
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_without_file_or_overrides():
    assert load_config(None, []) == RunConfig()


def test_command_line_beats_file_beats_defaults(recipe):
    path = recipe("train: {steps: 7, seed: 8}\nmethod: adamw\n")
    config = load_config(path, ["--train.steps", "9", "--optim.lr=0.25"])
    assert (config.train.steps, config.train.seed, config.method) == (9, 8, "adamw")
    assert (config.optim.lr, config.train.global_batch_size) == (0.25, RunConfig().train.global_batch_size)


def test_repeated_override_last_wins_and_value_may_contain_equals():
    config = load_config(None, ["--train.run_dir=a=b", "--train.steps=1", "--train.steps", "2"])
    assert (config.train.run_dir, config.train.steps) == ("a=b", 2)


def test_base_is_relative_to_its_file_and_weaker(recipe):
    recipe("train: {steps: 1, seed: 1}\nmonitor: {log_interval: 1}\n", "base/deep/root.yaml")
    recipe("base: deep/root.yaml\ntrain: {seed: 2, steps: 2}\n", "base/middle.yaml")
    config = load_config(recipe("base: base/middle.yaml\ntrain: {steps: 3}\n"))
    assert (config.train.steps, config.train.seed, config.monitor.log_interval) == (3, 2, 1)


def test_base_cycle_names_every_file(recipe):
    recipe("base: recipe.yaml\n", "other.yaml")
    message = fails(recipe("base: ./other.yaml\n"))
    assert "circle" in message and message.count("recipe.yaml") == 2 and "other.yaml" in message


@pytest.mark.parametrize("base", ["3", "[a.yaml, b.yaml]", "''"])
def test_base_must_be_one_path(recipe, base):
    assert "expected the path of one YAML file" in fails(recipe(f"base: {base}\n"))


def test_missing_base_names_its_user(recipe):
    path = recipe("base: gone.yaml\n")
    message = fails(path)
    assert "gone.yaml" in message and f"base of {path}" in message


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("train: {stpes: 3}", "train.stpes", "train.steps"),
        ("trian: {steps: 3}", "trian.steps", "train.steps"),
        ("poet: {lr: 3}", "poet.lr", "optim.lr"),
        ("steps: 3", "steps", "train.steps"),
        ("trian:", "trian", "train"),
    ],
)
def test_unknown_key_in_file(recipe, text, key, near):
    path = recipe(text)
    assert fails(path) == f"{path}: unknown key {key}; did you mean {near}?"


@pytest.mark.parametrize(("word", "near"), [("--optim.poet_lrr", "optim.poet_lr"), ("--train.micro-batch-size", "train.micro_batch_size")])
def test_unknown_key_on_command_line(recipe, word, near):
    message = fails(recipe("train: {steps: 3}"), [word, "3"])
    assert message == f"command line: unknown key {word[2:]}; did you mean {near}?"


def test_unlike_anything_points_to_help():
    assert "--help" in fails(None, ["--zzzzzzz", "1"])


@pytest.mark.parametrize("words", [["--train.steps"], ["--train.steps", "--optim.lr", "1"]])
def test_override_without_value(words):
    assert "--train.steps needs a value" in fails(None, words)


def test_stray_word_suggests_config():
    assert "--config my.yaml" in fails(None, ["my.yaml"])


BAD_TYPES = [
    ("train.steps", "1.0", "an integer"),
    ("train.steps", "true", "an integer"),
    ("train.steps", "many", "an integer"),
    ("train.steps", "null", "an integer"),
    ("optim.lr", "true", "a number"),
    ("optim.lr", "fast", "a number"),
    ("optim.lr", ".nan", "a number"),
    ("optim.lr", "1e999", "a number"),
    ("parallel.sequence_parallel", "1", "true or false"),
    ("parallel.sequence_parallel", "yes", "true or false"),
    ("poet.block_size_in", "true", "a number or null"),
    ("model.num_query_groups", "2.0", "an integer or null"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD_TYPES)
def test_bad_type(recipe, key, value, expected):
    section, name = key.split(".")
    path = recipe(f"{section}: {{{name}: {value}}}")
    for message, source in ((fails(path), str(path)), (fails(None, [f"--{key}", value]), "command line")):
        assert message.startswith(f"{source}: {key} is ") and f"expected {expected}" in message


@pytest.mark.parametrize("value", ["3", "true", "null", "[a]", "{a: b}"])
def test_text_setting_in_a_file_must_be_text(recipe, value):
    assert "data.path" in fails(recipe(f"data: {{path: {value}}}"))


def test_quoted_integer_is_text(recipe):
    assert "'100'" in fails(recipe("train: {steps: '100'}"))


def test_text_on_the_command_line_is_literal():
    config = load_config(None, ["--data.path", "123", "--train.run_dir", "true", "--poet.merge_polish", "off"])
    assert (config.data.path, config.train.run_dir, config.poet.merge_polish) == ("123", "true", "off")


@pytest.mark.parametrize(("text", "value"), [("256", 256), ("2_56", 256), ("0", 0)])
def test_integer_block_size_stays_an_integer(recipe, text, value):
    for config in (load_config(recipe(f"poet: {{block_size: {text}}}")), load_config(None, ["--poet.block_size", text])):
        assert config.poet.block_size == value and type(config.poet.block_size) is int


def test_fractional_block_size_stays_a_float(recipe):
    config = load_config(recipe("poet: {variant: fs, block_size: 0.5}"))
    assert config.poet.block_size == 0.5 and type(config.poet.block_size) is float


@pytest.mark.parametrize("text", ["1e-3", "'1e-3'", "1E-3", "+.1e-2", "0.001"])
def test_scientific_notation(recipe, text):
    assert load_config(recipe(f"optim: {{lr: {text}}}")).optim.lr == 1e-3


@pytest.mark.parametrize("text", ["null", "none", "None", "~"])
def test_null(recipe, text):
    on_file = recipe("model: {num_query_groups: 4}\npoet: {block_size_in: 64}")
    config = load_config(on_file, ["--model.num_query_groups", text, f"--poet.block_size_in={text}"])
    assert config.model.num_query_groups is None and config.poet.block_size_in is None
    assert load_config(recipe(f"poet: {{block_size_in: {text}}}")).poet.block_size_in is None


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True)])
def test_boolean(recipe, text, value):
    for config in (
        load_config(recipe(f"poet: {{master_weights: {text}}}")),
        load_config(None, ["--poet.master_weights", text]),
    ):
        assert config.poet.master_weights is value


def test_off_is_text_in_a_file(recipe):
    assert load_config(recipe("poet: {merge_polish: off}")).poet.merge_polish == "off"


def test_impossible_value_names_file_and_who_set_it(recipe):
    path = recipe("train: {micro_batch_size: 7}")
    assert fails(path).startswith(f"{path}: train.micro_batch_size is 7")
    message = fails(path, ["--train.global_batch_size", "12"])
    assert "global_batch_size = 12" in message and "train.global_batch_size was set by command line" in message
    base = recipe("train: {micro_batch_size: 7}", "base.yaml")
    assert f"train.micro_batch_size was set by {base}" in fails(recipe("base: base.yaml\n"))


def test_newer_version_wins_over_its_unknown_keys(recipe):
    path = recipe("shiny: 1\nversion: 99\n")
    message = fails(path)
    assert message.startswith(f"{path}: version is 99") and "upgrade" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [", "not valid YAML"),
        ("train: {steps: 1}\ntrain: {seed: 1}", "train is set twice (line 2, column 1)"),
        ("train: {steps: 1}\ntrain.steps: 2", "train.steps is set twice"),
        ("- 1", "expected settings"),
        ("hello", "expected settings"),
        ("train: 5", "train is a section"),
        ("train: false", "train is a section"),
    ],
)
def test_malformed_file(recipe, text, expected):
    path = recipe(text)
    message = fails(path)
    assert expected in message and str(path) in message


def test_unreadable_files(tmp_path, recipe):
    assert "does not exist; did you mean" in fails(recipe("", "llama.yaml").with_name("lama.yaml"))
    assert "cannot be read" in fails(tmp_path)
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in fails(binary)


def test_empty_file_and_empty_section(recipe):
    assert load_config(recipe("")) == RunConfig()
    assert load_config(recipe("train:\npoet: {}\n")) == RunConfig()


def test_dumped_config_can_be_read_by_any_yaml_reader():
    assert yaml.safe_load(to_yaml(RunConfig())) == dataclasses.asdict(RunConfig())


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.sampled_from(["off", "1e-3", "null", "~", "12", "true", ".inf"]),
    lr=st.floats(0, 1e9),
    block=st.integers(2, 512),
)
def test_yaml_round_trip(tmp_path_factory, text, lr, block):
    config = load_config(None, [f"--poet.block_size={block}", "--model.num_query_groups=2"])
    config = dataclasses.replace(config, data=DataConfig(path=text), optim=OptimConfig(lr=lr))
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(path)
    assert again == config and type(again.poet.block_size) is int


def test_hash_follows_equality():
    base = RunConfig()
    assert config_hash(base) == config_hash(load_config(None, ["--poet.block_size=256.0"]))
    seen = {config_hash(base)}
    for change in (["--train.seed=1"], ["--poet.block_size_in=256"], ["--method=adamw"], ["--poet.master_weights=false"]):
        seen.add(config_hash(load_config(None, change)))
    assert len(seen) == 5
    assert len(config_hash(base)) == 16


def test_diff():
    new = load_config(None, ["--model.num_layers=12", "--model.num_query_groups=4", "--poet.merge_reset_moments=false"])
    assert diff_configs(RunConfig(), new) == [
        "model.num_layers: 8 -> 12",
        "model.num_query_groups: null -> 4",
        "poet.merge_reset_moments: true -> false",
    ]
    assert diff_configs(new, new) == []


def test_every_field_is_described():
    described = {field.key: field for field in describe_fields()}
    assert [key for key, field in described.items() if len(field.doc) < 10] == []
    steps = described["train.steps"]
    assert (steps.type, steps.default, steps.doc) == ("int", 1000, "Optimizer steps.")
    assert described["poet.block_size_in"].type == "float | None"
    flat = {
        f"{section}.{name}" for section, values in dataclasses.asdict(RunConfig()).items() if isinstance(values, dict) for name in values
    }
    assert set(described) == flat | {"version", "method", "engine"}
