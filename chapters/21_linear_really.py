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
# # {{n}}. Linear, really?
#
# You will be able to
# - **count** the multiply-adds of deformable attention by formula, and say where its 5 comes from,
# - **check** a formula with an instrument, and fit the exponent of a cost,
# - **write** an instrument that counts the bytes which operators move,
# - **find** the size from which on deformable attention wins by the clock, and say why there,
# - **say** what the word "linear" does not promise.
#
# You should know: {{chapter attention_on_images}} and {{chapter deformable_attention}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# "The complexity of deformable attention is linear in the number of pixels." You read this sentence in the
# paper {cite}`zhu2021deformable`, and in every article about it. It is a sentence about a formula. But nobody
# waits for a formula: one waits for a processor. So this chapter asks the same question three times: on paper,
# with an instrument that counts while the code runs, and with a clock. All three answer "linear", and they
# agree in little else.

# %% tags=["hide-input"] mystnb={"image": {"alt": "The green seven on wood under a grid of 16 by 16 cells, three times; one cell is framed in blue. Left, all cells are green. Middle, only a square of 8 by 8 cells, which the framed cell belongs to, is green. Right, no cell is green, and 32 orange points lie in four rings around the framed cell."}}
import matplotlib.pyplot as plt
from schematics import linear_really as draw

plt.style.use("book.mplstyle")
draw.what_each_reads()

# %% [markdown]
# *Figure {{n}}.1. What to see: the running example as 16 x 16 tokens, one of which is the query (blue). In dense
# attention the cost of this one query grows with the picture (green: the tokens that it reads). In a window of 8 x 8 it does
# not, and neither does it with M x K = 8 x 4 points. So with all tokens as queries, dense attention is quadratic, and
# both others are linear. We compare all three, because windows are linear too, and simpler.*

# %% tags=["hide-input"]
import csv
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deformable_detr import ms_deform_attn
from deformable_detr.evaluation.complexity import LiveTensors, count
from deformable_detr.exercises import check
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.layers.window_attention import WindowAttention
from deformable_detr.models import MODELS
from deformable_detr.models.tokens import token_centres

_ = torch.manual_seed(0)
_ = torch.set_grad_enabled(False)
torch.set_num_threads(1)

# %% [markdown]
# ## {{n}}.1 By formula
#
# ### Where the 5 comes from
#
# Appendix A.1 of the paper counts multiply-adds. For reading and weighing the samples of one query it has $5KC$,
# "because of bilinear interpolation and the weighted sum". Instead of believing it, we read samples with numbers
# that count their own multiplications.


# %%
class Counted(float):
    """A number that counts how often it is multiplied."""

    products = 0

    def __mul__(self, other):
        Counted.products += 1
        return Counted(float(self) * float(other))


