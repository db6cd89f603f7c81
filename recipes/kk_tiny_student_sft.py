"""For `rlad sft`, after the steps in recipes/assets/README.md: makes the demo's student.

A Qwen3 with 0.8 M parameters that can reason about the puzzles but mostly guesses. About a third of its traces work the
puzzle out, the others jump to an answer (tools/make_kk_traces.py). So it stands in for a base model, in which RL has
something to bring out.
Hardware: 2 CPU cores, about 1 GB. Layout: 2 data-parallel ranks.
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
        sft=replace(teacher.sft, traces="runs/kk_tiny_traces.jsonl"),
        train=replace(teacher.train, steps=400),
    )
