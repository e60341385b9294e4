"""Targets, the compiler, its cache, and what the compiled library asks of the system."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from tensorwright.errors import BuildError, EngineError, IncompatibleEngineError, UsageError
from tensorwright.kernels.cpu import compile as compiling
from tensorwright.kernels.cpu.compile import compile_shared, engine_source, find_compiler
from tensorwright.kernels.cpu.elf import needed_libraries, required_glibc, version_key
from tensorwright.kernels.cpu.targets import TARGET_NAMES, check_target, machine_features, resolve_target
from tensorwright.kernels.interface import Source, Target, symbols

ENTRIES = [Source(("elementwise.h",), "tw::add<16>::run"), Source(("elementwise.h",), "tw::multiply<16>::run"),
           Source(("elementwise.h",), "tw::add<16>::run")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tensorwright"


def test_equal_functions_share_a_symbol() -> None:
    assert symbols(ENTRIES) == ("tw_kernel_0", "tw_kernel_1", "tw_kernel_0")
    source = engine_source(ENTRIES)
    assert '#include "' not in source
    assert source.count("void tw_kernel_") == 2


def test_a_library_needs_libc_and_libm_only(target: Target) -> None:
    data = compile_shared(engine_source(ENTRIES), target)
    assert {name.split(".so")[0] for name in needed_libraries(data)} <= {"libc", "libm", "ld-linux-x86-64",
                                                                        "ld-linux-aarch64"}
    here = platform.libc_ver()[1]
    assert (2, 17) <= version_key(required_glibc(data)) <= version_key(here)


def test_cut_off_libraries_are_refused() -> None:
    with pytest.raises(EngineError, match="no 64-bit"):
        needed_libraries(b"MZ")
    with pytest.raises(EngineError, match="cut-off"):
        required_glibc(b"\x7fELF\x02\x01" + bytes(10))


def test_the_cache_is_used_and_survives_damage(cache: Path) -> None:
    target, source = resolve_target("portable"), "extern \"C\" int answer() { return 42; }\n"
    first = compile_shared(source, target)
    entry, = cache.glob("*.so")
    reports: list[str] = []
    assert compile_shared(source, target, report=lambda _, text: reports.append(text)) == first
    assert len(reports) == 1
    entry.write_bytes(entry.read_bytes()[:-5])
    assert compile_shared(source, target, report=lambda _, text: reports.append(text))[:4] == b"\x7fELF"
    assert len(reports) == 3


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_shared("int f() { return 1; }\n", resolve_target("portable"))[:4] == b"\x7fELF"


@pytest.mark.usefixtures("cache")
def test_compiler_errors_are_shown_short_with_the_command() -> None:
    lines = "\n".join(f"int f{i}() {{ return missing_{i}; }}" for i in range(40))
    with pytest.raises(BuildError, match=r"(?s)-O3.*missing_0.*lines more") as caught:
        compile_shared(lines, resolve_target("portable"))
    assert len(caught.value.message.splitlines()) < 16


@pytest.mark.usefixtures("cache")
def test_a_library_with_strangers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "needed_libraries", lambda data: ("libc.so.6", "libgomp.so.1"))
    with pytest.raises(BuildError, match=r"need libgomp\.so\.1"):
        compile_shared("int g() { return 1; }\n", resolve_target("portable"))


def test_no_compiler_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError) as caught:
        find_compiler()
    assert caught.value.mend == "apt-get install g++"
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(BuildError, match="no-such-compiler"):
        find_compiler()


def test_cxx_may_hold_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true --option 'with space'")
    assert find_compiler() == ("true", "--option", "with space")


def test_another_architecture_needs_a_cross_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    other = "x86-64-v3" if platform.machine() == "aarch64" else "aarch64"
    with pytest.raises(BuildError, match="cross compiler"):
        compile_shared("int h() { return 1; }\n", resolve_target(other))


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_every_target_resolves(name: str) -> None:
    assert resolve_target(name).name == name


def test_unknown_targets_are_named() -> None:
    with pytest.raises(UsageError, match="sm_90"):
        resolve_target("sm_90")


def test_native_code_runs_here_and_lists_what_the_compiler_may_use() -> None:
    target = resolve_target("native")
    check_target(target)
    assert set(target.features) <= machine_features()
    command = [*find_compiler(), *target.flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for macro, feature in (("__AVX2__", "avx2"), ("__AVX512F__", "avx512f"), ("__AVX512VNNI__", "avx512_vnni"),
                           ("__AVX512VBMI__", "avx512vbmi"), ("__GFNI__", "gfni"), ("__F16C__", "f16c")):
        assert (f"#define {macro} " in macros) == (feature in target.features)


def test_a_cpu_without_the_features_is_refused_with_the_mend() -> None:
    target = resolve_target("x86-64-v3")
    with pytest.raises(IncompatibleEngineError, match=r"lacks avx2, fma\n") as caught:
        check_target(target, engine="E", machine="x86_64", features=set(target.features) - {"avx2", "fma"})
    assert caught.value.mend == "tensorwright build --rebuild_kernels E --target native"
    with pytest.raises(IncompatibleEngineError, match="this machine is riscv64"):
        check_target(target, machine="riscv64")


def test_features_are_read_on_both_architectures(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nFeatures\t: fp asimd asimddp\n")
    assert machine_features(info) == {"fp", "asimd", "asimddp"}
    info.write_text("flags : fpu sse2\nflags : fpu\n")
    assert machine_features(info) == {"fpu", "sse2"}
