"""A reward for benchmarks."""

import zlib


def dense_reward(completions, prompts, **columns):
    """A number in [0, 1) that depends on the completion's text: different for nearly every completion."""
    return [zlib.crc32(c.encode()) / 2**32 for c in completions]
