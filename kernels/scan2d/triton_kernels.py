"""GPU kernels of the 2D scan; ``triton.py`` has the launches, ``torch.py`` the equations.

One program owns BLOCK_D channels of one sample and walks the grid row by row, CELLS cells at a time, as a tile
(CELLS, BLOCK_N, BLOCK_D). Given the row above, a row is a recurrence along its cells alone: inside the tile a scan,
from tile to tile a carried state. Rows of states go through lines of scratch memory, (w, BLOCK_N, BLOCK_D), that belong
to the program, so that programs never meet and every sum has one order.

The adjoint runs the same way from the last cell to the first; a tile then holds its cells from right to left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vssm.kernels.triton_shared import LOG2E, sigmoid, softplus

# Sizes and strides that differ from call to call: no kernel is compiled again because 16 divides a length.
VARY = (
    "u_b", "u_l", "top_b", "top_l", "left_b", "left_l", "Bt_b", "Bt_l", "Bl_b", "Bl_l", "C_b", "C_l", "g_b", "g_l",
    "h", "w", "d", "n", "band",
)  # fmt: skip


@triton.jit
def after(a1, h1, a2, h2):
    """Two steps of h -> a h + b as one; the second pair is the later step."""
    return a1 * a2, a2 * h1 + h2


@triton.jit
def back(a1, p1, g1, a2, p2, g2):
    """Two stretches of g[t] = q[t] + a[t-1] g[t-1] as one: a of the last step, the product of those before it, g."""
    return a2, p1 * a1 * p2, g2 + p2 * a1 * g1


@triton.jit
def add(x1, y1, z1, x2, y2, z2):
    """Three sums at once, which share their barriers."""
    return x1 + x2, y1 + y2, z1 + z2


@triton.jit
def place(i, column, h, w, REVERSE: tl.constexpr):
    """Cell numbers in memory of row i at ``column``."""
    cell = i * w + column
    if REVERSE:
        cell = h * w - 1 - cell
    return cell.to(tl.int64)


@triton.jit
def take(x, stride, cell, channel, mask):
    """Cells of a map as a tile (cells, channels), float32; 0 outside ``mask``."""
    return tl.load(x + (cell[:, None] * stride + channel[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_size(raw, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        raw = softplus(raw, True)
    return raw


@triton.jit
def weights(i, column):
    """What the sources above and to the left count: all where there is one, nothing where it is missing, else half."""
    inner = tl.where(column > 0, 0.5, 1.0)
    return tl.where(i > 0, inner, 0.0), tl.where(i > 0, tl.where(column > 0, 0.5, 0.0), 1.0)


@triton.jit
def rates(A, channel, state, d, n):
    """A (d, n) as a tile (BLOCK_N, BLOCK_D); 0 beyond its edges."""
    inside = (state[:, None] < n) & (channel[None, :] < d)
    return tl.load(A + (channel[None, :] * n + state[:, None]), mask=inside, other=0.0)


@triton.jit
def decay(step, A):
    """exp(delta A), (CELLS, BLOCK_N, BLOCK_D)."""
    return tl.exp2((step * LOG2E)[:, None, :] * A[None, :, :])


@triton.jit
def at(line, column, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the states of the cells at ``column`` are in a line."""
    state, channel = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    tile = (state * BLOCK_D)[None, :, None] + channel[None, None, :]
    return line + (column[:, None, None] * (BLOCK_N * BLOCK_D) + tile)


@triton.jit
def sources(x, step_top, step_left, B_top, B_left, c_top, c_left):
    """What enters the states of a tile."""
    top = (c_top[:, None] * B_top)[:, :, None] * (step_top * x)[:, None, :]
    return top + (c_left[:, None] * B_left)[:, :, None] * (step_left * x)[:, None, :]


