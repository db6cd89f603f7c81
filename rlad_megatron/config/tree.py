"""The configuration of a run, declared once: each field's type, range or choices, default and description."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic.dataclasses import dataclass

from rlad_megatron.config.fields import (
    CHECKED,
    AtLeastOne,
    Columns,
    Count,
    Flag,
    FolderName,
    NonNegative,
    NonNegativeInt,
    ObjectiveName,
    People,
    Port,
    Positive,
    PositiveShare,
    Ranks,
    RecomputeModules,
    Share,
    SleepLevel,
    Steps,
    Template,
    TemplateKwargs,
    Text,
    Urls,
    doc,
)
from rlad_megatron.config.objectives import OBJECTIVES

TRANSFORMER_ENGINE: Final = "transformer_engine"
PHASED: Final = "phased"
STREAMING: Final = "streaming"
AHEAD: Final = "ahead"
Precision = Annotated[
    Literal["bf16", "fp16", "fp32"], "must be bf16, fp16 or fp32; for FP8 use precision=bf16 with fp8.recipe=RECIPE"
]


@dataclass(frozen=True, config=CHECKED)
class LayoutConfig:
    """How one model and its tokens are split over ranks. Data parallelism takes the rest of the world size."""

    tensor_parallel: Count = doc(1, "split each layer's matrices over so many ranks")
    pipeline_parallel: Count = doc(1, "stages of layers, each on other ranks")
    sequence_parallel: Flag = doc(False, "split the tokens between tensor-parallel layers over the ranks")
    context_parallel: Count = doc(1, "split the tokens of each sequence over so many copies of the model")
    cp_comm_type: Literal["p2p", "a2a", "all_gather"] = doc(
        "p2p", "what attention sends under context_parallel: keys and values around a ring, heads, or keys and values"
    )
    virtual_pipeline: Count = doc(1, "chunks of layers on each pipeline stage, dealt round-robin")
    first_stage_layers: NonNegativeInt = doc(0, "layers of the first pipeline stage; 0: its share")
    last_stage_layers: NonNegativeInt = doc(0, "layers of the last pipeline stage; 0: its share")
    expert_parallel: Count = doc(1, "ranks over which a layer's experts are dealt")
    expert_tensor_parallel: NonNegativeInt = doc(0, "ranks over which one expert is split; 0: tensor_parallel")

    @property
    def text(self) -> str:
        """The sizes, as in "TP 4 PP 1 CP 2"; of those that are rarely set, the ones that are."""
        sizes = {"CP": self.context_parallel, "VPP": self.virtual_pipeline, "EP": self.expert_parallel}
        others = "".join(f" {name} {size}" for name, size in sizes.items() if size > 1)
        others += f" ETP {self.expert_tensor_parallel}" * (self.expert_tensor_parallel > 0)
        return f"TP {self.tensor_parallel} PP {self.pipeline_parallel}{others}"

    @property
    def copy_ranks(self) -> int:
        """Ranks that hold one copy of the model; its experts may be shared out over ranks of several copies."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def model_ranks(self) -> int:
        """Ranks that compute a micro-batch together."""
        return self.copy_ranks * self.context_parallel

    @property
    def experts_tensor_parallel(self) -> int:
        """`expert_tensor_parallel`, as a size."""
        return self.expert_tensor_parallel or self.tensor_parallel

    def expert_data_parallel(self, data_parallel: int) -> int:
        """Ranks that hold the same part of the experts, for so many copies of the rest of the model."""
        return data_parallel * self.tensor_parallel // (self.experts_tensor_parallel * self.expert_parallel)


@dataclass(frozen=True, config=CHECKED)
class Fp8Config:
    """FP8 matrix products in a model's layers (docs/precision.md). Embedding, head, norms and attention are not in FP8.

    A teacher with an FP8 recipe keeps its layers' weights in FP8 only.
    """

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = doc(
        "none", "how the scales of FP8 products are set; none: no FP8"
    )
    format: Literal["hybrid", "e4m3"] = doc("hybrid", "hybrid: e4m3 forward, e5m2 for gradients; e4m3: both")
    amax_history_len: Count = doc(1024, "delayed: number of steps whose maximum sets the scale")
    amax_compute: Literal["max", "most_recent"] = doc("max", "delayed: which value of the history")
    param_gather: Flag = doc(False, "student: keep the layers' weights in FP8 and all-gather them in FP8")
    first_last_layers_bf16: Flag = doc(False, "keep the first and last layer in bf16")

    @property
    def enabled(self) -> bool:
        return self.recipe != "none"


