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
# # {{n}}. Training at every size
#
# You will be able to
# - **make** one large step out of small batches, on one machine or on many, with equal gradients,
# - **predict** where 16 bits are enough and where they are not, and write a step in float16,
# - **trade** computing time for memory, with equal gradients,
# - **compute** the memory and the hours of a training before you start it.
#
# You should know: {{chapter matching_and_loss}}, {{chapter training}} and {{chapter recipe}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# The official recipe was run on 16 GPUs, with two images on each. You have one GPU, or eight, or a laptop.
# Which parts of a training may change with the machine while the result stays the same?
#
# This chapter answers with equalities. Each of them is run here on a small model: the gradient of one large
# batch against the sum over small ones, the gradient with recomputing against the one without. The table
# for COCO's image size was measured on a CPU, by `python experiments/memory.py`. **Nothing in this chapter
# was run on a GPU**; each number says whether it is *published*, *measured* (on a CPU) or *computed*.

# %% tags=["hide-input"]
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
from deformable_detr.training.recipe import load_recipe
from deformable_detr.training.setup import Training
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)
DIGITS = load_recipe("digits").train

# %% [markdown]
# ## {{n}}.1 One step out of small batches
#
# Suppose that a step of the recipe has 32 images, and that only 2 fit into memory. Then compute the
# gradient of 2 images, of 2 more, and so on, and add the gradients up before the optimiser takes its step.
# PyTorch's `backward` adds by itself, as long as nobody clears the gradients. This is called
# **accumulation**. The same sum can also be shared out over several processes.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Eight images become one step in three ways. Left, one batch of eight gives one gradient. Middle, two batches of four one after the other give two gradients that are added. Right, two processes with four images each give two gradients that are averaged."}}
from schematics.training_at_every_size import shares as draw_shares

draw_shares()

# %% [markdown]
# *Figure {{n}}.1. Three ways to one and the same step of eight images: one batch of eight, two batches of four, and
# four images in each of two processes.*
#
# Is the result the gradient of the large batch? The gradient of a sum is the sum of the gradients, so yes,
# **if** the loss is a sum over images. Ours is a sum over objects *divided by the number of objects*, and
# small batches have other numbers of objects than the large one. Many implementations go wrong here, so
# let us look at numbers.
#
# The next cell takes four images with very different numbers of digits, and the digits' detector with
# random weights. Its batch norm is replaced by a frozen one, as in the paper's ResNet. (A batch norm that
# takes its statistics from the batch makes images depend on their neighbours, and then no weighting of
# the gradients of small batches can give that of the large one.)

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
# Most tutorials divide the loss of each small batch by the number of batches. Before you run: is the
# result the gradient of the four images?

# %%
# NBVAL_IGNORE_OUTPUT
mean_of_means = gradient(model, (loss_of(model, half) / 2 for half in halves))
error = (mean_of_means - large).norm() / large.norm()
print(f"mean of means: off by {100 * error:.0f} %")
assert error > 0.1

# %% [markdown]
# It is not. In this mean of means, a box in a batch with few boxes counts more than a box in a crowd.
# Instead, multiply the loss of each batch by its share of the boxes of the whole step. Then the division
# by the batch's own number is undone and replaced by a division by the step's number, and the two gradients
# agree.


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
# The library's `train_step` does this. The next cell gives it the four images once as one batch and once
# as two batches of two, and compares loss and gradient.

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
# ## Exercise {{n}}.1  The share of a batch
#
# *difficulty ●○○ · 10 minutes · 3 lines*
#
# `loss_of` divides by the batch's number of boxes, **but never by less than one**, because images without
# a box have a loss too: for what was wrongly found on them. You are given the numbers of boxes in the
# batches of one step. Return the factor by which each batch's loss has to be multiplied. The loss of the
# whole step is divided by at least one as well.


# %% tags=["exercise"]
def shares(boxes):
    """boxes: a number for each batch. Returns as many factors."""
    # BEGIN SOLUTION
    divided_by = [max(number, 1) for number in boxes]
    total = max(sum(boxes), 1)
    return [number / total for number in divided_by]
    # END SOLUTION


check("training_at_every_size.1", shares)

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
# A schedule counts steps, not batches. If `scheduler.step()` is called after each small batch, the
# warm-up is over too early and the rate falls too early. Return the factor of the learning rate that holds
# while batch `number` (from 0) is at work: a linear warm-up $(s+1)/\text{warmup}$, never above 1, times
# half a cosine, $\frac12(1+\cos(\pi s/S))$, where $s$ is the step that the batch belongs to and $S$ the
# number of whole steps in the training. Batches that are left over at the end make no step.


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


