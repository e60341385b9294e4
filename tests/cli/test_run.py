"""`tensorwright run` as a user meets it: what it accepts, prints, writes and refuses. The engine is a fake one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorwright.cli import chat, run
from tensorwright.cli.main import run_verb
from tensorwright.cli.outputs import Console
from tensorwright.engine.limits import Limits
from tensorwright.errors import LimitError
from tensorwright.runtime.detokenizer import Detokenizer
from tensorwright.runtime.parameters import SamplingParameters
from tensorwright.runtime.results import Generated, Result, Update
from tensorwright.runtime.tokenizer import Tokenizer
from tensorwright.testing.text import END_ID, write_tokenizer

ANSWER = " I'm doing well 🙂"


class FakeLLM:
    """Answers every prompt with ANSWER, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer | None, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.engine = SimpleNamespace(limits=limits, end_ids=(END_ID,), world_size=1)
        self.prompts: list[list[int]] = []
        self.parameters: list[SamplingParameters] = []
        self.num_runs = 0
        self.error: str | None = None

    def generate(self, prompts: Sequence[Sequence[int]], parameters: Sequence[SamplingParameters]) -> list[Result]:
        return [update.result for update in self.stream(prompts, parameters) if update.result is not None]

    def stream(self, prompts: Sequence[Sequence[int]], parameters: Sequence[SamplingParameters]) -> Iterator[Update]:
        self.prompts, self.parameters = [list(ids) for ids in prompts], list(parameters)
        self.num_runs += 1
        for number, (ids, asked) in enumerate(zip(prompts, parameters, strict=True)):
            if len(ids) + asked.max_tokens > self.engine.limits.max_seq_len:
                raise LimitError(f"{len(ids)} + {asked.max_tokens} is over {self.engine.limits.max_seq_len}")
            yield from self._updates(number + 7, list(ids), asked)

    def _updates(self, request_id: int, ids: list[int], asked: SamplingParameters) -> Iterator[Update]:
        output = [100, 101] if self.tokenizer is None else self.tokenizer.encode_plain(ANSWER)
        count = len(output)
        logits = np.ones((count, 4), np.float16)
        generated = Generated(tuple(output), ANSWER, "stop", tuple([-0.5] * count) if asked.return_log_probs else None,
                              -0.5 * count, logits if asked.return_generation_logits else None)
        context = np.ones((len(ids), 4), np.float16) if asked.return_context_logits else None
        sequences = asked.num_sequences
        result = Result(request_id, "", tuple(ids), (generated,) * sequences, context, 0, 0.1, 0.2, self.error)
        for sequence in range(sequences):
            detokenizer = Detokenizer(self.tokenizer, ids) if self.tokenizer else None
            for place, token in enumerate(output):
                is_last = place == count - 1
                finished = is_last and sequence == sequences - 1
                yield Update(request_id, sequence, detokenizer.push(token) if detokenizer else "", (token,), None,
                             finished, "stop" if is_last else None, result if finished else None)


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    limits = Limits(max_batch_size=4, max_seq_len=120, max_input_len=100, max_num_tokens=64,
                    gather_context_logits=True, gather_generation_logits=True)
    fake = FakeLLM(Tokenizer.load(write_tokenizer(tmp_path / "tokenizer")), limits)

    @contextmanager
    def session(arguments: Any) -> Iterator[tuple[FakeLLM, Console]]:
        yield fake, Console()

    monkeypatch.setattr(run, "open_session", session)
    monkeypatch.setattr(chat, "open_session", session)
    return fake


