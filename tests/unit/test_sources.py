"""Data as people have it: files of each kind, the hub, presets, columns, templates, and what bad input gets."""

import json
from pathlib import Path

import datasets
import pyarrow.csv
import pyarrow.parquet
import pytest

from rlad_megatron.config import DataConfig
from rlad_megatron.data import presets
from rlad_megatron.data.prompts import build_prompts, build_splits
from rlad_megatron.data.sources import hub_parts
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.rewards.answers import check_answers
from rlad_megatron.rewards.registry import load_reward

KK_TOKENIZER = Path(__file__).parents[2] / "recipes" / "assets" / "kk_tokenizer"
SAID = "Zoey says Oliver is a knight ."
GSM8K = [
    {"question": SAID, "answer": "Each of 6 costs $12$.\n#### 72"},
    {"question": "Zoey says", "answer": "#### 1,234"},
]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": SAID, "role": "user"}],
        "reward_model": {"ground_truth": str(number), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"uid-{number}"},
    }
    for number in (34, 35)
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(KK_TOKENIZER)


class MessageTokenizer:
    """Renders messages as lines, and keeps what the template was given."""

    eos_ids, size, given = (1,), 1 << 17, None

    def decode(self, ids):
        return "".join(map(chr, ids))

    def first_unknown(self, text):
        return ""

    def render_all(self, questions, style, template_kwargs):
        self.given = (style, template_kwargs)
        chats = [[{"role": "user", "content": q}] if isinstance(q, str) else q for q in questions]
        return [[ord(c) for c in "|".join(f"{m['role']}: {m['content']}" for m in chat)] for chat in chats]


def plain(source, **fields):
    return DataConfig(source=str(source), prompt_style="plain", eval_size=0, **fields)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), path)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, tokenizer, kind):
    rows = [
        {"prompt": SAID, "answer": "007", "subset": "easy", "n": "1"},
        {"prompt": "Zoey says", "answer": "NA", "subset": "hard", "n": "2"},
    ]
    path = write(tmp_path / f"data.{kind}", rows)
    prompts = build_prompts(plain(path), tokenizer, "train")
    assert [(p.id, p.text, p.answer, p.subset, p.metadata) for p in prompts] == [
        ("data/1", SAID, "007", "easy", {"n": "1"}),
        ("data/2", "Zoey says", "NA", "hard", {"n": "2"}),
    ]
    assert prompts.where(1) == (f"{path}:2" if kind == "jsonl" else f"{path}: row 2")


def test_answers_of_gsm8k_are_read_where_they_are(tmp_path, tokenizer):
    path = write(tmp_path / "train.parquet", GSM8K)
    config = plain(path, columns={"prompt": "question"}, reward="math")
    prompts = build_prompts(config, tokenizer, "train")
    check_answers(config, prompts)
    reward = load_reward("math")
    assert reward(prompts[0], "so \\boxed{72}").solved and not reward(prompts[0], "\\boxed{12}").solved
    assert reward(prompts[1], "\\boxed{1234}").solved


def test_nested_columns_and_messages_of_dapo(tmp_path):
    path = write(tmp_path / "dapo.parquet", DAPO)
    columns = {"answer": "reward_model.ground_truth", "id": "extra_info.index", "style": "reward_model.style"}
    config = DataConfig(source=str(path), eval_size=0, columns=columns, chat_template_kwargs={"enable_thinking": False})
    tokenizer = MessageTokenizer()
    first, second = build_prompts(config, tokenizer, "train")
    assert (first.id, first.answer, first.text) == ("uid-34", "34", f"user: {SAID}")
    assert second.metadata == {"style": "rule-lighteval/MATH_v2"}, "columns that are not named are not kept"
    assert tokenizer.given == ("chat", {"enable_thinking": False})


def test_a_template_goes_around_the_users_last_message(tmp_path):
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]
    path = write(tmp_path / "d.jsonl", [{"prompt": "1 + 1?", "answer": 2}, {"prompt": chat, "answer": 4}])
    config = DataConfig(source=str(path), eval_size=0, template="{prompt} Use \\boxed{}.")
    prompts = build_prompts(config, MessageTokenizer(), "train")
    assert [p.text for p in prompts] == [
        "user: 1 + 1? Use \\boxed{}.",
        "system: Be short.|user: 2 + 2? Use \\boxed{}.",
    ]
    assistant = write(tmp_path / "a.jsonl", [{"prompt": [{"role": "assistant", "content": "x"}], "answer": 1}])
    with pytest.raises(DataError, match=r"a.jsonl:1: no message of the user, which data.template is for"):
        build_prompts(DataConfig(source=str(assistant), eval_size=0, template="{prompt}"), MessageTokenizer(), "train")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.25, "0.25"),
        ([42], "42"),
        (["1", 2], "1, 2"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        (1e-7, "0.0000001"),
    ],
)
def test_answers_become_text_that_the_reward_reads(tmp_path, tokenizer, value, text):
    suffix = "jsonl" if isinstance(value, list) and len({type(v) for v in value}) > 1 else "parquet"
    path = write(tmp_path / f"d.{suffix}", [{"prompt": SAID, "answer": value}])
    (prompt,) = build_prompts(plain(path), tokenizer, "train")
    assert prompt.answer == text
    assert load_reward("math")(prompt, f"\\boxed{{{text}}}").solved


