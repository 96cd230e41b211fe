"""Chat templates: a conversation as one text, and the parts of it that an assistant says.

Jinja's immutable sandbox with the names that the runtime gives to templates (``edge_runtime.text.render_chat``), so
that training shows what serving will show; ``{% generation %}`` is understood as transformers has it.

Where the answers are is not guessed from the text. Contents are rendered with marks around them, characters that no
text may hold (Unicode's noncharacters U+FDD0 to U+FDEF); with the marks taken out again the result must be the plain
rendering, character for character, else the template changes contents and is refused. The same marks tell a special
token that the template wrote from one that a user typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edge_runtime.formats.errors import UserError
from pipeline.data.instructions import Message

if TYPE_CHECKING:
    import jinja2

MAX_CHAT_CHARS = 4 << 20
TOKEN_OPEN, TOKEN_CLOSE = "\ufdd2", "\ufdd3"
"""Around the number of a special token that the template wrote."""

_START, _END, _GENERATION_START, _GENERATION_END, _TYPED = "\ufdd0", "\ufdd1", "\ufdd4", "\ufdd5", "\ufdd6"
_DIGITS = str.maketrans("0123456789", "".join(chr(0xFDE0 + digit) for digit in range(10)))
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
_PLACES = re.compile(f"([{_START}{_END}])([\ufde0-\ufde9]+)|[{_GENERATION_START}{_GENERATION_END}{_TYPED}]")
_TOKEN = re.compile(f"{TOKEN_OPEN}([0-9]+){TOKEN_CLOSE}")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a conversation is rendered with.

    Attributes:
        template: Jinja source.
        special: Text of a special token to its id.
        bos_token: Text that begins a conversation where the template asks for it.
        eos_token: Text that ends one.
    """

    template: str
    special: Mapping[str, int]
    bos_token: str
    eos_token: str


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: Special tokens that the template wrote stand as ``TOKEN_OPEN``, their id, ``TOKEN_CLOSE``.
        learned: Half-open ranges of characters that the assistant says, its end-of-turn token included.
        closed: The template itself ends the conversation with the end-of-text token.
        learns_end: The end-of-text token put behind the text belongs to the answer: nothing else ends it.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    closed: bool
    learns_end: bool


def render_conversation(chat: ChatFormat, messages: Sequence[Message], source: str) -> list[RenderedChat]:
    """The conversation as one text, or each exchange as its own where the template shows prompts only.

    An answer begins where the generation prompt ends. Where that is no prefix of the conversation (some templates move
    the system message) it begins with its content. It ends behind the special token that follows its content.

    Args:
        chat: Template and special tokens.
        messages: A checked conversation.
        source: Named in errors.

    Raises:
        UserError: The template is not valid, refuses the messages, or writes contents cut or otherwise changed, so
            that it cannot be told where they are.
    """
    marked = [
        {"role": role, "content": _mark(content, number, chat.special)}
        for number, (role, content) in enumerate(messages)
    ]
    whole = _render_checked(chat, marked, False, source)
    wanted = [number for number, (role, _) in enumerate(messages) if role != "system"]
    if all(number in whole.ends for number in wanted):
        return [_conversation(chat, whole, marked, source)]
    answers = [number for number, (role, _) in enumerate(messages) if role == "assistant"]
    return [_exchange(chat, marked[:number], marked[number], source) for number in answers]


