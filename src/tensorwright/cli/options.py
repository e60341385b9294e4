"""Command lines: a parser that forgives spellings, explains what has no effect, and suggests for what is unknown.

It knows argparse and dataclasses, and no verb. Every option may be written with dashes or underscores, and shortened
where that is unambiguous, as the commands it stands in for allowed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

_SWITCH_WORDS = {"enable": True, "true": True, "on": True, "1": True,
                 "disable": False, "false": False, "off": False, "0": False}
SWITCH_CHOICES = tuple(_SWITCH_WORDS)

Options = TypeVar("Options")


def note(text: str) -> None:
    """One line for the user that is not a result, so it goes to stderr. Of several ranks, the first one speaks."""
    from tensorwright.runtime.communicator import read_launch

    if read_launch(os.environ).rank == 0:
        print(f"note: {text}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse with both spellings, unambiguous prefixes, suggestions, and flags that are accepted but do nothing."""

    def __init__(self, prog: str | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("usage", "%(prog)s [options]")
        super().__init__(prog, allow_abbrev=False, **kwargs)
        self._unused: argparse._ArgumentGroup | None = None

    def parse_known_args(self, args: Sequence[str] | None = None,  # type: ignore[override]  # narrower
                         namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, after every option has been brought to its registered spelling."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._spelled(words), namespace)

    def error(self, message: str) -> typing.NoReturn:
        """Print the message and the way to the help, and exit with status 2."""
        print(f"error: {message}\n  try: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def add_without_effect(self, *flags: str, reason: str, nargs: int | str = 0,
                           choices: Sequence[str] | None = None) -> None:
        """Accept flags of other versions, and say in one line that they do nothing here and why."""
        if self._unused is None:
            self._unused = self.add_argument_group("accepted, but without effect here")
        kind = str if choices is None else str.lower  # Python's True is among the spellings
        self._unused.add_argument(*flags, action=_WithoutEffect, nargs=nargs, choices=choices, type=kind,
                                  reason=reason, help=reason, metavar=None if choices is None or nargs == 0 else "X")

    def add_refused(self, *flags: str, reason: str, allowed: Sequence[str] = (), nargs: int | str = "?") -> None:
        """Accept flags only with the values (as typed) that leave them off; anything else is an error with the reason.

        The flags stay out of the help.
        """
        self.add_argument(*flags, action=_Refused, nargs=nargs, allowed=tuple(allowed), reason=reason,
                          help=argparse.SUPPRESS)

    def _spelled(self, words: Sequence[str]) -> list[str]:
        end = words.index("--") if "--" in words else len(words)
        return [self._spell(word) if word.startswith("--") else word for word in words[:end]] + list(words[end:])

    def _spell(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if any(c.isspace() for c in name):  # a text that begins with dashes, not an option
            return word
        return self._full_name(name) + equals + value

    def _full_name(self, typed: str) -> str:
        known = {_underscored(option): option for option in self._option_string_actions if option.startswith("--")}
        name = _underscored(typed)
        if name in known:
            return known[name]
        longer = [option for option in known if option.startswith(name)]
        if len({id(self._option_string_actions[known[option]]) for option in longer}) == 1:
            note(f"{typed} is read as {longer[0]}")
            return known[longer[0]]
        if longer:
            return self.error(f"{typed} could be {_either(sorted(longer))}")
        near = difflib.get_close_matches(name, known, n=1)
        return self.error(f"unknown option {typed}" + (f"; did you mean {near[0]}?" if near else ""))


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, argparse.SUPPRESS, False, ()) and "default" not in (action.help or "")
        if not shown or not action.option_strings:
            return action.help
        default = "enable" if action.default is True else action.default
        return f"{action.help or ''} (default: {str(default).replace('%', '%%')})"


class _WithoutEffect(argparse.Action):
    def __init__(self, *args: Any, reason: str, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "default": argparse.SUPPRESS})
        self.reason = reason

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        note(f"{option_string} has no effect here: {self.reason}")


class _Refused(argparse.Action):
    def __init__(self, *args: Any, reason: str, allowed: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "default": argparse.SUPPRESS})
        self.reason = reason
        self.allowed = allowed

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        given = [values] if isinstance(values, str) else list(values or [])
        if given and all(value in self.allowed for value in given):
            return
        parser.error(" ".join([str(option_string), *given]) + f" is not supported: {self.reason}")


def add_switch(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *flags: str, default: bool | None = None,
               help: str = "") -> None:  # noqa: A002 - argparse's own name
    """An option that may stand alone (on) or be followed by enable or disable, as different versions wrote it."""
    parser.add_argument(*flags, nargs="?", const=True, default=default, type=switch_value,
                        metavar="enable|disable", help=help)


def switch_value(word: str) -> bool:
    """The truth of a word such as enable, disable, true or false."""
    if word.lower() not in _SWITCH_WORDS:
        raise argparse.ArgumentTypeError(f"expected enable or disable, got {word!r}")
    return _SWITCH_WORDS[word.lower()]


def add_fields(parser: argparse.ArgumentParser | argparse._ArgumentGroup, cls: type[Any]) -> None:
    """One option per field of a dataclass whose metadata has `help`; `flags` in it are further spellings.

    bool becomes a switch, Literal a choice, tuple[X, ...] a list of values. Options that are not given keep the
    field's default, so `from_arguments` needs no second table of defaults.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            _add_field(parser, field, hints[field.name])


def from_arguments(cls: type[Options], arguments: argparse.Namespace, **overrides: Any) -> Options:
    """The dataclass filled from parsed options, with some fields set by the caller."""
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(arguments).items() if name in fields}
    return cls(**{**given, **overrides})


def _add_field(parser: argparse.ArgumentParser | argparse._ArgumentGroup, field: dataclasses.Field[Any],
               hint: Any) -> None:
    flags = (f"--{field.name}", *field.metadata.get("flags", ()))
    default = argparse.SUPPRESS if field.default is dataclasses.MISSING else field.default
    text = field.metadata["help"]
    kind, many, choices = _value_type(hint)
    if kind is bool:
        add_switch(parser, *flags, default=bool(default), help=text)
        return
    convert: Callable[[str], Any] = kind
    parser.add_argument(*flags, dest=field.name, type=convert, nargs="+" if many else None, default=default,
                        choices=choices, help=text)


def _value_type(hint: Any) -> tuple[Any, bool, tuple[Any, ...] | None]:
    """The type of one value, whether there may be many, and the allowed ones."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _value_type(next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return type(arguments[0]), False, arguments
    if origin is tuple:
        return _value_type(arguments[0])[0], True, None
    return (hint if hint in (int, float, bool, Path) else str), False, None


def _underscored(option: str) -> str:
    """`--max-seq-len` as `--max_seq_len`; short options and values stay."""
    return "--" + option[2:].replace("-", "_") if option.startswith("--") and len(option) > 2 else option


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
