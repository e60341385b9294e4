"""The limits of an engine: every derivation of docs/build.md, and numbers that cannot be meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorwright.builder.limits import MAX_DEDUCED_SEQ_LEN, derive, opt_num_tokens, rope_factor
from tensorwright.builder.options import BuildOptions
from tensorwright.engine.limits import Limits
from tensorwright.errors import UsageError

GUIDE: dict[str, Any] = {"max_batch_size": 16, "max_num_tokens": 4096, "max_input_len": 40000, "max_seq_len": 40000}


def test_the_guides_limits_allow_prompts_far_beyond_one_step() -> None:
    limits, notes = derive(BuildOptions(**GUIDE), max_position_embeddings=1_024_000)
    assert (limits.max_batch_size, limits.max_seq_len, limits.max_num_tokens) == (16, 40000, 4096)
    assert limits.max_input_len == 39999
    assert notes == []


@pytest.mark.parametrize(("positions", "factor", "expected"), [
    (4096, 1.0, 4096), (4096, 4.0, 16384), (None, 1.0, 2048), (None, 2.0, 4096), (131_072, 1.0, 131_072),
    (1_024_000, 1.0, MAX_DEDUCED_SEQ_LEN), (10**15, 1.0, MAX_DEDUCED_SEQ_LEN)])
def test_max_seq_len_is_deduced_and_said(positions: int | None, factor: float, expected: int) -> None:
    limits, notes = derive(BuildOptions(), max_position_embeddings=positions, rope_factor=factor)
    assert limits.max_seq_len == expected
    assert limits.max_input_len == expected - 1
    assert f"max_seq_len is not specified, using deduced value {expected}" in notes


def test_an_absurd_position_count_is_a_hint_that_is_named() -> None:
    limits, notes = derive(BuildOptions(), max_position_embeddings=1_024_000)
    assert limits.max_num_tokens <= 2048
    assert any("1024000" in text and "hint" in text for text in notes)


def test_a_longer_max_seq_len_than_the_model_was_made_for_is_kept_with_a_warning() -> None:
    limits, notes = derive(BuildOptions(max_seq_len=8192), max_position_embeddings=4096)
    assert limits.max_seq_len == 8192
    assert any("accuracy might be affected" in text and "4096" in text for text in notes)


@pytest.mark.parametrize(("kind", "scaling", "factor"), [
    ("default", {}, 1.0), ("linear", {"factor": 4.0}, 4.0), ("yarn", {"factor": 2.0}, 2.0),
    ("llama3", {"factor": 8.0}, 1.0), ("longrope", {"factor": 32.0}, 1.0), ("su", {"factor": 32.0}, 1.0)])
def test_which_rope_kinds_lengthen_the_model(kind: str, scaling: dict[str, float], factor: float) -> None:
    assert rope_factor(kind, scaling) == factor


@pytest.mark.parametrize(("asked", "switches", "expected", "word"), [
    (1024, {}, 4095, "not used"),
    (1024, {"remove_input_padding": False}, 1024, None),
    (1024, {"context_fmha": False}, 1024, None),
    (4096, {}, 4095, None),
    (9999, {}, 4095, "clipped"),
    (None, {"remove_input_padding": False}, 4095, None)])
def test_max_input_len(asked: int | None, switches: dict[str, bool], expected: int, word: str | None) -> None:
    options = BuildOptions(max_seq_len=4096, max_input_len=asked, **switches)
    limits, notes = derive(options, max_position_embeddings=4096)
    assert limits.max_input_len == expected
    assert (word is None) == (notes == [])
    assert word is None or word in notes[0]


@pytest.mark.parametrize(("asked", "batch", "seq", "expected", "word"), [
    (None, 64, 4096, 2048, None), (None, 1, 100, 100, None), (4096, 16, 40000, 4096, None),
    (4096, 2, 1000, 2000, "clipped"), (20000, 64, 4096, 20000, "more memory"), (16, 1, 4096, 64, "raised"),
    (65, 1, 4096, 65, None), (1, 1, 10, 1, None)])
def test_max_num_tokens(asked: int | None, batch: int, seq: int, expected: int, word: str | None) -> None:
    options = BuildOptions(max_num_tokens=asked, max_batch_size=batch, max_seq_len=seq)
    limits, notes = derive(options, max_position_embeddings=50_000)
    assert limits.max_num_tokens == expected
    assert (word is None) == (notes == [])
    assert word is None or word in notes[0]


def test_a_batch_larger_than_a_step_is_said() -> None:
    _, notes = derive(BuildOptions(max_batch_size=128, max_beam_width=2, max_num_tokens=100, max_seq_len=64),
                      max_position_embeddings=64)
    assert any("256" in text and "100" in text for text in notes)


@pytest.mark.parametrize(("asked", "expected"), [(None, 16), (8, 8), (10_000, 4096)])
def test_opt_num_tokens(asked: int | None, expected: int) -> None:
    options = BuildOptions(**GUIDE, opt_num_tokens=asked)
    limits, _ = derive(options, max_position_embeddings=50_000)
    assert opt_num_tokens(options, limits) == expected


@pytest.mark.parametrize("name", ["max_batch_size", "max_seq_len", "max_input_len", "max_num_tokens", "opt_num_tokens",
                                  "max_beam_width", "tokens_per_block", "workers"])
@pytest.mark.parametrize("value", [0, -1, -40000])
def test_limits_below_the_least_are_refused_with_the_number(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=rf"{name} must be .* got {value}"):
        derive(BuildOptions(**{name: value}), max_position_embeddings=4096)


@pytest.mark.parametrize("size", [24, 63, 100])
def test_tokens_per_block_is_a_power_of_two(size: int) -> None:
    with pytest.raises(UsageError, match=f"power of two; got {size}"):
        derive(BuildOptions(tokens_per_block=size), max_position_embeddings=4096)


@pytest.mark.parametrize("positions", [1, -5])
def test_a_config_that_allows_no_token_is_refused(positions: int) -> None:
    with pytest.raises(UsageError, match=str(positions)):
        derive(BuildOptions(), max_position_embeddings=positions)


def _as_options(options: BuildOptions, limits: Limits) -> BuildOptions:
    return replace(options, max_seq_len=limits.max_seq_len, max_input_len=limits.max_input_len,
                   max_num_tokens=limits.max_num_tokens)


counts = st.one_of(st.none(), st.integers(2, 1 << 40))


@given(batch=st.integers(1, 4096), seq=counts, given_input=counts, tokens=counts, positions=counts,
       factor=st.floats(1, 1e6))
def test_derived_limits_always_hold_together(batch: int, seq: int | None, given_input: int | None, tokens: int | None,
                                             positions: int | None, factor: float) -> None:
    options = BuildOptions(max_batch_size=batch, max_seq_len=seq, max_input_len=given_input, max_num_tokens=tokens)
    limits, _ = derive(options, max_position_embeddings=positions, rope_factor=factor)
    assert 1 <= limits.max_input_len < limits.max_seq_len
    assert 1 <= limits.max_num_tokens <= limits.max_seq_len * batch
    assert seq is not None or limits.max_seq_len <= MAX_DEDUCED_SEQ_LEN
    again, _ = derive(_as_options(options, limits), max_position_embeddings=positions, rope_factor=factor)
    assert again == limits
