"""Whole models: classifiers, segmenters and detectors, inference and training steps on a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional as F

from vssm.cli._timing import captured

MODES = ("eager", "graphed", "compiled", "blocks")
DEVICE = "cuda"
COLUMNS = ("model", "mode", "size", "batch", "inference img/s", "inference GB", "training img/s", "training GB")


class Setting(NamedTuple):
    """Image size and images a step."""

    size: tuple[int, ...]
    inference: int
    training: int


def _square(size: int, batch: int, names: str) -> dict[str, Setting]:
    return dict.fromkeys(names.split(), Setting((size, size), batch, batch))


# NAME is a model of vssm or timm, NAME@SIZE the same at another size, DETECTOR/BACKBONE one of torchvision's detectors.
SETS = {
    "classifiers": {  # batch and size as the published code was timed
        "vmamba_tiny_s1l8": Setting((224, 224), 128, 128),
        "vanilla_vmamba_tiny": Setting((224, 224), 64, 64),
        **_square(224, 128, "vim_tiny vim_small"),
        "vim_tiny@1248": Setting((1248, 1248), 4, 4),
        **_square(224, 128, "swin_tiny_patch4_window7_224 convnext_tiny deit_small_patch16_224"),
    },
    "families": _square(
        224,
        64,
        "efficientvmamba_tiny efficientvmamba_small plainmamba_l1 plainmamba_l2 localvim_tiny localvim_small "
        "localvmamba_tiny localvmamba_small msvmamba_nano msvmamba_micro groupmamba_tiny groupmamba_small "
        "spatialmamba_tiny spatialmamba_small vssd_micro vssd_tiny mamba2d_n mamba2d_t",
    ),
    "detectors": dict.fromkeys(
        "fcos/vmamba_tiny retinanet/vmamba_tiny faster_rcnn/vmamba_tiny mask_rcnn/vmamba_tiny "
        "mamba_yolo_t mamba_yolo_b mamba_yolo_l".split(),
        Setting((800, 1280), 1, 2),
    ),
    "segmenters": {
        **dict.fromkeys("upernet_vmamba_tiny upernet_vssd_tiny".split(), Setting((512, 512), 8, 4)),
        "segmamba": Setting((128, 128, 128), 1, 2),
    },
}


def setting(name: str) -> Setting:
    """Of a model in ``SETS``; others run 64 images of 224², or of the size behind an @."""
    known = {name: each for models in SETS.values() for name, each in models.items()}
    size = int(name.partition("@")[2] or 224)
    return known.get(name, Setting((size, size), 64, 64))


def check_names(names: Sequence[str]) -> None:
    """Raise a ValueError for a name that neither vssm nor timm nor torchvision's detectors have."""
    import timm

    import vssm
    from vssm.registries.torchvision import DETECTORS

    for name in names:
        known, _, size = name.partition("@")
        detector, _, backbone = known.rpartition("/")
        parts = [backbone in vssm.list_models(), detector in DETECTORS] if detector else [
            timm.is_model(known) or known in vssm.list_models()
        ]  # fmt: skip
        if not all(parts) or (size and not size.isdecimal()):
            raise ValueError(
                f"no model {name!r}: give a model of vssm or timm, one with a size (vim_tiny@448), or a detector with "
                f"its backbone ({next(iter(DETECTORS))}/vmamba_tiny); detectors are {', '.join(DETECTORS)}"
            )


class Work(NamedTuple):
    """A model with what one step of inference and one of training do, on so many images."""

    model: nn.Module
    infer: Callable[[nn.Module, int], object]
    loss: Callable[[nn.Module, int], Tensor]


def work(name: str, sizes: Setting, device: str) -> Work:
    """A model with random weights and random inputs for it, channels last where it is two-dimensional."""
    from vssm.models.variant import variants

    known, _, asked = name.partition("@")
    variant = variants().get(known)
    if "/" in known or (variant is not None and variant.task == "detection"):
        return _detection(known, sizes, device)
    if variant is not None and variant.task == "segmentation":
        return _segmentation(known, sizes, device)
    return _classification(known, {"img_size": int(asked)} if asked else {}, sizes, device)


