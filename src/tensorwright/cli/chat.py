"""`tensorwright chat`: a conversation on the terminal, or a question per line of standard input.

It knows the conversation's turns. Every turn sends all of it again; the engine's prefix reuse makes that cheap.
Nothing of it is ever left out silently: when it no longer fits, that is said and the question is not asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from tensorwright.cli.inputs import NO_TOKENIZER
from tensorwright.cli.options import Parser
from tensorwright.cli.sampling import add_sampling_options, describe, for_each_prompt, sampling_parameters
from tensorwright.cli.session import add_session_options, open_session
from tensorwright.errors import LimitError, RanksError, UsageError

if TYPE_CHECKING:
    from tensorwright.cli.outputs import Console
    from tensorwright.runtime.chat_template import ChatTemplate
    from tensorwright.runtime.llm import LLM
    from tensorwright.runtime.parameters import SamplingParameters
    from tensorwright.runtime.results import Update
    from tensorwright.runtime.tokenizer import Tokenizer

DEFAULT_MAX_OUTPUT_LEN = 1024
HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit ends; Ctrl-C stops an answer."


def configure(parser: Parser) -> None:
    """Options of the engine, of sampling, and the system message."""
    add_session_options(parser)
    parser.set_defaults(log_level="warning")
    group = parser.add_argument_group("chat")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument("--max_output_len", type=int, default=DEFAULT_MAX_OUTPUT_LEN, metavar="TOKENS",
                       help="most tokens of an answer")
    add_sampling_options(parser)


def main(arguments: argparse.Namespace) -> int:
    """Talk until the input ends or /quit."""
    if arguments.max_output_len < 1:
        raise UsageError(f"--max_output_len is {arguments.max_output_len}, expected 1 or more",
                         mend=f"--max_output_len {DEFAULT_MAX_OUTPUT_LEN}")
    with _one_rank(arguments), open_session(arguments) as (llm, console):
        parameters = for_each_prompt(arguments, sampling_parameters(arguments, arguments.max_output_len), 1)[0]
        chat = Chat.with_engine(llm, console, parameters, arguments.system)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            console.result(f"{describe(parameters)} for each answer. {HELP}")
        for line in _lines(is_terminal):
            if line.startswith("/"):
                if not chat.command(line):
                    break
            elif line:
                chat.ask(line)
    return 0


@contextmanager
def _one_rank(arguments: argparse.Namespace) -> Iterator[None]:
    """Says that a chat has one rank, where opening the engine would advise a chat under mpirun."""
    try:
        yield
    except RanksError as error:
        raise RanksError(f"{error.message}; chat needs an engine of one rank", mend="mpirun -n RANKS tensorwright run "
                         f"--engine_dir {arguments.engine_dir} --chat --input_text ...") from error


@dataclass
class Chat:
    """The conversation so far, and the engine that answers."""

    llm: LLM
    console: Console
    parameters: SamplingParameters
    tokenizer: Tokenizer
    template: ChatTemplate
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def with_engine(cls, llm: LLM, console: Console, parameters: SamplingParameters, system: str | None) -> Chat:
        """A new conversation.

        Raises:
            UsageError: no tokenizer, or no chat template.
            RanksError: an engine of several ranks.
        """
        from tensorwright.runtime.chat_template import ChatTemplate

        if llm.engine.world_size > 1:
            raise RanksError(f"this engine has {llm.engine.world_size} ranks")
        if llm.tokenizer is None:
            raise UsageError("chat needs a tokenizer, and the engine folder has no tokenizer.json", mend=NO_TOKENIZER)
        return cls(llm, console, parameters, llm.tokenizer, ChatTemplate.of(llm.tokenizer), system)

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False when it ends the chat."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.messages.clear()
            self.console.result("The conversation is forgotten.")
        elif name == "/system":
            self.system = rest.strip() or None
            self.console.result(f"System message: {self.system or 'none'}")
        else:
            self.console.result(HELP if name == "/help" else f"Unknown command {name}. {HELP}")
        return True

    def ask(self, question: str) -> None:
        """Send the conversation with one more question, and print the answer as it comes."""
        self.messages.append({"role": "user", "content": question})
        try:
            ids = self._prompt()
            room = self._room(len(ids))
        except UsageError as error:
            self.messages.pop()
            self.console.result(error.message)
            return
        answer = self._answer(ids, min(room, self.parameters.max_tokens))
        self.messages.append({"role": "assistant", "content": answer})

    def _prompt(self) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        text = self.template.render([*head, *self.messages])
        return self.tokenizer.encode_chat(text, max_tokens=self.llm.engine.limits.max_input_len)

    def _room(self, length: int) -> int:
        """Tokens left for the answer to a prompt of `length` tokens."""
        limits = self.llm.engine.limits
        room = limits.max_seq_len - length
        if room < 1 or length > limits.max_input_len:
            raise LimitError(
                f"The conversation no longer fits: {length} tokens with this question, and the engine takes prompts of "
                f"at most {limits.max_input_len} (max_seq_len {limits.max_seq_len}). The question was not asked; "
                "/reset begins anew."
            )
        return room

    def _answer(self, ids: list[int], max_tokens: int) -> str:
        text = ""
        reason: str | None = None
        try:
            updates = self.llm.stream([ids], [replace(self.parameters, max_tokens=max_tokens)])
            with closing(cast("Generator[Update, None, None]", updates)):  # closing cancels
                for update in updates:
                    shown = text.lstrip()
                    text += update.text
                    self.console.result(text.lstrip()[len(shown) :], end="")
                    reason = update.finish_reason or reason
                    if update.result is not None and update.result.error:
                        self.console.result(f"\n[failed: {update.result.error}]", end="")
        except KeyboardInterrupt:
            reason = "cancelled"
        ending = {"length": f" [ended at {max_tokens} tokens]", "cancelled": " [stopped]"}.get(reason or "", "")
        self.console.result(ending)
        return text


def _lines(is_terminal: bool) -> Iterator[str]:
    """Lines typed at the terminal, with history and editing, or those of a pipe."""
    if not is_terminal:
        yield from (line.strip() for line in sys.stdin)
        return
    import readline

    readline.set_history_length(1000)  # importing it is what lets input() edit lines
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
