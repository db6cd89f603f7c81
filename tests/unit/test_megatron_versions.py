"""What differs between versions of Megatron-Core, as far as it shows without running them."""

import logging
import subprocess
import sys

import pytest

from rlad_megatron import platform
from rlad_megatron.errors import CheckpointError
from rlad_megatron.platform import megatron_versions


@pytest.mark.parametrize("installed", ["0.16.1", "0.18.2+a1b2c3d", "0.19.2"])
def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path, monkeypatch, installed):
    (tmp_path / ".metadata").touch()
    monkeypatch.setattr(megatron_versions, "version", lambda package: installed)
    if installed == "0.19.2":
        megatron_versions.check_loadable(tmp_path)
    else:
        with pytest.raises(CheckpointError, match=f"0.19 or newer, which {installed[:6]}.* cannot load"):
            megatron_versions.check_loadable(tmp_path)
    (tmp_path / "common.pt").touch()  # as older versions write it, and newer ones read it
    megatron_versions.check_loadable(tmp_path)


def test_lines_of_new_versions_about_what_all_share_are_left_out(caplog):
    platform.setup()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    caplog.set_level(logging.WARNING, logger.name)
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("something else")
    assert caplog.messages == ["something else"]


LOAD = """
import torch
from rlad_megatron import platform
platform.setup()
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader, load_state_dict
for call in (lambda: load_state_dict({}, FileSystemReader("none")), ShardedTensor.__torch_function__):
    try:
        call()
    except Exception:
        pass
"""


def test_warnings_of_a_load_are_left_out():
    """As Megatron-Core calls torch."""
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
