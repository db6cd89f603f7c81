"""Convert checkpoints: the same as `rlad convert`, for where the command is not installed.

python tools/convert_checkpoint.py hf-to-megatron FOLDER TARGET --tp 2
"""

from __future__ import annotations

import sys

from rlad_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
