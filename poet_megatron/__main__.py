"""`python -m poet_megatron`: the same as the `poet-megatron` command."""

from __future__ import annotations

import sys

from poet_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
