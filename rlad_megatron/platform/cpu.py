"""Megatron-Core on a machine without CUDA.

Megatron-Core addresses its device as "cuda" throughout. `install()` makes the few functions that it calls answer for
the CPU. Nothing here computes: models, schedules, optimizer and checkpoints are Megatron's own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

# Warnings of Megatron-Core and torch on every rank of such a machine, which no one can act on.
_EXPECTED_WARNINGS = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    ".*CUDA_DEVICE_MAX_CONNECTIONS",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
)


class _Stream:
    """A stream of a device that runs everything in order, so that waiting is a no-op."""

    def __init__(self, *_args, **_kwargs) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, _stream) -> None: ...

    def wait_event(self, _event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event=None):
        return event or _Event()


class _Event:
    def __init__(self, *_args, **_kwargs) -> None: ...

    def record(self, _stream=None) -> None: ...

    def wait(self, _stream=None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


_REWRITTEN = frozenset({torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type})


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects `device="cuda"` and `.cuda()` to the CPU; `Tensor.type()` answers what Megatron's optimizer expects."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _REWRITTEN and "device" not in kwargs:  # the fast path: this runs for every operation
            return func(*args, **kwargs)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


@functools.cache
def install() -> None:
    """Make Megatron-Core's CUDA calls answer for the CPU for the lifetime of this process. Idempotent."""
    assert not torch.cuda.is_available()
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # torch for CUDA says that there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # torch.optim imports this lazily, and its import inspects the functions replaced below.
    importlib.import_module("torch._dynamo")

    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.device_count = lambda: 0
    cuda.set_device = lambda *_args, **_kwargs: None
    cuda.synchronize = lambda *_args, **_kwargs: None
    cuda.empty_cache = lambda *_args, **_kwargs: None
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.current_stream = lambda *_: _Stream()
    cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)

    # Megatron-Core compiles small fused functions on import; on CPU that costs minutes and gains nothing.
    torch.compile = lambda model=None, **_kwargs: model if model is not None else (lambda fn: fn)

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    _install_uneven_collectives()
    from megatron.core.transformer.moe import token_dispatcher

    # Megatron's own converts only what it moves, and torch takes no tensors as the sizes of an all-to-all.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **_kwargs: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    _CudaMeansCpu().__enter__()


def use_gated_delta_kernels(l2norm: Callable, causal_conv1d: Callable, chunk_gated_delta_rule: Callable) -> None:
    """Give Megatron-Core's gated delta nets these functions in place of flash-linear-attention's, which need a GPU."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    common.HAVE_FLA, common.l2norm = True, l2norm
    gdn.causal_conv1d, gdn.chunk_gated_delta_rule = causal_conv1d, chunk_gated_delta_rule


def _install_uneven_collectives() -> None:
    """Gather and reduce-scatter parts of different lengths, which gloo lacks. Ranks get unequal shares of the tokens
    for an expert.
    """
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    gather_even, reduce_even = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(part: torch.Tensor, group: dist.ProcessGroup, sizes=None, use_global_buffer=False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather_even(part, group, sizes, use_global_buffer)
        padded = part.new_zeros(max(1, *sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter(whole: torch.Tensor, group: dist.ProcessGroup, sizes=None, use_global_buffer=False):
        if sizes is None or group.size() == 1:
            return reduce_even(whole, group, sizes, use_global_buffer)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter
