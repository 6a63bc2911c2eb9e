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
# # {{n}}. What attention costs on images
#
# You will be able to
# - **show** on a task with a known answer that attention learns later when there are more cells,
# - **count** the work and the memory of attention on a feature map, at any stride,
# - **write** attention that never holds its matrix of weights,
# - **say** why small objects suffer first, and what can be done about it.
#
# You should know: {{chapter attention}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# The paper on Deformable DETR {cite}`zhu2021deformable` names two faults of dense attention on
# images: it learns slowly, and it is too expensive for maps that are fine enough to show small
# objects. Both come from one fact. On an image the keys are the cells of a feature map, and there
# are *many* cells. Halving the stride gives four times as many cells. In DETR's encoder
# {cite}`carion2020detr` every cell is compared with every cell, so the number of pairs even grows
# sixteenfold.

# %% tags=["hide-input"]
import itertools
import json
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr.exercises import check

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% tags=["hide-input"] mystnb={"image": {"alt": "The running example with the grid of its cells at strides 32, 16 and 8, which are 16, 64 and 256 cells. Below each, a square whose sides are the numbers of queries and keys, all to the same scale: 256, 4,096 and 65,536 pairs. The first is a speck, the last fills its panel."}}
from schematics.attention_on_images import what_grows

what_grows()

# %% [markdown]
# *Figure {{n}}.1. What to see: the running example, a picture of only 128 x 128 pixels, cut into cells at
# three strides (above). Below each, the matrix of attention weights, one row per query and one column per
# key, all drawn to the same scale. At stride 8 the seven has a shape, but the matrix has 256 times as
# many entries as at stride 32.*
#
# We look at three costs, one after another: the time to learn, the computation, and the memory. Then we
# see why small objects pay most.
#
# ## {{n}}.1 A task whose answer we know
#
# {{chapter attention}} ended with a prediction: the more cells there are, the longer it takes until
# the gradient of the right cell stands out. If that is so, one should *see* learning slow down when
# a map has more cells, although the task stays the same. To test this, we need a task for which we
# know where attention must look.
#
# Every cell of a map holds a **shape** (one of 8) in a **colour** (one of 5). Three of the shapes
# are special. We call them the marks: each is in exactly one cell of a map. All other cells are
# clutter. Query $i$ must name the colour of mark $i$. Nobody tells it where the mark is, nor what it
# looks like. In the code, shapes 0, 1 and 2 are the marks: every cell first gets one of the other
# shapes, and then three different random cells get the marks.

# %%
SHAPES, MARKS, COLOURS, WIDTH = 8, 3, 5, 32


def draw_maps(num_cells, generator, count=32):
    """Random maps: content (count, N), which is shape * COLOURS + colour; places (count, 3)."""
    shape = torch.randint(MARKS, SHAPES, (count, num_cells), generator=generator)
    places = torch.rand(count, num_cells, generator=generator).topk(MARKS).indices
    shape.scatter_(1, places, torch.arange(MARKS).expand(count, -1))
    colour = torch.randint(COLOURS, (count, num_cells), generator=generator)
    return shape * COLOURS + colour, places


