"""The tree: what a run is defined by, with its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rlad_megatron.config.objectives import OBJECTIVES


@dataclass(frozen=True)
class LayoutConfig:
    """How one model is cut over the ranks. Data parallelism takes what is left of the world."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False  # between the cut layers each tensor-parallel rank holds its share of the tokens

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True)
class Fp8Config:
    """FP8 products in the layers of a model (docs/precision.md). Embedding, head, norms and attention stay as they are.

    A teacher with a recipe keeps the weights of its layers in FP8 and nowhere else.
    """

    recipe: str = "none"  # none | delayed | tensorwise | blockwise | mxfp8
    format: str = "hybrid"  # hybrid (e4m3 forward, e5m2 for gradients) | e4m3 (both)
    amax_history_len: int = 1024  # delayed: steps whose largest value sets the scale
    amax_compute: str = "max"  # delayed: max (of the history) | most_recent
    param_gather: bool = False  # student: keep the layers' weights in FP8, and gather them as such
    first_last_layers_bf16: bool = False  # leave the first and the last layer out

    @property
    def enabled(self) -> bool:
        return self.recipe != "none"


@dataclass(frozen=True)
class ModelConfig:
    """A model to load: a Hugging Face folder, and how to hold it."""

    path: str = ""  # folder with config.json, *.safetensors and the tokenizer's files
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    precision: str = "bf16"  # bf16 | fp16 | fp32
    transformer_impl: str = "auto"  # auto | transformer_engine | local; auto: local on CPUs and in fp32
    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The frozen teacher, which only scores: on the trainer's ranks, or on ranks of its own."""

    offload: bool = False  # the weights rest in the host's memory while it does not score
    ranks_per_node: int = 0  # ranks of its own on each node that has it; 0: it is on the trainer's ranks
    nodes: int = 0  # nodes of its own for those ranks; 0: they are on the trainer's nodes


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised (docs/method.md)."""

    name: str = "trrd"  # trrd | grpo | kdrl | on_policy_kl | cross_entropy
    alpha: float = 0.5  # trrd: 1 is GRPO, 0 anchors on the teacher alone
    teacher_clamp: float = 1.0  # trrd: c of eq. 3, in nats
    eps_low: float = 0.20  # clip range below 1
    eps_high: float = 0.28  # clip range above 1
    kl_coefficient: float = 2e-3  # kdrl: weight of the reverse KL to the teacher
    aggregation: str = "sequence_mean"  # sequence_mean (mean over responses of mean over tokens) | token_mean
    mismatch_correction: str = "none"  # none | truncated_is | icepop
    mismatch_cap: float = 2.0  # truncated_is: upper bound of the weight; icepop: keep within [1/cap, cap]


@dataclass(frozen=True)
class LossConfig:
    """How the loss is computed; the result is the same."""

    fused: bool = True  # straight from hidden states in chunks of tokens; false: from the logits of all of them
    memory_mb: int = 1024  # budget for the logits of a chunk


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how they are rendered."""

    source: str = "knights_and_knaves"  # knights_and_knaves | path of a JSONL file with "prompt" and "answer"
    eval_source: str = ""  # JSONL for evaluation; empty: the source's own held-out part
    people: tuple[int, ...] = (2,)  # knights_and_knaves: numbers of people, PPL2 .. PPL8
    depth: int = 2  # knights_and_knaves: nesting of statements
    width: int = 2  # knights_and_knaves: operands of "and" and "or"
    prompt_style: str = "chat"  # chat (the tokenizer's chat template) | plain (the text as it is)
    train_size: int = 4096  # distinct training puzzles of each number of people
    eval_size: int = 256  # distinct held-out puzzles, over all numbers of people
    reward: str = "knights_and_knaves"  # knights_and_knaves | math | module:function
    seed: int = 0


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048  # response tokens at most


