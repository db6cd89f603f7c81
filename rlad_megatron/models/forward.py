"""Run packed samples through a Megatron model, and score given tokens with it.

Shape letters: T positions of a micro-batch, N positions with loss, H hidden size, R response tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model

from rlad_megatron import platform
from rlad_megatron.config import LossConfig
from rlad_megatron.data.packing import pack
from rlad_megatron.models.build import HiddenStatesModel
from rlad_megatron.models.head import Head
from rlad_megatron.models.router_replay import replayed, stop_replay
from rlad_megatron.parallel.context import join
from rlad_megatron.parallel.groups import ModelGroups
from rlad_megatron.types import Microbatch, Sample


def to_device(microbatch: Microbatch) -> Microbatch:
    """Everything but the segment starts, the experts and the losses' places in the whole, which are read on the CPU.

    Asynchronous: a blocking copy would wait for all queued work of earlier micro-batches.
    """
    move = partial(torch.Tensor.to, device=platform.device(), non_blocking=True)
    return replace(
        microbatch,
        tokens=move(microbatch.tokens),
        positions=move(microbatch.positions),
        loss_positions=move(microbatch.loss_positions),
        targets=move(microbatch.targets),
        per_token=microbatch.per_token.to(platform.device()),
    )


def packed_seq_params(segment_starts: torch.Tensor, transformer_impl: str) -> PackedSeqParams:
    """The segments of a packed sequence, as Megatron's layers take them. Each segment attends only to itself.

    segment_starts: int32 [S + 1] on the CPU (types.Microbatch). Local layers read it there, Transformer Engine's
    kernels on the device. Under context parallelism it describes the whole sequence, as the layers expect. The padding
    at a sample's end counts as its tokens, so `cu_seqlens_q_padded`, with which Transformer Engine would attend around
    it, is not needed.
    """
    longest = int(segment_starts.diff().max())
    if transformer_impl != "local":
        segment_starts = segment_starts.to(platform.device(), non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=segment_starts,
        cu_seqlens_kv=segment_starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    groups: ModelGroups,
    microbatches: list[Microbatch],
    on_hidden: Callable[[torch.Tensor, Microbatch], object],
    *,
    forward_only: bool,
) -> list:
    """Run micro-batches through the pipeline with Megatron's schedule.

    chunks: this rank's part of the model (models/build.py:build_model), also under DDP. The number of micro-batches is
    a multiple of `groups.microbatch_multiple`.
    `on_hidden(hidden_NH, microbatch)` runs on the last stage, with the hidden states of the positions that carry loss.
    In a training pass it returns Megatron's (loss, number of tokens, report) triple, otherwise any report.
    Returns the reports on the last stage, an empty list elsewhere.
    """

    def step(iterator: Iterator[Microbatch], chunk: torch.nn.Module):
        microbatch = to_device(next(iterator))
        gpt: HiddenStatesModel = unwrap_model(chunk)
        packed = packed_seq_params(microbatch.segment_starts, gpt.config.transformer_impl)
        with replayed(gpt, microbatch.experts, groups.tp):
            output = chunk(microbatch.tokens, microbatch.positions, None, packed_seq_params=packed)

        def finish(hidden_T1H: torch.Tensor, non_loss_data: bool = False):
            if gpt.config.sequence_parallel:
                hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, group=groups.tp)
            return on_hidden(hidden_T1H[:, 0].index_select(0, microbatch.loss_positions), microbatch)

        return output, finish

    models = unwrap_model(list(chunks))
    config = models[0].config
    interleaved = config.virtual_pipeline_model_parallel_size
    schedule = get_forward_backward_func(pp_size=groups.pp_size, vp_size=interleaved)
    reports = schedule(
        forward_step_func=step,
        data_iterator=[iter(microbatches) for _ in chunks] if interleaved else iter(microbatches),
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=0,  # unused with `variable_seq_lengths` (models/build.py)
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        pg_collection=groups.collection,
        p2p_communicator=P2PCommunicator(pp_group=groups.collection.pp, config=config),
    )
    stop_replay(models)
    return reports


@torch.no_grad()
def score_samples(
    chunks: Sequence[torch.nn.Module],
    groups: ModelGroups,
    samples: list[Sample],
    *,
    vocab_size: int,
    temperature: float,
    budget_tokens: int,
    token_multiple: int,
    loss: LossConfig,
    computed: Callable[[], None] = lambda: None,
) -> list[torch.Tensor]:
    """Log-probs of every response token of every sample under the model.

    Collective over all ranks. Every rank gets the result, in any layout. computed: called when this rank has computed
    its share, before it waits for the others.

    Returns:
        For each sample float32 [R] on the CPU, in nats.
    """
    microbatches = pack(
        samples,
        budget_tokens=budget_tokens,
        multiple=token_multiple,
        count_multiple=groups.microbatch_multiple,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        cp_rank=groups.cp_rank,
        cp_size=groups.cp_size,
    )
    head = Head(unwrap_model(chunks[-1]), groups, vocab_size, temperature, loss)
    reports = run_schedule(
        chunks,
        groups,
        microbatches,
        lambda hidden_NH, microbatch: head.log_probs(hidden_NH, microbatch.targets),
        forward_only=True,
    )
    computed()
    lengths = [sample.response_length for sample in samples]
    # One rank writes each token, so a sum over the world gives every rank everything.
    flat = torch.zeros(sum(lengths), dtype=torch.float32, device=platform.device())
    of_sample = list(flat.split(lengths))
    if groups.reports:
        for microbatch, log_probs_N in zip(microbatches, reports, strict=True):
            join(log_probs_N, microbatch, of_sample)
    dist.all_reduce(flat)
    return list(flat.cpu().split(lengths))