def _classification(name: str, options: dict[str, Any], sizes: Setting, device: str) -> Work:
    import timm

    import vssm  # noqa: F401 - its models become timm's

    model = timm.create_model(name, **options).to(device, memory_format=torch.channels_last)
    images = _images(sizes.inference, 3, sizes.size, device), _images(sizes.training, 3, sizes.size, device)
    labels = torch.randint(model.num_classes, (sizes.training,), device=device)
    return Work(
        model, lambda run, n: run(images[0][:n]), lambda run, n: F.cross_entropy(run(images[1][:n]), labels[:n])
    )


def _segmentation(name: str, sizes: Setting, device: str) -> Work:
    """Published models' losses differ little in cost: the cross-entropy of every output."""
    import vssm

    model: Any = vssm.create_model(name).to(device)
    if len(sizes.size) == 2:
        model = model.to(memory_format=torch.channels_last)
    channels = getattr(model, "in_channels", 3)
    inference, training = (_images(n, channels, sizes.size, device) for n in (sizes.inference, sizes.training))
    labels = torch.randint(2, (sizes.training, *sizes.size), device=device)

    def loss(run: nn.Module, n: int) -> Tensor:
        outputs = run(training[:n])
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        return torch.stack([F.cross_entropy(y, labels[:n]) for y in outputs]).sum()

    return Work(model, lambda run, n: run(inference[:n]), loss)


def _detection(name: str, sizes: Setting, device: str) -> Work:
    """Torchvision's protocol: images as a list, eight boxes and masks in each, COCO's 80 classes."""
    import vssm

    height, width = sizes.size
    detector, _, backbone = name.rpartition("/")
    if detector:
        model = vssm.create_detector(detector, backbone, num_classes=81, min_size=height, max_size=max(1333, width))
    else:
        model = vssm.create_detector(name, num_classes=81, image_size=max(height, width))
    model = model.to(device, memory_format=torch.channels_last)
    inference, training = ([torch.rand(3, height, width, device=device) for _ in range(n)] for n in sizes[1:])
    corners = torch.rand(8, 2, device=device) * 0.5
    edges = torch.cat([corners, corners + 0.1 + 0.4 * torch.rand(8, 2, device=device)], dim=1)
    target = {
        "boxes": edges * torch.tensor([width, height, width, height], device=device),
        "labels": torch.randint(1, 81, (8,), device=device),
        "masks": torch.ones(8, height, width, dtype=torch.uint8, device=device),
    }
    targets = [target] * len(training)

    def loss(run: nn.Module, n: int) -> Tensor:
        return torch.stack([*run(training[:n], targets[:n]).values()]).sum()

    return Work(model, lambda run, n: run(inference[:n]), loss)


def _images(count: int, channels: int, size: tuple[int, ...], device: str) -> Tensor:
    x = torch.randn(count, channels, *size, device=device)
    return x.contiguous(memory_format=torch.channels_last) if len(size) == 2 else x


def without_core(model: nn.Module, run: Callable[[], object]) -> None:
    """Put the identity in the place of each scan with its projections, so that its share of the time shows.

    Raises:
        ValueError: If ``run``, which runs the model once, does not call each ``SelectiveSSM``, or there is none: what
            scans by other ways would be timed with its scan.
    """
    from vssm.layers.ssm import SelectiveSSM

    cores = [module for module in model.modules() if isinstance(module, SelectiveSSM)]
    uncalled = set(cores)
    hooks = [core.register_forward_pre_hook(lambda module, _: uncalled.discard(module)) for core in cores]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    if uncalled or not cores:
        raise ValueError(
            f"without_core: all scans must be calls of a SelectiveSSM, got {len(uncalled)} of {len(cores)} that are not"
        )

    def identity(
        u: Tensor, table: Tensor, z: Tensor | None = None, *, merge: str | None = "sum", **rest: Any
    ) -> Tensor:
        if merge is None:
            return u if u.dim() == 4 else u[:, None].expand(-1, table.shape[-2], -1, -1)
        return u if u.dim() == 3 else u[:, 0]

    for core in cores:
        core.forward = identity  # type: ignore[method-assign]


def compile_blocks(model: nn.Module) -> list[nn.Module]:
    """Compile each block of ``model`` alone, so that blocks of one shape share their code; returns the blocks.

    A graph of the whole model holds thousands of operations, and takes minutes to compile. Where drop path has a rate,
    it is 0.1 afterwards: compiled code is for one rate, on which its speed does not depend.

    Raises:
        ValueError: If no module of the model has a mixer.
    """
    from timm.layers import DropPath

    blocks = [module for module in model.modules() if hasattr(module, "mixer")]
    if not blocks:
        raise ValueError(f"compile_blocks: {type(model).__name__} has no blocks around mixers; compile it as a whole")
    for module in model.modules():
        if isinstance(module, DropPath) and module.drop_prob:
            module.drop_prob = 0.1
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
    return blocks


