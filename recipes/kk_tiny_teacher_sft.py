"""For `rlad sft`, after the steps in recipes/assets/README.md: makes the demo's teacher.

A Qwen3 with 2.4 M parameters, fine-tuned on worked-out puzzles of two people.
Hardware: 2 CPU cores, about 1 GB. Layout: 2 data-parallel ranks.
"""

from rlad_megatron.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)


def kk_tiny_teacher_sft() -> RunConfig:
    return RunConfig(
        name="kk_tiny_teacher_sft",
        student=ModelConfig(path="runs/kk_tiny_untrained/teacher", precision="fp32"),
        objective=ObjectiveConfig(name="cross_entropy", aggregation="token_mean"),
        data=DataConfig(people=(2,), prompt_style="plain", train_size=20000),
        sft=SftConfig(batch_size=32),
        optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-5, warmup_steps=40, decay="cosine", weight_decay=0.01),
        train=TrainConfig(steps=1000, ranks_per_node=2, gpus_per_node=0, microbatch_tokens=640),
        checkpoint=CheckpointConfig(every=500, keep=1),
    )
