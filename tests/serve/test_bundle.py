"""What is refused before a server is started."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from tensorwright.cli.main import main
from tensorwright.errors import ServeError
from tensorwright.serve.triton import bundle


def test_no_server_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PACKAGE", "no-such-package-as-this")
    with pytest.raises(ServeError, match="not installed") as caught:
        bundle.find_bundle()
    assert "tensorwright[triton]" in str(caught.value.mend)


def test_a_python_without_a_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PACKAGE", "numpy")  # installed for sure
    monkeypatch.setattr(bundle, "_python_version", lambda: "3.7")
    with pytest.raises(ServeError, match="not whole"):
        bundle.find_bundle()


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.1")
    with pytest.raises(ServeError, match=r"NumPy 2\.3\.1") as caught:
        bundle.check_python({})
    assert "numpy<2" in str(caught.value.mend)


def test_a_missing_libpython_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.26.4")
    monkeypatch.setattr(bundle, "_python_version", lambda: "3.99")
    with pytest.raises(ServeError, match=r"libpython3\.99\.so\.1\.0"):
        bundle.check_python({})


def test_the_server_inherits_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("LD_PRELOAD", "/some.so")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    triton = bundle.Bundle(*(Path("/t") for _ in range(4)))
    environment = bundle.server_environment(triton)
    assert set(environment) <= {*bundle.KEPT_VARIABLES, "PATH", "LD_LIBRARY_PATH"}
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"  # the GPU that was chosen is the GPU that serves
    assert environment["LD_LIBRARY_PATH"].startswith("/t")


@pytest.mark.parametrize(("words", "status", "message"), [
    ([], 2, "--engine_dir"),
    (["--engine_dir", "/nowhere", "--model_repository", "r"], 1, "/nowhere"),
    (["--engine_dir", "e", "--model_repository", "r", "--http_port", "0"], 2, "http_port"),
    (["--engine_dir", "e", "--model_repository", "r", "--request_timeout_s", "-1"], 2, "request_timeout_s")])
def test_the_command_refuses(words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", *words]) == status
    assert message in capsys.readouterr().err
