"""Muon for the matrices, AdamW for the rest.

Shapes   matrices of one shape are stacked, so one batched Newton-Schulz serves all of them
Source   Keller Jordan, "Muon" (2024); update scale 0.2 sqrt(max(m, n)) from Moonlight, arXiv:2502.16982
Differs  experts are stacked matrices too
"""

import torch


def orthogonal(g, steps=5):
    """The nearest orthogonal matrix, roughly: singular values end between 0.7 and 1.2. (..., m, n)"""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape[-2:]), []).append(p)
            for (m, n), params in by_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    average = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]).view(-1, m, n))
                moved = orthogonal(torch.cat(updates)) * (0.2 * max(m, n) ** 0.5)
                at = 0
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * moved[at : at + len(update)].view(p.shape))
                    at += len(update)


def is_matrix(name, p):
    return p.dim() >= 2 and "embed_tokens" not in name and "router" not in name


def make_optimizers(params, lr, muon=True):
    matrices = [p for name, p in params.items() if muon and is_matrix(name, p)]
    rest = [p for name, p in params.items() if not (muon and is_matrix(name, p))]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.95, 0.98), weight_decay=0.0, foreach=True)
    return [adam, Muon(matrices, lr=lr, weight_decay=0.05)] if muon else [adam]
