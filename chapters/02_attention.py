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
# # {{n}}. Attention
#
# You will be able to
# - **compute** attention by hand, for one query, for many, and for several heads,
# - **match** the paper's Eq. 1 with the matrices inside `torch.nn.MultiheadAttention`,
# - **turn** a feature map into a list of cells, and give each cell its place,
# - **predict** how evenly attention is spread before training,
# - **explain** what that evenness does to the gradients, and so to learning.
#
# You should know: PyTorch tensors, `softmax`, matrix products, autograd.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# {{chapter sampling}} read a picture at one place, and we had to say which. Attention
# {cite}`vaswani2017attention` works the other way round: it looks at **every** place, compares each
# of them with what it is looking for, and then decides how much each one counts.
#
# DETR {cite}`carion2020detr` made a whole detector out of it. DETR was elegant, but it needed 500 epochs
# of training and was weak on small objects. Deformable DETR {cite}`zhu2021deformable` was
# made to mend this, and its authors found the cause in attention itself. To judge that, we first need
# to know attention well. This chapter builds it, up to the moment before training begins. The next
# one, {{chapter attention_on_images}}, trains it and measures its price.

# %% tags=["hide-input"]
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from deformable_detr.exercises import check

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 One query, three keys, by hand
#
# Attention has three kinds of vectors. Their names come from searching a database:
# - A **query** is a vector that asks for something.
# - A **key** is a vector by which something can be found. The query is compared with every key.
# - A **value** belongs to each key. It is what the query receives from there.
#
# Here is one query with three keys and their values, and everything that happens, in numbers.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A query of four numbers is compared with three keys of four numbers. The scores are 2, 1 and 0. The weights, drawn as bars, are 0.665, 0.245 and 0.090. Each weight multiplies a value of two numbers, and the sum is the output, 5.75 and 1.55."}}
from schematics.attention import query_key_value

query_key_value()

# %% [markdown]
# *Figure {{n}}.1. What to see: from left to right, the query is compared with each key, which gives a
# score; the scores become weights that sum to 1; the output is the average of the values under these
# weights. Blue is what belongs to the query, green what belongs to the keys. The numbers in brackets
# are shapes.*
#
# Now the same in code, step by step.

# %%
query = torch.tensor([1.0, 2.0, 0.0, 1.0])
keys = torch.tensor([[2.0, 1.0, 3.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, -1.0, 0.0, 1.0]])
values = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])

# %% [markdown]
# First, a **score** for each key: its dot product with the query, divided by the square root of how
# many numbers each of them has, $\sqrt{4} = 2$. (Why we divide comes below.) The first key gives $1
# \cdot 2 + 2 \cdot 1 + 0 \cdot 3 + 1 \cdot 0 = 4$, and half of that is 2.

# %%
scores = [(query @ key).item() / math.sqrt(4) for key in keys]
print(scores)
assert scores == [2.0, 1.0, 0.0]

# %% [markdown]
# Second, **weights**: the exponential of each score, divided by the sum of all exponentials. That is
# the softmax. All weights are positive, and together they make 1.

# %%
exponentials = [math.exp(score) for score in scores]
weights = [e / sum(exponentials) for e in exponentials]
print([round(weight, 3) for weight in weights])
assert math.isclose(sum(weights), 1)

# %% [markdown]
# Third, the **output**: the average of the values under these weights.
#
# **Before you run**: the first value is (10, 0) and has the weight 0.665, so it contributes 6.65 to
# the first number of the output. The other two values contribute as well. Is the first number of the
# output above or below 6.65?

# %%
output = sum(weight * value for weight, value in zip(weights, values, strict=True))
print([round(number, 2) for number in output.tolist()])
assert output[0] < 6.65  # the third value pulls it down by 0.9

# %% [markdown]
# It is below, because the third value, (-10, -10), contributes -0.9. Attention never picks one key.
# It *mixes* all of them, and even the worst key has a share, however small. This will matter in
# section {{n}}.6.
#
# ## {{n}}.2 Many queries: a loop, then matrices
#
# Now we take 2 queries and 5 keys of 3 numbers each, and 5 values of 4 numbers. No two of these
# sizes are the same, so that a mistake in the axes cannot hide.


# %%
def attend_loop(queries, keys, values):
    """queries: (Q, D). keys: (N, D). values: (N, E). Returns (Q, E)."""
    rows = []
    for query in queries:
        scores = [query @ key / math.sqrt(len(query)) for key in keys]
        weights = torch.stack(scores).exp()
        weights = weights / weights.sum()
        rows.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    return torch.stack(rows)


# %% [markdown]
# All scores at once are one matrix product, with one row per query and one column per key. The softmax
# runs along the keys, which is the **last** axis, because each query distributes its own weights.


