"""Backward selective scan with one state for NVIDIA GPUs, in Gluon: ``triton_backward``, faster.

Same arguments, same gradients; laid out as ``gluon_single_forward``. What the way back through the steps of a group
needs of the way there stays in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from vssm.kernels.gluon_shared import (
    LOG2E,
    ROWS,
    copy,
    entries,
    gates,
    place,
    put,
    row,
    row_layout,
    sigmoid,
    silu_slope,
    weights,
)
from vssm.kernels.selective_scan.gluon_single_forward import (
    GATE,
    LN2,
    STAGES,
    blank,
    in_pairs,
    per_step,
    span,
    step_size,
    tile,
    tile_layout,
    wide,
)
from vssm.kernels.selective_scan.triton_forward import VARY


@gluon.constexpr_function
def sums_layout(BLOCK_D):
    """(STEPS PARTS, BLOCK_D / 2): what threads leave for the sums over channels."""
    return gl.BlockedLayout([1, 8], [512 // BLOCK_D, BLOCK_D // 16], [1, 1], [1, 0])


@gluon.jit(do_not_specialize=VARY)
def chunk_adjoints(
    delta, A, C, z, bias, read, write, dy, chunked,
    delta_b, delta_k, delta_r, C_b, C_k, C_r, z_b, z_m, dy_b, dy_k, dy_m,
    A_k, A_d, A_n, bias_k, read_b, read_k, write_b, write_k,
    K, R, M, T, d, n, chunk, chunks,
    SOFTPLUS: gl.constexpr, WRITE_READ: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STEPS: gl.constexpr, VEC: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """The adjoint each chunk hands on when none comes in and, behind it, its sum of delta; see ``pass_states``."""
    PARTS: gl.constexpr = 64 // BLOCK_D
    TILE: gl.constexpr = tile_layout(BLOCK_D)
    ROW: gl.constexpr = row_layout(BLOCK_D)
    first, k, c, b = place(gl.program_id(0), d, K, (chunks + PARTS - 1) // PARTS, BLOCK_D)
    c *= PARTS
    channel, part = tile(first, c, PARTS, BLOCK_D)
    start, end = part * chunk, gl.minimum(part * chunk + chunk, T)
    in_d = channel // 8 * 8 < d  # 8 divides d: whole vectors
    a = gl.load(A + k * A_k + channel * A_d, mask=in_d, other=0.0)
    shift = weights(bias, k * bias_k + channel, in_d) * LOG2E
    delta, C, dy = row(delta, delta_b, delta_k, b, k, 8), row(C, C_b, C_k, b, k, 1), row(dy, dy_b, dy_k, b, k, 8)
    z = z if z is None else z + gl.multiple_of(b.to(gl.int64) * z_b, 8)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    write = write if write is None else row(write, write_b, write_k, b, k, 1)

    raws = gl.allocate_shared_memory(delta.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    dys = gl.allocate_shared_memory(dy.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    Cs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, 1], ROWS)
    raw_rows, dy_rows = in_pairs(raws, STAGES * STEPS, PARTS, BLOCK_D), in_pairs(dys, STAGES * STEPS, PARTS, BLOCK_D)
    C_rows = per_step(Cs, STEPS, PARTS, 1)
    if z is not None:
        zs = gl.allocate_shared_memory(z.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
        z_rows = in_pairs(zs, STAGES * STEPS, PARTS, BLOCK_D)
    step_r, end_r = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, ROW))
    step_g, end_g = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, GATE))
    column = first + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROW))
    state_g = gl.arange(0, 1, layout=gl.SliceLayout(0, GATE))
    shortest, longest = gl.minimum(chunk, T - (c + PARTS - 1) * chunk), gl.minimum(chunk, T - c * chunk)

    t_last = (longest - 1) // STEPS * STEPS
    for s in gl.static_range(STAGES):
        before = gl.maximum(t_last - s * STEPS, 0)
        q = entries(read, before + step_r, end_r, R)
        o = q if WRITE_READ else entries(write, before + step_r, end_r, M)
        if s < STAGES - 1:
            copy(raws.index(s), delta, delta_r, q, column, d)
            copy(dys.index(s), dy, dy_m, o, column, d)
            if z is not None:
                copy(zs.index(s), z, z_m, o, column, d)
            async_copy.commit_group()
    C_next = gates(C, C_r, entries(read, t_last + step_g, end_g, R), state_g, n)
    g = entries(read, gl.maximum(t_last - STEPS, 0) + step_g, end_g, R)

    adjoint = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    total = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    for i in range(0, longest, STEPS):
        t = t_last - i
        stage = i // STEPS % STAGES
        free = (stage + STAGES - 1) % STAGES
        ahead = gl.maximum(t - STAGES * STEPS, 0)  # the next group to be copied
        Cs.store(C_next.to(gl.float32))
        async_copy.wait_group(STAGES - 2)
        copy(raws.index(free), delta, delta_r, q, column, d)
        copy(dys.index(free), dy, dy_m, o, column, d)
        if z is not None:
            copy(zs.index(free), z, z_m, o, column, d)
        async_copy.commit_group()
        C_next = gates(C, C_r, g, state_g, n)
        q = entries(read, ahead + step_r, end_r, R)
        o = q if WRITE_READ else entries(write, ahead + step_r, end_r, M)
        g = entries(read, gl.maximum(t - 2 * STEPS, 0) + step_g, end_g, R)
        if SOFTPLUS:  # noqa: SIM102 - decided while compiling, the next one while running
            if t + STEPS > shortest:
                blank(raws.index(stage), t + step_r < end_r, ROW)
        for j in gl.static_range(STEPS - 1, -1, -1):
            raw = wide(raw_rows, stage * STEPS + j, PARTS, BLOCK_D)
            gj = wide(dy_rows, stage * STEPS + j, PARTS, BLOCK_D)
            if z is not None:
                gate = wide(z_rows, stage * STEPS + j, PARTS, BLOCK_D)
                gj *= gate * sigmoid(gate)
            step = step_size(raw, shift, start + t + j < end, SOFTPLUS)
            adjoint = (adjoint + gj * C_rows.index(j).load(TILE)) * gl.exp2(step * a)
            total += step

    to = chunked + ((b.to(gl.int64) * chunks + part) * K + k) * (n + 2) * d + channel
    gl.store(to, adjoint, mask=in_d & (part < chunks))
    gl.store(to + n * d, total * LN2, mask=in_d & (part < chunks))


@gluon.jit
def leave(to, x, PARTS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Leave the sum of each thread's two channels of the tile for the sum over channels."""
    to.store(gl.sum(gl.reshape(x, [PARTS, BLOCK_D // 2, 2]), 2))


@gluon.jit(do_not_specialize=VARY)
def gradients(
    u, delta, A, B, C, D, z, bias, table, read, write, dy, states,
    du, ddelta, dB, dC, dBC, dz, chunked, dinitial, scratch, relay, turn,
    u_b, u_k, u_l, delta_b, delta_k, delta_r, B_b, B_k, B_r, C_b, C_k, C_r, z_b, z_m, dy_b, dy_k, dy_m,
    A_k, A_d, A_n, D_k, bias_k, table_b, table_k, read_b, read_k, write_b, write_k,
    K, L, R, M, T, d, n, chunk, chunks, works, slots,
    CARRIED: gl.constexpr, EVERY: gl.constexpr,
    SOFTPLUS: gl.constexpr, READ_TABLE: gl.constexpr, WRITE_TABLE: gl.constexpr,
    DU_CELLS: gl.constexpr, DDELTA_CELLS: gl.constexpr, DZ_CELLS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STEPS: gl.constexpr, VEC: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """All gradients of the recurrence for BLOCK_D channels of PARTS chunks, as in ``triton_backward``, without scratch.

    Each group of STEPS steps runs forward from its kept state, then back.
    """
    PARTS: gl.constexpr = 64 // BLOCK_D
    TILE: gl.constexpr = tile_layout(BLOCK_D)
    ROW: gl.constexpr = row_layout(BLOCK_D)
    SUMS: gl.constexpr = sums_layout(BLOCK_D)
    work = gl.num_programs(0) - 1 - gl.program_id(0)  # last first: the second-level cache holds what was read last
    first, k, c, b = place(work, d, K, (chunks + PARTS - 1) // PARTS, BLOCK_D)
    c *= PARTS
    blocks = (d + BLOCK_D - 1) // BLOCK_D
    bk = b.to(gl.int64) * K + k
    channel, part = tile(first, c, PARTS, BLOCK_D)
    start, end = part * chunk, gl.minimum(part * chunk + chunk, T)
    in_d = channel // 8 * 8 < d  # 8 divides d: whole vectors
    a = gl.load(A + k * A_k + channel * A_d, mask=in_d, other=0.0)
    shift = weights(bias, k * bias_k + channel, in_d) * LOG2E
    skip = weights(D, k * D_k + channel, in_d)
    u, delta, dy = row(u, u_b, u_k, b, k, 8), row(delta, delta_b, delta_k, b, k, 8), row(dy, dy_b, dy_k, b, k, 8)
    z = z if z is None else z + gl.multiple_of(b.to(gl.int64) * z_b, 8)
    B, C = row(B, B_b, B_k, b, k, 1), row(C, C_b, C_k, b, k, 1)
    table = table if table is None else row(table, table_b, table_k, b, k, 1)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    write = write if write is None else row(write, write_b, write_k, b, k, 1)
    parameters = table if READ_TABLE else read
    states += bk * ((T + STEPS - 1) // STEPS) * d
    du += gl.multiple_of(bk * (L if DU_CELLS else T) * d, 8)
    ddelta += gl.multiple_of(bk * (R if DDELTA_CELLS else T) * d, 8)
    dz = dz if z is None else dz + gl.multiple_of(bk * (M if DZ_CELLS else T) * d, 8)
    sums = dBC + (bk * T * blocks + first // BLOCK_D) * 2

    xs = gl.allocate_shared_memory(u.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    raws = gl.allocate_shared_memory(delta.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    dys = gl.allocate_shared_memory(dy.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    dus = gl.allocate_shared_memory(du.dtype.element_ty, [STEPS * PARTS, BLOCK_D], ROWS)
    ddeltas = gl.allocate_shared_memory(ddelta.dtype.element_ty, [STEPS * PARTS, BLOCK_D], ROWS)
    Bs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, 1], ROWS)
    Cs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, 1], ROWS)
    dBs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, BLOCK_D // 2], ROWS)
    dCs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, BLOCK_D // 2], ROWS)
    x_rows, raw_rows = in_pairs(xs, STAGES * STEPS, PARTS, BLOCK_D), in_pairs(raws, STAGES * STEPS, PARTS, BLOCK_D)
    dy_rows = in_pairs(dys, STAGES * STEPS, PARTS, BLOCK_D)
    du_rows, ddelta_rows = per_step(dus, STEPS, PARTS, BLOCK_D), per_step(ddeltas, STEPS, PARTS, BLOCK_D)
    B_rows, C_rows = per_step(Bs, STEPS, PARTS, 1), per_step(Cs, STEPS, PARTS, 1)
    dB_rows, dC_rows = per_step(dBs, STEPS, PARTS, BLOCK_D // 2), per_step(dCs, STEPS, PARTS, BLOCK_D // 2)
    if z is not None:
        zs = gl.allocate_shared_memory(z.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
        dzs = gl.allocate_shared_memory(z.dtype.element_ty, [STEPS * PARTS, BLOCK_D], ROWS)
        z_rows, dz_rows = in_pairs(zs, STAGES * STEPS, PARTS, BLOCK_D), per_step(dzs, STEPS, PARTS, BLOCK_D)
    step_r, end_r = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, ROW))
    step_g, end_g = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, GATE))
    step_s, end_s = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, SUMS))
    column = first + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROW))
    state_g = gl.arange(0, 1, layout=gl.SliceLayout(0, GATE))
    shortest, longest = gl.minimum(chunk, T - (c + PARTS - 1) * chunk), gl.minimum(chunk, T - c * chunk)

    adjoint = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    chunked += ((b.to(gl.int64) * chunks + part) * K + k) * (n + 2) * d + channel
    if CARRIED:
        adjoint = gl.load(chunked, mask=in_d & (part < chunks), other=0.0)
    dA = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    dD = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    dbias = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)

    t_last = (longest - 1) // STEPS * STEPS
    for s in gl.static_range(STAGES):
        before = gl.maximum(t_last - s * STEPS, 0)
        p = entries(table, before + step_r, end_r, L)
        q = p if READ_TABLE else entries(read, before + step_r, end_r, R)
        o = p if WRITE_TABLE else entries(write, before + step_r, end_r, M)
        if s < STAGES - 1:
            copy(xs.index(s), u, u_l, p, column, d)
            copy(raws.index(s), delta, delta_r, q, column, d)
            copy(dys.index(s), dy, dy_m, o, column, d)
            if z is not None:
                copy(zs.index(s), z, z_m, o, column, d)
            async_copy.commit_group()
    g = entries(parameters, t_last + step_g, end_g, R)
    B_next, C_next = gates(B, B_r, g, state_g, n), gates(C, C_r, g, state_g, n)
    g = entries(parameters, gl.maximum(t_last - STEPS, 0) + step_g, end_g, R)
    h_next = gl.load(states + ((start + t_last) // STEPS * d + channel), mask=in_d & (start + t_last < T), other=0.0)
    for i in range(0, longest, STEPS):
        t = t_last - i
        stage = i // STEPS % STAGES
        free = (stage + STAGES - 1) % STAGES
        before = gl.maximum(t - STEPS, 0)
        ahead = gl.maximum(t - STAGES * STEPS, 0)
        Bs.store(B_next.to(gl.float32) * LN2)
        Cs.store(C_next.to(gl.float32))
        async_copy.wait_group(STAGES - 2)
        copy(xs.index(free), u, u_l, p, column, d)
        copy(raws.index(free), delta, delta_r, q, column, d)
        copy(dys.index(free), dy, dy_m, o, column, d)
        if z is not None:
            copy(zs.index(free), z, z_m, o, column, d)
        async_copy.commit_group()
        B_next, C_next = gates(B, B_r, g, state_g, n), gates(C, C_r, g, state_g, n)
        p = entries(table, ahead + step_r, end_r, L)
        q = p if READ_TABLE else entries(read, ahead + step_r, end_r, R)
        o = p if WRITE_TABLE else entries(write, ahead + step_r, end_r, M)
        g = entries(parameters, gl.maximum(t - 2 * STEPS, 0) + step_g, end_g, R)
        to_u = entries(table if DU_CELLS else None, t + step_r, end_r, L if DU_CELLS else T)
        to_delta = entries(parameters if DDELTA_CELLS else None, t + step_r, end_r, R if DDELTA_CELLS else T)
        h = h_next.to(gl.float32)
        h_next = gl.load(
            states + ((start + before) // STEPS * d + channel), mask=in_d & (start + before < T), other=0.0
        )
        if SOFTPLUS:  # noqa: SIM102 - decided while compiling, the next one while running
            if t + STEPS > shortest:
                blank(raws.index(stage), t + step_r < end_r, ROW)

        inputs, steps, decays, gs, hs = (), (), (), (), (h,)
        for j in gl.static_range(STEPS):  # the states, and what passes the gate
            x = wide(x_rows, stage * STEPS + j, PARTS, BLOCK_D)
            raw = wide(raw_rows, stage * STEPS + j, PARTS, BLOCK_D)
            inside = start + t + j < end
            step = step_size(raw, shift, inside, SOFTPLUS)
            decay = gl.exp2(step * a)
            h = decay * h + step * x * B_rows.index(j).load(TILE)
            if z is not None:
                gate = wide(z_rows, stage * STEPS + j, PARTS, BLOCK_D)
                gj = wide(dy_rows, stage * STEPS + j, PARTS, BLOCK_D)
                dgate = gj * (h * C_rows.index(j).load(TILE) + skip * x) * silu_slope(gate)
                gs = gs + (gj * gate * sigmoid(gate),)
                if DZ_CELLS:
                    dz_rows.index(j).store(dgate.to(z.dtype.element_ty))
                else:
                    gl.store(dz + ((start + t + j).to(gl.int64) * d + channel), dgate, mask=in_d & inside)
            inputs, steps, decays, hs = inputs + (x,), steps + (step,), decays + (decay,), hs + (h,)

        for j in gl.static_range(STEPS - 1, -1, -1):  # the adjoint
            x, step = inputs[j], steps[j]
            gj = wide(dy_rows, stage * STEPS + j, PARTS, BLOCK_D) if z is None else gs[j]
            leave(dC_rows.index(j), gj * hs[j + 1], PARTS, BLOCK_D)
            adjoint += gj * C_rows.index(j).load(TILE)
            leave(dB_rows.index(j), adjoint * (step * x), PARTS, BLOCK_D)
            dinput = adjoint * B_rows.index(j).load(TILE)  # of s u
            adjoint *= decays[j]
            ddecay = adjoint * hs[j]  # of s A
            dA += ddecay * step
            dstep = x * dinput + ddecay * (a * LN2)
            if SOFTPLUS:
                dstep *= LOG2E - gl.exp2(-step) * LOG2E  # softplus'(x) = 1 - exp(-softplus(x))
            else:
                dstep = gl.where(start + t + j < end, dstep * LOG2E, 0.0)
            dbias += dstep
            dD += gj * x
            du_rows.index(j).store((step * dinput + skip * gj).to(du.dtype.element_ty))
            ddelta_rows.index(j).store(dstep.to(ddelta.dtype.element_ty))
        put(du, to_u, column, d, dus.load(ROW))
        put(ddelta, to_delta, column, d, ddeltas.load(ROW))
        if DZ_CELLS:
            put(dz, entries(table if WRITE_TABLE else write, t + step_r, end_r, M), column, d, dzs.load(ROW))
        to = sums + (t + step_s).to(gl.int64) * (blocks * 2)
        gl.store(to, gl.sum(dBs.load(SUMS), 1) * LN2, mask=t + step_s < end_s)
        gl.store(to + 1, gl.sum(dCs.load(SUMS), 1), mask=t + step_s < end_s)

    mask = in_d & (part < chunks)
    gl.store(chunked, dA * LN2, mask=mask)
    gl.store(chunked + n * d, dD, mask=mask)
    gl.store(chunked + (n + 1) * d, dbias, mask=mask)
    if dinitial is not None:
        gl.store(dinitial + (bk * d + channel), adjoint, mask=in_d & (part == 0))
