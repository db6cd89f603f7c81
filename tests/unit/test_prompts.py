"""Prompts: building from both kinds of source, errors that name the line, and resuming."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from prompt_table import as_prompts
from tiny_models import CLASSES, SIZES

from rlad_megatron.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SftConfig,
    TeacherConfig,
)
from rlad_megatron.data.prompts import PromptSource, build_prompts, build_splits, build_traces, fitting_traces
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.launch.preflight import check_prompts
from rlad_megatron.models.config_json import read_specs
from rlad_megatron.rewards.registry import load_reward
from rlad_megatron.run_prompts import read_prompts, read_traces
from rlad_megatron.servers.sampling import fitting_prompts
from rlad_megatron.types import Prompt

KK_TOKENIZER = Path(__file__).parents[2] / "recipes" / "assets" / "kk_tokenizer"
PLAIN_KK = DataConfig(train_size=40, eval_size=10, prompt_style="plain")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(KK_TOKENIZER)


class ChatTokenizer:
    """Stand-in for a chat model: one id per character, and a template that may open the reasoning."""

    eos_ids, size = (1, 2), 1 << 17

    def __init__(self, generation_prompt="A:"):
        self.generation_prompt = generation_prompt

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)

    def first_unknown(self, text):
        return ""

    def render_all(self, questions, style, template_kwargs):
        return [self.encode(self.text_of(question)) for question in questions]

    def text_of(self, question):
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return "\n".join(f"{m['role']}: {m['content']}" for m in messages) + "\n" + self.generation_prompt


def write_lines(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def questions(count):
    names = ["Zoey", "Oliver", "Emma", "Liam"]
    said = [f"{names[i % 4]} says {names[i // 4 % 4]} is a {role} ." for i in range(16) for role in ("knight", "knave")]
    return [{"prompt": said[i], "answer": str(i)} for i in range(count)]


def some_prompts(count, first=0):
    prompts = [Prompt(id=str(i), tokens=(i,), answer="", subset="all", text="") for i in range(first, first + count)]
    return as_prompts(prompts)


# --- knights and knaves ---


def test_puzzles_become_prompts(tokenizer):
    train, test = (build_prompts(PLAIN_KK, tokenizer, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (40, 10)
    prompt = train[0]
    assert tokenizer.render_all([prompt.text], "plain", {}) == [list(prompt.tokens)]
    assert (prompt.subset, prompt.answer[:4]) == ("PPL2", "(1) ")
    assert not {p.text for p in train} & {p.text for p in test}


def test_chat_style_renders_instruction_and_question():
    prompt = build_prompts(DataConfig(train_size=1, eval_size=0), ChatTokenizer(), "train")[0]
    assert prompt.text.startswith("system: You are") and "\nuser: A very special island" in prompt.text
    assert prompt.text.endswith("\nA:")


def test_gold_traces_end_with_eos_and_earn_the_whole_reward(tokenizer):
    reward = load_reward("knights_and_knaves")
    traces = build_traces(PLAIN_KK, SftConfig(), tokenizer)
    assert [prompt for prompt, _ in traces] == list(build_prompts(PLAIN_KK, tokenizer, "train"))
    for prompt, response in traces:
        assert response[-1] == tokenizer.eos_ids[0] and response.count(tokenizer.eos_ids[0]) == 1
        assert reward(prompt, tokenizer.decode(response)).score == 3.0


def test_gold_traces_leave_out_the_tag_that_the_template_wrote():
    reward = load_reward("knights_and_knaves")
    config = DataConfig(train_size=2, eval_size=0)
    for template in ("A:", "A: <think>\n"):
        chat = ChatTokenizer(template)
        for prompt, response in build_traces(config, SftConfig(), chat):
            assert (prompt.text + chat.decode(response)).count("A: <think>") == (template != "A:")
            assert reward(prompt, chat.decode(response[:-1])).score == 3.0


@pytest.mark.parametrize(("template", "learned"), [("A:", "<think>so"), ("A: <think>\n", "so")])
def test_traces_leave_out_the_tag_that_the_template_wrote(template, learned, tmp_path):
    path = write_lines(tmp_path / "traces.jsonl", [{"prompt": "Why ?", "response": "<think>so"}])
    chat = ChatTokenizer(template)
    ((_, response),) = build_traces(DataConfig(), SftConfig(traces=path), chat)
    assert chat.decode(response[:-1]) == learned


# --- JSONL ---


def test_jsonl_fields_and_defaults(tmp_path, tokenizer):
    lines = [{**questions(1)[0], "subset": "easy", "id": "first"}, "", questions(2)[1]]
    path = write_lines(tmp_path / "data.jsonl", lines)
    first, second = build_prompts(DataConfig(source=path, prompt_style="plain", eval_size=0), tokenizer, "train")
    assert (first.id, first.subset, first.answer) == ("first", "easy", "0")
    assert (second.id, second.subset, second.answer) == ("data/3", "all", "1")
    assert first.text == "Zoey says Zoey is a knight ."
    assert [list(first.tokens)] == tokenizer.render_all([first.text], "plain", {})


@pytest.mark.parametrize(
    ("number", "text"),
    [("42", "42"), ("-0.5", "-0.5"), ("42.0", "42.0"), ("1e-5", "0.00001"), ("12e20", "1200000000000000000000")],
)
def test_numeric_answers_become_text(tmp_path, tokenizer, number, text):
    path = write_lines(tmp_path / "data.jsonl", [f'{{"prompt": "Zoey", "answer": {number}}}'])
    (prompt,) = build_prompts(DataConfig(source=path, prompt_style="plain", eval_size=0), tokenizer, "train")
    assert prompt.answer == text


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(questions(1)[0]).encode())
    source = str(tmp_path / "data.jsonl")
    (prompt,) = build_prompts(DataConfig(source=source, prompt_style="plain", eval_size=0), tokenizer, "train")
    assert prompt.answer == "0"


def test_a_word_without_a_token_is_refused_by_line(tmp_path, tokenizer):
    good, bad = questions(2)
    plain = DataConfig(source=str(tmp_path / "data.jsonl"), prompt_style="plain", eval_size=0)
    write_lines(tmp_path / "data.jsonl", [good, {**bad, "prompt": "Zoey says Oliver is a zebra ."}])
    with pytest.raises(DataError, match="data.jsonl:2: the tokenizer has no token for 'zebra' in prompt; use words"):
        build_prompts(plain, tokenizer, "train")
    traces = write_lines(
        tmp_path / "traces.jsonl", [{**good, "response": "suppose Zoey knight"}, {**bad, "response": "?"}]
    )
    with pytest.raises(DataError, match=r"traces.jsonl:2: .* '\?' in response"):
        build_traces(PLAIN_KK, SftConfig(traces=traces), tokenizer)


def test_jsonl_chat_messages(tmp_path):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]
    lines = [{"prompt": messages, "answer": "4"}, {"prompt": "3 + 3?", "answer": "6"}]
    path = write_lines(tmp_path / "data.jsonl", lines)
    prompts = build_prompts(DataConfig(source=path, eval_size=0), ChatTokenizer(), "train")
    assert [p.text for p in prompts] == ["system: Be short.\nuser: 2 + 2?\nA:", "user: 3 + 3?\nA:"]


@pytest.mark.parametrize("eval_size, held_out", [(2, 2), (100, 3)])
def test_jsonl_holds_out_the_last_lines(tmp_path, tokenizer, eval_size, held_out):
    path = write_lines(tmp_path / "data.jsonl", questions(32))
    config = DataConfig(source=path, prompt_style="plain", eval_size=eval_size)
    train, test = (build_prompts(config, tokenizer, split) for split in ("train", "test"))
    assert [int(p.answer) for p in train] == list(range(32 - held_out))
    assert [int(p.answer) for p in test] == list(range(32 - held_out, 32))
    both = build_splits(config, tokenizer)
    assert (list(both.train), list(both.test), both.skipped) == (list(train), list(test), 0)


def test_jsonl_held_out_prompts_do_not_occur_in_training(tmp_path, tokenizer):
    lines = questions(20)
    lines[3]["prompt"] = lines[19]["prompt"]
    config = DataConfig(source=write_lines(tmp_path / "d.jsonl", lines), prompt_style="plain", eval_size=1)
    splits = build_splits(config, tokenizer)
    assert [int(p.answer) for p in splits.train] == [i for i in range(19) if i != 3]
    assert splits.skipped == 1


def test_eval_source_keeps_all_lines_for_training(tmp_path, tokenizer):
    source = write_lines(tmp_path / "train.jsonl", questions(20))
    eval_source = write_lines(tmp_path / "eval.jsonl", questions(3))
    config = DataConfig(source=source, eval_source=eval_source, prompt_style="plain")
    assert len(build_prompts(config, tokenizer, "train")) == 20
    assert [p.id for p in build_prompts(config, tokenizer, "test")] == ["eval/1", "eval/2", "eval/3"]


def test_too_few_lines_to_hold_out(tmp_path, tokenizer):
    path = write_lines(tmp_path / "data.jsonl", questions(9))
    with pytest.raises(DataError, match=r"9 lines are too few.*data.eval_source"):
        build_prompts(DataConfig(source=path, prompt_style="plain"), tokenizer, "test")


GOOD = {"prompt": "Zoey", "answer": "1"}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "Zoey", ', r":2: not JSON \(.*column \d+\); write an object"),
        ('["Zoey", "1"]', r":2: a list, not an object"),
        ({"prompt": "Zoey"}, r':2: no "answer"; there are: prompt; name the column with data.columns.answer=COLUMN'),
        ({"answer": "1", "question": "Zoey"}, r':2: no "prompt"; there are: answer, question; name .*columns.prompt=C'),
        ({"prompt": " ", "answer": "1"}, r':2: "prompt" must be'),
        ({"prompt": [], "answer": "1"}, r':2: "prompt" must be'),
        ({"prompt": [{"role": "user"}], "answer": "1"}, r':2: "prompt" must be'),
        ({"prompt": "Zoey", "answer": None}, ':2: "answer" is null; write a string or a finite number'),
        ({"prompt": "Zoey", "answer": True}, ':2: "answer" is true; write a string or a finite number'),
        ('{"prompt": "Zoey", "answer": 1e999}', ':2: "answer" is Infinity; write a string or a finite number'),
        ({"prompt": "Zoey", "answer": {"x": 42}}, r':2: "answer" is {"x": 42}; write a string or a finite number'),
        ({"prompt": "Zoey", "answer": []}, r':2: "answer" is \[\]; write a string or a finite number'),
        ({"prompt": "Zoey", "answer": [1, None]}, r':2: "answer" is \[1, null\]; write a string or a finite number'),
        ({"prompt": "Zoey", "answer": ""}, r':2: "answer" is empty'),
        ({**GOOD, "subset": [{}]}, r':2: "subset" is \[{}\]; write a string'),
        ({**GOOD, "id": "data/1"}, r":2: id 'data/1' is also at .*data.jsonl:1; make it unique"),
        ({**GOOD, "prompt": [{"role": "user", "content": "x"}]}, r":2: prompt is a list of messages"),
    ],
)
def test_bad_lines_are_named(tmp_path, tokenizer, line, message):
    path = write_lines(tmp_path / "data.jsonl", [GOOD, line])
    with pytest.raises(DataError, match=r"data\.jsonl" + message):
        build_prompts(DataConfig(source=path, prompt_style="plain", eval_size=0), tokenizer, "train")


def test_bad_files_are_named(tmp_path, tokenizer):
    def build(path):
        return build_prompts(DataConfig(source=str(path), prompt_style="plain"), tokenizer, "train")

    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file; give a .jsonl, .*, or a preset \(gsm8k, "):
        build(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: no lines"):
        build(write_lines(tmp_path / "empty.jsonl", ["", " "]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl: not UTF-8"):
        build(tmp_path / "latin.jsonl")


def test_traces_from_jsonl(tmp_path, tokenizer):
    path = write_lines(tmp_path / "traces.jsonl", [{"prompt": "Zoey", "response": "yes no"}])
    (prompt, response), *rest = build_traces(PLAIN_KK, SftConfig(traces=path), tokenizer)
    assert (prompt.text, prompt.answer, rest) == ("Zoey", "", [])
    assert response == [*tokenizer.encode("yes no"), tokenizer.eos_ids[0]]

    path = write_lines(tmp_path / "bad.jsonl", [GOOD])
    with pytest.raises(DataError, match=r'bad\.jsonl:1: no "response"'):
        build_traces(PLAIN_KK, SftConfig(traces=path), tokenizer)
    with pytest.raises(ConfigError, match=r"set sft\.traces"):
        build_traces(DataConfig(source=path), SftConfig(), tokenizer)


# --- PromptSource ---


def ids(batch):
    return [prompt.id for prompt in batch]


def test_each_epoch_has_every_prompt_once_in_its_own_order():
    source = PromptSource(some_prompts(20), seed=0)
    epochs = [ids(source.next_batch(20)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_run_on_across_epochs():
    whole = ids(PromptSource(some_prompts(5), seed=0).next_batch(21))
    source = PromptSource(some_prompts(5), seed=0)
    assert [prompt.id for n in (3, 7, 11) for prompt in source.next_batch(n)] == whole


def test_seed_decides_the_order():
    first, same, other = (ids(PromptSource(some_prompts(20), seed).next_batch(20)) for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize("before", [0, 3, 5, 13])
def test_resume_gives_the_same_batches(before):
    source = PromptSource(some_prompts(5), seed=4)
    source.next_batch(before)
    state = json.loads(json.dumps(source.state_dict()))
    expected = [ids(source.next_batch(4)) for _ in range(6)]
    resumed = PromptSource(some_prompts(5), seed=4)
    resumed.next_batch(2)
    resumed.load_state_dict(state)
    assert [ids(resumed.next_batch(4)) for _ in range(6)] == expected


@pytest.mark.parametrize("prompts, seed", [(some_prompts(6), 4), (some_prompts(5, first=1), 4), (some_prompts(5), 5)])
def test_resume_with_other_prompts_or_seed_is_refused(prompts, seed):
    state = PromptSource(some_prompts(5), seed=4).state_dict()
    with pytest.raises(DataError, match="other prompts or another seed"):
        PromptSource(prompts, seed).load_state_dict(state)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_the_fingerprint_of_prompts_is_that_of_earlier_checkpoints(monkeypatch, count):
    monkeypatch.setattr("rlad_megatron.data.table.REPR_PROMPTS", 3)
    prompts = [Prompt(str(i), tuple(range(i)), "", "", "") for i in range(count)]
    expected = zlib.crc32(repr([prompt.tokens for prompt in prompts]).encode())
    assert as_prompts(prompts).fingerprint() == expected


# --- prompts that are too long ---


def run_config(tmp_path, lengths, *, student=100, teacher=100, response=10, eval_response=10, **data):
    """A run on prompts of these numbers of tokens, with models of these numbers of positions. Holds one line out."""
    lines = [{"prompt": " ".join(["Zoey"] * (length - 1)), "answer": "1"} for length in lengths]
    for role, positions in {"student": student, "teacher": teacher}.items():
        sizes = SIZES | {"max_position_embeddings": positions}
        CLASSES["qwen3"](**sizes).save_pretrained(tmp_path / role)
    return RunConfig(
        student=ModelConfig(path=str(tmp_path / "student")),
        teacher=TeacherConfig(path=str(tmp_path / "teacher")),
        data=DataConfig(
            source=write_lines(tmp_path / "data.jsonl", lines),
            prompt_style="plain",
            **{"eval_size": 1, "reward": "math"} | data,
        ),
        rollout=RolloutConfig(sampling=SamplingConfig(max_tokens=response)),
        eval=EvalConfig(sampling=SamplingConfig(max_tokens=eval_response)),
    )


def fitting(config, tokenizer, split):
    return fitting_prompts(config, read_specs(config), build_prompts(config.data, tokenizer, split), split)


@pytest.fixture
def one_rank(monkeypatch):
    """Prompts are read with the demo's tokenizer, in a process without ranks."""
    monkeypatch.setattr("rlad_megatron.run_prompts.on_first_rank", lambda action, group: action())
    monkeypatch.setattr("rlad_megatron.run_prompts.load_tokenizer", lambda path: load_tokenizer(KK_TOKENIZER))


