"""Write a Megatron checkpoint (`torch_dist`) chunk by chunk. Each chunk is read only when it is written."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from rlad_megatron.convert.layout import CheckpointLayout, Chunk, rank_chunks, split_evenly
from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.load import Checkpoint
from rlad_megatron.models.megatron_folder import RELEASE
from rlad_megatron.models.megatron_tensors import Block, model_blocks
from rlad_megatron.models.registry import megatron_fields
from rlad_megatron.models.rules import pieces_in
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.models.torch_dist import COMMON
from rlad_megatron.parallel.loss_memory import padded_vocab_size

# Megatron-LM's arguments that only models with gated delta nets have.
_OF_HYBRIDS = ("attention_output_gate", "experimental_attention", "linear_", "moe_shared_expert")
# Modules with parameters that are not Transformer Engine's.
_NO_EXTRA_STATE = (
    *("word_embeddings", "output_layer", "router", "shared_experts"),
    *("self_attention", "conv1d"),  # of gated delta nets
)


@dataclass(frozen=True)
class File:
    """One `.distcp` file: a part of what one rank of the layout writes."""

    chunks: tuple[Chunk, ...]
    plan: SavePlan  # for torch's writer: an item for each chunk, then the empty extra states


def lay_out_files(
    spec: ModelSpec, layout: CheckpointLayout, dtype_of: Callable[[Chunk], torch.dtype], parts: int
) -> tuple[list[File], Metadata]:
    """Every file of the checkpoint, and the metadata that describes them. The same in every process.

    Each rank of the layout has `parts` files, so that `parts` processes share the work evenly: process p writes
    `files[p::parts]`.
    """
    tp = layout.tensor_parallel
    chunks: list[tuple[Chunk, ...]] = []
    plans: list[SavePlan] = []
    for rank in rank_chunks(spec, layout):
        for run in split_evenly([chunk.box.numel for chunk in rank], parts):
            chunks.append(tuple(rank[i] for i in run))
            plans.append(SavePlan([_tensor_item(chunk, dtype_of(chunk), tp) for chunk in chunks[-1]]))
    plans[0] = replace(plans[0], items=plans[0].items + _extra_states(spec))
    plans, metadata = create_default_global_save_plan(plans)
    plans = FileSystemWriter("unused").prepare_global_plan(plans)  # gives each plan its file name
    return [File(c, p) for c, p in zip(chunks, plans, strict=True)], metadata


def _tensor_item(chunk: Chunk, dtype: torch.dtype, tp: int) -> WriteItem:
    block = chunk.block
    offsets = torch.Size((*block.index, *chunk.box.origin))
    sizes = torch.Size((*[1] * len(block.index), *chunk.box.sizes))
    return WriteItem(
        index=MetadataIndex(block.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size((*block.counts, *block.stored_shape(tp))),
        ),
    )


def _extra_states(spec: ModelSpec) -> list[WriteItem]:
    """Items for the empty objects that Megatron's models look for next to the weights of their modules.

    Each module of Transformer Engine has one for its FP8 scales: linear layers, attention, and norms that are separate
    modules. Megatron refuses a checkpoint that lacks one of its model's; it ignores all others.
    """
    modules: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for block in model_blocks(spec):
        path, _, name = block.module.rpartition(".")
        found = [block.module] if name not in _NO_EXTRA_STATE else []
        if name == "linear_qkv":  # attention itself has an extra state but no parameters
            found.append(f"{path}.core_attention")
        modules |= {(module, block.index or (0,)): block.counts or (1,) for module in found}
    keys = [
        f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, counts))}"
        for (module, index), counts in modules.items()
    ]
    return [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in keys]


def write_file(file: File, folder: Path, source: Checkpoint, on_bytes: Callable[[int], None]) -> list:
    """Write one file; returns what torch's writer needs to write the metadata.

    Args:
        source: where the chunks come from.
        on_bytes: called with the bytes of each chunk.

    Raises:
        CheckpointError: the file system refuses (no space left, ...).
    """
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)  # asks for one chunk at a time, even with CUDA
    planner = _LazyPlanner(file, source, on_bytes)
    try:
        return writer.write_data(file.plan, planner).value()
    except (OSError, RuntimeError) as error:
        refusal = _os_error(error)
        if refusal is None:
            raise
        raise CheckpointError(
            f"{folder / (file.plan.storage_data.prefix + '0.distcp')}: cannot write tensor {planner.current!r} "
            f"({refusal.strerror}); free some space or choose another folder"
        ) from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The file system's error. torch.save hides it by failing again while it closes its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _LazyPlanner(DefaultSavePlanner):
    """Serves torch's writer item by item, so that one chunk is in memory at a time.

    The writer asks for a chunk after writing the one before, but keeps all of them until the end of the file. So this
    class frees their memory.
    """

    def __init__(self, file: File, source: Checkpoint, on_bytes) -> None:
        super().__init__()
        tensors = [item for item in file.plan.items if item.type != WriteItemType.BYTE_IO]
        self._chunks = {item.index: chunk for item, chunk in zip(tensors, file.chunks, strict=True)}
        self._source, self._on_bytes = source, on_bytes
        self._block: Block | None = None
        self._written = torch.empty(0)
        self.current = ""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        self.current = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        self._written.untyped_storage().resize_(0)
        chunk = self._chunks[write_item.index]
        if chunk.block is not self._block:
            self._source.release()
            self._block = chunk.block
        self._written = assemble(chunk, self._source, write_item.tensor_data.properties.dtype)
        self._on_bytes(self._written.nbytes)
        return self._written.view(write_item.tensor_data.chunk.sizes)


def assemble(chunk: Chunk, source: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """A chunk, made of parts of Hugging Face tensors; vocabulary padding is zeros."""
    tensor = None
    for piece in pieces_in(chunk.box, chunk.block.pieces):
        part = source.read(piece.hf_name, piece.hf_slices)
        if tensor is None:  # only now: reading may take twice the memory of what is read
            tensor = torch.zeros(chunk.box.sizes, dtype=dtype)
        target = tensor[piece.local_slices.slices]
        target.copy_(part)
        check_values(target, part, piece.hf_name, source)
    if tensor is not None and chunk.block.offset:
        tensor += chunk.block.offset  # of a norm; its dtype was chosen so that this is exact
    return torch.zeros(chunk.box.sizes, dtype=dtype) if tensor is None else tensor  # a rank may hold only padding


def check_values(tensor: torch.Tensor, read: torch.Tensor, name: str, source: Checkpoint) -> None:
    """Raise CheckpointError if a written tensor is not finite, as it was read or because float16 ends at 65,504.

    read: the tensor in the source's dtype.
    """
    if is_finite(tensor):
        return
    check_finite(read, name, source)
    raise CheckpointError(
        f"{source.path}: tensor {name!r} has values that float16 cannot hold; choose --dtype bfloat16 or float32"
    )


def check_finite(tensor: torch.Tensor, name: str, source: Checkpoint) -> None:
    if not is_finite(tensor):
        raise CheckpointError(
            f"{source.path}: tensor {name!r} has NaN or infinite values; take a checkpoint from before the model "
            "diverged, or copy it again"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    # isfinite of the whole tensor would take memory. The extremes of one with a NaN are NaN.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def write_rest(
    folder: Path, metadata: Metadata, results: list[list], spec: ModelSpec, layout: CheckpointLayout, step: str
) -> None:
    """Write the files that make the chunks a checkpoint: `.metadata`, `common.pt` and `metadata.json`."""
    FileSystemWriter(folder).finish(metadata, results)
    iteration = 0 if step == RELEASE else int(step)
    common = {"checkpoint_version": 3.0, "iteration": iteration, "args": megatron_args(spec, layout, iteration)}
    torch.save(common, folder / COMMON)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))


def megatron_args(spec: ModelSpec, layout: CheckpointLayout, iteration: int) -> Namespace:
    """The model and the layout under Megatron-LM's argument names; it reads them from a checkpoint."""
    fields, rope = megatron_fields(spec), spec.rope
    return Namespace(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        group_query_attention=spec.num_kv_heads != spec.num_heads,
        kv_channels=spec.head_dim,
        seq_length=spec.max_position_embeddings,
        max_position_embeddings=spec.max_position_embeddings,
        position_embedding_type="yarn" if rope.rope_type == "yarn" else "rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=rope.rope_theta,
        rotary_percent=rope.share,
        rotary_interleaved=False,
        use_rope_scaling=rope.rope_type == "llama3",
        rope_scaling_factor=dict(rope.scaling).get("factor", 1.0),
        normalization="RMSNorm",
        norm_epsilon=spec.rms_norm_eps,
        apply_layernorm_1p=fields.get("layernorm_zero_centered_gamma", False),
        apply_query_key_layer_scaling=False,
        add_bias_linear=False,
        add_qkv_bias=fields.get("add_qkv_bias", False),
        qk_layernorm=fields.get("qk_layernorm", False),
        swiglu=True,
        squared_relu=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not spec.tied,
        vocab_size=spec.vocab_size,
        make_vocab_size_divisible_by=128,
        padded_vocab_size=padded_vocab_size(spec.vocab_size, layout.tensor_parallel),
        num_experts=spec.num_experts or None,
        moe_ffn_hidden_size=spec.expert_ffn_size or None,
        moe_router_topk=fields.get("moe_router_topk", 2),
        moe_router_pre_softmax=fields.get("moe_router_pre_softmax", False),
        moe_router_load_balancing_type="none",
        moe_layer_freq=1,
        **{name: value for name, value in fields.items() if name.startswith(_OF_HYBRIDS)},
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert_parallel,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        iteration=iteration,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