check("training_at_every_size.2", factor_of_batch)

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
# ## {{n}}.2 Shorter numbers
#
# Half as many bits per number means half the memory and, on processors with arithmetic for it, a multiple of
# the speed. But a format of 16 bits has to save somewhere. **bfloat16** keeps the range of float32 and saves
# precision; **float16** keeps more precision and saves range.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three rows of bits. float32 has one sign bit, 8 bits of range and 23 of precision; bfloat16 has 8 bits of range and 7 of precision; float16 has 5 bits of range and 10 of precision."}}
from schematics.training_at_every_size import number_formats

number_formats()

# %% [markdown]
# *Figure {{n}}.2. The bits of three formats: the sign (grey), the exponent, which gives the range (orange),
# and the fraction, which gives the precision (blue).*
#
# In numbers:

# %%
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    info = torch.finfo(dtype)
    row = (
        f"after 1 comes 1 + {info.eps:.1e}, smallest normal {info.tiny:.1e}, largest {info.max:.1e}"
    )
    print(f"{str(dtype)[6:]:9}", row)

# %% [markdown]
# The matrix products of a network forgive low precision, because the rounding errors of many terms average
# out. Coordinates do not forgive it. A sampling location is a single number in [0, 1], and an image is 1333
# pixels wide. By hand: between 0.5 and 1, bfloat16 has a number every $2^{-8}$, and $1333 / 256$ is 5.2
# pixels. So a location can be off by half of that.

# %%
x = (torch.arange(20_000) + 0.5) / 20_000
errors = {d: ((x.to(d).float() - x) * 1333).abs() for d in (torch.bfloat16, torch.float16)}
for dtype, pixels in errors.items():
    print(f"{str(dtype)[6:]:9} off by up to {pixels.max():.2f} pixels, mean {pixels.mean():.2f}")
assert abs(errors[torch.bfloat16].max() - 1333 / 512) < 0.05

# %% tags=["hide-input"] mystnb={"image": {"alt": "Error in pixels over the place in the image. For bfloat16 it grows in stairs that double at one eighth, a quarter and a half of the width, up to 2.6 pixels; for float16 it stays below 0.33."}}
figure, axis = plt.subplots(figsize=(7, 2.8))
for dtype, pixels in errors.items():
    worst = pixels.view(200, 100).amax(1)  # in each of 200 strips
    axis.plot(x.view(200, 100).mean(1) * 1333, worst, label=str(dtype)[6:])
axis.set(xlabel="x in pixels", ylabel="largest rounding error, in pixels")
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.3. The largest rounding error of a coordinate, over the width of an image.*
#
# Does the operator turn this into wrong samples? To see that, let it read a ramp: a map of 100 x 167 cells
# (stride 8) in which the value of each cell is its own x. Sampled at a place, the ramp answers with the x of
# that place.

# %%
ramp = torch.arange(167.0).expand(100, 167).reshape(1, -1, 1, 1)  # (B, S, M, D)
places = torch.rand(1, 500, 1, 1, 1, 2) * 0.9 + 0.05
read = {}
for dtype in (torch.float32, torch.bfloat16):
    rounded = places.to(dtype).float()
    read[dtype] = ms_deform_attn(ramp, [(100, 167)], rounded, torch.ones(1, 500, 1, 1, 1))
wanted = places[..., 0].flatten() * 167 - 0.5
off = {d: ((answer.flatten() - wanted) * 8).abs().max().item() for d, answer in read.items()}
print({str(d)[6:]: f"{pixels:.2f} pixels" for d, pixels in off.items()})
assert off[torch.float32] < 0.01 < 2 < off[torch.bfloat16] < 2.7

# %% [markdown]
# It does: with locations in bfloat16 the operator reads at places that are up to 2.6 pixels off. Therefore the
# library keeps references, locations and boxes in float32, whatever precision the rest runs in, and the operator
# sums in float32. Sampling offsets and attention logits do come out of linear layers in 16 bits. That is harmless,
# because an offset is only a few cells long: between 2 and 4, bfloat16 has a number every $2^{-6}$, so rounding
# moves a point by less than a hundredth of a cell.
#
# Which operations take 16 bits is decided by **autocast**: within it, matrix products and convolutions do.
# The weights themselves stay in float32, and so do the gradients and AdamW's averages. The next cell runs the
# shipped detector under autocast and notes the format of what the parts of an attention layer return, and of what
# the first box head returns.

# %%
dtypes = {}


def note(name):
    """A hook that keeps the dtype of a module's output."""
    return lambda module, inputs, output: dtypes.update({name: str(output.dtype)[6:]})


