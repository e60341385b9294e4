"""Rotary embedding with the cache write, and attention over the cache (native/rope.cuh, native/attention.cuh).

`rope_launch` and `attention_launch` are for kernels that run several ops at once, too.
"""

from __future__ import annotations

from tensorwright.kernels.cpu.plain import PlainKernel, attribute, cache_of, supports_cache
from tensorwright.kernels.cuda.elementwise import NATIVE_TYPES
from tensorwright.kernels.cuda.launch import Argument, GpuSource, Launch, Size
from tensorwright.kernels.cuda.targets import SHARED_BYTES
from tensorwright.kernels.interface import Cost, Source, Tactic, Target
from tensorwright.program.program import Op, Program

LARGEST_HEAD = 256
LOG2E = 1.4426950408889634
# Of native/attention.cuh: rows and keys of a wide tile, by whether a head has more than 128 numbers.
ROWS, KEYS = {False: 128, True: 64}, {False: 64, True: 32}
MOST_NARROW, NARROW_ROWS, MOST_WIDE = 2048, 16, 132
BLOCKS = 264  # of threads, at least: two for each multiprocessor of the largest GPUs
DECODE_TILE_BYTES, LEAST_CHUNK = 16 * (128 + 8) * 2, 256  # of native/decode_attention.cuh
MOST_SLOTS, STATIC_SHARED, FEW_SHARED, RESERVED = 4, 1 << 10, 256, 1 << 10


def _supports(op: Op, program: Program) -> bool:
    """16-bit, int8 and float8 caches; query heads must divide by kv heads."""
    return (supports_cache(op, program, NATIVE_TYPES)
            and op.attributes["num_heads"] % op.attributes["num_kv_heads"] == 0)


def _item_bytes(op: Op, program: Program) -> int:
    """Of a number in the cache."""
    return 1 if cache_of(op, program).dtype in ("int8", "float8_e4m3") else 2


class RopeCache(PlainKernel):
    """Splits qkv, norms and turns heads, writes the cache, gives q: one pass over qkv. Angles in double."""

    name = "rope_cache"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Any head size up to 256."""
        return (super().supports(op, program, target) and _supports(op, program)
                and op.attributes["head_size"] <= LARGEST_HEAD)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """See `rope_launch`."""
        return GpuSource(("rope.cuh",), "", (rope_launch(op, program),))

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Reads qkv, writes q and the cache."""
        a, number = op.attributes, _item_bytes(op, program)
        heads, kv_heads, size = a["num_heads"], a["num_kv_heads"], a["head_size"]
        return Cost(float(num_tokens * size * (8 * heads + 8 * kv_heads + 2 * kv_heads * number)),
                    6.0 * num_tokens * (heads + kv_heads) * size)


class Attention(PlainKernel):
    """Causal softmax(scale · q·k)·v over paged caches: products of 16-bit numbers, sums in float32."""

    name = "attention"

    def supports(self, op: Op, program: Program, target: Target) -> bool:
        """Head sizes that are multiples of 16, up to 256."""
        size = op.attributes["head_size"] if op.kind == self.name else 0
        return (super().supports(op, program, target) and _supports(op, program) and size % 16 == 0
                and 0 < size <= LARGEST_HEAD)

    def tactics(self, op: Op, program: Program, target: Target) -> tuple[Tactic, ...]:
        """Tiles of keys and values on their way: as many as let two blocks share a multiprocessor, else as fit."""
        whole = SHARED_BYTES[target.name]
        half = (whole + RESERVED) // 2 - RESERVED
        slots = next(slots for room in (half, whole) for slots in range(MOST_SLOTS, 1, -1)
                     if _shared_bytes(op, program, slots) + STATIC_SHARED <= room)
        return (Tactic(self.layout, {"slots": slots}),)

    def source(self, op: Op, program: Program, tactic: Tactic) -> Source:
        """See `attention_launch`."""
        parts, arrivals = attention_memory(op)
        return GpuSource(("attention.cuh",), "", (attention_launch(op, program, tactic),),
                         scratch=(("attention_parts", Size(times=parts)),), zeros=(("attention_arrivals", arrivals),))

    def cost(self, op: Op, program: Program, num_tokens: int, kv_tokens: int) -> Cost:
        """Keys and values of `kv_tokens` positions once; q and y; four operations per position, head and number."""
        a, number = op.attributes, _item_bytes(op, program)
        width, scale = a["num_heads"] * a["head_size"], 4 if cache_of(op, program).dtype == "int8" else 0
        cached = 2 * kv_tokens * a["num_kv_heads"] * (a["head_size"] * number + scale)
        return Cost(float(cached + 8 * num_tokens * width), 4.0 * kv_tokens * width)


def rope_launch(op: Op, program: Program, qkv: str = "inputs.qkv", q: str = "outputs.q",
                numbers: tuple[str, str] = ("float", "float"), *, is_stretch: bool = False, bias: str = "") -> Launch:
    """tw::rope_cache. `qkv` and `q`: pointers; `numbers`: their C++ types, such as "tw::half". is_stretch: of a
    stretch, which has no operands of its own. `bias`: a pointer to what is yet to be added to qkv, if any.
    """
    a, cache = op.attributes, cache_of(op, program)
    pairs = program.weights[op.weights["inverse_frequencies"]].shape[0]
    shape = (*numbers, NATIVE_TYPES[cache.dtype], a["num_heads"], a["num_kv_heads"], a["head_size"], cache.shape[3],
             pairs)
    weights = {role: f"named.{name}" for role, name in op.weights.items()} if is_stretch else {
        role: f"weights.{role}" for role in op.weights}
    batch = "batch" if is_stretch else "inputs"
    arguments: tuple[Argument, ...] = (
        qkv, f"{batch}.positions", f"{batch}.slots", q, *_caches(op, program, is_stretch),
        *(weights.get(role, "") for role in ("inverse_frequencies", "q_norm", "k_norm")), bias,
        float(attribute(op, "attention_factor")), float(attribute(op, "norm_epsilon")))
    return Launch(f"tw::rope_cache<{', '.join(map(str, shape))}>", (Size("tokens"), Size(), Size()), 256, 0,
                  (arguments,))


