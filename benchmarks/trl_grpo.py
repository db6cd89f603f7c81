"""GRPO by TRL's trainer, with generation by transformers. `against_trl.py` runs this in TRL's environment.

    python trl_grpo.py FOLDER

Reads FOLDER/task.json: the model's folder, the tokenizer's pieces, prompts to train on in their order of use, held-out
prompts and how to sample for them, and the fields of GRPOConfig. Writes FOLDER/result.json: seconds, mean reward and
mean tokens of a response of each step, and the accuracy before and after them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlad_megatron.rewards.knights_and_knaves import reward
from rlad_megatron.rewards.registry import RewardResult
from rlad_megatron.types import Prompt


class StepClock(TrainerCallback):
    """Seconds of each step: generation, reward and update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def main() -> None:
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    tokenizer = word_tokenizer(task["pieces"])
    for prompt in task["train"]:
        assert tokenizer(prompt["text"])["input_ids"] == prompt["tokens"], prompt
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    clock = StepClock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=str(folder), **task["grpo"]),
        train_dataset=Dataset.from_list([{"prompt": p["text"], "answer": p["answer"]} for p in task["train"]]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    before = accuracy(model, tokenizer, task)
    trainer.train()
    steps = trainer.state.log_history[: len(clock.seconds)]
    result = {
        "seconds": clock.seconds,
        "reward": [step["reward"] for step in steps],
        "tokens": [step["completions/mean_length"] for step in steps],
        "accuracy": [before, accuracy(model, tokenizer, task)],
    }
    (folder / "result.json").write_text(json.dumps(result))


def word_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """The demo's SentencePiece model, whose pieces are words, as a tokenizer that TRL takes."""
    words = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", pieces.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def rewards(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [score(*each).score for each in zip(prompts, completions, answer, strict=True)]


def score(prompt: str, completion: str, answer: str) -> RewardResult:
    return reward(Prompt(id=prompt, tokens=(), answer=answer, subset="", text=prompt), completion)


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: dict[str, Any]) -> float:
    """Share of the held-out prompts that the model solves."""
    model.eval()
    texts = [prompt["text"] for prompt in task["eval"]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    outputs = model.generate(**batch, **task["eval_sampling"], do_sample=True, top_k=0, pad_token_id=0)
    completions = tokenizer.batch_decode(outputs[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [prompt["answer"] for prompt in task["eval"]]
    solved = [score(*each).solved for each in zip(texts, completions, answers, strict=True)]
    return sum(solved) / len(solved)


if __name__ == "__main__":
    main()
