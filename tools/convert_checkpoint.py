"""Convert checkpoints like `rlad convert`, from a checkout that is not installed.

python tools/convert_checkpoint.py hf-to-megatron FOLDER TARGET --tp 2
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from rlad_megatron.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
