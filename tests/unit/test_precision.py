"""Precision: every combination of options is built as Megatron-Core documents it, or refused with its reason."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from rlad_megatron import platform
from rlad_megatron.config import (
    Fp8Config,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    validate,
)
from rlad_megatron.config.recipe import apply_overrides
from rlad_megatron.data.packing import pack
from rlad_megatron.errors import ConfigError
from rlad_megatron.models.precision import (
    DeviceFacts,
    check_device,
    check_fp8_shape,
    token_multiple,
    usable_recipes,
    uses_transformer_engine,
)
from rlad_megatron.models.registry import FAMILIES, as_model_spec, table_name
from rlad_megatron.types import Sample

GOOD = replace(RunConfig(), student=ModelConfig(path="student"), teacher=TeacherConfig(path="teacher"))
RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")
OPTIONS = {
    "recipe": RECIPES,
    "format": ("hybrid", "e4m3"),
    "amax_history_len": (1024, 16),
    "param_gather": (False, True),
    "first_last_layers_bf16": (False, True),
}


def refusal(role, precision, impl, fp8):
    """The words that an invalid combination's error must hold; None for a valid one. Written from the sources."""
    if (precision, impl) == ("fp32", "transformer_engine"):
        return f"{role}.precision=fp32 with {role}.transformer_impl=transformer_engine"
    if fp8.recipe == "none":
        changed = fp8 != Fp8Config()
        return "has no effect with" if changed else None
    if precision != "bf16":
        return f"{role}.precision={precision}"
    if impl == "local":
        return f"{role}.transformer_impl=local"
    if fp8.recipe == "delayed":
        if fp8.first_last_layers_bf16:  # Megatron: "Delayed scaling does not support first / last layer in BF16"
            return "first_last_layers_bf16=true"
        if role == "teacher":
            return "teacher.fp8.recipe=delayed"
        return "student.fp8.param_gather=true with fp8.recipe=delayed" if fp8.param_gather else None
    if fp8.amax_history_len != 1024:
        return f"{role}.fp8.amax_history_len=16"
    if role == "teacher" and fp8.param_gather:
        return "teacher.fp8.param_gather=true"
    return None