@triton.jit
def line_above(lines, i, band, line):
    """The line with the states of row i - 1 (any, where i is 0): first the lines of a band, then last rows of bands."""
    return lines + tl.where(i % band == 0, band + tl.maximum(i // band - 1, 0), i % band - 1) * line


@triton.jit
def tile_states(
    i, first, above, carry,
    u, delta_top, delta_left, A_top, A_left, B_top, B_left, u_l, top_l, left_l, Bt_l, Bl_l, channel, state, h, w, d, n,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CELLS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """States of CELLS cells of row i from column ``first`` on, from the line above and the state before them."""
    position = tl.arange(0, CELLS)
    column = first + position
    inside = column < w
    cell = place(i, column, h, w, REVERSE)
    in_d, in_n = inside[:, None] & (channel < d)[None, :], inside[:, None] & (state < n)[None, :]
    x = take(u, u_l, cell, channel, in_d)
    step_top = step_size(take(delta_top, top_l, cell, channel, in_d), SOFTPLUS)
    step_left = step_size(take(delta_left, left_l, cell, channel, in_d), SOFTPLUS)
    c_top, c_left = weights(i, column)
    top = tl.load(at(above, column, BLOCK_N, BLOCK_D), mask=inside[:, None, None] & (i > 0), other=0.0)
    gate_top, gate_left = take(B_top, Bt_l, cell, state, in_n), take(B_left, Bl_l, cell, state, in_n)
    entering = sources(x, step_top, step_left, gate_top, gate_left, c_top, c_left)
    entering += c_top[:, None, None] * decay(step_top, A_top) * top
    keep = c_left[:, None, None] * decay(step_left, A_left)
    entering += tl.where(position[:, None, None] == 0, keep * carry[None, :, :], 0.0)
    _, states = tl.associative_scan((keep, entering), 0, after)
    carry = tl.sum(tl.where(position[:, None, None] == CELLS - 1, states, 0.0), 0)
    return states, carry, x, cell, column, in_d, in_n


@triton.jit
def row_states(
    i, above, out,
    u, delta_top, delta_left, A_top, A_left, B_top, B_left, u_l, top_l, left_l, Bt_l, Bl_l, channel, state, h, w, d, n,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CELLS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the states of row i to the line ``out``."""
    carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, w, CELLS):
        states, carry, _, _, column, _, _ = tile_states(
            i, first, above, carry, u, delta_top, delta_left, A_top, A_left, B_top, B_left,
            u_l, top_l, left_l, Bt_l, Bl_l, channel, state, h, w, d, n, SOFTPLUS, REVERSE, CELLS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        tl.store(at(out, column, BLOCK_N, BLOCK_D), states, mask=(column < w)[:, None, None])
    tl.debug_barrier()  # other threads may read what this one wrote


@triton.jit(do_not_specialize=VARY)
def outputs(
    u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, y, lines,
    u_b, u_l, top_b, top_l, left_b, left_l, Bt_b, Bt_l, Bl_b, Bl_l, C_b, C_l, h, w, d, n,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CELLS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (b, h·w, d), contiguous."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(d, BLOCK_D)
    b, block = program // blocks, program % blocks
    channel, state = block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    u, delta_top, delta_left = u + b * u_b, delta_top + b * top_b, delta_left + b * left_b
    B_top, B_left, C, y = B_top + b * Bt_b, B_left + b * Bl_b, C + b * C_b, y + b * h * w * d
    line = lines + program * w * (BLOCK_N * BLOCK_D)
    a_top, a_left = rates(A_top, channel, state, d, n), rates(A_left, channel, state, d, n)
    for i in range(h):
        carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for first in range(0, w, CELLS):
            states, carry, x, cell, column, in_d, in_n = tile_states(
                i, first, line, carry, u, delta_top, delta_left, a_top, a_left, B_top, B_left,
                u_l, top_l, left_l, Bt_l, Bl_l, channel, state, h, w, d, n, SOFTPLUS, REVERSE, CELLS, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            out = tl.sum(states * take(C, C_l, cell, state, in_n)[:, :, None], 1)
            if D is not None:
                out += tl.load(D + channel, mask=channel < d, other=0.0)[None, :] * x
            tl.store(y + (cell[:, None] * d + channel[None, :]), out, mask=in_d)
            tl.debug_barrier()  # every thread has read the row above before it is overwritten
            tl.store(at(line, column, BLOCK_N, BLOCK_D), states, mask=(column < w)[:, None, None])
        tl.debug_barrier()


@triton.jit(do_not_specialize=VARY)
def gradients(
    u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, dy, lines,
    du, ddelta_top, ddelta_left, dA_top, dA_left, dB_top, dB_left, dC, dD,
    u_b, u_l, top_b, top_l, left_b, left_l, Bt_b, Bt_l, Bl_b, Bl_l, C_b, C_l, g_b, g_l, h, w, d, n, band,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CELLS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """du, ddelta (b, h·w, d); dA (b, d, n), dD (b, d) by sample; dB, dC (b, blocks, h·w, n) by block of channels.

    ``lines`` holds for each program ``band`` rows of states, the last row of every band but the last, and the messages
    that the adjoint sends to the row above.
    """
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(d, BLOCK_D)
    b, block = program // blocks, program % blocks
    channel, state = block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    u, delta_top, delta_left, dy = u + b * u_b, delta_top + b * top_b, delta_left + b * left_b, dy + b * g_b
    B_top, B_left, C = B_top + b * Bt_b, B_left + b * Bl_b, C + b * C_b
    du, ddelta_top, ddelta_left = du + b * h * w * d, ddelta_top + b * h * w * d, ddelta_left + b * h * w * d
    dB_top, dB_left, dC = dB_top + program * h * w * n, dB_left + program * h * w * n, dC + program * h * w * n
    bands = tl.cdiv(h, band)
    line = tl.cast(w, tl.int64) * (BLOCK_N * BLOCK_D)
    lines += program * (band + bands) * line
    down = lines + (band + bands - 1) * line
    a_top, a_left = rates(A_top, channel, state, d, n), rates(A_left, channel, state, d, n)
    for i in range((bands - 1) * band):  # the recurrence once, for the last row of every band
        last = (i + 1) % band == 0
        out = lines + tl.where(last, band + i // band, i % band) * line
        row_states(i, line_above(lines, i, band, line), out, u, delta_top, delta_left, a_top, a_left, B_top, B_left,
                   u_l, top_l, left_l, Bt_l, Bl_l, channel, state, h, w, d, n,
                   SOFTPLUS, REVERSE, CELLS, BLOCK_N, BLOCK_D)  # fmt: skip

    position = tl.arange(0, CELLS)
    sum_top, sum_left = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(bands):
        start = (bands - 1 - step) * band
        end = tl.minimum(start + band, h)
        for i in range(start, end):
            row_states(i, line_above(lines, i, band, line), lines + (i - start) * line,
                       u, delta_top, delta_left, a_top, a_left, B_top, B_left, u_l, top_l, left_l, Bt_l, Bl_l,
                       channel, state, h, w, d, n, SOFTPLUS, REVERSE, CELLS, BLOCK_N, BLOCK_D)  # fmt: skip
        for up in range(end - start):
            i = end - 1 - up
            above, here = line_above(lines, i, band, line), lines + (i - start) * line
            carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for tile in range(tl.cdiv(w, CELLS)):
                column = (tl.cdiv(w, CELLS) - tile) * CELLS - 1 - position
                inside = column < w
                cell = place(i, column, h, w, REVERSE)
                in_d, in_n = inside[:, None] & (channel < d)[None, :], inside[:, None] & (state < n)[None, :]
                raw_top = take(delta_top, top_l, cell, channel, in_d)
                raw_left = take(delta_left, left_l, cell, channel, in_d)
                step_top, step_left = step_size(raw_top, SOFTPLUS), step_size(raw_left, SOFTPLUS)
                c_top, c_left = weights(i, column)
                g = take(dy, g_l, cell, channel, in_d)

                # the gradient of the states
                lam = take(C, C_l, cell, state, in_n)[:, :, None] * g[:, None, :]
                lam += tl.load(at(down, column, BLOCK_N, BLOCK_D), mask=inside[:, None, None] & (i < h - 1), other=0.0)
                lam += tl.where(position[:, None, None] == 0, carry[None, :, :], 0.0)
                keep = c_left[:, None, None] * decay(step_left, a_left)
                _, _, lam = tl.associative_scan((keep, tl.zeros_like(keep) + 1.0, lam), 0, back)
                keep *= lam  # what the cell to the left gets
                carry = tl.sum(tl.where(position[:, None, None] == CELLS - 1, keep, 0.0), 0)
                pass_up = c_top[:, None, None] * decay(step_top, a_top) * lam
                tl.debug_barrier()  # every thread has read the messages from below before they are overwritten
                tl.store(at(down, column, BLOCK_N, BLOCK_D), pass_up, mask=inside[:, None, None])

                # delta and A, through the decays: the states before
                before = (inside & (column > 0))[:, None, None]
                keep *= tl.load(at(here, column - 1, BLOCK_N, BLOCK_D), mask=before, other=0.0)
                pass_up *= tl.load(at(above, column, BLOCK_N, BLOCK_D), mask=inside[:, None, None] & (i > 0), other=0.0)
                sum_top += tl.sum(pass_up * step_top[:, None, :], 0)
                sum_left += tl.sum(keep * step_left[:, None, :], 0)
                # delta and u, through what enters
                x = take(u, u_l, cell, channel, in_d)
                enter_top = lam * (take(B_top, Bt_l, cell, state, in_n) * c_top[:, None])[:, :, None]
                enter_left = lam * (take(B_left, Bl_l, cell, state, in_n) * c_left[:, None])[:, :, None]
                grad_top, grad_left, grad_u = tl.reduce((
                    pass_up * a_top[None, :, :] + enter_top * x[:, None, :],
                    keep * a_left[None, :, :] + enter_left * x[:, None, :],
                    enter_top * step_top[:, None, :] + enter_left * step_left[:, None, :],
                ), 1, add)  # fmt: skip
                # B, and C, which meets the states themselves
                states = tl.load(at(here, column, BLOCK_N, BLOCK_D), mask=inside[:, None, None], other=0.0)
                grad_Bt, grad_Bl, grad_C = tl.reduce((
                    lam * (step_top * x)[:, None, :], lam * (step_left * x)[:, None, :], states * g[:, None, :]
                ), 2, add)  # fmt: skip
                entry = cell[:, None] * n + state[None, :]
                tl.store(dB_top + entry, grad_Bt * c_top[:, None], mask=in_n)
                tl.store(dB_left + entry, grad_Bl * c_left[:, None], mask=in_n)
                tl.store(dC + entry, grad_C, mask=in_n)
                if SOFTPLUS:
                    grad_top *= sigmoid(raw_top)
                    grad_left *= sigmoid(raw_left)
                if D is not None:
                    grad_u += tl.load(D + channel, mask=channel < d, other=0.0)[None, :] * g
                    sum_D += tl.sum(g * x, 0)
                entry_d = cell[:, None] * d + channel[None, :]
                tl.store(ddelta_top + entry_d, grad_top, mask=in_d)
                tl.store(ddelta_left + entry_d, grad_left, mask=in_d)
                tl.store(du + entry_d, grad_u, mask=in_d)
            tl.debug_barrier()
    inside = (state[:, None] < n) & (channel[None, :] < d)
    entry = (b * d + channel[None, :]) * n + state[:, None]
    tl.store(dA_top + entry, sum_top, mask=inside)
    tl.store(dA_left + entry, sum_left, mask=inside)
    if D is not None:
        tl.store(dD + b * d + channel, sum_D, mask=channel < d)
