"""What every rank of harness.py imports, imported once. No tensor is made here: threads do not survive a fork."""

from rlad_megatron import platform

platform.prepare()

import tiny_models  # noqa: E402, F401

import rlad_megatron.convert.run  # noqa: E402
import rlad_megatron.run  # noqa: E402, F401
