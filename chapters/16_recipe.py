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
# - **say** what each number of a training recipe does, and which one to touch first,
# - **group** parameters by how fast they learn, and draw the schedule that they follow,
# - **predict** what clipping a gradient does to AdamW's steps, and what it does not do,
# - **average** weights over steps, and stop a training that no longer gains,
# - **test** a model before its first hour of training.
#
# You should know: {{chapter matching_and_loss}} and {{chapter training}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# A recipe is a small file of numbers: how many images go into a step, how long the step is, when steps
# become shorter. With the same model and the same images, one recipe may train a good detector and another
# one a bad one, and nothing in the model will tell you why. This chapter goes through the numbers one by one.
# For each it asks what the number does, and tests the answer on something small
# enough to be computed by hand. How the same recipe runs on other machines, on one GPU or on eight, is
# the subject of {{chapter training_at_every_size}}.

# %% tags=["hide-input"]
import copy
import dataclasses
import math
import tempfile
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from deformable_detr import DeformableDETR, DeformableDETRConfig, ms_deform_attn
from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.data.transforms import digits_eval_transform
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

# %% tags=["hide-input"] mystnb={"image": {"alt": "One training step as a chain of seven boxes: batch, loss, gradient, clipped, AdamW, weights, average. Under each box stand the numbers of a recipe that act there, for example clip_norm under clipped. A line leads from the weights back to the next batch."}}
from schematics.recipe import one_step

one_step()

# %% [markdown]
# *Figure {{n}}.1. One training step, and which number of the recipe acts where. This chapter begins with the
# rates that AdamW uses and with their schedule. Then come clipping and the average.*
#
# ## {{n}}.1 What stands in a recipe
#
# The library's recipes lie in `deformable_detr/training/recipes`, one file each, with a reason beside
# every value that needs one. A value that a recipe does not mention is the paper's. The next cell
# compares four recipes and prints the rows in which they differ: the paper's, a more recent one for
# COCO, one for small data sets, and the one behind the digits' detector (which may have been trained for
# more epochs than the file's 12: `data/checkpoints/digits.json` has what was used). A 0 for `warmup_steps`,
# `ema_decay` or `patience` switches it off, and None for `frozen` means the default.

# %%
names = ("paper", "modern", "small-data", "digits")
recipes = {name: load_recipe(name).train for name in names}
print(f"{'':20}", *(f"{name:>12}" for name in names))
for field in dataclasses.fields(PAPER):
    values = [str(getattr(recipe, field.name)) for recipe in recipes.values()]
    if len(set(values)) > 1:
        print(f"{field.name:20}", *(f"{value:>12}" for value in values))

# %% [markdown]
# The next table says what each number does, and in which situation it is the one to change.
#
# | number | what it does | when to change it |
# |:--|:--|:--|
# | `epochs` | how often each image is seen; the time is proportional to it | 50 on COCO; more when there are few images |
# | `batch_size`, `accumulate` | images held at once; batches that make one step | when memory is short ({{chapter training_at_every_size}}) |
# | `lr` | the length of a step | together with the batch; lower, to keep what was learned before |
# | `backbone_lr` | the same for the backbone | a tenth of `lr` if the backbone comes trained |
# | `sampling_lr_factor` | slows the parameters that decide *where* to sample | the paper uses 0.1; others use 1 |
# | `weight_decay` | pulls every weight towards zero {cite}`loshchilov2019adamw` | hardly ever |
# | `clip_norm` | bounds the length of the gradient | hardly ever |
# | `schedule`, `drop_epoch` | when the rate falls | take the cosine if you do not know when to drop |
# | `giou_weight` | the weight of the boxes' overlap in the loss ({{chapter matching_and_loss}}) | when objects are found but boxes fit badly |
# | `warmup_steps` | makes the first steps shorter | when heads are new |
# | `frozen` | parts that do not learn; by default a ResNet's `conv1` and `layer1` | freeze more when there are fewer images |
# | `ema_decay`, `patience` | average the weights; stop when AP no longer rises | when there are few images |
# | `mixed_precision` | computes with shorter numbers | on a GPU, `bf16` |
# | `gradient_checkpointing` | computes intermediate results again instead of keeping them | when memory is short |
# | `top_k` | detections per image that an evaluation counts | when images are crowded |

