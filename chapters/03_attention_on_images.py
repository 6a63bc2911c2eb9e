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
#
# You should know: 
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# What would help? If someone told each query *roughly* where to look, so that it saw 16 of the
# 1,024 cells and the right one among them, its problem would be that of the first curve. That is
# the idea of deformable attention: few keys for each query, and learned places for them.
#
# A toy is a toy: one layer, one head, no image.
#
# ## {{n}}.1 Cost, by counting
#
# Multiplying $(a \times b)$ by $(b \times c)$ takes $abc$ multiplications and as many additions:
# $2abc$ floating-point operations, or FLOPs. PyTorch can count them while code runs.

# %%
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call, *inputs):
    """FLOPs of all matrix products in call(*inputs)."""
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


left, right = torch.randn(3, 5), torch.randn(5, 7)
assert count_flops(torch.matmul, left, right) == 2 * 3 * 5 * 7 == 210

# %% [markdown]
# Take Eq. 1 apart with 7 queries, 13 keys and $C = 256$, piece by piece.

# %%
z, x = torch.randn(1, 7, C), torch.randn(1, 13, C)
pieces = {
    "U z": count_flops(attention.U, z),
    "V x": count_flops(attention.V, x),
    "W' x": count_flops(attention.W_prime, x),
    "W": count_flops(attention.W, z),
}
pieces["scores and sum"] = count_flops(attention, z, x) - sum(pieces.values())
print(pieces)
assert pieces["U z"] == 2 * 7 * C * C and pieces["V x"] == 2 * 13 * C * C

# %% [markdown]
# ## Exercise {{n}}.1  The bill
#
# *difficulty ●●○ · 10 minutes · 3 lines*
#
# Write the number of FLOPs of all matrix products in Eq. 1, for any sizes. DETR's decoder, for
# instance, has 100 queries and as many keys as the map has cells.


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
# The paper gives the cost as $O(N_q C^2 + N_k C^2 + N_q N_k C)$. An $O$ hides factors. Here all three
# are 4: two products of each kind, 2 FLOPs for each multiply-add.

# %%
z, x = torch.randn(1, 11, C), torch.randn(1, 30, C)
assert count_flops(attention, z, x) == 4 * C * (11 * C + 30 * C + 11 * 30)

# %% [markdown]
# With a fixed number of queries, as in DETR's decoder, the bill grows only linearly with the map.
# The trouble is the encoder, where every cell asks every cell. There $N_q = N_k = N$:
# $8NC^2 + 4N^2C$. The quadratic part overtakes the linear one at $N = 2C$, which is **512 tokens**
# for the usual $C = 256$. Is that many? Take the image size that detectors are tested with, 800 ×
# 1066 pixels. How many cells it has at each stride is not ours to guess; a chain of stride-2
# convolutions tells.

# %%
halve = nn.Conv2d(1, 1, kernel_size=3, stride=2, padding=1, device="meta")
image, shapes = torch.empty(1, 1, 800, 1066, device="meta"), {}
for stride in (2, 4, 8, 16, 32):
    image = halve(image)
    shapes[stride] = tuple(image.shape[-2:])
assert shapes[32] == (25, 34)  # 1066 / 32 = 33.3, rounded up
assert shapes[32][0] * shapes[32][1] == 850 > 2 * C

# %% [markdown]
# At stride 32, the coarsest map of a ResNet {cite}`he2016resnet`, the quadratic part is already the
# larger. Now the whole bill, for one self-attention layer with $C = 256$ and 8 heads. Memory is
# that of the weights $A$, in 32-bit floats: $M$ matrices of $N \times N$ numbers.
#
# **Before you run**: how much memory do the weights of one layer take at stride 8? Megabytes or
# gigabytes?

# %%
layer, bill = nn.MultiheadAttention(C, M, batch_first=True, device="meta"), {}
print("stride  map        tokens   linear  quadratic   weights A")
for stride in (32, 16, 8, 4):
    height, width = shapes[stride]
    N = height * width
    x = torch.empty(1, N, C, device="meta")
    total = count_flops(layer, x, x, x)
    linear = 4 * count_flops(nn.Linear(C, C, device="meta"), x)
    A = torch.empty(M, N, N, device="meta")
    bill[stride] = (N, linear / 1e9, (total - linear) / 1e9, A.nbytes / 1e6)
    _, *cost = bill[stride]
    print(f"{stride:4}    {height:3} x {width:3} {N:8,}", end="  ")
    print("{:5.1f} GF {:7.1f} GF {:8,.0f} MB".format(*cost))

