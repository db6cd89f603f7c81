"""The student's weights as whole Hugging Face tensors, from shards on many ranks: for sync, export and SFT."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlad_megatron.models.box import Box
from rlad_megatron.models.fingerprint import fingerprint
from rlad_megatron.models.load import is_quantized
from rlad_megatron.models.shard_plan import ShardEntry


@dataclass(frozen=True)
class OwnedSlice:
    """A slice that this rank is the one to send or write."""

    tensor: int  # index of its tensor in `GatheredWeights.metadata()`
    box: Box  # where it lies in the whole tensor
    parameter: torch.Tensor  # read late, so its values are the present ones
    local: Box  # where it lies in the parameter


@dataclass(frozen=True)
class TensorMetadata:
    """One Hugging Face tensor."""

    name: str
    dtype: torch.dtype  # on the wire
    shape: tuple[int, ...]  # whole

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class GatheredWeights:
    """The tensors of a sharded Megatron model: gathered by iteration, or sliced by `write_all`.

    All ranks of `group` hold one together and iterate it in lockstep. It has what vLLM's trainer engines read of a
    `vllm.distributed.weight_transfer.base.WeightSource`, without the import of vLLM.
    """

    def __init__(
        self,
        entries: Sequence[ShardEntry],
        parameters: Mapping[str, torch.Tensor],
        hf_shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        float32: Collection[str] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        entries: this rank's part of the shard plan. parameters: this rank's tensors by entry name.
        hf_shapes: every tensor of the whole model, in the order of iteration, the same on all ranks.
        dtype: of the tensors that come out, but for those in `float32`.
        group: the ranks of the run; None for one process.
        """
        self.group = group
        self._shapes = dict(hf_shapes)
        self._dtypes = {name: torch.float32 if name in float32 else dtype for name in self._shapes}
        self.device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        self._slices: dict[str, list[OwnedSlice]] = {name: [] for name in self._shapes}
        index = {name: number for number, name in enumerate(self._shapes)}
        for entry in entries:
            parameter = parameters[entry.name]
            assert tuple(parameter.shape) == entry.shape, (entry.name, tuple(parameter.shape), entry.shape)
            for piece in entry.pieces if entry.owner else ():
                owned = OwnedSlice(index[piece.hf_name], piece.hf_slices, parameter, piece.local_slices)
                self._slices[piece.hf_name].append(owned)

    def owned(self) -> list[OwnedSlice]:
        """This rank's slices, in the order of the tensors. Over the ranks they tile each tensor exactly once."""
        return [owned for slices in self._slices.values() for owned in slices]

    def metadata(self) -> list[TensorMetadata]:
        """What iteration yields. The same on every rank, without communication."""
        return [TensorMetadata(name, self._dtypes[name], shape) for name, shape in self._shapes.items()]

    @torch.no_grad()
    def write_all(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's slices of each tensor into its target, which has the whole shape. Nothing else is written.

        FP8 weights are written dequantized: the values that the trainer multiplies by.
        """
        values = Values()
        for name, target in targets.items():
            self._write(name, target, values)

    @torch.no_grad()
    def fingerprints(self) -> dict[str, int]:
        """The fingerprint of each tensor as it goes out, on every rank. Each owner sums over its slices. Collective."""
        values = Values()
        sums = torch.zeros(len(self._shapes), dtype=torch.int64, device=self.device)
        for index, name in enumerate(self._shapes):
            for owned in self._slices[name]:
                sums[index] += fingerprint(values.of(owned).to(self._dtypes[name]), owned.box)
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return dict(zip(self._shapes, sums.tolist(), strict=True))

    def _write(self, name: str, target: torch.Tensor, values: Values) -> None:
        for owned in self._slices[name]:
            target[owned.box.slices].copy_(values.of(owned))

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, whole tensor) in the order of `metadata()`, on every rank. A collective per tensor.

        Every rank writes its slices into zeros, and the results are summed. The shard plan's slices tile each tensor
        exactly once over the writers, so each element is one value plus zeros: exact in any dtype and any order of
        summation. No rank needs to know who holds what. It moves about twice the bytes of a broadcast.
        """
        values = Values()
        for name, shape in self._shapes.items():
            tensor = torch.zeros(shape, dtype=self._dtypes[name], device=self.device)
            self._write(name, tensor, values)
            if self.group is not None:
                dist.all_reduce(tensor, group=self.group)
            yield name, tensor


class Values:
    """Values of slices, for one pass over the tensors.

    An FP8 parameter is dequantized whole, because its scales are not by slices, and only once for all tensors that are
    cut from it: they follow each other (query, key and value; gate and up).
    """

    def __init__(self) -> None:
        self._parameter: torch.Tensor | None = None  # the last one in FP8
        self._values: torch.Tensor | None = None

    def of(self, owned: OwnedSlice) -> torch.Tensor:
        values = owned.parameter
        if is_quantized(values):
            if values is not self._parameter:
                self._parameter, self._values = values, values.dequantize()
            values = self._values
        return values[owned.local.slices]