@dataclass(frozen=True, config=CHECKED)
class ModelConfig:
    """A model to load, and how to hold it."""

    path: Text = doc("", "folder with config.json, *.safetensors and the tokenizer files")
    layout: LayoutConfig = LayoutConfig()
    precision: Precision = doc("bf16", "of weights and arithmetic; the student's master weights are float32")
    transformer_impl: Literal["auto", "transformer_engine", "local"] = doc("auto", "auto: local on CPUs and in fp32")
    fp8: Fp8Config = Fp8Config()


@dataclass(frozen=True, config=CHECKED)
class TeacherConfig(ModelConfig):
    """The frozen teacher, which only scores tokens. It shares the trainer's ranks or has dedicated ones."""

    offload: Flag = doc(False, "keep the weights in host memory between scoring passes")
    ranks_per_node: NonNegativeInt = doc(0, "dedicated ranks on each of its nodes; 0: it shares the trainer's ranks")
    nodes: NonNegativeInt = doc(0, "dedicated nodes for those ranks; 0: they are on the trainer's nodes")


@dataclass(frozen=True, config=CHECKED)
class ObjectiveConfig:
    """What is optimized (docs/method.md)."""

    name: ObjectiveName = doc("trrd", f"one of {', '.join(OBJECTIVES)}")
    alpha: Share = doc(0.5, "trrd: 1 is GRPO, 0 anchors on the teacher only")
    teacher_clamp: Positive = doc(1.0, "trrd, distilled_rl: bound on the gap to the teacher, in nats")
    eps_low: Share = doc(0.20, "clip range below 1")
    eps_high: NonNegative = doc(0.28, "clip range above 1")
    kl_coefficient: NonNegative = doc(2e-3, "kdrl: weight of the reverse KL to the teacher")
    ratio: Literal["token", "sequence"] = doc("token", "of pi_S to pi_old; sequence: of whole responses (GSPO)")
    entropy_coefficient: NonNegative = doc(0.0, "weight of an entropy bonus; with entropy_target, of the first one")
    entropy_target: NonNegative = doc(0.0, "nats below which the bonus acts and grows (Skywork-OR1); 0: it is constant")
    entropy_step: Positive = doc(5e-3, "with entropy_target: what an update changes the weight by")
    reference_kl: NonNegative = doc(0.0, "weight of the KL to the starting student (k3); 0: none")
    reference_drift: Flag = doc(False, "measure the KL to the starting student with reference_kl=0 too")
    reference_offload: Flag = doc(False, "keep the starting student in host memory between its passes")
    advantage_std: Flag = doc(True, "divide advantages by the std of their group; false: Dr. GRPO")
    aggregation: Literal["sequence_mean", "token_mean", "fixed_length"] = doc(
        "sequence_mean", "sequence_mean: mean of token means; fixed_length: of token sums over max_tokens (Dr. GRPO)"
    )
    dynamic_sampling: NonNegativeInt = doc(
        0, "most groups to sample in a step: those with equal rewards are replaced (DAPO); 0: none is"
    )
    overlong_buffer: NonNegativeInt = doc(0, "last tokens up to max_tokens, over which the reward falls by 1 (DAPO)")
    overlong_filter: Flag = doc(False, "responses that were cut off carry no loss (DAPO)")
    mismatch_correction: Literal["none", "truncated_is", "icepop"] = doc("none", "for pi_old / sampler ratios")
    mismatch_cap: AtLeastOne = doc(2.0, "truncated_is: largest weight; icepop: keep ratios in [1/cap, cap]")

    @property
    def drops_zero_advantage(self) -> bool:
        """Whether a group with equal rewards is not trained on: it has no gradient, or another group replaces it."""
        traits = OBJECTIVES[self.name]
        return (traits.drops_zero_advantage and not self.reference_kl) or (
            traits.needs_advantage and self.dynamic_sampling > 0
        )


@dataclass(frozen=True, config=CHECKED)
class LossConfig:
    """How the loss is computed. The result does not depend on it."""

    fused: Flag = doc(True, "from hidden states, in chunks of tokens; false: from the logits of all tokens at once")
    memory_mb: Count = doc(2048, "most memory for one chunk's logits; no chunk has more than 8,192 tokens")