def documented(role, precision, impl, fp8):
    """Fields of TransformerConfig for a valid combination, as its docstrings say (CPU: auto is local)."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    on = fp8.recipe != "none"
    delayed = fp8.recipe == "delayed"
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "transformer_impl": impl if impl != "auto" else "local",
        "fp8": fp8.format if on else None,
        "fp8_recipe": fp8.recipe if on else "delayed",  # Megatron's default, which says nothing while fp8 is None
        "fp8_param": on and (role == "teacher" or fp8.param_gather),
        "fp8_amax_history_len": fp8.amax_history_len if delayed else 1,
        "fp8_amax_compute_algo": "max" if delayed else "most_recent",
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
        "fp8_wgrad": True,
        "fp8_dot_product_attention": False,
        "recompute_granularity": None,
    }


@pytest.fixture(scope="module")
def build():
    """models.build, imported as a rank does."""
    platform.prepare()
    from rlad_megatron.models import build

    return build


def spec(**changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    family = "qwen3_moe" if "num_experts" in changes else "qwen3"
    sizes |= {"intermediate_size": 96, "head_dim": 16, "vocab_size": 300}
    return as_model_spec({"model_type": family, **sizes, **changes})


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_every_combination_is_as_documented_or_refused(build, role):
    model = spec()
    seen = {"built": 0, "refused": 0}
    for precision, impl in product(("bf16", "fp16", "fp32"), ("auto", "transformer_engine", "local")):
        for values in product(*OPTIONS.values()):
            fp8 = Fp8Config(**dict(zip(OPTIONS, values, strict=True)))
            kind = {"student": ModelConfig, "teacher": TeacherConfig}[role]
            asked = kind("folder", LayoutConfig(), precision, impl, fp8)
            reason = refusal(role, precision, impl, fp8)
            if reason is not None:
                with pytest.raises(ConfigError) as caught:
                    validate(replace(GOOD, **{role: asked}))
                assert reason in str(caught.value) and "\n" not in str(caught.value)
                seen["refused"] += 1
                continue
            validate(replace(GOOD, **{role: asked}))
            config = build.transformer_config(model, asked, frozen=role == "teacher")
            expected = documented(role, precision, impl, fp8)
            assert {name: getattr(config, name) for name in expected} == expected
            seen["built"] += 1
    # Without FP8 every precision with every kind of layers but one. Else bf16 and not local: each option of the recipe.
    built = {"student": 8 + 2 * (2 * 2) + 2 * 3 * (2 * 2 * 2), "teacher": 8 + 2 * 3 * (2 * 2)}[role]
    assert seen == {"built": built, "refused": 9 * 80 - built}


FULL, SOME = {"recompute": "full"}, {"recompute": "selective"}
EXPERTS = {"num_experts": 4}


@pytest.mark.parametrize(
    ("train", "impl", "experts", "expected"),
    [
        ({}, "local", {}, (None, None, None, ["core_attn"])),
        (FULL, "local", {}, ("full", "uniform", 1, ["core_attn"])),
        (FULL, "transformer_engine", {}, ("full", "uniform", 1, ["core_attn"])),
        ({**FULL, "recompute_layers": 3}, "local", {}, ("full", "block", 3, ["core_attn"])),
        (SOME, "local", {}, ("selective", None, None, ["mlp"])),
        (SOME, "transformer_engine", {}, ("selective", None, None, ["mlp"])),
        (SOME, "transformer_engine", EXPERTS, ("selective", None, None, ["moe"])),
        ({**SOME, "recompute_modules": ["core_attn"]}, "local", {}, ("selective", None, None, ["core_attn"])),
        (
            {**SOME, "recompute_modules": ["moe_act", "layernorm"]},
            "transformer_engine",
            EXPERTS,
            ("selective", None, None, ["moe_act", "layernorm"]),
        ),
    ],
)
def test_recompute_is_as_documented(build, train, impl, experts, expected):
    asked = ModelConfig("folder", transformer_impl=impl)
    config = build.transformer_config(spec(**experts), asked, train=TrainConfig(**train))
    found = (config.recompute_granularity, config.recompute_method, config.recompute_num_layers)
    assert (*found, config.recompute_modules) == expected
    assert not config.cpu_offloading


def test_offload_is_as_documented(build):
    config = build.transformer_config(spec(), ModelConfig("folder"), train=TrainConfig(offload_layers=3))
    assert (config.cpu_offloading, config.cpu_offloading_num_layers, config.recompute_granularity) == (True, 3, None)
    assert config.cpu_offloading_activations and not config.cpu_offloading_weights


def test_megatrons_optimizer_and_ddp_get_what_is_asked(build):
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    from rlad_megatron.trainer.setup import ddp_config, optimizer_fields

    plain = ModelConfig("folder")
    defaults = {field.name: field.default for field in fields(MegatronOptimizerConfig)}
    always = {"hysteresis": 1, "initial_loss_scale": 65536.0, "loss_scale_window": 200}
    always |= {"use_distributed_optimizer": True, "lr": 1e-6, "min_lr": 0.0, "weight_decay": 0.0, "adam_beta2": 0.95}

    def changed(optimizer, student):
        """What differs from Megatron's defaults, in addition to what always does."""
        found = optimizer_fields(optimizer, student)
        assert set(found) <= set(defaults)
        assert {name: found[name] for name in always} == always
        return {name: value for name, value in found.items() if value != defaults[name] and name not in always}

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    assert changed(OptimizerConfig(), plain) == bf16
    assert changed(OptimizerConfig(), replace(plain, precision="fp32")) == {}
    half = {"fp16": True, "params_dtype": torch.float16}
    assert changed(OptimizerConfig(), replace(plain, precision="fp16")) == half
    aware = {"use_precision_aware_optimizer": True}
    assert changed(OptimizerConfig(precision_aware=True), plain) == bf16 | aware
    moments = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    assert changed(OptimizerConfig(precision_aware=True, moments="bf16"), plain) == bf16 | aware | moments
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.75, "overlap_cpu_optimizer_d2h_h2d": True}
    assert changed(OptimizerConfig(precision_aware=True, offload=0.75), plain) == bf16 | aware | offload

    overlapping = OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    for recipe in ("none", "tensorwise", "blockwise", "mxfp8"):
        gathers = recipe != "none"
        student = replace(plain, fp8=Fp8Config(recipe=recipe, param_gather=gathers))
        fp8 = {"fp8_recipe": recipe} if gathers else {}
        reuse = {"reuse_grad_buf_for_mxfp8_param_ag": True} if recipe == "mxfp8" else {}
        assert changed(OptimizerConfig(), student) == bf16 | fp8 | reuse
        assert changed(overlapping, student) == bf16 | fp8 | reuse | {"overlap_param_gather": True}
        for optimizer in (OptimizerConfig(), overlapping):
            config = ddp_config(optimizer, student)
            assert (config.use_distributed_optimizer, config.grad_reduce_in_fp32) == (True, True)
            assert config.overlap_grad_reduce == config.overlap_param_gather == (optimizer is overlapping)
            assert (config.fp8_param_gather, config.reuse_grad_buf_for_mxfp8_param_ag) == (gathers, bool(reuse))


