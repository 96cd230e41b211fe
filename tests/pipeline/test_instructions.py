"""Instruction rows of three formats; templates, with transformers and the templates that TRL ships as oracles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from edge_runtime.formats.errors import UserError
from pipeline.data.chat_template import ChatFormat, render_conversation
from pipeline.data.encoding import EncodedChat, chat_format, encode_conversation, encode_texts, text_encoder
from pipeline.data.instructions import Message, row_messages

SYSTEM, ASK, ANSWER = ("system", "Be brief."), ("user", "What is it?"), ("assistant", "A word.")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{% for message in turns %}{% if message['role'] == 'user' %}"
    "{% if loop.first and system is defined %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content"
    " %}"
    "{% else %}{% set text = message['content'] %}{% endif %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (  # the system message stands in the last user message: no rendering is a prefix of a longer one
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{% if system is defined and message == (turns | selectattr('role', 'equalto',"
    " 'user') | list)[-1] %}{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% else %}{{ ' ' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = "Question: {{ messages[-1]['content'] }}\nAnswer:"
CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (ASK, ANSWER, ("user", "  And\n\nthat? "), ("assistant", "return x  # 7\n  and more")),
    (SYSTEM, ASK, ("assistant", " def function_1(x):\n    return x \n")),
    (SYSTEM, ASK, ANSWER, ("user", "Why?"), ("assistant", "日本語 \U0001f469\u200d\U0001f680.")),
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "u:q a:a"),
        ({"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "model", "content": "a"}])}, "u:q a:a"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                          {"role": "assistant", "content": "a", "tool_calls": None}]},
            "u:q a:a",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "u:q a:a"),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                                              {"from": "human", "value": "r"}], "tools": ""},
            "s:s u:q a:a u:r",
        ),
        ({"instruction": "do", "input": "this", "output": "a"}, "u:do\n\nthis a:a"),
        ({"instruction": "do", "input": "", "output": "a", "system": ""}, "u:do a:a"),
        (
            {"instruction": "do", "input": None, "output": "a", "system": "s", "history": [["q", "b"]]},
            "s:s u:q a:b u:do a:a",
        ),
        ({"text": "no instruction"}, None),
        ({"instruction": 5, "output": "a"}, None),
        ({"messages": None, "text": "a parquet file has every column in every row"}, None),
    ],
)  # fmt: skip
def test_rows_of_all_formats_become_messages(row: dict[str, Any], expected: str | None) -> None:
    messages = row_messages(row, "file:1")
    assert (messages and " ".join(f"{role[0]}:{content}" for role, content in messages)) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "file:1: got [], allowed: a user's message and an assistant's answer"),
        ({"messages": 5}, "file:1 messages: got 'int', allowed: a list of messages"),
        ({"messages": "[{"}, "file:1 messages: got '[{', allowed: a list, or a string that holds one as JSON"),
        ({"messages": "[" * 100_000}, "file:1 messages: got '[[["),
        ({"messages": ["hi"]}, "file:1 messages: got 'str', allowed: messages with role and content"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "got 'role narrator', allowed: a role of system user"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "got \"role ['user']\", allowed: a role of"),
        ({"messages": [{"role": "user"}]}, "got 'a content of type NoneType', allowed: text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a tool message, role tool', allowed: system, user"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
            "a tool message, role assistant",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type image', allowed: parts"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "file:1 message 1: got 'assistant', allowed: user:"),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, "file:1 message 2: got 'user', allowed: assistant"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "system", "value": "x"}]},
            "file:1 message 2: got 'system', allowed: assistant: user and assistant take turns",
        ),
        ({"conversations": [{"from": "human", "value": "x"}]}, "allowed: a user's message and an assistant's answer"),
        ({"messages": [], "tools": "[{}]"}, "file:1 tools: got '[{}]', allowed: no tools: they are not supported"),
        ({"instruction": "do", "output": " \n"}, "file:1 message 2: got ' \\n', allowed: some text of the assistant"),
        ({"instruction": "do", "output": None}, "file:1 output: got 'a content of type NoneType'"),
        ({"instruction": "do", "output": "a", "history": [["q"]]}, "file:1 history: got \"['q']\", allowed: pairs"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "got '5000 messages', allowed: at most 4096"),
    ],
)
def test_what_is_no_conversation_is_named_in_one_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        row_messages(row, "file:1")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, LLAMA_2, MISTRAL], ids=["chatml", "llama-2", "mistral"])
@pytest.mark.parametrize("tagged", [True, False])
def test_answers_are_those_that_transformers_marks(
    tokenizer: Tokenizer, template: str, tagged: bool, conversation: tuple[Message, ...]
) -> None:
    """Untagged templates must give what transformers finds by the tags."""
    special = _with_special(tokenizer, template)
    tokens, mask = _oracle(special, template, conversation)
    ours = _encode(special, template if tagged else _untagged(template), conversation)
    mask_ours = ours.answers[: len(tokens)]
    assert ours.tokens[: len(tokens)].tolist() == tokens
    if template is MISTRAL and not tagged:  # the space behind [/INST] may belong to the answer's first token
        assert _spans(mask_ours)[1] == _spans(np.array(mask))[1]
    else:
        assert mask_ours.tolist() == mask
    assert ours.tokens[len(tokens) :].tolist() == ([1] if template is CHATML else [])
    assert not ours.answers[len(tokens) :].any(), "<|im_end|> has ended the answer already"


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*_training.jinja")), ids=lambda path: path.stem)
def test_every_tagged_template_gives_the_mask_of_transformers(
    tokenizer: Tokenizer, path: Path, conversation: tuple[Message, ...]
) -> None:
    template = path.read_text(encoding="utf-8")
    special = _with_special(tokenizer, template)
    try:
        ours = _encode(special, template, conversation)
    except UserError as error:
        assert re.search("System role not supported|strftime_now|has no attribute|user's message", str(error))
        return
    tokens, mask = _oracle(special, template, conversation)
    wanted = np.array(tokens)[np.array(mask, bool)].tolist()
    assert ours.tokens[: len(mask)][ours.answers[: len(mask)]].tolist() == wanted
    if "strftime_now" not in template:  # without a clock: what is learned must not depend on the day
        assert ours.tokens[: len(tokens)].tolist() == tokens
        assert ours.answers[: len(tokens)].tolist() == mask


@pytest.mark.parametrize("name", ["cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "qwen2_5_vl", "lfm2"])
def test_plain_templates_give_the_answers_that_their_tagged_versions_mark(tokenizer: Tokenizer, name: str) -> None:
    """But for line ends behind an end-of-turn token, which some tagged versions count."""
    plain, tagged = ((TEMPLATES / f"{name}{end}.jinja").read_text("utf-8") for end in ("", "_training"))
    special = _with_special(tokenizer, tagged)
    tokens, mask = _oracle(special, tagged, CONVERSATIONS[0])
    ours = _encode(special, plain, CONVERSATIONS[0])
    said, marked = ours.tokens[ours.answers], np.array(tokens)[np.array(mask, bool)]
    decoded = [special.decode(ids, skip_special_tokens=False).replace(">\n", ">") for ids in (said, marked)]
    assert decoded[0] == decoded[1] and "return x  # 7\n  and more" in decoded[0]


@pytest.mark.parametrize("typed", ["</s>", "<|im_end|>", "<|im_start|>", "a</s>b <s>\n<|im_end|><|im_end|>", "<</s>>"])
def test_special_tokens_in_a_text_stay_text(tokenizer: Tokenizer, typed: str) -> None:
    special = _with_special(tokenizer, CHATML)
    encoder = text_encoder(special)
    ids = set(encoder.special.values())
    assert len(ids) == 4
    (plain,) = encode_texts(encoder, [f"x {typed} y"])
    assert not ids.intersection(plain.tolist())
    assert special.decode(plain.tolist(), skip_special_tokens=False) == f"x {typed} y"
    conversation = (("user", typed), ("assistant", f"as {typed}"))
    for template in (CHATML, _untagged(CHATML)):
        ours = _encode(special, template, conversation)
        messages = [{"role": role, "content": content} for role, content in conversation]
        tokens = _fast(special).apply_chat_template(
            messages, chat_template=template, sanitize_control_tokens=True, return_dict=True
        )["input_ids"]
        of_template = [token for token in ours.tokens.tolist() if token in ids]
        assert of_template == [token for token in tokens if token in ids] + [1]
        assert special.decode(ours.tokens.tolist(), skip_special_tokens=False) == special.decode(
            [*tokens, 1], skip_special_tokens=False
        )
        said = special.decode(ours.tokens[ours.answers].tolist(), skip_special_tokens=False)
        assert said == f"as {typed}<|im_end|>"


def test_marks_in_a_text_are_replaced_and_move_nothing(tokenizer: Tokenizer) -> None:
    special = _with_special(tokenizer, CHATML)
    ours = _encode(special, CHATML, (("user", "a\ufdd21\ufdd3b\ufdd0\ufde1"), ("assistant", "c\ufdd4d")))
    assert special.decode(ours.tokens[ours.answers].tolist(), skip_special_tokens=False) == "c\ufffdd<|im_end|>"
    assert (ours.tokens == 1).sum() == 1


def test_all_bytes_of_an_answers_last_character_are_learned(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}" \
        "{{ m.content + '\n' }}{% endif %}{% endfor %}!"  # fmt: skip
    ours = _encode(tokenizer, template, (ASK, ("assistant", "\U0001f680")))
    assert ours.tokens[ours.answers].tolist() == [2 + byte for byte in "\U0001f680".encode()] + [1]


def test_a_prompt_template_gives_one_text_an_exchange(tokenizer: Tokenizer) -> None:
    encoder = text_encoder(tokenizer)
    chat = chat_format(encoder, QUESTION, 1, 0)
    chats, cut = encode_conversation(encoder, chat, (SYSTEM, *CONVERSATIONS[0]), 1, 500, "row")
    assert [tokenizer.decode(each.tokens.tolist(), skip_special_tokens=False) for each in chats] == [
        "Question: What is it?\nAnswer: A word.</s>",
        "Question:   And\n\nthat? \nAnswer: return x  # 7\n  and more</s>",
    ]
    assert [tokenizer.decode(each.tokens[each.answers].tolist(), skip_special_tokens=False) for each in chats] == [
        " A word.</s>",
        " return x  # 7\n  and more</s>",
    ]
    assert not cut


LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # the token that begins the next turn does not end this one; the last answer is ended by ours
        (
            LOOP + "{% if m.role == 'user' %}{{ bos_token + m.content + '\n' }}{% else %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            ["A word.", "return x  # 7\n  and more</s>"],
        ),
        # a generation block without the end-of-turn token would teach not to stop
        (
            LOOP + "{% if m.role == 'user' %}{{ m.content + '\n' }}{% else %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}",
            ["A word.</s>", "return x  # 7\n  and more</s>"],
        ),
        # a prompt that ends in white space needs no more of it
        ("{{ messages[-1].content }}:\n\n{{ ' ' }}", ["A word.</s>", "return x  # 7\n  and more</s>"]),
    ],
)
def test_answers_end_where_something_ends_them(tokenizer: Tokenizer, template: str, said: list[str]) -> None:
    encoder = text_encoder(tokenizer)
    chats, _ = encode_conversation(encoder, chat_format(encoder, template, 1, 0), CONVERSATIONS[0], 1, 500, "row")
    decoded = "|".join(tokenizer.decode(c.tokens[c.answers].tolist(), skip_special_tokens=False) for c in chats)
    assert decoded.replace("|", "") == "".join(said)


def test_an_answer_keeps_its_leading_space_where_no_generation_prompt_fits(tokenizer: Tokenizer) -> None:
    template = (
        LOOP + "{{ m.role + '\n' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}X{% endif %}"
    )
    ours = _encode(tokenizer, template, (ASK, ("assistant", "  two spaces")))
    assert tokenizer.decode(ours.tokens[ours.answers].tolist(), skip_special_tokens=False) == "  two spaces</s>"


def test_a_long_conversation_is_cut_behind_an_answer(tokenizer: Tokenizer) -> None:
    special = _with_special(tokenizer, CHATML)
    encoder = text_encoder(special)
    chat = chat_format(encoder, CHATML, 1, 0)
    turns = [turn for n in range(9) for turn in (("user", f"q{n} " * (n + 1)), ("assistant", f"a{n} " * (n + 2)))]
    lengths = []
    for count in range(1, 10):
        (whole,), _ = encode_conversation(encoder, chat, turns[: 2 * count], 1, 10_000, "row")
        lengths.append(len(whole.tokens))
    for most in range(1, lengths[-1] + 2, 7):
        chats, cut = encode_conversation(encoder, chat, turns, 1, most, "row")
        kept = sum(length <= most for length in lengths)
        assert [len(each.tokens) for each in chats] == lengths[max(kept - 1, 0) : kept]
        assert cut == (kept < 9)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'][:4] }}{% endfor %}", "a content that it changes"),
        (
            "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
            "a content that it changes",
        ),
        ("{% for m in messages %}{{ m['content'].replace('d', '') }}{% endfor %}", None),
        ("{{ raise_exception('no such thing') }}", "no such thing"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.append(1) }}", "append"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}", "at most"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("nothing of it", "a prompt without the user's message"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_in_one_line(template: str, message: str | None) -> None:
    chat = ChatFormat(template, {}, "", "")
    if message is None:
        (rendered,) = render_conversation(chat, (ASK, ("assistant", "word")), "row")
        assert rendered.text == "What is it?wor"
        return
    with pytest.raises(UserError, match=re.escape(message)) as error:
        render_conversation(chat, (ASK, ANSWER), "row")
    assert "\n" not in str(error.value)


def _with_special(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """A copy that knows the special tokens that a template writes."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    pattern = r"<\|[^|>\n]{1,40}\|>|<[a-z]+_of_turn>|<｜[^｜]+｜>|<turn\|>|<\|turn>"
    copy.add_special_tokens(sorted(set(re.findall(pattern, template))))
    return copy


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _oracle(tokenizer: Tokenizer, template: str, conversation: tuple[Message, ...]) -> tuple[list[int], list[bool]]:
    messages = [{"role": role, "content": content} for role, content in conversation]
    found = _fast(tokenizer).apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    return found["input_ids"], [bool(value) for value in found["assistant_masks"]]


def _encode(tokenizer: Tokenizer, template: str, conversation: tuple[Message, ...]) -> EncodedChat:
    encoder = text_encoder(tokenizer)
    chats, cut = encode_conversation(encoder, chat_format(encoder, template, 1, 0), conversation, 1, 10_000, "row")
    assert len(chats) == 1 and not cut
    return chats[0]


def _untagged(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def _spans(mask: Any) -> tuple[list[int], list[int]]:
    """Where runs begin and end."""
    steps = np.diff(np.concatenate([[0], np.asarray(mask, np.int8), [0]]))
    return np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist()
