"""A server that does not use the trainer's weights is found at the first push; how workers take fingerprints."""

from __future__ import annotations

import time
from collections.abc import Iterable

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


class TakesAll(torch.nn.Module):
    """A model whose loader takes all tensors."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        return len(list(weights))


def recorder_of(model: TakesAll):
    """What records in a worker that has this model."""
    from rlad_megatron.servers.transfer.worker import FingerprintRecorder

    recorder = FingerprintRecorder()
    recorder.get_model = lambda: model
    recorder.record_fingerprints()
    return recorder


def test_few_tensors_wait_for_their_fingerprints(monkeypatch):
    from rlad_megatron.servers.transfer import worker

    given, done, waiting = [], [], []

    def slow(tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        waiting.append(len(given) - len(done))
        done.append(tensor)
        return tensor.sum()

    def weights():
        for index in range(12):
            given.append(index)
            yield f"t{index}", torch.ones(1)

    monkeypatch.setattr(worker, "fingerprint", slow)
    model = TakesAll()
    recorder = recorder_of(model)
    assert model.load_weights(weights()) == 12
    assert len(recorder.recorded_fingerprints()) == 12
    assert max(waiting) <= 3  # two that wait, and the next


def test_an_error_while_taking_fingerprints_is_raised(monkeypatch):
    from rlad_megatron.servers.transfer import worker

    def failing(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no fingerprint")

    monkeypatch.setattr(worker, "fingerprint", failing)
    model = TakesAll()
    recorder_of(model)
    with pytest.raises(RuntimeError, match="no fingerprint"):
        model.load_weights([("t", torch.ones(1))])