class Turns:
    """Who uses a GPU while somebody is timed on it: nobody, as there is one process."""

    def compiling(self) -> contextlib.AbstractContextManager[object]:
        """While torch.compile works, which ends with kernels tried out on the GPU."""
        return contextlib.nullcontext()

    def alone(self, mode: str) -> contextlib.AbstractContextManager[object]:
        """While this process is timed."""
        return contextlib.nullcontext()


@contextlib.contextmanager
def compiler() -> Iterator[None]:
    """torch.compile as it is measured: backward compiles while no activation waits, a block for up to 64 shapes."""
    with (
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        yield


def measure(
    name: str, modes: Sequence[str], dtype: torch.dtype, coreless: bool, turns: Turns
) -> Iterator[dict[str, Any]]:
    """A row a mode; where a mode fails, the row says why."""
    sizes = setting(name)
    each = work(name, sizes, DEVICE)
    problem: dict[str, Any] = {}
    if coreless:
        _try(partial(without_core, each.model, partial(each.infer, each.model, 1)), problem)
    optimizer = torch.optim.AdamW(each.model.parameters(), 1e-5, fused=True, capturable=True)
    for mode in modes:
        row: dict[str, Any] = {
            "model": name,
            "mode": mode + " without core" * coreless,
            "size": "×".join(map(str, sizes.size)),
            "batch": f"{sizes.inference}, {sizes.training}",
            **problem,
        }
        run: Any = torch.compile(each.model, fullgraph=True) if mode == "compiled" else each.model
        blocks = (_try(partial(compile_blocks, each.model), row) or []) if mode == "blocks" else []

        def infer(count: int, run: nn.Module = run) -> None:
            with torch.inference_mode(), torch.autocast(DEVICE, dtype):
                each.infer(run, count)

        def train(count: int, run: nn.Module = run) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE, dtype):
                loss = each.loss(run, count)
            with torch.autograd.set_multithreading_enabled(False):  # as vssm's trainer runs it
                loss.backward()
            optimizer.step()

        start = time.perf_counter()
        steps = {"inference": partial(infer, sizes.inference), "training": partial(train, sizes.training)}
        few = {"inference": partial(infer, min(2, sizes.inference)), "training": partial(train, min(2, sizes.training))}
        compiles = mode in ("compiled", "blocks")
        first = {} if "error" in row else steps if compiles else few  # compiled kernels fit all batches
        with turns.compiling() if compiles else contextlib.nullcontext():
            for what, step in first.items():
                each.model.train(what == "training")
                _try(step, row)
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()  # inference holds neither
        torch.cuda.empty_cache()
        with turns.alone(mode):
            for what, step in steps.items() if "error" not in row else ():
                each.model.train(what == "training")
                if timed := _try(partial(_timed, step, mode == "graphed"), row):
                    ms, gigabytes = timed
                    row |= {f"{what} img/s": getattr(sizes, what) / ms * 1e3, f"{what} GB": gigabytes}
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        for block in blocks:
            block._compiled_call_impl = None
        yield row | {"seconds": round(time.perf_counter() - start)}


def _try(call: Callable[[], Any], row: dict[str, Any]) -> Any:
    """What ``call`` returns, or None with the reason in the row: other modes and models go on.

    Out of memory is no reason the first time: other processes may be at their first steps.
    """
    try:
        return call()
    except torch.OutOfMemoryError as error:
        if isinstance(call, partial) and call.func is _timed:
            row["error"] = f"OutOfMemoryError: {' '.join(str(error).split())[:200]}"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return None


def _timed(step: Callable[[], None], graphed: bool) -> tuple[float, float]:
    """Median milliseconds of a step, launches included, as a user sees it, or replayed; and its peak memory in GB."""
    from triton.testing import do_bench

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = captured(step).replay if graphed else step
    ms = float(do_bench(run, warmup=150, rep=600, return_mode="median"))
    return ms, torch.cuda.max_memory_allocated() / 1e9
