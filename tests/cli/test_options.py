"""The parser: spellings, prefixes, suggestions, flags without effect, and options made from dataclass fields."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tensorwright.cli.options import Parser, add_fields, add_switch, from_arguments


def example() -> Parser:
    parser = Parser("tensorwright example")
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", type=int)
    parser.add_argument("--max_batch_size", type=int, default=4, help="sequences in one step")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--input_text", nargs="+")
    add_switch(parser, "--use_fused_mlp", default=False)
    parser.add_without_effect("--per_channel", reason="weights only")
    parser.add_without_effect("--gemm_plugin", reason="own kernels", nargs="?", choices=("auto", "float16"))
    parser.add_refused("--lora_plugin", reason="no adapters", allowed=("disable",))
    return parser


@pytest.mark.parametrize("words", [["--max_seq_len", "8"], ["--max-seq-len", "8"], ["--max-seq_len=8"],
                                   ["--max_decoder-seq-len", "8"], ["--max_s", "8"], ["--max-seq", "8"]])
def test_every_spelling_of_an_option(words: list[str]) -> None:
    assert example().parse_args(words).max_seq_len == 8


def test_options_declared_with_dashes_take_underscores() -> None:
    assert example().parse_args(["--group_size", "-1"]).group_size == -1


def test_a_prefix_says_how_it_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    example().parse_args(["--max_seq", "8"])
    assert capsys.readouterr().err == "note: --max_seq is read as --max_seq_len\n"


@pytest.mark.parametrize(("words", "message"), [
    (["--max_sq_len", "8"], "did you mean --max_seq_len?"),
    (["--max", "8"], "--max could be --max_batch_size, --max_decoder_seq_len or --max_seq_len"),
    (["--use_fused_mlp", "maybe"], "expected enable or disable, got 'maybe'"),
    (["--gemm_plugin", "float17"], "invalid choice: 'float17'"),
    (["--lora_plugin", "float16"], "--lora_plugin float16 is not supported: no adapters"),
    (["--lora_plugin"], "--lora_plugin is not supported: no adapters"),
    (["--max_seq_len", "many"], "invalid int value: 'many'"),
    (["stray"], "unrecognized arguments: stray")])
def test_wrong_command_lines_exit_2_and_say_why(words: list[str], message: str,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        example().parse_args(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert "try: tensorwright example --help" in printed


@pytest.mark.parametrize(("words", "value"), [([], False), (["--use_fused_mlp"], True),
                                              (["--use_fused_mlp", "enable"], True),
                                              (["--use_fused_mlp", "disable"], False),
                                              (["--use-fused-mlp=True"], True),
                                              (["--use_fused_mlp", "--max_seq_len", "1"], True)])
def test_switches_stand_alone_or_take_a_word(words: list[str], value: bool) -> None:
    assert example().parse_args(words).use_fused_mlp is value


@pytest.mark.parametrize("words", [["--per_channel"], ["--per-channel"], ["--gemm_plugin"], ["--gemm_plugin", "auto"]])
def test_a_flag_without_effect_says_so_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = example().parse_args(words)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"note: {words[0].replace('per-', 'per_')} has no effect here: ")
    assert not hasattr(arguments, "per_channel")


def test_a_refused_flag_may_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    example().parse_args(["--lora_plugin", "disable"])
    assert capsys.readouterr().err == ""


def test_texts_that_begin_with_dashes_are_no_options() -> None:
    assert example().parse_args(["--input_text=-- what is this?"]).input_text == ["-- what is this?"]


def test_help_lists_flags_without_effect_apart_and_hides_refused_ones() -> None:
    text = example().format_help()
    assert "accepted, but without effect here" in text
    assert "--lora_plugin" not in text
    assert "(default: 4)" in text


@dataclass(frozen=True)
class Example:
    source: Path = field(metadata={"help": "a folder"})
    sizes: tuple[int, ...] = field(default=(1, 2), metadata={"help": "sizes", "flags": ("--batch_sizes",)})
    ratio: float | None = field(default=None, metadata={"help": "a ratio"})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "a kind"})
    fast: bool = field(default=False, metadata={"help": "hurry"})
    hidden: int = 7


def test_options_come_from_dataclass_fields_and_go_back() -> None:
    parser = Parser("x")
    add_fields(parser, Example)
    words = ["--source", "/x", "--batch-sizes", "3", "4", "--ratio", "0.5", "--kind", "b", "--fast"]
    expected = Example(Path("/x"), (3, 4), 0.5, "b", True)
    assert from_arguments(Example, parser.parse_args(words), sizes=(3, 4)) == expected
    assert from_arguments(Example, parser.parse_args(["--source", "y"])) == Example(Path("y"))
    assert from_arguments(Example, parser.parse_args(words), sizes=(3, 4), hidden=1).hidden == 1


def test_a_list_option_becomes_a_tuple() -> None:
    parser = Parser("x")
    add_fields(parser, Example)
    assert from_arguments(Example, parser.parse_args(["--source", "y", "--sizes", "5"])).sizes == (5,)


def test_fields_without_help_are_no_options() -> None:
    parser = Parser("x")
    add_fields(parser, Example)
    with pytest.raises(SystemExit):
        parser.parse_args(["--source", "y", "--hidden", "1"])


def test_switch_words_are_those_of_argparse_types() -> None:
    parser: argparse.ArgumentParser = Parser("x")
    add_switch(parser, "--a", default=None)
    assert parser.parse_args([]).a is None
