"""Forward selective scan with one state for NVIDIA GPUs, in Gluon: ``triton_forward``, faster.

Same arguments, same results, for bfloat16. A program is one warp with two channels a thread: 64 channels of a chunk or,
where half of the last such block would be empty (96 = 64 + 32), 32 channels of two neighbouring chunks. Its tile is
(PARTS, BLOCK_D).

Rows are copied to shared memory for a group of STEPS steps at once, a row for each step and part, while the group
before is computed; their cells are looked up another group earlier. The steps of a group are written out, not looped
over: their loads do not wait for one another.

Steps are in units of ln 2 (log2(e) times those of ``triton.py``), so that decays are powers of two; B carries the ln 2.
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
    gate_layout,
    gates,
    place,
    put,
    row,
    row_layout,
    sigmoid,
    weights,
)
from vssm.kernels.selective_scan.triton_forward import VARY

LN2 = gl.constexpr(0.6931471805599453)
GATE = gl.constexpr(gate_layout(1))
STAGES = gl.constexpr(2)  # groups of rows in shared memory: one that is computed, the others on their way


@gluon.constexpr_function
def tile_layout(BLOCK_D):
    """(PARTS, BLOCK_D) in a warp: a thread holds two neighbouring channels."""
    return gl.BlockedLayout([1, 2], [64 // BLOCK_D, BLOCK_D // 2], [1, 1], [1, 0])


@gluon.jit
def tile(first, c, PARTS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Channel and chunk of each element of a tile."""
    TILE: gl.constexpr = tile_layout(BLOCK_D)
    zero = gl.zeros([PARTS, BLOCK_D], gl.int32, layout=TILE)
    channel = gl.expand_dims(first + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, TILE)), 0)
    return zero + channel, zero + gl.expand_dims(c + gl.arange(0, PARTS, layout=gl.SliceLayout(1, TILE)), 1)


@gluon.jit
def span(c, chunk, T, STEPS: gl.constexpr, PARTS: gl.constexpr, layout: gl.constexpr):
    """For the rows of a group, (STEPS PARTS), the step of each in the first group, and where its chunk ends."""
    line = gl.arange(0, STEPS * PARTS, layout=layout)
    start = (c + line % PARTS) * chunk
    return start + line // PARTS, gl.minimum(start + chunk, T)


