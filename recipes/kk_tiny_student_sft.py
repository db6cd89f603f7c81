"""Makes the demo's student: a Qwen3 of 0.8 M parameters, fine-tuned for just long enough to solve some puzzles.

Hardware: 2 CPU cores, about 1 GB. Layout: 2 data-parallel ranks.
Run: see recipes/assets/README.md.
"""

from dataclasses import replace

from recipes.kk_tiny_teacher_sft import kk_tiny_teacher_sft
from rlad_megatron.config import ModelConfig, RunConfig


def kk_tiny_student_sft() -> RunConfig:
    teacher = kk_tiny_teacher_sft()
    return replace(
        teacher,
        name="kk_tiny_student_sft",
        student=ModelConfig(path="runs/kk_tiny_untrained/student", precision="fp32"),
        train=replace(teacher.train, steps=130),
        optimizer=replace(teacher.optimizer, warmup_steps=20),
    )
