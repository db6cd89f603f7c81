"""Weights with scales, as Transformer Engine's FP8 tensors, are written and read whole."""

import pytest
import torch
from transfer_double import packed_and_assembled

from rlad_megatron.models.box import Box
from rlad_megatron.models.gathered import GatheredWeights
from rlad_megatron.models.load import is_quantized, load_weights
from rlad_megatron.models.rules import Piece
from rlad_megatron.models.shard_plan import ShardEntry
from rlad_megatron.teacher.offload import HostWeights

LEVELS = 127


class Scaled(torch.Tensor):
    """Integers and one scale, in place of Transformer Engine's classes, which need a GPU.

    It does what the code relies on: `copy_` finds the scale of the whole, the parts are attributes, `dequantize` gives
    the values. Any other operation works on values, so what is written to a slice is lost, as it would be there.
    """

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made._quantize(values)
        return made

    def _quantize(self, values):
        self._scale = values.detach().abs().max().clamp(min=1e-9) / LEVELS
        self._levels = (values.detach() / self._scale).round().to(torch.int8)

    def dequantize(self):
        return self._levels.to(self.dtype) * self._scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0]._quantize(args[1].dequantize() if isinstance(args[1], cls) else args[1])
            return args[0]
        if func is torch.ops.aten.detach.default:
            copy = cls(args[0].dequantize())
            copy._levels, copy._scale = args[0]._levels, args[0]._scale
            return copy
        values = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
        return func(*values, **(kwargs or {}))


class Files:
    """A checkpoint with one tensor."""

    def __init__(self, values):
        self.values = values

    def read(self, name, box):
        return self.values[box.slices]

    def release(self): ...


def piece(hf_rows, local_rows):
    return Piece("w", Box((hf_rows, (0, 3))), Box((local_rows, (0, 3))))


# Rows 4..7 of the tensor, in another order, and a row of padding. The largest value of all is not in every slice.
VALUES = torch.arange(24.0).reshape(8, 3) - 5
ENTRY = ShardEntry("m", (5, 3), (piece((6, 8), (0, 2)), piece((4, 6), (2, 4))), owner=True)
EXPECTED = torch.cat([VALUES[6:8], VALUES[4:6], torch.zeros(1, 3)])


@pytest.fixture
def parameter():
    made = torch.nn.Parameter(Scaled(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))))
    assert is_quantized(made) and not is_quantized(torch.nn.Parameter(torch.zeros(1)))
    return made


def close(found, expected):
    return torch.testing.assert_close(found, expected, atol=0.5 * 18 / LEVELS + 1e-6, rtol=0)


def test_loading_finds_one_scale_for_all_slices_and_renews_the_optimizers_copy(parameter):
    first = torch.full((5, 3), 7.0)
    parameter.get_high_precision_init_val = lambda: first
    load_weights({"m": parameter}, [ENTRY], Files(VALUES))
    close(parameter.dequantize(), EXPECTED)
    assert parameter._scale == 18 / LEVELS
    assert torch.equal(first, EXPECTED)


def test_the_weight_source_gives_the_values_of_the_day(parameter):
    source = GatheredWeights([ENTRY], {"m": parameter}, {"w": (8, 3)}, dtype=torch.float32)
    with torch.no_grad():
        parameter.copy_(EXPECTED)  # after the source was made, as an optimizer does
    ((_, whole),) = source
    close(whole, torch.cat([torch.zeros(4, 3), VALUES[4:]]))
    assert whole.abs().max() == 18


def test_servers_are_sent_the_values_that_the_trainer_multiplies_by(parameter):
    entry = ShardEntry("m", (5, 3), (piece((2, 4), (0, 2)), piece((0, 2), (2, 4))), owner=True)
    source = GatheredWeights([entry], {"m": parameter}, {"w": (4, 3)}, dtype=torch.bfloat16)
    with torch.no_grad():
        parameter.copy_(EXPECTED)
    whole = dict(packed_and_assembled([source], bucket_bytes=16))["w"]
    assert torch.equal(whole, parameter.dequantize()[[2, 3, 0, 1]].bfloat16())


def test_a_parameter_is_dequantised_once_for_all_tensors_that_are_cut_from_it(parameter, monkeypatch):
    calls = []
    dequantize = Scaled.dequantize
    monkeypatch.setattr(Scaled, "dequantize", lambda self: calls.append(self) or dequantize(self))
    pieces = [Piece(name, Box.whole((2, 3)), Box.at((start, 0), (2, 3))) for name, start in (("gate", 0), ("up", 2))]
    shapes = {"gate": (2, 3), "up": (2, 3)}
    entry = ShardEntry("m", (5, 3), tuple(pieces), owner=True)
    source = GatheredWeights([entry], {"m": parameter}, shapes, dtype=torch.float32)
    expected = dequantize(parameter)
    iterated = dict(source)
    assert len(calls) == 1
    written = {name: torch.empty(shape) for name, shape in shapes.items()}
    source.write_all(written)
    assert len(calls) == 2  # again for each pass: an optimizer may have changed the weights
    for found in (iterated, written):
        assert torch.equal(torch.cat([found["gate"], found["up"]]), expected[:4])


def test_weights_on_the_host_come_back_as_they_were(parameter):
    model = torch.nn.Linear(3, 2)
    model.quantized = parameter
    before = {name: (value.dequantize() if is_quantized(value) else value.clone()) for name, value in state(model)}
    host = HostWeights([model])
    resting = pointers(model)
    for _ in range(2):
        with host.on_device():
            assert not pointers(model) & resting  # copies, which go with the pass
            for name, value in state(model):
                found = value.dequantize() if is_quantized(value) else value
                assert torch.equal(found, before[name]), name
        assert pointers(model) == resting
    with pytest.raises(ZeroDivisionError), host.on_device():
        raise ZeroDivisionError
    assert pointers(model) == resting


def state(model):
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def pointers(model):
    """Where the parameters' bytes are."""
    quantized = [model.quantized._levels, model.quantized._scale]
    return {tensor.data_ptr() for tensor in [model.weight.data, model.bias.data, *quantized]}