GATHERED = ["student.fp8.recipe=mxfp8", "student.fp8.param_gather=true"]
OVERLAPPED = ["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["student.precision=fp8"],
            "student.precision=fp8 must be bf16, fp16 or fp32; for FP8 use precision=bf16 with fp8.recipe=RECIPE",
        ),
        (
            ["student.fp8=blockwise"],
            "student.fp8=blockwise: student.fp8 is a section; set one of its keys: student.fp8.recipe, ",
        ),
        (["student.fp8.param_gather=true"], "student.fp8.param_gather=true has no effect with student.fp8.recipe=none"),
        (
            ["student.transformer_impl=te"],
            "student.transformer_impl=te is unknown; choose one of: auto, tr",
        ),
        (["teacher.fp8.recipe=fp8"], "teacher.fp8.recipe=fp8 is unknown; choose one of: none, delayed"),
        (["student.fp8.recipe=delayed", "student.fp8.amax_history_len=0"], "student.fp8.amax_history_len=0 must be"),
        (["optimizer.moments=bf16"], "optimizer.moments=bf16 needs optimizer.precision_aware=true"),
        (["optimizer.precision_aware=true", "student.precision=fp16"], "precision_aware=true .*student.precision=fp16"),
        (["optimizer.offload=1.5"], r"optimizer.offload=1.5 is outside \[0, 1\]"),
        (["optimizer.offload=0.5"], "optimizer.offload=0.5 needs optimizer.precision_aware=true"),
        (
            ["optimizer.offload=0.5", "optimizer.precision_aware=true", "optimizer.moments=bf16"],
            "optimizer.moments=bf16: Megatron's hybrid optimizer holds float32",
        ),
        (["optimizer.overlap_param_gather=true"], "overlap_param_gather=true needs optimizer.overlap_grad_reduce=true"),
        (
            [*GATHERED, "student.fp8.recipe=tensorwise", "optimizer.precision_aware=true", "optimizer.offload=1"],
            "optimizer.offload=1: .* student.fp8.param_gather=false",
        ),
        (
            [*GATHERED, *OVERLAPPED],
            "optimizer.overlap_param_gather=true: MXFP8 weights",
        ),
        (["train.recompute=some"], "train.recompute=some is unknown; choose one of: none, selective, full"),
        (
            ["train.recompute_layers=2"],
            "train.recompute_layers=2 has no effect with train.recompute=none",
        ),
        (
            ["train.recompute=full", "train.recompute_modules=[mlp]"],
            r"train.recompute_modules=\[mlp\] has no effect with train.recompute=full; use recompute=selective, or",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[moe, moe_act]"],
            r"train.recompute_modules=\[moe, ?moe_act\]: moe_act is part of moe; drop one of them",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[mlp, mlp]"],
            r"train.recompute_modules=\[mlp, ?mlp\] names a module twice; name each once",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[attention]"],
            r"train.recompute_modules=\[attention\] must be a list of core_attn, mlp, moe, moe_act and layernorm",
        ),
        (
            ["train.recompute=selective", "train.recompute_modules=[moe_act]", "student.fp8.recipe=delayed"],
            r"train.recompute_modules=\[moe_act\]: under delayed scaling .* use other modules, or another student.fp8",
        ),
        (
            ["train.offload_layers=2", "student.transformer_impl=local"],
            "train.offload_layers=2 needs Transformer Engine's layers, but student.transformer_impl=local",
        ),
        (["train.offload_layers=2", "student.precision=fp32"], "offload_layers=2 needs .* but student.precision=fp32"),
        (
            ["train.offload_layers=2", "student.layout.pipeline_parallel=2", "train.ranks_per_node=2"],
            "train.offload_layers=2: .* only without pipeline stages, but student.layout.pipeline_parallel=2; use 1",
        ),
        (
            ["train.offload_layers=2", "train.recompute=selective"],
            "train.offload_layers=2: .* nothing is recomputed, but train.recompute=selective; use none, or offload_la",
        ),
        (
            ["train.gpus_per_node=0", "train.offload_layers=2"],
            "train.offload_layers=2 needs a GPU, .*offload_layers=0",
        ),
        (["checkpoint.export_precision=fp16"], "checkpoint.export_precision=fp16 is unknown"),
        (["train.gpus_per_node=0", "teacher.fp8.recipe=mxfp8"], "teacher.fp8.recipe=mxfp8 needs a GPU"),
        (["train.gpus_per_node=0", "student.transformer_impl=transformer_engine"], "student.transformer_impl=.* a GPU"),
        (["train.gpus_per_node=0", "optimizer.precision_aware=true"], "optimizer.precision_aware=true needs a GPU"),
    ],
)
def test_other_bad_combinations(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(apply_overrides(GOOD, overrides))
    assert "\n" not in str(caught.value)


def test_without_a_teacher_its_precision_is_not_looked_at():
    validate(apply_overrides(GOOD, ["objective.name=grpo", "teacher.fp8.recipe=delayed"]))


ADA, HOPPER, BLACKWELL, CONSUMER = (8, 9), (9, 0), (10, 0), (12, 0)


def test_between_fp8_products_recompute_needs_a_newer_engine():
    train = replace(GOOD.train, recompute="selective", recompute_modules=("moe_act",))
    config = replace(GOOD, student=replace(GOOD.student, fp8=Fp8Config(recipe="tensorwise")), train=train)
    check_device(config, DeviceFacts(HOPPER, (12, 9), (2, 6)))
    with pytest.raises(ConfigError, match=r"train.recompute_modules=\[moe_act\] .* Transformer Engine 2.6, and 2.5"):
        check_device(config, DeviceFacts(HOPPER, (12, 9), (2, 5)))


@pytest.mark.parametrize(
    ("capability", "cuda", "engine", "usable"),
    [
        (None, None, None, []),
        (HOPPER, (13, 0), None, []),
        ((8, 0), (13, 0), (2, 11), []),
        (ADA, (12, 8), (2, 11), ["delayed", "tensorwise"]),
        (ADA, (12, 0), (2, 11), []),
        (HOPPER, (12, 8), (2, 11), ["delayed", "tensorwise"]),
        (HOPPER, (12, 9), (2, 11), ["delayed", "tensorwise", "blockwise"]),
        (HOPPER, (13, 0), (2, 2), ["delayed", "tensorwise"]),
        (HOPPER, (13, 0), (2, 1), ["delayed"]),
        (BLACKWELL, (13, 0), (2, 11), ["delayed", "tensorwise", "blockwise", "mxfp8"]),
        (BLACKWELL, (13, 0), (2, 8), ["delayed", "tensorwise", "mxfp8"]),
        (BLACKWELL, (13, 0), (2, 0), ["delayed"]),
        (CONSUMER, (13, 0), (2, 11), ["delayed", "tensorwise", "blockwise"]),
    ],
)
def test_recipes_of_devices(capability, cuda, engine, usable):
    device = DeviceFacts(capability, cuda, engine)
    assert usable_recipes(device) == usable
    for recipe in RECIPES[1:]:
        config = replace(GOOD, student=replace(GOOD.student, fp8=Fp8Config(recipe=recipe)))
        if recipe in usable:
            check_device(config, device)
        else:
            with pytest.raises(ConfigError, match=r"^student\..*; .*(use|works)"):
                check_device(config, device)


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (
            "student.fp8.recipe=mxfp8",
            (HOPPER, (13, 0), (2, 11)),
            "10.0 or higher and below 12.0, .* has 9.0; ",
        ),
        ("student.fp8.recipe=mxfp8", (HOPPER, (13, 0), (2, 11)), "works here: delayed, tensorwise, blockwise, none"),
        ("teacher.fp8.recipe=mxfp8", (HOPPER, (13, 0), (2, 11)), "teacher.* here: tensorwise, blockwise, none"),
        ("student.fp8.recipe=blockwise", (HOPPER, (12, 8), (2, 11)), "CUDA 12.9, and it is built for 12.8"),
        ("student.fp8.recipe=blockwise", (BLACKWELL, (13, 0), (2, 8)), "Transformer Engine 2.9 on this GPU, and 2.8"),
        (
            "student.path=student",
            (HOPPER, (13, 0), None),
            "transformer_impl=auto needs .*use .*=local",
        ),
        ("student.path=student", ((7, 5), (12, 4), (2, 11)), "student.precision=bf16 needs .* 8.0, .* 7.5; use fp16"),
        ("student.transformer_impl=transformer_engine", (None, None, None), "needs a GPU, and there is none here"),
    ],
)
def test_what_a_device_cannot_do_is_said(overrides, device, message):
    with pytest.raises(ConfigError, match=message):
        check_device(apply_overrides(GOOD, [overrides]), DeviceFacts(*device))


