"""GPU kernels of the backward selective scan; ``triton.py`` has the equations and the launches.

The adjoint runs through the steps in reverse and needs the state before each of them. From every interval-th state,
kept by the forward pass, a program recomputes the states of one interval and notes every STEPS-th of them in a scratch
tile of its own; then it goes back over the interval, STEPS steps at a time, whose states it recomputes once more into
registers. What the gradients of B and C sum over channels, a block of channels sums here; blocks and rows are summed
afterwards, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vssm.kernels.selective_scan.triton_forward import VARY, advance, decay, place, step_size, weights
from vssm.kernels.triton_shared import (
    LOG2E,
    along_d,
    along_n,
    apart,
    entries,
    gates,
    lengthen,
    power,
    put,
    row,
    rows,
    sigmoid,
    silu_slope,
    state_index,
    sum_d,
    sum_n,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=VARY)
def chunk_adjoints(
    delta, A, C, z, bias, read, write, dy, chunked,
    delta_b, delta_k, delta_r, C_b, C_k, C_r, z_b, z_m, dy_b, dy_k, dy_m,
    A_k, A_d, A_n, bias_k, read_b, read_k, write_b, write_k,
    K, R, M, T, d, n, chunk, chunks,
    SOFTPLUS: tl.constexpr, WRITE_READ: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The adjoint each chunk hands on when none comes in and, behind it, its sum of delta; see ``pass_states``."""
    first, k, c, b = place(tl.program_id(0), d, K, chunks, BLOCK_D)
    channel, state = first + tl.arange(0, BLOCK_D), state_index(BLOCK_N)
    in_d, in_n = channel // VEC * VEC < d, state < n
    in_tile = along_n(in_n, BLOCK_N) & along_d(in_d, BLOCK_N)
    a = decay(A + k * A_k, A_d, A_n, channel, state, in_tile, BLOCK_N)
    shift = weights(bias, k * bias_k + channel, in_d)
    delta, C, dy = row(delta, delta_b, delta_k, b, k, VEC), row(C, C_b, C_k, b, k, 1), row(dy, dy_b, dy_k, b, k, VEC)
    z = z if z is None else row(z, z_b, 0, b, k, VEC)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    write = write if write is None else row(write, write_b, write_k, b, k, 1)

    start = c * chunk
    end = tl.minimum(start + chunk, T)
    t_last = start + ((end - start - 1) // STEPS) * STEPS
    q = entries(read, t_last, end, R, STEPS)
    o = q if WRITE_READ else entries(write, t_last, end, M, STEPS)
    raw_next = rows(delta, delta_r, q, channel, in_d, STEPS, VEC)
    dy_next = rows(dy, dy_m, o, channel, in_d, STEPS, VEC)
    if z is not None:
        z_next = rows(z, z_m, o, channel, in_d, STEPS, VEC)
    C_next = gates(C, C_r, read, q, t_last, end, R, state, in_n, STEPS, BLOCK_N)

    adjoint = tl.zeros_like(a)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(0, end - start, STEPS):
        t = t_last - i
        raw, dys, Cs = raw_next, dy_next, apart(C_next, STEPS, BLOCK_N)
        if z is not None:
            zs = z_next
        before = tl.maximum(t - STEPS, start)
        q = entries(read, before, end, R, STEPS)
        o = q if WRITE_READ else entries(write, before, end, M, STEPS)
        raw_next = rows(delta, delta_r, q, channel, in_d, STEPS, VEC)
        dy_next = rows(dy, dy_m, o, channel, in_d, STEPS, VEC)
        if z is not None:
            z_next = rows(z, z_m, o, channel, in_d, STEPS, VEC)
        C_next = gates(C, C_r, read, q, before, end, R, state, in_n, STEPS, BLOCK_N)
        for j in tl.static_range(STEPS - 1, -1, -1):
            step = step_size(raw[j], shift, t + j < end, SOFTPLUS, EXACT)
            g = dys[j].to(tl.float32)
            if z is not None:
                gate = zs[j].to(tl.float32)
                g *= gate * sigmoid(gate)
            adjoint += along_d(g, BLOCK_N) * along_n(Cs[j].to(tl.float32), BLOCK_N)
            adjoint *= power(along_d(step, BLOCK_N) * a, EXACT)
            total += step

    chunked += ((b.to(tl.int64) * chunks + c) * K + k) * (n + 2) * d
    tl.store(chunked + (along_n(state, BLOCK_N) * d + along_d(channel, BLOCK_N)), adjoint, mask=in_tile)
    tl.store(chunked + (n * d + channel), total, mask=in_d)


@triton.jit(do_not_specialize=VARY)
def gradients(
    u, delta, A, B, C, D, z, bias, table, read, write, dy, states,
    du, ddelta, dB, dC, dBC, dz, chunked, dinitial, scratch, relay, turn,
    u_b, u_k, u_l, delta_b, delta_k, delta_r, B_b, B_k, B_r, C_b, C_k, C_r, z_b, z_m, dy_b, dy_k, dy_m,
    A_k, A_d, A_n, D_k, bias_k, table_b, table_k, read_b, read_k, write_b, write_k,
    K, L, R, M, T, d, n, chunk, chunks, works, slots,
    CARRIED: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, READ_TABLE: tl.constexpr, WRITE_TABLE: tl.constexpr,
    DU_CELLS: tl.constexpr, DDELTA_CELLS: tl.constexpr, DZ_CELLS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All gradients of the recurrence for BLOCK_D channels of a chunk; a program takes one chunk after another.

    du, ddelta and dz are written by cell, (b, k, cells, d), or else by step, (b, k, T, d); the parts of dB and dC of
    each block by step, (b, k, T, blocks, 2, n). If CARRIED, ``chunked``, (b, chunks, k, n + 2, d), holds the adjoint
    that comes into each chunk from the next. dA, dD and the bias's gradient of the chunk take its place.
    """
    blocks = tl.cdiv(d, BLOCK_D)
    note = scratch + tl.program_id(0).to(tl.int64) * (EVERY // STEPS) * BLOCK_N * BLOCK_D
    note += along_n(state_index(BLOCK_N), BLOCK_N) * BLOCK_D + along_d(tl.arange(0, BLOCK_D), BLOCK_N)
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        first, k, c, b = place(work, d, K, chunks, BLOCK_D)
        bk = b.to(tl.int64) * K + k
        channel, state = first + tl.arange(0, BLOCK_D), state_index(BLOCK_N)
        in_d, in_n = channel // VEC * VEC < d, state < n
        in_tile = along_n(in_n, BLOCK_N) & along_d(in_d, BLOCK_N)
        a = decay(A + k * A_k, A_d, A_n, channel, state, in_tile, BLOCK_N)
        shift = weights(bias, k * bias_k + channel, in_d)
        skip = weights(D, k * D_k + channel, in_d)
        u_row, dy_row = row(u, u_b, u_k, b, k, VEC), row(dy, dy_b, dy_k, b, k, VEC)
        z_row = z if z is None else row(z, z_b, 0, b, k, VEC)
        delta_row = row(delta, delta_b, delta_k, b, k, VEC)
        B_row, C_row = row(B, B_b, B_k, b, k, 1), row(C, C_b, C_k, b, k, 1)
        p_row = table if table is None else row(table, table_b, table_k, b, k, 1)
        q_row = read if read is None else row(read, read_b, read_k, b, k, 1)
        o_row = write if write is None else row(write, write_b, write_k, b, k, 1)
        parameters = p_row if READ_TABLE else q_row
        du_row = du + tl.multiple_of(bk * (L if DU_CELLS else T) * d, VEC)
        ddelta_row = ddelta + tl.multiple_of(bk * (R if DDELTA_CELLS else T) * d, VEC)
        dz_row = dz if z is None else dz + tl.multiple_of(bk * (M if DZ_CELLS else T) * d, VEC)

        adjoint = tl.zeros_like(a)
        rows_of_chunk = chunked + ((b.to(tl.int64) * chunks + c) * K + k) * (n + 2) * d
        to_tile = rows_of_chunk + (along_n(state, BLOCK_N) * d + along_d(channel, BLOCK_N))
        if CARRIED:
            adjoint = tl.load(to_tile, mask=in_tile, other=0.0)
        dA = tl.zeros_like(a)
        dD = tl.zeros((BLOCK_D,), tl.float32)
        dbias = tl.zeros((BLOCK_D,), tl.float32)

        chunk_end = tl.minimum(c * chunk + chunk, T)
        for i in range(tl.cdiv(chunk_end - c * chunk, EVERY)):
            s = (chunk_end - 1) // EVERY - i
            start = s * EVERY
            end = tl.minimum(start + EVERY, chunk_end)
            SHORT: tl.constexpr = 1 if states.dtype.element_ty == tl.int16 else 0
            kept = (bk * tl.cdiv(T, EVERY) + s) * (n + SHORT)
            at = (kept + along_n(state, BLOCK_N)) * d + along_d(channel, BLOCK_N)
            h = tl.load(states + at, mask=in_tile, other=0)
            if SHORT:
                h = lengthen(h, tl.load(states + ((kept + n) * d + channel), mask=in_d, other=0))
            h = h.to(tl.float32)

            p = entries(p_row, start, end, L, STEPS)  # forward: note every STEPS-th state
            q = p if READ_TABLE else entries(q_row, start, end, R, STEPS)
            x_next = rows(u_row, u_l, p, channel, in_d, STEPS, VEC)
            raw_next = rows(delta_row, delta_r, q, channel, in_d, STEPS, VEC)
            B_next = gates(B_row, B_r, parameters, q, start, end, R, state, in_n, STEPS, BLOCK_N)
            for t in range(start, end, STEPS):
                x, raw, Bs = x_next, raw_next, apart(B_next, STEPS, BLOCK_N)
                p = entries(p_row, t + STEPS, end, L, STEPS)
                q = p if READ_TABLE else entries(q_row, t + STEPS, end, R, STEPS)
                x_next = rows(u_row, u_l, p, channel, in_d, STEPS, VEC)
                raw_next = rows(delta_row, delta_r, q, channel, in_d, STEPS, VEC)
                B_next = gates(B_row, B_r, parameters, q, t + STEPS, end, R, state, in_n, STEPS, BLOCK_N)
                tl.store(note + (t - start) // STEPS * (BLOCK_N * BLOCK_D), h)
                for j in tl.static_range(STEPS):
                    step = step_size(raw[j], shift, t + j < end, SOFTPLUS, EXACT)
                    h = advance(h, a, step, x[j], Bs[j], BLOCK_N, EXACT)
            tl.debug_barrier()

            t_last = start + (end - start - 1) // STEPS * STEPS
            p_next = entries(p_row, t_last, end, L, STEPS)  # backward
            q_next = p_next if READ_TABLE else entries(q_row, t_last, end, R, STEPS)
            o_next = p_next if WRITE_TABLE else entries(o_row, t_last, end, M, STEPS)
            x_next = rows(u_row, u_l, p_next, channel, in_d, STEPS, VEC)
            raw_next = rows(delta_row, delta_r, q_next, channel, in_d, STEPS, VEC)
            dy_next = rows(dy_row, dy_m, o_next, channel, in_d, STEPS, VEC)
            if z is not None:
                z_next = rows(z_row, z_m, o_next, channel, in_d, STEPS, VEC)
            B_next = gates(B_row, B_r, parameters, q_next, t_last, end, R, state, in_n, STEPS, BLOCK_N)
            C_next = gates(C_row, C_r, parameters, q_next, t_last, end, R, state, in_n, STEPS, BLOCK_N)
            for back in range(0, end - start, STEPS):
                t = t_last - back
                p, q, o, x, raw, dys = p_next, q_next, o_next, x_next, raw_next, dy_next
                if z is not None:
                    zs = z_next
                Bs, Cs = apart(B_next, STEPS, BLOCK_N), apart(C_next, STEPS, BLOCK_N)
                before = tl.maximum(t - STEPS, start)
                p_next = entries(p_row, before, end, L, STEPS)
                q_next = p_next if READ_TABLE else entries(q_row, before, end, R, STEPS)
                o_next = p_next if WRITE_TABLE else entries(o_row, before, end, M, STEPS)
                x_next = rows(u_row, u_l, p_next, channel, in_d, STEPS, VEC)
                raw_next = rows(delta_row, delta_r, q_next, channel, in_d, STEPS, VEC)
                dy_next = rows(dy_row, dy_m, o_next, channel, in_d, STEPS, VEC)
                if z is not None:
                    z_next = rows(z_row, z_m, o_next, channel, in_d, STEPS, VEC)
                B_next = gates(B_row, B_r, parameters, q_next, before, end, R, state, in_n, STEPS, BLOCK_N)
                C_next = gates(C_row, C_r, parameters, q_next, before, end, R, state, in_n, STEPS, BLOCK_N)

                # The states before each step and behind the last.
                hs = (tl.load(note + (t - start) // STEPS * (BLOCK_N * BLOCK_D)),)
                for j in tl.static_range(STEPS):
                    step = step_size(raw[j], shift, t + j < end, SOFTPLUS, EXACT)
                    hs = hs + (advance(hs[j], a, step, x[j], Bs[j], BLOCK_N, EXACT),)
                for j in tl.static_range(STEPS - 1, -1, -1):
                    inside = t + j < end
                    xj, gj = x[j].to(tl.float32), dys[j].to(tl.float32)
                    Bj, Cj = Bs[j].to(tl.float32), Cs[j].to(tl.float32)
                    if z is not None:
                        gate = zs[j].to(tl.float32)
                        y = sum_n(hs[j + 1] * along_n(Cj, BLOCK_N), BLOCK_N) + skip * xj
                        to_z = o[j] if DZ_CELLS else tl.where(inside, t + j, -1)
                        put(dz_row, to_z, d, channel, gj * y * silu_slope(gate), in_d, VEC)
                        gj *= gate * sigmoid(gate)
                    step = step_size(raw[j], shift, inside, SOFTPLUS, EXACT)
                    adjoint += along_d(gj, BLOCK_N) * along_n(Cj, BLOCK_N)
                    part = dBC + ((bk * T + t + j) * blocks + first // BLOCK_D) * 2 * n
                    tl.store(part + state, sum_d(adjoint * along_d(step * xj, BLOCK_N), BLOCK_N), mask=in_n & inside)
                    tl.store(part + n + state, sum_d(hs[j + 1] * along_d(gj, BLOCK_N), BLOCK_N), mask=in_n & inside)
                    dinput = sum_n(adjoint * along_n(Bj, BLOCK_N), BLOCK_N)  # of delta u
                    adjoint *= power(along_d(step, BLOCK_N) * a, EXACT)
                    ddecay = adjoint * hs[j]  # of delta A
                    dA += ddecay * along_d(step, BLOCK_N)
                    dstep = xj * dinput + sum_n(ddecay * a, BLOCK_N) * LN2
                    if SOFTPLUS:
                        x_raw = raw[j].to(tl.float32) + shift
                        dstep *= tl.exp2((x_raw - step) * LOG2E)  # softplus'(x) = exp(x - softplus(x))
                    dstep = tl.where(inside, dstep, 0.0)
                    dbias += dstep
                    dD += gj * xj
                    dx = step * dinput + skip * gj
                    to_u = p[j] if DU_CELLS else tl.where(inside, t + j, -1)
                    to_delta = q[j] if DDELTA_CELLS else tl.where(inside, t + j, -1)
                    put(du_row, to_u, d, channel, dx, in_d, VEC)
                    put(ddelta_row, to_delta, d, channel, dstep, in_d, VEC)
            tl.debug_barrier()

        tl.store(to_tile, dA, mask=in_tile)
        tl.store(rows_of_chunk + (n * d + channel), dD, mask=in_d)
        tl.store(rows_of_chunk + ((n + 1) * d + channel), dbias, mask=in_d)
        if dinitial is not None:  # noqa: SIM102 - decided while compiling, the next one while running
            if c == 0:
                at = (bk * d + along_d(channel, BLOCK_N)) * n + along_n(state, BLOCK_N) * A_n
                tl.store(dinitial + at, adjoint, mask=in_tile)
