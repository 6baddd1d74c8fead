"""GPU kernels of the forward selective scan; ``triton.py`` has the equations and the launches.

One program owns BLOCK_D channels of one row over one chunk of steps. Its state is a tile (BLOCK_N, BLOCK_D) in
registers, or (BLOCK_D) for one state, with channels along the threads, so that all states of a channel lie in one
thread and the sum over them needs no exchange. The loop takes STEPS steps at a time and loads the next ones before it
computes the current ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vssm.kernels.triton_shared import (
    LOG2E,
    along_d,
    along_n,
    apart,
    entries,
    gates,
    power,
    put,
    row,
    rows,
    shorten,
    sigmoid,
    softplus,
    state_index,
    sum_n,
)

# Sizes and strides that differ from call to call: no kernel is compiled again because 16 divides a length.
VARY = tuple(
    "u_b u_k u_l delta_b delta_k delta_r B_b B_k B_r C_b C_k C_r z_b z_m dy_b dy_k dy_m A_k A_d A_n D_k "
    "bias_k table_b table_k read_b read_k write_b write_k initial_b initial_k initial_d K L R M T d n "
    "chunk chunks interval works slots".split()
)


@triton.jit
def place(pid, d, K, chunks, BLOCK_D: tl.constexpr):
    """First channel, row, chunk and sample of a program: blocks of channels are neighbours, then rows, then chunks."""
    blocks = tl.cdiv(d, BLOCK_D)
    block, pid = pid % blocks, pid // blocks
    k, pid = pid % K, pid // K
    return block * BLOCK_D, k, pid % chunks, pid // chunks


@triton.jit
def decay(A, A_d, A_n, channel, state, in_tile, N: tl.constexpr):
    """A as a tile, times log2(e) for exp2."""
    return tl.load(A + (along_d(channel, N) * A_d + along_n(state, N) * A_n), mask=in_tile, other=0.0) * LOG2E


@triton.jit
def weights(x, at, inside):
    """One number a channel; 0 if there are none."""
    if x is None:
        return at * 0.0
    else:
        return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def step_size(raw, shift, inside, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """delta of one step from what was loaded; 0, which leaves the state as it is, beyond the end."""
    step = raw.to(tl.float32) + shift
    if SOFTPLUS:
        step = softplus(step, EXACT)
    return tl.where(inside, step, 0.0)


@triton.jit
def advance(h, a, step, x, B, N: tl.constexpr, EXACT: tl.constexpr):
    """h[t] from h[t-1]: exp(delta A) h + delta B u."""
    return power(along_d(step, N) * a, EXACT) * h + along_d(step * x.to(tl.float32), N) * along_n(B.to(tl.float32), N)


@triton.jit(do_not_specialize=VARY)
def chunk_ends(
    u, delta, A, B, bias, table, read, chunked,
    u_b, u_k, u_l, delta_b, delta_k, delta_r, B_b, B_k, B_r, A_k, A_d, A_n, bias_k, table_b, table_k, read_b, read_k,
    K, L, R, T, d, n, chunk, chunks,
    SOFTPLUS: tl.constexpr, READ_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The state each chunk ends in when it starts from zero and, behind it, its sum of delta; see ``pass_states``."""
    first, k, c, b = place(tl.program_id(0), d, K, chunks, BLOCK_D)
    channel, state = first + tl.arange(0, BLOCK_D), state_index(BLOCK_N)
    in_d, in_n = channel // VEC * VEC < d, state < n
    in_tile = along_n(in_n, BLOCK_N) & along_d(in_d, BLOCK_N)
    a = decay(A + k * A_k, A_d, A_n, channel, state, in_tile, BLOCK_N)
    shift = weights(bias, k * bias_k + channel, in_d)
    u, delta, B = row(u, u_b, u_k, b, k, VEC), row(delta, delta_b, delta_k, b, k, VEC), row(B, B_b, B_k, b, k, 1)
    table = table if table is None else row(table, table_b, table_k, b, k, 1)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    parameters = table if READ_TABLE else read

    start = c * chunk
    end = tl.minimum(start + chunk, T)
    p = entries(table, start, end, L, STEPS)
    q = p if READ_TABLE else entries(read, start, end, R, STEPS)
    x_next = rows(u, u_l, p, channel, in_d, STEPS, VEC)
    raw_next = rows(delta, delta_r, q, channel, in_d, STEPS, VEC)
    B_next = gates(B, B_r, parameters, q, start, end, R, state, in_n, STEPS, BLOCK_N)
    p = entries(table, start + STEPS, end, L, STEPS)
    q = p if READ_TABLE else entries(read, start + STEPS, end, R, STEPS)

    h = tl.zeros_like(a)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(start, end, STEPS):
        x, raw, Bs = x_next, raw_next, apart(B_next, STEPS, BLOCK_N)
        x_next = rows(u, u_l, p, channel, in_d, STEPS, VEC)
        raw_next = rows(delta, delta_r, q, channel, in_d, STEPS, VEC)
        B_next = gates(B, B_r, parameters, q, t + STEPS, end, R, state, in_n, STEPS, BLOCK_N)
        p = entries(table, t + 2 * STEPS, end, L, STEPS)
        q = p if READ_TABLE else entries(read, t + 2 * STEPS, end, R, STEPS)
        for j in tl.static_range(STEPS):
            step = step_size(raw[j], shift, t + j < end, SOFTPLUS, EXACT)
            h = advance(h, a, step, x[j], Bs[j], BLOCK_N, EXACT)
            total += step

    chunked += ((b.to(tl.int64) * chunks + c) * K + k) * (n + 2) * d
    tl.store(chunked + (along_n(state, BLOCK_N) * d + along_d(channel, BLOCK_N)), h, mask=in_tile)
    tl.store(chunked + (n * d + channel), total, mask=in_d)