def test_folders_and_patterns(tmp_path, tokenizer):
    rows = [{"prompt": SAID, "answer": "1"}]
    for name in ("a/b.jsonl", "a/c.parquet", "a/README.md", "d/b.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch() if path.suffix == ".md" else write(path, rows)
    assert build_prompts(plain(tmp_path / "a"), tokenizer, "train").ids == ["b/1", "c/1"]
    same_stem = build_prompts(plain(tmp_path / "*" / "b.jsonl"), tokenizer, "train").ids
    assert same_stem == [f"{tmp_path}/a/b/1", f"{tmp_path}/d/b/1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no .jsonl, .json, .csv or .parquet file in this folder; give a"):
        build_prompts(plain(tmp_path / "empty"), tokenizer, "train")


def test_a_column_that_does_not_exist(tmp_path, tokenizer):
    path = write(tmp_path / "gsm.parquet", GSM8K)
    with pytest.raises(DataError, match=r'gsm.parquet: no "prompt"; there are: question, answer; name .*prompt=COLUMN'):
        build_prompts(plain(path), tokenizer, "train")
    with pytest.raises(DataError, match=r'gsm.parquet: no "gold"; there are: question, answer; .*columns.answer=COL'):
        build_prompts(plain(path, columns={"prompt": "question", "answer": "gold"}), tokenizer, "train")
    nested = write(tmp_path / "dapo.parquet", DAPO)
    message = r'row 1: no "reward_model.truth"; there are: reward_model.ground_truth, reward_model.style; name'
    with pytest.raises(DataError, match=message):
        build_prompts(plain(nested, columns={"answer": "reward_model.truth"}), tokenizer, "train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": SAID, "answer": "1"}, {"prompt": SAID, "answer": None}], 'row 2: "answer" is null; write a str'),
        ([{"prompt": "", "answer": "1"}], 'row 1: "prompt" must be'),
        ([{"prompt": SAID, "answer": "1", "id": "a"}] * 2, r"row 2: id 'a' is also at .*: row 1; make it unique"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, rows, message):
    path = write(tmp_path / "d.parquet", rows)
    with pytest.raises(DataError, match=rf"d.parquet: {message}"):
        build_prompts(plain(path), tokenizer, "train")


def test_files_without_rows_or_of_another_kind(tmp_path, tokenizer):
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [""], "answer": [""]})[:0], empty)
    with pytest.raises(DataError, match=r'empty.parquet: no lines; write one object with "prompt" and "answer" on'):
        build_prompts(plain(empty), tokenizer, "train")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"broken.parquet: `datasets` cannot read it \(.*\); write it again") as caught:
        build_prompts(plain(tmp_path / "broken.parquet"), tokenizer, "train")
    assert "\n" not in str(caught.value)


def test_answers_that_the_reward_cannot_read(tmp_path, tokenizer):
    rows = [{"prompt": SAID, "answer": answer} for answer in ("5", "So: ####", "(1) Zoey is a knight")]
    path = write(tmp_path / "d.parquet", rows)
    for reward, row, answer in (("math", 2, "'So: ####'"), ("knights_and_knaves", 1, "'5'")):
        config = plain(path, reward=reward)
        with pytest.raises(DataError, match=rf"row {row}: data.reward={reward} cannot read the answer {answer}; set d"):
            check_answers(config, build_prompts(config, tokenizer, "train"))


def test_the_first_rows_are_checked_as_if_they_were_all(tmp_path, tokenizer):
    rows = [{"prompt": f"Zoey says {'knight ' * i}", "answer": str(i)} for i in range(1, 31)]
    path = write(tmp_path / "d.jsonl", rows)
    config = DataConfig(source=str(path), prompt_style="plain", eval_size=2)
    some, exact, whole = (build_splits(config, tokenizer, first) for first in (20, 30, None))
    assert (some.complete, exact.complete, whole.complete) == (False, True, True)
    assert [p.answer for p in some.test] == ["19", "20"] and [p.answer for p in whole.test] == ["29", "30"]
    apart = DataConfig(source=str(path), eval_source=str(path), prompt_style="plain")
    assert not build_splits(apart, tokenizer, 20).complete and build_splits(apart, tokenizer, 31).complete


# --- the hub and presets ---


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf:a/b", ("a/b", "", "train")),
        ("hf:a/b:test", ("a/b", "", "test")),
        ("hf:a/b:main", ("a/b", "main", "train")),
        ("hf:a/b:main:validation", ("a/b", "main", "validation")),
        ("hf:a/b::2ppl", ("a/b", "", "2ppl")),
    ],
)
def test_names_of_the_hub(name, parts):
    assert hub_parts(presets.Source("data.source", name), "train") == parts


