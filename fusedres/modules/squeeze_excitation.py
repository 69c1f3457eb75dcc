"""Squeeze-and-excitation: a residual branch is scaled for each sample and channel, by what its means say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.autograd import are_plain
from fusedres.modules.genuine import touched


class Excitation(nn.Module):
    """s = σ(fc2(relu(fc1(mean over the pixels of x)))): what a squeeze-and-excitation block multiplies its branch by.

    Children and state_dict are those of torchvision.ops.SqueezeExcitation.

    Shape: x (N, channels, H, W) to s (N, channels, 1, 1).

    Raises:
        ValueError: reduction is less than 1, or leaves no channel.

    Source: Hu et al. 2018, Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if reduction < 1 or channels // reduction < 1:
            raise ValueError(
                f"Excitation: reduction must be from 1 to {channels} for {channels} channels, got {reduction}"
            )
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the factors; see the class."""
        result: Tensor = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return result

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the weights in the order of fusedres/autograd/excitation.py."""
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def unfused_reason(self, branch: Tensor | None) -> str | None:
        """Return why forward has to be called on the normalised branch, or on any for None; None: it need not be.

        The tail has asked before whether torch's own code was replaced.
        """
        if type(self).forward is not _FORWARD:
            return f"{type(self).__name__} has its own forward, or Excitation.forward is replaced"
        for name, layer in (("fc1", self.fc1), ("fc2", self.fc2)):
            if type(layer) is not nn.Conv2d or layer.kernel_size != (1, 1):
                return f"{name} is no 1x1 nn.Conv2d"
            if layer.groups != 1 or layer.padding != (0, 0) or layer.stride != (1, 1):
                return f"{name} has groups, padding or a stride"
        channels = self.fc2.weight.shape[0]
        fits = self.fc1.weight.shape == (self.fc2.weight.shape[1], channels, 1, 1)
        if not fits or not are_plain(*self.tensors()) or (branch is not None and branch.shape[1] != channels):
            return "fc1 and fc2 do not fit the branch, or are no plain tensors"
        if branch is not None and any(t is not None and t.device != branch.device for t in self.tensors()):
            return f"fc1 or fc2 is not on {branch.device}"
        if branch is not None and not torch.is_autocast_enabled(branch.device.type):
            dtype = branch.dtype
            if any(t is not None and t.dtype is not dtype for t in self.tensors()):
                return f"fc1 or fc2 is not {dtype}"
        return touched("the excitation", self) or touched("fc1", self.fc1) or touched("fc2", self.fc2)


_FORWARD = Excitation.forward


def reason_of_excitation(module: nn.Module, branch: Tensor | None) -> str | None:
    """Return why a module that makes a branch's factors has to be called, for this branch or for any, or None."""
    if not isinstance(module, Excitation):
        return f"the excitation is a {type(module).__name__}, not an Excitation"
    return module.unfused_reason(branch)
