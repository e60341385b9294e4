"""`tensorwright run` and `chat` on a real, tiny engine: what is printed, streamed and written agrees."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest

from tensorwright.cli.main import run_verb
from tensorwright.runtime.tokenizer import Tokenizer
from tensorwright.testing.engines import Recipe, build_engine

LIMITS = {"max_beam_width": 2, "gather_context_logits": True, "gather_generation_logits": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(Recipe(build=LIMITS), tmp_path_factory.mktemp("run"))


def run(engine: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run_verb("run", ["--engine_dir", str(engine), "--max_output_len", "12", *words]) == 0
    return capsys.readouterr().out


def outputs(text: str) -> dict[str, str]:
    """The last text of every label."""
    return dict(re.findall(r'^Output \[(.*?)\]: "(.*?)"$', text, re.MULTILINE | re.DOTALL))


def test_the_guides_line(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(engine, capsys, "--tokenizer_dir", str(engine.parent / "model"), "--input_text", "hi how are you?",
              "--temperature", "0.2")
    assert re.search(r"^Load engine takes: \d+\.\d+ sec$", out, re.MULTILINE)
    assert "KV tokens that fit" in out
    assert 'Input [Text 0]: "<s>hi how are you?"' in out and "Text 0 Beam 0" in outputs(out)


def test_streamed_text_is_the_whole_text(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--input_text", "hi", "how are you", "--temperature", "1", "--num_return_sequences", "2")
    whole = outputs(run(engine, capsys, *words))
    assert len(whole) == 4
    assert outputs(run(engine, capsys, *words, "--streaming", "--streaming_interval", "2")) == whole
    one = ("--input_text", "hi")
    assert outputs(run(engine, capsys, *one, "--streaming")) == outputs(run(engine, capsys, *one))


def test_files_hold_what_was_generated(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--input_text", "hi", "how are you", "--end_id", "300")  # 300 ends the first one early
    for flag in ("output_npy", "output_log_probs_npy", "output_cum_log_probs_npy", "output_logits_npy"):
        words += (f"--{flag}", str(tmp_path / f"{flag}.npy"))
    run(engine, capsys, *words)
    rows, sums = np.load(tmp_path / "output_npy.npy"), np.load(tmp_path / "output_cum_log_probs_npy.npy")
    log_probs = np.load(tmp_path / "output_log_probs_npy.npy")[:, 0]
    logits = np.load(tmp_path / "output_logits_npy_generation.npy").astype(np.float64)
    context = np.load(tmp_path / "output_logits_npy_context.npy")
    tokenizer = Tokenizer.load(engine)
    lengths = [len(tokenizer.encode(text)) for text in ("hi", "how are you")]
    expected = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    for number, length in enumerate(lengths):
        count = int(logits[number].any(-1).sum())  # the rest is padding
        assert np.array_equal(logits[number, :count].argmax(-1), rows[number, length : length + count])
        np.testing.assert_allclose(log_probs[number, :count], expected[number, :count], rtol=1e-4)
        assert not log_probs[number, count:].any() and set(rows[number, length + count :]) <= {2}
    np.testing.assert_allclose(sums[:, 0], log_probs.sum(-1), rtol=1e-4)
    assert context.shape[0] == sum(lengths) and context[lengths[0] - 1].argmax() == rows[0, lengths[0]]


def test_token_ids_from_a_file_give_the_same(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = Tokenizer.load(engine).encode("how are you")
    (tmp_path / "in.csv").write_text(",".join(map(str, ids)) + "\n")
    of_file = outputs(run(engine, capsys, "--input_file", str(tmp_path / "in.csv")))
    assert of_file == outputs(run(engine, capsys, "--input_text", "how are you"))


def test_bad_and_stop_words(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = outputs(run(engine, capsys, "--input_text", "hi"))["Text 0 Beam 0"]
    word = next(letter for letter in free if letter.isascii() and letter.isalpha())
    stopped = outputs(run(engine, capsys, "--input_text", "hi", "--stop_words", word))["Text 0 Beam 0"]
    assert stopped == free[: free.index(word)]
    assert outputs(run(engine, capsys, "--input_text", "hi", "--bad_words", word))["Text 0 Beam 0"] != free


def test_beams_and_verify(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(engine, capsys, "--input_text", "hi", "--num_beams", "2", "--verify")
    assert set(outputs(out)) == {"Text 0 Beam 0", "Text 0 Beam 1"} and "is whole" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_output_len", "512"], "max_seq_len 64"),
        (["--num_beams", "3"], "max_beam_width 2"),
        (["--max_attention_window_size", "8"], "max_seq_len 64"),
        (["--threads", "0"], "--threads is 0"),
        (["--kv_cache_free_gpu_memory_fraction", "1.5"], "above 0 and at most 1"),
        (["--tokenizer_dir", "/nowhere"], "/nowhere does not exist"),
        (["--temperature", "-1"], "temperature must be 0 or more; got -1"),
    ],
)
def test_refused_with_the_numbers(
    engine: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run_verb("run", ["--engine_dir", str(engine), "--input_text", "hi", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_engine(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("run", ["--engine_dir", str(engine.parent / "checkpoint"), "--input_text", "hi"]) == 1
    assert "tensorwright build" in capsys.readouterr().err


def test_one_process_for_an_engine_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = build_engine(Recipe(tp_size=2), tmp_path)
    assert run_verb("run", ["--engine_dir", str(engine), "--input_text", "hi"]) == 1
    err = capsys.readouterr().err
    assert "2 ranks; 1 rank running" in err and "mpirun -n 2" in err


def test_a_chat_through_a_pipe(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\nhi\n/unknown\n" + "how are you " * 9 + "\n"))
    assert run_verb("chat", ["--engine_dir", str(engine), "--max_output_len", "8"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == lines[2] and lines[1] == "The conversation is forgotten."
    assert lines[3].startswith("Unknown command /unknown") and "no longer fits" in lines[4]