# %% [markdown]
# ## {{n}}.2 Three rates
#
# Not every parameter learns at the same rate. The official code sorts parameters into three groups by
# their names: the backbone; the layers that decide where to sample, which are the sampling offsets and
# the reference points; and the rest. The paper's rate is 2e-4 for the rest and a tenth of that for the
# other two.
#
# Why go slowly? For the backbone the reason is clear: it was trained on ImageNet, and long steps would
# destroy what it knows. For the sampling layers the paper gives no reason, and other projects do without
# a lower rate (the recipe `modern` does). But one danger is easy to see. A sampling point that has left the
# map reads zeros, and moving it a little changes nothing, so the gradient with respect to its position is
# zero too. Nothing that this point reads can bring it back. (Other points may, since all queries share the
# layer that makes the offsets.) The next cell shows the two gradients, of one point inside the map and one
# beyond it.

# %%
place = torch.tensor([[0.5, 0.5], [1.3, 0.5]], requires_grad=True)  # (x, y): inside, beyond
value = torch.randn(1, 5 * 7, 1, 2)  # (B, S, M, D)
weights = torch.ones(1, 2, 1, 1, 1)
ms_deform_attn(value, [(5, 7)], place.view(1, 2, 1, 1, 1, 2), weights).sum().backward()
print("inside, the gradient is not zero:", bool(place.grad[0].abs().sum() > 0))
print("beyond, it is", place.grad[1].tolist())
assert place.grad[0].abs().sum() > 0 == place.grad[1].abs().sum()

# %% [markdown]
# ## Exercise {{n}}.1  Three groups
#
# *difficulty ●○○ · 10 minutes · 6 lines*
#
# Count the parameters of each group. Return a dictionary with the keys `"rest"`, `"backbone"` and
# `"sampling"`, and as values the numbers of **trainable** elements. A name that starts with
# `backbone.` belongs to the backbone; otherwise, a name that contains `sampling_offsets` or
# `reference_points` belongs to sampling.


# %% tags=["exercise"]
def group_sizes(model):
    """model: an nn.Module. Returns {"rest": int, "backbone": int, "sampling": int}."""
    # BEGIN SOLUTION
    sizes = {"rest": 0, "backbone": 0, "sampling": 0}
    for name, parameter in model.named_parameters():
        slow = "sampling_offsets" in name or "reference_points" in name
        kind = "backbone" if name.startswith("backbone.") else "sampling" if slow else "rest"
        sizes[kind] += parameter.numel() if parameter.requires_grad else 0
    return sizes
    # END SOLUTION