attention = shipped.encoder.layers[0].attention
hooks = [m.register_forward_hook(note(n)) for n, m in attention.named_children()]
hooks.append(shipped.box_heads[0].register_forward_hook(note("box_heads.0")))
exact = shipped(whole)
with torch.autocast("cpu", torch.bfloat16):
    short = shipped(whole)
for hook in hooks:
    hook.remove()
for name, dtype in dtypes.items():
    print(f"{name:20} {dtype}")
assert dtypes["value_proj"] == "bfloat16" and short.boxes.dtype == torch.float32

# %% [markdown]
# The linear layers of the attention return bfloat16. The box head does not, because the library turns autocast off
# there: a box is made of coordinates. How far do the detections move? Rounding may exchange the ranks of two proposals
# and with them two queries, so we compare each detection with the nearest box of any query.

# %%
# NBVAL_IGNORE_OUTPUT
sure = exact.logits.sigmoid().amax(-1) > 0.5
apart, nearest = torch.cdist(exact.boxes, short.boxes, p=torch.inf).min(-1)  # (B, Q)
pixels = apart[sure].max().item() * 128
again = short.logits.float().sigmoid().gather(1, nearest[..., None].expand_as(short.logits))
points = (again - exact.logits.sigmoid())[sure].abs().max().item()
print(
    f"{int(sure.sum())} detections: boxes differ by up to {pixels:.2f} pixels, scores by {points:.3f}"
)
assert pixels < 2 and points < 0.2

# %% [markdown]
# They stay where they were, to a small part of a pixel. The setting `mixed_precision = "bf16"` needs nothing more.
#
# **float16** needs more, because of its small range: its smallest number above zero is 6e-8, and gradients of less than
# half of that become 0. (Numbers between this and the smallest *normal* one have fewer digits.) The remedy is a **scale**:
# multiply the loss by a large number before the backward pass, and divide the gradient by it afterwards
# {cite}`micikevicius2018mixed`. Here is a gradient of 3e-9, first without and then with a scale.

# %%
weight = nn.Parameter(torch.tensor([2.0]))


def tiny_loss():
    """A loss whose gradient by the weight is 3e-9."""
    return (weight.half() * torch.tensor([3.0]).half()).float().sum() * 1e-9


for scale in (1, 2**16):
    weight.grad = None
    (scale * tiny_loss()).backward()
    print(f"scale {scale:5}: gradient {weight.grad.item() / scale:.1e}")
torch.testing.assert_close(weight.grad / 2**16, torch.tensor([3e-9]), rtol=0.01, atol=0)

# %% [markdown]
# How large may the scale be? PyTorch's `GradScaler` finds out by trial. If a gradient overflows, it leaves
# that step out and halves the scale; after 2000 good steps it doubles the scale. The order of the operations
# matters, because clipping has to see the true gradient and not the scaled one.
#
# ## Exercise {{n}}.3  A step in float16
#
# *difficulty ●●○ · 15 minutes · 6 lines*
#
# Write one whole step with a scaler: clear the old gradients, run backward on the scaled loss, clip the norm
# of the **true** gradient, take the step, adapt the scale.


# %% tags=["exercise"]
def half_step(scaler, optimizer, parameters, loss, clip_norm):
    """scaler: a torch.amp.GradScaler; loss: a scalar with a graph. Changes the parameters."""
    # BEGIN SOLUTION
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, clip_norm)
    scaler.step(optimizer)
    scaler.update()
    # END SOLUTION


check("training_at_every_size.3", half_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `scaler.scale(loss)`, `scaler.unscale_(optimizer)`, `scaler.step(optimizer)`, `scaler.update()`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Between backward and clipping the gradients are too large by the scale: `unscale_` belongs there.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# `optimizer.step()` takes a step with infinite gradients; `scaler.step(optimizer)` looks first.
#
# </details>
#
# {{solution}}

# %% [markdown]
# > **Asked: does it run in half precision?** (fundamentalvision/Deformable-DETR #64.) The official operator
# > did not know the type. Ours takes values in float16 and bfloat16, and sums in float32.
#
# ## {{n}}.3 Recompute instead of keep
#
# Weights are not what fills the memory of a training. The backward pass needs the intermediate results of
# the forward pass, so all of them are kept until it comes, and that is by far the largest part. One can
# keep less: only the input of each block, and compute the rest a second time when the backward pass arrives
# there {cite}`chen2016checkpointing`.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two chains of four blocks. On the left, every block keeps four tensors. On the right, blocks one to three keep only their inputs; at block three, where the backward pass is, the other three tensors are drawn dotted because they are computed once more. Block four, which is done, keeps nothing."}}
from schematics.training_at_every_size import recomputing

recomputing()

# %% [markdown]
# *Figure {{n}}.4. Left: all intermediate results wait for the backward pass. Right: only the inputs wait
# (green). The backward pass has left block 4, which needs nothing any more, and has arrived at block 3, whose other
# results are computed again (dotted).*
#
# To measure it, PyTorch can call a function with every tensor that is saved for the backward pass. The next
# cell adds up their bytes, and makes a stack of eight blocks for the experiment.


# %%
def kept_bytes(function):
    """Runs a function; its result, and the bytes that its graph saves, weights not included."""
    saved = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(saved.values())


class Block(nn.Sequential):
    """Widens 64 to 256 and back, as a feed-forward network does, with dropout."""

    def __init__(self):
        super().__init__(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64))