@dataclass(frozen=True)
class RolloutConfig:
    """The vLLM servers and what is asked of them."""

    group_size: int = 8  # responses to each prompt
    prompts_per_step: int = 32
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    servers: int = 1  # servers that the run starts by itself
    nodes: int = 0  # nodes of their own for the servers; 0: they are on the trainer's nodes
    colocate: bool = False  # the servers share the GPUs of the trainer's ranks
    urls: tuple[str, ...] = ()  # servers that somebody else started; then `servers` is not used
    port: int = 8377  # first port of own servers; server i listens on port + i, on 127.0.0.1
    tensor_parallel: int = 1  # of each server
    dtype: str = "bfloat16"  # bfloat16 | float16 | float32
    weight_transfer: str = "auto"  # auto | shared_memory | nccl | ipc; auto: by devices (servers/transfer/choice.py)
    sleep_level: int = 2  # of colocated servers while the trainer works: 0 awake, 1 weights on the host, 2 nothing kept
    max_concurrency: int = 256  # requests in flight at each server
    gpu_memory_utilization: float = 0.9
    kv_cache_gb: float = 1.0  # CPU servers: size of the KV cache
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    max_restarts: int = 3  # of each server in a run, before the run gives up
    probe_bound: float = 0.1  # largest |log-prob difference| of the decode probe after a sync, in nats; float32: 1e-3


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with Megatron's distributed optimizer."""

    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"  # constant | linear | cosine
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    precision_aware: bool = False  # Transformer Engine's Adam holds the master copy, as what bf16 lacks of float32
    moments: str = "fp32"  # fp32 | bf16 (with precision_aware)
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather weights while the next update's forward goes on
    offload: float = 0.0  # share of the parameters whose state and update are on the host


@dataclass(frozen=True)
class TrainConfig:
    """The trainer."""

    steps: int = 100
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 8  # of every node, the teacher's and servers' too; 0: a run on CPUs
    gpu_memory_gb: float = 80.0  # of each GPU, in GB of 1e9 bytes; what `rlad plan` fills
    updates_per_rollout: int = 1  # optimizer updates on each batch of rollouts
    microbatch_tokens: int = 8192  # packing budget; a longer sample gets a micro-batch of its own
    recompute: str = "none"  # none | selective | full: activations that backward makes anew instead of keeping them
    max_skipped_steps: int = 3  # non-finite steps in a row before the run stops
    distributed_timeout_s: float = 1800.0
    seed: int = 0

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class SftConfig:
    """`rlad sft`: cross-entropy on traces."""

    traces: str = ""  # JSONL with "prompt" and "response"; empty: gold traces of the data source
    batch_size: int = 32  # traces of an update


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out prompts."""

    every: int = 10  # steps; 0: only before and after
    samples: int = 1  # K of Mean@K and Pass@K
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6, top_p=0.95))
    teacher: bool = False  # also evaluate the teacher, once, before training


@dataclass(frozen=True)
class CheckpointConfig:
    """Megatron distributed checkpoints in the run folder."""

    every: int = 50  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept
    export_hf: bool = True  # write the student in Hugging Face format at the end
    export_precision: str = "bf16"  # bf16 | fp32


@dataclass(frozen=True)
class ObserveConfig:
    """What a run leaves behind to look at."""

    tensorboard: bool = True
    wandb_project: str = ""  # empty: no W&B
    rollouts_per_step: int = 8  # rollouts written to rollouts/ each step


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; resolved and saved as `config.yaml` in the run folder."""

    name: str = "run"
    runs_dir: str = "runs"
    models_dir: str = "models"  # recipes name model folders in it as ${models_dir}/NAME
    resume: bool = False
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def generates(self) -> bool:
        """Whether the run samples from rollout servers; fine-tuning on traces does not."""
        return self.objective.name != "cross_entropy"

    @property
    def models(self) -> list[tuple[str, ModelConfig]]:
        """The models by their fields' names; the teacher only where there is one."""
        teacher = [("teacher", self.teacher)] if self.needs_teacher or self.eval.teacher else []
        return [("student", self.student), *teacher]

    @property
    def needs_teacher(self) -> bool:
        return OBJECTIVES[self.objective.name].needs_teacher

    @property
    def teacher_is_dedicated(self) -> bool:
        """Whether the teacher has ranks of its own, in a world of their own."""
        return self.needs_teacher and self.teacher.ranks_per_node > 0

    @property
    def teacher_world_size(self) -> int:
        """Ranks that hold the teacher: its own, or the trainer's."""
        if not self.teacher_is_dedicated:
            return self.train.world_size
        return (self.teacher.nodes or self.train.nodes) * self.teacher.ranks_per_node