def test_an_optimizer_that_the_device_lacks():
    config = apply_overrides(GOOD, ["optimizer.precision_aware=true", "student.transformer_impl=local"])
    config = replace(config, objective=replace(config.objective, name="grpo"))
    check_device(config, DeviceFacts(HOPPER, (13, 0), (2, 11)))
    with pytest.raises(ConfigError, match="precision_aware=true needs Transformer Engine, .*use .*aware=false"):
        check_device(config, DeviceFacts(HOPPER, (13, 0), None))
    with pytest.raises(ConfigError, match="precision_aware=true needs a GPU"):
        check_device(config, DeviceFacts(None, None, None))
    # Without the former Megatron would keep a whole float32 copy, without the latter Adam refuses when it is made.
    with pytest.raises(ConfigError, match="precision_aware=true needs the Adam of Transformer Engine 2.1, and 2.0 is"):
        check_device(config, DeviceFacts(HOPPER, (13, 0), (2, 0)))
    check_device(config, DeviceFacts(HOPPER, (13, 0), (2, 1)))
    config = apply_overrides(config, ["optimizer.moments=bf16"])
    with pytest.raises(ConfigError, match="optimizer.moments=bf16 needs .* 2.3, and 2.2 is .*use optimizer.moments=fp"):
        check_device(config, DeviceFacts(HOPPER, (13, 0), (2, 2)))
    check_device(config, DeviceFacts(HOPPER, (13, 0), (2, 3)))