# %%
assert bill[4][0] == 53_400
assert math.isclose(bill[4][3] / bill[8][3], 16, rel_tol=0.01)  # half the stride: 16 times
A = torch.zeros(M, 850, 850)  # a real one, for once
assert A.numel() * A.element_size() / 1e6 == bill[32][3]

# %% mystnb={"image": {"alt": "FLOPs of one attention layer against the number of tokens, both axes logarithmic. The linear part and the steeper quadratic part cross at 512 tokens. The four strides of an 800 by 1066 image are marked, all to the right of the crossing."}}
tokens = np.geomspace(64, 1e5)
figure, axis = plt.subplots()
axis.plot(tokens, 8 * tokens * C**2 / 1e9, label="projections, $8NC^2$")
axis.plot(tokens, 4 * tokens**2 * C / 1e9, label="scores and sum, $4N^2C$")
axis.axvline(2 * C, color="k", ls=":", lw=1)
axis.text(2 * C * 0.9, 3000, "$N = 2C$", ha="right")
for stride, (count, linear, quadratic, _) in bill.items():
    axis.plot([count, count], [linear, quadratic], "ko", ms=4)
    axis.text(count * 1.1, linear * 0.35, f"stride {stride}")
axis.set(xscale="log", yscale="log", xlabel="tokens $N$", ylabel="GFLOPs in one layer")
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: the quadratic part crosses the linear one at 512 tokens. All four maps of
# this image, strides 4 to 32, lie to the right of it (dots: counted).*

# %%
for count, linear, quadratic, _ in bill.values():
    assert math.isclose(linear, 8 * count * C**2 / 1e9, rel_tol=1e-6)
    assert math.isclose(quadratic, 4 * count**2 * C / 1e9, rel_tol=1e-6)
    assert quadratic > linear
assert math.isclose(8 * 2 * C * C**2, 4 * (2 * C) ** 2 * C)  # equal at N = 2C

# %% [markdown]
# Three honest remarks.
#
# First, PyTorch's counter sees matrix products only. The softmax adds a handful of operations for
# each of the $M N^2$ weights; the products spend $4D = 128$ on each.
#
# Second, an encoder layer also has a feed-forward network, which is linear: $4NCF$ for a hidden
# width $F$. DETR's is 2,048 wide. Then the quadratic part wins from $N = 2C + F$ on, which is 2,560
# tokens: between stride 32 and stride 16.
#
# Third, nobody has to *store* $A$. Newer kernels compute it block by block and forget it, in the
# forward and in the backward pass; `F.scaled_dot_product_attention` uses them. The paper of 2020
# did not have them. What does autograd keep, really? We ask it.


# %%
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
# So today memory need not be quadratic. The FLOPs still are, and so is the time:

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

# %%
for name in ("dense", "fused"):  # four times the tokens: 16 times the time, give or take
    assert seconds[name, 2048] > 5 * seconds[name, 512]

# %% [markdown]
# These are times of one processor, on a day when it may have had other work. The counts above are
# the same everywhere.
#
# ## {{n}}.2 Why small objects suffer
#
# DETR works at stride 32, because of that bill. How much of an object is left there? COCO calls an
# object small below $32^2$ pixels and large above $96^2$ {cite}`lin2014coco`.

# %%
print("cells covered by an object of")
print("stride    9 px   32 px   96 px")
for stride in (32, 16, 8, 4):
    print(f"{stride:6}", *(f"{(side / stride) ** 2:7.2f}" for side in (9, 32, 96)))
assert 11 < (32**2 - 9**2) / 9**2 < 12

# %% [markdown]
# At stride 32 the largest of the small objects is **one** cell, and one of 9 pixels shares its cell
# with nearly twelve times its own area of background.
#
# Here is what averaging over cells does to real ink. The image is one of the book's samples, and
# its boxes come from the annotation file.

# %%
picture = plt.imread("../data/samples/000012.png")[..., :3]
pixels = torch.tensor(picture).permute(2, 0, 1)  # (3, 128, 128)
with open("../data/samples/annotations.json") as file:
    annotations = [a for a in json.load(file)["annotations"] if a["image_id"] == 12]
small = next(a["bbox"] for a in annotations if a["category_id"] == 9)  # left, top, width, height
large = next(a["bbox"] for a in annotations if a["category_id"] == 1)
assert small[2:] == [8, 12] and large[2:] == [23, 30]  # an eight and a zero

