"""Backward selective scan for NVIDIA GPUs, in Gluon: ``triton_backward`` with 16-bit inputs and 16 states, faster.

Same arguments, same gradients. A group of STEPS steps, from one kept state to the next, is taken in four passes over
shared memory: the states before each step are computed again and noted there in 16 bits; dC is summed over channels;
the adjoint goes back through the steps and is noted where the states were; dB is summed over channels. The sums over
channels are products of tensor cores: a step's tile (states, channels) with the vectors of all
8 steps, of which the step's own column is kept. These sums pass from one block of channels to the next; see
``pass_on``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from vssm.kernels.gluon_shared import (
    FLAT,
    LOG2E,
    ROWS,
    advance,
    copy,
    entries,
    gate_layout,
    gates,
    lengthen,
    place,
    put,
    row,
    row_layout,
    sigmoid,
    silu_slope,
    softplus,
    tile_layout,
    weights,
)
from vssm.kernels.selective_scan.triton_forward import VARY

LN2 = gl.constexpr(0.6931471805599453)
NOTES = gl.constexpr(
    gl.SwizzledSharedLayout(8, 4, 2, [0, 1])
)  # 16 states of a channel are neighbours: no bank conflicts
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA, 2))


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
    TILE: gl.constexpr = tile_layout(BLOCK_N, BLOCK_D)
    CHANNEL: gl.constexpr = gl.SliceLayout(0, TILE)
    STATE: gl.constexpr = gl.SliceLayout(1, TILE)
    ROW: gl.constexpr = row_layout(BLOCK_D)
    GATE: gl.constexpr = gate_layout(BLOCK_N)
    first, k, c, b = place(gl.program_id(0), d, K, chunks, BLOCK_D)
    channel = first + gl.arange(0, BLOCK_D, layout=CHANNEL)
    state = gl.arange(0, BLOCK_N, layout=STATE)
    in_d = channel // 8 * 8 < d  # 8 divides d: whole vectors
    tile_d, tile_n = gl.expand_dims(channel, 0), gl.expand_dims(state, 1)
    in_tile = gl.expand_dims(in_d, 0) & gl.expand_dims(state < n, 1)
    a = gl.load(A + k * A_k + (tile_d * A_d + tile_n * A_n), mask=in_tile, other=0.0) * LOG2E
    shift = weights(bias, k * bias_k + channel, in_d)
    delta, C, dy = row(delta, delta_b, delta_k, b, k, 8), row(C, C_b, C_k, b, k, 1), row(dy, dy_b, dy_k, b, k, 8)
    z = z if z is None else z + gl.multiple_of(b.to(gl.int64) * z_b, 8)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    write = write if write is None else row(write, write_b, write_k, b, k, 1)

    raws = gl.allocate_shared_memory(delta.dtype.element_ty, [2, STEPS, BLOCK_D], ROWS)
    dys = gl.allocate_shared_memory(dy.dtype.element_ty, [2, STEPS, BLOCK_D], ROWS)
    Cs = gl.allocate_shared_memory(gl.float32, [STEPS, BLOCK_N], ROWS)
    raw_rows = raws._reinterpret(delta.dtype.element_ty, [2 * STEPS, BLOCK_D], FLAT)
    dy_rows = dys._reinterpret(dy.dtype.element_ty, [2 * STEPS, BLOCK_D], FLAT)
    C_rows = Cs._reinterpret(gl.float32, [STEPS, BLOCK_N], FLAT)
    if z is not None:
        zs = gl.allocate_shared_memory(z.dtype.element_ty, [2, STEPS, BLOCK_D], ROWS)
        z_rows = zs._reinterpret(z.dtype.element_ty, [2 * STEPS, BLOCK_D], FLAT)
    step_r = gl.arange(0, STEPS, layout=gl.SliceLayout(1, ROW))
    column = first + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROW))
    step_g = gl.arange(0, STEPS, layout=gl.SliceLayout(1, GATE))
    state_g = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, GATE))

    start = c * chunk
    end = gl.minimum(start + chunk, T)
    t_last = start + (end - start - 1) // STEPS * STEPS
    q = entries(read, t_last + step_r, end, R)
    o = q if WRITE_READ else entries(write, t_last + step_r, end, M)
    copy(raws.index(0), delta, delta_r, q, column, d)
    copy(dys.index(0), dy, dy_m, o, column, d)
    if z is not None:
        copy(zs.index(0), z, z_m, o, column, d)
    async_copy.commit_group()
    C_next = gates(C, C_r, entries(read, t_last + step_g, end, R), state_g, n)

    adjoint = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, layout=TILE)
    total = gl.zeros([BLOCK_D], gl.float32, layout=CHANNEL)
    for i in range(0, end - start, STEPS):
        t = t_last - i
        stage = i // STEPS % 2
        before = gl.maximum(t - STEPS, start)
        Cs.store(C_next.to(gl.float32))
        async_copy.wait_group(0)
        q = entries(read, before + step_r, end, R)
        o = q if WRITE_READ else entries(write, before + step_r, end, M)
        copy(raws.index(1 - stage), delta, delta_r, q, column, d)
        copy(dys.index(1 - stage), dy, dy_m, o, column, d)
        if z is not None:
            copy(zs.index(1 - stage), z, z_m, o, column, d)
        async_copy.commit_group()
        C_next = gates(C, C_r, entries(read, before + step_g, end, R), state_g, n)
        count = gl.minimum(STEPS, end - t)
        raw_next = raw_rows.index(stage * STEPS + count - 1).load(CHANNEL)
        for back in range(count):
            j = count - 1 - back
            raw = raw_next.to(gl.float32) + shift
            gj, Cj = dy_rows.index(stage * STEPS + j).load(CHANNEL).to(gl.float32), C_rows.index(j).load(STATE)
            if z is not None:
                gate = z_rows.index(stage * STEPS + j).load(CHANNEL).to(gl.float32)
                gj *= gate * sigmoid(gate)
            raw_next = raw_rows.index(stage * STEPS + gl.maximum(j - 1, 0)).load(CHANNEL)
            step = softplus(raw) if SOFTPLUS else raw
            adjoint += gl.expand_dims(gj, 0) * gl.expand_dims(Cj, 1)
            adjoint *= gl.exp2(gl.expand_dims(step, 0) * a)
            total += step

    chunked += ((b.to(gl.int64) * chunks + c) * K + k) * (n + 2) * d
    gl.store(chunked + (tile_n * d + tile_d), adjoint, mask=in_tile)
    gl.store(chunked + (n * d + channel), total, mask=in_d)


@gluon.jit
def relayed(relay):
    """What stands in ``relay``, as 32 bits."""
    return gl.load(relay, volatile=True).to(gl.int32, bitcast=True)


@gluon.jit
def sum_channels(notes, vectors, relay, come, links):
    """Sum notes[j] (states, channels) times column j of ``vectors``, (channels, 8), over channels: (states, 8).

    The sums of the ``links`` blocks of channels before are added as soon as they stand in ``relay``; ``come`` is what
    stood there a moment ago. See ``pass_on``.
    """
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, MMA))
    sums = gl.zeros([16, 8], gl.float32, layout=MMA)
    for j in gl.static_range(8):
        product = mma_v2(notes.index(j).load(LEFT), vectors, gl.zeros([16, 8], gl.float32, layout=MMA))
        sums = gl.where(gl.expand_dims(column == j, 0), product, sums)
    while gl.max(gl.reshape((come ^ links) & 255, [128]), 0) > 0:
        come = relayed(relay)
    return sums + (come & -256).to(gl.float32, bitcast=True)


@gluon.jit
def pass_on(sums, relay, out, to, width, inside, links, last):
    """Pass sums (states, 8) on to the next block of channels; those of the last go to rows ``to`` of ``out``.

    The last 8 bits of a relayed sum, worth 2**-16 of it, are the number of blocks in it, 0 in a free place. So it says
    itself whether it is the one awaited, and no order between memory accesses matters.
    """
    if last:
        state = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))
        at = gl.expand_dims(to.to(gl.int64) * width, 0) + gl.expand_dims(state, 1)
        gl.store(out + at, sums.to(out.dtype.element_ty), mask=gl.expand_dims(inside, 0))
        gl.store(relay, gl.zeros([16, 8], gl.float32, layout=MMA), cache_modifier=".cg")
    else:
        sums = ((sums.to(gl.int32, bitcast=True) & -256) | (links + 1)).to(gl.float32, bitcast=True)
        gl.store(relay, sums, cache_modifier=".cg")


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
    """All gradients of the recurrence for BLOCK_D channels of a chunk, as in ``triton_backward``, without scratch.

    ``relay`` is (b, chunks, k, slots, 2, n, STEPS), zero, ``turn`` a counter at 0, and dB and dC are
    (b, k, R, n), or else both together dBC, (b, k, T, 2, n) by step. A chunk of more than ``slots`` groups needs
    all its blocks on the device at once.
    """
    TILE: gl.constexpr = tile_layout(BLOCK_N, BLOCK_D)
    CHANNEL: gl.constexpr = gl.SliceLayout(0, TILE)
    STATE: gl.constexpr = gl.SliceLayout(1, TILE)
    ROW: gl.constexpr = row_layout(BLOCK_D)
    GATE: gl.constexpr = gate_layout(BLOCK_N)
    work = gl.atomic_add(turn, 1, sem="relaxed")  # a program takes sums from one that has begun before it
    first, k, c, b = place(work, d, K, chunks, BLOCK_D)
    blocks = (d + BLOCK_D - 1) // BLOCK_D
    bk = b.to(gl.int64) * K + k
    channel = first + gl.arange(0, BLOCK_D, layout=CHANNEL)
    state = gl.arange(0, BLOCK_N, layout=STATE)
    in_d = channel // 8 * 8 < d  # 8 divides d: whole vectors
    tile_d, tile_n = gl.expand_dims(channel, 0), gl.expand_dims(state, 1)
    in_tile = gl.expand_dims(in_d, 0) & gl.expand_dims(state < n, 1)
    a = gl.load(A + k * A_k + (tile_d * A_d + tile_n * A_n), mask=in_tile, other=0.0) * LOG2E
    shift = weights(bias, k * bias_k + channel, in_d)
    skip = weights(D, k * D_k + channel, in_d)
    u, delta, dy = row(u, u_b, u_k, b, k, 8), row(delta, delta_b, delta_k, b, k, 8), row(dy, dy_b, dy_k, b, k, 8)
    z = z if z is None else z + gl.multiple_of(b.to(gl.int64) * z_b, 8)
    B, C = row(B, B_b, B_k, b, k, 1), row(C, C_b, C_k, b, k, 1)
    table = table if table is None else row(table, table_b, table_k, b, k, 1)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    write = write if write is None else row(write, write_b, write_k, b, k, 1)
    parameters = table if READ_TABLE else read
    du += gl.multiple_of(bk * (L if DU_CELLS else T) * d, 8)
    ddelta += gl.multiple_of(bk * (R if DDELTA_CELLS else T) * d, 8)
    dz = dz if z is None else dz + gl.multiple_of(bk * (M if DZ_CELLS else T) * d, 8)
    links, last, slot = first // BLOCK_D, first + BLOCK_D >= d, 0
    column_s = gl.arange(0, 8, layout=gl.SliceLayout(0, MMA))
    state_s = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(1, MMA)), 1)
    relay += (work // blocks).to(gl.int64) * slots * 256 + (state_s * 8 + gl.expand_dims(column_s, 0))
    if dBC is None:
        dB, dC, width = dB + bk * R * n, dC + bk * R * n, n
    else:
        dB, dC, width = dBC + bk * T * 2 * n, dBC + (bk * T * 2 + 1) * n, 2 * n

    xs = gl.allocate_shared_memory(u.dtype.element_ty, [STEPS, BLOCK_D], ROWS)
    raws = gl.allocate_shared_memory(delta.dtype.element_ty, [STEPS, BLOCK_D], ROWS)
    dys = gl.allocate_shared_memory(dy.dtype.element_ty, [STEPS, BLOCK_D], ROWS)
    Bs = gl.allocate_shared_memory(gl.float32, [STEPS, BLOCK_N], ROWS)
    Cs = gl.allocate_shared_memory(gl.float32, [STEPS, BLOCK_N], ROWS)
    steps = gl.allocate_shared_memory(gl.float32, [STEPS, BLOCK_D], FLAT)
    # The state or adjoint behind each step, then the state before each group of the interval.
    NOTED: gl.constexpr = STEPS + EVERY // STEPS
    notes = gl.allocate_shared_memory(gl.bfloat16, [NOTED, BLOCK_N, BLOCK_D], NOTES)
    x_rows = xs._reinterpret(u.dtype.element_ty, [STEPS, BLOCK_D], FLAT)
    raw_rows = raws._reinterpret(delta.dtype.element_ty, [STEPS, BLOCK_D], FLAT)
    dy_rows = dys._reinterpret(dy.dtype.element_ty, [STEPS, BLOCK_D], FLAT)
    if z is None:
        g_rows = dy_rows
    else:
        zs = gl.allocate_shared_memory(z.dtype.element_ty, [STEPS, BLOCK_D], ROWS)
        z_rows = zs._reinterpret(z.dtype.element_ty, [STEPS, BLOCK_D], FLAT)
        g_rows = gl.allocate_shared_memory(gl.float32, [STEPS, BLOCK_D], FLAT)
    B_rows = Bs._reinterpret(gl.float32, [STEPS, BLOCK_N], FLAT)
    C_rows = Cs._reinterpret(gl.float32, [STEPS, BLOCK_N], FLAT)
    step_r = gl.arange(0, STEPS, layout=gl.SliceLayout(1, ROW))
    column = first + gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, ROW))
    step_g = gl.arange(0, STEPS, layout=gl.SliceLayout(1, GATE))
    state_g = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, GATE))

    adjoint = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, layout=TILE)
    chunked += ((b.to(gl.int64) * chunks + c) * K + k) * (n + 2) * d
    if CARRIED:
        adjoint = gl.load(chunked + (tile_n * d + tile_d), mask=in_tile, other=0.0)
    dA = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, layout=TILE)
    dD = gl.zeros([BLOCK_D], gl.float32, layout=CHANNEL)
    dbias = gl.zeros([BLOCK_D], gl.float32, layout=CHANNEL)

    start = c * chunk
    end = gl.minimum(start + chunk, T)
    for i in range((end - start + EVERY - 1) // EVERY):
        begin = (end - 1) // EVERY * EVERY - i * EVERY
        groups = (gl.minimum(EVERY, end - begin) + STEPS - 1) // STEPS
        kept = (bk * ((T + EVERY - 1) // EVERY) + begin // EVERY) * (n + 1)
        short = gl.load(states + ((kept + tile_n) * d + tile_d), mask=in_tile, other=0)
        h = lengthen(short, gl.load(states + ((kept + n) * d + channel), mask=in_d, other=0))
        notes.index(STEPS).store(h.to(gl.bfloat16))
        for group in range(1, groups):  # the state before each group
            t = begin + (group - 1) * STEPS
            copy(xs, u, u_l, entries(table, t + step_r, end, L), column, d)
            copy(raws, delta, delta_r, entries(parameters, t + step_r, end, R), column, d)
            async_copy.commit_group()
            Bs.store(gates(B, B_r, entries(parameters, t + step_g, end, R), state_g, n).to(gl.float32))
            async_copy.wait_group(0)
            for j in range(STEPS):
                x = x_rows.index(j).load(CHANNEL).to(gl.float32)
                raw = raw_rows.index(j).load(CHANNEL).to(gl.float32) + shift
                step = softplus(raw) if SOFTPLUS else raw
                h = advance(h, a, step, x, B_rows.index(j).load(STATE))
            notes.index(STEPS + group).store(h.to(gl.bfloat16))

        for back_group in range(groups):
            group = groups - 1 - back_group
            t = begin + group * STEPS
            count = gl.minimum(STEPS, end - t)
            p = entries(table, t + step_r, end, L)
            q = p if READ_TABLE else entries(read, t + step_r, end, R)
            o = p if WRITE_TABLE else entries(write, t + step_r, end, M)
            copy(xs, u, u_l, p, column, d)
            copy(raws, delta, delta_r, q, column, d)
            copy(dys, dy, dy_m, o, column, d)
            if z is not None:
                copy(zs, z, z_m, o, column, d)
            async_copy.commit_group()
            cells = entries(parameters, t + step_g, end, R)
            Bs.store(gates(B, B_r, cells, state_g, n).to(gl.float32))
            Cs.store(gates(C, C_r, cells, state_g, n).to(gl.float32))
            cell_s = entries(parameters, t + column_s, end, R)
            to = cell_s if dBC is None else t + column_s
            relay_B, relay_C = relay + slot * 256, relay + (slot * 256 + 128)
            slot = gl.where(slot + 1 == slots, 0, slot + 1)
            h = notes.index(STEPS + group).load(TILE).to(gl.float32)
            async_copy.wait_group(0)

            for j in range(count):  # the state before each step, step sizes and what passes the gate
                x, raw = x_rows.index(j).load(CHANNEL).to(gl.float32), raw_rows.index(j).load(CHANNEL).to(gl.float32)
                Bj = B_rows.index(j).load(STATE)
                step = softplus(raw + shift) if SOFTPLUS else raw + shift
                steps.index(j).store(step)
                h = advance(h, a, step, x, Bj)
                notes.index(j).store(h.to(gl.bfloat16))
                if z is not None:
                    dyj = dy_rows.index(j).load(CHANNEL).to(gl.float32)
                    gate = z_rows.index(j).load(CHANNEL).to(gl.float32)
                    y = gl.sum(h * gl.expand_dims(C_rows.index(j).load(STATE), 1), 0) + skip * x
                    dgate = dyj * y * silu_slope(gate)
                    if DZ_CELLS:
                        z_rows.index(j).store(dgate.to(z.dtype.element_ty))  # in the place of z
                    else:
                        gl.store(dz + (gl.multiple_of((t + j).to(gl.int64) * d, 8) + channel), dgate, mask=in_d)
                    g_rows.index(j).store(dyj * gate * sigmoid(gate))
            come = relayed(relay_C)  # early: it takes a while
            if DZ_CELLS:
                put(dz, o, column, d, zs.load(ROW))

            # dC
            vectors = g_rows._reinterpret(g_rows.dtype, [STEPS, BLOCK_D], ROWS).permute([1, 0]).load(RIGHT)
            sums = sum_channels(notes, vectors.to(gl.bfloat16), relay_C, come, links)
            pass_on(sums, relay_C, dC, to, width, cell_s >= 0, links, last)

            for back in range(count):  # the adjoint
                j = count - 1 - back
                x, gj = x_rows.index(j).load(CHANNEL).to(gl.float32), g_rows.index(j).load(CHANNEL).to(gl.float32)
                step = steps.index(j).load(CHANNEL)
                Bj, Cj = B_rows.index(j).load(STATE), C_rows.index(j).load(STATE)
                before = notes.index(j - 1 if j > 0 else STEPS + group).load(TILE).to(gl.float32)
                adjoint += gl.expand_dims(gj, 0) * gl.expand_dims(Cj, 1)
                notes.index(j).store(adjoint.to(gl.bfloat16))
                dinput = gl.sum(adjoint * gl.expand_dims(Bj, 1), 0)  # of delta u
                adjoint *= gl.exp2(gl.expand_dims(step, 0) * a)
                ddecay = adjoint * before  # of delta A
                dA += ddecay * gl.expand_dims(step, 0)
                dstep = x * dinput + gl.sum(ddecay * a, 0) * LN2
                if SOFTPLUS:
                    dstep *= 1.0 - gl.exp2(-step * LOG2E)  # softplus'(x) = 1 - exp(-softplus(x))
                dbias += dstep
                dD += gj * x
                dy_rows.index(j).store((step * dinput + skip * gj).to(dy.dtype.element_ty))  # du in the place of dy
                raw_rows.index(j).store(dstep.to(delta.dtype.element_ty))
            come = relayed(relay_B)
            steps_here = entries(None, t + step_r, end, T)
            put(du, p if DU_CELLS else steps_here, column, d, dys.load(ROW).to(du.dtype.element_ty))
            put(ddelta, q if DDELTA_CELLS else steps_here, column, d, raws.load(ROW))

            # dB
            vectors = xs.permute([1, 0]).load(RIGHT).to(gl.float32)
            vectors *= steps._reinterpret(gl.float32, [STEPS, BLOCK_D], ROWS).permute([1, 0]).load(RIGHT)
            sums = sum_channels(notes, vectors.to(gl.bfloat16), relay_B, come, links)
            pass_on(sums, relay_B, dB, to, width, cell_s >= 0, links, last)

    gl.store(chunked + (tile_n * d + tile_d), dA, mask=in_tile)
    gl.store(chunked + (n * d + channel), dD, mask=in_d)
    gl.store(chunked + ((n + 1) * d + channel), dbias, mask=in_d)
    if dinitial is not None:  # noqa: SIM102 - decided while compiling, the next one while running
        if c == 0:
            gl.store(dinitial + ((bk * d + tile_d) * n + tile_n * A_n), adjoint, mask=in_tile)