@pytest.mark.parametrize("name", ["hf:gsm8k", "hf:a/b:c:d:e", "hf:a/b c"])
def test_names_that_the_hub_cannot_have(name):
    with pytest.raises(DataError, match=rf"data.source={name}: not a name of the hub; write hf:OWNER/NAME, "):
        hub_parts(presets.Source("data.source", name), "train")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has what a test puts there: (name, config, split) -> rows. Files are read as ever."""
    held, load = {}, datasets.load_dataset

    def load_dataset(name, config=None, *, split, **options):
        if options:
            return load(name, split=split, **options)
        file = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet", held[name, config, split])
        return load("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def test_a_preset_knows_columns_template_reward_and_its_test_split(hub):
    hub["openai/gsm8k", "main", "train"], hub["openai/gsm8k", "main", "test"] = GSM8K, GSM8K[:1]
    config = DataConfig(source="gsm8k")
    splits = build_splits(config, MessageTokenizer())
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert splits.train[1].text == f"user: Zoey says\n\n{boxed}"
    assert splits.train.ids == ["gsm8k/train/1", "gsm8k/train/2"] and splits.test.ids == ["gsm8k/test/1"]
    assert splits.train.where(1) == "hf:openai/gsm8k:main:train: row 2" and splits.train[0].subset == "gsm8k"
    assert presets.reward_name(config) == "math"
    own = DataConfig(source="gsm8k", template="Q: {prompt}")
    assert build_prompts(own, MessageTokenizer(), "train")[1].text == "user: Q: Zoey says"


def test_a_published_puzzle_has_the_instruction_and_an_answer_that_the_reward_reads(hub):
    row = {"quiz": "A very special island ...", "solution_text_format": "(1) Zoey is a knave\n(2) Oliver is a knight"}
    hub["K-and-K/knights-and-knaves", "train", "2ppl"] = hub["K-and-K/knights-and-knaves", "test", "2ppl"] = [row]
    config = DataConfig(source="kk_2ppl")
    (prompt,) = build_prompts(config, MessageTokenizer(), "train")
    assert prompt.text.startswith("system: You are a careful assistant.") and prompt.text.endswith(
        "|user: " + row["quiz"]
    )
    assert prompt.subset == "PPL2"
    check_answers(config, build_prompts(config, MessageTokenizer(), "test"))


def test_training_and_evaluation_can_be_different_sets(hub, tmp_path):
    hub["math-ai/aime24", None, "test"] = [{"problem": "What?", "solution": "It is \\boxed{204}."}]
    source = write(tmp_path / "own.jsonl", [{"q": "1 + 1?", "answer": 2}])
    config = DataConfig(source=str(source), columns={"prompt": "q"}, eval_source="aime24", reward="math")
    splits = build_splits(config, MessageTokenizer())
    assert splits.train[0].text == "user: 1 + 1?" and splits.test[0].subset == "aime24"
    assert load_reward("math")(splits.test[0], "\\boxed{204}").solved


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"source": "aime24"},
            "data.source=aime24 has no part to train on; use it as data.eval_source, and one",
        ),
        (
            {"source": "gsm8k", "eval_source": "openr1_math"},
            "data.eval_source=openr1_math has no part for evaluation",
        ),
    ],
)
def test_presets_in_the_wrong_place(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_splits(DataConfig(**fields), MessageTokenizer())


@pytest.mark.parametrize(
    ("fields", "reward"),
    [
        ({}, "knights_and_knaves"),
        ({"source": "kk_8ppl"}, "knights_and_knaves"),
        ({"source": "own.jsonl", "eval_source": "aime25"}, "math"),
        ({"source": "gsm8k", "reward": "math_lenient"}, "math_lenient"),
        (
            {"source": "own.jsonl"},
            "data.reward=auto: data.source=own.jsonl has no reward of its own; set data.rew",
        ),
        ({"source": "gsm8k", "eval_source": "kk_2ppl"}, r"different rewards \(math, knights_and_knaves\); use sources"),
    ],
)
def test_the_reward_follows_the_data(fields, reward):
    if "data.reward" in reward or "different" in reward:
        with pytest.raises(ConfigError, match=reward):
            presets.reward_name(DataConfig(**fields))
    else:
        assert presets.reward_name(DataConfig(**fields)) == reward


def test_a_hub_name_without_a_network_says_which_cache_was_searched(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = rf"data.source=hf:a/b: not in the cache {tmp_path}/cache, .*\(HF_HUB_OFFLINE is set\); run `rlad d"
    with pytest.raises(DataError, match=message) as caught:
        build_prompts(DataConfig(source="hf:a/b"), MessageTokenizer(), "train")
    assert "\n" not in str(caught.value)
