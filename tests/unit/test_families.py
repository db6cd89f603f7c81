"""What is particular to a family is data in its table, never a branch on its name."""

import re
from pathlib import Path

import pytest

import rlad_megatron
from rlad_megatron.config import Fp8Config, ModelConfig, RolloutConfig
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.known import KNOWN_MODELS
from rlad_megatron.models.precision import check_fp8_shape
from rlad_megatron.models.registry import FAMILIES, WITH_VISION, as_model_spec
from rlad_megatron.models.shard_plan import check_server_layout
from rlad_megatron.servers.process import check_hybrid_servers

ROOT = Path(rlad_megatron.__path__[0])


def test_no_code_asks_for_a_family_by_name():
    names = "|".join(map(re.escape, [*FAMILIES, *WITH_VISION]))
    for file in ROOT.rglob("*.py"):
        if file.name in ("registry.py", "known.py"):
            continue
        found = re.findall(rf"^.*[\"'](?:{names})[\"'].*$", file.read_text(), flags=re.MULTILINE)
        assert not found, (file, found)
        assert "model_type ==" not in file.read_text() and "model_type in" not in file.read_text(), file


def hybrid(**sizes):
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
    return as_model_spec({**KNOWN_MODELS["Qwen3.5-2B"], **heads, **sizes})


def test_what_vllms_cpu_build_cannot_serve_is_refused():
    served = RolloutConfig(dtype="bfloat16")
    check_hybrid_servers(served, hybrid(), "student")
    check_hybrid_servers(RolloutConfig(dtype="float32"), as_model_spec(KNOWN_MODELS["Qwen3-8B"]), "student")
    with pytest.raises(ConfigError, match=r"^rollout.dtype=float32: .* bf16 only; use bfloat16$"):
        check_hybrid_servers(RolloutConfig(dtype="float32"), hybrid(), "student")
    with pytest.raises(
        ConfigError, match="the student's gated delta nets have value heads of 64, and .* takes 128 only"
    ):
        check_hybrid_servers(served, hybrid(linear_value_head_dim=64), "student")
    with pytest.raises(ConfigError, match="tensor_parallel=8 does not divide the 4 key heads of gated delta nets"):
        check_server_layout(hybrid(), 8)


def test_products_of_gated_delta_nets_fill_fp8_tiles():
    model = ModelConfig(fp8=Fp8Config(recipe="tensorwise"))
    check_fp8_shape("student", model, hybrid(linear_num_value_heads=8))
    # 2 x 512 of queries and keys, 2 x 512 of values and gates, 2 x 4 of decays and strengths.
    with pytest.raises(ConfigError, match="projection of a gated delta net on a rank is 2056"):
        check_fp8_shape("student", model, hybrid())
