"""How the selective scan is laid on a GPU: tiles, chunks, and which states are kept for the backward pass."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from vssm.kernels.triton_launch import cdiv, power_of_2


class Plan(NamedTuple):
    """How rows are laid on the device: a program has block_n x block_d states and ``steps`` steps in flight."""

    block_n: int
    block_d: int
    parts: int  # chunks that a program takes side by side
    steps: int
    warps: int
    registers: int | None
    chunk: int
    chunks: int
    programs: int  # backward: programs that share the chunks


@lru_cache(maxsize=1024)
def plan(b: int, k: int, t: int, d: int, n: int, bfloat16: bool, gluon: bool, units: int, backward: bool) -> Plan:
    """Tiles by the number of states; chunks so that the programs fill the device. Measured on an H100.

    A thread holds 16 states where a channel has that many (more would leave too few registers for the steps in flight);
    a warp reads 128 channels where a channel has one state, which is bound by memory, in Gluon 64. In plain Triton 12
    warps a multiprocessor with 168 registers, or 16 with 128, are faster than fewer that keep everything in registers.
    """
    block_n, parts = power_of_2(n), 1
    block_d = 32 if block_n > 1 else 64 if gluon or 32 < d <= 64 else 32 if d <= 32 else 128
    warps = max(1, min(8, block_n // 16))
    every = interval(n, d, bfloat16)
    if gluon:
        steps, registers = (8, 144 if n == 1 else 168) if backward else (16, 128) if n == 16 else (8, None)
        resident, enough = (BACKWARD if backward else FORWARD)[n == 1]
    else:
        steps = 2 if backward else 4
        resident = enough = 16 if block_n == 1 else 12
        registers = None if block_n > 16 else 128 if block_n == 1 else 168
    rows = b * k * cdiv(d, block_d)
    whole = rows * warps >= units * enough
    if gluon and n == 1 and not whole and 0 < d % 64 <= 32:  # the last block would be half empty: half as many channels
        block_d, parts, rows = 32, 2, b * k * cdiv(d, 32)
    piece = every if backward else max(16, steps)
    least = 4 * (n + 2) if backward and gluon and n > 1 else piece  # chunks hand on n + 2 rows: a fourth of theirs
    pieces = 1 if whole else max(1, min(units * resident * parts // warps // rows, cdiv(t, least)))
    if gluon and n == 1 and k > 1 and not whole:
        pieces = max(pieces, min(TURNS * pieces, t // 64))
    chunk = cdiv(cdiv(t, cdiv(pieces, parts) * parts), piece) * piece
    chunks = cdiv(t, chunk)
    # The scratch of the backward stays below four times b k t d, and below what is resident on the device.
    room = 4 * b * k * t * d // (every // 2 * block_n * block_d)
    programs = max(1, min(rows * chunks, units * resident // warps, room))
    return Plan(block_n, block_d, parts, steps, warps, registers, chunk, chunks, programs)


# Gluon, with 16 states and with one: programs a multiprocessor that rows are cut for, and how many are enough not to
# cut them, since chunks cost a second pass.
FORWARD, BACKWARD = ((16, 5), (14, 5)), ((11, 5), (14, 5))
# With one state rows are cut further, into chunks of 64 steps or more, so that samples come one after another: what all
# rows of a sample read (u, dy) is then still in the second-level cache.
TURNS = 10
# Groups of steps whose sums of dB and dC may be on their way from block to block of channels, if a device holds all
# blocks of a chunk many times over: of 4 programs a multiprocessor at least, those of 16 launches wait for one another.
RING = 6


def interval(n: int, d: int, bfloat16: bool) -> int:
    """Steps between the states that the forward keeps; up to 32 states they take 2 bytes a step and channel at most."""
    if compact(n, d, bfloat16):
        return 8 if n == 1 else 48
    return max(16, min(64, 2 * power_of_2(n)))


def compact(n: int, d: int, bfloat16: bool) -> bool:
    """Whether states are kept as often as the kernels in Gluon want them; those kernels may still not fit."""
    return bfloat16 and n in (1, 16) and d % 8 == 0 and d <= 8192  # 256 blocks: relayed sums count no more


def saved(b: int, k: int, t: int, d: int, n: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the states that the backward starts its intervals from; ``dtype`` is that of u."""
    bfloat16 = dtype == torch.bfloat16
    every = interval(n, d, bfloat16)
    rows, kept = n, torch.float32
    if compact(n, d, bfloat16):
        rows, kept = (1, torch.bfloat16) if n == 1 else (n + 1, torch.int16)
    return (b, k, (t + every - 1) // every, rows, d), kept
