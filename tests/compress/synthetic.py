"""The synthetic layer of the published scale: correlated inputs with planted outlier channels."""

import torch
from torch import Tensor


def correlated(
    rows: int = 256, inputs: int = 512, tokens: int = 4096, outliers: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """weight f32 [rows, inputs] and the Gram matrix f64 [inputs, inputs] (mean of x x^T) of its inputs."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs // 4, generator=made)
    x = torch.randn(tokens, inputs // 4, generator=made) @ mix.T / (inputs // 4) ** 0.5
    x += 0.3 * torch.randn(tokens, inputs, generator=made)
    x[:, torch.randperm(inputs, generator=made)[:outliers]] *= 20
    weight = torch.randn(rows, inputs, generator=made) * 0.05
    return weight, x.double().T @ x.double() / tokens
