"""Stop words are found however the text is split, and nothing of them gets out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tensorwright.runtime.stop import StopMatcher

LETTERS = st.text("ab\n", max_size=30)


def stopped_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """What must come out, from the whole text at once."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop and stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@settings(max_examples=500, deadline=None)
@given(text=LETTERS, stops=st.lists(st.text("ab\n", max_size=4), max_size=3), cuts=st.lists(st.integers(0, 30)))
def test_the_split_does_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher = StopMatcher(stops)
    given_text = ""
    stopped = False
    for start, end in zip(places, places[1:], strict=False):
        piece, stopped = matcher.push(text[start:end])
        given_text += piece
        if stopped:
            break
    given_text += matcher.flush()
    assert (given_text, stopped) == stopped_text(text, stops)


def test_text_that_cannot_be_a_stop_word_is_not_held_back() -> None:
    matcher = StopMatcher(["</s>", "User:"])
    assert matcher.push("well") == ("well", False)
    assert matcher.push(" a </") == (" a ", False)
    assert matcher.push("b> Us") == ("</b> ", False)
    assert matcher.push("er") == ("", False)
    assert matcher.push(": x") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_held_text_comes_at_the_end() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("end\n") == ("end", False)
    assert matcher.flush() == "\n"


def test_without_stop_words_text_passes() -> None:
    assert StopMatcher([]).push("abc") == ("abc", False)
    assert StopMatcher([""]).push("abc") == ("abc", False)
