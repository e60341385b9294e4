"""The limits of an engine that change neither code nor layout. They live in config.json beside the engine file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Counts are of tokens unless named otherwise. Derived by the builder as docs/build.md tells."""

    max_batch_size: int  # sequences in one step
    max_seq_len: int  # prompt plus new tokens of one sequence
    max_input_len: int  # the longest prompt that is really accepted
    max_num_tokens: int  # tokens of one step, all sequences together; longer prompts go in chunks
    max_beam_width: int = 1
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    logits_dtype: str = "float32"  # of logits given to users
