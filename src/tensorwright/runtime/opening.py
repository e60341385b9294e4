"""Opens an engine folder for running: engine, tokenizer, memory plan, executor, loop. Then it is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tensorwright.engine.engine import Engine
from tensorwright.engine.limits import Limits
from tensorwright.runtime.batch import Executor
from tensorwright.runtime.communicator import Communicator, check_ranks
from tensorwright.runtime.loop import RequestLoop
from tensorwright.runtime.machines import Machine, machine_of
from tensorwright.runtime.memory import MemoryPlan, Needs, plan_memory
from tensorwright.runtime.submission import RequestFactory
from tensorwright.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenEngine:
    """An engine that is ready for requests."""

    engine: Engine
    tokenizer: Tokenizer | None
    plan: MemoryPlan
    factory: RequestFactory
    loop: RequestLoop


def open_engine(engine_dir: Path, *, tokenizer_dir: Path | None = None, threads: int | None = None,
                max_kv_tokens: int | None = None, kv_cache_fraction: float = 0.9, block_reuse: bool = True,
                communicator: Communicator | None = None, executor: Executor | None = None) -> OpenEngine:
    """Open everything; an executor that is handed in keeps its own number of blocks.

    Raises:
        EngineError: no engine, a damaged one, or one for another version or machine.
        RanksError: another number of processes than the engine has ranks.
        LimitError: the KV cache does not fit into memory.
    """
    rank = communicator.rank if communicator else 0
    engine = Engine.open(Path(engine_dir))
    check_ranks(engine.world_size, communicator)  # a rank too many has no file to open
    engine = Engine.open(Path(engine_dir), rank) if rank else engine
    tokenizer = _tokenizer(engine, tokenizer_dir)
    machine = machine_of(engine)
    plan = _plan(engine, machine, max_kv_tokens, kv_cache_fraction, communicator)
    if executor is None:
        executor = machine.executor(engine, threads=threads, num_blocks=plan.num_blocks, communicator=communicator)
    end_ids = (*engine.end_ids, *(tokenizer.end_ids if tokenizer else ()))
    factory = RequestFactory(engine.limits, vocab_size=engine.vocab_size, end_ids=end_ids, tokenizer=tokenizer,
                             num_blocks=executor.num_blocks, block_size=executor.block_size)
    loop = RequestLoop(executor, engine.limits, block_reuse=block_reuse)
    return OpenEngine(engine, tokenizer, plan, factory, loop)


def _tokenizer(engine: Engine, tokenizer_dir: Path | None) -> Tokenizer | None:
    """The tokenizer of the folder named, or the engine's own if it has one."""
    if tokenizer_dir is None and not (engine.directory / "tokenizer.json").is_file():
        return None
    return Tokenizer.load(tokenizer_dir or engine.directory, end_ids=engine.end_ids)


def _plan(engine: Engine, machine: Machine, max_kv_tokens: int | None, fraction: float,
          communicator: Communicator | None) -> MemoryPlan:
    def needs(limits: Limits) -> Needs:
        return Needs(engine.weight_bytes, _activation_bytes(engine, machine, limits), engine.kv_bytes_per_token,
                     engine.tokens_per_block)

    plan = plan_memory(engine.limits, needs(engine.limits), max_kv_tokens=max_kv_tokens, kv_cache_fraction=fraction,
                       available=machine.available_bytes(engine, communicator), needs_at=needs)
    if communicator is None:
        return plan
    # Every rank must schedule alike, and each has its own memory: the least number holds for all.
    return replace(plan, num_blocks=min(map(int, communicator.gather(str(plan.num_blocks).encode()))))


def _activation_bytes(engine: Engine, machine: Machine, limits: Limits) -> int:
    rows = {"tokens": limits.max_num_tokens, "outputs": limits.max_batch_size * limits.max_beam_width}
    slots: int = sum(4 * rows[symbol] * columns for symbol, columns in engine.manifest["memory"]["slots"])
    return slots + machine.scratch_bytes(engine, rows)