# %%
def attend(queries, keys, values):
    """The same with matrices; leading axes (batch, heads) are carried along."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])  # (..., Q, N)
    return scores.softmax(-1) @ values


# %% [markdown]
# PyTorch has this as a function, `F.scaled_dot_product_attention`. All three must agree:

# %%
queries, keys, values = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 4)
by_loop, by_matrix = attend_loop(queries, keys, values), attend(queries, keys, values)
by_torch = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
assert torch.allclose(by_loop, by_matrix, atol=1e-6)
assert torch.allclose(by_torch, by_matrix, atol=1e-6)
print(tuple(by_matrix.shape), "loop, matrices and PyTorch agree")

# %% [markdown]
# ### Why divide by $\sqrt{D}$?
#
# Take two random vectors of $D$ independent numbers, each of mean 0 and variance 1. Their dot
# product is a sum of $D$ random terms. The spread of such a sum, its standard deviation, is
# $\sqrt{D}$ times that of one term. So the more numbers the vectors have, the larger the scores
# are. Dividing by $\sqrt{D}$ brings the spread back to 1 for every $D$.

# %%
for D in (4, 64, 256):
    products = (torch.randn(20_000, D) * torch.randn(20_000, D)).sum(-1)
    print(D, "spread", round(products.std().item() / math.sqrt(D), 1), "times the root of D")
    assert math.isclose(products.std().item(), math.sqrt(D), rel_tol=0.03)

# %% [markdown]
# And why should the spread be 1? Because the softmax takes exponentials. At $D = 64$, undivided
# scores have a spread of $\sqrt{64} = 8$. If two scores differ by 8, their weights differ by a
# factor of $e^8$, which is about 3,000. Then one key gets nearly everything before the network has
# learned anything. The others have weights near zero, and since gradients are multiplied by the
# weights (section {{n}}.6), they learn almost nothing. Here are ten random keys of 64 numbers, with
# and without the division.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two bar charts of the attention weights of ten keys. Without the division two keys share five sixths of the weight. With it, eight of the ten keys have a visible part, the largest a fifth."}}
D = 64
wide_query, wide_keys = torch.randn(D), torch.randn(10, D)
raw = wide_keys @ wide_query
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 2.6))
for axis, scale, title in zip(axes, (1, math.sqrt(D)), ("undivided", "divided by 8"), strict=True):
    axis.bar(range(10), (raw / scale).softmax(0))
    axis.set(xlabel="key", xticks=range(10), title=f"scores {title}")
axes[0].set(ylabel="weight", ylim=(0, 1))
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: the same query and the same ten keys of 64 numbers. From undivided
# scores two random keys take five sixths of the weight (left). Divided by $\sqrt{64} = 8$, the
# choice is still open (right).*

# %% tags=["hide-input"]
top_two = [(raw / scale).softmax(0).topk(2).values.sum() for scale in (1, math.sqrt(D))]
assert top_two[0] > 0.8 and top_two[1] < 0.5
many = torch.randn(500, D) @ wide_keys.T  # and on average over 500 queries
largest_undivided = many.softmax(-1).amax(-1).mean()
largest_divided = (many / math.sqrt(D)).softmax(-1).amax(-1).mean()
print("the largest of the ten weights, on average over 500 random queries:")
print(f"{largest_undivided:.2f} undivided, {largest_divided:.2f} divided")
assert largest_undivided > 0.85 and largest_divided < 0.45

# %% [markdown]
# ## Exercise {{n}}.1  Keys that are not there
#
# *difficulty ●○○ · 8 minutes · 3 lines*
#
# The images of a batch have different sizes. They are padded to one size, and no query may look at the
# padding. Write attention that gives padded keys **no** weight. In this book a mask is True on padding.
#
# The checker asks that the output is as if the padded keys did not exist, however large the numbers
# in the padding are.


# %% tags=["exercise"]
def masked_attention(queries, keys, values, padding):
    """queries: (Q, D). keys: (N, D). values: (N, E). padding: (N,), True on padding.

    Returns (Q, E).
    """
    # BEGIN SOLUTION
    scores = queries @ keys.T / math.sqrt(queries.shape[-1])
    scores = scores.masked_fill(padding, -math.inf)
    return scores.softmax(-1) @ values
    # END SOLUTION


check("attention.1", masked_attention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The weights that are left must still add up to 1, and the numbers in the padding must not matter,
# however large they are. The safe place for the mask is before the softmax.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Which score $s$ has $e^s = 0$? Fill it in with `masked_fill`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has no padding. If the second fails, you either set the *weights* to zero after
# the softmax, so that they no longer add up to 1, or the *scores* to zero. But a score of zero is not
# a weight of zero: $e^0 = 1$.
#
# </details>
#
# {{solution}}

# %% [markdown]
# PyTorch has two conventions for such masks, and they are opposite. `F.scaled_dot_product_attention`
# wants True where a query *may* look. `nn.MultiheadAttention` wants True where it may *not*. The result
# must be the same as if the padded keys did not exist:

# %%
padding = torch.tensor([False, True, False, False, True])
expected = attend(queries, keys[~padding], values[~padding])
fused = F.scaled_dot_product_attention(
    queries[None], keys[None], values[None], attn_mask=~padding[None]
)
assert torch.allclose(fused[0], expected, atol=1e-6)

layer = nn.MultiheadAttention(3, 1, batch_first=True)
masked, _ = layer(queries[None], keys[None], keys[None], key_padding_mask=padding[None])
shorter, _ = layer(queries[None], keys[None, ~padding], keys[None, ~padding])
assert torch.allclose(masked, shorter, atol=1e-6)
print("both agree with leaving the padded keys out")

# %% [markdown]
# ## {{n}}.3 Several heads, and the paper's Eq. 1
#
# So far somebody gave us queries, keys and values. In a network there are only features: a vector
# $z_q$ for the query, and a vector $x_k$ for each place that it may look at. Query, key and value
# are *learned projections* of them. One matrix, $U$, makes the query: what to ask for. A second,
# $V$, makes the keys: what each place is found by. A third, $W'$, makes the values: what each place
# hands over. (These are the paper's letters, and $V$ is easily misread: in other texts it often
# stands for the values.)
#
# A query may have several questions at once: is there an edge on the left? is there one on the right?
# So there are $M$ such sets of matrices, the **heads**. Each head works with $D = C / M$ channels, and
# a last matrix $W$ combines what they found.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Blocks with arrows. Queries z of shape (Q, C) go through U and become (M, Q, D). Features x of shape (N, C) go through V and through W' and become (M, N, D) each. The first two give scores and, by a softmax, the weights A of shape (M, Q, N). The weighted sum of the third is (M, Q, D), which is (Q, C), and goes through W to the output of shape (Q, C)."}}
from schematics.attention import heads

heads()

# %% [markdown]
# *Figure {{n}}.3. What to see: $Q$ queries look at $N$ places with $M$ heads. Filled blocks are
# learned matrices. From $U$, $V$ and $W'$ on, each head works by itself, until $W$ combines them.*
#
# The paper writes the same in one line, for one query $q$:
#
# $$
# \text{MultiHeadAttn}(z_q, x) = \sum_{m=1}^{M} W_m \Big[ \sum_{k \in \Omega_k} A_{mqk} \cdot
# W'_m x_k \Big], \qquad
# A_{mqk} \propto \exp\Big\{ \frac{z_q^\top U_m^\top V_m x_k}{\sqrt{C_v}} \Big\}
# $$
#
# with $\sum_k A_{mqk} = 1$. This is the paper's Eq. 1. Read it from the inside:
#
# | symbol | what it is | shape |
# |:--|:--|:--|
# | $U_m z_q$ | the query: what head $m$ asks for | $U_m$ is $D \times C$ |
# | $V_m x_k$ | the key: what place $k$ is found by | $V_m$ is $D \times C$ |
# | $A_{mqk}$ | the weight, a softmax over $k$ | a number |
# | $W'_m x_k$ | the value: what place $k$ hands over | $W'_m$ is $D \times C$ |
# | $W_m$ | back to the full width | $W_m$ is $C \times D$ |
#
# $\Omega_k$ is the set of all places, and $N_k$ is how many there are (the $N$ of the figure). $C_v$
# is the width of one head; this book calls it $D$.


# %%
def equation_1(z_q, x, U, V, W_prime, W):
    """z_q: (C,). x: (N_k, C). U, V, W_prime: (M, D, C). W: (M, C, D). Returns (C,)."""
    output = torch.zeros_like(z_q)
    for m in range(len(U)):
        scores = torch.stack([(U[m] @ z_q) @ (V[m] @ x_k) for x_k in x])
        A = (scores / math.sqrt(U.shape[1])).softmax(0)
        gathered = sum(A[k] * (W_prime[m] @ x[k]) for k in range(len(x)))
        output = output + W[m] @ gathered
    return output


# %% [markdown]
# Is this what `nn.MultiheadAttention` computes? It holds the same four sets of matrices, but packed into
# two tensors. `in_proj_weight` has all $U_m$ on top, then all $V_m$, then all $W'_m$, and each head owns
# $D$ rows of each. `out_proj.weight` has the $W_m$ side by side, $D$ columns each. We unpack them and
# compare. (Eq. 1 has no bias vectors, so we switch the module's off.)

# %%
C, M = 12, 3
D, num_queries, num_keys = C // M, 5, 7
module = nn.MultiheadAttention(C, M, bias=False, batch_first=True)
U, V, W_prime = module.in_proj_weight.detach().view(3, M, D, C)
W = module.out_proj.weight.detach().view(C, M, D).permute(1, 0, 2)  # (M, C, D)

# %%
z, x = torch.randn(num_queries, C), torch.randn(num_keys, C)
by_hand = torch.stack([equation_1(z_q, x, U, V, W_prime, W) for z_q in z])
by_module, _ = module(z[None], x[None], x[None])  # query, key, value
assert torch.allclose(by_module[0], by_hand, atol=1e-6)
print(tuple(by_hand.shape), "Eq. 1 and the module agree")

# %% [markdown]
# ## Exercise {{n}}.2  Split the heads
#
# *difficulty ●○○ · 6 minutes · 2 lines*
#
# A fast module does not loop over heads. It projects for all heads at once by one $C \times C$ matrix,
# with the rows of head 0 on top, those of head 1 below, and so on. Then the $C$ channels that come out
# must be split into heads. Head $m$ gets the channels from $mD$ to $(m + 1)D$ of **every** token.


# %% tags=["exercise"]
def split_heads(x, num_heads):
    """x: (B, N, C). Returns (B, M, N, D), with M heads of D = C / M channels."""
    # BEGIN SOLUTION
    B, N, C = x.shape
    return x.reshape(B, N, num_heads, C // num_heads).transpose(1, 2)
    # END SOLUTION


check("attention.2", split_heads)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Splitting $C$ channels into $M$ groups of $D$ touches only the last axis. Moving the heads to the
# front is a second step.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# First $(B, N, M, D)$ with `reshape`, then exchange axes 1 and 2.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The shape is right but the numbers are not, because you reshaped to $(B, M, N, D)$ at once. `reshape`
# (and `view`) keeps the order in memory, so "head 0" then holds all channels of the first few *tokens*.
# Nothing crashes, and a network even trains like this, only badly.
#
# </details>
#
# {{solution}}

# %% [markdown]
# With this, the whole module fits on a page. Ours returns the weights $A$ as well, because we want to
# look at them.


# %%
class Attention(nn.Module):
    """Multi-head attention, Eq. 1. z: (B, Q, C), x: (B, N, C) -> (B, Q, C) and (B, M, Q, N)."""

    def __init__(self, C, M):
        super().__init__()
        self.num_heads = M
        self.U, self.V, self.W_prime, self.W = (nn.Linear(C, C, bias=False) for _ in range(4))
        for linear in self.children():
            nn.init.xavier_uniform_(linear.weight)  # variance 1 / C

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, M, N, D)

    def forward(self, z, x):
        q, k, v = self.heads(self.U(z)), self.heads(self.V(x)), self.heads(self.W_prime(x))
        A = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.W((A @ v).transpose(1, 2).flatten(2)), A


# %% [markdown]
# We copy PyTorch's weights into it, and both must give the same outputs and the same $A$:

# %%
attention = Attention(C, M)
with torch.no_grad():
    packed = module.in_proj_weight.chunk(3)  # U, V and W'
    for linear, weight in zip(attention.children(), (*packed, module.out_proj.weight), strict=True):
        linear.weight.copy_(weight)
    ours, A = attention(z[None], x[None])
    theirs, A_theirs = module(z[None], x[None], x[None], average_attn_weights=False)
assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(A, A_theirs, atol=1e-6)
assert torch.allclose(ours[0], by_hand, atol=1e-6)
print("weights", tuple(A.shape), "= (B, M, Q, N_k)")

# %% [markdown]
# So Eq. 1 as a loop, PyTorch's module and our own give one result. Two names for the use of
# attention: when $z$ and $x$ are the same vectors, it is **self-attention**; when the queries come
# from somewhere else, it is **cross-attention**.
#
# ## {{n}}.4 A feature map is a list of cells
#
# Attention wants a list of vectors. An image network gives a *map*, of shape $(C, H, W)$. So we write
# the cells of the map one after another, row by row, and call each of them a **token**.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Upper left: the running example with a grid of 4 by 4 cells of 32 pixels. Upper right: the same averaged over each cell, numbered 0 to 15, row by row; cells 9, 10 and 13, which hold most of the seven, are outlined. Below: the 16 cells side by side in one row, with 9, 10 and 13 outlined; the last is apart from the other two."}}
from schematics.attention import list_of_cells

list_of_cells()

# %% [markdown]
# *Figure {{n}}.4. What to see: the running example at stride 32, where a cell stands for 32 x 32 pixels.
# (A network would put $C$ numbers into each cell; here we see just its average colour.) Most of the
# seven lies in cells 9, 10 and 13, outlined in orange. On the map, 9 and 13 are neighbours. In the list
# they are four places apart.*

# %%
picture = torch.tensor(plt.imread("../data/samples/000010.png")[..., :3]).permute(2, 0, 1)
is_green = picture[1] - picture[0] > 0.15
per_cell = is_green.view(4, 32, 4, 32).sum((1, 3))  # green pixels in each cell of stride 32
tokens = F.avg_pool2d(picture, 32).flatten(1).T  # (C, 4, 4) -> (C, 16) -> (16, C)
print(tuple(tokens.shape), "green pixels per token:", per_cell.flatten().tolist())
assert set(per_cell.flatten().topk(3).indices.tolist()) == {9, 10, 13}

# %% [markdown]
# The general rule is that the cell in row $i$ and column $j$ becomes token $iW + j$. From here on we use
# a map that is not square, with 3 rows and 5 columns.

# %%
height, width = 3, 5
feature_map = torch.randn(C, height, width)
tokens = feature_map.flatten(1).T  # (H * W, C)
assert torch.equal(tokens[2 * width + 1], feature_map[:, 2, 1])  # row 2, column 1
print(tuple(feature_map.shape), "->", tuple(tokens.shape))

# %% [markdown]
# Does attention know that the list was once a map? We can test it.
#
# **Before you run**: we shuffle the cells, as if the image had been cut up and thrown on the table. What
# happens to the output of self-attention?

# %%
order = torch.randperm(height * width)
with torch.no_grad():
    straight, _ = attention(tokens[None], tokens[None])
    shuffled, _ = attention(tokens[order][None], tokens[order][None])
assert torch.allclose(shuffled[0], straight[0, order], atol=1e-6)
print("the output is shuffled in the same way, and otherwise unchanged")

# %% [markdown]
# So to attention a map is a *bag* of cells. Left and right, near and far do not exist. (With a
# convolution the outputs would change, because it reads neighbours, and the cells have new ones.)
#
# If places are to matter, the numbers of each cell must say where it is. DETR adds a code made of
# sines and cosines, half of its channels for $y$ and half for $x$. The fastest wave has one period
# from one edge of the map to the other, and the other waves are slower and slower. Here is the code
# of one cell, by hand, in Deformable DETR's form:


# %%
def place_code(row, column, height, width, num_features, temperature=10_000):
    """The code of one cell: num_features numbers for y, then as many for x."""
    code = []
    for index, size in ((row, height), (column, width)):
        phase = (index + 0.5) / size * 2 * math.pi  # the cell's centre; once round for the map
        for j in range(num_features // 2):
            period = temperature ** (2 * j / num_features)
            code += [math.sin(phase / period), math.cos(phase / period)]
    return torch.tensor(code)


# %% [markdown]
# The library's encoding does this for all cells at once. Its argument is a mask, True on padding,
# because only the cells of the image count.

# %%
from deformable_detr.layers.position import SinePositionEncoding

no_padding = torch.zeros(1, 4, 7, dtype=torch.bool)
codes = SinePositionEncoding(num_features=6)(no_padding)  # (B, 2 * num_features, H, W)
assert torch.allclose(codes[0, :, 1, 5], place_code(1, 5, 4, 7, num_features=6), atol=1e-5)
print(tuple(codes.shape), "the library's code of row 1, column 5 is the one by hand")

# %% mystnb={"image": {"alt": "Four maps of 14 by 22 cells. The first changes from top to bottom like one sine wave, the second from left to right like one cosine wave, the third hardly from top to bottom. The fourth is a hill of similarity with its peak in the marked cell."}}
codes = SinePositionEncoding(128)(torch.zeros(1, 14, 22, dtype=torch.bool))[0]  # (256, 14, 22)
similarity = torch.einsum("chw,c->hw", codes, codes[:, 4, 15]) / 128
figure, axes = plt.subplots(1, 4, figsize=(9, 2.2))
titles = ("0: sin, y", "129: cos, x", "32: sin, y, 10 times slower")
for axis, channel, title in zip(axes, (0, 129, 32), titles, strict=False):
    axis.imshow(codes[channel], cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(title=title)
axes[3].imshow(similarity)
axes[3].plot(15, 4, "x", color="white")
axes[3].set(title="similarity to the cross")
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# *Figure {{n}}.5. What to see: three of the 256 channels of the code, with their numbers, on a map of 14 x 22 cells (red
# positive, blue negative). On the right, the dot product of one cell's code with that of every cell,
# divided by 128, so that it is 1 for the cell itself. It is largest there and falls with distance.
# So with codes, near and far exist.*

# %% tags=["hide-input"]
assert similarity.argmax() == 4 * 22 + 15 and math.isclose(similarity[4, 15], 1, rel_tol=1e-4)
assert torch.allclose(codes[0, :, 0], codes[0, :, 21])  # channel 0 knows nothing of x
print(f"similarity with the left neighbour: {similarity[4, 14]:.3f}")
assert 0.99 < similarity[4, 14] < 0.999

# %% [markdown]
# A cell's similarity with itself is 1, and with its left neighbour it is nearly as large. So the
# code makes it *possible* to look at one exact cell, but $U$ and $V$ must grow large before
# attention becomes that sharp.
#
# With places, shuffling the contents is no longer harmless:

# %%
no_padding = torch.zeros(1, height, width, dtype=torch.bool)
place = SinePositionEncoding(num_features=C // 2)(no_padding)[0].flatten(1).T  # (H * W, C)
with torch.no_grad():
    straight, _ = attention((tokens + place)[None], (tokens + place)[None])
    moved = tokens[order] + place
    shuffled, _ = attention(moved[None], moved[None])
difference = (shuffled[0] - straight[0, order]).abs().max().item()
print("largest difference:", round(difference, 1))
assert difference > 0.01

# %% [markdown]
# ## Exercise {{n}}.3  Look one cell further
#
# *difficulty ●●● · 20 minutes · 7 lines*
#
# Why sines and cosines? Because with them, **moving by a fixed distance is a matrix**. If $c(\varphi)$
# is the code of a place $\varphi$ along one axis, there is a matrix $R$ with
# $R\, c(\varphi) = c(\varphi + \delta)$ for *every* $\varphi$. Write it.
#
# What is it good for? If a head has $U_m = \beta R$ and $V_m = \beta I$ with a large $\beta$, every
# cell looks at the cell that lies $\delta$ further on. A few such heads side by side read fixed
# neighbours, as a convolution does. (The checker's last test does this.)
#
# The code of one axis with $F$ features is
# $\sin(\varphi/p_0), \cos(\varphi/p_0), \sin(\varphi/p_1), \cos(\varphi/p_1), \dots$ with
# $p_j = 10000^{2j/F}$.


# %% tags=["exercise"]
def shift_matrix(delta, num_features):
    """delta: radians. num_features: F, even. Returns (F, F): R @ code(phi) = code(phi + delta)."""
    # BEGIN SOLUTION
    R = torch.zeros(num_features, num_features)
    for j in range(num_features // 2):
        angle = delta / 10_000 ** (2 * j / num_features)
        sin, cos = math.sin(angle), math.cos(angle)
        R[2 * j, 2 * j : 2 * j + 2] = torch.tensor([cos, sin])
        R[2 * j + 1, 2 * j : 2 * j + 2] = torch.tensor([-sin, cos])
    return R
    # END SOLUTION


check("attention.3", shift_matrix)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# $\sin(a + b) = \sin a \cos b + \cos a \sin b$ and $\cos(a + b) = \cos a \cos b - \sin a \sin b$.
# So each pair of numbers is turned by itself: $R$ consists of $2 \times 2$ blocks on the diagonal.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The block of pair $j$ has the angle $a = \delta / p_j$ and reads
# $\begin{pmatrix} \cos a & \sin a \\ -\sin a & \cos a \end{pmatrix}$.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A shift by zero is the identity for every sign and every period. If the shift by a quarter turn
# fails, look at the signs: this is the block above, not its transpose.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 Before training, every key gets about $1/N_k$
#
# How does a query spread its attention when nothing has been learned yet? We need the size of the
# scores. Take features of mean 0 and variance 1, as a normalisation layer delivers them. The matrices
# get random entries at first, by Xavier's rule: those of a $C \times C$ matrix have variance $1/C$. So
# the numbers in $U_m z_q$ and $V_m x_k$ have mean 0 and variance 1 again. Then, after the division by
# $\sqrt{D}$, the scores have variance 1 too. This is the situation that the paper describes.

# %%
C, M = 256, 8
attention = Attention(C, M)
z, x = torch.randn(1, 40, C), torch.randn(1, 3000, C)
with torch.no_grad():
    asked, found_by = attention.U(z), attention.V(x)
    scores = attention.heads(asked) @ attention.heads(found_by).transpose(-1, -2) / math.sqrt(C / M)
for name, numbers in {"U z": asked, "V x": found_by, "scores": scores}.items():
    print(f"{name:6} mean {abs(numbers.mean()):.1f}, variance {numbers.var():.1f}")
    assert abs(numbers.mean()) < 0.05 and math.isclose(numbers.var(), 1, rel_tol=0.1)

# %% [markdown]
# How even are the weights then? A measure of evenness is the **entropy**, $-\sum_k A_k \ln A_k$. If all
# $N_k$ keys have the same weight, it is $\ln N_k$. If one key has all of it, it is 0. So its exponential
# can be read as the number of keys that a query *effectively* looks at.
#
# For scores of variance $\sigma^2$ and many keys, theory gives $\ln N_k - \sigma^2/2$. Here is why.
# Since $\ln A_k = s_k - \ln \sum_j e^{s_j}$, the entropy is $\ln \sum_j e^{s_j}$ minus the average
# of $s$ under the weights. For many normally distributed scores the sum is about $N_k
# e^{\sigma^2/2}$, and the average is about $\sigma^2$. So the entropy is $\ln N_k + \sigma^2/2 -
# \sigma^2$.
#
# **Before you run**: at 4,096 keys, how many does a query effectively look at? Ten? A hundred? We measure
# it for our module and for PyTorch's, with $C = 256$ and 8 heads.

# %%
packed = nn.MultiheadAttention(C, M, batch_first=True)  # PyTorch's own initialisation
sizes = [16, 64, 256, 1024, 4096]
measured = {"Eq. 1, each matrix by Xavier": [], "nn.MultiheadAttention": []}
with torch.no_grad():
    for num_keys in sizes:
        x = torch.randn(1, num_keys, C)
        _, A = attention(z, x)
        _, A_packed = packed(z, x, x, average_attn_weights=False)
        for found, weights in zip(measured.values(), (A, A_packed), strict=True):
            found.append(-(weights * weights.log()).sum(-1).mean().item())
for name, found in measured.items():
    share = 100 * round(math.exp(found[-1]) / 4096, 1)
    print(f"{name}: in effect about {share:.0f} % of the 4,096 keys")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Entropy of the attention weights against the number of keys. Both measured curves run parallel to the line of equal weights, half a unit and an eighth of a unit below it."}}
figure, axis = plt.subplots()
axis.plot(sizes, np.log(sizes), "k--", label=r"all equal: $\ln N_k$")
for (name, found), marker in zip(measured.items(), "os", strict=True):
    axis.plot(sizes, found, marker, label=name)
axis.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="number of keys $N_k$")
axis.set(ylabel="entropy of the weights")
axis.minorticks_off()
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.6. What to see: however many keys there are, the entropy before training stays just below
# that of equal weights. Attention starts as an average over the whole map.*

# %% tags=["hide-input"]
for found, variance in zip(measured.values(), (1, 1 / 4), strict=True):
    for num_keys, entropy in zip(sizes[2:], found[2:], strict=True):
        assert math.isclose(entropy, math.log(num_keys) - variance / 2, abs_tol=0.04)
third = packed.in_proj_weight.detach().var().item() * C
print("variance of PyTorch's entries, times C:", round(third, 2))
assert math.isclose(third, 0.5, rel_tol=0.02)

# %% [markdown]
# If queries and keys have variance 1, as the paper assumes, a query effectively looks at six tenths
# of all keys: about 2,500 of 4,096. PyTorch's module starts even flatter, at nine tenths. PyTorch
# keeps $U$, $V$ and $W'$ in *one* matrix of $3C \times C$, and Xavier's formula looks at that shape,
# so each entry has the variance $1/(2C)$ instead of $1/C$. Therefore queries and keys have variance
# $\tfrac12$, and the scores have variance $\tfrac14$.

# %% [markdown]
# ## Exercise {{n}}.4  The gradient of a score
#
# *difficulty ●●○ · 12 minutes · 3 lines*
#
# Let us follow the gradient back by hand. One query has the scores $s_k$, the weights $A =
# \text{softmax}(s)$ and the output $o = \sum_k A_k v_k$. The gradient of the loss with respect to
# the output is given: $g = \partial \mathcal{L} / \partial o$. Write the gradient of the loss with
# respect to the scores, $\partial \mathcal{L} / \partial s_k$, without autograd.


# %% tags=["exercise"]
def score_gradient(scores, values, grad_output):
    """scores: (N,). values: (N, E). grad_output: (E,), the loss by the output. Returns (N,)."""
    # BEGIN SOLUTION
    A = scores.softmax(0)
    along = values @ grad_output
    return A * (along - A @ along)
    # END SOLUTION


check("attention.4", score_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# If the weights were free, the gradient with respect to $A_k$ would be $g \cdot v_k$. But raising
# one weight lowers all the others.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $\partial A_j / \partial s_k = A_j (\delta_{jk} - A_k)$, where $\delta_{jk}$ is 1 for $j = k$ and 0
# otherwise. Multiply by $g \cdot v_j$ and sum over $j$.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# With two keys of equal weight, many formulas agree. When weights differ, the value to compare with
# is the *weighted* average, which is the output $o$ itself, not the plain mean of the values.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.6 What that does to gradients
#
# The chain rule gives two lines, one for the values and one for the scores (the second is exercise
# {{n}}.4). Both contain $A_k$ as a factor:
#
# $$
# \frac{\partial \mathcal{L}}{\partial v_k} = A_k \, g, \qquad
# \frac{\partial \mathcal{L}}{\partial s_k} = A_k \; g \cdot (v_k - o)
# $$
#
# Before training, $A_k$ is about $1/N_k$. So the gradient $g$ that arrives at the output is shared
# out almost evenly among all keys. On a map of 4,096 cells, the one cell that matters receives
# about a 4,096th of it.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two drawings of an output whose gradient g is shared out among the keys below it. Left: 4 keys, each connected by a thick line, with g / 4. Right: 24 keys, each connected by a thin line, with g / 24. One key in each is orange."}}
from schematics.attention import who_hears

who_hears()

# %% [markdown]
# *Figure {{n}}.7. What to see: the orange key is the right one, and the others are not. But before
# training nothing distinguishes it, so its share of the gradient is about as large as any other's.
# The more keys there are, the smaller that share is.*

# %% [markdown]
# Let us measure this. For 300 random queries we take a loss that is low when the output points along the
# value of **key 0**, which is then the right key. We ask three things: how large is the gradient of its
# value? How large is that of its score? And what reaches the *query*? The query receives a sum over all
# keys,
#
# $$
# \frac{\partial \mathcal{L}}{\partial q} =
# \frac{1}{\sqrt D} \sum_k \frac{\partial \mathcal{L}}{\partial s_k} \, k_k,
# $$
#
# where $k_k$ is key number $k$. We compare the right key's term of this sum with the sum of
# all other terms.


# %%
def gradients(num_keys, draws=50, D=32):
    """Sizes, (draws, 4): gradients of the right key's value and score, and the query's two parts."""
    q, k, v = (torch.randn(draws, n, D) for n in (1, num_keys, num_keys))
    scores = (q @ k.transpose(1, 2) / math.sqrt(D)).requires_grad_()  # (draws, 1, N_k)
    output = scores.softmax(-1) @ v.requires_grad_()
    loss = -(output[:, 0] * v[:, 0].detach()).sum()
    by_scores, by_values = torch.autograd.grad(loss, (scores, v))
    right = by_scores[:, 0, :1] * k[:, 0]  # the right key's term in the query's gradient
    others = (by_scores @ k)[:, 0] - right  # the sum of all other terms
    sizes = (by_values[:, 0], by_scores[:, 0, :1], right, others)
    return torch.stack([gradient.norm(dim=-1) for gradient in sizes], -1)


# %% [markdown]
# **Before you run**: on a double logarithmic scale a line of slope $-1$ means that four times the
# keys leave a quarter. The gradients of value and score should have that slope. Which slope do you
# expect for the query, that is, for the ratio of the right key's term to the sum of all others?

# %%
torch.manual_seed(1)
reached = np.array([torch.cat([gradients(n) for _ in range(6)]).mean(0).tolist() for n in sizes])
reached = np.stack(
    [reached[:, 0], reached[:, 1], reached[:, 2] / reached[:, 3]], 1
)  # the query's: a ratio
slopes = np.polyfit(np.log(sizes), np.log(reached), 1)[0]
print("slopes", slopes.round(1))
assert np.allclose(slopes, [-1, -1, -0.5], atol=0.1)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two charts with logarithmic axes. Left: the gradients of the right key's value and score fall along lines of slope minus one from 16 to 4096 keys. Right: the ratio of the right key's term to that of all others falls along a line of slope minus one half, from about 1 to about 0.05."}}
figure, axes = plt.subplots(1, 2)
names = ("gradient of its value", "gradient of its score", "right key's term / all others")
for i, (axis, name) in enumerate(zip((axes[0], axes[0], axes[1]), names, strict=True)):
    slope = -0.5 if i == 2 else -1
    line = reached[2, i] * (np.array(sizes) / sizes[2]) ** slope
    axis.plot(sizes, line, color="0.7", label=f"slope {slope}" if i else None, zorder=0)
    axis.plot(sizes, reached[:, i], "os^"[i], color=f"C{i}", label=name)
for axis, title in zip(axes, ("what reaches the right key", "what reaches the query"), strict=True):
    axis.set(xscale="log", yscale="log", xlabel="number of keys $N_k$", title=title)
    axis.set(xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
    axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.8. What to see: with four times the keys, the right key's value and score receive a
# quarter of the gradient (left, slope $-1$). In what the query receives, the right key's part
# becomes smaller in comparison with that of all the others (right, slope $-\frac12$).*

# %% tags=["hide-input"]
print("at 4,096 keys the right key's part is", round(reached[-1, 2], 2), "of the others'")
assert reached[-1, 2] < 0.07 < 0.7 < reached[0, 2]

# %% [markdown]
# The paper speaks of "ambiguous gradients for input features", and the first formula above shows
# what it means: the gradient $A_k \, g$ of a value is nearly the same for every cell as long as all
# $A_k$ are, so it does not say which cell mattered. The left panel shows how small it is. By itself,
# a *small* gradient does no great harm, because optimisers such as AdamW
# {cite}`loshchilov2019adamw` divide every gradient by its usual size.
#
# The right panel matters more, because dividing does not change a ratio. Why is its slope
# $-\frac12$? The right key's part has the size $1/N_k$. Each of the other keys contributes about
# $1/N_k$ too, but with random signs, and a sum of $N_k$ random terms of size $1/N_k$ has the size
# $1/\sqrt{N_k}$. So in what the query learns from one image, the right key is drowned out by the
# wrong ones.
#
# What does help is averaging. Over many images the right key contributes the same every time, while
# the other keys contribute something different each time and cancel. It does not matter whether the
# images come one after another, as steps of training, or together, as a larger batch. Here we keep
# the query and the right key, draw the 1,023 others anew for each image, and average the query's
# gradient over the batch.


# %%
def averaged(batch, cases, num_keys=1024):
    """Mean sizes of the right key's term and of all others', averaged over a batch of images."""
    right, others, D = [], [], cases.shape[-1]
    for q, right_key, right_value in cases:
        k, v = torch.randn(2, batch, num_keys, D)
        k[:, 0], v[:, 0] = right_key, right_value
        A = (k @ q / math.sqrt(D)).softmax(-1)  # (batch, num_keys)
        o = (A[..., None] * v).sum(1, keepdim=True)
        by_scores = -A * ((v - o) @ right_value)
        right.append((by_scores[:, :1] * k[:, 0]).mean(0).norm())
        others.append((by_scores[:, 1:, None] * k[:, 1:]).sum(1).mean(0).norm())
    return torch.stack(right).mean().item(), torch.stack(others).mean().item()


# %%
cases = torch.randn(150, 3, 32)  # a query, its right key and that key's value
parts = {batch: averaged(batch, cases) for batch in (1, 4, 16)}
for batch, (right, others) in parts.items():
    right, others = right / parts[1][0], parts[1][1] / others
    print(f"batch {batch:2}: right key's part times {right:.1f}, others' divided by {others:.0f}")
    assert math.isclose(right, 1, abs_tol=0.1)
    assert math.isclose(others, math.sqrt(batch), rel_tol=0.12)

# %% [markdown]
# Averaging leaves the right key's part as it is, and with four times the images the others' part is
# halved: averaging over $b$ images gains $\sqrt b$. To make up for four times the *keys*, which
# halve the ratio, one therefore needs four times the images. This is the price of looking
# everywhere: the more cells, the more images it takes until the right one stands out. Whether
# training really slows down like that is the next chapter's first question.

# %% [markdown]
# ## {{n}}.7 The module as detectors use it
#
# Our `Attention` still lacks three things before DETR could use it: bias vectors, padding, and
# places. The last needs a decision: to what should the place codes be added? DETR adds them to what
# becomes queries and keys, so that places are compared. It does **not** add them to what becomes
# values, so that the output is a mixture of contents alone.
#
# The library does this in `DenseAttention`, a small subclass of PyTorch's module. Its method `mix` is
# the attention among a detector's queries:

# %%
from deformable_detr.layers.dense_attention import DenseAttention
from deformable_detr.structures import Queries

dense = DenseAttention(C, M)
content, position = torch.randn(2, 2, 5, C)  # of 2 images, with 5 queries each
expected, _ = dense(content + position, content + position, content)  # PyTorch's forward: q, k, v
assert torch.allclose(dense.mix(Queries(content, position)), expected, atol=1e-6)
print("places are in what becomes queries and keys, and not in what becomes values")

# %% [markdown]
# ## Exercise {{n}}.5  The module, complete
#
# *difficulty ●●● · 30 minutes · 14 lines*
#
# Complete a module that you can keep: multi-head attention with biases, padding and places, which can
# take over the weights of PyTorch's. There are two gaps to fill:
# - `forward` computes Eq. 1 for a batch. Places are added to what becomes queries and keys, not to what
#   becomes values. Padding is given per image.
# - `load` copies the weights and biases of an `nn.MultiheadAttention(C, M, batch_first=True)`. Its
#   biases are packed as its weights are: `in_proj_bias` has those of $U$, $V$ and $W'$ one after another.
#
# The checker asks for agreement with PyTorch's module: with places of zero and no padding (a mask of
# False); with places; with padding that differs between the images. Then it asks that gradients
# reach everything that was loaded.


# %% tags=["exercise"]
class PlacedAttention(nn.Module):
    """Multi-head attention with places and padding, as DETR uses it."""

    def __init__(self, C, M):
        super().__init__()
        self.num_heads = M
        self.U, self.V, self.W_prime, self.W = (nn.Linear(C, C) for _ in range(4))

    def forward(self, z, x, z_place, x_place, padding):
        """z, z_place: (B, Q, C). x, x_place: (B, N, C). padding: (B, N), True on padding.

        Returns (B, Q, C).
        """

        def heads(x):
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, M, N, D)

        # BEGIN SOLUTION
        q = heads(self.U(z + z_place))
        k = heads(self.V(x + x_place))
        v = heads(self.W_prime(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
        mixed = scores.softmax(-1) @ v
        return self.W(mixed.transpose(1, 2).flatten(2))
        # END SOLUTION

    def load(self, theirs):
        """Copy the weights and biases of nn.MultiheadAttention into the four linear layers."""
        # BEGIN SOLUTION
        weights = [*theirs.in_proj_weight.chunk(3), theirs.out_proj.weight]
        biases = [*theirs.in_proj_bias.chunk(3), theirs.out_proj.bias]
        layers = (self.U, self.V, self.W_prime, self.W)
        with torch.no_grad():
            for layer, weight, bias in zip(layers, weights, biases, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        # END SOLUTION


check("attention.5", PlacedAttention)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `forward` is that of `Attention` above with three changes: what goes into `U`, what goes into `V`, and
# a `masked_fill` before the softmax. `load` is the cell that copied weights into `attention`, with
# biases.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The scores are (B, M, Q, N) and the padding is (B, N). It needs two axes of length 1 in the middle:
# `padding[:, None, None]`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You add the places to the values too, or to the keys alone. Only the inputs of `U` and `V` get them:
# `W_prime` sees `x` as it is.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## Summary
#
# - Attention: scores are dot products divided by $\sqrt{D}$, weights are their softmax over the keys,
#   and the output is the average of the values. Heads do this side by side.
# - Eq. 1 *is* `nn.MultiheadAttention` without biases.
# - On a map the keys are the cells. To attention they are a bag: without a code of its place, no cell
#   has neighbours.
# - Before training each key has a weight of about $1/N_k$. So the right key's gradient falls like
#   $1/N_k$, and its part in what the query learns from one image like $1/\sqrt{N_k}$.
# - Averaging over more images, in steps or in a batch, makes up for that: four times the keys need
#   four times the images.
#
# > **Differs from the paper.** Eq. 1 has no biases, the code has. In Eq. 1 key and value are made from
# > the same $x_k$; DETR and the official code add the place code to what becomes queries and keys, not to
# > what becomes values. The paper assumes queries and keys of variance 1; Xavier's formula on PyTorch's
# > packed matrix gives $\tfrac12$, so weights start flatter still.
# >
# > **Differs from the official code.** Deformable DETR uses dense attention only among the queries in
# > the decoder, by `nn.MultiheadAttention` with dropout 0.1. This chapter's `Attention` has no dropout;
# > the library's detector has it.
#
# ## Further reading
#
# - {cite}`vaswani2017attention`: attention, $\sqrt{D}$ and the sine code.
# - {cite}`wang2018nonlocal`: dense attention on feature maps, before DETR.
# - {cite}`carion2020detr`: attention as a detector.
# - {cite}`zhu2021deformable`, section 3: Eq. 1 and the argument that this chapter measures.
