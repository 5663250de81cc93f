"""Experts with weights that matter, vectors and gradients for them."""

import torch
from torch import nn


def double(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module.double()


def vectors(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(output, inputs):
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((weight * output).sum(), inputs, retain_graph=True)
