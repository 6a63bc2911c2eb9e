# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # {{n}}. The recipe
#
# You will be able to
# - **say** what each number of a recipe does, and which one to touch first,
# - **make** one large step out of small batches, on one machine or on many, with equal gradients,
# - **save** memory by recomputing and by shorter numbers, and know what each costs,
# - **compute** the memory and the hours of a training before you start it.
#
# You should know: {{chapter pixels_to_boxes}}, {{chapter training}} and {{chapter your_own_data}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# The paper trained on 16 GPUs. You have one, or eight, or a laptop. This chapter shows which parts of a
# training may change with the machine while the result stays the same, and which may not. Every
# equality is run here on small models. The table for COCO's image size was measured on a CPU, by
# `python experiments/memory.py`. **Nothing in this chapter was run on a GPU**; each number says
# whether it is *published*, *measured* (on this CPU) or *computed*.

# %%
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from itertools import islice
from pathlib import Path

# a library asks for ipywidgets, which this chapter does without
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from deformable_detr import DeformableDETR, DeformableDETRConfig, ms_deform_attn
from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.evaluation.complexity import PAPER_SIZE, LiveTensors, make_batch
from deformable_detr.exercises import check
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.training.loop import PAPER, train_step
from deformable_detr.training.optimiser import averaged, lr_factor, parameter_groups
from deformable_detr.training.recipe import load_recipe
from deformable_detr.training.setup import Training
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## {{n}}.1 What stands in a recipe
#
# A recipe is a small file, with reasons beside the values that need one: `paper.toml` in
# `deformable_detr/training/recipes`, and others beside it. What is not in it has the paper's value. Here is where
# four of them differ:

# %%
names = ("paper", "modern", "small-data", "digits")
recipes = {name: load_recipe(name).train for name in names}
DIGITS = recipes["digits"]
print(f"{'':20}", *(f"{name:>12}" for name in names))
for field in dataclasses.fields(PAPER):
    values = [str(getattr(recipe, field.name)) for recipe in recipes.values()]
    if len(set(values)) > 1:
        print(f"{field.name:20}", *(f"{value:>12}" for value in values))

# %% [markdown]
# | number | what it does | when to touch it |
# |:--|:--|:--|
# | `epochs` | how often each image is seen; time is proportional to it | 50 on COCO; more on few images |
# | `batch_size`, `accumulate` | images held at once; batches in one step | memory decides (13.3) |
# | `lr` | the length of a step | with the batch (13.8); lower to keep what was learned |
# | `backbone_lr` | the same for the backbone | a tenth, if it comes trained |
# | `sampling_lr_factor` | slows what decides *where* to sample | the paper 0.1; others do without |
# | `weight_decay` | pulls weights to zero {cite}`loshchilov2019adamw` | hardly ever |
# | `clip_norm` | bounds the gradient (13.4) | hardly ever |
# | `schedule`, `drop_epoch` | when the rate falls | cosine, if you do not know the epoch |
# | `warmup_steps` | the first steps are shorter | where heads are new |
# | `frozen` | parts that do not learn; None: the model's choice, for a ResNet `conv1` and `layer1` | more of them, with fewer images |
# | `ema_decay`, `patience` | average the weights; stop when AP does not rise (13.7) | few images |
# | `mixed_precision` | shorter numbers (13.5) | on a GPU, `bf16` |
# | `top_k` | detections of an image that an evaluation counts | more, where images are crowded |
# | `gradient_checkpointing` | recompute instead of keep (13.6) | out of memory |
#
# ## {{n}}.2 Three rates and a schedule
#
# Which parameter learns how fast goes by its name. Sort the base model's by hand. On the *meta*
# device a model has shapes and no numbers, so this costs nothing.

# %%
with torch.device("meta"):
    base = DeformableDETR(DeformableDETRConfig())
sizes = {"rest": 0, "backbone": 0, "sampling": 0}
for name, parameter in base.named_parameters():
    slow = "sampling_offsets" in name or "reference_points" in name
    kind = "backbone" if name.startswith("backbone.") else "sampling" if slow else "rest"
    sizes[kind] += parameter.numel() if parameter.requires_grad else 0