def test_an_exchange_of_packed_sequences_that_transformer_engine_lacks():
    context = apply_overrides(GOOD, ["student.layout.context_parallel=2", "objective.name=grpo"])
    for exchange, least, others in (("a2a", (2, 10), "p2p"), ("all_gather", (2, 18), "p2p or a2a")):
        config = apply_overrides(context, [f"student.layout.cp_comm_type={exchange}"])
        lacking = DeviceFacts(HOPPER, (13, 0), (2, least[1] - 1))
        message = f"cp_comm_type={exchange} needs Transformer Engine 2.{least[1]} .* is installed; use {others}$"
        with pytest.raises(ConfigError, match=message):
            check_device(config, lacking)
        check_device(context, lacking)
        check_device(config, DeviceFacts(HOPPER, (13, 0), least))


def test_float32_is_in_megatrons_own_layers_on_any_device():
    config = apply_overrides(GOOD, ["student.precision=fp32", "teacher.precision=fp32"])
    check_device(config, DeviceFacts(HOPPER, (13, 0), None))  # so it needs no Transformer Engine
    assert not uses_transformer_engine(config.student, gpu=True)
    assert uses_transformer_engine(replace(config.student, precision="bf16"), gpu=True)
    assert not uses_transformer_engine(replace(config.student, precision="bf16"), gpu=False)


