"""Renders a model's chat template: messages to the text that the model was trained on. Knows no token ids.

A template is a program from the model's folder, so it runs in jinja2's ImmutableSandboxedEnvironment: no attribute that
begins with an underscore, no change of what is handed in, no file, no import. The text, products and loops over `range`
are bounded; jinja2 cannot be interrupted, so a hostile template can still waste time and memory.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tensorwright.errors import UsageError

MAX_CHARACTERS = 64 * 1024 * 1024
MAX_RANGE_STEPS = 1_000_000  # of all loops over range() in one rendering
MAX_POWER = 10**12
DEFAULT, FOR_TOOLS = "default", "tool_use"  # names in a list of templates, as the hub uses them

Message = Mapping[str, Any]


class HasTemplates(Protocol):
    """What is needed of a tokenizer."""

    chat_templates: Mapping[str, str]  # texts by name
    special_tokens: Mapping[str, str]  # texts by role, such as bos_token


class ChatTemplate:
    """A model's templates, compiled. Safe to share between threads."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        if not templates:
            raise UsageError(
                "this model has no chat template.",
                mend="leave --chat out and write the prompt as the model expects it, or put a chat_template.jinja "
                "beside tokenizer.json",
            )
        self._special_tokens = dict(special_tokens)
        self._templates = {name: _compile(name, source) for name, source in templates.items()}

    @classmethod
    def of(cls, tokenizer: HasTemplates) -> ChatTemplate:
        """The templates of a tokenizer's folder.

        Raises:
            UsageError: there is none, or one is not jinja2.
        """
        return cls(tokenizer.chat_templates, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: object,
    ) -> str:
        """The chat as text with every special token written out, for `Tokenizer.encode_chat`.

        Args:
            messages: each has a "role" and mostly a "content".
            add_generation_prompt: end with what begins the assistant's answer.
            tools: descriptions of functions, for templates that know them.
            variables: further names for the template.

        Raises:
            UsageError: messages of another form, or ones that the template refuses.
        """
        names = {
            **self._special_tokens,
            "documents": None,
            **_plain(variables),
            "messages": _checked(_plain(messages)),
            "tools": _plain(tools),
            "add_generation_prompt": add_generation_prompt,
            "range": _range_with_budget(),
        }
        try:
            return _join(self._choose(with_tools=bool(tools)).generate(names))
        except Exception as error:  # whatever a program from a model folder raises is that program's error
            raise UsageError(f"the model's chat template refuses these messages: {_reason(error)}") from error

    def _choose(self, *, with_tools: bool) -> Template:
        names = [FOR_TOOLS, DEFAULT] if with_tools else [DEFAULT]
        found = [self._templates[name] for name in names if name in self._templates]
        return found[0] if found else next(iter(self._templates.values()))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products and powers that cannot fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Products of texts and powers, refused where they are too large."""
        return _product(left, right) if operator == "*" else _power(left, right)


class _GenerationTag(Extension):
    """`{% generation %}`, with which some templates mark the assistant's words for training: it only groups."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """The enclosed statements, in a scope of their own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compile(name: str, source: str) -> Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise UsageError(f"the chat template {name!r} is not jinja2: line {error.lineno}: {error.message}") from error


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter would write &, < and > for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _range_with_budget() -> Callable[..., range]:
    left = MAX_RANGE_STEPS

    def bounded(*arguments: int) -> range:
        nonlocal left
        steps = range(*arguments)
        left -= len(steps)
        if left < 0:
            raise SecurityError(f"more than {MAX_RANGE_STEPS} steps of range()")
        return steps

    return bounded


def _product(left: Any, right: Any) -> Any:
    for text, count in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(count, int) and len(text) * count > MAX_CHARACTERS:
            raise SecurityError(f"a product of {len(text)} times {count}")
    return operator.mul(left, right)


def _power(base: Any, exponent: Any) -> Any:
    if abs(base) > MAX_POWER or abs(exponent) > 64:
        raise SecurityError(f"the power {base} ** {exponent}")
    return operator.pow(base, exponent)


def _plain(value: Any) -> Any:
    """A copy in JSON's types, so that a template meets no object with methods of its own."""
    try:
        return json.loads(json.dumps(value, default=_as_plain))
    except (TypeError, ValueError) as error:
        raise UsageError(f"chat messages must be made of what JSON can hold: {error}") from error


def _as_plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} found")


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise UsageError("a chat needs at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f'message {number} must be an object with "role" and "content"; got {message!r:.200}')
    return messages


def _join(pieces: Iterable[str]) -> str:
    collected: list[str] = []
    length = 0
    for piece in pieces:
        collected.append(piece)
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise SecurityError(f"more than {MAX_CHARACTERS} characters")
    return "".join(collected)


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