@dataclass(frozen=True, config=CHECKED)
class DataConfig:
    """Where prompts come from and how they are rendered."""

    source: Text = doc("knights_and_knaves", "knights_and_knaves, a preset, files, or hf:OWNER/NAME[:CONFIG][:SPLIT]")
    eval_source: Text = doc("", "the same for evaluation; empty: held-out prompts of the source")
    columns: Columns = doc({}, "of files and hf: the columns of prompt, answer, subset, id, and of what a reward needs")
    template: Template = doc("", "text around a question, with {prompt} where it goes; empty: the preset's, or none")
    people: People = doc((2,), "knights_and_knaves: numbers of people, PPL2 to PPL8")
    depth: Count = doc(2, "knights_and_knaves: nesting of statements")
    width: Count = doc(2, 'knights_and_knaves: operands of "and" and "or"')
    prompt_style: Literal["chat", "plain"] = doc("chat", "chat: the tokenizer's chat template; plain: the text as is")
    chat_template_kwargs: TemplateKwargs = doc({}, "what the chat template takes, for example {enable_thinking: false}")
    train_size: Count = doc(4096, "distinct training puzzles for each number of people")
    eval_size: NonNegativeInt = doc(256, "distinct held-out puzzles, over all numbers of people")
    max_prompt_tokens: NonNegativeInt = doc(0, "drop prompts and traces with more; 0: those that do not fit a model")
    reward: Text = doc("auto", "auto: the source's; knights_and_knaves, math, math_lenient, or module:function")
    reward_workers: NonNegativeInt = doc(0, "processes that score; 0: one for each core of rank 0's share of the host")
    reward_timeout_s: Positive = doc(30.0, "time limit of a response; a worker that exceeds it is killed and replaced")
    on_reward_error: Literal["stop", "zero"] = doc("stop", "if the reward fails on a response: end the run, or score 0")
    seed: NonNegativeInt = doc(0, "of the generated puzzles")

    def __hash__(self) -> int:
        return hash((self.source, self.eval_source, self.seed))  # mappings have none


@dataclass(frozen=True, config=CHECKED)
class SamplingConfig:
    """How tokens are sampled."""

    temperature: NonNegative = doc(1.0, "0: always the likeliest token")
    top_p: PositiveShare = doc(1.0, "sample from the likeliest tokens with this share of the probability")
    max_tokens: Count = doc(2048, "longest response")


@dataclass(frozen=True, config=CHECKED)
class RolloutConfig:
    """The vLLM servers and the rollouts they generate."""

    group_size: Count = doc(8, "responses per prompt")
    prompts_per_step: Count = doc(32, "prompts of a step; times group_size: responses")
    sampling: SamplingConfig = SamplingConfig()
    schedule: Literal["auto", "phased", "streaming", "ahead"] = doc(
        "auto", "docs/schedules.md; auto: streaming if servers have dedicated GPUs, else phased"
    )
    ahead: Count = doc(1, "schedule=ahead: steps whose rollouts begin before this step's update")
    overprovision: NonNegativeInt = doc(0, "more prompts to begin in a step; the slowest wait for a later one")
    servers: Count = doc(1, "servers that the run starts")
    nodes: NonNegativeInt = doc(0, "dedicated nodes for the servers; 0: they are on the trainer's nodes")
    colocate: Flag = doc(False, "servers share the GPUs of the trainer's ranks")
    urls: Urls = doc((), "addresses of running servers, used instead of starting any")
    token_file: Text = doc("", "file with the secret that rollout.urls ask for (docs/security.md); empty: none")
    port: Port = doc(8377, "first port; server i listens on port + i of 127.0.0.1")
    tensor_parallel: Count = doc(1, "of each server")
    dtype: Literal["bfloat16", "float16", "float32"] = doc("bfloat16", "of the servers' weights and arithmetic")
    weight_transfer: Literal["auto", "shared_memory", "collective", "ipc"] = doc("auto", "docs/servers.md")
    weight_bucket_mb: Positive = doc(256.0, "MB in each of the two buffers through which weights travel")
    sleep_level: SleepLevel = doc(2, "colocated servers while ranks train: 0 awake, 1 weights on the host, 2 freed")
    max_concurrency: Count = doc(256, "requests in flight at each server")
    gpu_memory_utilization: PositiveShare = doc(0.9, "share of a GPU that a server takes")
    kv_cache_gb: Positive = doc(1.0, "CPU servers: size of the KV cache")
    startup_timeout_s: Positive = doc(600.0, "how long a server may take to start")
    request_timeout_s: Positive = doc(600.0, "how long a server or a dedicated teacher may take to answer")
    max_restarts: NonNegativeInt = doc(3, "restarts of each server before the run fails")
    router_replay: Flag = doc(False, "a student with experts is trained with those that the servers chose")
    mismatch_factor: AtLeastOne = doc(
        5.0, "end the run if |sampler - trainer| grows to this many times its first level"
    )


