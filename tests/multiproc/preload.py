"""What every rank of harness.py imports, imported once. No tensor is made here: threads do not survive a fork."""

from rlad_megatron import platform
from rlad_megatron.processes import quick_imports

with quick_imports():
    platform.prepare()

    import tiny_models  # noqa: F401

    import rlad_megatron.convert.run
    import rlad_megatron.run  # noqa: F401
