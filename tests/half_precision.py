"""Many training steps on a GPU in 16 bits, in seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CALLED = 8  # steps as called, before the others are replayed from a CUDA graph of one


def train(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, rate: float, steps: int = 500) -> Tensor:
    """Losses (steps,) of AdamW steps, float32; a scaler may skip steps in float16, but no loss is left out."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True, capturable=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    now, seen = torch.zeros((), device="cuda"), torch.zeros(steps, device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype):
            value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        now.copy_(value.detach())

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(CALLED):
            step()
            seen[i] = now
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    for i in range(CALLED, steps):
        graph.replay()
        seen[i] = now
    return seen
