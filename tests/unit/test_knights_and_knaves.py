"""Knights & Knaves: puzzles, renderings, traces and the tokenizer made for them."""

import importlib.util
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlad_megatron.config import DataConfig
from rlad_megatron.data import knights_and_knaves as kk
from rlad_megatron.data.tokenizers import load_tokenizer
from rlad_megatron.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
KK_TOKENIZER = ROOT / "recipes" / "assets" / "kk_tokenizer"
ALL_PEOPLE = DataConfig(people=(2, 3, 4, 5, 6, 7, 8), train_size=6, eval_size=14, prompt_style="plain")
DEEP = DataConfig(people=(2, 3), depth=4, width=3, train_size=60, eval_size=20, prompt_style="plain")


@pytest.fixture(scope="module")
def puzzles():
    configs = (ALL_PEOPLE, DEEP, replace(ALL_PEOPLE, people=(2,), train_size=300))
    return [puzzle for config in configs for puzzle in kk.generate_puzzles(config, "train")]


def parse_plain(text):
    """Read a plain prompt back by its grammar: [(speaker, truth function of roles)]. Knows nothing of the generator."""

    def operand(words):
        if words[0] == "(":
            words.pop(0)
            inner = statement(words)
            assert words.pop(0) == ")"
            return inner
        name, is_, a, role = (words.pop(0) for _ in range(4))
        assert (is_, a) == ("is", "a") and role in ("knight", "knave")
        return lambda roles: roles[name] == (role == "knight")

    def statement(words):
        if words[0] == "not":
            words.pop(0)
            inner = operand(words)
            return lambda roles: not inner(roles)
        if words[0] == "if":
            words.pop(0)
            condition = operand(words)
            assert words.pop(0) == "then"
            result = operand(words)
            return lambda roles: result(roles) if condition(roles) else True
        parts = [operand(words)]
        operator = words[0] if words and words[0] in ("and", "or", "iff") else None
        while words and words[0] == operator:
            words.pop(0)
            parts.append(operand(words))
        combine = {"and": all, "or": any, "iff": lambda v: len(set(v)) == 1, None: all}[operator]
        return lambda roles: combine([part(roles) for part in parts])

    said = []
    for sentence in text.removesuffix(" .").split(" . "):
        speaker, says, *words = sentence.split()
        assert says == "says"
        said.append((speaker, statement(words)))
        assert not words
    return said


def test_every_gold_answer_is_the_only_consistent_one(puzzles):
    for puzzle in puzzles:
        said = parse_plain(kk.question_text(puzzle, "plain"))
        names = [speaker for speaker, _ in said]
        consistent = []
        for values in itertools.product([True, False], repeat=len(names)):
            roles = dict(zip(names, values, strict=True))
            if all(roles[speaker] == truth(roles) for speaker, truth in said):
                consistent.append(roles)
        gold = re.findall(r"\((\d)\) (\w+) is a (knight|knave)", kk.answer_text(puzzle))
        assert [number for number, _, _ in gold] == [str(i + 1) for i in range(len(names))]
        assert consistent == [{name: role == "knight" for _, name, role in gold}]


def test_every_operator_occurs(puzzles):
    words = set(" ".join(kk.question_text(puzzle, "plain") for puzzle in puzzles).split())
    assert {"and", "or", "not", "if", "iff", "("} <= words


def test_english_question_says_the_same_as_the_plain_one(puzzles):
    for puzzle in puzzles:
        english = puzzle.question.lower().replace("if and only if", "iff").replace("it is not the case that", "not")
        english = english.replace("(", "( ").replace(")", " )")
        for sentence in kk.question_text(puzzle, "plain").lower().removesuffix(" .").split(" . "):
            assert sentence.split(" says ")[1] in english


def test_english_question_knows_only_knights_and_knaves(puzzles):
    others = "pioneer|laggard|saint|sinner|hero|villain|angel|devil|altruist|egoist|sage|fool|Format|an kn"
    for puzzle in puzzles:
        assert not re.search(others, puzzle.question, re.IGNORECASE)
        assert puzzle.question.startswith("A very special island is inhabited only by knights and knaves. Knights ")
        assert puzzle.question.endswith("So who is a knight and who is a knave?")


def test_chat_question_has_instruction_and_puzzle(puzzles):
    system, user = kk.question_text(puzzles[0], "chat")
    assert (system["role"], user) == ("system", {"role": "user", "content": puzzles[0].question})
    assert all(part in system["content"] for part in ("<think>", "</think>", "<answer>", "</answer>", "(1) Zoey is a"))


def test_trace_supposes_in_order_and_stops_at_the_first_contradiction(puzzles):
    for puzzle in puzzles:
        said = dict(parse_plain(kk.question_text(puzzle, "plain")))
        thought = kk.gold_trace(puzzle).split("<think> ")[1].split(" </think>")[0]
        trials = re.findall(r"suppose (.*?) : (.*?) (yes|no) \.", thought)
        orders = itertools.product("TF", repeat=len(puzzle.names))
        for (supposed, checks, verdict), order in zip(trials, orders, strict=False):
            assert supposed == " ".join(f"{name} {role}" for name, role in zip(puzzle.names, order, strict=True))
            roles = {name: role == "T" for name, role in zip(puzzle.names, order, strict=True)}
            checked = re.findall(r"(\w+) says (T|F)", checks)
            assert [value for _, value in checked] == ["T" if said[name](roles) else "F" for name, _ in checked]
            agrees = [(value == "T") == roles[name] for name, value in checked]
            assert all(agrees[:-1]) and agrees[-1] == (verdict == "yes")
        assert [verdict for _, _, verdict in trials] == ["no"] * (len(trials) - 1) + ["yes"]
        assert tuple(role == "T" for role in re.findall(r"\w+ (T|F)", trials[-1][0])) == puzzle.solution


