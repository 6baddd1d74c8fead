"""GPU kernels of the 2D scan; ``triton.py`` has the launches, ``torch.py`` the equations.

One program owns BLOCK_D channels of one sample and walks the grid cell by cell in reading order (from the last cell if
REVERSE), with the states of a cell as a tile (BLOCK_D, BLOCK_N). The state to the left is in registers. The row above
comes from a line of scratch memory, (w, BLOCK_N, BLOCK_D), that belongs to the program, so that programs never meet and
every sum has one order. What the next AHEAD cells need is loaded before it is used.

The adjoint walks the same way from the last cell to the first.

A step is short, so nothing may wait: every tensor has the tile's layout, channels as (BLOCK_D, 1), states as whole
tiles, and threads exchange values only where they sum. Addresses are multiplied by ``one``, which the compiler takes
for any number: otherwise it chooses wider loads in another layout, and moves every step's tile through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vssm.kernels.triton_shared import LOG2E, sigmoid, softplus

LN2 = tl.constexpr(0.6931471805599453)

# Sizes and strides that differ from call to call: no kernel is compiled again because 16 divides a length.
VARY = (
    "u_b", "u_l", "top_b", "top_l", "left_b", "left_l", "Bt_b", "Bt_l", "Bl_b", "Bl_l", "C_b", "C_l", "g_b", "g_l",
    "h", "w", "d", "n", "band", "one",
)  # fmt: skip


@triton.jit
def first(x, stride, cells, REVERSE: tl.constexpr):
    """Where the cell lies that the walk begins with, and the way from one cell to the next."""
    if REVERSE:
        x += tl.cast(cells - 1, tl.int64) * stride
        stride = -stride
    return x, stride


@triton.jit
def cell(x, stride, t, index, inside, cells):
    """Entries ``index`` of the walk's cell t, 0 where they are not ``inside``; beyond the grid those of its ends."""
    t = tl.minimum(tl.maximum(t, 0), cells - 1)
    return tl.load(x + tl.cast(t, tl.int64) * stride + index, mask=inside, other=0.0)


@triton.jit
def ring(x, stride, t, step, index, inside, cells, AHEAD: tl.constexpr):
    """The cells t, t + step, …, AHEAD of them."""
    loaded = ()
    for i in tl.static_range(AHEAD):
        loaded = loaded + (cell(x, stride, t + i * step, index, inside, cells),)
    return loaded


@triton.jit
def turned(loaded, new):
    """The ring without its first entry, and with a new last one."""
    return loaded[1:] + (new,)


@triton.jit
def step_size(raw, SOFTPLUS: tl.constexpr):
    raw = raw.to(tl.float32)
    if SOFTPLUS:
        raw = softplus(raw, True)
    return raw


@triton.jit
def weights(i, j):
    """What the sources above and to the left count: all where there is one, nothing where it is missing, else half."""
    inner = tl.where(j > 0, 0.5, 1.0)
    return tl.where(i > 0, inner, 0.0), tl.where(i > 0, tl.where(j > 0, 0.5, 0.0), 1.0)


@triton.jit
def rates(A, channel, state, inside, n):
    """A (d, n) as a tile, for exponents of two; 0 beyond its edges."""
    return tl.load(A + (channel * n + state), mask=inside, other=0.0) * LOG2E


