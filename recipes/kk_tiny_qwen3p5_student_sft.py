"""For `rlad sft`, after the steps in recipes/assets/README.md: makes the student of kk_tiny_qwen3p5_cpu.

A Qwen3.5 with 1.0 M parameters, three gated delta nets and one layer of attention, on the traces of the demo's student.
Hardware: 2 CPU cores, about 3 GB. Layout: 2 data-parallel ranks.
"""

from dataclasses import replace

from recipes.kk_tiny_student_sft import kk_tiny_student_sft
from rlad_megatron.config import ModelConfig, RunConfig


def kk_tiny_qwen3p5_student_sft() -> RunConfig:
    student = kk_tiny_student_sft()
    return replace(
        student,
        name="kk_tiny_qwen3p5_student_sft",
        student=ModelConfig(path="runs/kk_tiny_untrained/qwen3p5_student", precision="fp32"),
    )