@pytest.mark.parametrize(
    ("recipe", "layout", "multiple"),
    [
        ("none", LayoutConfig(1), 16),
        ("none", LayoutConfig(4), 64),
        ("tensorwise", LayoutConfig(2), 32),
        ("tensorwise", LayoutConfig(2, sequence_parallel=True), 32),
        ("blockwise", LayoutConfig(1), 16),
        ("blockwise", LayoutConfig(2), 32),
        ("blockwise", LayoutConfig(2, sequence_parallel=True), 256),  # each rank's share is gathered in blocks of 128
        ("mxfp8", LayoutConfig(1), 32),
        ("mxfp8", LayoutConfig(4), 128),
        ("none", LayoutConfig(2, context_parallel=2), 64),  # what context-parallel ranks have is a multiple of its own
        ("blockwise", LayoutConfig(2, sequence_parallel=True, context_parallel=2), 512),
    ],
)
def test_lengths_are_whole_tiles_of_each_rank_and_padding_carries_no_loss(recipe, layout, multiple):
    model = ModelConfig("", layout, fp8=Fp8Config(recipe=recipe))
    assert token_multiple(model) == multiple
    samples = [Sample(torch.arange(n), prompt_length=1, weight=torch.ones(n - 1)) for n in (5, 9, 70)]
    for microbatch in pack(samples, budget_tokens=72, multiple=token_multiple(model), dp_rank=0, dp_size=1):
        used = sum(samples[i].tokens.numel() for i in microbatch.samples)
        assert microbatch.tokens.shape[1] % multiple == 0 and microbatch.tokens.shape[1] >= used
        assert microbatch.loss_positions.numel() == used - len(microbatch.samples)
        assert microbatch.loss_positions.max() < used - 1


def test_shapes_that_do_not_fit_a_recipes_tiles():
    model = spec()
    tensorwise = ModelConfig("", LayoutConfig(2), fp8=Fp8Config(recipe="tensorwise"))
    check_fp8_shape("student", tensorwise, model)
    check_fp8_shape("student", replace(tensorwise, fp8=Fp8Config()), replace(model, hidden_size=7))
    with pytest.raises(ConfigError, match="student.fp8.recipe=mxfp8 needs multiples of 32, and the feed-forward width"):
        check_fp8_shape("student", replace(tensorwise, fp8=Fp8Config(recipe="mxfp8")), model)
    with pytest.raises(ConfigError, match="hidden size is 72; use teacher.fp8.recipe=none"):
        check_fp8_shape("teacher", replace(tensorwise, layout=LayoutConfig()), replace(model, hidden_size=72))
    blockwise = replace(tensorwise, fp8=Fp8Config(recipe="blockwise"))
    check_fp8_shape("student", blockwise, model)
    shared = replace(blockwise, layout=LayoutConfig(2, sequence_parallel=True))
    check_fp8_shape("student", shared, replace(model, hidden_size=128))
    with pytest.raises(ConfigError, match="blockwise with .*sequence_parallel=true needs .*128, .* size is 64"):
        check_fp8_shape("student", shared, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_transformer_engines_layers_have_their_names_in_the_table(family):
    types = FAMILIES[family].layers
    layer = {name.format(layer=3, expert=1) for kind in types.values() for name in kind.table}
    fused = {
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight": "decoder.layers.3.self_attention.linear_qkv.weight",
    }
    if "linear_attention" in types:
        fused["decoder.layers.3.self_attention.in_proj.layer_norm_weight"] = "decoder.layers.3.input_layernorm.weight"
    if "moe" in family:  # the norm before experts stays a separate layer
        fused |= {
            name: name for name in ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.3.mlp.router.weight")
        }
    else:
        fused["decoder.layers.3.mlp.linear_fc1.layer_norm_weight"] = "decoder.layers.3.pre_mlp_layernorm.weight"
    for name, expected in fused.items():
        assert table_name(FAMILIES[family], name) == expected
        assert expected in layer