def without_marks(text: str) -> str:
    """Noncharacters become U+FFFD: a text must not hold what we mark places with."""
    return _NONCHARACTERS.sub("\ufffd", text)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A text with its marks (``raw``) and without, and where in the latter the marks stood."""

    raw: str
    text: str
    starts: dict[int, int]
    ends: dict[int, int]
    generated: list[tuple[int, int]]


def _mark(content: str, number: int, special: Mapping[str, int]) -> str:
    """Marks inside the white space around a content, so that a template may trim it, and in each special token."""
    content = without_marks(content)
    core = content.strip()
    lead, tail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    if special:
        core = _alternation(tuple(special)).sub(lambda match: "".join(_TYPED + c for c in match.group()), core)
    digits = str(number).translate(_DIGITS)
    return f"{lead}{_START}{digits}{core}{_END}{digits}{tail}"


def _render_checked(chat: ChatFormat, marked: Sequence[Mapping[str, str]], generate: bool, source: str) -> _Rendered:
    """The rendering of marked messages, which must be that of the plain ones with marks in it."""
    plain = [message | {"content": _unmark(message["content"])} for message in map(dict, marked)]
    raw = _render(chat, marked, generate, source)
    if _unmark(raw) != _unmark(_render(chat, plain, generate, source)):
        raise UserError(
            f"chat template at {source}", "a content that it changes", "a template that writes contents as they are,"
            " or trimmed", "use a template with {% generation %} only if it keeps them too",
        )  # fmt: skip
    return _locate(raw, chat.special)


def _conversation(chat: ChatFormat, whole: _Rendered, marked: Sequence[Mapping[str, str]], source: str) -> RenderedChat:
    text = whole.text
    answers = [number for number, message in enumerate(marked) if message["role"] == "assistant"]
    tail = text[whole.ends[answers[-1]] :]
    closing = tail[: max((match.end() for match in _TOKEN.finditer(tail)), default=0)]
    bos = chat.special.get(chat.bos_token)
    ends = {}
    for number in answers:
        end, following = whole.ends[number], whole.starts.get(number + 1, whole.ends.get(number + 1, len(text)))
        ends[number] = end + _closing_chars(text[end:following], closing, bos)
    if whole.generated:
        learned = [(start, _generated_end(whole, start, end, ends)) for start, end in whole.generated]
    else:
        learned = [(_answer_start(chat, whole, marked, number, source), ends[number]) for number in answers]
    closed = f"{TOKEN_OPEN}{chat.special.get(chat.eos_token)}{TOKEN_CLOSE}" in tail
    return RenderedChat(text, tuple(learned), closed, learns_end=not closing)


def _closing_chars(gap: str, closing: str, bos: int | None) -> int:
    """How much of the text between an answer and the next turn ends the answer, up to a special token.

    Args:
        gap: That text.
        closing: What ends the last answer, where nothing can follow that belongs to another turn.
        bos: Begins things and never ends one.
    """
    common = next((n for n, (one, other) in enumerate(zip(gap, closing, strict=False)) if one != other), None)
    shared = gap[: min(len(gap), len(closing)) if common is None else common]
    if chars := max((match.end() for match in _TOKEN.finditer(shared)), default=0):
        return chars
    match = _TOKEN.match(gap, len(gap) - len(gap.lstrip()))
    return 0 if match is None or int(match[1]) == bos else match.end()


def _generated_end(whole: _Rendered, start: int, end: int, ends: Mapping[int, int]) -> int:
    """The end of a generation block; one that leaves out the end-of-turn token would teach not to stop."""
    for number, behind in ends.items():
        if start <= whole.ends[number] <= end and not _TOKEN.search(whole.text[whole.ends[number] : end]):
            return max(end, behind)
    return end


def _answer_start(
    chat: ChatFormat, whole: _Rendered, marked: Sequence[Mapping[str, str]], number: int, source: str
) -> int:
    """Where the generation prompt ends, when the conversation begins with it; else where the content begins."""
    prompt = _render(chat, marked[:number], True, source)
    length = len(_locate(prompt, chat.special).text)
    content = whole.starts.get(number, whole.ends[number])
    if whole.raw.startswith(prompt) and whole.ends[number - 1] <= length <= content:
        return length
    if number not in whole.starts:
        raise UserError(f"chat template at {source}", "an answer without its beginning", "a template that shows it")
    lead = marked[number]["content"].partition(_START)[0]
    return content - len(lead) if whole.text.endswith(lead, 0, content) else content


def _exchange(
    chat: ChatFormat, before: Sequence[Mapping[str, str]], answer: Mapping[str, str], source: str
) -> RenderedChat:
    """A prompt as the runtime renders it, and the answer behind a space."""
    prompt = _render_checked(chat, before, True, source)
    if len(before) - 1 not in prompt.ends:
        raise UserError(f"chat template at {source}", "a prompt without the user's message", "one that shows it")
    gap = "" if prompt.text[-1:].isspace() else " "
    whole = _locate(prompt.raw + gap + answer["content"].strip(), chat.special)
    return RenderedChat(whole.text, ((len(prompt.text), len(whole.text)),), closed=False, learns_end=True)


def _locate(raw: str, special: Mapping[str, int]) -> _Rendered:
    """Take the marks out, noting where they stood, and put numbers for the template's special tokens."""
    if special:
        pattern = _alternation(tuple(special))
        marked = pattern.sub(lambda match: f"{TOKEN_OPEN}{special[match.group()]}{TOKEN_CLOSE}", raw)
    else:
        marked = raw
    pieces: list[str] = []
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    generated: list[tuple[int, int]] = []
    position = length = opened = 0
    for match in _PLACES.finditer(marked):
        pieces.append(marked[position : match.start()])
        length, position = length + match.start() - position, match.end()
        mark = match.group()[0]
        if mark == _GENERATION_START:
            opened = length
        elif mark == _GENERATION_END:
            generated.append((opened, length))
        elif mark != _TYPED:
            (starts if mark == _START else ends)[_number(match[2])] = length
    pieces.append(marked[position:])
    return _Rendered(raw, "".join(pieces), starts, ends, generated)


def _number(digits: str) -> int:
    return int("".join(chr(ord(digit) - 0xFDE0 + ord("0")) for digit in digits))


def _unmark(text: str) -> str:
    return _PLACES.sub("", text)


@lru_cache(maxsize=8)
def _alternation(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the texts, the longest first, as tokenizers match them."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _render(chat: ChatFormat, messages: Sequence[Mapping[str, str]], generate: bool, source: str) -> str:
    """One rendering, bounded in length."""
    import jinja2

    names = {
        "messages": messages, "tools": None, "documents": None, "add_generation_prompt": generate,
        "bos_token": chat.bos_token, "eos_token": chat.eos_token,
    }  # fmt: skip
    pieces: list[str] = []
    length = 0
    try:
        for piece in _compile(chat.template).generate(names):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHAT_CHARS:
                raise UserError(f"chat at {source}", f"{length} characters", f"at most {MAX_CHAT_CHARS}")
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"chat template at {source}", message, "a conversation and a template that fit") from error
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


@lru_cache(maxsize=1)
def _generation_tag() -> Any:
    """The extension for ``{% generation %}``: what the block writes stands between marks."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

        def _between_marks(self, caller: Callable[[], str]) -> str:
            return f"{_GENERATION_START}{caller()}{_GENERATION_END}"

    return Generation