@triton.jit
def compose(decay_1, end_1, decay_2, end_2):
    """Two neighbouring chunks as one: h -> decay h + end."""
    return decay_1 * decay_2, decay_2 * end_1 + end_2


@triton.jit(do_not_specialize=VARY)
def pass_states(
    chunked, A, initial, A_k, A_d, A_n, initial_b, initial_k, initial_d, K, d, n, chunks,
    REVERSE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Put what each chunk starts from in the place of what it ends in when it starts from zero.

    ``chunked`` is (b, chunks, k, n + 2, d): of each chunk n rows for its state, then one for its sum of delta. A
    program takes one state of BLOCK_D channels through all chunks, BLOCK_C of them at a time. REVERSE goes from the
    last chunk to the first, as adjoints do.
    """
    first, k, s, b = place(tl.program_id(0), d, K, n, BLOCK_D)
    channel = first + tl.arange(0, BLOCK_D)
    in_d = channel < d
    a = tl.load(A + (k * A_k + channel * A_d + s), mask=in_d, other=0.0) * LOG2E
    h = tl.zeros((BLOCK_D,), tl.float32)
    if initial is not None:
        h = tl.load(row(initial, initial_b, initial_k, b, k, 1) + (channel * initial_d + s), mask=in_d, other=0.0)
    chunked += (b.to(tl.int64) * chunks * K + k) * (n + 2) * d + channel
    stride = K.to(tl.int64) * (n + 2) * d
    for begin in range(0, chunks, BLOCK_C):
        i = begin + tl.arange(0, BLOCK_C)
        c = chunks - 1 - i if REVERSE else i
        at = c[:, None] * stride + tl.zeros((1, BLOCK_D), tl.int32)  # (BLOCK_C, BLOCK_D)
        inside = (i < chunks)[:, None] & in_d[None, :]
        # The chunk before each, but for the first: together they turn h into what a chunk starts from.
        behind = at + (stride if REVERSE else -stride)
        total = tl.load(chunked[None, :] + (behind + n * d), mask=inside & (i > begin)[:, None], other=0.0)
        end = tl.load(chunked[None, :] + (behind + s * d), mask=inside & (i > begin)[:, None], other=0.0)
        last = tl.minimum(begin + BLOCK_C, chunks) - 1
        to_last = chunked + (chunks - 1 - last if REVERSE else last) * stride
        last_total = tl.load(to_last + n * d, mask=in_d, other=0.0)
        last_end = tl.load(to_last + s * d, mask=in_d, other=0.0)
        decay, end = tl.associative_scan((power(total * a[None, :], EXACT), end), 0, compose)
        start = decay * h[None, :] + end
        h = tl.sum(tl.where((i == last)[:, None], start, 0.0), 0)
        h = power(last_total * a, EXACT) * h + last_end
        tl.debug_barrier()  # all has been read that is written now
        tl.store(chunked[None, :] + (at + s * d), start, mask=inside)


@triton.jit(do_not_specialize=VARY)
def outputs(
    u, delta, A, B, C, D, z, bias, table, read, write, initial, y, last, states,
    u_b, u_k, u_l, delta_b, delta_k, delta_r, B_b, B_k, B_r, C_b, C_k, C_r, z_b, z_m, A_k, A_d, A_n, D_k, bias_k,
    table_b, table_k, read_b, read_k, write_b, write_k, initial_b, initial_k, initial_d,
    K, L, R, M, T, d, n, chunk, chunks, interval,
    CHUNKED: tl.constexpr, SOFTPLUS: tl.constexpr, READ_TABLE: tl.constexpr, WRITE_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, VEC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y at the written cells, (b, k, M, d); the last state; and, if asked, every interval-th state.

    ``initial`` is what the row starts from, (b, k, d, n) with free strides, or None for zero; if CHUNKED, what each
    chunk starts from, as ``pass_states`` leaves it. ``states`` is (b, k, cdiv(T, interval), n, d), or in
    16 bits with a row behind each, see ``shorten``; STEPS divides chunk and interval.
    """
    first, k, c, b = place(tl.program_id(0), d, K, chunks, BLOCK_D)
    channel, state = first + tl.arange(0, BLOCK_D), state_index(BLOCK_N)
    in_d, in_n = channel // VEC * VEC < d, state < n
    in_tile = along_n(in_n, BLOCK_N) & along_d(in_d, BLOCK_N)
    a = decay(A + k * A_k, A_d, A_n, channel, state, in_tile, BLOCK_N)
    shift = weights(bias, k * bias_k + channel, in_d)
    if D is not None:
        skip = tl.load(D + (k * D_k + channel), mask=in_d, other=0.0)
    bk = b.to(tl.int64) * K + k
    h = tl.zeros_like(a)
    if CHUNKED:
        initial += ((b.to(tl.int64) * chunks + c) * K + k) * (n + 2) * d
        h = tl.load(initial + (along_n(state, BLOCK_N) * d + along_d(channel, BLOCK_N)), mask=in_tile, other=0.0)
    elif initial is not None:
        initial = row(initial, initial_b, initial_k, b, k, 1)
        h = tl.load(
            initial + (along_d(channel, BLOCK_N) * initial_d + along_n(state, BLOCK_N) * A_n), mask=in_tile, other=0.0
        )

    u, delta = row(u, u_b, u_k, b, k, VEC), row(delta, delta_b, delta_k, b, k, VEC)
    B, C = row(B, B_b, B_k, b, k, 1), row(C, C_b, C_k, b, k, 1)
    z = z if z is None else row(z, z_b, 0, b, k, VEC)
    table = table if table is None else row(table, table_b, table_k, b, k, 1)
    read = read if read is None else row(read, read_b, read_k, b, k, 1)
    parameters = table if READ_TABLE else read
    write = write if write is None else row(write, write_b, write_k, b, k, 1)
    y += tl.multiple_of(bk * M * d, VEC)
    if states is not None:
        SHORT: tl.constexpr = 1 if states.dtype.element_ty == tl.int16 else 0
        states += bk * tl.cdiv(T, interval) * (n + SHORT) * d

    start = c * chunk
    end = tl.minimum(start + chunk, T)
    p = entries(table, start, end, L, STEPS)
    q = p if READ_TABLE else entries(read, start, end, R, STEPS)
    o_next = p if WRITE_TABLE else entries(write, start, end, M, STEPS)
    x_next = rows(u, u_l, p, channel, in_d, STEPS, VEC)
    raw_next = rows(delta, delta_r, q, channel, in_d, STEPS, VEC)
    B_next = gates(B, B_r, parameters, q, start, end, R, state, in_n, STEPS, BLOCK_N)
    C_next = gates(C, C_r, parameters, q, start, end, R, state, in_n, STEPS, BLOCK_N)
    if z is not None:
        z_next = rows(z, z_m, o_next, channel, in_d, STEPS, VEC)
    p = entries(table, start + STEPS, end, L, STEPS)
    q = p if READ_TABLE else entries(read, start + STEPS, end, R, STEPS)
    for t in range(start, end, STEPS):
        o, x, raw = o_next, x_next, raw_next
        Bs, Cs = apart(B_next, STEPS, BLOCK_N), apart(C_next, STEPS, BLOCK_N)
        o_next = p if WRITE_TABLE else entries(write, t + STEPS, end, M, STEPS)
        x_next = rows(u, u_l, p, channel, in_d, STEPS, VEC)
        raw_next = rows(delta, delta_r, q, channel, in_d, STEPS, VEC)
        B_next = gates(B, B_r, parameters, q, t + STEPS, end, R, state, in_n, STEPS, BLOCK_N)
        C_next = gates(C, C_r, parameters, q, t + STEPS, end, R, state, in_n, STEPS, BLOCK_N)
        if z is not None:
            zs = z_next
            z_next = rows(z, z_m, o_next, channel, in_d, STEPS, VEC)
        p = entries(table, t + 2 * STEPS, end, L, STEPS)
        q = p if READ_TABLE else entries(read, t + 2 * STEPS, end, R, STEPS)
        if states is not None:  # noqa: SIM102 - decided while compiling, the next one while running
            if t % interval == 0:
                kept = (t // interval).to(tl.int64) * (n + SHORT)
                at = (kept + along_n(state, BLOCK_N)) * d + along_d(channel, BLOCK_N)
                if SHORT:
                    short, unit = shorten(h)
                    tl.store(states + at, short, mask=in_tile)
                    tl.store(states + ((kept + n) * d + channel), unit, mask=in_d)
                else:
                    tl.store(states + at, h, mask=in_tile)
        for j in tl.static_range(STEPS):
            h = advance(h, a, step_size(raw[j], shift, t + j < end, SOFTPLUS, EXACT), x[j], Bs[j], BLOCK_N, EXACT)
            out = sum_n(h * along_n(Cs[j].to(tl.float32), BLOCK_N), BLOCK_N)
            if D is not None:
                out += skip * x[j].to(tl.float32)
            if z is not None:
                gate = zs[j].to(tl.float32)
                out *= gate * sigmoid(gate)
            put(y, o[j], d, channel, out, in_d, VEC)

    if end == T:
        tl.store(last + ((bk * d + along_d(channel, BLOCK_N)) * n + along_n(state, BLOCK_N) * A_n), h, mask=in_tile)
