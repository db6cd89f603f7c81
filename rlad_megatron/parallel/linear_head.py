"""The output layer of a model as the fused loss takes it, and the checks of its input.

Shape letters: T tokens with loss, H hidden size, V' rows of this rank's shard of the padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlad_megatron.parallel.loss_memory import padded_vocab_size


@dataclass(frozen=True)
class LinearHead:
    """The output layer and its sharding.

    weight_VH: [V', H], this rank's shard of the padded vocabulary; bf16, fp16 or fp32, as the hidden states.
    vocab_size: real rows over the whole group. group: the tensor-parallel group; None is one process.
    temperature: divides the logits. chunk_tokens: tokens whose logits are held at a time.
    """

    weight_VH: torch.Tensor
    vocab_size: int
    group: dist.ProcessGroup | None
    temperature: float
    chunk_tokens: int

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def num_real(self) -> int:
        """Rows of this rank's shard that are not padding."""
        rows = self.weight_VH.shape[0]
        return min(max(self.vocab_size - self.rank * rows, 0), rows)


def check_inputs(hidden_TH: torch.Tensor, target_T: torch.Tensor, head: LinearHead) -> None:
    """Raise the ValueErrors of `fused_linear_loss`."""
    weight_VH, ranks = head.weight_VH, head.ranks
    if hidden_TH.dim() != 2 or not hidden_TH.is_floating_point():
        raise ValueError(
            f"hidden_TH must be a floating-point [T, H] tensor, got {hidden_TH.dtype} {tuple(hidden_TH.shape)}"
        )
    if weight_VH.dim() != 2 or weight_VH.shape[1] != hidden_TH.shape[1] or weight_VH.dtype != hidden_TH.dtype:
        raise ValueError(
            f"weight_VH must be {hidden_TH.dtype} [V', {hidden_TH.shape[1]}] as hidden_TH, "
            f"got {weight_VH.dtype} {tuple(weight_VH.shape)}"
        )
    if head.vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {head.vocab_size}")
    rows = padded_vocab_size(head.vocab_size, ranks) // ranks
    if weight_VH.shape[0] != rows:
        raise ValueError(
            f"weight_VH of {weight_VH.shape[0]} rows is not the shard of a padded vocabulary: of vocab_size "
            f"{head.vocab_size} each of {ranks} ranks has {rows} rows"
        )
    if not head.temperature > 0:
        raise ValueError(f"temperature must be above 0, got {head.temperature}")
    if head.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {head.chunk_tokens}")
    if target_T.dtype != torch.int64 or target_T.shape != hidden_TH.shape[:1]:
        raise ValueError(
            f"target_T must be int64 of shape [{hidden_TH.shape[0]}], got {target_T.dtype} {tuple(target_T.shape)}"
        )
    if target_T.device.type == "cpu" and target_T.numel() > 0:  # on a GPU the check would make the host wait
        low, high = target_T.aminmax()
        if low < 0 or high >= head.vocab_size:
            raise ValueError(f"target_T must be in [0, {head.vocab_size}), got values from {low} to {high}")
