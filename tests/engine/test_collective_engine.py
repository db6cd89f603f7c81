"""The collective weight transfer into real vLLM servers."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from tiny_servers import EOS, PROMPT, HfStudent, fleet_of, hf_log_probs, kill_engine, write_checkpoint

from rlad_megatron.errors import RolloutError, WeightSyncError
from rlad_megatron.servers.sampling import decode_greedily
from rlad_megatron.servers.transfer.choice import TransferChoice

pytestmark = pytest.mark.engine

COLLECTIVE = TransferChoice("collective", sleep_level=0)


def push_from_rank(rank: int, world_size: int, folders, urls, run_dir) -> list[dict[str, float] | str]:
    """Weights of two checkpoints, then those of another model."""
    told = []
    for version, folder in enumerate(folders):
        student = HfStudent(folder, rank, world_size, dist.group.WORLD)
        with fleet_of(folder, run_dir, student, transfer=COLLECTIVE, urls=urls, weight_bucket_mb=0.05) as fleet:
            fleet.version = version
            try:
                told.append(fleet.push(version))
            except RolloutError as error:
                told.append(str(error))
        dist.barrier()
    return told


def test_two_owners_push_to_two_servers_and_another_model_is_refused(tmp_path):
    folders = [write_checkpoint(tmp_path / name, seed=seed, tied=True) for name, seed in (("first", 1), ("other", 2))]
    untied = write_checkpoint(tmp_path / "untied", seed=3, tied=False)
    fleet = fleet_of(folders[0], tmp_path / "run", transfer=COLLECTIVE, servers=2, request_timeout_s=60.0)
    with fleet:
        urls = tuple(client.url for client in fleet.clients)
        for told in run_ranks(push_from_rank, 2, [*folders, untied], urls, tmp_path):
            assert [metrics["sync/bytes"] for metrics in told[:2]] == [told[0]["sync/bytes"]] * 2
            assert 0 < told[1]["sync/pause_seconds"] <= told[1]["sync/seconds"]
            assert "the trainer sends lm_head.weight [200, 64], but the model of this server" in told[2]
        for (decoded,) in decode_greedily(fleet.clients, [PROMPT], 24):
            expected = hf_log_probs(folders[1], PROMPT, decoded.tokens)
            torch.testing.assert_close(torch.tensor(decoded.log_probs), expected, atol=1e-4, rtol=0)
            assert EOS not in decoded.tokens[:-1]

        # A server that dies in mid-push.
        student = HfStudent(folders[0])
        with fleet_of(folders[0], tmp_path, student, transfer=COLLECTIVE, urls=urls, request_timeout_s=20.0) as pushing:
            pushing.push(1)
            send = pushing._transfer._send_buckets

            def killed() -> None:
                threading.Thread(target=kill_engine, args=(fleet.servers[1],)).start()
                time.sleep(0.5)
                send()

            pushing._transfer._send_buckets = killed
            begin = time.monotonic()
            with pytest.raises((RolloutError, WeightSyncError), match="server 1"):
                pushing.push(2)
            assert time.monotonic() - begin < 20.0
