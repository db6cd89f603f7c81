"""The trainer's weights as Hugging Face tensors, whole, from shards that lie on many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlad_megatron.models.load import is_quantized
from rlad_megatron.models.shard_plan import ShardEntry

Slices = tuple[tuple[int, int], ...]  # (start, stop) in each dimension, as in a Piece


@dataclass(frozen=True)
class TensorMetadata:
    """One Hugging Face tensor. The fields of vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype  # on the wire
    shape: tuple[int, ...]  # whole


class MegatronWeightSource:
    """A source of weights for vLLM's trainer engines, over a Megatron model.

    It has the interface of `vllm.distributed.weight_transfer.base.WeightSource` that the `nccl` and `ipc` trainer
    engines read (`metadata()` and iteration), and does not inherit from it: importing vLLM costs a trainer rank
    seconds and some 250 MB, and the shared-memory engine needs nothing of it.

    All ranks of `group` hold one together and iterate it in lockstep.
    """

    def __init__(
        self,
        entries: Sequence[ShardEntry],
        parameters: Mapping[str, torch.Tensor],
        hf_shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        is_writer: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        entries: this rank's part of the shard plan. parameters: this rank's tensors by entry name.
        hf_shapes: every tensor of the whole model, in the order of iteration, the same on all ranks.
        dtype: on the wire. is_writer: this rank's copy of the model is the one that is read (data-parallel
        rank 0); of its entries those with `owner` count. group: the ranks of the run; None for one process.
        """
        self.group = group
        self._dtype = dtype
        self._shapes = dict(hf_shapes)
        self._device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        # (where in the whole tensor, the parameter, where in it): read when written, so it follows the optimizer
        self._slices: dict[str, list[tuple[Slices, torch.Tensor, Slices]]] = {}
        if is_writer:
            for entry in entries:
                parameter = parameters[entry.name]
                assert tuple(parameter.shape) == entry.shape, (entry.name, tuple(parameter.shape), entry.shape)
                for piece in entry.pieces if entry.owner else ():
                    assert piece.hf_name in self._shapes, piece.hf_name
                    piece_of = (piece.hf_slices, parameter, piece.local_slices)
                    self._slices.setdefault(piece.hf_name, []).append(piece_of)

    def metadata(self) -> list[TensorMetadata]:
        """What iteration yields. The same on every rank, and nothing is communicated."""
        return [TensorMetadata(name, self._dtype, shape) for name, shape in self._shapes.items()]

    @torch.no_grad()
    def write_all(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's slices of each tensor into its target, which has its whole shape. The rest is left alone.

        FP8 weights are written as the values that they stand for, which are those that the trainer multiplies by.
        """
        values = _Values()
        for name, target in targets.items():
            self._write(name, target, values)

    def _write(self, name: str, target: torch.Tensor, values: _Values) -> None:
        for hf_slices, parameter, local_slices in self._slices.get(name, ()):
            target[_index(hf_slices)].copy_(values.of(parameter)[_index(local_slices)])

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, whole tensor) in the order of `metadata()`, on every rank. A collective per tensor.

        Every rank writes its slices into zeros and the results are summed. The shard plan's slices tile each
        tensor exactly once over the writers, so each element is one value plus zeros, which is that value in
        any dtype and in any order of summation. That needs no knowledge of who holds what; it moves about twice
        the bytes of a broadcast.
        """
        values = _Values()
        for name, shape in self._shapes.items():
            tensor = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._write(name, tensor, values)
            if self.group is not None:
                dist.all_reduce(tensor, group=self.group)
            yield name, tensor


class _Values:
    """Values of parameters, for one pass over the tensors.

    A parameter in FP8 is dequantised whole, since its scales are not by slices, and once for all tensors that are cut
    from it: they follow each other (query, key and value; gate and up).
    """

    def __init__(self) -> None:
        self._parameter: torch.Tensor | None = None  # the last one in FP8
        self._values: torch.Tensor | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        if not is_quantized(parameter):
            return parameter
        if parameter is not self._parameter:
            self._parameter, self._values = parameter, parameter.dequantize()
        return self._values


def _index(slices: Slices) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in slices)