blocks = nn.ModuleList(Block() for _ in range(8))
tokens = torch.randn(1000, 64, requires_grad=True)


# %% [markdown]
# Now recomputing by hand. A block becomes one operation of autograd, which saves only its input. In its
# backward pass it runs the block again, this time with a graph. The inner `backward` adds the gradients of the block's
# weights by itself, so the operation only has to return the gradient of its input `x` (and `None` for `block`). One
# thing must not be forgotten: dropout has to drop the same numbers again, so the state of the random generator is
# saved too. Besides the saved bytes, `LiveTensors` of the library notes the peak of all tensors alive at once.


# %%
class Recompute(torch.autograd.Function):
    """A block as one operation."""

    @staticmethod
    def forward(context, block, x):
        context.block, context.random = block, torch.get_rng_state()
        context.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(context, gradient):
        x = context.saved_tensors[0].detach().requires_grad_(True)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(context.random)
            context.block(x).backward(gradient)
        return None, x.grad


def run_blocks(run):
    """Output, saved bytes, peak bytes and gradients of the stack; run calls one block."""

    def forward():
        x = tokens
        for block in blocks:
            x = x + run(block, x)
        return x

    blocks.zero_grad()
    torch.manual_seed(1)
    _, kept = kept_bytes(forward)
    torch.manual_seed(1)
    with LiveTensors([*blocks.parameters(), tokens]) as live:
        forward().square().mean().backward()
    return kept, live.peak, [parameter.grad for parameter in blocks.parameters()]


# %%
ways = {
    "keep all": lambda block, x: block(x),
    "by hand": Recompute.apply,
    "PyTorch's": lambda block, x: checkpoint(block, x, use_reentrant=False),
}
results = {name: run_blocks(run) for name, run in ways.items()}
for name, (kept, peak, _) in results.items():
    print(f"{name:10} saved {kept / 2**20:5.1f} MiB, peak of all tensors {peak / 2**20:5.1f} MiB")


# %%
def test_recomputed_gradients_are_equal():
    _, _, all_kept = results["keep all"]
    for name in ("by hand", "PyTorch's"):
        for found, wanted in zip(results[name][2], all_kept, strict=True):
            torch.testing.assert_close(found, wanted)
    print("all three ways give the same gradients")


test_recomputed_gradients_are_equal()
assert results["by hand"][1] < 0.5 * results["keep all"][1]

# %% [markdown]
# What still waits for the backward pass are the inputs of the eight blocks: $8 \cdot 1000 \cdot 64$ numbers of 4 bytes
# are 2.0 MiB. But saved bytes alone would flatter the method, because in the backward pass the results of one block
# after the other are made again. Therefore the last column counts the peak of all tensors that are alive.
#
# In the library it is one setting, `gradient_checkpointing = true`. Each layer of encoder and decoder then is
# such a block, and so is each stage of a ResNet. (The small backbone of the digits' detector is left out: its
# own batch norms, which are not frozen, would count every batch twice.) The next cell compares all gradients
# of the detector, bit by bit.

# %%
gradients = []
for switch in (False, True):
    twin = copy.deepcopy(model).train()
    twin.set_gradient_checkpointing(switch)
    gradients.append(gradient(twin, [loss_of(twin, whole)]))
print("largest difference:", (gradients[0] - gradients[1]).abs().max().item())
assert torch.equal(*gradients)

# %% [markdown]
# What does it save at COCO's size? The next table is the base model with its ResNet-50 in whole steps:
# forward, loss, backward, clipping, AdamW. It was *measured* on one core, each row once, in a process of its
# own. "Tensors" is the peak of all tensors together, which is what a GPU would have to hold; "RSS" is what the
# operating system gave to the process, including what the allocator holds back.

# %%
PARTS = ("backbone", "input_proj", "encoder", "decoder")
measured = json.loads(Path("../data/results/training_sizes.json").read_text())
runs = measured["runs"]
for r in runs:
    r["bits"] = {"no": 32, "bf16": 16}[r["mixed_precision"]]
    r["way"] = "recompute" if r["gradient_checkpointing"] else "keep"
