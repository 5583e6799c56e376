"""Large CPU tensors come in huge pages where Linux has them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from poet_megatron.parallel.host_memory import VARIABLE, use_huge_pages

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import resource, sys
import torch
from poet_megatron.parallel.host_memory import use_huge_pages

if sys.argv[1] == "huge":
    use_huge_pages()
torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="huge pages are not given on request here")
def test_large_tensors_take_huge_pages():
    # 64 MB are 16,384 pages of 4 KB or 32 of 2 MB; some of the latter may not be free.
    assert faults("huge") < faults("small") / 4


def test_the_environment_wins(monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    use_huge_pages()
    assert os.environ[VARIABLE] == "0"