# %% tags=["hide-input"] mystnb={"image": {"alt": "A map of 4 rows and 16 columns. Each cell holds a symbol in one of five colours. A star, a plus and a cross, each present once, are circled; all other symbols are squares, triangles, diamonds and hexagons."}}
rows, columns = 4, 16
contents, places = draw_maps(rows * columns, torch.Generator().manual_seed(3), count=1)
figure, axis = plt.subplots(figsize=(7, 2))
for cell, content in enumerate(contents[0].tolist()):
    marker, colour = "*PXs^vDh"[content // COLOURS], f"C{content % COLOURS}"
    axis.plot(cell % columns, cell // columns, marker, color=colour, ms=9)
for place in places[0].tolist():
    axis.plot(place % columns, place // columns, "o", ms=19, mfc="none", mec="k", mew=1.5)
axis.set(xlim=(-0.7, columns - 0.3), ylim=(rows - 0.3, -0.7), xticks=[], yticks=[], aspect="equal")
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: a map of 64 cells. The three queries must find the star, the plus and
# the cross and name their colours. The circles are for us: the model does not see them.*

# %% tags=["hide-input"]
for mark, place in enumerate(places[0].tolist()):
    assert contents[0, place] // COLOURS == mark
    assert (contents[0] // COLOURS == mark).sum() == 1
print("each mark is in exactly one cell")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Blocks with arrows: three learned queries, (3, 32), and the cells with shape and colour, (N, 32), enter attention with one head, whose weights are (3, N). Its output (3, 32) goes through a linear layer, (3, 5), and becomes a colour for each mark."}}
from schematics.attention_on_images import finder

finder()

# %% [markdown]
# *Figure {{n}}.3. What to see: the model is one head of attention and a linear layer. The queries are
# learned vectors, as in DETR's decoder.*
#
# A cell's feature is a fixed random vector for its shape plus one for its colour. So there are only
# 8 x 5 = 40 kinds of cell, and cells of one kind have the same key and the same value. There are no
# place codes here, because a query must find its mark by what it is, not by where it is. We compute
# scores once per kind and look them up for all cells. After the softmax over the cells, we add up
# the weights of each kind and multiply by the 40 values. The result is the same as from all cells,
# with less work.


# %%
class Finder(nn.Module):
    """Three queries look for three marks. content: (B, N) -> (B, 3, COLOURS), A: (B, 3, N)."""

    def __init__(self):
        super().__init__()
        kinds = torch.randn(SHAPES, 1, WIDTH) + torch.randn(COLOURS, WIDTH)
        self.register_buffer("kinds", kinds.flatten(0, 1) / math.sqrt(2))  # (40, WIDTH), variance 1
        self.queries = nn.Parameter(torch.randn(MARKS, WIDTH))
        self.U, self.V, self.W_prime, self.W = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        for linear in self.children():
            nn.init.xavier_uniform_(linear.weight)
        self.name_colour = nn.Linear(WIDTH, COLOURS)

    def forward(self, content):
        scores = self.U(self.queries) @ self.V(self.kinds).T / math.sqrt(WIDTH)  # (3, 40)
        kind = content[:, None].expand(-1, MARKS, -1)  # (B, 3, N)
        A = scores.expand(len(content), -1, -1).gather(2, kind).softmax(-1)  # (B, 3, N)
        by_kind = torch.zeros(len(content), *scores.shape).scatter_add(2, kind, A)  # (B, 3, 40)
        return self.name_colour(self.W(by_kind @ self.W_prime(self.kinds))), A


# %% [markdown]
# Training: 32 fresh maps per step, AdamW, cross-entropy on the colour. At each step we note, for each
# mark, how much weight its cell gets and how many of its colours are right.


# %%
def train_finder(num_cells, seed, steps=400):
    """Returns the finder and (steps, 2, 3): weight on the mark's cell, share of right colours."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    finder, history = Finder(), []
    optimizer = torch.optim.AdamW(finder.parameters(), lr=4e-3)
    for _ in range(steps):
        contents, places = draw_maps(num_cells, generator)
        wanted = contents.gather(1, places) % COLOURS  # (B, 3)
        logits, A = finder(contents)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_mark = A.detach().gather(2, places[..., None])[..., 0]  # (B, 3)
        history.append(torch.stack([on_mark, (logits.argmax(-1) == wanted).float()]).mean(1))
    return finder, torch.stack(history)


# %% [markdown]
# We train on maps of 2 x 8, 4 x 16, 8 x 32 and 16 x 64 cells, with five seeds each. Every step shows
# the same number of maps and asks the same number of questions. Only the amount of clutter differs.
#
# **Before you run**: with 64 times the cells, how many times longer does learning take? And how
# often will a query name the right colour before it has found its mark?

# %%
finders, histories, half_way = {}, {}, {}
for num_cells in (16, 64, 256, 1024):
    finders[num_cells], curves = zip(*(train_finder(num_cells, s) for s in range(5)), strict=True)
    histories[num_cells] = torch.stack(curves)  # (5 seeds, steps, 2, 3 marks)
    found = [(curve > 0.5).nonzero() for curve in histories[num_cells][:, :, 0].mean(-1)]
    half_way[num_cells] = sorted(int(hit[0]) if len(hit) else 400 for hit in found)[2]
assert half_way[16] < half_way[64] < half_way[256] < half_way[1024]
assert half_way[1024] > 4 * half_way[16]

# %% tags=["hide-output"]
# NBVAL_IGNORE_OUTPUT
for num_cells, step in half_way.items():
    print(
        f"{num_cells:5} cells: half of the weight is on the right cells after {step} steps (median)"
    )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two charts against the training step, with five thin lines, one per seed, for each of four map sizes. With 16 cells the right weight and the right colours reach one within a few dozen steps, with 64 and 256 cells later each time; with 1024 cells they stay near zero and at chance for longest, and two lines leave it only after step 350."}}
figure, axes = plt.subplots(1, 2, sharex=True)
for i, (num_cells, history) in enumerate(histories.items()):
    curves = history.mean(-1).transpose(1, 2)  # (5 seeds, 2, steps)
    smooth = F.avg_pool1d(curves, 10, stride=5)
    step = 5 + 5 * np.arange(smooth.shape[-1])
    for axis, lines in zip(axes, smooth.unbind(1), strict=True):
        for number, line in enumerate(lines):
            label = None if number else f"{num_cells} cells"
            axis.plot(step, line, color=f"C{i}", label=label, lw=1)
axes[0].set(xlabel="step", ylabel="weight on the right cell", ylim=(0, 1.03))
axes[1].axhline(1 / COLOURS, color="k", ls=":", lw=1)
axes[1].set(xlabel="step", ylabel="right colours", ylim=(0, 1.03))
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# *Figure {{n}}.4. What to see: each line is one seed. The more cells, the later the queries find
# their marks. With 1,024 cells they guess for a long time (dotted: chance, one in five), and in 400
# steps most seeds do not find all three marks. (On the left some lines stay below 1 although all
# their colours are right. The end of this section says why.)*

# %% tags=["hide-input"]
assert histories[16][:, -20:, 1].mean() > 0.98  # all right in the end
assert histories[1024][:, :40, 1].mean() < 0.25  # chance is 0.2
print("16 cells, last 20 steps: all colours right; 1,024 cells, first 40 steps: as good as chance")

# %% [markdown]
# So the prediction holds: in our runs, 64 times the cells took about twenty times as many steps. The
# slow curves have a remarkable shape as well: a long flat piece, then stairs. What is a stair? Let us
# draw the three queries of a run separately, for two of the runs with 1,024 cells.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two charts against the training step, one for each of two runs with 1024 cells. In each, coloured lines, one per query, stay at zero for a while and then jump up, most of them to one, within a few steps, at different times; in the second run one of them never does. A grey line, their mean, climbs in stairs."}}
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 2.9))
for seed, axis in enumerate(axes):
    weights = histories[1024][seed, :, 0].T  # (3 marks, steps)
    smooth = F.avg_pool1d(weights, 5, stride=1, padding=2, count_include_pad=False)
    axis.plot(smooth.mean(0), color="0.6", lw=4, label="mean")
    for mark, line in enumerate(smooth):
        axis.plot(line, label=f"query {mark}")
    axis.set(xlabel="step", title=f"1,024 cells, seed {seed}")
axes[0].set(ylabel="weight on the right cell")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
plt.show()

# %% [markdown]
# *Figure {{n}}.5. What to see: each stair of the mean (grey) is one query that finds its mark, by itself
# and suddenly. Most of the time is spent waiting for it, without any visible progress. On the right, one
# query is still waiting at the end.*
#
# Is this so in every run? We look at the five runs with 256 cells, in which every query gets there.
# For each of the 15 queries we count the steps until its weight on the right cell passes 0.1 (the
# wait), and from there to 0.5 (the climb).

# %%
waits, climbs = [], []
for weights in histories[256][:, :, 0].permute(0, 2, 1).flatten(0, 1):  # 5 seeds x 3 queries
    smooth = F.avg_pool1d(weights[None], 5, stride=1, padding=2, count_include_pad=False)[0]
    begins, half = (int((smooth > level).nonzero()[0]) for level in (0.1, 0.5))
    waits.append(begins)
    climbs.append(half - begins)
assert np.median(climbs) < 15 < 40 < np.median(waits)
assert sum(np.less(climbs, waits)) >= 12
print("the climb is shorter than the wait for nearly all of the 15, and on average much shorter")

# %% [markdown]
# Half of the queries wait more than 40 steps, and half need less than 15 for the climb. Finally, let
# us see *where* the queries look. We take the last of the five runs with 256 cells, before and after
# training, and test it on 200 maps that it was never trained on. (It is the best of the five. The
# others follow below.)

# %%
test_contents, test_places = draw_maps(256, torch.Generator().manual_seed(5), count=200)
torch.manual_seed(4)
looks = {}
for name, model in {"before training": Finder(), "after training": finders[256][4]}.items():
    with torch.no_grad():
        looks[name] = model(test_contents)[1]  # (200, 3, 256)
found = {name: A.argmax(-1) == test_places for name, A in looks.items()}  # (200, 3)
before, after = (hits.float().mean() for hits in found.values())
print("marks found: fewer than 1 in 10 before,", "more than 8 in 10 after")
assert before < 0.1 and after > 0.8

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six maps of 8 by 32 cells: three queries before and after training. Before training the weight is spread over the whole map; after training it is in a single cell, the one that is circled."}}
shown = int(found["after training"].all(1).nonzero()[0])
figure, axes = plt.subplots(2, 3, figsize=(9, 2.5))
for row, (name, A) in zip(axes, looks.items(), strict=True):
    for i, axis in enumerate(row):
        axis.imshow(A[shown, i].view(8, 32), vmin=0)
        place = int(test_places[shown, i])
        axis.plot(place % 32, place // 32, "o", ms=10, mfc="none", mec="C1", mew=1.8)
        axis.set(xticks=[], yticks=[], title=f"{name}, query {i}: {A[shown, i, place]:.3f}")
plt.show()

# %% [markdown]
# *Figure {{n}}.6. What to see: the weights of three queries on one map. Each panel has its own
# scale; the number is the weight in the right cell, which is circled. Before training the weights
# are noise; afterwards nearly all of the weight is in one cell, and it is the right one.*
#
# **A right answer does not prove that the model looked at the right place.** After training, all
# runs with 256 cells name nearly all colours correctly. Does this mean that all their queries look
# at the right cell? We sort the 200 maps by the colour that a mark has, and take the mean weight on
# its cell for each mark and colour. For every run, here is the smallest of these 15 means:

# %%
wanted = test_contents.gather(1, test_places) % COLOURS  # (200, 3)
tables = torch.zeros(5, MARKS, COLOURS)  # mean weight on the right cell
for run, model in enumerate(finders[256]):
    with torch.no_grad():
        logits, A = model(test_contents)
    on_mark = A.gather(2, test_places[..., None])[..., 0]
    for mark, colour in itertools.product(range(MARKS), range(COLOURS)):
        tables[run, mark, colour] = on_mark[wanted[:, mark] == colour, mark].mean()
    assert (logits.argmax(-1) == wanted).float().mean() > 0.95  # of the colours are right
    assert tables[run].median() > 0.9
smallest = tables.amin((1, 2))
one = tables.flatten(0, 1)[tables.amin(2).argmin()]  # the query with the smallest of all
assert (one < 0.2).sum() == 1 and (one > 0.8).sum() == COLOURS - 1

# %%
# NBVAL_IGNORE_OUTPUT
print("smallest mean weight, run by run:", [round(weight, 2) for weight in smallest.tolist()])
print("one query, colour by colour:", [round(weight, 2) for weight in one.tolist()])

# %% [markdown]
# In most runs there is a mark and a colour for which the query looks *elsewhere*, and yet its
# answer is right. How can that be? The last line shows it for the query with the smallest mean of
# all: it finds its mark if the mark has one of four colours. Whenever it does not find it, the mark
# must have the fifth colour. So the query answers by elimination. (This is also why some lines on
# the left of Figure {{n}}.4 stay below 1.) Take care when somebody shows an attention map as an
# explanation: it shows where a model looked, but not what its answer depends on.
# ({{chapter looking}} comes back to this.)
#
# So much for the time to learn. What would help? If someone told each query *roughly* where to
# look, so that it saw 16 of the 1,024 cells and the right one among them, its task would be that of
# the fastest curve. This is the idea of deformable attention: few keys per query, at places that
# are learned. (This was only a toy, of course: one layer, one head, and no image.)
#
# ## {{n}}.2 The computation
#
# Multiplying an $(a \times b)$ matrix by a $(b \times c)$ matrix takes $abc$ multiplications and about
# as many additions. So it costs $2abc$ floating-point operations, or **FLOPs**. PyTorch can count them
# while code runs.


# %%
def count_flops(call, *inputs):
    """FLOPs of all matrix products in call(*inputs)."""
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


left, right = torch.randn(3, 5), torch.randn(5, 7)
print(count_flops(torch.matmul, left, right), "=", 2 * 3 * 5 * 7)
assert count_flops(torch.matmul, left, right) == 2 * 3 * 5 * 7

# %% [markdown]
# Attention has six matrix products. Four are the projections, which work on each query or each cell
# by itself. The other two, scores and weighted sum, work on each *pair* of a query and a cell.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Blocks with arrows. From N_q queries: U, which costs 2 N_q C squared. From N_k cells: V and W', 2 N_k C squared each. Filled blocks: the scores and the weighted sum, 2 N_q N_k C each, with the softmax between them. At the end W, 2 N_q C squared."}}
from schematics.attention_on_images import bill

bill()

# %% [markdown]
# *Figure {{n}}.7. What to see: the six products and their FLOPs. The filled ones contain both $N_q$
# and $N_k$. So if there are four times as many queries and four times as many keys, they cost
# sixteen times as much.*
#
# We count them piece by piece, for 7 queries, 13 keys, $C = 256$ and 8 heads, and compare with the whole
# module.

# %%
C, M = 256, 8
N_q, N_k, D = 7, 13, C // M
linear = nn.Linear(C, C)
z, x = torch.randn(N_q, C), torch.randn(N_k, C)
q, k, v, A = (torch.randn(M, *size) for size in ((N_q, D), (N_k, D), (N_k, D), (N_q, N_k)))
pieces = {
    "U z": count_flops(linear, z),
    "V x": count_flops(linear, x),
    "scores": count_flops(torch.matmul, q, k.transpose(1, 2)),
    "W' x": count_flops(linear, x),
    "sum": count_flops(torch.matmul, A, v),
    "W": count_flops(linear, z),
}
print(pieces)
whole = count_flops(nn.MultiheadAttention(C, M), z, x, x)
print("together", sum(pieces.values()), "and the module", whole)
assert whole == sum(pieces.values())

# %% [markdown]
# ## Exercise {{n}}.1  The bill
#
# *difficulty ●●○ · 10 minutes · 3 lines*
#
# Write the number of FLOPs of all matrix products in Eq. 1, for any sizes; Figure {{n}}.7 lists them. The
# checker compares your result with PyTorch's counter. Its last case is DETR's decoder: 100 queries
# on a map of 25 x 34.


# %% tags=["exercise"]
def attention_flops(num_queries, num_keys, embed_dim, num_heads):
    """FLOPs of multi-head attention on one image, 2 for each multiply-add. Returns an int."""
    # BEGIN SOLUTION
    projections = 4 * (num_queries + num_keys) * embed_dim**2  # U and W; V and W'
    scores_and_sum = 4 * num_queries * num_keys * embed_dim  # the same for any number of heads
    return projections + scores_and_sum
    # END SOLUTION


check("attention_on_images.1", attention_flops)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Six products. Which of the four projections act on queries, which on keys?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The scores of one head cost $2 N_q N_k D$, and there are $M = C/D$ heads. The weighted sum costs
# as much again.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has one head and as many queries as keys. Then it does not matter which tokens a
# projection acts on, nor whether you multiplied the scores by $M$ once too often: each head has
# only $D = C/M$ channels.
#
# </details>
#
# {{solution}}

# %% [markdown]
# The paper gives the cost as $O(N_q C^2 + N_k C^2 + N_q N_k C)$. An $O$ hides constant factors. Here they
# are known, and all three are 4, because there are two products of each kind and 2 FLOPs per
# multiply-add:
#
# $$4\,(N_q C^2 + N_k C^2 + N_q N_k C).$$
#
# In DETR's decoder the number of queries is fixed at 100, so the bill grows only linearly with the
# map. The trouble is the encoder, where every cell is a query and every cell is a key. With $N_q =
# N_k = N$ the bill becomes $8NC^2 + 4N^2C$. For few cells the first part is larger, for many the
# second. They are equal at $N = 2C$, which is **512 tokens** for the usual $C = 256$.
#
# Is that many? Detectors are usually tested on images of about 800 x 1066 pixels. How many cells is
# that at each stride? We let PyTorch tell us, with a chain of convolutions of stride 2. (On the
# device `meta` it computes only the shapes, and no numbers.)

# %%
halve = nn.Conv2d(1, 1, kernel_size=3, stride=2, padding=1, device="meta")
image, shapes = torch.empty(1, 1, 800, 1066, device="meta"), {}
for stride in (2, 4, 8, 16, 32):
    image = halve(image)
    shapes[stride] = tuple(image.shape[-2:])
print("stride 32:", shapes[32], "=", shapes[32][0] * shapes[32][1], "cells")
assert shapes[32] == (25, 34)  # 1066 / 32 = 33.3, rounded up

# %% [markdown]
# Stride 32 is the coarsest map of a ResNet {cite}`he2016resnet`, and even there 850 cells are more
# than 512: the quadratic part is already the larger one. Now we compute the whole bill for one
# self-attention layer with $C = 256$ and 8 heads. "GF" means $10^9$ FLOPs. The last column is the
# memory of the weights $A$ in 32-bit floats, $M$ matrices of $N \times N$ numbers.
#
# **Before you run**: how much memory do the weights of *one* layer take at stride 8? Megabytes or
# gigabytes?

# %%
layer, costs = nn.MultiheadAttention(C, M, batch_first=True, device="meta"), {}
print("stride  map        tokens   linear  quadratic   weights A")
for stride in (32, 16, 8, 4):
    height, width = shapes[stride]
    N = height * width
    x = torch.empty(1, N, C, device="meta")
    total = count_flops(layer, x, x, x)
    linear_part = 4 * count_flops(nn.Linear(C, C, device="meta"), x)
    A = torch.empty(M, N, N, device="meta")
    costs[stride] = (N, linear_part / 1e9, (total - linear_part) / 1e9, A.nbytes / 1e6)
    _, *cost = costs[stride]
    print(f"{stride:4}    {height:3} x {width:3} {N:8,}", end="  ")
    print("{:5.1f} GF {:7.1f} GF {:8,.0f} MB".format(*cost))

# %% tags=["hide-input"] mystnb={"image": {"alt": "FLOPs of one attention layer against the number of tokens, both axes logarithmic. The linear part and the steeper quadratic part cross at 512 tokens. The four strides of an 800 by 1066 image are marked, all to the right of the crossing."}}
tokens = np.geomspace(64, 1e5)
figure, axis = plt.subplots()
axis.plot(tokens, 8 * tokens * C**2 / 1e9, label="projections, $8NC^2$")
axis.plot(tokens, 4 * tokens**2 * C / 1e9, label="scores and sum, $4N^2C$")
axis.axvline(2 * C, color="k", ls=":", lw=1)
axis.text(2 * C * 0.9, 3000, "$N = 2C$", ha="right")
for stride, (count, linear_part, quadratic, _) in costs.items():
    axis.plot([count, count], [linear_part, quadratic], "ko", ms=4)
    axis.text(count * 1.1, linear_part * 0.35, f"stride {stride}")
axis.set(xscale="log", yscale="log", xlabel="tokens $N$", ylabel="GFLOPs in one layer")
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# *Figure {{n}}.8. What to see: the quadratic part overtakes the linear one at 512 tokens. All four maps of
# this image, strides 4 to 32, lie to the right of that (dots: counted by PyTorch, lines: the formulas).*

# %% tags=["hide-input"]
for count, linear_part, quadratic, _ in costs.values():
    assert math.isclose(linear_part, 8 * count * C**2 / 1e9, rel_tol=1e-6)
    assert math.isclose(quadratic, 4 * count**2 * C / 1e9, rel_tol=1e-6)
    assert quadratic > linear_part
assert math.isclose(costs[4][3] / costs[8][3], 16, rel_tol=0.01)
print("counts and formulas agree; half the stride takes 16 times the memory of A")

# %% [markdown]
# Two remarks, to be fair.
# - PyTorch's counter sees matrix products only. The softmax adds a handful of operations for each of
#   the $M N^2$ weights. The two products need $4D = 128$ per weight: $2D$ for its score, and $2D$ to
#   multiply a value by it and add. So nothing important is missing.
# - An encoder layer also has a feed-forward network, which is linear in the number of cells: $4NCF$ FLOPs
#   for a hidden width $F$. DETR's is 2,048 wide. Counting it in, the quadratic part wins from
#   $N = 2C + F = 2560$ tokens on, which lies between stride 32 and stride 16.
#
# ## {{n}}.3 The memory
#
# The table above says that the weights of one layer take gigabytes at stride 8. But does anyone have
# to *store* them? In 2020, when the paper was written, one did: autograd keeps $A$ for the backward
# pass. Newer kernels, which PyTorch uses in `F.scaled_dot_product_attention`, compute $A$ block by
# block, use each block at once and forget it. In the backward pass they compute it again. We can
# measure how much autograd keeps.


# %%
def attend(queries, keys, values):
    """Dense attention with matrices, as in the last chapter."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    return scores.softmax(-1) @ values


def kept_for_backward(call, *inputs):
    """Bytes of all different tensors that autograd saves during call(*inputs)."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*inputs)
    assert result.requires_grad
    return sum(kept.values())


# %%
for num_tokens in (256, 512, 1024):
    q, k, v = (torch.randn(1, M, num_tokens, C // M, requires_grad=True) for _ in range(3))
    dense = kept_for_backward(attend, q, k, v) / 1e6
    fused = kept_for_backward(F.scaled_dot_product_attention, q, k, v) / 1e6
    print(f"{num_tokens:5} tokens: {dense:3.0f} MB dense, {fused:3.0f} MB fused")
assert dense > 4 * M * num_tokens**2 / 1e6  # A itself is in there
assert fused < 6 * 4 * num_tokens * C / 1e6  # inputs, output and little more

# %% [markdown]
# With twice the tokens, dense attention keeps nearly four times as much, and the fused form only
# twice as much. So today memory need not be quadratic any more, and this argument of the paper has
# aged. The computation still is quadratic, so the time still grows much faster than the number of
# tokens:

# %%
# NBVAL_IGNORE_OUTPUT
seconds = {}
for num_tokens in (512, 1024, 2048):
    q, k, v = (torch.randn(1, M, num_tokens, C // M) for _ in range(3))
    for name, call in (("dense", attend), ("fused", F.scaled_dot_product_attention)):
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            call(q, k, v)
            runs.append(time.perf_counter() - start)
        seconds[name, num_tokens] = min(runs)
    dense, fused = seconds["dense", num_tokens], seconds["fused", num_tokens]
    print(f"{num_tokens:5} tokens: {dense * 1e3:6.1f} ms dense, {fused * 1e3:6.1f} ms fused")

# %% tags=["hide-input"]
for name in ("dense", "fused"):  # 16 times the pairs: 16 times the time, give or take
    assert seconds[name, 2048] > 5 * seconds[name, 512]
print("from 512 to 2,048 tokens both take more than five times as long")

# %% [markdown]
# (From 512 to 2,048 tokens there are 16 times as many pairs. The factor in the times may be larger
# or smaller, because larger matrices fit less well into a processor's fast memory, and because this
# processor may have had other work. The counts above are the same everywhere.)

# %% [markdown]
# ## Exercise {{n}}.2  Attention without its matrix
#
# *difficulty ●●● · 30 minutes · 12 lines*
#
# How can a softmax be taken block by block, when it needs the sum over *all* keys? Write it, and
# keep it: it is the idea behind the fused kernels above.
#
# Go through the keys in blocks. For each query keep three things: the largest score so far, the sum of
# the exponentials so far, and the weighted sum of the values so far. The exponentials are taken
# *relative to the largest score so far*, $e^{s - \text{largest}}$, since $e^s$ itself would overflow.
# When a block brings a larger score, what was summed before must be scaled down to the new largest.
# Divide at the end.
#
# The checker asks that one block gives plain attention; that many blocks give the same, also when the
# last is smaller; that scores in the thousands do not overflow; and that no tensor ever holds a query's
# scores for all keys.


# %% tags=["exercise"]
def attend_in_blocks(queries, keys, values, block):
    """queries: (Q, D). keys: (N, D). values: (N, E). block: keys per block. Returns (Q, E)."""
    # BEGIN SOLUTION
    largest = queries.new_full((len(queries), 1), -math.inf)
    total = queries.new_zeros(len(queries), 1)
    output = queries.new_zeros(len(queries), values.shape[1])
    for k, v in zip(keys.split(block), values.split(block), strict=True):
        scores = queries @ k.T / math.sqrt(queries.shape[1])  # (Q, block)
        new_largest = torch.maximum(largest, scores.amax(1, keepdim=True))
        weights = (scores - new_largest).exp()
        shrink = (largest - new_largest).exp()
        total = total * shrink + weights.sum(1, keepdim=True)
        output = output * shrink + weights @ v
        largest = new_largest
    return output / total
    # END SOLUTION


check("attention_on_images.2", attend_in_blocks)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Begin with the largest score at $-\infty$ and both sums at zero. For each block: scores, new largest,
# exponentials relative to it.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# What was summed relative to the old largest becomes relative to the new one when it is multiplied by
# $e^{\text{old} - \text{new}}$. That holds for the sum of the exponentials and for the sum of the values.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With one block there is nothing to scale down. With several, you either take a softmax within each
# block and average the results, which gives each block the same total weight, or scale down only one
# of the two sums.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 Why small objects suffer
#
# Because finer maps are so expensive, DETR works at stride 32. How much of an object is left there?
# COCO {cite}`lin2014coco`, the data set on which detectors are compared, calls an object small if it
# has less than $32^2$ pixels, and large if it has more than $96^2$. We take squares of these two
# sizes, and a really small one of $9^2$, about the size of the small digit below.

# %%
print("cells covered by an object of")
print("stride    9 px   32 px   96 px")
for stride in (32, 16, 8, 4):
    print(f"{stride:6}", *(f"{(side / stride) ** 2:7.2f}" for side in (9, 32, 96)))
assert 11 < (32**2 - 9**2) / 9**2 < 12

# %% [markdown]
# At stride 32 the largest of the small objects has the area of **one** cell. An object of 9 x 9
# pixels that lies in one cell shares it with background of nearly twelve times its own area.
#
# Here is what averaging over cells does to the running example, and to a small digit on another picture.

# %% tags=["hide-input"]
with open("../data/samples/annotations.json") as file:
    annotations = json.load(file)["annotations"]
boxes = {number: [a["bbox"] for a in annotations if a["image_id"] == number] for number in (10, 21)}
(seven,) = boxes[10]
(zero,) = (box for box in boxes[21] if box[2:] == [8, 12])
images = {
    number: torch.tensor(plt.imread(f"../data/samples/{number:06}.png")[..., :3]).permute(2, 0, 1)
    for number in (10, 21)
}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two rows of five panels. Above, a green seven on wood, 34 by 53 pixels, as pixels and averaged over cells of 4, 8, 16 and 32 pixels: it is a seven up to stride 8, a green patch at 16 and a tint at 32. Below, a blue zero on stones, 8 by 12 pixels: its hole is hardly there at stride 4, at 8 it is a blue patch, and from 16 on a tint of the cells around it."}}
figure, axes = plt.subplots(2, 5, figsize=(9, 3.9))
for row, number, box, corner in zip(
    axes, (10, 21), (seven, zero), ((28, 57), (20, 64)), strict=True
):
    for axis, stride in zip(row, (1, 4, 8, 16, 32), strict=True):
        cells = F.avg_pool2d(images[number], stride)
        axis.imshow(cells.permute(1, 2, 0), extent=(0, 128, 128, 0))
        axis.add_patch(plt.Rectangle(box[:2], *box[2:], fill=False, ec="w", lw=1.4))
        axis.set(xlim=(corner[0], corner[0] + 64), ylim=(corner[1] + 64, corner[1]))
        axis.set(xticks=[], yticks=[], title="pixels" if stride == 1 else f"stride {stride}")
axes[0, 0].set(ylabel="34 x 53 pixels")
axes[1, 0].set(ylabel="8 x 12 pixels")
plt.show()

# %% [markdown]
# *Figure {{n}}.9. What to see: the seven can be read down to stride 8 and is a green patch at 16. The hole
# of the small zero is hardly there at stride 4, and at 16 a bluish tint of two cells is left. (The white
# boxes are from the annotations. Both rows show a part of a picture, at the same scale.)*

# %% [markdown]
# A network keeps more than an average does, since a cell has 256 numbers and was computed from a wide
# part of the image. Still, that one cell must then hold everything about the object *and* about its
# background, and the edges of the box must be found to a small fraction of a cell.
#
# There is a second handicap, and a finer stride does not cure it. Before training, attention is
# spread evenly, so an object's share of the weight is its share of the *area*:

# %%
for side in (9, 32, 96):
    shares = [(side / stride) ** 2 / (800 * 1066 / stride**2) for stride in (32, 16, 8, 4)]
    print(f"{side:3} px: {shares[0]:.4%} of the weight, at every stride")
    assert np.allclose(shares, side**2 / (800 * 1066))

# %% [markdown]
# On a finer map an object has more cells, but each has less weight, and the sum stays the same.
# Since gradients go with the weights ({{chapter attention}}), before training an object of 96 x 96
# pixels receives more than a hundred times as much gradient as one of 9 x 9.
#
# What people measured on COCO fits this. The following lines are quoted from the README of the official
# repository; only the column of strides is ours. AP, average precision, is COCO's grade: the higher the
# better ({{chapter training}} computes it). Faster R-CNN is a convolutional detector, and FPN stands for the
# maps at several strides that it reads.
#
# | model | stride | epochs | AP | AP of small objects | training, GPU hours |
# |:--|--:|--:|--:|--:|--:|
# | Faster R-CNN with FPN {cite}`lin2017fpn` | 4 to 64 | 109 | 42.0 | 26.6 | 380 |
# | DETR | 32 | 500 | 42.0 | 20.5 | 2,000 |
# | DETR-DC5 | 16 | 500 | 43.3 | 22.5 | 7,000 |
# | Deformable DETR | 8 to 64 | 50 | 44.5 | 27.1 | 325 |
#
# DETR-DC5 is DETR with half the stride. It is better on small objects and costs three and a half times
# the training. The last line is what this book builds.
#
# ## {{n}}.5 Look at fewer cells
#
# All these troubles come from looking *everywhere*. So let each query look at fewer cells. There
# are several ways:
# - A **window** {cite}`ramachandran2019standalone` takes the cells around the query.
# - **Axial** attention takes the query's row and column.
# - **Deformable** attention takes $K$ points per head, and *learns* where they are.

# %% [markdown]
# ## Exercise {{n}}.3  A window
#
# *difficulty ●●○ · 12 minutes · 5 lines*
#
# Build the mask with which `F.scaled_dot_product_attention` becomes window attention: the query in row
# $i$ and column $j$ may look at the cells that are at most `radius` rows **and** at most `radius`
# columns away. The map is $H \times W$, and its cells are numbered row by row.


# %% tags=["exercise"]
def window_mask(H, W, radius):
    """Returns (H * W, H * W), bool: row = query, column = key, True where the query may look."""
    # BEGIN SOLUTION
    token = torch.arange(H * W)
    row, column = token // W, token % W
    near_rows = (row[:, None] - row).abs() <= radius
    near_columns = (column[:, None] - column).abs() <= radius
    return near_rows & near_columns
    # END SOLUTION


check("attention_on_images.3", window_mask)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Give every token its row and its column: `token // W` and `token % W`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `row[:, None] - row` is the table of all row distances, (H * W, H * W).
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You measure distance in the flat list. There, the last cell of a row and the first cell of the
# next are neighbours; on the map they are at opposite edges.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Which cells does one query see? The following function lists them for dense attention and for
# these three, on the 25 x 34 map that is stride 32 of our image. For deformable attention it shows
# the state before training: 8 heads with $K = 4$ points each, in a star ({{chapter many_scales}}
# shows where that comes from).

# %%
height, width = shapes[32]
STAR = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def looks_at(i, j):
    """Which cells the query in row i and column j looks at: four maps (H, W) of bool by name."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    star = torch.zeros(height, width, dtype=torch.bool)
    for (dy, dx), k in itertools.product(STAR, (1, 2, 3, 4)):
        if 0 <= i + k * dy < height and 0 <= j + k * dx < width:
            star[i + k * dy, j + k * dx] = True
    return {
        "dense": torch.ones(height, width, dtype=torch.bool),
        "window 7 x 7": ((row - i).abs() <= 3) & ((column - j).abs() <= 3),
        "axial": (row == i) | (column == j),
        "deformable": star,
    }


keys = {name: int(seen.sum()) for name, seen in looks_at(10, 20).items()}
print(keys)
assert keys == {"dense": 850, "window 7 x 7": 49, "axial": height + width - 1, "deformable": 8 * 4}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four maps of 25 by 34 cells with one query marked. Dense attention looks at all cells, the window at a block of seven by seven around the query, axial attention at the query's row and column, deformable attention at 32 cells in a star of eight rays."}}
# NBVAL_IGNORE_OUTPUT
from schematics import slider


def draw_looks(row, column):
    axes = plt.subplots(1, 4, figsize=(9, 2.1))[1]
    for axis, (name, seen) in zip(axes, looks_at(row, column).items(), strict=True):
        axis.imshow(seen, vmin=-0.3, vmax=1.1)
        axis.plot(column, row, "x", color="C1", mew=2)
        axis.set(xticks=[], yticks=[], title=f"{name}: {int(seen.sum())}")
    plt.show()


slider(draw_looks, row=(0, height - 1, 10), column=(0, width - 1, 20))

# %% [markdown]
# *Figure {{n}}.10. What to see: which cells one query (cross) looks at, and how many. In
# JupyterLab, run the cell and move the query. The first three patterns are the same for every
# image. The points of the last one are shown as they are before training; a trained model computes
# them from the query, so they can differ from image to image.*
#
# How does the number of keys grow when the map gets finer? (The 32 cells above were those of 8 heads
# together. Per head there are 4.)

# %%
print("keys per query and head, strides 32, 16, 8, 4")
maps = [shapes[stride] for stride in (32, 16, 8, 4)]
table = {
    "dense": [height * width for height, width in maps],
    "window 7 x 7": [49 for _ in maps],
    "axial": [height + width - 1 for height, width in maps],
    "deformable": [4 for _ in maps],
}
for name, counts in table.items():
    print(f"{name:13}", *(f"{count:7,}" for count in counts))

# %% [markdown]
# A window is cheap, but it is blind beyond its border, and an object may be larger than the window.
# A row and a column reach far, but they see only a thin cross. Deformable attention stays at $K$
# keys per head, whatever the size of the map. Its weights start at exactly $1/K$ instead of about
# $1/N_k$, as we shall see. And it can reach any place, if it learns to. *How* places can be learned
# is the subject of {{chapter deformable_convolution}}; the module itself is that of
# {{chapter deformable_attention}}.

# %% [markdown]
# ## Summary
#
# - With more cells, attention learns later: on a task with a known answer, 64 times the cells took about
#   twenty times the steps. Each query finds its mark suddenly, after a long wait.
# - A right answer does not prove that the model looked at the right place.
# - Cost: $4(N_q C^2 + N_k C^2 + N_q N_k C)$ FLOPs. In an encoder, the last term is the largest
#   from $2C$ tokens on.
# - Memory need not be quadratic any more; the computation still is.
# - Small objects need fine maps, which dense attention cannot afford, and they get the least gradient.
#
# > **Differs from the paper.** The paper's argument about memory is older than fused kernels and no
# > longer holds. Its argument about computation still holds.
# >
# > **Differs from the official code.** Deformable DETR uses dense attention only among the 300
# > queries of the decoder, where it is cheap.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`, sections 1 and 3: the argument that this chapter measures.
# - {cite}`carion2020detr`: DETR, and its results by size of object.
# - {cite}`ramachandran2019standalone`: windows.
# - {cite}`dao2022flash`: attention block by block, as in exercise {{n}}.2, as a kernel.
# - {cite}`sun2021tspfcos`: a study of why DETR converges slowly.
