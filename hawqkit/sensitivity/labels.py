"""Labels that the model draws itself, and what their cross-entropy sends back.

Letters: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64  # positions handled at once: bounds the temporaries to ROWS * V numbers


def uniforms(indices: list[int], length: int, seed: int) -> Tensor:
    """Draw one uniform number for each position of each sequence.

    A draw depends on (seed, global sequence index, position) alone: neither batching nor the number
    of processes nor a resume changes it. Drawn on the CPU in float64.

    Args:
        indices: global sequence indices.
        length: positions.
        seed: the probe's seed.

    Returns:
        (B, length) numbers in [0, 1).
    """
    draws = []
    for index in indices:
        generator = torch.Generator().manual_seed(_mix(seed, index))
        draws.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(draws)


def _mix(seed: int, index: int) -> int:
    """Spread (seed, index) over 63 bits (splitmix64), so that neighbors get unrelated streams."""
    value = (seed * 0x9E3779B97F4A7C15 + index + 1) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) >> 1


def sampled_residuals(logits: Tensor, counted: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample y ~ softmax(z) and return the gradient of the summed cross-entropies, `p - e_y`.

    The label is the inverse of the cumulative distribution at the position's uniform number, so no
    logits leave their device. Softmax and cumulative sums are at least float32.

    Args:
        logits: (B, T, V); row t predicts token t + 1.
        counted: (B, T) bool; whether the prediction that is MADE at position t counts.
        uniform: (B, T) numbers in [0, 1).

    Returns:
        (B, T, V) gradients with respect to the logits, zero where not counted, and (B, T) labels,
        -1 where not counted.
    """
    vocabulary = logits.shape[-1]
    flat = logits.detach().reshape(-1, vocabulary)
    residual = torch.empty_like(flat)
    labels = torch.full((len(flat),), -1, dtype=torch.long, device=flat.device)
    mask = counted.reshape(-1).to(flat.device)
    draw = uniform.reshape(-1).to(
        flat.device, torch.float64 if flat.device.type == "cpu" else torch.float32
    )
    wide = torch.promote_types(flat.dtype, torch.float32)
    for start in range(0, len(flat), ROWS):
        rows = slice(start, start + ROWS)
        p = torch.softmax(flat[rows], -1, dtype=wide)
        cumulative = p.cumsum(-1)
        point = (draw[rows].to(wide) * cumulative[:, -1])[:, None]
        y = torch.searchsorted(cumulative, point, right=True).clamp_(max=vocabulary - 1)  # (R, 1)
        p.scatter_add_(1, y, torch.full_like(point, -1.0))
        p.mul_(mask[rows, None])
        residual[rows] = p
        labels[rows] = torch.where(mask[rows], y[:, 0], labels[rows])
    shape = logits.shape[:-1]
    return residual.view(*shape, vocabulary), labels.view(shape)