def test_the_lines_that_scripts_look_for(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max_output_len", "16", "--input_text", "hi how are you?", "you", "--temperature", "0.2"]
    assert run_verb("run", words) == 0
    out = capsys.readouterr().out
    assert 'Input [Text 0]: "<s>hi how are you?"\nOutput [Text 0 Beam 0]: " I\'m doing well 🙂"\n' in out
    assert 'Input [Text 1]: "<s>you"\nOutput [Text 1 Beam 0]: ' in out
    assert "Sampling: temperature 0.2, seed 0; at most 16 new tokens" in out


@pytest.mark.parametrize(
    ("words", "temperature", "top_k", "top_p", "said"),
    [
        ([], 0, 0, 1, "greedy"),
        (["--temperature", "0.2"], 0.2, 0, 1, "temperature 0.2, seed 0"),
        (["--temperature", "0.2", "--top_k", "1"], 0.2, 1, 1, "greedy"),
        (["--temperature", "0"], 0, 0, 1, "greedy"),
        (["--top_k", "40"], 1, 40, 1, "temperature 1, top_k 40, seed 0"),
        (["--top_k", "0", "--top_p", "0.9", "--random_seed", "5"], 1, 0, 0.9, "temperature 1, top_p 0.9, seed 5"),
        (["--top_k", "1"], 0, 1, 1, "greedy"),
        (["--top_p", "0.0"], 0, 0, 1, "greedy"),
        (["--min-p", "0.1", "--temperature", "0.5"], 0.5, 0, 1, "temperature 0.5, min_p 0.1, seed 0"),
    ],
)
def test_what_samples_and_what_is_greedy(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str], words: list[str], temperature: float, top_k: int, top_p: float,
    said: str,
) -> None:
    assert run_verb("run", ["--input_text", "hi", *words]) == 0
    asked = llm.parameters[0]
    assert (asked.temperature, asked.top_k, asked.top_p) == (temperature, top_k, top_p)
    assert f"Sampling: {said};" in capsys.readouterr().out


