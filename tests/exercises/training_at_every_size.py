"""Checkers of chapter training_at_every_size, "Training at every size"."""

import math

import torch
from torch import nn

from deformable_detr.exercises import checks, expect


@checks("training_at_every_size.1")
def check_shares(shares):
    yield "batches with boxes"
    expect(torch.as_tensor(shares([1, 3])), torch.tensor([0.25, 0.75]), "each counts by its boxes")
    expect(torch.as_tensor(shares([7])), torch.tensor([1.0]))
    yield "a batch without boxes"
    expect(
        torch.as_tensor(shares([0, 3, 1])),
        torch.tensor([0.25, 0.75, 0.25]),
        "its loss was divided by 1, and must be divided by 4",
    )
    yield "a step without boxes"
    expect(
        torch.as_tensor(shares([0, 0])), torch.tensor([1.0, 1.0]), "divided by 1, and that is right"
    )


@checks("training_at_every_size.2")
def check_factor_of_batch(factor_of_batch):
    def wanted(number, batches, accumulate, warmup):
        step, steps = number // accumulate, batches // accumulate
        return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))

    yield "without accumulation"
    for number in (0, 3, 9, 50, 99):
        hint = "step s has the warm-up (s + 1) / warmup and the cosine of s / S"
        expect(factor_of_batch(number, 100, 1, 5), wanted(number, 100, 1, 5), hint)
    yield "four batches a step"
    for number in (0, 1, 3, 4, 18, 57, 99):
        expect(
            factor_of_batch(number, 100, 4, 5),
            wanted(number, 100, 4, 5),
            f"batch {number} belongs to step {number // 4} of 25",
        )
    yield "batches that make no whole step"
    expect(factor_of_batch(50, 103, 4, 1), wanted(50, 103, 4, 1), "103 batches are 25 steps")


def _after_half_step(half_step, clip_norm, size=1.0):
    """A weight from 0 whose gradient is size * (3, 4), after a step of length 1 in its direction,
    and the scale, 1024 before."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([70.0, -9.0])  # of the step before
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    loss = (weight * torch.tensor([3.0, 4.0])).sum() * size
    half_step(scaler, optimizer, [weight], loss, clip_norm)
    return weight, scaler.get_scale()


@checks("training_at_every_size.3")
def check_half_step(half_step):
    slope = torch.tensor([3.0, 4.0])
    yield "a step with the true gradient, clipped"
    weight, _ = _after_half_step(half_step, 100.0)
    expect(-weight, slope, "neither the scale nor an old gradient may reach the weights")
    weight, scale = _after_half_step(half_step, 0.5)
    expect(-weight, slope / 10, "unscale before you clip")
    expect(scale, 2048.0, "update the scale at the end")
    yield "a gradient that overflows"
    weight, scale = _after_half_step(half_step, 0.5, size=1e38)
    expect(weight, torch.zeros(2), "the scaler leaves such a step out")
    expect(scale, 512.0, "and tries a smaller scale")


@checks("training_at_every_size.4")
def check_plan(plan):
    yield "powers of two"
    expect(plan(16, 2), (2, 1))
    expect(plan(1, 2), (2, 16))
    expect(plan(8, 64), (4, 1), "no more than the step needs")
    yield "numbers that do not divide"
    expect(plan(1, 3), (2, 16), "3 images a batch do not make 32")
    expect(plan(3, 4, total=24), (4, 2))
    expect(plan(3, 4), None, "3 GPUs cannot share 32 images")
    expect(plan(5, 7, total=30), (6, 1))


def _half(clip_first=False, unscale=True, safe=True, update=True, clean=True):
    def half_step(scaler, optimizer, parameters, loss, clip_norm):
        if clean:
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clip_first:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        if unscale:
            scaler.unscale_(optimizer)
        if not clip_first:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        if safe:
            scaler.step(optimizer)
        else:
            optimizer.step()
        if update:
            scaler.update()

    return half_step


def _cosine(step, steps, warmup):
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


WRONG = {
    "training_at_every_size.1": [
        ("a mean of means", lambda boxes: [1 / len(boxes)] * len(boxes)),
        ("nothing from batches without boxes", lambda b: [n / max(sum(b), 1) for n in b]),
        (
            "factors that sum to 1",
            lambda b: [max(n, 1) / sum(max(m, 1) for m in b) for n in b],
        ),
    ],
    "training_at_every_size.2": [
        ("a step for each batch", lambda n, batches, a, w: _cosine(n, batches, w)),
        ("the end counted in batches", lambda n, batches, a, w: _cosine(n // a, batches, w)),
        ("a rate that changes within a step", lambda n, b, a, w: _cosine(n / a, b // a, w)),
        ("a part of a step at the end", lambda n, b, a, w: _cosine(n // a, b / a, w)),
    ],
    "training_at_every_size.3": [
        ("clip before unscale", _half(clip_first=True)),
        ("the scaler unscales, after clipping", _half(unscale=False)),
        ("the optimiser's own step", _half(safe=False)),
        ("never updated", _half(update=False)),
        ("old gradients stay", _half(clean=False)),
    ],
    "training_at_every_size.4": [
        ("rounded up", lambda g, f, total=32: (f, -(-total // (g * f)))),
        ("rounded down", lambda g, f, total=32: (f, max(1, total // (g * f)))),
        (
            "always one image a batch",
            lambda g, f, total=32: (1, total // g) if total % g == 0 else None,
        ),
    ],
}
