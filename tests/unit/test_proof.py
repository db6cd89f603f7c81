"""The three proofs that servers compute with the trainer's weights, without servers. With them: tests/engine."""

import math

import pytest
import torch

from rlad_megatron.config import RolloutConfig, RunConfig
from rlad_megatron.config.recipe import load_run
from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models import fingerprint as module
from rlad_megatron.models.box import Box
from rlad_megatron.models.fingerprint import fingerprint
from rlad_megatron.models.perturb import STRENGTHS, perturbed
from rlad_megatron.servers.transfer.proof import Agreement, check_canary, check_fingerprints, weakest_canary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = (1 << 64) - 1


def matrix(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 4])
def test_the_parts_of_a_tensor_sum_up_to_its_fingerprint(columns, dtype, monkeypatch):
    whole = matrix(12, 10, columns, dtype=dtype)
    want = fingerprint(whole).item()
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 60)
    assert fingerprint(whole).item() == want
    boxes = [((0, 0, 0), (5, 10, columns)), ((5, 0, 0), (7, 4, columns)), ((5, 4, 0), (7, 6, columns))]
    boxes = [Box.at(*box) for box in boxes]
    parts = [fingerprint(whole[box.slices], box).item() for box in boxes]
    assert sum(parts) & MASK == want & MASK
    assert len({want, *parts}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (3, 8), (7,), (16,)], ids=str)
