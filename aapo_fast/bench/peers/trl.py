"""TRL's chunked log-probabilities, the kernel under its GRPO and SFT losses (trl 1.16)."""

from __future__ import annotations

from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils

from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Outputs, Run, weighted_loss

VOCAB_CHUNK = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8192)
"""Width of a tile as TRL's own trainer calls it."""


def chunked_logprobs(problem: Problem) -> Run:
    """Log-probabilities alone: entropy and the other statistics, which cost time, are not asked for."""

    def run() -> Outputs:
        logps, *_ = ChunkedLogProbFunction.apply(
            problem.hidden, problem.weight, None, problem.targets, 1.0, VOCAB_CHUNK, problem.softcap, 1.0, ()
        )
        weighted_loss(problem, logps).backward()
        return Outputs(logps.detach())

    return run
