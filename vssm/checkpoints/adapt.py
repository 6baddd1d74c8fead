"""What a checkpoint needs before it fits a model with other channels, classes or image size; each only when asked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from timm.models import adapt_input_conv
from torch import Tensor, nn

from vssm.models.keys import State
from vssm.models.variant import Variant

ADAPTATIONS = ("classifier", "in_chans", "img_size")


@dataclass(frozen=True)
class Adapted:
    """A state dict that fits the model, the entries in it that are the model's own, and in words what was done."""

    state: State
    own: frozenset[str] = frozenset()
    done: tuple[str, ...] = ()


def adapt_state(model: nn.Module, variant: Variant, state: State, adapt: Collection[str]) -> Adapted:
    """Change ``state`` (our names) where it differs from ``model`` in what ``adapt`` names.

    - ``"classifier"``: the class count differs; the model keeps its own classifier.
    - ``"in_chans"``: the channel count differs; the first convolution is summed over its input channels (for one
      channel) or repeated and scaled, as timm does.
    - ``"img_size"``: position tables are resized by the model's ``adapt_state``, if it has one.

    Raises:
        ValueError: If an adaptation is unknown or cannot be done.
    """
    if isinstance(adapt, str) or not set(adapt) <= set(ADAPTATIONS):
        raise ValueError(f"load_weights: adapt must be a collection of {', '.join(ADAPTATIONS)}; got {adapt!r}")
    own, kept, done = model.state_dict(), frozenset[str](), []
    state = dict(state)
    if "classifier" in adapt:
        heads = (variant.classifier,) if isinstance(variant.classifier, str) else variant.classifier
        names = [f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")]
        in_file, in_model = ({name: source[name] for name in names if name in source} for source in (state, own))
        if in_file and _sizes(in_file) != _sizes(in_model):
            state = {name: value for name, value in state.items() if name not in in_file} | in_model
            kept = frozenset(in_model)
            done.append(f"{' and '.join(heads)} stays the model's own")
    first = f"{variant.first_conv}.weight"
    if "in_chans" in adapt and first in state and first in own and state[first].shape[1] != own[first].shape[1]:
        try:
            state[first] = adapt_input_conv(own[first].shape[1], state[first])
        except NotImplementedError as error:
            raise ValueError(
                f"load_weights: {first} of shape {tuple(state[first].shape)} cannot be adapted to "
                f"{own[first].shape[1]} channels, only 3 input channels can"
            ) from error
        done.append(f"{first} is adapted to {own[first].shape[1]} input channels")
    resize: Callable[[State], State] | None = getattr(model, "adapt_state", None)
    if "img_size" in adapt and resize is not None:
        before, state = state, resize(state)
        done += [
            f"{name} is resized from {tuple(before[name].shape)} to {tuple(value.shape)}"
            for name, value in state.items()
            if name in before and before[name].shape != value.shape
        ]
    return Adapted(state, kept, tuple(done))


def _sizes(entries: dict[str, Tensor]) -> dict[str, int]:
    return {name: len(value) for name, value in entries.items()}