def read(corners, fx, fy, weight):
    """One sample, weighed. corners: the four pixels around it, for each channel."""
    shares = [(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy]  # for all channels
    mixed = [sum(c * s for c, s in zip(four, shares, strict=True)) for four in corners]
    return [Counted(value) * weight for value in mixed]


# %% [markdown]
# **Before you run**: a head with D = 7 channels reads K = 3 points. How many multiplications are that?

# %%
D, K = 7, 3
pixels = [[Counted(c + 4 * d) for c in range(4)] for d in range(D)]
for fx, fy, weight in ((0.25, 0.5, 0.2), (0.75, 0.5, 0.3), (0.0, 0.1, 0.5)):
    read(pixels, fx, fy, weight)
print(Counted.products, "=", Counted.products // (K * D), "x", K, "points x", D, "channels")
assert Counted.products == 5 * K * D

# %% [markdown]
# Four products mix the pixels, and a fifth applies the attention weight. (The four shares themselves cost some
# products too, but once per point, not once per channel.) All $M$ heads together have $M \cdot D = C$ channels,
# each of which is read at $K$ points. So one query needs $5KC$.
#
# ### The whole bill
#
# With $N_q$ queries, $S$ tokens and $L$ levels, a layer of deformable attention costs, as the code has it:
#
# | step | multiply-adds |
# |:--|:--|
# | offsets and weights from the query | $3 N_q C M L K$ |
# | value projection of **all tokens** | $S C^2$ |
# | read and weigh | $5 N_q L K C$ |
# | output projection | $N_q C^2$ |
#
# The paper has the second step in two versions, $\min(HWC^2, N_q K C^2)$: project all tokens and then sample, or
# sample and then project what was sampled. In an encoder there is nothing to choose. There $N_q = S$, so
# projecting every token once is never dearer than projecting $K$ samples per token. In a decoder there is, and
# we come back to it in section {{n}}.6. For dense attention and for windows of $w \times w$ tokens the bills are
#
# $$\text{dense: } 2 N_q C^2 + 2 S C^2 + 2 N_q S C \qquad \text{windowed: } 4 S C^2 + 2 w^2 S C.$$
#
# All three for an encoder ($N_q = S$), per token:


# %%
C, M, K, WINDOW = 256, 8, 4, 8


def per_token(tokens, levels=1):
    """Multiply-adds of one encoder's attention, divided by its tokens."""
    return {
        "dense": 4 * C**2 + 2 * tokens * C,
        "windowed": 4 * C**2 + 2 * WINDOW**2 * C,
        "deformable": 2 * C**2 + (5 + 3 * M) * levels * K * C,
    }


for tokens in (64, 1024, 20_736):
    print(f"{tokens:6} tokens", {name: f"{bill:,}" for name, bill in per_token(tokens).items()})
print(f"deformable, four levels: {per_token(0, levels=4)['deformable']:,}")

# %% [markdown]
# Only the dense row contains the number of tokens. And it says something that one easily overlooks: by this
# count deformable attention is the cheapest **from the first token on**. Even without a single pair, dense
# attention has four projections, and deformable attention two (it does not compare queries with keys). On
# paper the curves do not cross. Remember that for the clock.
#
# ### May one drop the small terms?
#
# The paper goes one step further: with $M = 8$, $K \le 4$ and $C = 256$ one has $5K + 3MK < C$, so that
# everything fits into $O(2N_qC^2 + \min(HWC^2, N_qKC^2))$. In the detector, however, a query has $K$ points on
# each of four levels.

# %%
for levels in (1, 2, 4):
    small = (5 + 3 * M) * levels * K
    print(f"{levels} level{'s' * (levels > 1)}: 5LK + 3MLK = {small}, which is {small / C:.2f} C")
assert (5 + 3 * M) * 1 * K < C < (5 + 3 * M) * 4 * K

# %% [markdown]
# At one level the inequality holds, and at two it still does. At four levels it does not: there the "small"
# terms cost nearly as much as both projections together. The formula stays linear in the tokens, of course. But
# the whole is nearly twice what the shortened formula says. The inequality is true of a model with one level, and the
# detector has four.
#
# ## Exercise {{n}}.1  Where dense attention bends
#
# *difficulty ●○○ · 10 minutes · 1 line*
#
# At small sizes dense attention looks linear too, because the projections outweigh the pairs. Find the number of
# tokens at which the pairs ($2S^2C$ in all) cost as much as everything else in an encoder layer: four $C \times C$
# projections and a feed-forward network, $C \to F \to C$. Allow $F = 0$, attention alone.


# %% tags=["exercise"]
def bends_at(C, F):
    """The number of tokens S at which the pairs cost as much as all the rest of the layer."""
    # BEGIN SOLUTION
    return (4 * C**2 + 2 * C * F) / (2 * C)
    # END SOLUTION


check("linear_really.1", bends_at)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Write both costs per token: $2SC$ for the pairs, and a sum without $S$ for the rest.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The rest is $4C^2 + 2CF$ per token. Set it equal to $2SC$ and solve for $S$.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has $F = 0$. A feed-forward network has two matrices, of $C \times F$ and $F \times C$.
#
# </details>
#
# {{solution}}

# %% [markdown]
# DETR has $C = 256$ and $F = 2048$, and sees an image of 800 x 1066 pixels as 25 x 34 tokens.

# %%
bend = 2 * 256 + 2048  # from the exercise: 2C + F
print(f"the pairs cost as much as the rest at {bend} tokens; DETR has {25 * 34}")
for stride in (32, 16, 8):
    tokens = math.ceil(800 / stride) * math.ceil(1066 / stride)
    print(f"stride {stride:2}: {tokens:6,} tokens, pairs cost {tokens / bend:.2f} of the rest")

# %% [markdown]
# So in DETR as it is, at stride 32, the pairs cost a third of the rest: without them a layer would cost a quarter less. Only at the
# finer strides that small objects need do they become the largest item of the bill. This is where a linear cost
# matters.
#
# ## {{n}}.2 By instrument
#
# A formula is a claim about code, so we let the code count. PyTorch's `FlopCounterMode` watches every operator and
# adds up the matrix products. (It counts a multiply-add as two operations; we halve.)


# %%
def multiply_adds(call):
    """What a call's matrix products cost, and its samples of deformable attention, if any."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() // 2


def layers(side, levels=1):
    """By name, the encoder's attention on side x side tokens, ready to be called."""
    x = torch.randn(1, side**2, C)
    dense, windowed = DenseAttention(C, M).eval(), WindowAttention(C, M, WINDOW).eval()
    deformable = MSDeformAttn(C, levels, M, K).eval()
    nn.init.normal_(deformable.sampling_offsets.weight, std=0.05)  # so that points differ
    centres = token_centres([(side, side)], torch.ones(1, 1, 2))[:, :, None]
    return {
        "dense": lambda: dense(x, x + 0, x, need_weights=False),  # x + 0: no short cut for x, x, x
        "windowed": lambda: windowed(x.view(1, side, side, C)),
        "deformable": lambda: deformable(x, centres, x, [(side, side)]),
    }


for name, call in layers(16).items():
    print(f"{name:10}: {multiply_adds(call):,}")
    assert multiply_adds(call) == 256 * per_token(256)[name]
print("as by formula, to the last multiply-add")

# %% [markdown]
# How much is this agreement worth? The projections, the scores and the weighted sums are counted by PyTorch, which
# knows nothing about our formulas. But no instrument knows an operator that it has never seen: what
# `ms_deform_attn` costs, the 5, is what the library told it. (That is why we counted the 5 by hand.)
#
# The same instrument works on tensors that have a shape but no content, so it can count what would not fit into
# memory. `python experiments/cost.py` did that up to 20,736 tokens. It counted more than multiply-adds: the
# **bytes moved**, which is what all operators read and write, and the **bytes held**, which is the size of all
# tensors at the worst moment.


# %%
def table(name):
    """data/results/NAME.csv as {(configuration, metric): {tokens: values of all seeds}}."""
    found = {}
    with Path(f"../data/results/{name}.csv").open() as file:
        for row in csv.DictReader(file):
            if row["value"]:
                by_tokens = found.setdefault((row["configuration"], row["metric"]), {})
                by_tokens.setdefault(int(row["at"]), []).append(float(row["value"]))
    return found


counted = table("cost")
KINDS = ("dense", "windowed", "deformable", "deformable of 4 levels")
METRICS = {
    "multiply_adds": "multiply-adds",
    "bytes_moved": "bytes moved",
    "peak_bytes": "bytes held",
}


def curve(name, metric):
    """Tokens and values of an encoder's attention."""
    points = counted[f"{name}, encoder", metric]
    return np.array(list(points)), np.array([values[0] for values in points.values()])


draws = {title: {name: curve(name, m) for name in KINDS} for m, title in METRICS.items()}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three panels on logarithmic axes against the number of tokens: multiply-adds, bytes moved, bytes held. In each, dense attention bends upwards and ends far above three straight lines, which are windowed attention, deformable attention with one level and with four levels. Deformable attention with one level is the lowest."}}
draw.counted(draws)

# %% [markdown]
# *Figure {{n}}.2. What to see: one attention layer of width 256 in an encoder, counted. On logarithmic axes a slope
# of 1 is linear and a slope of 2 quadratic. Dense attention starts among the others and bends.*
#
# The slope is a number that one can fit. We take the sizes from 1,024 tokens on, so that the small ones, where
# fixed costs rule, do not count.


# %%
def slope(tokens, values, least=1024):
    """The exponent p of the best fit values = constant * tokens ** p."""
    chosen = tokens >= least
    return np.polyfit(np.log(tokens[chosen]), np.log(values[chosen]), 1)[0]


slopes = {(n, m): slope(*curve(n, m)) for n in KINDS for m in METRICS}
print(f"{'exponent of':24}", *(f"{title:>14}" for title in METRICS.values()))
for name in KINDS:
    print(f"{name:24}", *(f"{slopes[name, metric]:14.2f}" for metric in METRICS))

# %% [markdown]
# So this half of the claim stands: by count, deformable attention is linear in all three respects. So are windows.
# The dense exponents are below 2 only because the projections, which are linear, still have their share.
#
# ## {{n}}.3 Bytes
#
# A processor does not only multiply. It often waits for its memory. So we divide the multiply-adds by the bytes that
# were moved for them: the more work per byte, the less a processor waits
# {cite}`williams2009roofline`.

# %%
for name in KINDS:
    tokens, work = curve(name, "multiply_adds")
    _, moved = curve(name, "bytes_moved")
    print(f"{name:24} {work[-1] / moved[-1]:5.1f} multiply-adds per byte at {tokens[-1]:,} tokens")

# %% [markdown]
# Dense attention moves the most bytes per multiply-add, because it writes a matrix of $M S^2$ weights, reads it for
# the softmax, writes it again and reads it again. It also *holds* them: at 20,736 tokens that would be

# %%
held = counted["dense, encoder", "peak_bytes"][20_736][0]
ours = counted["deformable, encoder", "peak_bytes"][20_736][0]
print(f"{held / 2**30:.1f} GiB for one dense layer, {ours / 2**30:.2f} GiB for a deformable one")

# %% [markdown]
# But the textbook argument against dense attention, its memory, is out of date. The matrix need not be held. Attention that works
# block by block ({cite}`dao2022flash`; {{chapter attention_on_images}} builds it) computes the same numbers
# without it, and PyTorch does so by itself unless one asks for the weights. We measure what is alive during a call:

# %%
x = torch.randn(1, 1024, C)
dense, y = DenseAttention(C, M).eval(), x + 0
for text, wanted in (("with its weights", True), ("without", False)):
    with LiveTensors([]) as live:  # [] : the inputs are not counted
        dense(x, y, x, need_weights=wanted)
    print(f"1,024 tokens, {text:17}: {live.peak / 2**20:5.1f} MiB held")

# %% [markdown]
# The *memory* of dense attention, then, can be linear as well. Its multiply-adds stay quadratic: a block-wise
# softmax computes all $S^2$ pairs, it only forgets them sooner.
#
# ## Exercise {{n}}.2  An instrument for bytes
#
# *difficulty ●●● · 30 minutes · 5 lines*
#
# Write the instrument that counted the bytes moved. A `TorchDispatchMode` is called for every operator while it is
# open; below, the line `result = ...` runs the operator. Add to `self.moved` the bytes of all tensors that the
# operator was given and of all that it returned. One rule: an operator that only returns **views** (a transpose, a
# reshape) moves nothing. A view shares its storage with a tensor that the operator was given;
# `tensor.untyped_storage().data_ptr()` tells storages apart. Tensors may also stand in lists (`torch.cat`):
# `tree_leaves((args, kwargs))` gives you everything, one by one. (By this rule an operator that works in place moves
# nothing either. That is a fault of the instrument, which we accept.)


# %% tags=["exercise"]
class Traffic(TorchDispatchMode):
    """While open, adds to `moved` the bytes that operators read and write; views move none."""

    moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # BEGIN SOLUTION
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        given = {x.untyped_storage().data_ptr() for x in read}
        if any(x.untyped_storage().data_ptr() not in given for x in written):
            self.moved += sum(x.numel() * x.element_size() for x in read + written)
        # END SOLUTION
        return result


check("linear_really.2", Traffic)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two lists first: the tensors among `tree_leaves((args, kwargs))`, and those among `tree_leaves(result)`. A tensor has
# `numel() * element_size()` bytes.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Collect the storages of the tensors that were read in a set. If every tensor that came out has its storage in that
# set, the operator made a view, and you add nothing.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has one matrix product of float32. Elements of other types have other sizes, and lists of tensors
# are not tensors.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 By the clock
#
# Now the answer that users feel. We time one call on one core. A time is the least of several runs, because
# everything that disturbs a run makes it longer and nothing makes it shorter. We count the seconds for which *this*
# process had the core, so other programs hardly matter.


# %%
def seconds(call, runs=7):
    """The fewest seconds of the core that one call takes."""
    times = []
    for _ in range(runs + 1):  # the first one warms up
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times[1:])


# %% [markdown]
# **Before you run**: by count, deformable attention is cheaper from the first token on. What will the clock say at
# 64 tokens, and at 1,024?

# %%
# NBVAL_IGNORE_OUTPUT
live_times = {side: {n: seconds(call) for n, call in layers(side).items()} for side in (8, 16, 32)}
for side, times in live_times.items():
    row = "  ".join(f"{name} {1e6 * t / side**2:5.1f}" for name, t in times.items())
    print(f"{side**2:5} tokens, microseconds per token:  {row}")

# %% [markdown]
# (Your numbers are those of your processor. Those on this page are the ones of the machine that made it.)
#
# For larger sizes, and for whole encoders of six layers with their feed-forward networks, we read what
# `python experiments/clock.py` measured in the same way, more than once, each time in a new process. This is a measurement on **one** machine:

# %%
about = json.loads(Path("../data/results/clock.json").read_text())
print(about["cpu"], about["vectors"], "one of", about["cores"], "cores, PyTorch", end=" ")
print(about["versions"]["torch"])
clock = table("clock")


def runs_of(name):
    """One curve of milliseconds for each seed."""
    points = clock[name, "milliseconds"]
    tokens, values = np.array(list(points)), np.array(list(points.values()))
    return [(tokens, column) for column in values.T]


alone = {name: runs_of(name) for name in draw.COLOURS}
encoders = {name: runs_of(f"{name}, encoder") for name in KINDS}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels of microseconds per token against tokens on logarithmic axes, one line per kind and repeat. Left, one attention layer: dense attention rises, and rises more steeply when its weights are kept; windowed and deformable attention fall at first and then stay level. Dense attention is among the lowest at 64 tokens and by far the highest at 20,736. Right, encoders of six layers: the same shape, with the curves closer together at small sizes."}}
draw.clocked({"one attention layer": alone, "encoder of six layers": encoders})

# %% [markdown]
# *Figure {{n}}.3. What to see: time **per token**. A linear cost is a level line, a quadratic one rises. Each curve is
# drawn once per repeat. At the left end the linear kinds cost most per token, because a call has a fixed price, which a
# few tokens must share.*
#
# Where do dense and deformable attention cross? Between two measured sizes we interpolate on logarithmic axes.


# %%
def crossing(theirs, ours):
    """The number of tokens from which on ours is quicker; both (tokens, milliseconds)."""
    tokens, lead = theirs[0], np.log(theirs[1] / np.interp(theirs[0], *ours))
    first = int(np.argmax(lead > 0))  # the first size at which ours is ahead
    if first == 0:
        return float(tokens[0]) if lead[0] > 0 else math.inf
    part = lead[first - 1] / (lead[first - 1] - lead[first])
    return math.exp(np.interp(part, (0, 1), np.log(tokens[first - 1 : first + 1])))


def crossings(theirs, ours):
    """The same for each repeat."""
    return [crossing(a, b) for a, b in zip(theirs, ours, strict=False)]


def summary(values, digits):
    """The mean of the repeats, and from where to where they go."""
    low, high = (f"{end:.{digits}f}" for end in (min(values), max(values)))
    return f"{np.mean(values):.{digits}f} ({len(values)} repeats: {low} to {high})"


print("quicker than dense from so many tokens on:")
for name in ("deformable", "deformable of 4 levels", "deformable, plain PyTorch"):
    print(f"one layer, {name}:", summary(crossings(alone["dense"], alone[name]), 0))
for name in ("deformable", "deformable of 4 levels"):
    print(f"encoder, {name}:", summary(crossings(encoders["dense"], encoders[name]), 0))

# %% [markdown]
# There *is* a crossing by the clock, although there is none by count, and it moves with the implementation: written
# in plain PyTorch the same operation, with the same count, needs more tokens to win. (The dense side in this
# comparison is PyTorch's fused one, so it is not a straw man. With its weights kept it would lose sooner.)
#
# And at the other end:

# %%
last = {name: float(np.mean([ms[-1] for _, ms in runs])) for name, runs in alone.items()}
counts = {name: curve(name, "multiply_adds")[1][-1] for name in KINDS}
by_count = counts["dense"] / counts["deformable"]
print(f"20,736 tokens: dense costs {by_count:.0f} times the multiply-adds of deformable attention")
print(f"               and takes {last['dense'] / last['deformable']:.0f} times the time")
for name in ("dense", "deformable"):
    exponents = [slope(*run) for run in alone[name]]
    print(f"exponent of the time from 1,024 tokens on, {name}: {summary(exponents, 2)}")

# %% [markdown]
# So far from the crossing the clock agrees with the count: the exponents are close to those of the multiply-adds.
#
# ### Why do they cross?
#
# We take the deformable layer apart at 1,024 tokens, and set the share of each step in the multiply-adds beside its
# share in the time.

# %%
side, S = 32, 1024
layer, x = MSDeformAttn(C, 1, M, K).eval(), torch.randn(1, 1024, C)
nn.init.normal_(layer.sampling_offsets.weight, std=0.05)
centres, shapes = token_centres([(side, side)], torch.ones(1, 1, 2))[:, :, None], [(side, side)]
sampling = layer.sampling(x, centres, shapes)
value = layer.value_proj(x).view(1, S, M, C // M)
steps = {
    "value projection": (lambda: layer.value_proj(x), S * C**2),
    "offsets, weights: linear": (
        lambda: (layer.sampling_offsets(x), layer.attention_weights(x)),
        3 * S * C * M * K,
    ),
    "locations, softmax": (lambda: layer.sampling(x, centres, shapes), 0),
    "read and weigh": (
        lambda: ms_deform_attn(value, shapes, sampling.locations, sampling.weights),
        5 * S * K * C,
    ),
    "output projection": (lambda: layer.output_proj(x), S * C**2),
}
spent = {name: seconds(call) for name, (call, _) in steps.items()}
spent["locations, softmax"] -= spent["offsets, weights: linear"]  # which `sampling` calls

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two stacked bars. Of the multiply-adds, the two projections have four fifths, the linear layers for offsets and weights a seventh, reading and weighing the small rest, and locations and softmax nothing. Of the seconds, the projections have much less, and reading and weighing, and locations and softmax, much more."}}
# NBVAL_IGNORE_OUTPUT
draw.two_shares({name: work for name, (_, work) in steps.items()}, spent)

# %% [markdown]
# *Figure {{n}}.4. What to see: what is counted is not what is waited for. Locations and softmax do not occur in the
# count at all, and reading takes a larger share of the time than of the multiply-adds.*

# %%
# NBVAL_IGNORE_OUTPUT
for name, (_, work) in steps.items():
    if work:
        print(f"{name:25} {work / spent[name] / 1e9:5.1f} billion multiply-adds per second")

# %% [markdown]
# A multiply-add takes several times as long when it belongs to a sample as when it belongs to a matrix product. There
# are two suspects: **irregular access**, since a sample may lie anywhere in memory, and **less work per number read**,
# since a matrix product uses each number that it loads again and again, and a sample uses it once. We can
# tell them apart: the same operator with the same amount of work reads near its query or anywhere on the map.


# %%
# NBVAL_IGNORE_OUTPUT
def reading(side, spread=None):
    """Microseconds per query; it reads within about so many pixels of itself, or anywhere."""
    S, maps = side**2, [(side, side)]
    value, weights = torch.randn(1, S, M, C // M), torch.full((1, S, M, 1, K), 1 / K)
    places = torch.rand(1, S, M, 1, K, 2)
    if spread:
        centres = token_centres(maps, torch.ones(1, 1, 2))[:, :, None, None, None]
        places = centres + spread / side * torch.randn_like(places)
    places = places.clamp(0.5 / side, 1 - 0.5 / side)  # inside, so that all four pixels are read
    return 1e6 / S * seconds(lambda: ms_deform_attn(value, maps, places, weights), runs=5)


for side in (32, 128):
    print(f"{side**2:6} tokens, nearby: {reading(side, 2):.2f}, anywhere: {reading(side):.2f}")

# %% [markdown]
# On the processor that made this page, disorder costs something, but much less than the factor between samples and
# matrix products. (Both maps fit into its caches.) So here the second suspect did most of it, together with the
# steps that no count mentions. All of these are **constant factors**: they move the crossing, not the exponent. The paper
# itself names the first suspect ("unordered memory access") as the price on the GPUs of its time. This chapter has not
# measured a GPU.
#
# Published figures show the same gap between counting and waiting. On COCO the official README reports 173 billion
# multiply-adds and 15.0 images per second for Deformable DETR; 180 and 25.6 for Faster R-CNN with FPN. The counts
# are nearly the same, and one of them is 1.7 times as fast.
#
# ## {{n}}.5 Windows, the fair rival
#
# Windows {cite}`liu2021swin` are linear as well. They are built from matrix products alone, so they should like the
# processor better. Are they quicker?

# %%
print("windows take so many times the time per token of")
for name in ("deformable", "deformable of 4 levels"):
    for title, group in (("one layer", alone), ("encoder", encoders)):
        ratios = []
        for (tokens, theirs), ours in zip(group["windowed"], group[name], strict=False):
            ratio = theirs / tokens / np.interp(tokens, ours[0], ours[1] / ours[0])
            ratios.append(float(np.exp(np.log(ratio[tokens >= 1024]).mean())))
        print(f"{title}, {name}:", summary(ratios, 2))

# %% [markdown]
# Read it per token: a ratio above 1 says that deformable attention is quicker, and one below 1 that windows are.
# Against deformable attention on one level, windows pay four projections instead of two. With four levels the
# points cost more, and little or nothing is left of the advantage.
#
# Speed is not the reason to choose between them, then. Windows cannot look over their borders (which is why they are
# shifted from layer to layer), they see one map at a time, and they need queries that lie on the map: a decoder's
# do not. What one pays for points is the freedom to put them where they are needed.
#
# ## {{n}}.6 The decoder: what is projected when
#
# A decoder has some hundreds of queries and many thousand tokens. So here the order of work matters.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three rows of three blocks. Tokens first: project, read, weigh and add; S products with W prime. Samples first: read, project, weigh and add; K products. Sums first: read, weigh and add, project; one product."}}
draw.three_orders()

# %% [markdown]
# *Figure {{n}}.5. What to see: three orders with the same result, for one query and one head. Green is the projection
# with $W'$, and the letters are the width of what passes. The $S$ products above serve all queries together. The
# others are those of one query, which must read more channels: all $C$, not the head's own $D$.*
#
# Reading, weighing and adding are linear in the map's values, and so is a projection without bias. So they may change places. The paper
# uses this for its second order ("samples first"). One step further, "sums first", there is only one projection per
# query and head. To let every head read all channels, we make each head a query of its own, on a map with one
# head:


# %%
def sums_first(layer, query, references, tokens, shapes):
    """What the layer computes, projecting last. Its value projection must have a bias of zero."""
    B, Q, C = query.shape
    M, K, L = layer.num_heads, layer.num_points, layer.num_levels
    found = layer.sampling(query, references, shapes)
    locations = found.locations.view(B, Q * M, 1, L, K, 2)
    weights = found.weights.view(B, Q * M, 1, L, K)
    sums = ms_deform_attn(tokens.unsqueeze(2), shapes, locations, weights).view(B, Q, M, C)
    heads = layer.value_proj.weight.view(M, C // M, C)
    return layer.output_proj(torch.einsum("bqmc,mdc->bqmd", sums, heads).flatten(2))


def decoder(side, order):
    """A call of the cross-attention of 300 queries."""
    tokens, query = torch.randn(1, side**2, C), torch.randn(1, 300, C)
    arguments = query, torch.rand(1, 300, 1, 2), tokens, [(side, side)]
    return lambda: layer(*arguments) if order == "tokens first" else order(layer, *arguments)


arguments = torch.randn(1, 300, C), torch.rand(1, 300, 1, 2), torch.randn(1, 1024, C), [(32, 32)]
torch.testing.assert_close(layer(*arguments), sums_first(layer, *arguments), atol=1e-4, rtol=1e-4)
print("sums first gives the same numbers")

# %% [markdown]
# (About the bias: a sample that falls outside the map reads zeros. Project first, and that zero stays a zero; project
# last, and the bias is added although nothing was read. One then has to scale the bias by the share of the weight that
# fell inside.)
#
# The instrument says what each order costs, the paper's other order by its formula:

# %%
sides = (8, 16, 32, 64, 104, 144)
orders = {
    "tokens first (the code)": [multiply_adds(decoder(s, "tokens first")) / 1e6 for s in sides],
    "sums first": [multiply_adds(decoder(s, sums_first)) / 1e6 for s in sides],
}
by_paper = counted["deformable, decoder", "formula_sampled_first"]
orders["samples first (paper's count)"] = [values[0] / 1e6 for values in by_paper.values()]
for name, values in orders.items():
    print(f"{name:31}", *(f"{value:8.0f}" for value in values), "million")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Multiply-adds against tokens on logarithmic axes. Tokens first, as in the code, rises with the tokens. Samples first and sums first are level; sums first is the lower of the two. Tokens first is the cheapest at the smallest sizes and crosses sums first below a thousand tokens."}}
draw.orders_by_tokens({name: ([s**2 for s in sides], values) for name, values in orders.items()})

# %% [markdown]
# *Figure {{n}}.6. What to see: cross-attention of 300 queries on one map. "The decoder's cost does not depend on the
# size of the map" is true of the level lines. The official code, and ours, follow the rising one: they project
# **all** tokens, of which the queries then read a few.*
#
# And by the clock?

# %%
# NBVAL_IGNORE_OUTPUT
for side in (16, 64, 104):
    code, last_of_all = (seconds(decoder(side, o)) for o in ("tokens first", sums_first))
    print(
        f"{side**2:6} tokens: as in the code {1e3 * code:5.2f} ms, sums first {1e3 * last_of_all:.2f}"
    )

# %% [markdown]
# Here count and clock agree. Why does the code project first, then? The authors do not say. It is the same code for
# encoder and decoder, and in an encoder, with as many queries as tokens, projecting first is right. If you run a decoder
# with few queries on large maps, "sums first" is worth a try.
#
# ## Exercise {{n}}.3  Which order?
#
# *difficulty ●●○ · 15 minutes · 4 lines*
#
# Write the three bills for reading and projecting alone (the other steps are the same for all): tokens first, samples
# first, sums first. `points` is $LK$. Count the reading honestly: before the projection each head reads all $C$
# channels, so a sample costs $5C$ in each of the $M$ heads. (The paper leaves out this factor $M$.) A head's
# projection takes $C$ numbers to $C/M$.


# %% tags=["exercise"]
def three_bills(queries, tokens, points, C, M):
    """Multiply-adds of reading and projecting: (tokens first, samples first, sums first)."""
    # BEGIN SOLUTION
    read_all = 5 * queries * M * points * C
    tokens_first = tokens * C**2 + 5 * queries * points * C
    samples_first = read_all + queries * points * C**2
    return tokens_first, samples_first, read_all + queries * C**2
    # END SOLUTION


check("linear_really.3", three_bills)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Tokens first: $S C^2$ for projecting, and $5 N_q L K C$ for reading.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Projecting a sample in a head costs $C \cdot C/M$. There are $N_q M L K$ samples, or $N_q M$ sums.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has one head. With more, each head reads all channels in the last two orders, but the projections of
# all heads together are one $C \times C$ matrix.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.7 The whole detector
#
# A detector is more than its attention. The library's `complexity.count` walks through a whole model, again on
# tensors without content. We count the paper's three contestants with a ResNet-50 at two image sizes: Deformable DETR,
# DETR (stride 32), and DETR-DC5 (stride 16). All numbers are divided by the pixels of the image, so a part whose cost is
# linear in the pixels has bars of the same height.

# %%
contestants = {
    "Deformable\nDETR": ("deformable_detr", {}),
    "DETR": ("detr", {}),
    "DETR-DC5": ("detr", {"dilation": True}),
}
parts = {}
for title, (name, options) in contestants.items():
    config, build = MODELS[name]
    with torch.device("meta"):
        model = build(config(**options)).eval()
    for height, width in ((800, 1066), (1600, 2132)):
        whole, found = count(model, (height, width))
        chosen = {part: found[part] for part in ("backbone", "encoder", "decoder")}
        chosen["rest"] = whole - sum(chosen.values())
        parts[f"{title}\n{height}"] = {k: v / (height * width) / 1e3 for k, v in chosen.items()}

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six stacked bars of multiply-adds per pixel, three detectors at 800 and at 1600 pixels of height. The backbone's part is the same at both sizes. Deformable DETR's bars are as high at both sizes, and half of each is the encoder. DETR's are much lower, and its encoder grows a little. DETR-DC5's encoder grows so that its bar at 1600 is the highest of all."}}
draw.parts_of_the_detector(parts)

# %% [markdown]
# *Figure {{n}}.7. What to see: the backbone is linear in the pixels too. Deformable DETR's cost per
# pixel hardly changes with the image. That of DETR grows slowly and stays the lowest by far, because at stride 32 it has
# few tokens. Where dense attention reads finer maps, in DETR-DC5, its quadratic cost shows.*

# %%
for name, values in parts.items():
    shares = {part: f"{value / sum(values.values()):.0%}" for part, value in values.items()}
    print(f"{name.replace(chr(10), ' '):22} {sum(values.values()):5.0f} thousand per pixel", shares)

# %% [markdown]
# So Deformable DETR is not cheaper than DETR: it costs about twice as much. But it can **afford** fine maps: for twice the
# cost it has about twenty times DETR's tokens. And its encoder, although linear, is half of the whole bill. {{chapter fewer_tokens}} is about that half.
#
# ## {{n}}.8 What "linear" does not say
#
# - **Nothing about constants.** By count the deformable layer is always the cheaper one, and by the clock it is so only
#   from the crossing on.
# - **Nothing about the side of the image.** The cost is linear in the tokens. Twice the side means four times the tokens, and
#   four times the cost. Half the stride does the same.
# - **Nothing about the width.** In $C$ the cost is quadratic, as that of every layer with projections.
# - **Nothing about a decoder as it is coded.** All tokens are projected in each of its layers, whether or not anybody
#   reads them.
# - **Nothing about memory in training.** It is linear as well, but all layers keep what their gradients need
#   ({{chapter training_at_every_size}} measures that).
#
# ## Summary
#
# - The 5 in $5KC$ is four products for the bilinear mix and one for the weight. $5K + 3MK < C$ holds for one level, not
#   for the detector's four.
# - By count, deformable and windowed attention are linear, dense attention is nearly quadratic, and deformable attention
#   is the cheapest at every size.
# - By the clock dense attention is quicker on small maps all the same, because some steps are not counted, and samples take
#   longer per multiply-add than matrix products. On one machine the crossing lies in the hundreds of tokens.
# - Fused dense attention has linear memory; its multiply-adds stay quadratic.
# - Projecting after the sum makes the decoder's cost independent of the map; the code projects all tokens.
#
# > **Differs from the paper.** A.1 drops $5K + 3MK$, which one may at one level only, and its order "samples first"
# > leaves out that each head must then read all channels. "Sums first" is not in the paper. **Differs from the official code.**
# > Nothing: both project all tokens first, in the decoder too.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: Appendix A.1, and the run times of section 5.1.
# - {cite}`dao2022flash`: dense attention without its matrix.
# - {cite}`liu2021swin`: attention in windows.
# - {cite}`ramachandran2019standalone`: local attention, and how far from its count the clock can be.
# - {cite}`williams2009roofline`: multiply-adds per byte.