@dataclass(frozen=True, config=CHECKED)
class OptimizerConfig:
    """Adam with Megatron's distributed optimizer."""

    lr: Positive = doc(1e-6, "learning rate, after the warm-up")
    min_lr: NonNegative = doc(0.0, "learning rate at the last step, with decay")
    warmup_steps: NonNegativeInt = doc(0, "updates over which lr rises")
    decay: Literal["constant", "linear", "cosine"] = doc("constant", "of lr, to min_lr at the last step")
    beta1: Share = doc(0.9, "Adam's")
    beta2: Share = doc(0.95, "Adam's")
    weight_decay: NonNegative = doc(0.0, "decoupled, as in AdamW")
    clip_grad: NonNegative = doc(1.0, "largest L2 norm of the gradient; 0: not clipped")
    precision_aware: Flag = doc(False, "Transformer Engine's Adam; the master copy is the remainder that bf16 drops")
    moments: Literal["fp32", "bf16"] = doc("fp32", "bf16 needs precision_aware")
    overlap_grad_reduce: Flag = doc(False, "reduce gradients during backward")
    overlap_param_gather: Flag = doc(False, "all-gather weights during the next forward")
    offload: Share = doc(0.0, "share of the parameters that the host updates, with their optimizer state")


@dataclass(frozen=True, config=CHECKED)
class TrainConfig:
    """The trainer."""

    steps: Count = doc(100, "steps of the run, each with rollouts, updates and a push of weights")
    nodes: Count = doc(1, "nodes with ranks of the trainer")
    ranks_per_node: Count = doc(1, "ranks of the trainer, one for each of its GPUs")
    gpus_per_node: NonNegativeInt = doc(8, "of every node, including the teacher's and servers'; 0: run on CPUs")
    gpu_memory_gb: Positive = doc(80.0, "of each GPU, in GB of 1e9 bytes; the budget of `rlad plan`")
    updates_per_rollout: Count = doc(1, "optimizer updates on each batch of rollouts")
    microbatch_tokens: Count = doc(8192, "packing budget, before context_parallel; a longer sample is alone")
    recompute: Literal["none", "selective", "full"] = doc("none", "activations that backward recomputes")
    recompute_layers: NonNegativeInt = doc(0, "full: the first layers of each stage, or of each of its chunks; 0: all")
    recompute_modules: RecomputeModules = doc((), "selective: parts of a layer; empty: mlp, or moe with experts")
    offload_layers: NonNegativeInt = doc(0, "layers whose activations wait for backward in host memory")
    max_skipped_steps: Count = doc(3, "consecutive non-finite steps before the run stops")
    distributed_timeout_s: Positive = doc(1800.0, "how long ranks wait for each other")
    stop_grace_s: NonNegative = doc(60.0, "after Ctrl-C or SIGTERM, for the step at hand; then it is dropped")
    seed: NonNegativeInt = doc(0, "of the order of prompts and of sampling")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, config=CHECKED)
class SftConfig:
    """`rlad sft`: cross-entropy on traces."""

    traces: Text = doc("", 'JSONL file with "prompt" and "response"; empty: gold traces of the data source')
    batch_size: Count = doc(32, "traces per update")


@dataclass(frozen=True, config=CHECKED)
class EvalConfig:
    """Evaluation on held-out prompts."""

    every: NonNegativeInt = doc(10, "steps between evaluations; 0: only before and after")
    samples: Count = doc(1, "K of Mean@K and Pass@K")
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95)
    teacher: Flag = doc(False, "also evaluate the teacher once, before training")