LENGTHS = [*range(10, 29), 80, 9]  # the last one is held out


@pytest.mark.parametrize(
    ("change", "longest", "dropped"),
    [
        ({"student": 90}, 80, 0),  # 80 and a response of 10
        ({"student": 89}, 28, 1),
        ({"teacher": 89}, 28, 1),
        ({"response": 21}, 28, 1),
        ({"eval_response": 21}, 28, 1),
        ({"max_prompt_tokens": 80}, 80, 0),
        ({"max_prompt_tokens": 28}, 28, 1),
        ({"max_prompt_tokens": 27}, 27, 2),
        ({"max_prompt_tokens": 99, "student": 89}, 28, 1),
    ],
)
def test_long_prompts_are_dropped_and_counted(tmp_path, tokenizer, capsys, one_rank, change, longest, dropped):
    config = run_config(tmp_path, LENGTHS, **change)
    prompts, count = fitting(config, tokenizer, "train")
    assert [len(prompt.tokens) for prompt in prompts] == [length for length in LENGTHS[:-1] if length <= longest]
    assert count == dropped
    assert list(check_prompts(config, read_specs(config), tokenizer)[0]) == list(prompts)
    read = read_prompts(config)
    assert list(read.held.train) == list(prompts) and read.dropped == dropped
    assert read.max_model_len == longest + max(change.get("response", 10), change.get("eval_response", 10))
    said = f"data: dropping {dropped} of 20 prompts to train on, which are too long\n" if dropped else ""
    assert capsys.readouterr().out == said


