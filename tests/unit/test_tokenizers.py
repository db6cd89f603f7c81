"""Tokenizers: one interface over Hugging Face and SentencePiece."""

import json
from pathlib import Path

import pytest

from rlad_megatron.data.tokenizers import check_same_tokens, load_tokenizer, token_texts
from rlad_megatron.errors import ConfigError, DataError

KK_TOKENIZER = Path(__file__).parents[2] / "recipes" / "assets" / "kk_tokenizer"
WORDS = ["<pad>", "<unk>", "<bos>", "<end>", "<turn>", "user", "assistant", "hello", "world", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant{% endif %}"
)


def save_hf_tokenizer(folder, words=WORDS, chat_template=CHAT_TEMPLATE, add_bos=False, special_tags=False):
    """A word-level tokenizer, saved as Hugging Face saves it. Token id = place in `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    extra = ["<turn>"] + (["<think>", "</think>"] if special_tags else [])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<end>",
        additional_special_tokens=extra,
        chat_template=chat_template,
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_huggingface_folder(tmp_path):
    tokenizer = load_tokenizer(save_hf_tokenizer(tmp_path))
    assert (tokenizer.eos_ids, tokenizer.size) == ((3,), len(WORDS))
    assert tokenizer.encode("hello world") == [7, 8]
    assert tokenizer.vocab() == dict(enumerate(WORDS))


def test_huggingface_encode_adds_no_special_tokens(tmp_path):
    assert load_tokenizer(save_hf_tokenizer(tmp_path, add_bos=True)).encode("hello") == [7]


@pytest.mark.parametrize("special_tags", [False, True])
def test_huggingface_decode_drops_control_tokens_and_keeps_tags(tmp_path, special_tags):
    tokenizer = load_tokenizer(save_hf_tokenizer(tmp_path, special_tags=special_tags))
    assert tokenizer.decode([2, 4, 9, 7, 10, 8, 3, 0]) == "<think> hello </think> world"


def test_huggingface_decode_skips_ids_beyond_the_tokenizer(tmp_path):
    assert load_tokenizer(save_hf_tokenizer(tmp_path)).decode([7, 5000, 8]) == "hello world"


def test_huggingface_chat(tmp_path):
    tokenizer = load_tokenizer(save_hf_tokenizer(tmp_path))
    expected = [4, 5, 7, 3, 4, 6]  # <turn> user hello <end> <turn> assistant
    assert tokenizer.render_all(["hello"], "chat", {})[0] == expected
    assert tokenizer.render_all([[{"role": "user", "content": "hello"}]], "chat", {})[0] == expected


def test_huggingface_plain_puts_bos_only_where_the_tokenizer_does(tmp_path):
    assert load_tokenizer(save_hf_tokenizer(tmp_path / "with", add_bos=True)).render_all(["hello"], "plain", {})[0] == [
        2,
        7,
    ]
    assert load_tokenizer(save_hf_tokenizer(tmp_path / "without")).render_all(["hello"], "plain", {})[0] == [7]


def test_huggingface_further_eos_ids_come_from_generation_config(tmp_path):
    save_hf_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5]}))
    assert load_tokenizer(tmp_path).eos_ids == (3, 4)


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_huggingface_further_eos_ids_in_config_json_only(tmp_path, generation):
    save_hf_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(tmp_path).eos_ids == (3, 4)


class OneByteTokens:
    """A token is a byte, and decoding writes U+FFFD for a character that is not whole, as byte-level tokenizers do."""

    def decode_whole(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["a né€🐎b", "🐎", ""])
def test_the_pieces_of_tokens_make_the_text(text):
    pieces = token_texts(OneByteTokens(), list(text.encode()))
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    assert [piece for piece in pieces if piece] == list(text), "a character comes with its last token"


def test_a_broken_character_does_not_hold_back_the_text():
    pieces = token_texts(OneByteTokens(), [97, *[0x80] * 12, 98, 99])
    assert "".join(pieces).endswith("bc") and len(pieces) == 15
    assert sum(bool(piece) for piece in pieces[1:13]) >= 3


def test_pieces_keep_the_spaces_of_words():
    tokenizer = load_tokenizer(KK_TOKENIZER)
    ids = [*tokenizer.encode("he is a knight ."), tokenizer.eos_ids[0]]
    assert token_texts(tokenizer, ids)[1:3] == [" is", " a"]


def test_chat_without_template_names_the_remedy(tmp_path):
    tokenizer = load_tokenizer(save_hf_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(ConfigError, match=r"data\.prompt_style=plain"):
        tokenizer.render_all(["hello"], "chat", {})[0]
    with pytest.raises(ConfigError, match=r"data\.prompt_style=plain"):
        load_tokenizer(KK_TOKENIZER).render_all(["hello"], "chat", {})[0]


def test_arguments_of_the_chat_template(tmp_path):
    template = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %} world{% endif %}"
    tokenizer = load_tokenizer(save_hf_tokenizer(tmp_path, chat_template=template))
    usual, thinking, short = (
        tokenizer.render_all(["hello", "world"], "chat", given)
        for given in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    assert usual == thinking and short == [[*tokens, 8] for tokens in usual]
    for name in ("enable_thinkin_", "tokenize"):
        with pytest.raises(ConfigError, match=rf"data.chat_template_kwargs.{name}: the chat template of .* takes no '"):
            tokenizer.render_all(["hello"], "chat", {name: False})


@pytest.mark.parametrize("path", [KK_TOKENIZER, KK_TOKENIZER / "tokenizer.model"])
def test_sentencepiece_folder_and_file(path):
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("<think> suppose Zoey T")
    assert tokenizer.eos_ids == (3,)
    assert len(ids) == 4
    assert tokenizer.decode([2, *ids, 3, 0, 5000]) == "<think> suppose Zoey T"
    assert tokenizer.render_all(["Zoey"], "plain", {})[0] == [2, *tokenizer.encode("Zoey")]
    assert tokenizer.vocab()[3] == "</s>" and len(tokenizer.vocab()) == tokenizer.size


def test_huggingface_files_win_over_sentencepiece(tmp_path):
    save_hf_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((KK_TOKENIZER / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).size == len(WORDS)


def test_missing_and_broken_files_name_path_and_remedy(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*give a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"copy the tokenizer's files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="transformers cannot load it"):
        load_tokenizer(tmp_path)


def test_same_tokens(tmp_path):
    student = load_tokenizer(save_hf_tokenizer(tmp_path / "s"))
    check_same_tokens(student, load_tokenizer(save_hf_tokenizer(tmp_path / "same")), "s", "same")

    swapped = [*WORDS[:7], "world", "hello", *WORDS[9:]]
    with pytest.raises(ConfigError, match=r"in 2 token ids .*7: 'hello' / 'world', 8: 'world' / 'hello'"):
        check_same_tokens(student, load_tokenizer(save_hf_tokenizer(tmp_path / "t", swapped)), "s", "t")

    with pytest.raises(ConfigError, match=r"student s, teacher t; first: 11: None / 'more'"):
        check_same_tokens(student, load_tokenizer(save_hf_tokenizer(tmp_path / "l", [*WORDS, "more"])), "s", "t")


def test_a_damaged_generation_config_is_one_line(tmp_path):
    save_hf_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, ')
    with pytest.raises(DataError, match=r"generation_config\.json: not the JSON of a model .*; copy it again$"):
        load_tokenizer(tmp_path)
