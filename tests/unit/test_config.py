"""Configuration: recipes resolve, YAML round-trips, and each bad field is one clear line."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

import recipes
from rlad_megatron.config import ModelConfig, RunConfig, SamplingConfig, TeacherConfig, validate
from rlad_megatron.config.messages import keys
from rlad_megatron.config.recipe import MAPS, apply_overrides, from_yaml, load_run, to_yaml
from rlad_megatron.errors import ConfigError

RECIPES = sorted(file.stem for file in Path(recipes.__path__[0]).glob("[a-z]*.py"))
GOOD = replace(RunConfig(), student=ModelConfig(path="student"), teacher=TeacherConfig(path="teacher"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_round_trips(name, tmp_path):
    config = load_run(name, [])
    validate(config)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert from_yaml(file) == config
    assert load_run(str(file), ["train.seed=7"]).train.seed == 7


def test_recipes_need_no_torch():
    code = "import sys, recipes.kk_tiny_cpu as r; r.kk_tiny_cpu(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "did you mean 'train.steps'"),
        ("objective.alhpa=1", "did you mean 'objective.alpha'"),
        ("lr=1", "did you mean 'optimizer.lr'"),
        ("student.ranks_per_node=1", "unknown key 'student.ranks_per_node'"),
        ("student.offload=true", "unknown key 'student.offload'"),
        ("train.lr=1", "did you mean 'optimizer.lr'"),
        ("train.steps.x=1", "unknown key 'train.steps.x'; did you mean 'train.steps'"),
        ("train.steps=abc", "^train.steps=abc must be a whole number$"),
        ("train.steps=1.5", "^train.steps=1.5 must be a whole number$"),
        ("train.steps={a", "^train.steps={a must be a whole number$"),
        ("train.steps=", "^train.steps= must be a whole number$"),
        ("train.steps=0x10", "^train.steps=0x10 must be a whole number$"),
        ("train.steps=1e3", "^train.steps=1e3 must be a whole number$"),
        ("optimizer.lr=.inf", "^optimizer.lr=.inf must be a number$"),
        ("optimizer.lr=fast", "^optimizer.lr=fast must be a number$"),
        ("resume=maybe", "^resume=maybe must be true or false$"),
        ("resume=yes", "^resume=yes must be true or false$"),
        ("resume=1", "^resume=1 must be true or false$"),
        ("nonsense", "write key=value"),
        ("train=3", "^train=3: train is a section; set one of its keys: train.steps, "),
        ("data.people=2", r"^data.people=2 must be a list of whole numbers from 2 to 8, for example \[2,3\]$"),
        ("data.people=2026-13-45", "^data.people=2026-13-45 must be a list of whole numbers"),
        ("data.people=[2", r"^data.people=\[2 must be a list of whole numbers"),
        ("data.people=[2,x]", r"^data.people=\[2,x\] must be a list of whole numbers"),
        (
            "rollout.urls=http://n1:1",
            "^rollout.urls=http://n1:1 must be a list of server addresses, for example ..http://HOST:PORT..$",
        ),
        ("models_dir=${nothing}", r"models_dir=\$\{nothing}: .* must name another key; `rlad show"),
        ("models_dir=${train}", r"models_dir=\$\{train}: .* must name another key"),
        ("models_dir=${runsdir}/m", "another key; did you mean 'runs_dir'"),
        ("models_dir=${name", r"models_dir=\$\{name: .* another key"),
        ("train.steps=${name}", "^train.steps=..name. must be a whole number$"),
        ("name=${name}", "name=..name.: .* another key"),
        ("rollout.urls=['${nothing}']", r"rollout.urls=\[.* another key; `rlad show"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        apply_overrides(RunConfig(), [override])
    assert "\n" not in str(caught.value)


def test_numbers_are_read_as_python_reads_them():
    config = apply_overrides(RunConfig(), ["optimizer.lr=2e-7", "train.steps=1_000", "train.seed=010"])
    assert (config.optimizer.lr, config.train.steps, config.train.seed) == (2e-7, 1000, 10)


@pytest.mark.parametrize(
    "text",
    ["no", "007", "1e3", "10:30", "2026-01-01", "a: b", "[a", "a # b", "null", "[a]", "true", "ä b", "x " * 80 + "y"],
)
def test_text_is_what_was_typed(text, tmp_path):
    """YAML would read something else in most of these."""
    config = apply_overrides(RunConfig(), [f"name={text}"])
    assert config.name == text == apply_overrides(RunConfig(), [f"name='{text}'"]).name
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config
    assert all(word in to_yaml(config) for word in text.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  stepz: 3\n", "run.yaml: unknown key 'train.stepz'; did you mean 'train.steps'"),
        ("train: {steps: abc}", "run.yaml: train.steps=abc must be a whole number$"),
        ("data: {people: [2, x]}", r"run.yaml: data.people=\[2, x\] must be a list of whole numbers"),
        ("train: 3", "run.yaml: train=3: train is a section"),
        ("train:\n", "run.yaml: train=null: train is a section"),
        ("name: null", "run.yaml: name=null must be text$"),
        ("name: {}", "run.yaml: name={} must be text$"),
        ("name: {a: 3}", "run.yaml: unknown key 'name.a'; "),
        ("trian: {steps: 3}", "run.yaml: unknown key 'trian.steps'; did you mean 'train.steps'"),
        ("models_dir: ${runs_dir}/${runs_dir", r"run.yaml: models_dir=.* another key"),
        (
            "models_dir: ${runs_dir}\nruns_dir: ${models_dir}",
            r"run.yaml: models_dir=.*runs_dir.*another key|run.yaml: runs",
        ),
        ("train:\n  steps: {}", "run.yaml: train.steps={} must be a whole number$"),
        ("train.steps: 3", "run.yaml: 'train.steps' is not a key; .* nested"),
        ("models_dir: ${nothing}", r"run.yaml: models_dir=\$\{nothing}: .* another key"),
        ("train:\n  steps: ${", r"run.yaml: train.steps=\$\{: .* another key"),
        ("just a word\n", "run.yaml: not a configuration"),
        ("name: a\nrunsdir: [b\n", "run.yaml:3: not YAML .*; fix that line"),
        ("name: a\nname: b\n", "run.yaml:2: not YAML .duplicate key name.; fix that line"),
        ("train:\n  steps: 1\n  seed: 1\n  steps: 2\n", "run.yaml:4: not YAML .duplicate key steps"),
        ("? [a, b]\n: 3\n", "run.yaml: unknown key "),
        ("name: \0", "run.yaml: not YAML .unacceptable character .*; fix that value$"),
    ],
)
def test_bad_yaml(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        from_yaml(file)
    assert "\n" not in str(caught.value)


def test_models_of_a_written_configuration_follow_models_dir(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(load_run("math_r1_distill_7b_from_32b", ["models_dir=/first", "student.path=/else/where"])))
    config = load_run(str(file), ["models_dir=/other/place"])
    assert config.teacher.path == "/other/place/DeepSeek-R1-Distill-Qwen-32B"
    assert config.student.path == "/else/where"


def test_a_file_need_not_name_every_field(tmp_path):
    (tmp_path / "run.yaml").write_text("eval:\n  sampling:\n    max_tokens: ${rollout.sampling.max_tokens}\n")
    config = from_yaml(tmp_path / "run.yaml", ["rollout.sampling.max_tokens=7"])
    assert config.eval.sampling == SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=7)


def test_a_scalar_in_a_file_is_read_by_its_fields_type(tmp_path):
    """YAML would take `no` for false, 1e-6 for text and 010 for 8."""
    text = (
        "name: no\nresume: True\noptimizer: {lr: 1e-6, min_lr: 0}\ntrain: {seed: 010}\nrollout: {urls: ['http://n:1']}"
    )
    (tmp_path / "run.yaml").write_text(text)
    config = from_yaml(tmp_path / "run.yaml")
    found = (config.name, config.resume, config.optimizer.lr, config.optimizer.min_lr, config.train.seed)
    assert found == ("no", True, 1e-6, 0.0, 10) and config.rollout.urls == ("http://n:1",)


def test_a_mapping_is_given_whole_or_by_name_and_keeps_its_types(tmp_path):
    whole = apply_overrides(GOOD, ["data.columns={prompt: question, answer: reward_model.ground_truth}"])
    assert whole.data.columns == {"prompt": "question", "answer": "reward_model.ground_truth"}
    typed = ["enable_thinking=false", "budget=8", "mode='8'", "note=plain"]
    named = apply_overrides(
        whole, ["data.columns.prompt=problem", *(f"data.chat_template_kwargs.{item}" for item in typed)]
    )
    assert named.data.columns == {"prompt": "problem", "answer": "reward_model.ground_truth"}
    expected = {"enable_thinking": False, "budget": 8, "mode": "8", "note": "plain"}
    assert named.data.chat_template_kwargs == expected
    (tmp_path / "run.yaml").write_text(to_yaml(named))
    assert from_yaml(tmp_path / "run.yaml") == named
    text = "data: {chat_template_kwargs: {enable_thinking: false}, columns: {id: uid}}"
    (tmp_path / "run.yaml").write_text(text)
    read = from_yaml(tmp_path / "run.yaml", ["data.columns.prompt=${name}"]).data
    assert (read.chat_template_kwargs, read.columns) == ({"enable_thinking": False}, {"id": "uid", "prompt": "run"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.columns=question", "data.columns=question must be a mapping from our names to columns"),
        ("data.columns.prompt=[a]", r"data.columns={.*} must be a mapping from our names to columns"),
        ("data.columns.prompt=[a", r"data.columns.prompt=\[a: not YAML; put it in quotes"),
        (
            "data.template=Solve it.",
            "data.template=Solve it. does not say where the question goes; write {prompt}",
        ),
    ],
)
def test_bad_mappings_and_templates(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(GOOD, [override])


@pytest.mark.parametrize("key", keys())
def test_every_field_names_itself_when_refused(key, tmp_path):
    text = value = "[]" if key in MAPS else "{}"
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f": {key}={re.escape(value)} (must be|is unknown; choose one of: )[^\n]+$"):
        from_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("TrainConfig(steps=0)", "TrainConfig.steps=0 must be at least 1"),
        ("TrainConfig(steps=1.5)", "TrainConfig.steps=1.5 must be a whole number"),
        ("TrainConfig(stepz=3)", "unknown key 'TrainConfig.stepz'; did you mean 'TrainConfig.steps'?"),
        ("LayoutConfig(1, 0)", "LayoutConfig.pipeline_parallel=0 must be at least 1"),
        ("Fp8Config('fp8')", "Fp8Config.recipe=fp8 is unknown; choose one of: none, delayed, tensorwise, bl"),
        ("TeacherConfig(path='~/x')", "TeacherConfig.path=~/x has a ~, which is not expanded here; write it out"),
        ("DataConfig(people=[2, 9])", "DataConfig.people=9 must be a list of whole numbers from 2 to 8"),
        ("RunConfig(train=3)", "train=3: train is a section; set one of its keys: train.steps"),
        ("replace(RunConfig(), models='x')", "unknown key 'models'; did you mean 'models_dir'?"),
    ],
)
def test_a_recipe_with_a_bad_section_is_one_line(section, message, tmp_path):
    file = tmp_path / "mine.py"
    imports = "from dataclasses import FrozenInstanceError, replace\nfrom rlad_megatron.config import *\n"
    file.write_text(f"{imports}def mine():\n    {section}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(str(file), [])
    assert str(caught.value).startswith(f"{file}: {message}") and "\n" not in str(caught.value)


def test_sections_are_frozen_and_can_be_keys():
    with pytest.raises(FrozenInstanceError):
        GOOD.train.steps = 3
    assert len({GOOD, replace(GOOD), replace(GOOD, name="other")}) == 2


def test_unknown_recipe_lists_the_known():
    with pytest.raises(ConfigError, match="did you mean 'kk_tiny_cpu'"):
        load_run("kk_tiny_gpu", [])


def test_a_file_of_another_kind_is_no_recipe(tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text("name: a\n")
    with pytest.raises(ConfigError, match="recipe.txt' not found; known: .*; or a .py or .yaml file$"):
        load_run(str(file), [])


def test_a_recipe_returns_a_configuration(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine():\n    pass\n")
    with pytest.raises(ConfigError, match=r"mine\(\) returns None; a recipe returns a RunConfig"):
        load_run(str(file), [])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def mine(:\n    pass\n", "mine.py:1: SyntaxError: "),
        ("import json\n\ndef mine():\n    return json.loads('')\n", "mine.py:4: JSONDecodeError: Expecting value"),
        ("import nothing_here\n", "mine.py:1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("raise ValueError('a\\nb')\n", "mine.py:1: ValueError: a b; fix that line"),
    ],
)
def test_a_recipe_that_fails_is_one_line(code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    with pytest.raises(ConfigError) as caught:
        load_run("mine.py", [])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


EIGHT_RANKS = [f"student.layout.{size}_parallel=2" for size in ("tensor", "pipeline")] + ["train.ranks_per_node=8"]


def test_overrides_do_not_change_the_recipe():
    changed = apply_overrides(GOOD, ["data.people=[2,3]", "rollout.sampling.max_tokens=7"])
    assert (changed.data.people, changed.rollout.sampling.max_tokens) == ((2, 3), 7)
    assert (GOOD.data.people, GOOD.rollout.sampling.max_tokens) == ((2,), 2048)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.alpha=1.5"], r"objective.alpha=1.5 is outside \[0, 1\]"),
        (["objective.name=ppo"], "objective.name=ppo is unknown; choose one of: trrd, grpo"),
        (["rollout.group_size=1"], "rollout.group_size=1 gives no group-relative advantage"),
        (["rollout.sampling.top_p=0.9"], "rollout.sampling.top_p=0.9"),
        (["teacher.path=''"], "teacher.path is empty"),
        (["student.path=''"], "student.path is empty"),
        (["student.layout.tensor_parallel=3"], "does not divide the 1 ranks .* product is 1, or a multiple of 3 ranks"),
        (
            ["student.layout.virtual_pipeline=2"],
            "^student.layout.virtual_pipeline=2 needs pipeline stages, but student.layout.pipeline_parallel=1; use "
            "pipeline_parallel of at least 2, or virtual_pipeline=1$",
        ),
        (
            ["teacher.layout.last_stage_layers=2"],
            "^teacher.layout.last_stage_layers=2 needs pipeline stages, .*, or last_stage_layers=0$",
        ),
        (
            [*EIGHT_RANKS, "student.layout.expert_parallel=3"],
            r"^student.layout.expert_parallel=3 \* 2 ranks for each expert does not divide the 4 ranks of a pipeline "
            "stage; use 1 or 2$",
        ),
        (
            [*EIGHT_RANKS, "student.layout.expert_tensor_parallel=3"],
            "^student.layout.expert_tensor_parallel=3 does not divide the 4 ranks of a pipeline stage; use 1, 2 or 4$",
        ),
        (
            ["teacher.layout.sequence_parallel=true"],
            "teacher.layout.sequence_parallel=true .* at least 2, or sequence_",
        ),
        (
            ["student.layout.context_parallel=3", "train.ranks_per_node=4"],
            r"^student.layout.context_parallel=3 does not divide the 4 copies .* 4 ranks .*; use context_parallel=2$",
        ),
        (
            ["teacher.layout.context_parallel=5", "teacher.layout.tensor_parallel=2", "train.ranks_per_node=6"],
            "^teacher.layout.context_parallel=5 does not divide the 3 copies .* tensor_parallel=2.* context_.*=3$",
        ),
        (
            ["student.layout.context_parallel=2", "student.layout.tensor_parallel=3", "train.ranks_per_node=4"],
            "tensor_parallel=3 .* does not divide the 4 ranks .* is 1, 2 or 4, or a multiple of 6 ranks",
        ),
        (["student.layout.context_parallel=0"], "student.layout.context_parallel=0 must be at least 1"),
        (["student.layout.cp_comm_type=ring"], "student.layout.cp_comm_type=ring .*p2p, a2a"),
        (["student.layout.cp_comm_type=a2a"], "cp_comm_type=a2a has no effect with context_parallel=1; drop it"),
        (
            [
                "student.layout.context_parallel=2",
                "student.layout.cp_comm_type=a2a",
                "train.ranks_per_node=2",
                "train.gpus_per_node=0",
            ],
            "student.layout.cp_comm_type=a2a needs a GPU, .* use student.layout.cp_comm_type=p2p",
        ),
        (
            ["student.layout.context_parallel=2", "train.ranks_per_node=2", "student.transformer_impl=local"],
            "student.layout.context_parallel=2 on GPUs .* student.transformer_impl=local .* or context_parallel=1$",
        ),
        (
            ["teacher.layout.context_parallel=2", "train.ranks_per_node=2", "teacher.precision=fp32"],
            "teacher.layout.context_parallel=2 on GPUs .* teacher.precision=fp32 .* or context_parallel=1$",
        ),
        (["student.precision=fp8"], "student.precision=fp8 must be bf16, fp16 or fp32"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["optimizer.lr=0"], "optimizer.lr=0 must be a number above 0"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 must be a number above 0"),
        (["data.people=[9]"], "data.people"),
        (["data.people=[]"], r"data.people=\[\] must be a list of whole numbers from 2 to 8, for example \[2,3\]"),
        (["objective.mismatch_cap=0.5"], "objective.mismatch_cap"),
        (["train.updates_per_rollout=3"], "train.updates_per_rollout=3"),
        (["name=a/b"], "^name=a/b must be a folder name; runs_dir"),
        (["name=.."], "^name=.. must be a folder name"),
        (["optimizer.warmup_steps=-1"], "optimizer.warmup_steps=-1 must not be negative"),
        (["optimizer.lr=inf"], "^optimizer.lr=inf must be a finite number$"),
        (["train.distributed_timeout_s=nan"], "^train.distributed_timeout_s=nan must be a finite number$"),
        (["train.seed=-1"], "train.seed=-1 must not be negative"),
        (
            ["rollout.gpu_memory_utilization=90"],
            "gpu_memory_utilization=90 .* at most 1; for 90% write 0.9$",
        ),
        (["rollout.gpu_memory_utilization=0"], "gpu_memory_utilization=0 must be above 0"),
        (
            ["student.path=~/x"],
            f"^student.path=~/x has a ~, which is not expanded here; write it out: {Path.home()}/x$",
        ),
        (
            ["runs_dir=$HOME/x"],
            rf"^runs_dir=\$HOME/x has a \$, which is not expanded here; write it out: {Path.home()}/x$",
        ),
        (
            ["runs_dir=/x/$HOME"],
            rf"^runs_dir=/x/\$HOME has a \$, which is not expanded here; write it out: /x/{Path.home()}$",
        ),
        (["runs_dir=/x/$RLAD_NO"], r"^runs_dir=/x/\$RLAD_NO has a \$, which is not expanded here; write it out$"),
        (["optimizer.min_lr=1"], "optimizer.min_lr=1.0 exceeds optimizer.lr=1e-06"),
        (["rollout.sampling.temperature=0"], "rollout.sampling.temperature=0 .* use a number above 0"),
        (
            ["rollout.schedule=streaming", "rollout.colocate=true"],
            "rollout.schedule=streaming .* rollout.colocate=true .* use rollout.schedule=phased",
        ),
        (
            ["rollout.schedule=streaming", "teacher.offload=true"],
            "rollout.schedule=streaming .* teacher.offload=true .* or rollout.schedule=phased",
        ),
        (["rollout.schedule=ahead"], "rollout.schedule=ahead .* objective.mismatch_correction=truncated_is or icepop"),
        (["rollout.ahead=0"], "rollout.ahead=0 must be at least 1"),
        (["rollout.overprovision=-1"], "rollout.overprovision=-1 must not be negative"),
        (
            ["objective.name=cross_entropy", "rollout.sampling.temperature=0.7"],
            "rollout.sampling.temperature=0.7 divides the logits that objective.name=cross_entropy trains on; use 1.0",
        ),
        (["data.max_prompt_tokens=-1"], "data.max_prompt_tokens=-1 must not be negative"),
        (["rollout.port=65535", "rollout.servers=2"], "rollout.port=65535 .* rollout.servers=2; use at most 65534"),
        (["rollout.sleep_level=3"], r"^rollout.sleep_level=3 is outside \[0, 2\]$"),
        (["rollout.port=70000"], "rollout.port=70000 is outside"),
        (["rollout.servers=0"], "rollout.servers=0 must be at least 1"),
        (["rollout.urls=[http://:8377]"], "must be a list of server addresses"),
        (["train=3", "train.steps=4"], "^train=3: train is a section"),
        (["rollout.urls=['localhost:8377']"], "^rollout.urls=..localhost:8377.. must be a list of server addresses"),
        (
            ["data.template={prompt}"],
            "^data.source=knights_and_knaves makes its own prompts, so data.template and data.co",
        ),
        (
            ["data.prompt_style=plain", "data.chat_template_kwargs.enable_thinking=false"],
            r'^data.chat_template_kwargs={"enable_thinking": false} has no effect with data.prompt_style=plain',
        ),
        (["rollout.urls=['http://127.0.0.1:1']", "eval.teacher=true"], "eval.teacher=true starts a server"),
        (
            ["objective.dynamic_sampling=32", "rollout.prompts_per_step=32"],
            "^objective.dynamic_sampling=32 leaves no group .* use more than rollout.prompts_per_step=32, or 0$",
        ),
        (
            ["objective.name=on_policy_kl", "objective.dynamic_sampling=99"],
            "^objective.dynamic_sampling=99 replaces .* objective.name=on_policy_kl has not; set it to 0$",
        ),
        (
            ["objective.dynamic_sampling=99", "rollout.overprovision=2"],
            "^objective.dynamic_sampling=99 waits .* rollout.overprovision=2 for the first; set one of them to 0$",
        ),
        (
            ["objective.name=cross_entropy", "objective.reference_kl=0.1"],
            "^objective.reference_kl=0.1 needs .* use objective.reference_kl=0$",
        ),
        (
            ["objective.reference_kl=0.1", "student.fp8.recipe=delayed"],
            "^objective.reference_kl=0.1 scores .* student.fp8.recipe=delayed .* or objective.reference_kl=0$",
        ),
        (
            ["objective.name=cross_entropy", "objective.reference_drift=true"],
            "^objective.reference_drift=true needs .* use objective.reference_drift=false$",
        ),
        (["objective.reference_offload=true"], "^objective.reference_offload=true has no effect .*; use false$"),
        (
            ["objective.reference_kl=1", "objective.reference_offload=true", "rollout.schedule=streaming"],
            "^rollout.schedule=streaming .* objective.reference_offload=true .* rollout.schedule=phased$",
        ),
        (
            ["objective.ratio=sequence"],
            "^objective.ratio=sequence .* objective.name=trrd needs .*; use token, or objective.name=grpo or kdrl$",
        ),
        (
            ["objective.name=cross_entropy", "objective.entropy_target=0.2"],
            "^objective.entropy_target=0.2 needs sampled tokens, .* objective.name=cross_entropy .*; use 0$",
        ),
        (
            ["objective.name=on_policy_kl", "objective.overlong_buffer=5"],
            "^objective.overlong_buffer=5 changes rewards, which objective.name=on_policy_kl does not use; use 0$",
        ),
        (
            ["objective.overlong_buffer=9", "rollout.sampling.max_tokens=8"],
            "^objective.overlong_buffer=9 exceeds rollout.sampling.max_tokens=8; use at most that$",
        ),
        (
            ["objective.name=cross_entropy", "objective.overlong_filter=true"],
            "overlong_filter=true .* use false$",
        ),
        (
            ["objective.name=cross_entropy", "objective.aggregation=fixed_length"],
            "^objective.aggregation=fixed_length divides by .* objective.name=cross_entropy .*; use sequence_mean or",
        ),
        (["train.distributed_timeout_s=10"], "train.distributed_timeout_s=10 must exceed"),
        (["data.eval_size=0"], "data.eval_size=0 .* use at least 1"),
        (["rollout.nodes=-1"], "rollout.nodes=-1 must not be negative"),
        (["teacher.ranks_per_node=-1"], "teacher.ranks_per_node=-1 must not be negative"),
        (["teacher.nodes=1"], "teacher.nodes=1 without ranks .* set teacher.ranks_per_node, or use teacher.nodes=0"),
        (["teacher.ranks_per_node=1", "objective.name=grpo"], "objective.name=grpo uses no teacher"),
        (["teacher.ranks_per_node=1", "teacher.offload=true"], "teacher.offload=true .* one of the two"),
        (
            ["teacher.ranks_per_node=1", "eval.teacher=true"],
            "eval.teacher=true serves .*eval.teacher=false",
        ),
        (
            ["teacher.ranks_per_node=2", "train.distributed_timeout_s=900", "rollout.request_timeout_s=900"],
            "train.distributed_timeout_s=900 must exceed rollout.request_timeout_s=900",
        ),
        (
            ["teacher.ranks_per_node=3", "teacher.layout.tensor_parallel=2"],
            r"the 3 ranks \(train.nodes \* teacher.ranks_per_node\); use .* is 1 or 3, or a multiple of 2 ranks",
        ),
        (["teacher.ranks_per_node=8"], "teacher.ranks_per_node=8 exceeds the 7 GPUs that each of the trainer's nodes"),
        (
            ["teacher.ranks_per_node=9", "teacher.nodes=1"],
            "exceeds the 8 GPUs that each of its nodes .*more teacher",
        ),
        (["teacher.ranks_per_node=7"], "rollout.servers=1 .* two tasks would share one"),
        (["train.gpu_memory_gb=0"], "train.gpu_memory_gb=0 must be a number above 0"),
        (["rollout.colocate=true", "rollout.nodes=1"], "rollout.colocate=true .* rollout.nodes=1 .* one of the two"),
        (["train.ranks_per_node=9"], "train.ranks_per_node=9 exceeds train.gpus_per_node=8: .* train.ranks_per_node=8"),
        (["rollout.tensor_parallel=16"], "rollout.tensor_parallel=16 exceeds train.gpus_per_node=8.* at most 8"),
        (["train.ranks_per_node=8"], "rollout.servers=1 .* two tasks would share one; .*rollout.colocate=true"),
        (["train.ranks_per_node=8", "rollout.nodes=1", "rollout.servers=9"], "rollout.servers=9 .* at most 8, or more"),
        (
            ["train.ranks_per_node=8", "rollout.colocate=true", "rollout.servers=2", "rollout.tensor_parallel=8"],
            "rollout.servers=2 of rollout.tensor_parallel=8 do not fit on the trainer's 8 GPUs",
        ),
    ],
)
def test_bad_fields(overrides, message):
    validate(GOOD)
    with pytest.raises(ConfigError, match=message) as caught:
        validate(apply_overrides(GOOD, overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.nodes=2", "rollout.servers=16"],
        ["rollout.colocate=true", "rollout.servers=8"],
        ["train.gpus_per_node=0", "rollout.servers=3"],
        ["rollout.urls=['http://127.0.0.1:1']"],
        ["objective.name=cross_entropy"],
    ],
)
def test_servers_find_room_next_to_full_nodes_of_ranks(overrides):
    validate(apply_overrides(GOOD, ["train.ranks_per_node=8", *overrides]))


def test_context_parallel_ranks_share_the_copies_of_a_model():
    for others in (["train.gpus_per_node=0", "student.transformer_impl=local"], ["student.layout.cp_comm_type=a2a"]):
        sizes = ["student.layout.context_parallel=2", "student.layout.tensor_parallel=2", "train.ranks_per_node=4"]
        config = apply_overrides(GOOD, [*sizes, *others])
        validate(config)
        assert (config.student.layout.copy_ranks, config.student.layout.model_ranks) == (2, 4)


def test_rl_takes_another_temperature():
    validate(apply_overrides(GOOD, ["rollout.sampling.temperature=0.7"]))


def test_objectives_without_a_group_or_a_teacher():
    validate(apply_overrides(GOOD, ["objective.name=on_policy_kl", "rollout.group_size=1"]))
    validate(apply_overrides(GOOD, ["objective.name=grpo", "teacher.path=''"]))


def test_schedules_overlap_where_servers_have_devices_of_their_own():
    def chosen(*overrides):
        return apply_overrides(RunConfig(), overrides).schedule

    assert chosen() == "streaming"
    assert (
        chosen("train.gpus_per_node=0") == chosen("rollout.colocate=true") == chosen("teacher.offload=true") == "phased"
    )
    assert chosen("train.gpus_per_node=0", "rollout.schedule=ahead") == "ahead"
