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


# What takes a device. A TorchFunctionMode would be simpler, but it slows every operation of a run.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("scalar_tensor", "tensor", "zeros"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like"),
)


def _on_cpu(function: Callable) -> Callable:
    """The function, with a CUDA device replaced by the CPU."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call


def _install_tensors() -> None:
    """Make `device="cuda"` and `.cuda()` mean the CPU, and `Tensor.type()` answer what Megatron's optimizer expects."""
    # torch lists, once, the functions that such a context acts on. Ours call those, so they have to be listed first.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    to, type_ = _on_cpu(torch.Tensor.to), torch.Tensor.type

    def to_cpu(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return to(self, *args, **kwargs)

    def cuda_type(self, *args, **kwargs):
        if args or kwargs:
            return type_(self, *args, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to, torch.Tensor.type = to_cpu, cuda_type
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self


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
    _install_tensors()  # before Megatron-Core's own imports, which keep some of these functions

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
