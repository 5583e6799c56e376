"""Huge pages for the tensors of a CPU run."""

from __future__ import annotations

import os

VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""Read by torch's CPU allocator at its first tensor of 2 MB or more."""


def use_huge_pages() -> None:
    """Let torch ask Linux for 2 MB pages for large CPU tensors, unless the environment already says something.

    Tensors of 32 MB and more are mapped and faulted in afresh every time: a third of the time of a block product of that size with pages of
    4 KB, a tenth with huge ones. To be called before the first large tensor. Without effect where the kernel's transparent huge pages are
    "never", and on other systems.
    """
    os.environ.setdefault(VARIABLE, "1")
