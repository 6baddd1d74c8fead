"""Training in 16 bits on a GPU: 500 steps of the two smallest published variants of each family."""

from __future__ import annotations

import math

import pytest
import timm
import torch

import vssm  # noqa: F401 - its models become timm's

SMALLEST = (
    "vim_tiny vim_small vmamba_tiny vanilla_vmamba_tiny efficientvmamba_tiny "
    "efficientvmamba_small plainmamba_l1 plainmamba_l2 localvim_tiny localvim_tiny_fixed "
    "localvmamba_tiny localvmamba_small msvmamba_nano msvmamba_micro groupmamba_tiny "
    "groupmamba_small spatialmamba_tiny spatialmamba_small vssd_micro vssd_tiny "
    "mamba2d_n mamba2d_t"
).split()
SIZE = 64


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_500_steps_stay_finite_and_the_loss_falls(name, dtype):
    """Sixteen random images are learned by heart; a scaler may skip steps in fp16, but no loss is lost."""
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.0, **({"img_size": SIZE} if fixed else {}))
    model = model.cuda().to(memory_format=torch.channels_last).train()
    images = torch.randn(16, 3, SIZE, SIZE, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
    losses = []
    for _ in range(500):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    assert all(math.isfinite(x) for x in losses)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
