"""Convert a published checkpoint to our safetensors, or ours back to the published names; strict both ways.

    vssm convert vim_t_midclstok_76p1acc.pth vim_tiny.safetensors --model vim_tiny
    vssm convert vim_tiny.safetensors vim_tiny_published.pth --model vim_tiny --to published
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

from vssm import __version__
from vssm.checkpoints import load_state, read_checkpoint, sha256, write_checkpoint
from vssm.models.keys import to_published
from vssm.registries.zoo import find


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vssm convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a .safetensors or PyTorch file, under published names or ours")
    parser.add_argument("target", type=Path, help="written as safetensors if it ends so, else with torch.save")
    parser.add_argument("--model", required=True, help="the architecture, a name of vssm.list_models()")
    parser.add_argument("--to", choices=("ours", "published"), default="ours", help="names to write (default: ours)")
    parser.add_argument("--key", help="entry of the source that holds the weights (default: model, state_dict, …)")
    parser.add_argument("--prefix", default="", help="take only the entries under this prefix, such as backbone.")
    parser.add_argument("--model-args", nargs="*", default=[], metavar="NAME=VALUE",
                        help="what the checkpoint's model was built with: num_classes=7 img_size=384")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        print(convert(options.source, options.target, options.model, to=options.to, key=options.key,
                      prefix=options.prefix, **_arguments(options.model_args)))  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"vssm convert: {error}", file=sys.stderr)
        return 1
    return 0


def convert(
    source: Path, target: Path, model: str, *, to: str = "ours", key: str | None = None, prefix: str = "", **kwargs: Any
) -> str:
    """Read ``source`` into the model, entry by entry, and write ``target``; returns what was done in a line.

    Raises:
        ValueError: If the file does not fit the model; nothing is written then.
    """
    variant = find(model, "--model")
    checkpoint = read_checkpoint(source, key=key, prefix=prefix)
    try:
        network = variant.build(**kwargs)
    except TypeError as error:
        raise ValueError(f"{model} cannot be built with {kwargs}: {error}") from error
    report = load_state(network, checkpoint.state, source=str(checkpoint))
    state = network.state_dict()
    if to == "published":
        state = to_published(state, variant.keys)
    dtypes = {value.dtype for value in checkpoint.state.values() if value.is_floating_point()}
    if len(dtypes) == 1:                                    # the model computes in float32, the file may hold halves
        dtype = dtypes.pop()
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    metadata = {"model": model, "names": to, "vssm": __version__, "source": source.name, "sha256": sha256(source)}
    write_checkpoint(state, target, {**metadata, **{name: str(value) for name, value in kwargs.items()}})
    return f"{report}\nwritten to {target} under {'our' if to == 'ours' else 'the published'} names"


def _arguments(pairs: list[str]) -> dict[str, Any]:
    """["num_classes=7", "scan=hilbert", "depths=(2, 2)"] -> {"num_classes": 7, "scan": "hilbert", "depths": (2, 2)}."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--model-args takes NAME=VALUE, got {pair!r}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):               # a word
            arguments[name] = value
    return arguments
