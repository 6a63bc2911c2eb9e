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
# # {{n}}. What does it look at?
#
# You will be able to
#
# You should know: 
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# ## {{n}}.1 What it looks at: sampling points
#
# Deformable attention can be drawn: each query has its points and weights. `record_sampling` listens
# while the model runs. As in the paper's Fig. 6 all levels and heads go into one picture.

# %%
batch = collate([test_set[index] for index in range(20)])
with record_sampling(shipped) as record, torch.no_grad():
    output = shipped(batch)
found = postprocess(output, [(128, 128)] * len(batch), threshold=0.5)
decoder, encoder = record.decoder[-1], record.encoder[-1]
print("decoder", tuple(decoder.locations.shape), "encoder", tuple(encoder.locations.shape))
print("levels", encoder.spatial_shapes)

# %% [markdown]
# Choose the largest and a small digit that were found, and the encoder token at the centre of the
# largest.

# %%
boxes = torch.cat([answer.boxes for answer in found])
image_of = torch.cat([torch.full((len(answer),), i) for i, answer in enumerate(found)])
query_of = torch.cat([answer.queries for answer in found])
label_of = torch.cat([answer.labels for answer in found])
sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
biggest, smallish = int(sizes.argmax()), int((sizes - 14).abs().argmin())
print("sides:", *(round(sizes[i].item()) for i in (biggest, smallish)), "pixels")

# %% mystnb={"image": {"alt": "Three test images with sampling points coloured by attention weight. Two close-ups of detected digits: dots spread over the box, most of them small and dark, the few large bright ones near its edges. The third, the whole image: small dots around the encoder's token, the heaviest next to it."}}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for axis, chosen in zip(axes, (biggest, smallish), strict=False):
    image_index, box = int(image_of[chosen]), boxes[chosen]
    picture = test_set.load_image(batch.targets[image_index].image_id)
    centre = ((box[:2] + box[2:]) / 2).tolist()
    label = f"query of this {names[label_of[chosen]]}"
    draw_sampling_points(
        axis, picture, decoder, int(query_of[chosen]), (128, 128), image_index, None, box, label
    )
    reach = (box[2:] - box[:2]).max().item()  # twice the box
    axis.set_xlim(max(0, centre[0] - reach), min(128, centre[0] + reach))
    axis.set_ylim(min(128, centre[1] + reach), max(0, centre[1] - reach))