def test_the_fingerprint_is_that_of_integers_of_any_size(shape, dtype):
    """The oracle: Python's integers, one element at a time."""
    whole = matrix(*shape, dtype=dtype)
    bits = 8 * whole.element_size()
    lanes = 64 // bits
    *outer, columns = shape
    rows = module._odd_numbers(0, *outer, 0, whole.device).tolist() if outer else [1]
    words = module._odd_numbers(0, -(-columns // lanes), len(shape) - 1, whole.device).tolist()
    values = whole.view(module.BITS[bits // 8]).reshape(-1, columns).tolist()
    want = sum(
        (value & ((1 << bits) - 1)) * row * (words[column // lanes] << (column % lanes * bits))
        for row, line in zip(rows, values, strict=True)
        for column, value in enumerate(line)
    )
    assert fingerprint(whole).item() & MASK == want & MASK
    assert all(number % 2 for number in rows + words)
    # Cut anywhere, also within a word, and read from memory that is not aligned to words.
    for cut in range(1, columns):
        boxes = [Box((*Box.whole(outer), part)) for part in ((0, cut), (cut, columns))]
        found = sum(fingerprint(whole[box.slices], box).item() for box in boxes)
        assert found & MASK == want & MASK, cut


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_changes_the_fingerprint(dtype):
    whole = matrix(6, 7, dtype=dtype)
    want, integer = fingerprint(whole).item(), module.BITS[whole.element_size()]
    for place in ((0, 0), (3, 5), (5, 6)):
        for bit in range(8 * whole.element_size() - 1):
            other = whole.clone()
            other.view(integer)[place] ^= 1 << bit
            assert fingerprint(other).item() != want, (place, bit)


def test_moved_values_change_the_fingerprint():
    square = matrix(8, 8)
    others = [square.t(), square.flip(0), square.flip(1), square.roll(1, 0), square[:, [1, 0, *range(2, 8)]]]
    found = {fingerprint(other).item() for other in [square, *others]}
    assert len(found) == 6
    assert fingerprint(square.t().contiguous().t()).item() == fingerprint(square).item()


@pytest.mark.parametrize("bit", STRENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbed_weights_come_back_bit_for_bit(dtype, bit):
    weight = torch.nn.Parameter(matrix(32, 32, dtype=dtype))
    with torch.no_grad():
        weight[0, :2] = torch.tensor([0.0, -0.0])
    before, shard = weight.detach().clone(), weight.detach()[8:16].clone()
    with pytest.raises(RuntimeError, match="inside"), perturbed([weight], bit):
        change = ((weight - before) / before)[before != 0].abs()
        assert change.min() > 0.49 * 2**-bit and change.max() < 1.01 * 2**-bit and weight.isfinite().all()
        assert 0.3 < (weight.abs() > before.abs()).float().mean() < 0.7  # up and down
        with perturbed([shard], bit):
            assert torch.equal(shard, weight[8:16])  # the same in every layout
        raise RuntimeError("inside")
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))


def test_tensors_that_arrived_wrong_are_named():
    sent = {f"layer.{index}": index for index in range(6)}
    check_fingerprints(sent, sent | {"rotary.inv_freq": 1}, "server 5")
    for received, parts in (
        (sent | {"layer.2": 7}, ["values than the trainer sent in layer.2 (0 of"]),
        ({}, ["layer.0, layer.1, layer.2 and 3 more (6 of"]),
    ):
        with pytest.raises(WeightSyncError, match="fingerprints: server 5 ") as caught:
            check_fingerprints(sent, received, "server 5")
        assert all(part in str(caught.value) for part in [*parts, "rollout.weight_transfer"])


@pytest.mark.parametrize(("size", "bit"), [(100.0, 5), (4.0, 4), (1.5, 2), (1e-3, 2)])
def test_the_canary_pushes_the_weakest_perturbation_that_moves_log_probs(size, bit):
    class Student:
        weight = torch.nn.Parameter(torch.tensor([size]))

        def perturbed(self, bit):
            return perturbed([self.weight], bit)

        def log_probs(self, samples, temperature):
            assert not torch.is_grad_enabled()
            return [self.weight * sample for sample in samples]

    assert weakest_canary(Student(), [torch.ones(3), torch.full((2,), 2.0)]) == bit
    assert Student.weight == size


def test_the_canary_tells_new_weights_from_old_ones():
    true, moved = torch.full((8,), -1.0), torch.full((8,), -3.0)
    assert check_canary(moved + 0.9, moved, true, float32=False, server="server 5")
    for sampler, float32, words in (
        (true, False, "with its old weights"),
        (moved - 1.1, False, "with neither"),
        (moved + 0.01, True, "with neither"),
        (torch.full((8,), math.nan), False, "with neither"),
    ):
        with pytest.raises(WeightSyncError, match=f"canary: server 5 decodes {words}.*by 2 nats"):
            check_canary(sampler, moved, true, float32=float32, server="server 5")
    assert not check_canary(true + 1e-3, true + 0.03, true, float32=False, server="server 5")  # it cannot be told


def test_agreement_is_measured_against_its_first_level():
    agreement = Agreement(factor=5.0, float32=False)
    agreement.check("probe", {"server 0": {"mean": 0.03, "max": 0.2}, "server 1": {"mean": 0.04, "max": 0.1}})
    agreement.check("rollouts", {"the sampler": {"mean": 1e-4, "p99": 0.2}})
    assert agreement.levels == {"probe mean": 0.04, "rollouts mean": 1e-4, "rollouts p99": 0.2}
    agreement.check("probe", {"server 0": {"mean": 0.19, "max": 30.0}})  # one token is not a statistic
    agreement.check("rollouts", {"the sampler": {"mean": 0.09, "p99": 0.99}})  # that first mean was luck
    for where, name, gaps, words in (
        (
            "probe",
            "server 1",
            {"mean": 0.21},
            r"server 1 .* 0\.21 nats \(mean over .*; at most 0\.2: .*=5 .*0\.04",
        ),
        ("rollouts", "the sampler", {"mean": 0.11, "p99": 0.2}, r"\(mean over the rollouts; at most 0\.1:"),
        ("rollouts", "the sampler", {"mean": 0.05, "p99": 1.1}, r"1\.1 nats \(p99 over the rollouts; at most 1:"),
        ("probe", "server 0", {"mean": math.nan}, "nan nats"),
    ):
        with pytest.raises(WeightSyncError, match=f"agreement: .*{words}"):
            agreement.check(where, {name: gaps})


def test_float32_has_an_absolute_bound():
    agreement = Agreement.of(load_run("kk_tiny_cpu", ["rollout.mismatch_factor=100"]))
    assert agreement.float32 and not Agreement.of(RunConfig(rollout=RolloutConfig(dtype="bfloat16"))).float32
    agreement.check("probe", {"server 0": {"mean": 1e-4, "max": 9e-4}})
    with pytest.raises(WeightSyncError, match=r"0\.0011 nats \(max .*; at most 0\.001: the bound of float32"):
        agreement.check("probe", {"server 0": {"mean": 1e-4, "max": 1.1e-3}})
