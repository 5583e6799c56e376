"""`python -m data_prep.tokenize_c4 ...` is `poet-megatron prepare tokenize ...`: C4, or any other text, to parts for Megatron."""

from __future__ import annotations

import sys

from poet_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "tokenize", *sys.argv[1:]]))
