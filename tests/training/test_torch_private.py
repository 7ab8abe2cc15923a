"""Training without the names that torch may take away."""

from __future__ import annotations

import pytest
import torch

from latentdiff.training.torch_private import adamw_step


@pytest.mark.parametrize("is_there", [True, False])
def test_steps_are_those_of_torchs_adamw(monkeypatch, is_there):
    if not is_there:
        monkeypatch.delattr(torch, "_fused_adamw_")
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    theirs = [torch.nn.Parameter(each.clone()) for each in ours]
    peer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-8, foreach=False)
    averages, squares = ([torch.zeros_like(each) for each in ours] for _ in range(2))
    steps = [torch.zeros(()) for _ in ours]
    for _ in range(4):
        gradients = [torch.randn(each.shape, generator=generator) for each in ours]
        adamw_step(ours, gradients, averages, squares, steps, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-8)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        peer.step()
    assert [int(step) for step in steps] == [4, 4]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-7)
