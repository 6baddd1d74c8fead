"""Start a segmenter's encoder from a published classifier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vssm.checkpoints.digest import grouped
from vssm.checkpoints.download import locate
from vssm.checkpoints.files import read_checkpoint
from vssm.checkpoints.fit import explanation, misfits, translated
from vssm.models import variant as rows
from vssm.models.keys import shapes_of

CLASSIFIER = ("classifier", "head", "norm")         # what a segmenter does not need, under published names and ours


@dataclass(frozen=True)
class Transfer:
    """What ``load_encoder`` did."""

    source: str                                     # the file
    row: str                                        # the classifier whose weights it holds
    loaded: tuple[str, ...]                         # entries of the model that came from it
    kept: tuple[str, ...]                           # entries of the model that stayed as they were
    unused: tuple[str, ...]                         # entries of the classifier that the model has no place for

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.row}): {len(self.loaded)} entries loaded, {len(self.kept)} kept"]
        for what, names in (("kept", self.kept), (f"unused of {self.row}", self.unused)):
            lines += [f"{what}:", *(f"  {line}" for line in grouped(names))] if names else []
        return "\n".join(lines)


def load_encoder(model: nn.Module, source: str | Path, *, key: str | None = None) -> Transfer:
    """Start ``model`` from the weights of a classifier, as its published code does.

    A model says with ``encoders`` which rows of the zoo it can start from, and with ``encoder_entry(name)`` from which
    entry of theirs its own entry ``name`` starts.

    Args:
        model: A segmenter with a pretrained encoder (VM-UNet, MSVM-UNet, Swin-UMamba).
        source: A file, under published names or ours; or the name of a row, whose published weights are fetched.
        key: Entry of the file that holds the weights, by default ``"model"``, ``"state_dict"``, …

    Returns:
        What was loaded, what the model kept, and what of the classifier was not used.

    Raises:
        ValueError: If the model starts from no classifier, the file holds none of those that it starts from, or an
            entry that the model wants is missing there or has another shape.
    """
    name, encoders = type(model).__name__, getattr(model, "encoders", ())
    if not encoders:
        raise ValueError(f"load_encoder: {name} starts from no published classifier; load_weights loads a whole model")
    path, key = _file(source, encoders, key)
    checkpoint = read_checkpoint(path, key=key)
    row, state = _recognised(checkpoint.state, encoders, str(checkpoint), name)
    wanted = {ours: entry for ours in model.state_dict() if (entry := model.encoder_entry(ours)) is not None}
    own = model.state_dict()
    shapes = {entry: tuple(value.shape) for entry, value in state.items()}
    wrong = [
        f"{ours} {tuple(own[ours].shape)} starts from {entry}, which is {shapes.get(entry, 'missing')} there"
        for ours, entry in wanted.items()
        if shapes.get(entry) != tuple(own[ours].shape)
    ]
    if wrong:
        raise ValueError(
            f"load_encoder: {checkpoint} holds {row}, which does not fit this {name} ({len(wrong)} entries):\n  "
            + "\n  ".join(wrong[:12])
        )
    model.load_state_dict({**own, **{ours: state[entry] for ours, entry in wanted.items()}})
    used = set(wanted.values())
    return Transfer(
        str(checkpoint), row, tuple(wanted), tuple(n for n in own if n not in wanted),
        tuple(n for n in state if n not in used),
    )  # fmt: skip


def _file(source: str | Path, encoders: tuple[str, ...], key: str | None) -> tuple[Path, str | None]:
    """The file that ``source`` names, and its entry."""
    if str(source) not in encoders:
        return Path(source), key
    weights = next(iter(rows.variants()[str(source)].weights.values()))
    return locate(weights), key or weights.key


def _recognised(
    state: dict[str, Tensor], encoders: tuple[str, ...], source: str, name: str
) -> tuple[str, dict[str, Tensor]]:
    """The one of ``encoders`` that ``state`` fits, whatever its classifier; and its entries under our names."""
    reasons = []
    for encoder in encoders:
        row = rows.variants()[encoder]
        with torch.device("meta"):
            shapes = shapes_of(row.build())
        try:
            ours, published = translated(state, row.keys, shapes)
        except ValueError as error:                 # two entries under one name: not this family's file
            reasons.append(str(error))
            continue
        found = misfits(ours, published, row.keys, shapes).without(CLASSIFIER)
        if not found:
            return encoder, ours
        reasons.append(explanation(state, found, encoder))
    raise ValueError(
        f"load_encoder: {source} holds none of the classifiers that {name} starts from ({', '.join(encoders)}); it "
        + reasons[0]
    )