print(sizes, f"{sum(sizes.values()) / 1e6:.2f} M in all")

# %%
for (kind, size), group in zip(sizes.items(), parameter_groups(base, PAPER), strict=True):
    print(f"{kind:9} {size:>10,} parameters, rate {group['lr']:.0e}")
    assert size == sum(parameter.numel() for parameter in group["params"])
assert sizes["sampling"] == 790_018 and sum(sizes.values()) == 39_847_265

# %% [markdown]
# Two in a hundred parameters decide where all others look. Why should they go slowly? The paper does
# not say, and others do without (`modern`). One danger is easy to see: a point beyond the map reads zeros,
# and no gradient brings it back.

# %%
place = torch.tensor([[0.5, 0.5], [1.3, 0.5]], requires_grad=True)  # (x, y): inside, beyond
value = torch.randn(1, 5 * 7, 1, 2)  # (B, S, M, D)
weights = torch.ones(1, 2, 1, 1, 1)
ms_deform_attn(value, [(5, 7)], place.view(1, 2, 1, 1, 1, 2), weights).sum().backward()
print("gradient inside:", place.grad[0].abs().sum().item() > 0, "beyond:", place.grad[1].tolist())
assert place.grad[0].abs().sum() > 0 == place.grad[1].abs().sum()

# %% [markdown]
# The backbone goes slowly because it comes trained. All rates follow one schedule:

# %% mystnb={"image": {"alt": "Four learning rates over the course of a training. The paper's and the modern one are flat and drop to a tenth at four fifths; the small-data and digits rates rise at once and fall as half a cosine."}}
figure, axis = plt.subplots(figsize=(7, 3))
for (name, recipe), style in zip(recipes.items(), ("-", "--", "-", "--"), strict=True):
    steps = range(0, 100 * recipe.epochs, 5)
    rates = [recipe.lr * lr_factor(s, 100 * recipe.epochs, 100, recipe) for s in steps]
    axis.plot([s / len(steps) / 5 for s in steps], rates, style, label=name)
axis.set(xlabel="part of the training", ylabel="learning rate", yscale="log", ylim=(4e-7, 2e-3))
axis.legend(ncols=2)
plt.show()

# %% [markdown]
# *Figure {{n}}.1. The four schedules, with 100 steps an epoch. A drop needs to know when; a cosine
# only needs to know the end.*
#
# ## {{n}}.3 One step out of small batches
#
# A step of 32 images does not fit. Take the gradient of 2 images, then of 2 more, and add: `backward`
# adds by itself. Sums of gradients are gradients of sums, so nothing is lost, if the loss *is* a sum.
# Ours is a sum over objects **divided by the number of boxes**. Whose number?
#
# Take four images with very different numbers of digits, and the digits' detector with random weights. Its
# batch norm is replaced by a frozen one, as the paper's ResNet has; why, you will see.

# %%
digits = CocoDataset(*find_split(Path("../data/digits"), "val"), digits_eval_transform())
shipped, _ = load_model("../data/checkpoints/digits.safetensors")
model = DeformableDETR(shipped.config)
for module in list(model.backbone.modules()):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
by_boxes = sorted((digits[i] for i in range(60)), key=lambda pair: len(pair[1].labels))
samples = [by_boxes[i] for i in (0, 1, -2, -1)]
counts = [len(target.labels) for _, target in samples]
print("boxes in each image:", counts)

# %%
criterion = SetCriterion()


def loss_of(model, batch):
    """The loss of a batch, divided by the batch's number of boxes."""
    return sum(criterion(model(batch), batch.targets).values())