check("recipe.1", group_sizes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `model.named_parameters()` gives names and parameters; `parameter.numel()` counts elements.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Ask for the backbone first, then for the two words of sampling. What is left is the rest.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Frozen parameters (`requires_grad` is False) do not learn and do not count. Or you asked for
# `sampling_offsets` before you asked for the backbone: a backbone may contain one as well.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Here are the three groups of the paper's base model, from the library. The model is made on PyTorch's
# *meta* device: there it has shapes but no numbers, so that forty million parameters cost nothing.

# %%
with torch.device("meta"):
    base = DeformableDETR(DeformableDETRConfig())
groups = parameter_groups(base, PAPER)
for kind, group in zip(("rest", "backbone", "sampling"), groups, strict=True):
    count = sum(parameter.numel() for parameter in group["params"])
    print(f"{kind:9} {count:>10,} parameters, rate {group['lr']:.0e}")

# %% tags=["hide-input"]
counts = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
assert counts[2] == 790_018 and sum(counts) == 39_847_265
print(f"sampling: {100 * counts[2] / sum(counts):.0f} % of {sum(counts) / 1e6:.1f} million")

# %% [markdown]
# So 2 % of the parameters decide where the model samples. (The groups hold the parameters that learn. The
# model has 40.1 million; the 0.2 million of the ResNet's frozen `conv1` and `layer1` are in no group.)
#
# ## {{n}}.3 The schedule
#
# All three rates follow one schedule, which multiplies them by the same factor. There are two kinds. A
# *step* schedule keeps the rate and drops it to a tenth once, late in the training. A *cosine* lets it fall
# smoothly to a hundredth. Either may begin with a **warm-up**, in which the rate rises: in the first steps
# the heads are random, so their gradients are of little use to the other layers, and short steps do less
# damage.

# %% mystnb={"image": {"alt": "Four learning rates over the course of a training, on a logarithmic axis. The paper's and the modern one are flat and drop to a tenth at four fifths; the small-data and digits rates rise at once and fall as half a cosine."}}
figure, axis = plt.subplots(figsize=(7, 3))
for (name, recipe), style in zip(recipes.items(), ("-", "--", "-", "--"), strict=True):
    steps = range(0, 100 * recipe.epochs, 5)
    rates = [recipe.lr * lr_factor(s, 100 * recipe.epochs, 100, recipe) for s in steps]
    axis.plot([s / len(steps) / 5 for s in steps], rates, style, label=name)
axis.set(xlabel="fraction of the training", ylabel="learning rate", yscale="log", ylim=(4e-7, 2e-3))
axis.legend(ncols=2)
plt.show()

# %% [markdown]
# *Figure {{n}}.2. The four schedules, drawn for 100 steps per epoch. Two of them have to know at which
# epoch to drop; the cosines only have to know where the training ends.*
#
# The low rate at the end matters, too. With long steps the weights jump around a good place (Figure {{n}}.5
# will show it); with short ones they settle into it. So do not judge a recipe by its AP in the middle of the
# schedule: part of the gain comes only when the rate falls.
#
# ## {{n}}.4 Clipping
#
# The gradients of all parameters together form one long vector. If this vector is longer than
# `clip_norm`, it is shortened to that length. Its direction stays as it was.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, three arrows from one point, two of them longer than a dashed circle. Right, the same arrows: the two long ones now end on the circle in their old direction, the short one is unchanged."}}
from schematics.recipe import clipping

clipping()

# %% [markdown]
# *Figure {{n}}.3. Clipping shortens the long gradients to the radius of the circle and leaves the short
# ones alone.*
#
# By hand: a gradient of (3, 4) has the length 5. Clipped at 0.1 it is (0.06, 0.08).

# %%
wild = torch.tensor([3.0, 4.0])
by_hand = wild * min(1.0, 0.1 / wild.norm().item())
weight = nn.Parameter(torch.zeros(2))
weight.grad = wild.clone()
norm = nn.utils.clip_grad_norm_([weight], 0.1)
print(f"norm {norm.item():.1f}, clipped to {[round(x, 3) for x in by_hand.tolist()]}")
torch.testing.assert_close(weight.grad, by_hand)

# %% [markdown]
# The official code clips at 0.1. Is that much or little? It depends on how long gradients are. The next
# cell takes the digits' detector with random weights and trains it for 24 steps. (It trains on *val*, which is
# allowed only because nothing will be measured on these images afterwards.)

# %%
digits = CocoDataset(*find_split(Path("../data/digits"), "val"), digits_eval_transform())
shipped, _ = load_model("../data/checkpoints/digits.safetensors")
recipe = dataclasses.replace(recipes["digits"], warmup_steps=10)
temporary = tempfile.TemporaryDirectory()
training = Training(
    DeformableDETR(shipped.config), digits, None, Path(temporary.name), recipe, progress=False
)
norms = []
for batches in islice(training.batches(), 24):
    norms.append(train_step(training, batches)["gradient_norm"])
    training.step += 1

# %% mystnb={"image": {"alt": "The gradient's norm in the first 24 steps of a training, on a logarithmic axis: between four and about twenty, far above two dashed lines at 0.5 and 0.1."}}
figure, axis = plt.subplots(figsize=(7, 2.8))
axis.plot(range(1, 25), norms, "o-")
for bound, text in ((0.5, "digits: 0.5"), (0.1, "paper: 0.1")):
    axis.axhline(bound, color="C1", ls="--")
    axis.text(24.5, bound * 1.15, text, color="C1", ha="right")
axis.set(xlabel="step", ylabel="gradient's norm", yscale="log", ylim=(0.05, None))
plt.show()

# %% [markdown]
# *Figure {{n}}.4. The gradient's length before clipping, in the first 24 steps.*

# %% tags=["hide-input"]
assert min(norms) > 5 * recipe.clip_norm
print("every one of these 24 gradients is clipped, to a fifth of its length or less")

# %% [markdown]
# In these steps clipping is no safety net for rare accidents: it acts each time. Does that make each
# step much shorter? It does not, because of AdamW. AdamW divides a gradient by its own usual size
# before it takes a step, so a constant factor cancels. The next cell gives it the same gradient twice,
# once as it is and once divided by a hundred.

# %%
moved = []
for scale in (1.0, 0.01):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    weight.grad = scale * torch.tensor([3.0, 4.0])
    optimizer.step()
    moved.append(1 - weight.detach())
    print(f"gradient times {scale:4}: moved by {[round(x, 4) for x in moved[-1].tolist()]}")
torch.testing.assert_close(*moved)

# %% [markdown]
# So what does clipping do? It gives every step the same weight in AdamW's two running averages, the one of
# gradients and the one of their squares. Without it, a batch with a gradient of a hundred times the usual
# length counts a hundredfold in the first average and ten thousandfold in the second. The first one forgets
# within tens of steps ($\beta_1 = 0.9$). The second one, by whose root AdamW divides, forgets slowly
# ($\beta_2 = 0.999$), so it stays too large for a long time.
#
# Before you run: all gradients are 1, except a single one of 100. How long is a step, as a part of the
# learning rate, at this gradient, and 20, 200 and 1,500 steps later?

# %%
LATER = (0, 20, 200, 1500)
after = {}
for name, bound in (("unclipped", 1e9), ("clipped at 1", 1.0)):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    walked = []
    for step in range(2001):
        weight.grad = torch.tensor([100.0 if step == 500 else 1.0])
        nn.utils.clip_grad_norm_([weight], bound)
        before = weight.item()
        optimizer.step()
        walked.append(before - weight.item())
    after[name] = [walked[500 + steps] for steps in LATER]
    print(f"{name:12}:", *(f"{length:.2f}" for length in after[name]))

# %% tags=["hide-input"]
assert min(after["clipped at 1"]) > 0.99 and after["unclipped"][0] > 2
assert max(after["unclipped"][1:3]) < 0.5 < after["unclipped"][3] < 0.6
print("its own step is twice as long as the rate; 20 and 200 steps later it is less than half")

# %% [markdown]
# Without clipping, one wild gradient thus does harm twice: its own step is too long, and after 1,500 steps the
# steps have only come back to half of their length. With clipping, every step has its full length.

# %% [markdown]
# ## {{n}}.5 Averaged weights, and when to stop
#
# With small batches each gradient is noisy, and the weights jitter around a good place instead of
# resting in it. Their average over the last steps lies nearer to it {cite}`polyak1992averaging`. An
# **exponential moving average** keeps a part $d$ of itself and takes $1-d$ of the new weights at each
# step. It remembers about $1/(1-d)$ steps. The next cell lets one weight look for the minimum of
# $(w-1)^2/2$ from noisy gradients.

# %%
_ = torch.manual_seed(3)
w, average, path = torch.tensor(4.0), torch.tensor(4.0), []
for _step in range(300):
    slope = (w - 1) + 1.5 * torch.randn(())  # of (w - 1)^2 / 2, from a noisy batch
    w = w - 0.3 * slope
    average = 0.95 * average + 0.05 * w
    path.append((w.item(), average.item()))
jitter, calm = torch.tensor(path)[100:].sub(1).square().mean(0).sqrt().tolist()
print(f"distance from the minimum: weights {jitter:.2f}, average {calm:.2f}")
assert calm < 0.6 * jitter

# %% mystnb={"image": {"alt": "A weight over 300 noisy steps: it falls from 4 to 1 and goes on jumping by about half; its moving average falls a little later and then stays near 1."}}
figure, axis = plt.subplots(figsize=(7, 2.6))
axis.plot([p[0] for p in path], lw=0.8, label="weight")
axis.plot([p[1] for p in path], label="average, d = 0.95")
axis.axhline(1, color="C6", ls=":")
axis.set(xlabel="step", ylabel="value")
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.5. A weight in noise, and its average. At first the average is late, because it still
# remembers the start.*
#
# To be less late, the library begins with a short memory: after $n$ updates it keeps the part
# $\min\big(d, \frac{1+n}{10+n}\big)$, which is small at first and reaches $d$ soon. There is one trap.
# A model consists of parameters and of *buffers*, such as the running means of a batch norm. The buffers
# belong to the weights, and must be averaged with them.
#
# ## Exercise {{n}}.2  Average a model
#
# *difficulty ●●○ · 15 minutes · 7 lines*
#
# Update an averaged copy in place: parameters **and** buffers, with the formula above. What is not a
# floating-point number, such as a count of batches, is copied instead of averaged.


# %% tags=["exercise"]
@torch.no_grad()
def update_average(average, model, decay, updates):
    """average, model: alike; updates: how many came before, at least 1."""
    # BEGIN SOLUTION
    keep = min(decay, (1 + updates) / (10 + updates))
    new = model.state_dict()
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():
            mean.copy_(keep * mean + (1 - keep) * new[name])
        else:
            mean.copy_(new[name])
    # END SOLUTION


check("recipe.2", update_average)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `state_dict()` has parameters and buffers, and its tensors are the model's own: `copy_` changes them.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `mean.copy_(keep * mean + (1 - keep) * new)`, with `keep` from the formula above.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You went over `parameters()`. Batch norm's running mean and variance are buffers.
#
# </details>
#
# {{solution}}

# %% [markdown]
# The library's average, `training.optimiser.averaged`, does the same, except that its first update is
# a plain copy. Here both run beside each other for twenty updates.


# %%
def test_average_by_hand_is_the_library():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    library, hand = averaged(net, decay=0.6), copy.deepcopy(net)
    for updates in range(20):
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        net(torch.randn(8, 3))
        keep = min(0.6, (1 + updates) / (10 + updates)) if updates else 0.0  # the first is a copy
        for name, mean in hand.state_dict().items():
            new = net.state_dict()[name]
            mean.copy_(keep * mean + (1 - keep) * new if mean.is_floating_point() else new)
        library.update_parameters(net)
    for name, mean in hand.state_dict().items():
        torch.testing.assert_close(library.module.state_dict()[name], mean)
    print(f"equal in all {len(hand.state_dict())} tensors after 20 updates")


test_average_by_hand_is_the_library()

# %% [markdown]
# When `ema_decay` is set, the average is what is evaluated and saved.
#
# When should a training stop? `patience` is the number of evaluations in a row without a new best AP
# after which a run ends; the best weights are kept in `best.safetensors`. Before you run: after how many
# evaluations does the run below stop with a patience of 3, and with 4?


# %%
def stops_after(history, patience):
    """The number of evaluations that a run makes."""
    best, stale = -1.0, 0
    for number, ap in enumerate(history, start=1):
        stale = 0 if ap > best else stale + 1
        best = max(best, ap)
        if stale == patience:
            return number
    return len(history)


history = [0.21, 0.30, 0.29, 0.33, 0.33, 0.32, 0.31, 0.35, 0.36]
for patience in (3, 4):
    print(f"patience {patience}: {stops_after(history, patience)} of {len(history)} evaluations")
assert stops_after(history, 3) == 7 and stops_after(history, 4) == 9

# %% [markdown]
# With a patience of 3 this run stops too early and misses its best value; with 4 it goes on to the end. AP on a
# few hundred images is noisy, so choose a patience that survives a few evaluations of bad luck.
#
# ## {{n}}.6 The loss stays high. What is wrong?
#
# This is the question that users of DETR and its descendants ask most often, with a few hundred images
# of their own (fundamentalvision/Deformable-DETR #138 and #247; facebookresearch/detr #9 and #125). It
# can have three different causes. Ask for them in this order.
#
# **Does it start right?** Every class starts with a score of 0.01 ({{chapter matching_and_loss}}). Then
# the focal loss of a matched query is $0.25 \cdot 0.99^2 \cdot \ln 100$, all other queries add nearly
# nothing, and the sum is divided by the number of objects. So the class loss at the start is known
# beforehand, whatever the images are: it is that number, times the weight of this loss, which is 2.

# %%
criterion = SetCriterion()
batch = collate([digits[i] for i in range(4)])
with torch.no_grad():
    start = criterion(DeformableDETR(shipped.config)(batch), batch.targets)
expected = 2 * 0.25 * 0.99**2 * math.log(100)
print(f"class loss at the start: {start['loss_class'].item():.2f}, expected {expected:.2f}")
assert abs(start["loss_class"] - expected) < 0.2

# %% [markdown]
# Now the same model with a mistake that is easily made: its class heads were replaced, and the bias of
# the new heads is 0, so that every score starts at 0.5.

# %%
lost = DeformableDETR(shipped.config)
with torch.no_grad():
    for head in lost.class_heads:
        head.bias.zero_()
    without = criterion(lost(batch), batch.targets)["loss_class"].item()
print(f"with biases of 0: {without / expected:.0f} times the expected loss")
assert without > 3 * expected

# %% [markdown]
# The paper's model has 300 queries and 91 classes. There, each of the 27,300 scores adds
# $0.75 \cdot 0.5^2 \cdot \ln 2 = 0.13$, and with seven objects in an image the loss starts at about 450 times the
# expected one. So a class loss that starts too high means that the prior of 0.01 was lost: the head comes from another
# project, or its bias is 0.
#
# **Does it fall at all?** If it starts right and does not fall, something is wrong with the data or with
# the recipe, and `deformable-detr doctor` ({{chapter your_own_data}}) finds out which.
#
# **Does it fall on the training images only?** Then there are too few images for random weights. Start
# from published weights (`--recipe small-data`), or from any detector at hand (`--init`). From scratch,
# users of DETR report success with 10,000 images or more.
#
# ## Exercise {{n}}.3  Before the first hour
#
# *difficulty ●●○ · 30 minutes · 13 lines*
#
# Write the test that you will want to run before every training from now on. Take one batch through
# model and criterion, forward and backward, **in training mode**, and return a dictionary with
# - `"class_loss"`: the class loss of the last layer (`losses["loss_class"]`) divided by the expected one,
# - `"gradient_norm"`: the length of the gradient of all parameters together, unclipped,
# - `"silent"`: the names of trainable parameters that got **no gradient at all** (`grad` is None).
#
# Old gradients must not count.


# %% tags=["exercise"]
def before_training(model, criterion, batch):
    """model: a detector; batch: a Batch with targets. Returns a dictionary as described above."""
    # BEGIN SOLUTION
    model.train()
    model.zero_grad()
    losses = criterion(model(batch), batch.targets)
    sum(losses.values()).backward()
    expected = 2 * 0.25 * 0.99**2 * math.log(100)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    silent = [name for name, p in learning.items() if p.grad is None]
    norm = nn.utils.clip_grad_norm_(learning.values(), math.inf).item()
    return {
        "class_loss": losses["loss_class"].item() / expected,
        "gradient_norm": norm,
        "silent": silent,
    }
    # END SOLUTION


check("recipe.3", before_training)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `losses = criterion(model(batch), batch.targets)` is a dictionary; the sum of its values has the graph.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `nn.utils.clip_grad_norm_(parameters, math.inf)` returns the length and shortens nothing.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Set old gradients to None first (`model.zero_grad()`), and do not list parameters that are frozen:
# they have no gradient either, but they are not meant to.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Keep it: a value near 1 for the class loss, a finite length, and an empty list say that a training may
# begin. The library's `doctor` asks for finite gradients and for silent parameters too, and it examines the data as
# well ({{chapter your_own_data}}).

# %% tags=["hide-input"]
temporary.cleanup()

# %% [markdown]
# ## Summary
#
# - Rates belong to groups of parameters, and all follow one schedule. The low rate at its end matters, too.
# - Clipping acts in every early step. It hardly shortens AdamW's steps; it keeps one wild batch from shortening
#   the next thousand.
# - An average of weights is calmer than the weights; buffers belong to it.
# - The class loss at the start is known: 2.26. Ten times as much means that the prior was lost.
#
# > **Differs from the paper.** The paper says Adam and does not mention clipping or averaging; the
# > official code has AdamW and clips at 0.1. **Differs from the official code.** It has no cosine, no
# > warm-up and no average of weights; those are the library's, for few images.
#
# ## Further reading
#
# - {cite}`loshchilov2019adamw`: why weight decay belongs outside the gradient.
# - {cite}`polyak1992averaging`: why averages of weights are good.
