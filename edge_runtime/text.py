"""Text in, token ids out, and back again as a stream.

Streaming never shows half a character and never shows text that may turn out to be the start of a stop string:
``TextStream`` holds such text back until it is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_runtime.formats.errors import PackageError, UserError
from edge_runtime.formats.manifest import TOKENIZER_FILE
from edge_runtime.formats.package import CHAT_TEMPLATE_FILE, Package, read_bounded

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_PROMPT_CHARACTERS = 4 << 20

# A character has at most four bytes, hence at most four tokens; a longer wait means bytes that never fit.
_MAX_PENDING_TOKENS = 16
_REPLACEMENT = "\ufffd"

Message = Mapping[str, str]


def load_tokenizer(package: Package) -> Tokenizer:
    """Read the package's tokenizer.

    Raises:
        PackageError: Too large, or not a tokenizer that the installed library reads.
    """
    from tokenizers import Tokenizer

    path = package.path(TOKENIZER_FILE)
    try:
        tokenizer = Tokenizer.from_buffer(read_bounded(path, MAX_TOKENIZER_BYTES))
    except PackageError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise PackageError(f"{path}: not a tokenizer ({error}); update the tokenizers package") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str, bos: int | None) -> list[int]:
    """Ids of plain text, ``bos`` first when the manifest names one.

    The tokenizer's own template of special tokens is not applied: the manifest decides, so that no
    checkpoint gets two of them.

    Raises:
        UserError: The text is too long, or empty where no ``bos`` stands in for it.
    """
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError("--prompt", f"{len(text)} characters", f"at most {MAX_PROMPT_CHARACTERS}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("--prompt", ascii(text)[:60], "valid Unicode text", "check the terminal's encoding")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokens = ids if bos is None else [bos, *ids]
    if not tokens:
        raise UserError("--prompt", text, "at least one character", "this package has no token that begins a text")
    return tokens


def decoder_of(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Ids to text without special tokens."""
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def load_chat_template(package: Package) -> str | None:
    """The package's chat template, or None.

    Raises:
        PackageError: Too large, or not UTF-8.
    """
    if CHAT_TEMPLATE_FILE not in package.manifest.files:
        return None
    path = package.path(CHAT_TEMPLATE_FILE)
    try:
        return read_bounded(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{path}: not UTF-8; get the package again") from error


def render_chat(template: str, messages: Sequence[Message], bos_token: str, eos_token: str) -> str:
    """The prompt text of a conversation, up to where the assistant speaks.

    Runs in Jinja's immutable sandbox with the names that transformers gives to templates, clock excepted. What a
    ``{% generation %}`` block writes is text like any other here: only training asks where it stands.

    Args:
        template: Jinja source.
        messages: ``{"role": "user" | "assistant" | "system", "content": text}``.
        bos_token: Text of the token that begins a sequence, or nothing.
        eos_token: Text of the token that ends one, or nothing.

    Raises:
        PackageError: The template is not valid, refuses these messages, or writes more than a prompt may hold.
    """
    import jinja2

    names = {
        "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, "bos_token": bos_token,
        "eos_token": eos_token,
    }  # fmt: skip
    pieces: list[str] = []
    length = 0
    try:
        for piece in _template_environment().from_string(template).generate(names):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_PROMPT_CHARACTERS:
                raise jinja2.TemplateError(f"writes more than {MAX_PROMPT_CHARACTERS} characters")
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise PackageError(f"{CHAT_TEMPLATE_FILE}: {error}; use generate without --chat") from error
    return "".join(pieces)


def _template_environment() -> jinja2.Environment:
    """The sandbox of chat templates."""
    import json

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: Parser) -> nodes.Node:
            """A scope of its own, as transformers has it, written piece by piece so that its length is bounded too."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

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
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


@dataclass(slots=True)
class TextStream:
    """Tokens to text, one at a time.

    Attributes:
        decode: Ids to text.
        stop: Strings before which the text ends.
        stopped: A stop string appeared; nothing after it is shown.
    """

    decode: Callable[[Sequence[int]], str]
    stop: tuple[str, ...] = ()
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)
    _context: int = 0  # ids[_context:_shown] were shown already and only set the scene for what follows
    _shown: int = 0
    _held: str = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain."""
        self._ids.append(token)
        before, text = self._window()
        pending = len(self._ids) - self._shown
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and pending < _MAX_PENDING_TOKENS):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """Return what was held back, less an incomplete last character."""
        before, text = self._window()
        self._context = self._shown = len(self._ids)
        shown = self._release(text[len(before) :].rstrip(_REPLACEMENT))
        if self.stopped:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _window(self) -> tuple[str, str]:
        """Text shown of the window, and all of it: decoders treat a first token unlike a later one."""
        return self.decode(self._ids[self._context : self._shown]), self.decode(self._ids[self._context :])

    def _release(self, text: str) -> str:
        """The part of held plus new text that no stop string can still swallow."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
