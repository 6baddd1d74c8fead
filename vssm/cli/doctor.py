"""Say what is installed here, which scan backend runs on what, and what mends the rest.

Exit status 1 if a package that vssm needs cannot be imported, or if a backend that ``--backend`` or ``VSSM_BACKEND``
asks for runs on no device.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

NEEDED = ("torch", "torchvision", "timm", "numpy", "safetensors")
EXTRAS = {"numba": "cpu", "triton": None, "lightning": "train", "monai": "medical", "albumentations": "images",
          "mmsegmentation": "mmseg", "onnxruntime": "export"}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vssm doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default=os.environ.get("VSSM_BACKEND") or None,
                        help="exit with status 1 unless this backend runs (default: VSSM_BACKEND)")  # fmt: skip
    asked = parser.parse_args(argv).backend
    problems = list(_packages())
    if not any(problem.startswith("torch ") for problem in problems):
        _devices()
        problems += _backends(asked)
    print("\nproblems" if problems else "\nno problems found")
    for problem in problems:
        print(f"  {problem}")
    return int(bool(problems))


def torchvision_for(torch_version: str) -> str:
    """The torchvision release that is built for a torch release: 0.(minor + 15).patch for 2.minor.patch.

    >>> torchvision_for("2.11.0+cu128")
    '0.26.0'
    """
    major, minor, patch = (int(number) for number in re.findall(r"\d+", torch_version)[:3])
    if major != 2:
        raise ValueError(f"torchvision_for: known for torch 2.x, got {torch_version}")
    return f"0.{minor + 15}.{patch}"


def _packages() -> Iterator[str]:
    """Print versions; yield what is wrong with the packages that vssm needs."""
    print(f"vssm {_version('vssm') or 'from a checkout'}, Python {platform.python_version()}, {platform.platform()}")
    for name in NEEDED:
        error = _import_error(name)
        print(f"  {name:14} {_version(name) or 'not installed'}{'' if error is None else '   cannot be imported'}")
        if error is not None:
            yield f"{name} cannot be imported ({error}): {_mend(name)}"
    for name, extra in EXTRAS.items():
        hint = f"   pip install 'vssm[{extra}]'" if extra else "   comes with PyTorch's GPU wheels for Linux"
        print(f"  {name:14} {_version(name) or f'not installed{hint}'}")


def _mend(name: str) -> str:
    torch_version = _version("torch")
    if name == "timm" and _import_error("torchvision") is not None:
        return "it needs torchvision, see there"
    if name != "torchvision" or torch_version is None:
        return f"pip install --force-reinstall --no-deps {name}" if _version(name) else f"pip install {name}"
    build = torch_version.partition("+")[2]
    again = "--force-reinstall --no-deps " if _version(name) else ""
    command = f"pip install {again}torchvision=={torchvision_for(torch_version)}"
    return f"{command} with the --index-url that torch+{build} came from" if build else command


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:      # a torchvision of another torch raises RuntimeError, a damaged file nearly anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> None:
    import torch

    toolkits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = [f"{name} {release}" for name, release in toolkits.items() if release]
    print(f"\ndevices (torch is built for {' and '.join(built) or 'the CPU alone'})")
    print(f"  cpu     {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}")  # fmt: skip
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        architecture = getattr(gpu, "gcnArchName", None) if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"
        print(f"  cuda:{index}  {gpu.name}, {architecture}, {gpu.total_memory / 2**30:.0f} GiB")
        known = torch.cuda.get_arch_list()
        if torch.version.cuda and not any(re.fullmatch(rf"\w+_{gpu.major}\d\w?", name) for name in known):
            print(f"          this torch has no code for it, only for {', '.join(known)}; install one that has")
    if torch.version.cuda and not torch.cuda.is_available():
        print("  cuda    none: no NVIDIA GPU or driver found (nvidia-smi shows both)")
    for kind in ("xpu", "mps"):
        if getattr(torch, kind).is_available():
            print(f"  {kind}")


def _backends(asked: str | None) -> Iterator[str]:
    """Print which backend runs what and why the others do not; yield what is wrong."""
    from vssm.kernels.backends import BACKENDS, PREFERRED

    if asked is not None and asked not in BACKENDS:
        yield f"no backend named {asked!r}; there are {', '.join(BACKENDS)}"
    for op in _OPS:
        runs_asked = False
        for device in _kinds():
            print(f"\n{op} on {device}")
            reasons: dict[tuple[str, str], list[str]] = {}
            for dtype in DTYPES:
                failures = {name: _failure(op, name, device, dtype) for name in BACKENDS}
                usable = [name for name in (*PREFERRED.get(device, ()), "torch", "reference") if failures[name] is None]
                runs = list(dict.fromkeys(usable)) or ["nothing"]
                also = [name for name in BACKENDS if failures[name] is None and name != runs[0]]
                print(f"  {dtype:9} {runs[0]}" + (f"   (also {', '.join(also)})" if also else ""))
                runs_asked |= failures.get(asked or "", "unknown") is None
                for name, reason in failures.items():
                    if reason is not None:
                        reasons.setdefault((name, reason), []).append(dtype)
            for (name, reason), dtypes in reasons.items():
                which = "" if len(dtypes) == len(DTYPES) else f" in {', '.join(dtypes)}"
                print(f"  not {name}{which}: {reason}")
        if asked in BACKENDS and not runs_asked:
            yield f"backend {asked!r} was asked for and cannot run {op} on any device here; the reasons stand above"


def _kinds() -> list[str]:
    import torch

    return ["cpu", *(kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available())]


def _failure(op: str, backend: str, device: str, dtype: str) -> str | None:
    """Why the backend does not run the op, forward and backward, by asking it and then by trying."""
    import torch

    from vssm.kernels import why_not

    if device == "mps" and dtype == "float64":
        return "MPS has no float64"
    reason = why_not(op, backend, torch.device(device), getattr(torch, dtype))
    if reason is not None:
        return reason
    try:
        _OPS[op](backend, torch.device(device), getattr(torch, dtype))
    except Exception as error:                               # whatever a compiler or driver raises is the answer
        return f"it fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _try_selective_scan(backend: str, device: Any, dtype: Any) -> None:
    import torch

    from vssm.kernels import selective_scan

    u = torch.ones(1, 4, 8, device=device, dtype=dtype, requires_grad=True)
    gates = torch.ones(1, 4, 2, device=device, dtype=dtype)
    y, _ = selective_scan(u, torch.ones_like(u), -torch.ones(8, 2, device=device), gates, gates, backend=backend)
    y.sum().backward()


def _try_conv1d(backend: str, device: Any, dtype: Any) -> None:
    import torch

    from vssm.kernels import causal_conv1d

    x = torch.ones(1, 4, 8, device=device, dtype=dtype, requires_grad=True)
    y, _ = causal_conv1d(x, torch.ones(8, 4, device=device, dtype=dtype), backend=backend)
    y.sum().backward()


def _try_scan2d(backend: str, device: Any, dtype: Any) -> None:
    import torch

    from vssm.kernels import scan2d

    u = torch.ones(1, 2, 2, 8, device=device, dtype=dtype, requires_grad=True)
    gates, A = torch.ones(1, 2, 2, 2, device=device, dtype=dtype), -torch.ones(8, 2, device=device)
    scan2d(u, u, u, A, A, gates, gates, gates, backend=backend).sum().backward()


_OPS = {"selective_scan": _try_selective_scan, "conv1d": _try_conv1d, "scan2d": _try_scan2d}
