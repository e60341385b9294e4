"""The simulator itself: instructions against what PTX says of them, and that it notices what kernels must not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tensorwright.testing.simulator.machine import SimulatedKernel, SimulationError, load

HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"
THREAD = """mov.u32 %r1, %tid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %ctaid.x; mad.lo.s32 %r4, %r3, %r2, %r1;
            ld.param.u64 %rd1, [k_param_0]; mul.wide.u32 %rd2, %r4, 4; add.s64 %rd3, %rd1, %rd2;"""


def kernel(body: str, shared: str = "") -> SimulatedKernel:
    return load(f"""{HEADER}.visible .entry k(.param .u64 k_param_0) {{
        .reg .pred %p<9>; .reg .b16 %rs<20>; .reg .b32 %r<99>; .reg .f32 %f<40>; .reg .b64 %rd<20>; {shared}
        {THREAD} {body} ret; }}""")["k"]


def run(body: str, given: NDArray[Any], *, shared: str = "", threads: int = 32, blocks: int = 1,
        races: bool = False) -> None:
    """One 4-byte number a thread, changed in place."""
    kernel(body, shared).launch([blocks], [threads], 0, given.ctypes.data.to_bytes(8, "little"),
                                ranges=[(given.ctypes.data, given.nbytes)], limit=1_000_000, races=races)


def each(body: str, given: NDArray[Any]) -> NDArray[np.uint32]:
    """`body` from %r10 to %r11, for 32 threads."""
    result = given.view(np.uint32).copy()
    run(f"ld.global.u32 %r10, [%rd3]; {body} st.global.u32 [%rd3], %r11;", result)
    return result


NUMBERS = np.random.default_rng(1).integers(0, 2**32, 32, np.uint32)


@pytest.mark.parametrize(("body", "wanted"), [
    ("add.s32 %r11, %r10, -5;", NUMBERS - np.uint32(5)),
    ("shr.s32 %r11, %r10, 3;", (NUMBERS.view(np.int32) >> 3).view(np.uint32)),
    ("shl.b32 %r11, %r10, 40;", np.zeros(32, np.uint32)),
    ("lop3.b32 %r11, %r10, 255, %r1, 0xC0;", NUMBERS & 255),
    ("lop3.b32 %r11, %r10, 255, %r1, 0x96;", NUMBERS ^ 255 ^ np.arange(32)),
    ("prmt.b32 %r11, %r10, 0x64646464, 0x4140;", (NUMBERS & 255) | 0x64006400 | (NUMBERS >> 8 & 255) << 16),
    ("bfi.b32 %r11, %r10, 0, 12, 8;", (NUMBERS & 255) << 12),
    ("cvt.u64.u32 %rd8, %r10; bfi.b64 %rd8, %rd8, 0, 20, 32; shr.u64 %rd8, %rd8, 32; cvt.u32.u64 %r11, %rd8;",
     NUMBERS >> 12),
    ("and.b32 %r12, %r10, 15; setp.gt.u32 %p1, %r12, 7; selp.b32 %r11, 1, 0, %p1;", (NUMBERS % 16 > 7)),
    ("{.reg .b16 low, high; mov.b32 {low, high}, %r10; mov.b32 %r11, {high, low};}", NUMBERS >> 16 | NUMBERS << 16),
    ("shfl.sync.bfly.b32 %r11|%p1, %r10, 5, 31, -1;", NUMBERS[np.arange(32) ^ 5]),
    ("shfl.sync.down.b32 %r11|%p1, %r10, 3, 31, -1;", np.append(NUMBERS[3:], NUMBERS[29:])),
    ("activemask.b32 %r11;", np.full(32, 0xFFFFFFFF)),
    ("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r11, %p1, -1;", np.full(32, 31)),
])
def test_instructions(body: str, wanted: NDArray[Any]) -> None:
    np.testing.assert_array_equal(each(body, NUMBERS), wanted.astype(np.uint32))


def test_conversions_of_floats() -> None:
    values = np.random.default_rng(2).standard_normal(32).astype(np.float32) * 50
    to_half = each("mov.b32 %f1, %r10; cvt.rn.f16.f32 %rs1, %f1; cvt.u32.u16 %r11, %rs1;", values)
    np.testing.assert_array_equal(to_half, values.astype(np.float16).view(np.uint16))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    pairs = each("mov.b32 %f1, %r10; cvt.rn.satfinite.e4m3x2.f32 %rs1, %f1, %f1; cvt.u32.u16 %r11, %rs1;", values)
    np.testing.assert_array_equal(pairs, values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) * np.uint32(257))
    whole = each("mov.b32 %f1, %r10; cvt.rni.s32.f32 %r11, %f1;", values)
    np.testing.assert_array_equal(whole.view(np.int32), np.rint(values))


def test_lanes_that_part_meet_again() -> None:
    body = """and.b32 %r5, %r1, 1; setp.eq.s32 %p1, %r5, 0; @%p1 bra EVEN; add.s32 %r11, %r10, 1; bra DONE;
              EVEN: add.s32 %r11, %r10, 2; DONE: shfl.sync.idx.b32 %r11|%p2, %r11, 0, 31, -1;"""
    np.testing.assert_array_equal(each(body, NUMBERS), np.full(32, NUMBERS[0] + np.uint32(2)))


def test_blocks_add_and_wait_for_each_other() -> None:
    """Every thread adds 1 to the first number and waits until all have."""
    numbers = np.zeros(256, np.uint32)
    run("""atom.global.add.u32 %r5, [%rd1], 1; AGAIN: ld.volatile.global.u32 %r6, [%rd1];
           setp.lt.u32 %p1, %r6, 256; @%p1 bra AGAIN;""", numbers, threads=64, blocks=4)
    assert numbers[0] == 256


def test_a_barrier_orders_shared_memory() -> None:
    numbers = np.arange(128, dtype=np.uint32)
    run("""ld.global.u32 %r10, [%rd3]; shl.b32 %r5, %r1, 2; mov.u32 %r6, buffer; add.s32 %r7, %r6, %r5;
           st.shared.u32 [%r7], %r10; bar.sync 0; sub.s32 %r8, 508, %r5; add.s32 %r9, %r6, %r8;
           ld.shared.u32 %r11, [%r9]; st.global.u32 [%rd3], %r11;""", numbers, threads=128,
        shared=".shared .align 4 .b8 buffer[512];")
    np.testing.assert_array_equal(numbers, np.arange(128)[::-1])


@pytest.mark.parametrize(("body", "message"), [
    ("st.global.u32 [%rd3+128], %r1;", "outside global memory"),
    ("ld.shared.u32 %r5, [buffer+64];", "outside shared memory"),
    ("st.global.u32 [%rd3+2], %r1;", "misaligned"),
    ("setp.lt.u32 %p1, %r1, 9; @%p1 bra OUT; bar.warp.sync 0xffffffff; OUT: bar.warp.sync 0xffffffff; bar.sync 0, 64;",
     "nothing can go on"),
    ("AGAIN: bra AGAIN;", "did not end"),
    ("setp.lt.u32 %p1, %r1, 1; @%p1 trap;", "trap"),
    ("mbarrier.arrive.shared.b64 _, [buffer];", "not initialised"),
    ("tex.1d.v4.f32.s32 {%f1,%f2,%f3,%f4}, [a, {%r1}];", "tex"),
])
def test_mistakes_are_errors(body: str, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        run(body, np.zeros(32, np.uint32), shared=".shared .align 8 .b8 buffer[64];")


def test_copies_land_only_when_they_are_waited_for() -> None:
    text = """mov.u32 %r6, buffer; shl.b32 %r7, %r1, 4; add.s32 %r8, %r6, %r7; mul.wide.u32 %rd5, %r7, 1;
              add.s64 %rd6, %rd1, %rd5; cp.async.cg.shared.global [%r8], [%rd6], 16; cp.async.commit_group;
              {wait} ld.shared.u32 %r11, [%r8]; st.global.u32 [%rd6], %r11;"""
    for wait, wanted in (("cp.async.wait_group 0;", 7), ("", 0xFFFFFFFF)):
        numbers = np.full(128, 7, np.uint32)
        run(text.replace("{wait}", wait), numbers, shared=".shared .align 16 .b8 buffer[512];")
        assert numbers[::4].tolist() == [wanted] * 32


EXCHANGE = """shl.b32 %r5, %r1, 2; mov.u32 %r6, buffer; add.s32 %r7, %r6, %r5; st.shared.u32 [%r7], %r1; {barrier}
              sub.s32 %r8, 252, %r5; add.s32 %r9, %r6, %r8; ld.shared.u32 %r11, [%r9]; st.global.u32 [%rd3], %r11;"""
BULK = """mov.u32 %r6, buffer; mov.u32 %r5, 1; setp.eq.u32 %p1, %r1, 0; @!%p1 bra READY;
          mbarrier.init.shared.b64 [%r6+128], %r5; mbarrier.arrive.expect_tx.shared.b64 _, [%r6+128], 128;
          cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [buffer], [%rd1], 128, [buffer+128];
          READY: bar.sync 0; {wait}
          and.b32 %r7, %r1, 31; shl.b32 %r7, %r7, 2; add.s32 %r8, %r6, %r7; ld.shared.u32 %r11, [%r8];
          st.global.u32 [%rd3], %r11;"""
WAIT = "AGAIN: mbarrier.try_wait.parity.shared.b64 %p2, [%r6+128], 0; @!%p2 bra AGAIN;"


@pytest.mark.parametrize(("text", "order"), [(EXCHANGE, "bar.sync 0;"), (BULK, WAIT)], ids=["barrier", "mbarrier"])
def test_races_are_found_whatever_the_order_of_warps(text: str, order: str) -> None:
    shared, given = ".shared .align 16 .b8 buffer[256];", np.arange(64, dtype=np.uint32)
    body = text.replace("{barrier}", "{order}").replace("{wait}", "{order}")
    run(body.replace("{order}", order), given, shared=shared, threads=64, races=True)
    assert given.tolist() == (list(range(64))[::-1] if text is EXCHANGE else [*range(32), *range(32)])
    with pytest.raises(SimulationError, match="a race: warp"):
        run(body.replace("{order}", ""), np.arange(64, dtype=np.uint32), shared=shared, threads=64, races=True)


def test_a_buffer_that_is_filled_again_before_all_have_read_it_is_a_race() -> None:
    body = EXCHANGE.replace("{barrier}", "bar.sync 0;") + "st.shared.u32 [%r7], %r8;"
    with pytest.raises(SimulationError, match="a race: warp . (reads|writes) what warp ."):
        run(body, np.zeros(64, np.uint32), shared=".shared .align 16 .b8 buffer[256];", threads=64, races=True)