def test_deterministic_and_seeded():
    config = DataConfig(train_size=50, eval_size=10)
    assert kk.generate_puzzles(config, "train") == kk.generate_puzzles(config, "train")
    other = kk.generate_puzzles(replace(config, seed=1), "train")
    ours = {puzzle.question for puzzle in kk.generate_puzzles(config, "train")}
    assert len(ours & {puzzle.question for puzzle in other}) < 5


def test_sizes_ids_and_subsets():
    config = DataConfig(people=(2, 3), train_size=20, eval_size=5)
    train, test = kk.generate_puzzles(config, "train"), kk.generate_puzzles(config, "test")
    assert [p.subset for p in train] == ["PPL2"] * 20 + ["PPL3"] * 20
    assert [p.subset for p in test] == ["PPL2"] * 3 + ["PPL3"] * 2
    assert len({p.id for p in train + test}) == 45


def test_train_and_test_are_disjoint_by_what_is_said():
    # One pair of names would not do: the space is large. So look at many puzzles, and at few shapes.
    config = DataConfig(people=(2,), train_size=4000, eval_size=500)

    def contents(split):
        return [
            frozenset(kk.question_text(p, "plain").removesuffix(" .").split(" . "))
            for p in kk.generate_puzzles(config, split)
        ]

    train, test = contents("train"), contents("test")
    assert len(train) == len(set(train)) == 4000 and len(test) == len(set(test)) == 500
    assert not set(train) & set(test)


def test_repeated_puzzles_are_dropped_whatever_the_order_of_people(monkeypatch):
    import reasoning_gym

    real = reasoning_gym.create_dataset("knights_knaves", n_people=2, seed=3, size=100)

    def swapped(item):
        """The same puzzle with its two people named in the other order."""

        def swap(statement):
            kind, *parts = statement
            return (kind, *(1 - part if isinstance(part, int) else swap(part) for part in parts))

        metadata = dict(item["metadata"])
        for key in ("names", "solution"):
            metadata[key] = metadata[key][::-1]
        metadata["statements"] = tuple(swap(statement) for statement in metadata["statements"][::-1])
        return {**item, "metadata": metadata}

    class Repeating:
        def __getitem__(self, index):
            item = real[index // 2]
            return swapped(item) if index % 2 else item

    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda *args, **kwargs: Repeating())
    config = DataConfig(train_size=20, eval_size=10)
    puzzles = kk.generate_puzzles(config, "test") + kk.generate_puzzles(config, "train")
    assert [p.question for p in puzzles] == [kk._to_puzzle(real[i], "").question for i in range(30)]


def test_held_out_part_does_not_move_with_train_size():
    small, large = DataConfig(train_size=10, eval_size=20), DataConfig(train_size=500, eval_size=20)
    assert kk.generate_puzzles(small, "test") == kk.generate_puzzles(large, "test")


@pytest.mark.parametrize(
    "change, field",
    [
        ({"people": (2, 2)}, r"data.people=\[2, 2\] repeats a number; give each number once"),
        ({"depth": 1}, "data.depth=1 must be at least 2"),
        ({"width": 1}, "data.width=1 must be from 2 to 3 with 2 people"),
        ({"width": 4}, "data.width=4 must be from 2 to 3"),  # 2 people can make 3 distinct basic statements
    ],
)
def test_impossible_shapes_name_the_field(change, field):
    with pytest.raises(ConfigError, match=field):
        kk.generate_puzzles(replace(DataConfig(), **change), "train")


def test_too_many_puzzles_asked_for(monkeypatch):
    import reasoning_gym

    monkeypatch.setattr(kk, "MAX_REPEATS", 50)
    one = [reasoning_gym.create_dataset("knights_knaves", n_people=2, seed=3, size=1)[0]] * 100
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda *args, **kwargs: one)
    with pytest.raises(DataError, match="only about 1 distinct puzzles of 2 people"):
        kk.generate_puzzles(DataConfig(train_size=5, eval_size=0), "train")


def test_tokenizer_round_trip_is_exact_with_one_token_per_word(puzzles):
    tokenizer = load_tokenizer(KK_TOKENIZER)
    unk = next(i for i, piece in tokenizer.vocab().items() if piece == "<unk>")
    for puzzle in puzzles:
        for text in (kk.question_text(puzzle, "plain"), kk.gold_trace(puzzle)):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(text.split()) and unk not in ids


def test_tokenizer_is_the_one_the_tool_writes():
    spec = importlib.util.spec_from_file_location("make_kk_tokenizer", ROOT / "tools" / "make_kk_tokenizer.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.make_tokenizer() == (KK_TOKENIZER / "tokenizer.model").read_bytes()
    words = [piece.removeprefix("▁") for piece in load_tokenizer(KK_TOKENIZER).vocab().values()]
    assert sorted(words) == sorted(["<pad>", "<unk>", "<s>", "</s>", *kk.vocabulary()])


def test_two_people_are_short_enough_for_a_tiny_model():
    tokenizer = load_tokenizer(KK_TOKENIZER)
    sample = kk.generate_puzzles(DataConfig(train_size=300, eval_size=0), "train")
    prompts = [len(tokenizer.render_all([kk.question_text(p, "plain")], "plain", {})[0]) for p in sample]
    traces = [len(tokenizer.encode(kk.gold_trace(p))) for p in sample]
    assert max(prompts) <= 30 and max(traces) <= 70
