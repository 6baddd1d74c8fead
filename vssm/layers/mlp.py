"""timm's MLP, with less kept for the backward pass."""

from __future__ import annotations

from timm.layers import Mlp
from torch import Tensor, nn

from vssm.layers.again import MadeAgain


class LeanMlp(Mlp):
    """timm's MLP, whose backward pass makes the activated hidden layer again: half of what it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop1.p or not isinstance(self.norm, nn.Identity):
            return super().forward(x)
        hidden = self.fc1(x)
        with MadeAgain() as again:
            y = self.fc2(again.later(self.act(hidden), self.act, hidden))
        return self.drop2(y)
