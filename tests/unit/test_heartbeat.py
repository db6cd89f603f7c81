"""Who did not arrive when a collective times out."""

import os
import threading
import time

import pytest

from rlad_megatron.errors import TrainingError
from rlad_megatron.launch import heartbeat as module
from rlad_megatron.launch.heartbeat import heartbeat, silent_ranks


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "GATHER_S", 1.0)


def times_out(folder, rank, world_size, found):
    try:
        with heartbeat(folder, rank, world_size, timeout_s=9):
            raise RuntimeError("Timed out waiting 9000ms for recv operation to complete")
    except TrainingError as error:
        found[rank] = str(error)


def time_out_together(folder, ranks, world_size):
    found = {}
    threads = [threading.Thread(target=times_out, args=(folder, rank, world_size, found)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_rank_that_is_silent_and_one_that_is_late(tmp_path):
    with heartbeat(tmp_path, 1, 4, 9):
        pass
    os.utime(tmp_path / "alive_1", (time.time() - 60, time.time() - 60))
    with heartbeat(tmp_path, 2, 4, 9):
        found = time_out_together(tmp_path, [0, 3], 4)
    for said in found.values():
        assert said.startswith("a collective did not end within train.distributed_timeout_s=9: rank 1 (")
        assert "has given no sign of life for 6" in said and "; rank 2 (" in said and "is alive; see its log" in said
        assert "rank 0" not in said and "rank 3" not in said
        assert said.endswith("; fix that, or raise the timeout, and continue with resume=true")
    assert silent_ranks(tmp_path, range(4)).startswith("rank 1 (") and "rank 2" not in silent_ranks(tmp_path, range(4))


def test_the_clock_of_the_file_server_counts(tmp_path, monkeypatch):
    with heartbeat(tmp_path, 0, 1, 9):
        monkeypatch.setattr(time, "time", lambda: 1e12)
        assert silent_ranks(tmp_path, range(1)) == ""


def test_a_rank_that_never_began_is_named_and_all_that_waited_are_not(tmp_path):
    assert "rank 1 (never started) did not arrive" in time_out_together(tmp_path, [0], 2)[0]
    assert (
        "=9: every rank waited, so see the network between them; fix"
        in (time_out_together(tmp_path / "all", [0, 1], 2)[1])
    )


def test_a_rank_beats_while_it_works(tmp_path):
    with heartbeat(tmp_path, 0, 1, 9):
        os.utime(tmp_path / "alive_0", (0, 0))
        deadline = time.monotonic() + 30
        while silent_ranks(tmp_path, range(1)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("error", [RuntimeError("Connection closed by peer"), ValueError("timed out")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error), match=str(error)), heartbeat(tmp_path, 0, 1, 9):
        raise error