def test_traces_of_held_out_prompts_are_left_out_and_counted(tmp_path, tokenizer, capsys, one_rank):
    train, test = (list(build_prompts(PLAIN_KK, tokenizer, split)) for split in ("train", "test"))
    asked = [train[0], test[0], test[-1], train[-1]]
    path = write_lines(tmp_path / "traces.jsonl", [{"prompt": prompt.text, "response": "yes"} for prompt in asked])
    config = replace(run_config(tmp_path, LENGTHS), data=PLAIN_KK, sft=SftConfig(traces=path, batch_size=2))
    assert [prompt.tokens for prompt, _ in read_traces(config)] == [train[0].tokens, train[-1].tokens]
    assert capsys.readouterr().out == "data: leaving out 2 of 4 traces, whose prompts are held out\n"


def test_ranks_above_0_hold_no_prompts(tmp_path, monkeypatch, one_rank):
    config = run_config(tmp_path, LENGTHS)
    first = read_prompts(config)
    common = replace(first, held=None)
    monkeypatch.setattr("rlad_megatron.run_prompts.on_first_rank", lambda action, group: common)
    assert read_prompts(config) == common and len(first.held.train) == 20 and len(common.probe) == 1


def test_a_teacher_that_the_run_does_not_have_does_not_count(tmp_path, tokenizer):
    config = run_config(tmp_path, LENGTHS, teacher=89)
    grpo = replace(config, objective=ObjectiveConfig(name="grpo"))
    evaluated = replace(grpo, eval=replace(grpo.eval, teacher=True))
    for run, dropped in ((grpo, 0), (evaluated, 1)):
        assert fitting(run, tokenizer, "train")[1] == dropped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"max_prompt_tokens": 26},
            r"3 of 20 prompts to train on, more than a tenth, exceed 26 tokens \(data.max_prompt_tokens=26\); the "
            r"longest, 'data/20', has 80; raise it",
        ),
        (
            {"teacher": 36, "max_prompt_tokens": 90},
            r"exceed 26 tokens \(the 36 positions of the teacher minus a response of 10\); .* lower "
            r"rollout.sampling.max_tokens and eval.sampling.max_tokens, or shorten the prompts",
        ),
        ({"student": 10}, r"20 of 20 prompts .* exceed 0 tokens \(the 10 positions of the student"),
    ],
)
def test_a_run_that_would_drop_more_than_a_tenth_is_refused(tmp_path, tokenizer, change, message):
    config = run_config(tmp_path, LENGTHS, **change)
    with pytest.raises(ConfigError, match=message):
        fitting(config, tokenizer, "train")


def test_held_out_prompts_that_are_too_long(tmp_path, tokenizer):
    config = run_config(tmp_path, [*range(10, 29), 95])
    with pytest.raises(ConfigError, match="1 of 1 prompts to test on, .* exceed 90 tokens"):
        fitting(config, tokenizer, "test")


def test_no_prompts_to_train_on(tmp_path, tokenizer):
    config = run_config(tmp_path, [10] * 10)  # all of them are the held-out one
    with pytest.raises(ConfigError, match="no prompts to train on; add lines or puzzles"):
        check_prompts(config, read_specs(config), tokenizer)


def test_traces_that_do_not_fit_are_dropped_up_to_a_tenth():
    def trace(prompt, response):
        return Prompt(str(prompt), (1,) * prompt, "", "", ""), [2] * response

    fits, long = [trace(6, 4)] * 18, [trace(6, 5), trace(8, 1)]
    assert fitting_traces([*fits, *long], 7, 10) == fits
    assert fitting_traces([*fits, *long], 0, 11) == [*fits, *long]
    with pytest.raises(ConfigError, match=r"2 of 19 traces, more than a tenth, exceed the 10 .*max_prompt_tokens=7"):
        fitting_traces([*fits[1:], *long], 7, 10)
