"""The doctor: it runs, judges only what the CPU path needs, and says how to get the rest."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from tensorwright.cli import doctor, doctor_gpu, machine
from tensorwright.cli.doctor import Finding
from tensorwright.cli.main import main
from tensorwright.errors import BuildError


def test_it_runs_here_and_says_that_everything_needed_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "can be converted, built and run on this machine" in printed
    for what in ("system", "Python", "packages", "C++ compiler", "processor", "memory", "disk", "MPI", "Triton", "GPU"):
        assert what in printed


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["works"] is True
    assert len(answer["findings"]) == len(doctor.CHECKS)


@pytest.mark.parametrize(("finding", "status"), [
    (Finding("x", "missing", "none", "get x", needed=True), 1), (Finding("x", "missing", "none", "get x"), 0),
    (Finding("x", "note", "none", "get x"), 0), (Finding("x", "ok", "x 1", needed=True), 0)])
def test_only_what_is_needed_and_missing_fails(finding: Finding, status: int, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: finding,))
    assert main(["doctor"]) == status
    assert ("get x" in capsys.readouterr().out) == bool(finding.mend)


@pytest.mark.parametrize(("system", "architecture", "state"), [
    ("Linux", "x86_64", "ok"), ("Linux", "aarch64", "ok"), ("Darwin", "arm64", "missing"),
    ("Linux", "riscv64", "missing")])
def test_systems(system: str, architecture: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    assert doctor.system().state == state


def test_a_machine_without_compiler_is_told_where_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> tuple[str, ...]:
        raise BuildError("no C++ compiler found", mend="apt-get install g++")

    monkeypatch.setattr("tensorwright.kernels.cpu.compile.find_compiler", none)
    finding = doctor.compiler()
    assert (finding.state, finding.mend, finding.needed) == ("missing", "apt-get install g++", True)


def test_numpy_2_is_named_as_what_keeps_triton_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.3.1")
    finding = doctor.server()
    assert finding.state == "note"
    assert 'pip install "numpy<2"' in finding.mend


def test_facts_of_the_machine_are_plausible() -> None:
    assert 0 < machine.available_bytes() <= machine.total_bytes()
    assert machine.num_processors() >= 1
    assert machine.peak_memory_bytes() > 1 << 20
    assert machine.free_disk_bytes(Path("/")) > 0


def test_programs_that_are_missing_or_fail_give_nothing() -> None:
    assert machine.first_line("there-is-no-such-program") is None
    assert machine.first_line("false") is None
    assert machine.first_line("echo", "hello\nworld") == "hello"


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("max", "1000000"), ("current", "700000"), ("stat", "anon 5\ninactive_file 100000\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP_FILES", (tuple(str(tmp_path / n) for n in ("max", "current", "stat")),))
    assert machine.available_bytes() == 400000
    (tmp_path / "max").write_text("max\n")
    assert machine.available_bytes() > 400000


H200 = "NVIDIA H200, 580.159.04, 9.0, 143771, 143000"
FITTING = {"torch": "2.11.0+cu130", "cuda-bindings": "13.0.3", "nvidia-cuda-nvrtc": "13.0.88"}


def gpu_finding(monkeypatch: pytest.MonkeyPatch, answer: str | None, packages: dict[str, str]) -> Finding:
    monkeypatch.setattr(machine, "first_line", lambda *command: answer)
    real = doctor_gpu.problems
    monkeypatch.setattr(doctor_gpu, "package_version", packages.get)
    monkeypatch.setattr(doctor_gpu, "problems", lambda gpu: real(gpu, packages.get))
    monkeypatch.setattr(doctor_gpu, "packages", lambda: ", ".join(packages))
    return doctor.gpu()


def test_a_gpu_with_driver_and_packages_that_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = gpu_finding(monkeypatch, H200, {**FITTING, "cuda-bindings": "13.2.0", "nvidia-cuda-runtime": "13.0.96"})
    assert (finding.state, finding.mend) == ("ok", "")
    for fact in ("NVIDIA H200", "sm_90", "580.159.04", "139.6 GiB free of 140.4 GiB"):
        assert fact in finding.found


@pytest.mark.parametrize(("answer", "packages", "said", "mend"), [
    (H200, {"torch": "2.11.0+cu130"}, "no cuda-bindings and no nvidia-cuda-nvrtc", doctor_gpu.INSTALL),
    (H200.replace("580.159.04", "550.90.07"), FITTING, "whose drivers begin at 580; this one is 550.90.07",
     "a driver 580 or newer"),
    (H200, {**FITTING, "nvidia-cuda-runtime": "13.1.80"}, "nvidia-cuda-runtime 13.1.80 are of different toolkits",
     "--force-reinstall"),
    (H200, {**FITTING, "cuda-bindings": "12.9.0"}, "cuda-bindings 12.9.0 are of different toolkits",
     "--force-reinstall"),
    (H200, {**FITTING, "torch": "2.13.0+cpu"}, "torch 2.13.0+cpu is without CUDA", "pip uninstall torch"),
    (H200.replace("9.0", "7.0"), FITTING, "compute capability 7.0", "a GPU of one of sm_80"),
])
def test_a_gpu_is_told_what_does_not_go_together(answer: str, packages: dict[str, str], said: str, mend: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    finding = gpu_finding(monkeypatch, answer, packages)
    assert finding.state == "note" and not finding.needed
    assert said in finding.found and mend in finding.mend


@pytest.mark.parametrize("answer", [None, "", "No devices were found"])
def test_without_a_gpu_engines_for_one_can_still_be_built(answer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "built, not run" in gpu_finding(monkeypatch, answer, FITTING).found
    assert "neither built nor run" in gpu_finding(monkeypatch, answer, {}).found


@pytest.mark.parametrize(("version", "cuda"), [
    ("2.11.0+cu130", "13.0"), ("2.9.0+cu128", "12.8"), ("2.13.0+cpu", None), ("2.13.0", ""), (None, None)])
def test_the_cuda_of_a_build_of_torch(version: str | None, cuda: str | None) -> None:
    assert doctor_gpu.torch_cuda(version) == cuda
