"""What `rlad generate` keeps of its responses."""

import json

import pytest

from rlad_megatron.generate import _finish, _line
from rlad_megatron.types import Prompt, Rollout

LINES = [
    {"id": "a", "response": "x", "solved": True, "tokens": 3, "finish_reason": "stop"},
    {"id": "b", "response": "y", "solved": False, "tokens": 5, "finish_reason": "stop"},
    {"id": "c", "response": "z", "solved": True, "tokens": 7, "finish_reason": "length"},
    {"id": "d", "response": "\u2028", "solved": True, "tokens": 9, "finish_reason": "stop"},
]


@pytest.mark.parametrize(("keep", "ids", "tokens"), [("solved", "ad", 12), ("all", "abd", 17)])
def test_what_is_kept(keep, ids, tokens, tmp_path, capsys):
    output = tmp_path / "traces.jsonl"
    _finish(iter(f"{json.dumps(line, ensure_ascii=False)}\n" for line in LINES), output, keep)
    kept = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert "".join(line["id"] for line in kept) == ids and "finish_reason" not in kept[0]
    said = " ".join(capsys.readouterr().out.split())
    assert "responses │ 4" in said and "solved │ 3, 75.0%" in said and "left out │ 1" in said
    assert f"written │ {len(ids)}, {tokens} tokens" in said
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]


@pytest.mark.parametrize(("rendered", "response"), [("Why ? <think>\n", "<think>so</think>"), ("Why ?", "so</think>")])
def test_a_tag_that_the_template_opened_is_part_of_the_response(rendered, response):
    prompt = Prompt(id="a", tokens=(1,), answer="", subset="", text=rendered)
    rollout = Rollout(prompt, tokens=[1], log_probs=[0.0], finish_reason="stop", versions=[(0, 1)], text="so</think>")
    assert json.loads(_line(rollout, 0, {"a": "Why?"}))["response"] == response