column, row = (((boxes[biggest, :2] + boxes[biggest, 2:]) / 2) // 4).int().tolist()
image_index = int(image_of[biggest])
picture = test_set.load_image(batch.targets[image_index].image_id)
centre = (4 * column + 2, 4 * row + 2)  # of the cell of stride 4
token = row * 32 + column
draw_sampling_points(
    axes[2], picture, encoder, token, (128, 128), image_index, centre, label="encoder token"
)
plt.show()

# %% [markdown]
# *Figure {{n}}.1. What to see: sampling points of the last decoder layer for two detections, and of the
# last encoder layer for one token of the finest level (green: detected box; cross: the token). Area and
# colour of a point are its weight. The decoder's points are spread over the box and scale with it; most hardly
# count, and the heaviest one lies at an edge. The token's heaviest points lie close to it.*
#
# Is that so for all detections? Measure distances in half boxes: 0 is the centre, 1 an edge.

# %%
# NBVAL_IGNORE_OUTPUT
half_box = (boxes[:, 2:] - boxes[:, :2])[:, None] / 2
middle = (boxes[:, 2:] + boxes[:, :2])[:, None] / 2
points = decoder.locations[image_of, query_of].flatten(1, 3) * 128  # (N, M * L * K, 2)
weight = decoder.weights[image_of, query_of].flatten(1)
distance = ((points - middle) / half_box).abs().amax(-1)
at_edge = (distance > 0.8) & (distance < 1.2)
part_of_weight = ((weight * at_edge).sum() / weight.sum()).item()
print(
    f"at the edges: {at_edge.float().mean():.2f} of the points, {part_of_weight:.2f} of the weight"
)
assert 2 * at_edge.float().mean() < part_of_weight < 0.5

# %% [markdown]
# A point at an edge weighs more than twice as much as another; but half of the weight and more is
# spread over the inside.

# %% [markdown]
# ## Exercise {{n}}.1  How much of it is inside?
#
# *difficulty ●○○ · 10 minutes · 3 lines*
#
# A picture of three is an anecdote. Write the share of a query's attention weight that lies in a box,
# over all heads, levels and points. Remember how much weight one head has, and how much all have.


# %% tags=["exercise"]
def share_inside(locations, weights, box):
    """locations: (M, L, K, 2) as (x, y). weights: (M, L, K). box: (left, top, right, bottom).

    All in the same units, edges included. Returns a number in [0, 1].
    """
    # BEGIN SOLUTION
    low, high = torch.as_tensor(box).split(2)
    inside = ((locations >= low) & (locations <= high)).all(-1)
    return (weights * inside).sum() / weights.sum()
    # END SOLUTION


check("looking.1", share_inside)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A point is inside if both its coordinates are at least the box's first two numbers and at most its
# last two: `.all(-1)`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# In each head the weights sum to 1, so divide by their whole sum, M.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# x and y: boxes are (left, top, right, bottom), so the first number belongs to x, as in the points.
#
# </details>
#
# {{solution}}

# %% [markdown]
# For all detections at once:


# %%
def shares_inside(sampling, images, queries, boxes):
    """The share of weight inside the box, for N queries. boxes: (N, 4) xyxy in pixels."""
    points = sampling.locations[images, queries].flatten(1, 3) * 128  # (N, M * L * K, 2)
    weights = sampling.weights[images, queries].flatten(1)
    inside = ((points >= boxes[:, None, :2]) & (points <= boxes[:, None, 2:])).all(-1)
    return (weights * inside).sum(1) / weights.sum(1)


# %%
# NBVAL_IGNORE_OUTPUT
inside = shares_inside(decoder, image_of, query_of, boxes)
area = sizes**2 / 128**2
print(f"{len(inside)} detections")
print(f"{inside.mean():.2f} of the weight on {area.mean():.3f} of the area")
assert inside.mean() > 0.8 and area.mean() < 0.1

# %% [markdown]
# That is impressive, and it proves little. With box references the offsets are measured in half boxes
# ({{chapter many_scales}}), so at initialisation the star reaches just to the edge: *all* the weight lies inside
# before anything is learned. What the decoder did learn is to leave some of it outside, and to prefer
# some points:

# %%
# NBVAL_IGNORE_OUTPUT
weights = decoder.weights[image_of, query_of]  # (N, M, L, K)
effective = 1 / weights.flatten(2).square().sum(-1)  # 12 if all weights are equal
per_level = weights.sum(-1).mean((0, 1))
print(f"of 12 points a head uses effectively {effective.mean():.1f}")
print("weight on strides 4, 8, 16:", [round(x, 2) for x in per_level.tolist()])
assert effective.mean() < 9 and per_level[0] > 0.5

# %% [markdown]
# The encoder is a better witness. Its points are placed in pixels of each level, from a token's own
# cell, and nothing ties them to any object. Take the finest tokens whose centres lie in a digit of
# medium size, and ask how much of their weight stays in that digit's box. Two controls: an untrained
# encoder, and the trained one with offsets and weights *borrowed* from tokens on the background. The second tells
# attention that has learned to stay near from attention that knows its digit.

# %%
y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
centres = torch.stack([x, y], -1).reshape(-1, 2) * 4 + 2.0  # of the tokens of stride 4
asking = []
for image_index, target in enumerate(batch.targets):
    for box in pixels_of(target.boxes):
        side = (box[2:] - box[:2]).prod().sqrt()
        if small <= side < large:
            tokens = ((centres >= box[:2]) & (centres <= box[2:])).all(-1).nonzero()[:, 0]
            asking += [(image_index, int(token), box) for token in tokens]
images, tokens = (torch.tensor(column) for column in list(zip(*asking, strict=True))[:2])
token_boxes = torch.stack([box for _, _, box in asking])

# %%
# NBVAL_IGNORE_OUTPUT
fresh = new_model().eval()
with record_sampling(fresh) as untrained, torch.no_grad():
    fresh(batch)
learned = shares_inside(encoder, images, tokens, token_boxes)
control = shares_inside(untrained.encoder[-1], images, tokens, token_boxes)
print(f"{len(tokens)} tokens: {learned.mean():.2f} of the weight, untrained {control.mean():.2f}")
assert learned.mean() > 1.5 * control.mean()

# %%
# NBVAL_IGNORE_OUTPUT
on_digit = torch.zeros(len(batch), 1024, dtype=torch.bool)
for image_index, target in enumerate(batch.targets):
    for box in pixels_of(target.boxes):
        on_digit[image_index] |= ((centres >= box[:2]) & (centres <= box[2:])).all(-1)
ground = (~on_digit).nonzero()
torch.manual_seed(0)
lender = ground[torch.randint(len(ground), (len(tokens),))].T  # a background token for each
arrows = encoder.locations[tuple(lender)] * 128 - centres[lender[1]][:, None, None, None]
points = (arrows + centres[tokens][:, None, None, None]).flatten(1, 3)
weight = encoder.weights[tuple(lender)].flatten(1)
inside = ((points >= token_boxes[:, None, :2]) & (points <= token_boxes[:, None, 2:])).all(-1)
borrowed = (weight * inside).sum(1) / weight.sum(1)
print(f"with what background tokens ask: {borrowed.mean():.2f}")
assert borrowed.mean() - control.mean() > learned.mean() - borrowed.mean() > 0

# %% mystnb={"image": {"alt": "Three histograms of the share of a token's attention weight that lies in the box of the digit on which the token lies: the untrained encoder's is narrow, between 0.2 and 0.5; the borrowed one is wide and lies to the right of it; the trained one lies a little further to the right."}}
figure, axis = plt.subplots(figsize=(6, 2.6))
bins = np.linspace(0, 1, 31)
axis.hist(control, bins, color="C1", alpha=0.6, label="untrained")
axis.hist(borrowed, bins, color="C2", histtype="step", lw=1.5, label="borrowed")
axis.hist(learned, bins, color="C0", alpha=0.6, label="trained")
axis.set(xlabel="share of attention weight inside the digit's box", ylabel="tokens")
axis.legend()
plt.show()

# %% [markdown]
# *Figure {{n}}.2. What to see: tokens on a digit of medium size keep more of their attention on that digit
# after training. But most of the rise comes from attention that moved nearer for every token; what a token
# adds by being on this digit is the step from* borrowed *to* trained*, the smaller part. "The instances are
# already separated in the encoder", says the paper of its Fig. 6; here, a little.*

# %% [markdown]
# ## {{n}}.2 What it looks at: gradients
#
# Sampling points say where one layer reads. Which *pixels* matter for the final answer? Differentiate
# an item of a detection, say its centre $x$, by every pixel, and take the norm over the colours: the
# paper's Fig. 5, an old idea {cite}`simonyan2014saliency`. Autograd does it. But is it the derivative?
# Finite differences know. Move the image a little along the gradient $g$: the item should change by
# $|g|$ per unit.

# %%
precise, _ = load_model(DATA / "checkpoints" / "digits.safetensors")
precise = precise.double()
image_index, query = int(image_of[biggest]), int(query_of[biggest])
single = collate([test_set[image_index]])


def centre_x(images):
    """The centre x of one detection, for images (1, 3, 128, 128) in float64."""
    return precise(Batch(images, single.mask, single.sizes)).boxes[0, query, 0]


# %%
pixels = single.images.double().requires_grad_(True)
(gradient,) = torch.autograd.grad(centre_x(pixels), pixels)
direction = gradient / gradient.norm()
with torch.no_grad():
    ahead, back = (centre_x(pixels + sign * 1e-4 * direction) for sign in (1, -1))
measured = float(ahead - back) / 2e-4
told = gradient.norm().item() / measured
print(f"autograd tells {told:.1f} of the change")
assert abs(told - 1) > 0.05

# %% [markdown]
# Not all of it. Refinement detaches the references ({{chapter refinement}}): each layer learns to correct what it is
# given, and no gradient flows through what it is given. Good for training, wrong for this question:
# the pixels do act through the references. So let `detach` do nothing while the model runs.

# %%
pixels = single.images.double().requires_grad_(True)
with FollowReferences():
    item = centre_x(pixels)
(whole,) = torch.autograd.grad(item, pixels)
along = (whole * direction).sum().item()
print("with references followed:", abs(along / measured - 1) < 0.001)
assert abs(along / measured - 1) < 0.001

# %% mystnb={"image": {"alt": "Five maps of one detected digit: which pixels move its centre x, centre y, width, height and class score. All are bright near the digit and dark elsewhere; y and h are brightest at its top or bottom edge."}}
picture = test_set.load_image(batch.targets[image_index].image_id)
norms = gradient_norms(shipped, single, query, int(label_of[biggest]))
figure, axes = plt.subplots(1, 5, figsize=(11, 2.4))
box = output.boxes[image_index, query]
draw_gradient_norms(list(axes), np.asarray(picture), norms, box)
plt.show()

# %% [markdown]
# *Figure {{n}}.3. What to see: the gradient norms of the detection's x, y, w, h and score (the library's
# `gradient_norms`; green: the detected box). Brightness is scaled for each map. x and w light up at the left and
# right edges, y and h at top and bottom, the score on the whole digit.*

# %%
own = whole[0].norm(dim=0).float()
torch.testing.assert_close(norms["x"], own, atol=1e-2 * own.max().item(), rtol=1e-2)

# %% [markdown]
# Once more: is it so in general? Images of one size, without padding, do not touch in evaluation, so one backward pass
# gives the gradients for all of them. We take the best detection of each of 12 images, and measure in
# units of its box: $|u| = 1$ is its left or right edge, $|v| = 1$ its top or bottom.

# %%
pixels = batch.images[:12].clone().requires_grad_(True)
with FollowReferences():
    everything = shipped(Batch(pixels, batch.mask[:12], batch.sizes[:12]))
usable = [i for i, answer in enumerate(found[:12]) if len(answer)]
top = [(i, int(found[i].queries[0]), int(found[i].labels[0])) for i in usable]
images, queries, labels = (torch.tensor(column) for column in zip(*top, strict=True))
x, y, w, h = everything.boxes[images, queries].unbind(-1)
items = {"x": x, "y": y, "w": w, "h": h}
items["score"] = everything.logits[images, queries, labels].sigmoid()

# %%
energy = {}
for name, item in items.items():
    (gradient,) = torch.autograd.grad(item.sum(), pixels, retain_graph=True)
    energy[name] = gradient[images].square().sum(1)  # (N, 128, 128)
place = torch.arange(128) + 0.5
cx, cy, width, height = (output.boxes[images, queries] * 128).unbind(-1)
u = (place - cx[:, None]).div(width[:, None] / 2)[:, None, :]  # (N, 1, 128)
v = (place - cy[:, None]).div(height[:, None] / 2)[:, :, None]  # (N, 128, 1)
near = (u.abs() <= 1.5) & (v.abs() <= 1.5)
sides_only = ((u.abs() - 1).abs() <= 0.3) & (v.abs() <= 0.7)
ends_only = ((v.abs() - 1).abs() <= 0.3) & (u.abs() <= 0.7)

# %% [markdown]
# Before you run: of the gradient's energy for $x$, is there more at the left and right edges, or at
# the top and bottom? For $y$? For the width?


# %%
def mean_in(values, region):
    """The mean of (N, 128, 128) values in a region of each; NaN where that is empty."""
    return (values * region).sum((1, 2)) / region.sum((1, 2))


# %%
# NBVAL_IGNORE_OUTPUT
print(f"the neighbourhood is {near.float().mean():.2f} of the image")
ratios = {}
for name, values in energy.items():
    share = ((values * near).sum((1, 2)) / values.sum((1, 2))).nanmean()
    log_ratio = (mean_in(values, sides_only) / mean_in(values, ends_only)).log()
    ratios[name] = log_ratio[log_ratio.isfinite()].mean().exp().item()
    print(f"{name:5} {share:.2f} of the energy near; sides to ends {ratios[name]:.2f}")
    assert share > 4 * near.float().mean()
assert min(ratios["x"], ratios["w"]) > ratios["score"] > max(ratios["y"], ratios["h"])

# %% [markdown]
# Most of the energy lies near the object, for every item. And the paper's observation holds: x and the
# width are decided at the left and right edges, y and the height at the top and bottom. The score, which
# has less reason to prefer an edge, comes out in between.
#
# ## Summary
#
# - AP: detections choose objects in order of score, duplicates are errors; precision over 101
#   recalls, ten overlaps, all classes.
# - The loop is six lines. The paper's recipe slows the backbone and the sampling and drops the rate once;
#   the digits' has one rate, a warm-up and a cosine. Both clip.
# - Small and narrow objects come last; duplicates hardly occur.
# - Sampling points lie in the box by construction in the decoder, in the encoder mostly because attention
#   has learned to stay near.
# - A gradient picture is true only if finite differences agree: follow the references.
#
# > **Differs from the paper.** The paper trains 50 epochs on COCO with a ResNet-50, step schedule and
# > slow rates for backbone and offsets; the digits use one rate, a cosine and a small backbone. The
# > paper does not say whether its Fig. 5 follows the references.
# >
# > **Differs from the official code.** There, the gradient is clipped at a norm of 0.1, for the
# > digits at 0.5. Training there has no warm-up.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`, section 5 and Appendices A.5 and A.6: the recipe, Figs. 5 and 6.
# - {cite}`lin2014coco`: the data set and its format.
# - {cite}`loshchilov2019adamw`: why weight decay stands apart from the gradient.
# - {cite}`simonyan2014saliency`: the first pictures of gradients by pixels.