# %% mystnb={"image": {"alt": "A grey photograph with coloured digits, at full resolution and averaged over cells of 4, 8, 16 and 32 pixels. Two boxes mark a zero 30 pixels high, a ring at 8 and a stain at 16, and an eight 12 pixels high, which is a smear at 8 and a tinted cell at 16."}}
figure, axes = plt.subplots(1, 5, figsize=(9, 2.1))
for axis, stride in zip(axes, (1, 4, 8, 16, 32), strict=True):
    cells = F.avg_pool2d(pixels, stride)
    axis.imshow(cells.permute(1, 2, 0), extent=(0, 128, 128, 0))
    for left, top, w, h in (small, large):
        axis.add_patch(plt.Rectangle((left, top), w, h, fill=False, ec="w", lw=1.2))
    axis.set(xticks=[], yticks=[], title="pixels" if stride == 1 else f"stride {stride}")
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: a zero of 23 × 30 pixels is a ring at stride 8 and a stain at 16; an
# eight of 8 × 12 is a smear at stride 8; at 16 its shape is gone, a tint of one cell is left.*


# %%
def contrast(stride, left, top, w, h):
    """Standard deviation of the cells in a box, all channels, against that of its pixels: the mean
    over every way in which the grid of cells can lie."""

    def spread(image):
        return image[:, top : top + h, left : left + w].std((1, 2)).mean().item()

    spreads = []
    for shift in itertools.product(range(stride), repeat=2):
        cells = F.avg_pool2d(pixels.roll(shift, (1, 2)), stride)
        blurred = cells.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        spreads.append(spread(blurred.roll((-shift[0], -shift[1]), (1, 2))))
    return np.mean(spreads) / spread(pixels)


print("contrast left in the small and in the large one")
for stride in (4, 8, 16):
    print(f"stride {stride:2}:", *(f"{contrast(stride, *box):.2f}" for box in (small, large)))
assert contrast(16, *small) < 0.3 < contrast(16, *large) < 0.5 < contrast(8, *large)

# %% [markdown]
# A network keeps more than an average, since a cell has 256 numbers and its receptive field is
# wide. But one cell must then hold everything about the object and its background, and a box edge
# has to be found to a small part of a cell.
#
# There is a second handicap, and a finer stride does not cure it. At the start an object gets the
# share of attention that it has of the *area*:

# %%
for side in (9, 32, 96):
    shares = [(side / stride) ** 2 / (800 * 1066 / stride**2) for stride in (32, 16, 8, 4)]
    print(f"{side:3} px: {shares[0]:.4%} of the weight, at every stride")
    assert np.allclose(shares, side**2 / (800 * 1066))

# %% [markdown]
# A finer map has more cells on the object, each with less weight. The sum stays. By section 2.6 so
# does the gradient: an object of 96 pixels is heard a hundred times louder than one of 9.
#
# What people measured on COCO fits. These lines are quoted from the table in the official
# repository's README (the column of strides is ours; AP, average precision, is COCO's grade, the
# higher the better, {{chapter training}} computes it; Faster R-CNN is a convolutional detector, FPN the maps at
# several strides that it reads):
#
# | model | stride | epochs | AP | AP of small objects | training, GPU hours |
# |:--|--:|--:|--:|--:|--:|
# | Faster R-CNN with FPN {cite}`lin2017fpn` | 4 to 64 | 109 | 42.0 | 26.6 | 380 |
# | DETR | 32 | 500 | 42.0 | 20.5 | 2,000 |
# | DETR-DC5 | 16 | 500 | 43.3 | 22.5 | 7,000 |
# | Deformable DETR | 8 to 64 | 50 | 44.5 | 27.1 | 325 |
#
# Halving the stride (DC5) helps small objects and costs three and a half times the training. The
# last line is what this book builds.
#
# ## {{n}}.3 Look at fewer cells
#
# Both troubles, the cost and the faint gradients, come from looking *everywhere*. So let each query
# look at less. A **window** {cite}`ramachandran2019standalone` takes the neighbourhood. **Axial**
# attention takes the query's row and column. **Deformable** attention takes $K$ points for each
# head, and learns where.
#
# ## Exercise {{n}}.2  A window
#
# *difficulty ●●○ · 12 minutes · 5 lines*
#
# Build the mask with which `F.scaled_dot_product_attention` becomes window attention: query
# $(i, j)$ may look at the cells that are at most `radius` rows **and** at most `radius` columns
# away.


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


check("attention_on_images.2", window_mask)

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
# Four ways to look, from the same cell of a 25 × 34 map, which is stride 32 of our image. For the
# last one we take its state before training: 8 heads with $K = 4$ points each, in a star ({{chapter many_scales}}
# draws where it comes from).

