"""Servers that do not hold, or do not use, the trainer's weights: each is found at the first push."""

from __future__ import annotations

import pytest
import torch
from tiny_servers import HfStudent, fleet_of, keep_old_weights, write_checkpoint

from rlad_megatron.errors import WeightSyncError

pytestmark = pytest.mark.engine


def test_a_server_that_keeps_its_old_weights_is_found_at_the_first_push(tmp_path, monkeypatch):
    keep_old_weights(monkeypatch)
    folder = write_checkpoint(tmp_path / "model", seed=1, tied=True)
    fleet = fleet_of(folder, tmp_path / "run", HfStudent(folder), servers=1)
    with fleet, pytest.raises(WeightSyncError, match="canary: server 0 .* decodes with its old weights"):
        fleet.push(0)


@pytest.mark.parametrize("victim", ["model.layers.1.self_attn.k_norm.weight", "model.embed_tokens.weight"])
def test_one_flipped_bit_is_found_with_the_tensors_name(served_tied, monkeypatch, victim):
    served_tied.push(served_tied.folder)
    transfer = served_tied.fleet._transfer
    write = transfer.write

    def write_and_flip(version):
        write(version)
        transfer._tensors[victim].view(-1)[3:4].view(torch.int32).bitwise_xor_(1)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "write", write_and_flip)
        with pytest.raises(WeightSyncError, match=f"fingerprints: server 0 .* sent in {victim} "):
            served_tied.push(served_tied.folder)
    served_tied.push(served_tied.folder)


def test_a_server_goes_through_the_canary_once_for_each_start(served_tied, monkeypatch):
    fleet, sent = served_tied.fleet, []
    served_tied.push(served_tied.folder)
    send = fleet._send
    monkeypatch.setattr(fleet, "_send", lambda servers, version: sent.append(version) or send(servers, version))
    version = served_tied.push(served_tied.other)
    assert sent == [version]
    monkeypatch.setattr(fleet, "_proven", set())
    assert fleet.push(version) is None and sent == [version, -2, version]
    assert fleet.verify()["sync/probe_abs_max"] < 1e-4