print("images and pixels  bits             tensors      RSS  CPU seconds")
for r in runs:
    row = f"{r['batch_size']} x {r['height']:>4} x {r['width']:>4}   {r['bits']:>5}  {r['way']:9}"
    sizes_gb = f"{r['peak_tensors'] / 1e9:6.2f} GB {r['peak_rss'] / 1e9:5.2f} GB"
    print(row, sizes_gb, f"{r['cpu_seconds']:8.1f}")

# %% [markdown]
# Do not be misled by the seconds of the last two rows. The processor on which they were measured has no arithmetic in
# bfloat16 and imitates it, so they say nothing about GPUs.

# %%
full, saved = runs[:2]
ratio = saved["peak_tensors"] / full["peak_tensors"]
print(f"recomputing needs {100 * ratio:.0f} % of the memory")
assert ratio < 0.5 and saved["gradients"] == full["gradients"]  # bit by bit, dropout included

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four stacked horizontal bars of memory kept by the forward pass, for each pixel. In 32 bits the encoder has by far the largest part, and the backbone most of the rest; recomputing removes nearly all of both. In 16 bits the backbone's part is half as large and the encoder's two thirds; recomputing again leaves little."}}
figure, axis = plt.subplots(figsize=(7, 2.8))
rows = [r for r in runs if (r["height"], r["batch_size"]) == (400, 1)]
labels = [f"{r['bits']} bits, {r['way']}" for r in rows]
left = [0.0] * len(rows)
for part in PARTS:
    widths = [r["kept_by_forward"][part] / (r["height"] * r["width"]) / 1e3 for r in rows]
    axis.barh(labels, widths, left=left, label=part)
    left = [a + b for a, b in zip(left, widths, strict=True)]
axis.invert_yaxis()
axis.set(xlabel="kilobytes kept by the forward pass, for each pixel of the image")
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# *Figure {{n}}.5. What the forward pass leaves behind for the backward pass, by part of the model, for an
# image of 400 x 533; measured. (`input_proj` is the projection to one width, called `neck` in our state dict.)*
#
# In bfloat16 the backbone's part is halved. The encoder's part falls by a third only, because coordinates stay
# in float32 and the masks of dropout are bytes in either format. Autocast also keeps a copy in 16 bits of every
# weight that it uses, so that `input_proj`, which keeps little else, needs more memory in 16 bits and not less.

# %% tags=["hide-input"]
parts = {(r["bits"], r["way"]): r["kept_by_forward"] for r in rows}
before, short_numbers = parts[32, "keep"], parts[16, "keep"]
share = {part: round(short_numbers[part] / before[part], 1) for part in before}
print("memory in 16 bits as a part of that in 32:", share)
assert share["backbone"] == 0.5 < share["encoder"] < 0.8

# %% [markdown]
# > **Asked: out of memory, what now?** (fundamentalvision/Deformable-DETR #16, #168, #248.) Try this, in
# > this order: `gradient_checkpointing = true`, which changes no result; `batch_size = 1` with `accumulate`
# > raised by the same factor, which changes none either; `mixed_precision = "bf16"`, which rounds; and a smaller
# > image, which costs AP on small objects.
#
# ## {{n}}.4 Many processes
#
# With several GPUs, or several machines, every process has a copy of the model and its own images. This is
# called **distributed data parallel**, DDP {cite}`li2020ddp`. After the backward pass the gradients are
# **averaged** over the processes, so all copies take the same step. DDP runs on CPUs as well. The next cell
# starts two processes with a linear layer each; the first process has one object and the second has three.
# (For a whole training, `accelerate launch` starts them.)

# %%
PROGRAM = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

meeting, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(3, 1, bias=False))
objects = torch.arange(12.0).view(4, 3)
mine = objects[:1] if rank == 0 else objects[1:]
total = torch.tensor(float(len(mine)))
dist.all_reduce(total)  # now 4 in both
for name, number in (("own", len(mine)), ("mean", total.item() / dist.get_world_size())):
    model.zero_grad()
    (model(mine).square().sum() / number).backward()
    print(name, *model.module.weight.grad[0].tolist())
