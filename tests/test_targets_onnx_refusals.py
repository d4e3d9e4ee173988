from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")  # what the target needs; an extra
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Hidden(nn.Module):
    """A Linear whose weight is read a second time, where no module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.twice = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.twice(x) + x @ (2.0 * self.twice.weight).t()  # type: ignore[no-any-return]