@gluon.jit
def per_step(x, STEPS: gl.constexpr, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Rows in shared memory as tiles (PARTS, WIDTH), one a step."""
    return x._reinterpret(x.dtype, [STEPS, PARTS, WIDTH], ROWS)


@gluon.jit
def in_pairs(x, STEPS: gl.constexpr, PARTS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Rows of bfloat16 in shared memory as tiles of pairs of channels, for ``wide``."""
    return x._reinterpret(gl.int32, [STEPS, PARTS, BLOCK_D // 2], ROWS)


@gluon.jit
def wide(pairs, j, PARTS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Tile j in float32, an instruction a channel: a bfloat16 is the upper half of a float32."""
    pair = pairs.index(j).load(gl.BlockedLayout([1, 1], [PARTS, BLOCK_D // 2], [1, 1], [1, 0]))
    low, high = (pair << 16).to(gl.float32, bitcast=True), (pair & -65536).to(gl.float32, bitcast=True)
    both = gl.reshape(gl.join(low, high), [PARTS, BLOCK_D])
    return gl.convert_layout(both, tile_layout(BLOCK_D), assert_trivial=True)


@gluon.jit
def blank(rows, inside, layout: gl.constexpr):
    """Give the rows that are not ``inside`` a raw step size whose softplus is zero."""
    rows.store(gl.where(gl.expand_dims(inside, 1), rows.load(layout), float("-inf")))


@gluon.jit
def step_size(raw, shift, inside, SOFTPLUS: gl.constexpr):
    """The step in units of ln 2; ``shift`` is the bias in these. 0 past the end: there raw is -inf if SOFTPLUS.

    softplus is max(x, 0) + log2(1 + w) with a polynomial for log2(1 + w) / w, w = 2^-|x| in (0, 1], to 6e-5 of it.
    """
    x = raw * LOG2E + shift
    if SOFTPLUS:
        w = gl.exp2(-gl.abs(x))
        p = (((0.059651565 * w - 0.2271193) * w + 0.44189855) * w - 0.71698731) * w + 1.4426132
        return p * w + gl.maximum(x, 0.0)
    else:
        return gl.where(inside, x, 0.0)


@gluon.jit(do_not_specialize=VARY)
def chunk_ends(
    u, delta, A, B, bias, table, read, chunked,
    u_b, u_k, u_l, delta_b, delta_k, delta_r, B_b, B_k, B_r, A_k, A_d, A_n, bias_k, table_b, table_k, read_b, read_k,
    K, L, R, T, d, n, chunk, chunks,
    SOFTPLUS: gl.constexpr, READ_TABLE: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STEPS: gl.constexpr, VEC: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """The state each chunk ends in when it starts from zero and, behind it, its sum of delta; see ``pass_states``."""
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
    u, delta, B = row(u, u_b, u_k, b, k, 8), row(delta, delta_b, delta_k, b, k, 8), row(B, B_b, B_k, b, k, 1)
    table = table if table is None else row(table, table_b, table_k, b, k, 1)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    parameters = table if READ_TABLE else read

    xs = gl.allocate_shared_memory(u.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    raws = gl.allocate_shared_memory(delta.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    Bs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, 1], ROWS)
    x_rows, raw_rows = in_pairs(xs, STAGES * STEPS, PARTS, BLOCK_D), in_pairs(raws, STAGES * STEPS, PARTS, BLOCK_D)
    B_rows = per_step(Bs, STEPS, PARTS, 1)
    step_r, end_r = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, ROW))
    step_g, end_g = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, GATE))
    column = first + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROW))
    state_g = gl.arange(0, 1, layout=gl.SliceLayout(0, GATE))
    shortest, longest = gl.minimum(chunk, T - (c + PARTS - 1) * chunk), gl.minimum(chunk, T - c * chunk)

    for s in gl.static_range(STAGES):
        p = entries(table, s * STEPS + step_r, end_r, L)
        q = p if READ_TABLE else entries(read, s * STEPS + step_r, end_r, R)
        if s < STAGES - 1:
            copy(xs.index(s), u, u_l, p, column, d)
            copy(raws.index(s), delta, delta_r, q, column, d)
            async_copy.commit_group()
    B_next = gates(B, B_r, entries(parameters, step_g, end_g, R), state_g, n)
    g = entries(parameters, STEPS + step_g, end_g, R)

    h = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    total = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    for t in range(0, longest, STEPS):
        stage = t // STEPS % STAGES
        free = (stage + STAGES - 1) % STAGES
        Bs.store(B_next.to(gl.float32) * LN2)
        async_copy.wait_group(STAGES - 2)
        copy(xs.index(free), u, u_l, p, column, d)
        copy(raws.index(free), delta, delta_r, q, column, d)
        async_copy.commit_group()
        B_next = gates(B, B_r, g, state_g, n)
        p = entries(table, t + STAGES * STEPS + step_r, end_r, L)  # of the next group to be copied
        q = p if READ_TABLE else entries(read, t + STAGES * STEPS + step_r, end_r, R)
        g = entries(parameters, t + 2 * STEPS + step_g, end_g, R)
        if SOFTPLUS:  # noqa: SIM102 - decided while compiling, the next one while running
            if t + STEPS > shortest:
                blank(raws.index(stage), t + step_r < end_r, ROW)
        for j in gl.static_range(STEPS):
            x = wide(x_rows, stage * STEPS + j, PARTS, BLOCK_D)
            raw = wide(raw_rows, stage * STEPS + j, PARTS, BLOCK_D)
            step = step_size(raw, shift, start + t + j < end, SOFTPLUS)
            h = gl.exp2(step * a) * h + step * x * B_rows.index(j).load(TILE)
            total += step

    to = chunked + ((b.to(gl.int64) * chunks + part) * K + k) * (n + 2) * d + channel
    gl.store(to, h, mask=in_d & (part < chunks))
    gl.store(to + n * d, total * LN2, mask=in_d & (part < chunks))


@gluon.jit(do_not_specialize=VARY)
def outputs(
    u, delta, A, B, C, D, z, bias, table, read, write, initial, y, last, states,
    u_b, u_k, u_l, delta_b, delta_k, delta_r, B_b, B_k, B_r, C_b, C_k, C_r, z_b, z_m, A_k, A_d, A_n, D_k, bias_k,
    table_b, table_k, read_b, read_k, write_b, write_k, initial_b, initial_k, initial_d,
    K, L, R, M, T, d, n, chunk, chunks, interval,
    CHUNKED: gl.constexpr, SOFTPLUS: gl.constexpr, READ_TABLE: gl.constexpr, WRITE_TABLE: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STEPS: gl.constexpr, VEC: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """y at the written cells, (b, k, M, d); the last state; and, if asked, the state before each group of STEPS steps.

    ``initial`` is what the row starts from, (b, k, d, n) with free strides, or None for zero; if CHUNKED, what each
    chunk starts from, as ``pass_states`` leaves it. ``states`` is (b, k, cdiv(T, STEPS), n, d).
    """
    PARTS: gl.constexpr = 64 // BLOCK_D
    TILE: gl.constexpr = tile_layout(BLOCK_D)
    ROW: gl.constexpr = row_layout(BLOCK_D)
    work = gl.num_programs(0) - 1 - gl.program_id(0)  # last first: the second-level cache holds what was read last
    first, k, c, b = place(work, d, K, (chunks + PARTS - 1) // PARTS, BLOCK_D)
    c *= PARTS
    bk = b.to(gl.int64) * K + k
    channel, part = tile(first, c, PARTS, BLOCK_D)
    start, end = part * chunk, gl.minimum(part * chunk + chunk, T)
    in_d = channel // 8 * 8 < d  # 8 divides d: whole vectors
    a = gl.load(A + k * A_k + channel * A_d, mask=in_d, other=0.0)
    shift = weights(bias, k * bias_k + channel, in_d) * LOG2E
    skip = weights(D, k * D_k + channel, in_d)
    h = gl.zeros([PARTS, BLOCK_D], gl.float32, layout=TILE)
    if CHUNKED:
        at = ((b.to(gl.int64) * chunks + part) * K + k) * (n + 2) * d + channel
        h = gl.load(initial + at, mask=in_d & (part < chunks), other=0.0)
    elif initial is not None:
        h += gl.load(row(initial, initial_b, initial_k, b, k, 1) + channel * initial_d, mask=in_d, other=0.0)
    u, delta = row(u, u_b, u_k, b, k, 8), row(delta, delta_b, delta_k, b, k, 8)
    B, C = row(B, B_b, B_k, b, k, 1), row(C, C_b, C_k, b, k, 1)
    z = z if z is None else z + gl.multiple_of(b.to(gl.int64) * z_b, 8)
    table = table if table is None else row(table, table_b, table_k, b, k, 1)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    parameters = table if READ_TABLE else read
    write = write if write is None else row(write, write_b, write_k, b, k, 1)
    y += gl.multiple_of(bk * M * d, 8)

    xs = gl.allocate_shared_memory(u.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    raws = gl.allocate_shared_memory(delta.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
    ys = gl.allocate_shared_memory(y.dtype.element_ty, [STEPS * PARTS, BLOCK_D], ROWS)
    Bs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, 1], ROWS)
    Cs = gl.allocate_shared_memory(gl.float32, [STEPS * PARTS, 1], ROWS)
    x_rows, raw_rows = in_pairs(xs, STAGES * STEPS, PARTS, BLOCK_D), in_pairs(raws, STAGES * STEPS, PARTS, BLOCK_D)
    y_rows = per_step(ys, STEPS, PARTS, BLOCK_D)
    B_rows, C_rows = per_step(Bs, STEPS, PARTS, 1), per_step(Cs, STEPS, PARTS, 1)
    if z is not None:
        zs = gl.allocate_shared_memory(z.dtype.element_ty, [STAGES, STEPS * PARTS, BLOCK_D], ROWS)
        z_rows = in_pairs(zs, STAGES * STEPS, PARTS, BLOCK_D)
    step_r, end_r = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, ROW))
    step_g, end_g = span(c, chunk, T, STEPS, PARTS, gl.SliceLayout(1, GATE))
    column = first + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROW))
    state_g = gl.arange(0, 1, layout=gl.SliceLayout(0, GATE))
    shortest, longest = gl.minimum(chunk, T - (c + PARTS - 1) * chunk), gl.minimum(chunk, T - c * chunk)

    for s in gl.static_range(STAGES):
        p = entries(table, s * STEPS + step_r, end_r, L)
        q = p if READ_TABLE else entries(read, s * STEPS + step_r, end_r, R)
        o = p if WRITE_TABLE else entries(write, s * STEPS + step_r, end_r, M)
        if s < STAGES - 1:
            copy(xs.index(s), u, u_l, p, column, d)
            copy(raws.index(s), delta, delta_r, q, column, d)
            if z is not None:
                copy(zs.index(s), z, z_m, o, column, d)
            async_copy.commit_group()
    g = entries(parameters, step_g, end_g, R)
    B_next, C_next = gates(B, B_r, g, state_g, n), gates(C, C_r, g, state_g, n)
    g = entries(parameters, STEPS + step_g, end_g, R)

    for t in range(0, longest, STEPS):
        stage = t // STEPS % STAGES
        free = (stage + STAGES - 1) % STAGES
        Bs.store(B_next.to(gl.float32) * LN2)
        Cs.store(C_next.to(gl.float32))
        async_copy.wait_group(STAGES - 2)
        copy(xs.index(free), u, u_l, p, column, d)
        copy(raws.index(free), delta, delta_r, q, column, d)
        if z is not None:
            copy(zs.index(free), z, z_m, o, column, d)
        async_copy.commit_group()
        B_next, C_next = gates(B, B_r, g, state_g, n), gates(C, C_r, g, state_g, n)
        here = entries(table if WRITE_TABLE else write, t + step_r, end_r, M)
        p = entries(table, t + STAGES * STEPS + step_r, end_r, L)  # of the next group to be copied
        q = p if READ_TABLE else entries(read, t + STAGES * STEPS + step_r, end_r, R)
        o = p if WRITE_TABLE else entries(write, t + STAGES * STEPS + step_r, end_r, M)
        g = entries(parameters, t + 2 * STEPS + step_g, end_g, R)
        if SOFTPLUS:  # noqa: SIM102 - decided while compiling, the next one while running
            if t + STEPS > shortest:
                blank(raws.index(stage), t + step_r < end_r, ROW)
        if states is not None:
            kept = (bk * ((T + STEPS - 1) // STEPS) + (start + t) // STEPS) * d + channel
            gl.store(states + kept, h.to(states.dtype.element_ty), mask=in_d & (start + t < T))
        for j in gl.static_range(STEPS):
            x = wide(x_rows, stage * STEPS + j, PARTS, BLOCK_D)
            raw = wide(raw_rows, stage * STEPS + j, PARTS, BLOCK_D)
            step = step_size(raw, shift, start + t + j < end, SOFTPLUS)
            h = gl.exp2(step * a) * h + step * x * B_rows.index(j).load(TILE)
            out = h * C_rows.index(j).load(TILE) + skip * x
            if z is not None:
                gate = wide(z_rows, stage * STEPS + j, PARTS, BLOCK_D)
                out = out * gate * sigmoid(gate)
            y_rows.index(j).store(out.to(y.dtype.element_ty))
        put(y, here, column, d, ys.load(ROW))

    gl.store(last + (bk * d + channel), h, mask=in_d & (start < T) & (start + chunk >= T))