def gradient(model, losses):
    """All gradients of losses that are made one after the other, as one vector."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


model.train()
whole = collate(samples)
halves = [collate(samples[:2]), collate(samples[2:])]
large = gradient(model, [loss_of(model, whole)])

# %% [markdown]
# The recipe of most tutorials: divide each small batch's loss by the number of batches. Before you run:
# is the result the gradient of the four images?

# %%
# NBVAL_IGNORE_OUTPUT
mean_of_means = gradient(model, (loss_of(model, half) / 2 for half in halves))
error = (mean_of_means - large).norm() / large.norm()
print(f"mean of means: off by {100 * error:.0f} %")
assert error > 0.1

# %% [markdown]
# It is not. In the mean of means, a box in an image with few boxes counts more than one in a crowd.
# Weigh each batch by its share of the boxes, and the two agree:


# %%
def test_accumulated_is_large():
    boxes = [sum(len(t.labels) for t in half.targets) for half in halves]
    shares = [number / sum(boxes) for number in boxes]
    print("shares", [round(share, 3) for share in shares])
    losses = (share * loss_of(model, half) for share, half in zip(shares, halves, strict=True))
    accumulated = gradient(model, losses)
    torch.testing.assert_close(accumulated, large, rtol=1e-3, atol=1e-5)


test_accumulated_is_large()

# %% [markdown]
# The library does this in `train_step`. Give it the four images as one batch and as two:

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
plain = dataclasses.replace(DIGITS, batch_size=2, accumulate=2, clip_norm=1e9)


def step_of(batches):
    """The loss and the gradient's norm that one step of the library reports."""
    training = Training(copy.deepcopy(model), digits, None, folder, plain, progress=False)
    terms = train_step(training, batches)
    return terms["loss"], terms["gradient_norm"]


one, two = step_of([whole]), step_of(halves)
assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(one, two, strict=True))
assert math.isclose(one[1], large.norm().item(), rel_tol=1e-3)
print("one batch of four and two of two: the same loss and gradient")

# %% [markdown]
# Why a frozen batch norm? One that takes statistics of its batch makes images depend on their neighbours,
# and no weighing repairs that.
# Dropout differs too, by chance and not by rule.
#
# ## Exercise {{n}}.1  The share of a batch
#
# *difficulty ●○○ · 10 minutes · 3 lines*
#
# `loss_of` divides by the batch's number of boxes, **but never by less than one**: images without a box
# have a loss too, for what was found on them. Given the numbers of boxes of a step's batches, by what
# is each batch's loss to be multiplied? The whole step is divided by at least one as well.


# %% tags=["exercise"]
def shares(boxes):
    """boxes: a number for each batch. Returns as many factors."""
    # BEGIN SOLUTION
    divided_by = [max(number, 1) for number in boxes]
    total = max(sum(boxes), 1)
    return [number / total for number in divided_by]
    # END SOLUTION


check("recipe.1", shares)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Multiply by what the batch was divided by; divide by what the step is to be divided by.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A batch without boxes was divided by `max(0, 1)`. The step's number is `max(sum(boxes), 1)`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With a share of 0, a batch without boxes teaches nothing. The factors need not sum to 1.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## Exercise {{n}}.2  The rate of a small batch
#
# *difficulty ●●○ · 15 minutes · 5 lines*
#
# The schedule counts steps, not batches. Who calls `scheduler.step()` after each small batch warms up
# and cools down too early. Return the factor of the learning rate that holds while batch `number` (from
# 0) is in work: linear warm-up over `warmup` steps, never above 1, times half a cosine,
# $\frac12(1+\cos(\pi s/S))$ at step $s$ of $S$. As in `lr_factor`, step $s$ has the warm-up
# $(s+1)/\text{warmup}$. (The library's cosine ends at 1 %; this one at 0.) What is left at the end makes no
# step.


# %% tags=["exercise"]
def factor_of_batch(number, batches, accumulate, warmup):
    """number: of the batch; batches: of the whole training. Returns a factor in [0, 1]."""
    # BEGIN SOLUTION
    step = number // accumulate
    steps = batches // accumulate
    rising = min(1.0, (step + 1) / warmup)
    falling = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rising * falling
    # END SOLUTION


check("recipe.2", factor_of_batch)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# With `accumulate=4`, batches 0 to 3 belong to step 0, batches 4 to 7 to step 1.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Integer division, twice: of the number, and of the number of all batches.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# All batches of one step have the same factor. Does yours change within a step?
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 Clipping
#
# The gradient of all parameters is one long vector. If it is longer than `clip_norm`, it is shortened to
# that; its direction stays.