@dataclass(frozen=True, config=CHECKED)
class CheckpointConfig:
    """Megatron distributed checkpoints in the run folder."""

    every: NonNegativeInt = doc(50, "steps between checkpoints; 0: only at the end")
    keep: Count = doc(2, "number of newest checkpoints to keep")
    export_hf: Flag = doc(True, "write the student in Hugging Face format at the end")
    export_precision: Literal["bf16", "fp32"] = doc("bf16", "of that folder's weights")


@dataclass(frozen=True, config=CHECKED)
class ObserveConfig:
    """Logs of a run."""

    tensorboard: Flag = doc(True, "write tensorboard/ too")
    wandb_project: Text = doc("", "empty: no W&B")
    rollouts_per_step: NonNegativeInt = doc(8, "rollouts written to rollouts/ each step")


@dataclass(frozen=True, config=CHECKED)
class ProfileConfig:
    """Traces of torch's profiler, and on CUDA memory snapshots, in the run folder's profile/."""

    steps: Steps = doc((), "steps to profile, for example [3,4]; a profiled step is slower")
    ranks: Ranks = doc((), "the trainer's ranks that write a trace; empty: all")


@dataclass(frozen=True, config=CHECKED)
class RunConfig:
    """Everything that defines a run. The run folder's `config.yaml` holds it resolved."""

    name: FolderName = doc("run", "the run's folder in runs_dir")
    runs_dir: Text = doc("runs", "where run folders are")
    models_dir: Text = doc("models", "recipes name model folders as ${models_dir}/NAME")
    resume: Flag = doc(False, "continue from the newest checkpoint of the run folder")
    resume_step: NonNegativeInt = doc(0, "with resume: from the checkpoint of this step instead; 0: the newest")
    student: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def report(self) -> Path:
        """The last file that a run writes."""
        return self.run_dir / "report.html"

    @property
    def schedule(self) -> str:
        """PHASED, STREAMING or AHEAD."""
        if self.rollout.schedule != "auto":
            return self.rollout.schedule
        # Nothing is gained on devices that servers and trainer share. A teacher rests on the host while ranks compute
        # gradients, which the other schedules do between its passes.
        shared = self.rollout.colocate or not self.train.gpus_per_node
        rests = (self.needs_teacher and self.teacher.offload) or self.objective.reference_offload
        return PHASED if shared or rests else STREAMING

    @property
    def generates(self) -> bool:
        """Whether the run samples from rollout servers. Fine-tuning on traces does not."""
        return OBJECTIVES[self.objective.name].generates

    @property
    def models(self) -> list[tuple[str, ModelConfig]]:
        """The models in use by their fields' names: the student, and the teacher if the run has one."""
        teacher = [("teacher", self.teacher)] if self.needs_teacher or self.eval.teacher else []
        return [("student", self.student), *teacher]

    @property
    def needs_teacher(self) -> bool:
        return OBJECTIVES[self.objective.name].needs_teacher

    @property
    def head_pass_before_loss(self) -> bool:
        """Whether an update computes log-probs before its loss, for means over responses (`Actor`)."""
        # With several updates on a batch, pi_old is known.
        old_is_known = self.train.updates_per_rollout > 1
        if self.objective.ratio == "sequence":
            return old_is_known
        return OBJECTIVES[self.objective.name].averages_over_responses and not old_is_known

    @property
    def reference(self) -> TeacherConfig | None:
        """The starting student as a frozen model on the trainer's ranks, in the student's layout; None without a KL."""
        if not (self.objective.reference_kl or self.objective.reference_drift):
            return None
        student = self.student
        return TeacherConfig(
            path=student.path,
            layout=student.layout,
            precision=student.precision,
            transformer_impl=student.transformer_impl,
            fp8=replace(student.fp8, param_gather=False),
            offload=self.objective.reference_offload,
        )

    @property
    def teacher_is_dedicated(self) -> bool:
        """Whether the teacher has dedicated ranks, which form a separate world."""
        return self.needs_teacher and self.teacher.ranks_per_node > 0

    @property
    def teacher_world_size(self) -> int:
        """Ranks that hold the teacher: dedicated ones, or the trainer's."""
        if not self.teacher_is_dedicated:
            return self.train.world_size
        return (self.teacher.nodes or self.train.nodes) * self.teacher.ranks_per_node