dist.destroy_process_group()
"""
command = [sys.executable, "-c", PROGRAM, str(folder / "meeting")]
environment = os.environ | {"OMP_NUM_THREADS": "1"}
pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in (0, 1)]
printed = [process.communicate(timeout=300) for process in processes]
assert all(process.returncode == 0 for process in processes), printed
assert printed[0][0] == printed[1][0]  # after the backward pass both have the same gradient
found = {name: [float(x) for x in row] for name, *row in map(str.split, printed[0][0].splitlines())}

# %% [markdown]
# In these two processes the loss was divided once by the process's `own` number of objects, and once by the
# `mean` number over processes. Before you run: which of the two is the gradient of one process that has all
# four objects?

# %%
_ = torch.manual_seed(0)
alone = nn.Linear(3, 1, bias=False)
objects = torch.arange(12.0).view(4, 3)
(alone(objects).square().sum() / 4).backward()
wanted = alone.weight.grad[0]
for name, values in found.items():
    print(f"{name:4} equal: {torch.allclose(torch.tensor(values), wanted, rtol=1e-4)}")
assert torch.allclose(torch.tensor(found["mean"]), wanted, rtol=1e-4)
assert not torch.allclose(torch.tensor(found["own"]), wanted, rtol=0.05)

# %% [markdown]
# It is the mean. The average over $P$ processes of $g_p / (N / P)$ is $\sum_p g_p / N$, which is the gradient
# of the whole batch. The library (`losses.criterion.count_boxes`) and the official code both divide by the mean
# number. It is the same rule as in section {{n}}.1, with processes in place of small batches. The library's
# whole trainer is tested in this way: two processes log the same losses as one process with twice the batch
# (`tests/test_train.py`).
#
# So a step of 32 images stays a step of 32 images, and the recipe's learning rate holds on any number of
# GPUs, as long as GPUs times `batch_size` times `accumulate` stays 32, as in the next table.

# %% tags=["hide-input"]
print("GPUs  batch_size  accumulate     lr")
for gpus in (16, 8, 4, 2, 1):
    accumulate = 32 // (2 * gpus)
    print(f"{gpus:>4} {PAPER.batch_size:>11} {accumulate:>11} {PAPER.lr:>6.0e}")
    assert gpus * PAPER.batch_size * accumulate == 32

# %% [markdown]
# And if the batch itself has to change? The usual first guess is a rate in proportion to the batch, because
# half as many images per step make twice as many steps {cite}`goyal2017onehour`. It is a guess: it was found
# for SGD. With Adam and its relatives the square root is often tried instead. Measure it on your data.

# %% tags=["hide-input"]
for batch in (8, 16, 32, 64):
    linear, root = 2e-4 * batch / 32, 2e-4 * math.sqrt(batch / 32)
    print(f"batch {batch:>2}: linear {linear:.1e}, root {root:.1e}")
assert load_recipe("modern").train.lr == 2e-4 * 16 / 32  # detrex trains 16 images a step

# %% [markdown]
# > **Asked: I have four GPUs, why is my AP lower?** (fundamentalvision/Deformable-DETR #8, #14, #77, #110.)
# > *Published* is an AP of 44.5 for batches of 32. One user reports 44.1 and 44.3 with batches of 32 and 43.5
# > with 64; another reports 37.4 with 16 on four GPUs. The paper's own figure for this model is 43.8. So a difference
# > of a few tenths need not have a reason in your settings. If yours is larger, count your images per step first.
#
# ## Exercise {{n}}.4  Plan a step
#
# *difficulty ●○○ · 10 minutes · 4 lines*
#
# You are given the number of GPUs, how many images fit on one of them, and the `total` of images per step.
# Return `(batch_size, accumulate)` with **exactly** `total` images per step and as few batches as possible;
# return `None` where that cannot be done.


# %% tags=["exercise"]
def plan(gpus, fits, total=32):
    """Returns two integers, or None."""
    # BEGIN SOLUTION
    for batch_size in range(fits, 0, -1):
        if total % (gpus * batch_size) == 0:
            return batch_size, total // (gpus * batch_size)
    return None
    # END SOLUTION


check("training_at_every_size.4", plan)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Try the largest batch first, and go down.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# It fits if `gpus * batch_size` divides `total`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# On 3 GPUs there is no step of 32 images. Rounding would change the batch silently.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 The budget: memory
#
# How much memory will a training need? Four things fill it. Three of them are *computed* from the number of
# parameters: weights, gradients, and AdamW's two averages, four bytes per number. The fourth is what the
# forward pass keeps. The next cell counts the paper's base model on the *meta* device, where tensors have
# shapes but no numbers. As a check, it compares the memory between two steps with a measurement. (At that moment
# there are weights and averages, but no gradients, since `zero_grad` frees them.)

# %%
with torch.device("meta"):
    base = DeformableDETR(DeformableDETRConfig())
weights = sum(p.numel() for p in base.parameters())
trainable = sum(p.numel() for p in base.parameters() if p.requires_grad)
budget = {"weights": 4 * weights, "gradients": 4 * trainable, "AdamW": 8 * trainable}
for name, size in budget.items():
    print(f"{name:10} {size / 1e6:4.0f} MB")
between = budget["weights"] + budget["AdamW"] + 13 * 800 * 1066  # and an image with its mask
print(
    f"between two steps: computed {between / 1e6:.0f}, measured {full['between_steps'] / 1e6:.0f} MB"
)
assert abs(between / full["between_steps"] - 1) < 0.01

# %% [markdown]
# The fourth part should grow in proportion to the pixels, except for what the decoder keeps for its 300 queries,
# since there are 300 in an image of any size. So the peak, drawn over the number of pixels, should be a straight line.
# The next cell draws it through two measured sizes, and does the same for the decoder's part alone. Where this second
# line meets zero pixels, it shows what the queries need.


# %%
def line(way, measure):
    """Through two sizes (one image, float32): the value at zero pixels, and the slope per pixel."""
    large, small = (
        measure(r)
        for height in (800, 400)
        for r in runs
        if (r["way"], r["height"], r["bits"], r["batch_size"]) == (way, height, 32, 1)
    )
    slope = (large - small) / (800 * 1066 - 400 * 533)
    return large - slope * 800 * 1066, slope


lines = {way: line(way, lambda r: r["peak_tensors"]) for way in ("keep", "recompute")}
queries = {way: line(way, lambda r: r["kept_by_forward"]["decoder"])[0] for way in lines}
for way, (start, slope) in lines.items():
    text = f"{way:9} {start / 1e6:.0f} MB and {slope:.0f} bytes per pixel,"
    print(text, f"the queries {queries[way] / 1e6:.0f} MB of it")

# %% [markdown]
# What is left at zero pixels can be explained. When everything is kept, the peak comes at the end of the forward pass.
# Then there are weights, AdamW's averages and what the queries need, and the backbone's weights a second time, because
# each is multiplied by its frozen batch norm and the product is kept. (The gradients come later.)

# %% tags=["hide-input"]
twice = 4 * sum(p.numel() for p in base.backbone.parameters())
fixed = budget["weights"] + budget["AdamW"]
print(f"computed for zero pixels: {(fixed + twice + queries['keep']) / 1e6:.0f} MB")
assert abs((fixed + twice + queries["keep"]) / lines["keep"][0] - 1) < 0.03
assert 0 < lines["recompute"][0] - fixed < budget["gradients"]

# %% [markdown]
# Does the line also predict a size through which it was not drawn, and two images instead of one?


# %%
def peak(way, images, height, width):
    """The computed peak in bytes."""
    start, slope = lines[way]
    return start + (images - 1) * queries[way] + slope * images * height * width


others = [r for r in runs if (r["height"], r["batch_size"]) in ((600, 1), (400, 2))]
for r in others:
    size = r["batch_size"], r["height"], r["width"]
    measured_peak = r["peak_tensors"]
    print(f"{size}: {peak('keep', *size) / 1e9:.2f} GB, measured {measured_peak / 1e9:.2f} GB")
    assert abs(peak("keep", *size) / measured_peak - 1) < 0.03

# %% [markdown]
# That is near enough to plan with. *Computed* for the largest images, 800 x 1333:

# %%
print("images on a GPU      1     2     4     8")
for way in lines:
    needs = [peak(way, images, 800, 1333) / 1e9 for images in (1, 2, 4, 8)]
    print(f"{way:14}", *(f"{need:5.1f}" for need in needs), "GB")
assert needs[0] < 2.5

# %% [markdown]
# Leave a good part of a card free on top of this: its libraries, the work space of convolutions and the gaps
# between tensors are not in here. And measure with two steps before you start fifty epochs.
#
# ## {{n}}.6 The budget: hours
#
# *Published* are 325 GPU hours on V100s, for 50 epochs of COCO's 118,287 images. Everything else in this section
# is *computed* from that.


# %%
def hours(images, epochs, images_per_second, gpus=1):
    """Of the clock, if GPUs do not wait for each other."""
    return images * epochs / (images_per_second * gpus) / 3600


COCO = 118_287
v100 = COCO * 50 / (325 * 3600)
print(f"one V100: {v100:.2f} images a second")
for gpus in (1, 2, 4, 8, 16):
    print(f"{gpus:>2} GPUs: {hours(COCO, 50, v100, gpus):4.0f} hours")
assert math.isclose(hours(COCO, 50, v100, 8) * 8, 325)
print(f"300 own images, 50 epochs, one GPU: {60 * hours(300, 50, v100):.0f} minutes")

# %% [markdown]
# That supposes that GPUs do not wait for one another. But in each step they exchange gradients. In a ring of
# $P$ processes, each sends $2\frac{P-1}{P}$ times the bytes of the gradient. For $P = 8$, and with an *assumed*
# 10 GB/s between them:

# %%
sent = 2 * 7 / 8 * budget["gradients"]
step_time = 2 / v100  # two images
print(f"each sends {sent / 1e6:.0f} MB: {1000 * sent / 10e9:.0f} ms of a step of {step_time:.2f} s")
assert sent / 10e9 < 0.1 * step_time

# %% [markdown]
# That is little, and the exchange overlaps with the backward pass.
#
# How long will it take on another card, or on this CPU? Count the work. A forward pass at the paper's image size
# takes 173 G multiply-adds (`deformable-detr info` counts them). The backward pass needs two products for each
# one of the forward pass, one for the gradient of the inputs and one for the gradient of the weights. The next
# cell counts that as well, on tensors without data.

# %%
with FakeTensorMode():
    state = {
        name: torch.empty(tensor.shape, requires_grad=tensor.requires_grad)
        for name, tensor in [*base.named_parameters(), *base.named_buffers()]
    }
    with FlopCounterMode(display=False, depth=5) as counter:  # names down to the backbone's stages
        output = functional_call(base, state, (make_batch(PAPER_SIZE),))
        forward = counter.get_total_flops() / 2
        by_part = {name: sum(each.values()) / 2 for name, each in counter.get_flop_counts().items()}
        (output.logits.sum() + output.boxes.sum()).backward()
work = counter.get_total_flops() / 2
recomputed = ["encoder", "decoder", *(f"backbone.body.layer{stage}" for stage in (2, 3, 4))]
again = sum(by_part[f"DeformableDETR.{name}"] for name in recomputed)
print(f"forward {forward / 1e9:.0f} G, step {work / 1e9:.0f} G: {work / forward:.1f} times")
print(f"what recomputing adds: {again / 1e9:.0f} G, {100 * again / work:.0f} % of a step")
assert 2.7 < work / forward < 3.05 and 0.25 < again / work < 0.4

# %% [markdown]
# It is a little less than three times the forward pass, since the frozen parts need no gradient of their
# weights. A multiply-add is two operations, so the measured seconds give the speed:

# %%
pixels = full["height"] * full["width"] / math.prod(PAPER_SIZE)
rate = 2 * work * pixels / full["cpu_seconds"] / 1e9
print(f"this core, measured: {rate:.0f} GFLOP/s")
upper = 2 * work * v100 / 1e12
print(f"a V100, from the published hours: up to {upper:.1f} of the data sheet's 15.7 TFLOP/s")
years = hours(COCO, 50, 1 / full["cpu_seconds"]) / 24 / 365
print(f"the paper's training on this core: {years:.1f} years")
assert 3 < years < 6 and 3 < upper < 15.7

# %% [markdown]
# ("Up to", because most training images are smaller than the paper's size.) That last line is why this book
# trains on digits.
#
# For another GPU, time ten steps on it, put its images per second into `hours`, and believe the result before you
# believe any data sheet.

# %% tags=["hide-input"]
temporary.cleanup()

# %% [markdown]
# ## {{n}}.7 The same from the command line
#
# ```
# deformable-detr train COCO --recipe paper --accumulate 16 --output runs/paper       # one GPU
# accelerate launch --num_processes 8 -m deformable_detr.cli \
#     train COCO --recipe paper --accumulate 2 --output runs/paper                    # eight
# ```
#
# If memory is short, add `--gradient-checkpointing`, or `--mixed-precision bf16`, or `--batch-size 1` with twice
# the `--accumulate`. (These two commands were not run here on COCO.)
#
# ## Summary
#
# - The images per step and the learning rate belong together. GPUs, batches and accumulation only share them
#   out.
# - Divide by the number of boxes of the whole step, over batches and over processes. A mean of means is wrong.
# - bfloat16 is for products, float32 for coordinates. float16 needs a scale, and unscaling before clipping.
# - Recomputing more than halves the memory at COCO's image size, for a third more work, and changes no gradient.
# - Memory is 12 to 16 bytes per weight, and a number of bytes per pixel that two measurements give. Time is images
#   divided by throughput.
#
# > **Differs from the paper.** Accumulation, mixed precision and checkpointing are not in it, and neither is the
# > number of GPUs: 16 is what the official code was run with. **Differs from the official code.** There, batch and
# > rate are arguments that do not know of each other, nothing accumulates, and the operator has no half
# > precision.
#
# ## Further reading
#
# - {cite}`micikevicius2018mixed`: mixed precision and the scale.
# - {cite}`chen2016checkpointing`: recomputing, and how few layers one must keep.
# - {cite}`goyal2017onehour`: large batches, linear rates and warm-up.
# - {cite}`li2020ddp`: how DDP overlaps communication with the backward pass.