def attention_launch(op: Op, program: Program, tactic: Tactic, q: str = "inputs.q", y: str = "outputs.y",
                     numbers: tuple[str, str] = ("float", "float"), *, is_stretch: bool = False) -> Launch:
    """tw::attention over scratch.attention_parts and zeros.attention_arrivals (see `attention_memory`). Arguments as
    those of `rope_launch`.
    """
    a, cache, slots = op.attributes, cache_of(op, program), tactic.parameters["slots"]
    group, kv_heads, rows = a["num_heads"] // a["num_kv_heads"], a["num_kv_heads"], ROWS[a["head_size"] > 128]
    shape = (_product_type(op, program), NATIVE_TYPES[cache.dtype], *numbers, a["num_heads"], kv_heads, a["head_size"],
             cache.shape[3], attribute(op, "window"), slots)
    tiles = -(-BLOCKS // kv_heads)
    grid = (Size("tokens", per=max(1, tiles * rows // group), times=kv_heads * tiles), Size(), Size())
    batch = "batch" if is_stretch else "inputs"
    arguments = (q, *_caches(op, program, is_stretch), f"{batch}.query_starts", f"{batch}.query_lengths",
                 f"{batch}.kv_lengths", f"{batch}.block_tables", y, "scratch.attention_parts",
                 "zeros.attention_arrivals", "sizes.tokens", "sizes.sequences", "sizes.table_width",
                 float(a["scale"] * LOG2E))
    return Launch(f"tw::attention<{', '.join(map(str, shape))}>", grid, 128, _shared_bytes(op, program, slots),
                  (arguments,))


def decode_attention_launch(op: Op, program: Program, target: Target, tokens: int, order: str, chunks: int,
                            arguments: tuple[Argument, ...], number: str = "") -> Launch:
    """tw::decode_attention of steps of so many tokens, one of each sequence, in up to so many chunks. `order`: the C++
    type of y's; `arguments`: of tw::AttentionInput up to the table's width; `number`: the dtype of q and y, where the
    cache is float8.
    """
    a, cache = op.attributes, cache_of(op, program)
    warps = max(2, min(8, 128 // tokens))  # so that up to 64 sequences of 8 kv heads run at once
    resident, queries = 8 // warps, warps * a["num_heads"] // a["num_kv_heads"] * 2 * (128 + 12)
    room = (SHARED_BYTES[target.name] + RESERVED) // resident - RESERVED - FEW_SHARED - queries
    number = number or cache.dtype
    stored, converted = (DECODE_TILE_BYTES, 0) if cache.dtype == number else (16 * 128, DECODE_TILE_BYTES)
    slots = min(6, (room // warps - converted) // stored)
    shape = (NATIVE_TYPES[number], NATIVE_TYPES[cache.dtype], order, a["num_heads"], a["num_kv_heads"], cache.shape[3],
             warps, slots, LEAST_CHUNK)
    grid = (Size(times=a["num_kv_heads"]), Size(times=tokens), Size(times=chunks))
    return Launch(f"tw::decode_attention<{', '.join(map(str, shape))}>", grid, 32 * warps,
                  warps * (slots * stored + converted),
                  ((*arguments, int(attribute(op, "window")), float(a["scale"] * LOG2E)),))


def attention_memory(op: Op) -> tuple[int, int]:
    """Bytes of scratch.attention_parts and zeros.attention_arrivals: what blocks leave for each other."""
    size = op.attributes["head_size"]
    rows = MOST_NARROW * NARROW_ROWS + MOST_WIDE * ROWS[size > 128]
    return rows * (size + 2) * 4, (MOST_NARROW + MOST_WIDE) // 2 * 4


def _caches(op: Op, program: Program, is_stretch: bool) -> tuple[str, str]:
    """Keys and values, and their scales if they have any."""
    kv, scales = next(name for name in op.inputs if len(program.buffers[name].shape) == 5), _scales(op, program)
    if is_stretch:
        return f"named.{kv}", scales and f"named.{scales}"
    return "inputs.kv", scales and "inputs.kv_scales"


def _scales(op: Op, program: Program) -> str:
    """The buffer's name, or "" where the cache has none."""
    return next((name for name in op.inputs if len(program.buffers[name].shape) == 4), "")


def _product_type(op: Op, program: Program) -> str:
    """The cache's own, or half where it holds 8-bit numbers."""
    return "tw::half" if _item_bytes(op, program) == 1 else NATIVE_TYPES[cache_of(op, program).dtype]


def _shared_bytes(op: Op, program: Program, slots: int) -> int:
    """AttentionShape::SHARED_BYTES of native/attention.cuh."""
    size, dtype = int(op.attributes["head_size"]), cache_of(op, program).dtype
    rows, keys = ROWS[size > 128], KEYS[size > 128]
    tile = keys * (size + 8) * 2
    slot = {"int8": keys * (size + 4), "float8_e4m3": keys * size}.get(dtype, tile)
    return rows * (size + 8) * 2 + slots * slot + (0 if slot == tile else tile)
