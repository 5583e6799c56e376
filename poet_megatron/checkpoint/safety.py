"""Refuses checkpoint files whose pickles name anything but what torch.distributed.checkpoint writes, before anything loads them.

torch's distributed checkpoints keep their index, `.metadata`, as a pickle, which torch loads without restriction. Every global that the
pickle names is compared with a list here; nothing is executed by the comparison. All other files are loaded by torch.load(weights_only).
"""

from __future__ import annotations

import pickletools
from pathlib import Path

from poet_megatron.errors import UserError

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    "collections OrderedDict",
    "builtins getattr",
    "torch Size",
    "torch float32",
    "torch float64",
    "torch bfloat16",
    "torch float16",
    "torch int64",
    "torch int32",
    "torch uint8",
    "torch.serialization _get_layout",
    "pathlib PosixPath",
}
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "UNICODE", "BINUNICODE8"}


def check_metadata(path: Path) -> None:
    """Raise UserError if the pickle at `path` names a global that a checkpoint index has no use for.

    Args:
        path: the `.metadata` file of a torch distributed checkpoint.
    """
    for name in sorted(pickle_globals(path.read_bytes())):
        module = name.split(" ")[0]
        if module not in _MODULES and name not in _NAMES:
            raise UserError(
                f"{path} names {name.replace(' ', '.')}, which no checkpoint index needs: the file is not to be trusted and was not loaded"
            )


def pickle_globals(data: bytes) -> set[str]:
    """The globals "module name" that a pickle would import, found without executing it.

    A name that cannot be read off the opcodes is reported as "unknown unknown".
    """
    found: set[str] = set()
    memo: dict[int, str] = {}
    stack: list[str] = []
    last = ""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(str(argument))
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(stack[-2:]) if len(stack) >= 2 else "unknown unknown")
        if opcode.name in _STRINGS:
            last = str(argument)
            stack.append(last)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(str(argument))] = last
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            last = memo.get(int(str(argument)), "unknown")
            stack.append(last)
        else:
            last = "unknown"
    return found