# %%
wild = torch.tensor([3.0, 4.0])
by_hand = wild * min(1.0, 0.1 / wild.norm().item())
weight = nn.Parameter(torch.zeros(2))
weight.grad = wild.clone()
norm = nn.utils.clip_grad_norm_([weight], 0.1)
print(f"norm {norm.item():.1f}, clipped to {[round(x, 3) for x in by_hand.tolist()]}")
torch.testing.assert_close(weight.grad, by_hand)

# %% [markdown]
# The official code clips at 0.1. How long are gradients? The first 24 steps of the digits' recipe, from
# random weights:

# %%
fresh = DeformableDETR(shipped.config)
recipe = dataclasses.replace(DIGITS, warmup_steps=10)
training = Training(fresh, digits, None, folder, recipe, progress=False)
norms = []
for batches in islice(training.batches(), 24):
    norms.append(train_step(training, batches)["gradient_norm"])
    training.step += 1
assert min(norms) > 5 * DIGITS.clip_norm  # clipped to a fifth at most

# %% mystnb={"image": {"alt": "The gradient's norm in the first 24 steps of a training, on a logarithmic axis: between four and about twenty, far above two dashed lines at 0.5 and 0.1."}}
figure, axis = plt.subplots(figsize=(7, 2.8))
axis.plot(range(1, 25), norms, "o-")
for bound, text in ((0.5, "digits: 0.5"), (0.1, "paper: 0.1")):
    axis.axhline(bound, color="C1", ls="--")
    axis.text(24.5, bound * 1.15, text, color="C1", ha="right")
axis.set(xlabel="step", ylabel="gradient's norm", yscale="log", ylim=(0.05, None))
plt.show()

# %% [markdown]
# *Figure {{n}}.2. The gradient before clipping, in the first steps. Every one of them is clipped: to
# less than a fifth with the digits' bound, to less than a twenty-fifth with the paper's.*
#
# So clipping here is no safety net for rare accidents: it acts always. Does it make steps that
# much shorter? No: AdamW divides by the gradient's own size, and a constant factor cancels.

# %%
moved = []
for scale in (1.0, 0.01):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    weight.grad = scale * torch.tensor([3.0, 4.0])
    optimizer.step()
    moved.append(1 - weight.detach())
print("moved by", [round(x, 4) for x in moved[0].tolist()])
torch.testing.assert_close(*moved)

# %% [markdown]
# What it does is to give every step the same weight in AdamW's two averages. Otherwise one wild batch
# counts a hundredfold, and since the average of squares forgets slowly ($\beta_2 = 0.999$), it makes all
# later steps short. Before you run: one gradient of 100 among ones of 1; how long are steps 200 steps
# later?

# %%
after = {}
for name, bound in (("unclipped", 1e9), ("clipped at 1", 1.0)):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    for step in range(700):
        weight.grad = torch.tensor([100.0 if step == 500 else 1.0])
        nn.utils.clip_grad_norm_([weight], bound)
        before = weight.item()
        optimizer.step()
    after[name] = before - weight.item()
    print(f"{name:12}: a step is {after[name]:.2f} of the learning rate")
assert after["clipped at 1"] > 0.99 and after["unclipped"] < 0.5

# %% [markdown]
# > **Asked: the loss stays high on my few images, what is wrong?** (fundamentalvision/Deformable-DETR
# > #138, #247; facebookresearch/detr #9, #125.) First see whether it *starts* right. With the prior of
# > 0.01, the focal loss of a matched query is $0.25 \cdot 0.99^2 \cdot \ln 100$, and of all others
# > nearly 0:

# %%
with torch.no_grad():
    start = criterion(DeformableDETR(shipped.config)(whole), whole.targets)
expected = 2 * 0.25 * 0.99**2 * math.log(100)  # 2: the weight of this loss
print(f"class loss at the start: {start['loss_class'].item():.1f}, expected {expected:.1f}")
assert abs(start["loss_class"] - expected) < 0.2

# %%
lost = DeformableDETR(shipped.config)
with torch.no_grad():
    for head in lost.class_heads:
        head.bias.zero_()
    without = criterion(lost(whole), whole.targets)["loss_class"].item()
print(f"with biases of 0 instead of the prior: {without:.0f}")
assert without > 5 * expected

