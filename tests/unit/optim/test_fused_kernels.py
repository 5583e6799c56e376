"""Which optimizer kernels are chosen, by what is installed; the extensions here are empty files of their names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import optimizer as mcore_optimizer

from poet_megatron.config.dump import to_yaml
from poet_megatron.optim.build import build_plain_optimizer, learning_rates
from poet_megatron.optim.config import OptimConfig
from poet_megatron.optim.fused import FusedKernels, adamw, chosen_adam, fused_kernels

ROOT = Path(__file__).parents[3]
PYTHON_ONLY_APEX = {  # as NVIDIA's Apex is without its extensions: it imports, and the optimizer cannot be built
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": (
        "class FusedAdam:\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        raise RuntimeError('apex.optimizers.FusedAdam requires cuda extensions')\n"
        "FusedSGD = FusedAdam\n"
    ),
    "apex/multi_tensor_apply/__init__.py": "multi_tensor_applier = None\n",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "FusedLayerNormAffineFunction = None\n",
}


def fake_adam(module: str) -> type:
    """A FusedAdam that remembers how it was built."""

    class FusedAdam:
        def __init__(self, groups: list, **settings: object) -> None:
            self.param_groups, self.settings = groups, settings

    FusedAdam.__module__ = module
    return FusedAdam


@pytest.fixture
def install(tmp_path: Path, monkeypatch):
    """Make Megatron's choice of Adam, and extensions, look as if `module` and `extensions` were installed."""

    def make(module: str, *extensions: str) -> None:
        for extension in extensions:
            (tmp_path / f"{extension}.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        if module:
            monkeypatch.setattr(mcore_optimizer, "Adam", fake_adam(module))
            monkeypatch.setattr(mcore_optimizer, "USING_PYTORCH_OPTIMIZER", False)

    return make


NOTHING = "optimizer: torch AdamW (Apex's kernels are not installed: docs/dependencies.md)"
WGRAD = "fused_weight_gradient_mlp_cuda"
INSTALLED = [
    # Megatron's Adam, extensions, kernels on a GPU, what a run says
    ("", [], FusedKernels("torch", False), NOTHING),
    ("apex.optimizers.fused_adam", [], FusedKernels("torch", False), NOTHING),
    ("apex.optimizers.fused_adam", ["amp_C"], FusedKernels("apex", False), "optimizer: Apex's FusedAdam and multi-tensor kernels"),
    (
        "apex.optimizers.fused_adam",
        ["amp_C", WGRAD],
        FusedKernels("apex", True),
        "optimizer: Apex's FusedAdam and multi-tensor kernels, fused weight gradients",
    ),
    ("", [WGRAD], FusedKernels("torch", True), f"{NOTHING}, fused weight gradients"),
    (
        "transformer_engine.pytorch.optimizers.fused_adam",
        [],
        FusedKernels("transformer_engine", False),
        "optimizer: Transformer Engine's FusedAdam and multi-tensor kernels",
    ),
]


@pytest.mark.parametrize(("module", "extensions", "expected", "text"), INSTALLED)
def test_detection(install, module: str, extensions: list[str], expected: FusedKernels, text: str):
    install(module, *extensions)
    found = fused_kernels("cuda")
    assert (found.source, found.weight_gradient) == (expected.source, expected.weight_gradient)
    assert found.describe() == text
    assert found == fused_kernels("cuda", "megatron")
    zero = fused_kernels("cuda", "deepspeed")
    assert (zero.source, zero.weight_gradient) == (expected.source, False), "ZeRO has no buffers that a product could add to"


def test_a_cpu_never_takes_cuda_kernels(install):
    install("apex.optimizers.fused_adam", "amp_C", WGRAD)
    assert fused_kernels("cpu").describe() == "optimizer: torch AdamW (the fused kernels are for GPUs)"
    assert not fused_kernels("cpu").weight_gradient


def test_megatron_builds_what_was_chosen(install):
    install("apex.optimizers.fused_adam")
    fused = mcore_optimizer.Adam
    with chosen_adam(fused_kernels("cuda")):
        assert mcore_optimizer.Adam is torch.optim.AdamW
        assert mcore_optimizer.USING_PYTORCH_OPTIMIZER
    assert mcore_optimizer.Adam is fused
    assert not mcore_optimizer.USING_PYTORCH_OPTIMIZER
    with chosen_adam(FusedKernels("apex", False)):
        assert mcore_optimizer.Adam is fused


def test_decoupled_weight_decay_either_way(install):
    """Apex's FusedAdam is AdamW when told so; torch's Adam is not, its AdamW is."""
    install("apex.optimizers.fused_adam", "amp_C")
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    fused = adamw(groups, fused_kernels("cuda"), lr=1.0, weight_decay=0.1)
    assert type(fused) is mcore_optimizer.Adam
    assert fused.settings == {"adam_w_mode": True, "lr": 1.0, "weight_decay": 0.1}
    assert type(adamw(groups, fused_kernels("cpu"), lr=1.0)) is torch.optim.AdamW


def test_groups_without_megatron():
    """Base, skews, one-dimensional, in this order; empty ones are left out."""
    named = {"norm.weight": torch.ones(3), "a.skew": torch.ones(1, 3), "linear.weight": torch.ones(3, 3)}
    config = OptimConfig(lr=1e-2, poet_lr=1e-3, weight_decay=0.1, poet_weight_decay=0.2, min_lr_ratio=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    parameters = {name: torch.nn.Parameter(value) for name, value in named.items()}
    base, skews, flat = build_plain_optimizer(parameters.items(), config).param_groups
    assert [group["params"][0] is parameters[name] for group, name in ((base, "linear.weight"), (skews, "a.skew"), (flat, "norm.weight"))]
    assert {(group["betas"], group["eps"]) for group in (base, skews, flat)} == {((0.8, 0.9), 1e-6)}
    assert [group["max_lr"] for group in (base, skews, flat)] == [1e-2, 1e-3, 1e-2]
    assert [group["min_lr"] for group in (base, skews, flat)] == pytest.approx([1e-3, 1e-4, 1e-3])
    assert [group.get("start_wd") for group in (base, skews, flat)] == [None, 0.2, None]
    assert [group["wd_mult"] for group in (base, skews, flat)] == [1.0, 1.0, 0.0]
    assert set(learning_rates([base, skews, flat])) == {"base", "poet"}
    only = build_plain_optimizer([("norm.weight", parameters["norm.weight"])], config)
    assert [group["wd_mult"] for group in only.param_groups] == [0.0]


def test_an_apex_without_kernels_changes_nothing(tmp_path: Path, tiny_run):
    """Megatron takes its FusedAdam on import; a run trains all the same, with torch's AdamW."""
    for name, text in PYTHON_ONLY_APEX.items():
        (tmp_path / "fake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fake" / name).write_text(text)
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_run("run", {"train.steps": "2", "checkpoint.interval": "0", "train.eval_tokens": "64"})))
    code = (
        "import sys\n"
        "from poet_megatron.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "from megatron.core import optimizer\n"
        "print('found', optimizer.Adam.__module__)\n"
        "sys.exit(status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "fake"), str(ROOT)]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, "pretrain", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "found apex.optimizers" in done.stdout, "the fake was not seen: the test tests nothing"
    assert "step 2/2" in done.stdout
