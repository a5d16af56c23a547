"""Layers as they are after some training, with numbers that show a mix-up."""

import torch
from torch import nn


@torch.no_grad()
def randomize_affine_and_running(layer: nn.Module) -> None:
    """Random weight and bias, if the layer has them, and running statistics."""
    if layer.affine:
        layer.weight.normal_()
        layer.bias.normal_()
    if layer.running_mean is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
