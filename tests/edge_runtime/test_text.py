"""Text streams without half characters or half stop strings; templates render as in transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from edge_runtime.formats.errors import PackageError, UserError
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import TrustStore
from edge_runtime.text import (
    MAX_TEMPLATE_BYTES,
    TextStream,
    decoder_of,
    encode_prompt,
    load_chat_template,
    load_tokenizer,
    render_chat,
)
from tests.edge_runtime.conftest import TEMPLATE
from tests.edge_runtime.fakes import BOS, EOS, byte_tokenizer

MESSAGES = [{"role": "user", "content": 'a <b> & "c"'}, {"role": "assistant", "content": "d\n"}]

MESSAGES_OF = {
    "short": MESSAGES,
    "long": [
        {"role": "system", "content": " be brief \n"},
        {"role": "user", "content": "{% generation %}{{ x }}</s>"},
        {"role": "assistant", "content": "\n  你好\n\n"},
        {"role": "user", "content": ""},
    ],
}


def fallback_tokenizer() -> Tokenizer:
    """Words with a marker for spaces, bytes for the rest; the decoder of Llama 2."""
    words = ["▁the", "▁cat", "s", "你", "▁", "é"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def stream(ids: list[int], tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> list[str]:
    text = TextStream(decoder_of(tokenizer), stop)
    return [text.push(token) for token in ids] + [text.finish()]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_pieces_of_bytes_add_up_to_the_text(text: str) -> None:
    pieces = stream(list(text.encode()), byte_tokenizer())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "你", "▁", "é", "😀", "ß", "\n"]), max_size=20))
def test_pieces_of_words_and_fallback_bytes_are_the_librarys_text(words: list[str]) -> None:
    tokenizer = fallback_tokenizer()
    ids: list[int] = []
    for word in words:
        known = tokenizer.token_to_id(word)
        ids += list(word.encode()) if known is None else [known]
    pieces = stream(ids, tokenizer)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte() -> None:
    assert stream(list("é€😀".encode()), byte_tokenizer()) == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_an_incomplete_last_character_is_dropped_and_broken_bytes_do_not_stall() -> None:
    assert stream([65, 0xF0, 0x9F], byte_tokenizer()) == ["A", "", "", ""]
    pieces = stream([65] + [0xFF] * 40 + [66], byte_tokenizer())
    assert "".join(pieces) == "A" + "\ufffd" * 40 + "B"
    assert max(len(list(run)) for empty, run in itertools.groupby(pieces, key=lambda piece: piece == "") if empty) == 15


def test_special_tokens_are_not_text() -> None:
    assert "".join(stream([BOS, 65, EOS, 66], byte_tokenizer())) == "AB"


def test_a_stop_string_and_all_after_it_are_hidden() -> None:
    assert stream(list(b"one END two"), byte_tokenizer(), ("END",))[:7] == ["o", "n", "e", " ", "", "", ""]
    assert "".join(stream(list(b"one END two"), byte_tokenizer(), ("END",))) == "one "


def test_the_start_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    assert stream(list(b"aaab"), byte_tokenizer(), ("aab",)) == ["", "", "a", "", ""]
    assert stream(list(b"aaac"), byte_tokenizer(), ("aab",)) == ["", "", "a", "aac", ""]
    assert stream(list(b"xaa"), byte_tokenizer(), ("aab",)) == ["x", "", "", "aa"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab\u00e9", max_size=12), st.lists(st.text("ab\u00e9", min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_text_ends_where_the_first_stop_string_is_complete(text: str, stops: list[str]) -> None:
    shown = "".join(stream(list(text.encode()), byte_tokenizer(), tuple(stops)))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    # A character at a time, whichever is complete first wins; of two that end together, the longer one.
    cut = min(text[: ends[0]].find(stop) for stop in stops if stop in text[: ends[0]]) if ends else len(text)
    assert shown == text[:cut]


def test_the_manifest_decides_about_bos(package_dir: Path, trusted: TrustStore) -> None:
    tokenizer = load_tokenizer(open_package(package_dir, trusted))
    assert encode_prompt(tokenizer, "é", BOS) == [BOS, 0xC3, 0xA9]
    assert encode_prompt(tokenizer, "<s>é", None) == [BOS, 0xC3, 0xA9]
    assert encode_prompt(tokenizer, "", BOS) == [BOS]
    with pytest.raises(UserError, match="at least one character"):
        encode_prompt(tokenizer, "", None)
    with pytest.raises(UserError, match="valid Unicode"):
        encode_prompt(tokenizer, "\udcff", BOS)


def test_the_tokenizers_own_limits_are_lifted(package_dir: Path, trusted: TrustStore) -> None:
    package = open_package(package_dir, trusted)
    limited = byte_tokenizer()
    limited.enable_truncation(2)
    limited.enable_padding(length=8)
    limited.save(str(package_dir / "tokenizer.json"))
    assert len(encode_prompt(load_tokenizer(package), "four", None)) == 4


def test_a_broken_tokenizer_is_a_package_error(package_dir: Path, trusted: TrustStore) -> None:
    package = open_package(package_dir, trusted)
    (package_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(PackageError, match="not a tokenizer"):
        load_tokenizer(package)


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{% for m in messages %}\n  {% if loop.index0 == 1 %}{% continue %}{% endif %}\n{{ m | tojson }}\n{% endfor %}",
        "{{ messages | length }}{{ strftime_now is defined and 'x' or 'x' }}{{ eos_token }}\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ messages | tojson(indent=2, sort_keys=true) }}{{ messages | tojson(true) }}",
        "{% if tools is none and documents is defined %}no tools{% endif %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}\n  {% generation %}\n    {{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n",
        "{% for m in messages %} a {%- generation -%} {{ m.content }} {%- endgeneration -%} b {% endfor %}",
        "{% for m in messages %} a\n {%+ generation +%}\n x\n {%+ endgeneration +%}\n b {% endfor %}",
        "{% generation %}{% generation %}{{ bos_token }}{% endgeneration %}{% endgeneration %}{{ eos_token }}",
        "{% set x = 1 %}{% generation %}{% set x = x + 1 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% set r = m.role %}{% generation %}{{ r }}{% set r = 0 %}{% endgeneration %}{{ r }}"
        "{% endfor %}{{ r is defined }}",
        "{% set ns = namespace(n=0) %}{% generation %}{% set ns.n = 5 %}{% endgeneration %}{{ ns.n }}",
        "{% generation %}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
        "{% endgeneration %}",
        "{% macro say(m) %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ say(m) | trim | upper }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("spoken", MESSAGES_OF)
def test_templates_render_as_in_transformers(template: str, spoken: str) -> None:
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    messages = MESSAGES_OF[spoken]
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_chat(template, messages, "<s>", "</s>") == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ undefined.attribute }}",
        "{% for",
        "{{ 1 // 0 }}",
        "{{ raise_exception('no system role') }}",
        "{% for a in range(99999) %}{{ messages }}{{ messages }}{% endfor %}",
        "{% generation %}{% for a in range(99999) %}{{ messages }}{{ messages }}{% endfor %}{% endgeneration %}",
        "{% generation %}{{ messages.append(1) }}{% endgeneration %}",
        "{% generation %}{{ self.__class__ }}{{ caller.__globals__ }}{% endgeneration %}",
        "{% generation %}never closed",
        "{% endgeneration %}",
    ],
)
def test_a_template_cannot_reach_out_or_run_away(template: str) -> None:
    with pytest.raises(PackageError, match=r"chat_template\.jinja"):
        render_chat(template, MESSAGES, "", "")


def test_a_package_without_template_has_none(package_dir: Path, trusted: TrustStore) -> None:
    package = open_package(package_dir, trusted)
    assert load_chat_template(package) == TEMPLATE
    (package_dir / "chat_template.jinja").write_bytes(b" " * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(PackageError, match="longer than"):
        load_chat_template(package)
    (package_dir / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(PackageError, match="not UTF-8"):
        load_chat_template(package)