# %%
(height, width), i, j = shapes[32], 10, 20  # the query stands in row 10, column 20
row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
looks_at = {
    "dense": torch.ones(height, width, dtype=torch.bool),
    "window 7 × 7": ((row - i).abs() <= 3) & ((column - j).abs() <= 3),
    "axial": (row == i) | (column == j),
    "deformable": torch.zeros(height, width, dtype=torch.bool),
}
for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
    for k in range(1, 5):
        looks_at["deformable"][i + k * dy, j + k * dx] = True
keys = {name: int(seen.sum()) for name, seen in looks_at.items()}
print(keys)
assert keys == {"dense": 850, "window 7 × 7": 49, "axial": height + width - 1, "deformable": 8 * 4}

# %% mystnb={"image": {"alt": "Four maps of 25 by 34 cells with one query marked. Dense attention looks at all cells, the window at a block of seven by seven around the query, axial attention at the query's row and column, deformable attention at 32 cells in a star of eight rays."}}
figure, axes = plt.subplots(1, 4, figsize=(9, 2.1))
for axis, (name, seen) in zip(axes, looks_at.items(), strict=True):
    axis.imshow(seen, vmin=-0.3, vmax=1.1)
    axis.plot(j, i, "x", color="C1", mew=2)
    axis.set(xticks=[], yticks=[], title=f"{name}: {keys[name]}")
plt.show()

# %% [markdown]
# *Figure {{n}}.3. What to see: which cells one query (cross) looks at, and how many. The first three
# patterns are the same for every image; the points of the last one move with what the query sees.*
#
# What is left of the quadratic part when the map gets finer?

# %%
print("keys per query and head, strides 32, 16, 8, 4")
maps = [shapes[stride] for stride in (32, 16, 8, 4)]
table = {
    "dense": [height * width for height, width in maps],
    "window 7 × 7": [49 for _ in maps],
    "axial": [height + width - 1 for height, width in maps],
    "deformable": [4 for _ in maps],
}
for name, counts in table.items():
    print(f"{name:13}", *(f"{count:7,}" for count in counts))
assert table["dense"][-1] / table["dense"][0] > 60 and len(set(table["deformable"])) == 1

# %% [markdown]
# A window is cheap, but blind beyond its border, and an object may be larger than it. A row and a
# column reach far, but see only a thin cross. Deformable attention stays at $K$ keys whatever the
# map, starts with weights of exactly $1/K$ instead of about $1/N_k$, and can reach any place, if it
# learns to. How places can be learned is {{chapter deformable_convolution}}; the module is {{chapter deformable_attention}}.
#
# ## Summary
#
# - Attention: scores by dot products over $\sqrt{D}$, softmax over keys, average of values; heads
#   do it side by side, and Eq. 1 *is* `nn.MultiheadAttention` without biases.
# - On a map the keys are the cells, a bag of them: without a place code, order means nothing.
# - Before training each key gets about $1/N_k$. The right key's gradient falls like $1/N_k$, and
#   its part in what the query hears like $1/\sqrt{N_k}$: more cells, later learning.
# - Cost: $4(N_q C^2 + N_k C^2 + N_q N_k C)$ FLOPs. On images the last term rules.
# - Small objects need fine maps, which dense attention cannot pay for, and get the fainter
#   gradients.

# %% [markdown]
# > **Differs from the paper.** Eq. 1 has no biases, the code has. In Eq. 1 key and value are the
# > same $x_k$; DETR and the official code add the place code to queries and keys, not to values.
# > The paper assumes queries and keys of variance 1; Xavier's formula on PyTorch's packed matrix
# > gives $\tfrac12$, so weights start flatter still. Its memory argument is older than fused
# > kernels; its FLOP argument stands.
# >
# > **Differs from the official code.** Deformable DETR uses dense attention only among the queries
# > in the decoder, by `nn.MultiheadAttention` with dropout 0.1. This chapter's `Attention` has
# > none; the library's detector has it.
#
# ## Further reading
#
# - {cite}`vaswani2017attention`: attention, $\sqrt{D}$ and the sine code.
# - {cite}`wang2018nonlocal`: dense attention on feature maps, before DETR.
# - {cite}`carion2020detr`: attention as a detector.
# - {cite}`zhu2021deformable`, sections 1 and 3: the argument that this chapter measures.
# - {cite}`ramachandran2019standalone`: windows.
# - {cite}`sun2021tspfcos`: a study of why DETR converges slowly.