def test_every_other_knob_arrives(llm: FakeLLM) -> None:
    words = "--repetition_penalty 1.1 --presence_penalty 0.2 --frequency_penalty 0.3 --no_repeat_ngram_size 3"
    assert run_verb("run", ["--input_text", "hi", *words.split(), "--end_id", "9", "--max-output-len", "7"]) == 0
    asked = llm.parameters[0]
    assert (asked.repetition_penalty, asked.presence_penalty, asked.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (asked.no_repeat_ngram_size, asked.end_ids, asked.max_tokens) == (3, (9,), 7)


def test_without_a_length_what_fits_is_used(llm: FakeLLM) -> None:
    assert run_verb("run", ["--input_text", "hi"]) == 0
    assert llm.parameters[0].max_tokens == 120 - len(llm.prompts[0])


@pytest.mark.parametrize(
    ("words", "stops"),
    [
        (["--stop_words", "a", "b"], [("a", "b"), ("a", "b")]),
        (["--stop_words", "a", "--stop_words", "b", "c"], [("a",), ("b", "c")]),
    ],
)
def test_lists_of_words(llm: FakeLLM, words: list[str], stops: list[tuple[str, ...]]) -> None:
    assert run_verb("run", ["--input_text", "hi", "you", "--max_output_len", "4", *words]) == 0
    assert [asked.stop for asked in llm.parameters] == stops


def test_lists_of_words_that_match_no_prompts(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--bad_words", "a", "--bad_words", "b", "--bad_words", "c"]
    assert run_verb("run", ["--input_text", "hi", "you", *words]) == 2
    assert "--bad_words was given 3 times for 2 prompts" in capsys.readouterr().err
    assert llm.num_runs == 0


def test_a_line_of_a_text_file_is_a_prompt(llm: FakeLLM, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("hi you\r\nyou 🙂\n".encode())
    assert run_verb("run", ["--input_file", str(path), "--max_output_len", "4"]) == 0
    assert llm.tokenizer is not None
    assert [llm.tokenizer.decode(ids) for ids in llm.prompts] == ["hi you", "you 🙂"]


def test_rows_of_token_ids(llm: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("1,20, 21\n1,22\n")
    np.save(tmp_path / "in.npy", np.array([[1, 20, 21], [1, 22, END_ID]], np.int64))
    for name in ("in.csv", "in.npy"):
        assert run_verb("run", ["--input_file", str(tmp_path / name), "--max_output_len", "4"]) == 0
        assert llm.prompts == [[1, 20, 21], [1, 22]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.json", b"{}", "expected one of .txt, .csv, .npy"),
        ("in.csv", b"1,2\n1,x\n", "line 2: expected token ids"),
        ("in.csv", b"1.5\n", "expected token ids"),
        ("in.npy", b"\x80pickle", "no .npy file of numbers"),
        ("in.txt", b"hi\xff\n", "not UTF-8 at byte 2"),
        ("in.txt", b"hi\n\nyou\n", "prompt 1 is empty"),
        ("in.txt", b"", "there is no prompt"),
        ("gone.txt", None, "does not exist"),
    ],
)
def test_files_that_hold_no_prompts(
    llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run_verb("run", ["--input_file", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert llm.num_runs == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt 0 is empty"),
        (b"hi\xff".decode("utf-8", "surrogateescape"), "prompt 0: the text is not valid Unicode at character 2"),
        ("a" * 10 * 2**20, "prompt 0: the prompt is too long"),
        ("you " * 200, "more than the engine's max_input_len (100)"),
    ],
)
def test_prompts_that_cannot_be(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert run_verb("run", ["--input_text", text]) == 2
    assert message in capsys.readouterr().err


def test_max_input_length_refuses_and_never_cuts(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input_text", "hi how are you? hi how", "--max_output_len", "4"]
    assert run_verb("run", words) == 0
    length = len(llm.prompts[0])
    assert run_verb("run", [*words, "--max_input_length", str(length)]) == 0
    assert run_verb("run", [*words, "--max_input_length", str(length - 2)]) == 2
    assert f"prompt 0 has {length} tokens, 2 more than --max_input_length ({length - 2})" in capsys.readouterr().err


def test_an_output_that_cannot_fit_is_an_error(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("run", ["--input_text", "hi", "--max_output_len", "512"]) == 2
    assert "is over 120" in capsys.readouterr().err


def test_token_ids_in_files_replace_the_text(llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, npy = tmp_path / "new" / "out.csv", tmp_path / "out.npy"
    words = ["--input_text", "hi", "hi you", "--max_output_len", "16"]
    words += ["--output_csv", str(csv), "--output_npy", str(npy)]
    assert run_verb("run", words) == 0
    rows = np.load(npy)
    assert rows.dtype == np.int32 and rows.shape[0] == 2
    assert [int(cell) for cell in csv.read_text().splitlines()[1].split(",")] == rows[1].tolist()
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(rows[0].tolist()) == "hi" + ANSWER and rows[0, -1] == END_ID
    assert "Output [" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("**/.*")] == []


def test_probabilities_and_logits(llm: FakeLLM, tmp_path: Path) -> None:
    words = ["--input_text", "hi", "hi you", "--max_output_len", "16", "--streaming"]
    for flag, name in (("output_log_probs_npy", "lp.npy"), ("output_cum_log_probs_npy", "sum.npy"),
                       ("output_logits_npy", "logits.npy")):
        words += [f"--{flag}", str(tmp_path / name)]
    assert run_verb("run", words) == 0
    count = len(llm.tokenizer.encode_plain(ANSWER)) if llm.tokenizer else 0
    assert np.load(tmp_path / "lp.npy").shape == (2, 1, count)
    assert np.load(tmp_path / "sum.npy").tolist() == [[-0.5 * count]] * 2
    assert np.load(tmp_path / "logits_context.npy").shape == (sum(map(len, llm.prompts)), 4)
    assert np.load(tmp_path / "logits_generation.npy").shape == (2, count, 4)
    assert np.load(tmp_path / "logits_generation.npy").dtype == np.float32


def test_logits_need_an_engine_that_keeps_them(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.engine.limits = Limits(max_batch_size=4, max_seq_len=120, max_input_len=100, max_num_tokens=64)
    assert run_verb("run", ["--input_text", "hi", "--output_logits_npy", "x"]) == 2
    assert "--gather_all_token_logits" in capsys.readouterr().err


def test_one_output_is_streamed_on_one_line(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("run", ["--input_text", "hi", "--max_output_len", "16", "--streaming"]) == 0
    assert f'Output [Text 0 Beam 0]: "{ANSWER}"\n' in capsys.readouterr().out


def test_several_outputs_are_streamed_line_by_line(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input_text", "hi", "you", "--max_output_len", "16", "--streaming", "--streaming_interval", "3"]
    assert run_verb("run", words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Output [Text 1 Beam 0]")]
    assert len(lines) > 1 and lines[-1] == f'Output [Text 1 Beam 0]: "{ANSWER}"'
    assert all(later.startswith(earlier[:-1]) for earlier, later in zip(lines, lines[1:], strict=False))


@pytest.mark.parametrize("extra", [[], ["--streaming"]])
def test_a_failed_prompt_is_told(llm: FakeLLM, capsys: pytest.CaptureFixture[str], extra: list[str]) -> None:
    llm.error = "logits are no numbers"
    assert run_verb("run", ["--input_text", "hi", "--max_output_len", "16", *extra]) == 1
    assert "Error [Text 0]: logits are no numbers\n" in capsys.readouterr().out


def test_labels_of_several_sequences(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input_text", "hi", "--max_output_len", "16"]
    assert run_verb("run", [*words, "--num_return_sequences", "2", "--temperature", "1"]) == 0
    assert "Output [Text 0 Seq 1 Beam 0]" in capsys.readouterr().out
    assert run_verb("run", [*words, "--num_beams", "2"]) == 0
    assert "Output [Text 0 Beam 1]" in capsys.readouterr().out
    assert run_verb("run", [*words, "--num_beams", "2", "--num_return_sequences", "1"]) == 0
    assert capsys.readouterr().out.count("Output [") == 1
    assert run_verb("run", [*words, "--num_beams", "2", "--num_return_sequences", "3"]) == 2


def test_the_chat_template_is_applied_when_asked(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("run", ["--input_text", "hi", "--max_output_len", "16", "--chat", "--system", "Be brief."]) == 0
    expected = "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert f'Input [Text 0]: "{expected}"' in capsys.readouterr().out
    assert run_verb("run", ["--input_text", "hi", "--system", "Be brief."]) == 2


def test_without_a_tokenizer_ids_are_shown(llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm.tokenizer = None
    (tmp_path / "in.csv").write_text("1,20\n")
    for extra in ([], ["--streaming"]):
        assert run_verb("run", ["--input_file", str(tmp_path / "in.csv"), "--max_output_len", "4", *extra]) == 0
        out = capsys.readouterr().out
        assert 'Input [Text 0]: "1 20"' in out and 'Output [Text 0 Beam 0]: "100 101' in out
    assert run_verb("run", ["--input_text", "hi"]) == 2
    assert "--tokenizer_dir" in capsys.readouterr().err


def test_profiling_runs_twenty_times_more(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("run", ["--input_text", "hi", "--max_output_len", "16", "--run_profiling"]) == 0
    assert llm.num_runs == 21
    assert "batch_size: 1, avg latency of 10 iterations: : " in capsys.readouterr().out


def test_flags_without_effect_say_so(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--use_py_session", "--enable-chunked-context", "--lora_task_uids", "-1", "--no_prompt_template",
             "--multi_block_mode", "True"]
    assert run_verb("run", ["--input_text", "hi", *words]) == 0
    err = capsys.readouterr().err
    assert err.count("has no effect here") == 4 and "--use_py_session" in err


@pytest.mark.parametrize("words", [["--lora_dir", "x"], ["--medusa_choices", "[[0]]"], ["--num_prepend_vtokens", "3"]])
def test_flags_that_would_change_the_meaning_are_refused(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_verb("run", ["--input_text", "hi", *words])
    assert caught.value.code == 2
    assert f"{words[0]} {words[1]} is not supported" in capsys.readouterr().err


def test_a_chat_keeps_its_turns_and_says_when_it_is_full(
    llm: FakeLLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["hi\n", "you\n", "/system Be brief.\n", "a " * 90 + "\n", "/reset\n", "hi\n", "/quit\n", "never\n"]
    monkeypatch.setattr("sys.stdin", iter_with_isatty(lines))
    prompts: list[str] = []
    stream = llm.stream

    def record(asked: Any, parameters: Any) -> Iterator[Update]:
        assert llm.tokenizer is not None
        prompts.append(llm.tokenizer.decode(asked[0]))
        return stream(asked, parameters)

    monkeypatch.setattr(llm, "stream", record)
    assert run_verb("chat", []) == 0
    out = capsys.readouterr().out
    assert out.count("I'm doing well 🙂") == 3
    assert "no longer fits" in out or "too long" in out
    assert prompts[1] == f"user\nhi\nassistant\n{ANSWER}\nuser\nyou\nassistant\n"
    assert prompts[2] == "system\nBe brief.\nuser\nhi\nassistant\n"


def iter_with_isatty(lines: list[str]) -> Any:
    class Pipe(list[str]):
        def isatty(self) -> bool:
            return False

    return Pipe(lines)