@triton.jit
def places(block, d, n, one, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels (BLOCK_D, 1) and states (BLOCK_D, BLOCK_N) of a program, which of them exist, places in a line."""
    of_block, state = tl.arange(0, BLOCK_D)[:, None] * one, tl.arange(0, BLOCK_N)[None, :] * one
    channel = block.to(tl.int32) * BLOCK_D + of_block
    return channel, state + of_block * 0, channel < d, state + of_block * 0 < n, state * BLOCK_D + of_block


@triton.jit
def line_at(lines, row, j, w, tile, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the states of column j are in line ``row``."""
    return lines + (tl.cast(row, tl.int64) * w + j) * (BLOCK_N * BLOCK_D) + tile


@triton.jit
def states_at(lines, row, j, here, w, tile, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The states of column j in line ``row``; 0 if not ``here``."""
    return tl.load(line_at(lines, row, j, w, tile, BLOCK_N, BLOCK_D), mask=here, other=0.0).to(tl.float32)


@triton.jit
def advance(left, top, step_top, step_left, x, B_top, B_left, a_top, a_left, i, j):
    """The states of a cell from those to the left and above."""
    c_top, c_left = weights(i, j)
    x = x.to(tl.float32)
    y = c_left * (tl.exp2(step_left * a_left) * left + B_left.to(tl.float32) * (step_left * x))
    return y + c_top * (tl.exp2(step_top * a_top) * top + B_top.to(tl.float32) * (step_top * x))


@triton.jit
def line_of(i, band, BANDS: tl.constexpr):
    """The line that keeps row i: one for all; or, in the adjoint, those of a band and then the last row of each."""
    if BANDS:
        return tl.where((i + 1) % band == 0, band - 1 + i // band, i % band)
    else:
        return i * 0


@triton.jit
def walk(
    begin, end, lines, band,
    u, delta_top, delta_left, B_top, B_left, C, D, y, a_top, a_left, u_l, top_l, left_l, Bt_l, Bl_l, C_l, y_l,
    channel, state, in_d, in_n, tile, h, w,
    SOFTPLUS: tl.constexpr, BANDS: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Run the recurrence through rows ``begin`` to ``end`` and keep them in their lines; write y, unless it is None."""
    t, cells = begin * w, h * w
    xs = ring(u, u_l, t, 1, channel, in_d, cells, AHEAD)
    tops = ring(delta_top, top_l, t, 1, channel, in_d, cells, AHEAD)
    lefts = ring(delta_left, left_l, t, 1, channel, in_d, cells, AHEAD)
    Bts, Bls = ring(B_top, Bt_l, t, 1, state, in_n, cells, AHEAD), ring(B_left, Bl_l, t, 1, state, in_n, cells, AHEAD)
    if y is not None:
        Cs = ring(C, C_l, t, 1, state, in_n, cells, AHEAD)
        if D is not None:
            skip = tl.load(D + channel, mask=in_d, other=0.0)
    for i in range(begin, end):
        above, out = line_of(tl.maximum(i - 1, 0), band, BANDS), line_of(i, band, BANDS)
        left = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        top = states_at(lines, above, 0, i > 0, w, tile, BLOCK_N, BLOCK_D)
        top_next = states_at(lines, above, 1, (i > 0) & (w > 1), w, tile, BLOCK_N, BLOCK_D)
        for j in range(w):
            x, step_top, step_left = xs[0], step_size(tops[0], SOFTPLUS), step_size(lefts[0], SOFTPLUS)
            left = advance(left, top, step_top, step_left, x, Bts[0], Bls[0], a_top, a_left, i, j)
            top, top_next = top_next, states_at(lines, above, j + 2, (i > 0) & (j + 2 < w), w, tile, BLOCK_N, BLOCK_D)
            if y is not None:
                total = tl.sum(left * Cs[0].to(tl.float32), 1)[:, None]
                if D is not None:
                    total += skip * x.to(tl.float32)
                tl.store(y + tl.cast(t, tl.int64) * y_l + channel, total, mask=in_d)
                Cs = turned(Cs, cell(C, C_l, t + AHEAD, state, in_n, cells))
            xs = turned(xs, cell(u, u_l, t + AHEAD, channel, in_d, cells))
            tops = turned(tops, cell(delta_top, top_l, t + AHEAD, channel, in_d, cells))
            lefts = turned(lefts, cell(delta_left, left_l, t + AHEAD, channel, in_d, cells))
            Bts = turned(Bts, cell(B_top, Bt_l, t + AHEAD, state, in_n, cells))
            Bls = turned(Bls, cell(B_left, Bl_l, t + AHEAD, state, in_n, cells))
            tl.store(line_at(lines, out, j, w, tile, BLOCK_N, BLOCK_D), left)
            t += 1
        tl.debug_barrier()  # other threads may read what this one wrote


@triton.jit(do_not_specialize=VARY)
def outputs(
    u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, y, lines,
    u_b, u_l, top_b, top_l, left_b, left_l, Bt_b, Bt_l, Bl_b, Bl_l, C_b, C_l, h, w, d, n, one,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (b, h·w, d), contiguous."""
    program, blocks, cells = tl.program_id(0).to(tl.int64), tl.cdiv(d, BLOCK_D), h * w
    b, block = program // blocks, program % blocks
    channel, state, in_d, in_n, tile = places(block, d, n, one, BLOCK_N, BLOCK_D)
    u, u_l = first(u + b * u_b, u_l, cells, REVERSE)
    delta_top, top_l = first(delta_top + b * top_b, top_l, cells, REVERSE)
    delta_left, left_l = first(delta_left + b * left_b, left_l, cells, REVERSE)
    B_top, Bt_l = first(B_top + b * Bt_b, Bt_l, cells, REVERSE)
    B_left, Bl_l = first(B_left + b * Bl_b, Bl_l, cells, REVERSE)
    C, C_l = first(C + b * C_b, C_l, cells, REVERSE)
    y, y_l = first(y + b * cells * d, d, cells, REVERSE)
    a_top, a_left = rates(A_top, channel, state, in_d & in_n, n), rates(A_left, channel, state, in_d & in_n, n)
    walk(
        0, h, lines + program * w * (BLOCK_N * BLOCK_D), h,
        u, delta_top, delta_left, B_top, B_left, C, D, y, a_top, a_left, u_l, top_l, left_l, Bt_l, Bl_l, C_l, y_l,
        channel, state, in_d, in_n, tile, h, w, SOFTPLUS, False, AHEAD, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@triton.jit
def add(x1, y1, z1, x2, y2, z2):
    """Three sums at once, which share their barriers."""
    return x1 + x2, y1 + y2, z1 + z2


@triton.jit(do_not_specialize=VARY)
def gradients(
    u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, dy, lines, messages,
    du, ddelta_top, ddelta_left, dA_top, dA_left, dB_top, dB_left, dC, dD,
    u_b, u_l, top_b, top_l, left_b, left_l, Bt_b, Bt_l, Bl_b, Bl_l, C_b, C_l, g_b, g_l, h, w, d, n, band, one,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """du, ddelta (b, h·w, d); dA (b, d, n), dD (b, d) by sample; dB, dC (b, blocks, h·w, n) by block of channels.

    ``lines`` holds for each program the rows of a band but its last, and the last row of every band; ``messages`` a row
    of what the adjoint sends to the row above.
    """
    program, blocks, cells = tl.program_id(0).to(tl.int64), tl.cdiv(d, BLOCK_D), h * w
    b, block = program // blocks, program % blocks
    channel, state, in_d, in_n, tile = places(block, d, n, one, BLOCK_N, BLOCK_D)
    u, u_l = first(u + b * u_b, u_l, cells, REVERSE)
    delta_top, top_l = first(delta_top + b * top_b, top_l, cells, REVERSE)
    delta_left, left_l = first(delta_left + b * left_b, left_l, cells, REVERSE)
    B_top, Bt_l = first(B_top + b * Bt_b, Bt_l, cells, REVERSE)
    B_left, Bl_l = first(B_left + b * Bl_b, Bl_l, cells, REVERSE)
    C, C_l = first(C + b * C_b, C_l, cells, REVERSE)
    dy, g_l = first(dy + b * g_b, g_l, cells, REVERSE)
    du, d_l = first(du + b * cells * d, d, cells, REVERSE)
    ddelta_top, _ = first(ddelta_top + b * cells * d, d, cells, REVERSE)
    ddelta_left, _ = first(ddelta_left + b * cells * d, d, cells, REVERSE)
    dB_top, n_l = first(dB_top + program * cells * n, n, cells, REVERSE)
    dB_left, _ = first(dB_left + program * cells * n, n, cells, REVERSE)
    dC, _ = first(dC + program * cells * n, n, cells, REVERSE)
    a_top, a_left = rates(A_top, channel, state, in_d & in_n, n), rates(A_left, channel, state, in_d & in_n, n)
    bands = tl.cdiv(h, band)
    lines += program * (band - 1 + bands) * w * (BLOCK_N * BLOCK_D)
    messages += program * w * (BLOCK_N * BLOCK_D)
    walk(  # once through all but the last band, for the last row of each
        0, (bands - 1) * band, lines, band,
        u, delta_top, delta_left, B_top, B_left, C, None, None, a_top, a_left,
        u_l, top_l, left_l, Bt_l, Bl_l, C_l, 0,
        channel, state, in_d, in_n, tile, h, w, SOFTPLUS, True, AHEAD, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    once = in_n & (channel == block.to(tl.int32) * BLOCK_D)  # sums over channels are written by one thread
    nothing = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_top, sum_left = tl.zeros((BLOCK_D, BLOCK_N), tl.float32), tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_D = tl.zeros((BLOCK_D, 1), tl.float32)
    if D is not None:
        skip = tl.load(D + channel, mask=in_d, other=0.0)
    for part in range(bands):
        start = (bands - 1 - part) * band
        end = tl.minimum(start + band, h)
        walk(
            start, end, lines, band,
            u, delta_top, delta_left, B_top, B_left, C, None, None, a_top, a_left,
            u_l, top_l, left_l, Bt_l, Bl_l, C_l, 0,
            channel, state, in_d, in_n, tile, h, w, SOFTPLUS, True, AHEAD, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        t = end * w - 1
        xs, gs = ring(u, u_l, t, -1, channel, in_d, cells, AHEAD), ring(dy, g_l, t, -1, channel, in_d, cells, AHEAD)
        tops = ring(delta_top, top_l, t, -1, channel, in_d, cells, AHEAD)
        lefts = ring(delta_left, left_l, t, -1, channel, in_d, cells, AHEAD)
        Bts, Bls = (
            ring(B_top, Bt_l, t, -1, state, in_n, cells, AHEAD),
            ring(B_left, Bl_l, t, -1, state, in_n, cells, AHEAD),
        )
        Cs = ring(C, C_l, t, -1, state, in_n, cells, AHEAD)
        for up in range(end - start):
            i = end - 1 - up
            above, here = line_of(tl.maximum(i - 1, 0), band, True), line_of(i, band, True)
            carry = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)  # what the cell to the right sends
            states = states_at(lines, here, w - 1, True, w, tile, BLOCK_N, BLOCK_D)
            top = states_at(lines, above, w - 1, i > 0, w, tile, BLOCK_N, BLOCK_D)
            below = states_at(messages, 0, w - 1, i < h - 1, w, tile, BLOCK_N, BLOCK_D)
            for back in range(w):
                j = w - 1 - back
                left = states_at(lines, here, j - 1, j > 0, w, tile, BLOCK_N, BLOCK_D)
                top_next = states_at(lines, above, j - 1, (i > 0) & (j > 0), w, tile, BLOCK_N, BLOCK_D)
                below_next = states_at(messages, 0, j - 1, (i < h - 1) & (j > 0), w, tile, BLOCK_N, BLOCK_D)
                step_top, step_left = step_size(tops[0], SOFTPLUS), step_size(lefts[0], SOFTPLUS)
                x, g = xs[0].to(tl.float32), gs[0].to(tl.float32)
                c_top, c_left = weights(i, j)

                # the gradient of the states, and what it sends up and to the left
                lam = Cs[0].to(tl.float32) * g + below + carry
                carry = (c_left * tl.exp2(step_left * a_left)) * lam
                send = (c_top * tl.exp2(step_top * a_top)) * lam
                tl.store(line_at(messages, 0, j, w, tile, BLOCK_N, BLOCK_D), send)

                # delta and A, through the decays: the states before
                through_top, through_left = send * top, carry * left
                sum_top += through_top * step_top
                sum_left += through_left * step_left
                # delta and u, through what enters
                enter_top = lam * (c_top * Bts[0].to(tl.float32))
                enter_left = lam * (c_left * Bls[0].to(tl.float32))
                grad_top, grad_left, grad_u = tl.reduce((
                    through_top * (a_top * LN2) + enter_top * x,
                    through_left * (a_left * LN2) + enter_left * x,
                    enter_top * step_top + enter_left * step_left,
                ), 1, add, keep_dims=True)  # fmt: skip
                # B, and C, which meets the states themselves
                grad_Bt, grad_Bl, grad_C = tl.reduce((
                    lam * (step_top * x), lam * (step_left * x), states * g
                ), 0, add, keep_dims=True)  # fmt: skip
                at_n = tl.cast(t, tl.int64) * n_l + state
                tl.store(dB_top + at_n, grad_Bt * c_top + nothing, mask=once)
                tl.store(dB_left + at_n, grad_Bl * c_left + nothing, mask=once)
                tl.store(dC + at_n, grad_C + nothing, mask=once)
                if SOFTPLUS:
                    grad_top *= sigmoid(tops[0].to(tl.float32))
                    grad_left *= sigmoid(lefts[0].to(tl.float32))
                if D is not None:
                    grad_u += skip * g
                    sum_D += g * x
                at_d = tl.cast(t, tl.int64) * d_l + channel
                tl.store(ddelta_top + at_d, grad_top, mask=in_d)
                tl.store(ddelta_left + at_d, grad_left, mask=in_d)
                tl.store(du + at_d, grad_u, mask=in_d)

                states, top, below = left, top_next, below_next
                xs, gs = (
                    turned(xs, cell(u, u_l, t - AHEAD, channel, in_d, cells)),
                    turned(gs, cell(dy, g_l, t - AHEAD, channel, in_d, cells)),
                )
                tops = turned(tops, cell(delta_top, top_l, t - AHEAD, channel, in_d, cells))
                lefts = turned(lefts, cell(delta_left, left_l, t - AHEAD, channel, in_d, cells))
                Bts = turned(Bts, cell(B_top, Bt_l, t - AHEAD, state, in_n, cells))
                Bls = turned(Bls, cell(B_left, Bl_l, t - AHEAD, state, in_n, cells))
                Cs = turned(Cs, cell(C, C_l, t - AHEAD, state, in_n, cells))
                t -= 1
            tl.debug_barrier()
    entry = (b * d + channel) * n + state
    tl.store(dA_top + entry, sum_top, mask=in_d & in_n)
    tl.store(dA_left + entry, sum_left, mask=in_d & in_n)
    if D is not None:
        tl.store(dD + b * d + channel, sum_D, mask=in_d)
