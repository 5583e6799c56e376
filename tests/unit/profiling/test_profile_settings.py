"""Settings of the profiler: what may be asked for, and what is said about the rest."""

from __future__ import annotations

import pytest

from poet_megatron.config.load import load_config
from poet_megatron.profiling.config import ProfileConfig


def test_the_end_is_left_out():
    assert list(ProfileConfig(steps="10:15").step_range) == [10, 11, 12, 13, 14]
    assert list(ProfileConfig(steps="1:2").step_range) == [1]
    assert not ProfileConfig().step_range


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("10", "profile.steps is '10'; give first:end with the end left out, such as 10:15 for steps 10 to 14"),
        ("10:", "give first:end"),
        ("-3:5", "give first:end"),
        ("3 : 5", "give first:end"),
        ("0:5", "profile.steps is '0:5'; steps are counted from 1"),
        ("10:10", "profile.steps is '10:10', which is no step; the end is left out, so 10:11 is step 10"),
        ("15:10", "which is no step"),
    ],
)
def test_impossible_steps(steps, message):
    with pytest.raises(ValueError, match=message):
        ProfileConfig(steps=steps)


def test_ranks():
    assert [rank for rank in range(10) if ProfileConfig(steps="1:2").profiles(rank)] == [0]
    assert [rank for rank in range(10) if ProfileConfig(steps="1:2", ranks="0,8").profiles(rank)] == [0, 8]
    assert all(ProfileConfig(steps="1:2", ranks="all").profiles(rank) for rank in range(10))
    assert not ProfileConfig(ranks="all").profiles(0)


@pytest.mark.parametrize("ranks", ["", "0:8", "0,", "-1", "none", "0, 8"])
def test_impossible_ranks(ranks):
    with pytest.raises(ValueError, match="profile.ranks is .*; expected one rank, several with commas between"):
        ProfileConfig(ranks=ranks)


def test_ranks_that_the_run_does_not_have():
    ProfileConfig(ranks="0,7").check_ranks(8)
    ProfileConfig(ranks="all").check_ranks(1)
    with pytest.raises(ValueError, match=r"profile.ranks is '0,8'; this run has 8 rank\(s\), 0 to 7: leave out 8"):
        ProfileConfig(ranks="0,8").check_ranks(8)


def test_steps_beyond_the_run_are_refused_with_the_rest_of_its_settings():
    assert load_config(None, ["--profile.steps=8:13", "--train.steps=12"]).profile.step_range.stop == 13
    with pytest.raises(
        ValueError, match="profile.steps is '8:14', so it ends with step 13; train.steps is 12: name steps up to 12, such as 8:13"
    ):
        load_config(None, ["--profile.steps=8:14", "--train.steps=12"])


def test_a_recipe_may_leave_the_quotes_out(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("profile: {steps: 10:15, ranks: all, memory: true}\n")  # YAML 1.1 would read 10:15 as the number 615
    profile = load_config(recipe).profile
    assert (profile.steps, profile.ranks, profile.memory) == ("10:15", "all", True)
