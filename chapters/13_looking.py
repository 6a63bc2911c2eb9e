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
# - **record** where any query of a detector read its maps, with a few lines of your own, and **draw** it,
# - **compute** which pixels move which number of a detection, and **check** this with finite differences,
# - **ask** for all of this with one call, in Python or on the command line,
# - **judge** such pictures: by a measure on a thousand images, with controls and intervals.
#
# You should know: box references ({{chapter many_scales}}), the decoder's layers and where its gradient is cut
# ({{chapter refinement}}), and the shipped detector ({{chapter training}}).
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# The detector says "seven" and draws a box around the seven. Why there, and why a seven? A network cannot
# tell us in words, but we can ask it two questions that have exact answers.

# %% tags=["hide-input"] mystnb={"image": {"alt": "The running example at the left, then backbone and encoder, then a decoder layer, then the numbers x, y, w, h and score, joined by arrows. From the decoder layer an orange arrow leads back to three points on the maps: question 1, where did one query read the maps. From the numbers a purple arrow leads all the way back to the image: question 2, which pixels would change the answer."}}
import matplotlib.pyplot as plt
from schematics.looking import controls, frame, picture, two_questions, why_borders

plt.style.use("book.mplstyle")
two_questions()

# %% [markdown]
# *Figure {{n}}.1. The two questions of this chapter. The first is about one layer, and is answered on the way
# forward. The second is about the whole detector, and is answered on the way back.*
#
# The authors of Deformable DETR asked both {cite}`zhu2021deformable`: their Fig. 6 shows sampling points (Appendix
# A.6), their Fig. 5 gradients (Appendix A.5). Each figure shows a few pictures, and a few sentences say what one
# sees in them. We first make both figures ourselves, for the seven that we know. Then we let the library make
# them. And then we ask, on a thousand images, whether those sentences are true of our detector.

# %% tags=["hide-input"]
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy.stats import spearmanr

from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.data.images import read_image
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.exercises import check
from deformable_detr.inference.detector import load_detector
from deformable_detr.inference.postprocess import postprocess
from deformable_detr.layers.attention import Sampling
from deformable_detr.look import explain
from deformable_detr.look.asking import Look
from deformable_detr.look.gradients import FollowReferences
from deformable_detr.look.overlays import draw_gradient, show
from deformable_detr.look.sampling import record_sampling
from deformable_detr.structures import Batch

torch.set_num_threads(1)

# %%
DATA = Path("../data")
WEIGHTS, SEVEN = DATA / "checkpoints" / "digits.safetensors", DATA / "samples" / "000010.png"
detector = load_detector(WEIGHTS)
model = detector.model.eval()
names = [category["name"] for category in detector.categories]
batch = Batch.from_images([detector.eval_transform()(read_image(SEVEN))])
print("image", tuple(batch.images.shape), "queries", model.config.num_queries)

# %% [markdown]
# ## {{n}}.1 Where did one query read?
#
# In each of its layers the decoder reads the encoder's maps by multi-scale deformable attention. A query says
# where to read and how much each place counts. Three things determine this, here for B images, Q queries, M heads,
# L levels and K points per head and level:
#
# | what | shape | made by |
# |:--|:--|:--|
# | offsets | (B, Q, M L K 2) | the linear layer `sampling_offsets` |
# | scores | (B, Q, M L K) | the linear layer `attention_weights`; a softmax makes weights of them |
# | references | (B, Q, L, 4) | the boxes that the layer before has found, given to the attention as an argument, one copy per level; layer 0 is given those of the first stage |
#
# All three exist while the model runs, and are thrown away right after. PyTorch lets us listen: a **hook** is a
# function that a module calls whenever it has run. A forward hook is given the module, its arguments and its
# result. A pre-hook is called before the module runs, and is given only the arguments. Nothing in the model has to
# be changed for this.

# %%
kept = {}


def keep(*name):
    """A hook that keeps what a module has returned."""
    return lambda module, arguments, result: kept.update({name: result.detach()})


def keep_references(number):
    """A hook that keeps the second argument that a module is given."""
    return lambda module, arguments: kept.update({(number, "references"): arguments[1]})


hooks = []
for number, layer in enumerate(model.decoder.layers):
    attention = layer.cross_attention
    hooks += [
        attention.sampling_offsets.register_forward_hook(keep(number, "offsets")),
        attention.attention_weights.register_forward_hook(keep(number, "scores")),
        attention.register_forward_pre_hook(keep_references(number)),
    ]

# %%
with torch.no_grad():
    output = model(batch)
for hook in hooks:
    hook.remove()  # otherwise they would listen forever
for what in ("offsets", "scores", "references"):
    print(what, tuple(kept[2, what].shape))
query = int(output.logits[0].sigmoid().amax(-1).argmax())
label = int(output.logits[0, query].argmax())
print("the best query says:", names[label])

# %% [markdown]
# Now the offsets have to become places in the picture. The references are boxes $(c_x, c_y, w, h)$, so the rule of
# {{chapter many_scales}} applies: an offset of $K$ reaches from the centre of the box to its edge. Our picture has
# 128 x 128 pixels and no padding, so a location in [0, 1] times 128 is a place in pixels.


# %%
M, L, K = attention.num_heads, attention.num_levels, attention.num_points


def points_and_weights(number, query):
    """Of a query in one decoder layer: points (M, L, K, 2) in pixels, weights (M, L, K)."""
    offsets = kept[number, "offsets"][0, query].view(M, L, K, 2)
    weights = kept[number, "scores"][0, query].view(M, L * K).softmax(-1).view(M, L, K)
    centre, sides = kept[number, "references"][0, query][:, None].split(2, -1)  # (L, 1, 2)
    return (centre + offsets / K * sides / 2) * 128, weights


points, weights = points_and_weights(2, query)
of_heads = [round(total, 3) for total in weights.sum((1, 2)).tolist()]
print("points", tuple(points.shape), "weight of each head:", of_heads)

# %% [markdown]
# A query has M L K = 48 points in a layer. In each head the weights of its twelve points sum to one. As in the
# paper's Fig. 6, we draw the points of all heads and levels into one picture.

# %% mystnb={"image": {"alt": "The seven three times, each in the blue box that was found, with 48 orange discs. In layer 0 the larger discs lie in the box and at its top and bottom; in layer 1 they lie around the border; in layer 2 the largest ones lie on the left and right border, and small ones all over the seven."}}
cx, cy, w, h = (output.boxes[0, query] * 128).tolist()
box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
figure, axes = plt.subplots(1, 3, figsize=(7.2, 3.2))
for number, axis in enumerate(axes):
    points, weights = points_and_weights(number, query)
    picture(axis, pale=0.45, window=(25, 95, 50, 125))
    frame(axis, box)
    x, y = points.reshape(-1, 2).T
    axis.scatter(x, y, s=5 + 400 * weights.flatten(), color="C4", edgecolors="black", lw=0.7)
    axis.set_title(f"layer {number}")
plt.show()

# %% [markdown]
# *Figure {{n}}.2. Where the query that found the seven read, in each of the three decoder layers; a larger disc
# has a larger weight. The blue box is the detection. Compare the heaviest points of the last layer with the left and
# right border of the box.*
#
# The library's `record_sampling` does the same for any model that samples, also for those of Hugging Face. It must
# agree with our hooks:

# %%
with record_sampling(model) as record, torch.no_grad():
    model(batch)
for number, sampling in enumerate(record.decoder):
    points, weights = points_and_weights(number, query)
    torch.testing.assert_close(points, sampling.locations[0, query] * 128, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(weights, sampling.weights[0, query], atol=1e-5, rtol=1e-5)
print("equal in", len(record.decoder), "layers")

# %% [markdown]
# The detector has 30 queries, and most of them find nothing. What do those look at? In JupyterLab, move the
# slider.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A still of a figure with sliders for query and layer: the whole picture, with the dashed box around which the query looks in this layer and its 48 orange discs, here for the query that found the seven."}}
# NBVAL_IGNORE_OUTPUT
from schematics import slider


def look_of(query, layer):
    """One query in one layer, over the whole picture."""
    points, weights = points_and_weights(layer, query)
    x, y, w, h = (kept[layer, "references"][0, query, 0] * 128).tolist()
    axis = plt.subplots(figsize=(3.6, 3.9))[1]
    picture(axis)
    frame(axis, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), ls="--")
    x, y = points.reshape(-1, 2).T
    axis.scatter(x, y, s=4 + 200 * weights.flatten(), color="C4", edgecolors="black", lw=0.6)
    best = output.logits[0, query].sigmoid().max()
    axis.set(xlim=(0, 128), ylim=(128, 0), title=f"query {query}: best score {best:.2f}")


slider(look_of, query=(0, model.config.num_queries - 1, query), layer=(0, 2, 2))

# %% [markdown]
# *Figure {{n}}.3. One query in one layer. The dashed box is the reference around which it looks. Try others. All keep
# nearly all of their weight in and near their own box, whatever is in it. Queries 1 to 5 have theirs on two bright specks
# of the background, and no score of theirs reaches 0.3. No other query has the seven, so it is reported once.*
#
# ## Exercise {{n}}.1  How much of it is inside?
#
# *difficulty ●○○ · 10 minutes · 3 lines*
#
# Pictures have to become numbers before they can be compared. Write the share of a query's attention weight that
# lies in a box, over all heads, levels and points. A point on the edge of the box counts as inside. The checks
# give one head first, then several; in each head the weights sum to one, and the share must still lie in [0, 1].


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
# A point is inside if both its coordinates are at least the box's first two numbers and at most its last two:
# `.all(-1)`.
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
# ## {{n}}.2 Which pixels would change the answer?
#
# A point shows where one layer read. But what it read there is a feature, and a feature depends on many pixels. So
# the second question goes back to the image itself. Take one number of the detection, say the box's centre $x$,
# and differentiate it with respect to every pixel. For images this idea is from {cite}`simonyan2014saliency`. What
# should we expect?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three bar charts of brightness along a row of pixels through an object, six bright pixels among dark ones, with a bracket above that marks the box's width and a triangle that marks its centre. As it is; with the pixel beside the left border made brighter, the bracket reaches one pixel further left and the triangle moves left; with a pixel in the middle made brighter, both stay."}}
why_borders()

# %% [markdown]
# *Figure {{n}}.4. An expectation, not a measurement: a row of pixels through a bright object, and the box that an
# ideal detector would draw. A pixel beside the left border can move $x$ and the width. A pixel in the middle
# cannot.*
#
# Autograd gives us the derivative with respect to all 3 x 128 x 128 numbers of the image at once. We do it in
# float64, because we want to check it in a moment.

# %%
precise = load_detector(WEIGHTS).model.double().eval()
image = batch.images.double()


def centre_x(images):
    """The centre x of the seven's box in [0, 1], for images (1, 3, 128, 128) in float64."""
    return precise(Batch(images, batch.mask, batch.sizes)).boxes[0, query, 0]


pixels = image.clone().requires_grad_(True)
(gradient,) = torch.autograd.grad(centre_x(pixels), pixels)
print("gradient", tuple(gradient.shape))

# %% [markdown]
# Is it right? Finite differences can tell. Move the image a tiny step forward and back along the direction of the
# gradient, and see by how much $x$ changes per unit of length. Along its own direction, a gradient $g$ predicts
# the slope $g \cdot g / \|g\| = \|g\|$, so the change should be the gradient's norm.
#
# Before you run: is it?

# %%
direction = gradient / gradient.norm()
with torch.no_grad():
    ahead, back = (centre_x(image + sign * 1e-4 * direction) for sign in (1, -1))
measured = (ahead - back).item() / 2e-4
ratio = gradient.norm().item() / measured
print(f"autograd says {ratio:.1f} times what finite differences measure")
assert abs(ratio - 1) > 0.05

# %% [markdown]
# It is not. The reason is `detach`. In training each layer must only learn to correct the box that it is given, so
# the gradient is cut there ({{chapter refinement}}). That is good for training, but it is wrong for our question,
# because pixels do act on $x$ through these boxes. So we let `detach` do nothing while the model runs.

# %%
pixels = image.clone().requires_grad_(True)
with mock.patch.object(torch.Tensor, "detach", lambda tensor: tensor):
    x_now = centre_x(pixels)
(whole,) = torch.autograd.grad(x_now, pixels)
ratio = (whole * direction).sum().item() / measured
print(f"with references followed: {ratio:.3f} times")
assert abs(ratio - 1) < 0.001

# %% [markdown]
# Now autograd and finite differences agree. Without this check we would not have noticed that a part was missing.
# (The library's context `FollowReferences` does the same as our patch.) All five numbers of a detection come from one
# forward pass and five backward passes. To get one number per pixel, we take the norm over the three colours.

# %%
pixels = batch.images.clone().requires_grad_(True)
with mock.patch.object(torch.Tensor, "detach", lambda tensor: tensor):
    seen = model(Batch(pixels, batch.mask, batch.sizes))
items = dict(zip("xywh", seen.boxes[0, query], strict=True))
items["score"] = seen.logits[0, query, label].sigmoid()
norms = {
    name: torch.autograd.grad(item, pixels, retain_graph=True)[0][0].norm(dim=0)
    for name, item in items.items()
}
largest = (norms["x"] - whole[0].norm(dim=0)).abs().max() / norms["x"].max()
print("x in float32 is the same to a hundredth:", bool(largest < 0.01))

# %% [markdown]
# Before you run: where will the gradient of $y$ be, and where that of the score?

# %% mystnb={"image": {"alt": "Five maps around the seven, dark where a pixel moves the number. For x and w the dark spots lie at the left and right of the blue box, for y and h at its bottom and top; for the score they are fainter, and most of them lie at the left border."}}
figure, axes = plt.subplots(1, 5, figsize=(9.5, 2.4))
for axis, (name, norm) in zip(axes, norms.items(), strict=True):
    axis.imshow(norm, cmap="gray_r", extent=(0, 128, 128, 0), vmax=norm.quantile(0.999))
    frame(axis, box)
    axis.set(xlim=(20, 100), ylim=(125, 45), xticks=[], yticks=[], title=name)
plt.show()

# %% [markdown]
# *Figure {{n}}.5. Gradient norms of the five numbers of the seven's detection, each map on its own scale; darker
# pixels move the number more. The maps of $x$ and $w$ are dark at the left and right of the box, those of $y$ and
# $h$ at its bottom and top. The map of the score is faint, because most of it is not even in this part of the picture.*
#
# How much of it? Let the **energy** of a pixel be its squared norm. Energies can be added up: their sum over all
# pixels is the squared length of the whole gradient. So count the energy inside the box.

# %% tags=["hide-input"]
# NBVAL_IGNORE_OUTPUT
middles = torch.arange(128) + 0.5  # of the pixels
columns = (middles >= box[0]) & (middles <= box[2])
rows = (middles >= box[1]) & (middles <= box[3])
energy = norms["score"].square()
inside = (energy[rows][:, columns].sum() / energy.sum()).item()
corner = (energy[:50, 80:].sum() / energy.sum()).item()
print(f"of the score's energy, inside the box: {inside:.2f}, at the upper right: {corner:.2f}")
assert inside < 0.2 and corner > 0.5

# %% [markdown]
# Far less than half: most of it lies at a bright speck in the upper right of the picture (compare Figure {{n}}.3). We shall
# see with a thousand images whether that is usual.
#
# A derivative is a promise about *small* changes. How far does it hold? We move the image along the direction of
# the gradient, in steps that are no longer tiny, and compare $x$ with the straight line that the derivative
# promises. (A query's number is the rank of its proposal in the first stage, and ranks change when the image
# changes this much. So we look up the best detection in each image.)

# %%
# NBVAL_IGNORE_OUTPUT
steps = torch.linspace(-6, 6, 25)
unit = (whole / whole.norm()).float()
moved = Batch.from_images(list(batch.images + steps[:, None, None, None] * unit))
with torch.no_grad():
    several = model(moved)
best = several.logits.sigmoid().amax(-1).argmax(1)
found = several.boxes[torch.arange(25), best, 0] * 128
promised = (x_now.item() + steps * whole.norm().item()) * 128
print(f"a step of 6 changes one number of the image by {6 * unit.abs().max():.2f} at most")
for step in (0, 11, 13, 24):
    print(f"step {steps[step]:4.1f}: x {found[step]:.1f}, promised {promised[step]:.1f}")
off = (found - promised).abs()
assert off[11:14].max() < 0.3 and off[[0, 24]].min() > 1

# %% tags=["hide-input"] mystnb={"image": {"alt": "The centre x in pixels against the length of the step in the image. Around zero the detector's curve follows the straight line of the derivative; on both sides it soon becomes flat, while the line goes on."}}
figure, axis = plt.subplots(figsize=(4.6, 2.5))
axis.plot(steps, found, "o-", label="the detector")
axis.plot(steps, promised, "--", color="C3", label="what the gradient promises")
axis.set(xlabel="length of the step in the image", ylabel="centre x in pixels")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# *Figure {{n}}.6. Near the image as it is, the gradient predicts well how x moves. Further out the box moves much
# less than promised, because the seven is still where it was. So when a gradient says "this pixel matters", it
# means only that making the pixel a little brighter or darker matters.*
#
# ## Exercise {{n}}.2  A gradient picture of your own
#
# *difficulty ●●● · 30 minutes · 9 lines*
#
# Write the function that makes such a picture for any number of any detector. It returns two things: the
# gradient's norm per pixel, and a mask of **the fewest pixels that hold a given share of the energy**, the squared
# norm. (A contour around this mask makes a much clearer picture than shades of grey.)
# References must be followed, although `item_of` detaches; use the library's `FollowReferences()` around the call
# of `item_of`. The image that you are given must not be changed.
#
# When the checks pass, keep something: write a digit, take a photo of it, and run the following. It draws what
# moves the score of the best detection in your own picture. (The photo is made small first, because this detector
# knows digits of 8 to 72 pixels. So let the digit fill between a tenth and a half of the photo's longer side.)
#
# ```python
# photo = read_image("my_photo.png")
# photo.thumbnail((128, 128))
# def score_of(image):
#     return model(Batch.from_images([image])).logits[0].sigmoid().max()
# norm, mask = gradient_picture(score_of, detector.eval_transform()(photo), share=0.5)
# plt.imshow(photo)
# plt.contour(mask, levels=[0.5], colors="black")
# plt.savefig("looked_at.png")
# ```


# %% tags=["exercise"]
def gradient_picture(item_of, image, share):
    """item_of: a function of an image that returns one number. image: (3, H, W). share: in (0, 1].

    Returns the norm over colours, (H, W), and a mask, (H, W) of bool: the fewest pixels whose
    squared norms sum to at least that share of the sum over all.
    """
    # BEGIN SOLUTION
    pixels = image.clone().requires_grad_(True)
    with FollowReferences():
        item = item_of(pixels)
    norm = torch.autograd.grad(item, pixels)[0].norm(dim=0)
    energy, order = norm.square().flatten().sort(descending=True)
    fewest = int((energy.cumsum(0) < share * energy.sum()).sum()) + 1
    mask = torch.zeros(norm.numel(), dtype=torch.bool)
    mask[order[:fewest]] = True
    return norm, mask.view(norm.shape)
    # END SOLUTION


check("looking.2", gradient_picture)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The first half is the cell above Figure {{n}}.5: `clone`, `requires_grad_`, `torch.autograd.grad`, `norm(dim=0)`.
# For the second half, sort the energies from large to small and add them up until you have enough.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `energy.cumsum(0)` are the sums of the largest one, two, three, ... energies. Count how many of these sums are
# still below `share * energy.sum()`; you need one pixel more. `sort` also returns where each energy came from.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check looks at the norm, the second at the mask. It wants the share of the *energy*, so square first.
# Half of the largest value is not a share.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 By one call
#
# You have now written everything once. The library's `explain` does both questions together, for our detectors and
# for those of Hugging Face, for images of any size with or without padding. All places come back in pixels of the
# original picture.

# %%
seen = explain(detector, SEVEN)
print(seen.title, "by query", seen.query)
print("points", seen.points.shape, "weights", seen.weights.shape)
print({name: norm.shape for name, norm in seen.gradients.items()})
ours = np.stack([points_and_weights(number, query)[0] for number in range(3)])
np.testing.assert_allclose(seen.points, ours, atol=1e-3)
for name, norm in norms.items():  # ours are of x, y, w, h in [0, 1]; explain's are in pixels
    unit = 1 if name == "score" else 128
    np.testing.assert_allclose(seen.gradients[name], norm * unit, atol=1e-2 * norm.max() * unit)
print("equal to ours")

# %% [markdown]
# The axes of `points` are layers, heads, levels, points and (x, y). `seen.columns()` gives a table with one row
# per point. `seen.draw()` draws both figures, with the first and the last layer only.

# %% mystnb={"image": {"alt": "Two rows of panels. Above: the picture with the seven in its box, and the sampling points of layers 0 and 2, with a mark of its own for each of three levels. Below: five close-ups of the seven that are pale where the gradient of centre x, centre y, width, height or score is small, with thick contours around half of its energy and thin ones around nine tenths; of the score's contours most lie beyond the panel."}}
figure = seen.draw()
figure.set_dpi(60)
figure

# %% [markdown]
# *Figure {{n}}.7. The figure of `explain` for the seven. Upper left, the detection, and dotted the part of the
# picture that all other panels show. Beside it, points as marks: a heavier point is larger, and shape and colour
# are its level (level 0 is the finest). The cross is the centre of the reference, the dashed box the reference, and
# the solid box the detection; here the two nearly coincide. Below, the thick contour holds half of the gradient's
# energy, the thin one nine tenths; the dashed box is the detection. Most of the score's energy lies beyond its panel.*
#
# On the command line it is one line. It writes a page that opens in any browser, and shows the best detections of
# a picture, at most three:
#
# ```text
# deformable-detr explain data/samples/000010.png --output explained.html
# ```

# %% tags=["hide-input"]
with tempfile.TemporaryDirectory() as folder:
    words = ["explain", str(SEVEN.resolve()), "--output", "explained.html"]
    command = [sys.executable, "-m", "deformable_detr.cli", *words]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    print(ran.stdout.strip())
    assert "<html" in (Path(folder) / "explained.html").read_text()

# %% [markdown]
# One detection is an anecdote, so look at several. `Look` sees a picture once and then explains anything in it.

# %% mystnb={"image": {"alt": "Eight panels for four detections in one picture of several digits. Above: the sampling points of the last decoder layer, in each panel some large marks on the left and right border of the box. Below: the gradient norm of the score, whose contours lie partly on the digit and in all four reach outside the box."}}
look = Look(detector, DATA / "samples" / "000012.png")
figure, axes = plt.subplots(2, 4, figsize=(9.5, 5.4))
for number, (above, below) in enumerate(axes.T):
    found = look.at_detection(number)
    found.draw_points(above)
    above.set_title(found.title)
    above.get_legend().remove()
    draw_gradient(below, found.image, found.gradients["score"], found.box)
    show(below, found.window())
axes[0, 0].set_ylabel("points, last layer")
axes[1, 0].set_ylabel("gradient of the score")
plt.show()

# %% [markdown]
# *Figure {{n}}.8. Four digits of another picture, each in a window of its own, with marks and contours as in the
# figure before. Above, the points of the last decoder layer; below, the gradient norm of the score. Compare the
# marks above: on every digit, large orange discs, which are points of the finest level, sit on the left and right
# border.*
#
# `explain` also answers for the encoder. There the queries are the cells of the maps, called tokens. A token's
# reference is a point, its own place, and its offsets are measured in cells of each level. So no box ties its points
# to an object.

# %% mystnb={"image": {"alt": "The whole picture twice, with a cross on the seven, the token's place. In encoder layer 0 and in layer 1 the heavy marks lie close to the cross, and light ones are spread over the picture."}}
token = explain(detector, SEVEN, token=(60, 85), gradients=False)
print(token.title)
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.5))
for layer, axis in enumerate(axes):
    token.draw_points(axis, layer=layer, whole=True)
    axis.set_title(f"encoder layer {layer}")
    outside = ((token.points[layer] < 0) | (token.points[layer] > 128)).any(-1)  # (M, L, K)
    share = token.weights[layer][outside].sum() / M
    print(f"layer {layer}: outside the picture, by level {outside.sum((0, 2))}, weight {share:.2f}")
    assert share < 0.2 and not outside[:, :2].any()
plt.show()

# %% [markdown]
# *Figure {{n}}.9. Where one token of the finest map, in the middle of the seven, looked (cross: the token). Most
# of its weight stays near. The lines above the figure count what it cannot show: some points of level 2, whose
# cells are 16 pixels wide, lie outside the picture, where there is nothing to read but zeros.*
#
# ## Exercise {{n}}.3  Less noise by more noise
#
# *difficulty ●●○ · 15 minutes · 6 lines*
#
# Gradient pictures are speckled, because a network's derivative jumps from pixel to pixel. SmoothGrad
# {cite}`smilkov2017smoothgrad` takes the mean of the gradients of several copies of the image, each with other
# noise added; `explain(..., noise=0.2)` has it. Write it: first the mean of the gradients, then the norm over
# colours. References must be followed here too.


# %% tags=["exercise"]
def smooth_gradient(item_of, image, noise, copies):
    """item_of: a function of an image that returns one number. image: (3, H, W).

    noise: standard deviation of what is added. Returns (H, W).
    """
    # BEGIN SOLUTION
    total = torch.zeros_like(image)
    for _ in range(copies):
        noisy = (image + noise * torch.randn_like(image)).requires_grad_(True)
        with FollowReferences():
            total += torch.autograd.grad(item_of(noisy), noisy)[0]
    return (total / copies).norm(dim=0)
    # END SOLUTION


check("looking.3", smooth_gradient)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The noise goes into the image, before `requires_grad_`. Each copy needs its own `torch.randn_like(image)`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Add up the gradients, (3, H, W), divide by the number of copies, and take `.norm(dim=0)` last.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Without noise every order is the same. With noise, the mean of norms is too large: opposite gradients cancel in a
# mean of gradients, but not in a mean of norms.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 From pictures to numbers
#
# Now we test what the paper says of its two figures. Of the sampling points it says (A.6) that
# - the decoder "is focused on the whole foreground instance instead of only extreme points",
# - the points "adapt ... according to different scales and shapes of the foreground object",
# - "the instances are already separated in the encoder".
#
# Of the gradients it says (A.5) that
# - the box is decided at the object's extreme points,
# - for its category the model "also looks at pixels inside the object".
#
# Each of these can be measured on our detector. `python experiments/looking.py` does so for the whole test split, in
# a few minutes on one core, and this chapter reads its results. It takes every detection that is right (its class,
# and an IoU of at least 0.5). Small digits have boxes of less than 16 x 16 pixels, medium ones of less than 36 x 36.
#
# Each number is a mean with a 95 % interval, by a bootstrap over *images*: draw as many images as there are, with
# replacement, and take the mean of what was found in them. Repeat this a thousand times; the interval holds the
# middle 95 % of these means. We draw images, not detections, because detections of one image are alike and must not
# count as independent.

# %% tags=["hide-input"]
results = json.loads((DATA / "results" / "looking.json").read_text())
layers, encoder = results["decoder"]["layers"], results["encoder"]["layers"]
print("detections:", results["decoder"]["detections"])
print("encoder tokens:", results["encoder"]["tokens"])


def told(figure, digits=3):
    """A mean with its interval, as text."""
    mean, low, high = figure
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


print("inside the box, last layer:", told(layers[2]["inside"]["all"]["own"]))

# %% [markdown]
# Most of the last layer's weight lies inside the box that was found. You need not take this on trust: we measure
# it again here, on the first 40 images. In the same loop we keep how much of each head's weight lies near the
# border, for later.


# %%
# NBVAL_IGNORE_OUTPUT
dataset = CocoDataset(*find_split(DATA / "digits", "test"), digits_eval_transform())
forty = collate([dataset[index] for index in range(40)])
with record_sampling(model) as record, torch.no_grad():
    found = postprocess(model(forty), [(128, 128)] * 40, threshold=0.5)
shares, at_border = [], []
for index, each in enumerate(found):
    last = record.decoder[-1].locations[index, each.queries] * 128  # (N, M, L, K, 2)
    low, high = each.boxes[:, None, None, None].split(2, -1)
    far = ((last - (low + high) / 2) / (high - low) * 2).abs().amax(-1)  # 1 at the border
    weight = record.decoder[-1].weights[index, each.queries]
    shares.append((weight * (far <= 1)).sum((1, 2, 3)) / M)
    at_border.append((weight * ((far - 1).abs() <= 0.2)).sum((2, 3)))
shares, at_border = torch.cat(shares), torch.cat(at_border)  # (N,), (N, M)
print(f"{len(shares)} detections: {shares.mean():.3f}")
assert abs(shares.mean() - layers[2]["inside"]["all"]["own"][0]) < 0.03

# %% [markdown]
# Does this prove that the decoder looks at its object? No, because we do not know what to compare it with. Offsets
# are measured in half-sides of the reference box, and before training they reach at most one half-side. So points
# lie in or near the box *by construction*. A number needs **controls**: what would it be if our claim were false?

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four boxes with points. Own: orange discs of different sizes. Unweighted: the same places, all discs of one size. Borrowed: other places and sizes, the pattern of another image's detection. Untrained: a star of four arms of four points."}}
controls()

# %% [markdown]
# *Figure {{n}}.10. What a detection is compared with, always in its own box. If a measure of* own *equals that of*
# unweighted*, the weights add nothing. If it equals that of* untrained*, training added nothing.* Borrowed *is for
# measures of the picture, such as its edges: if the two are equal there, the pattern does not follow the object.*
#
# We begin with two measures of the box. "Inside" we know. The second, "border", counts what lies within 0.2
# half-sides of the border of the box, inside or outside.

# %% tags=["hide-input"]
for name in ("inside", "border"):
    print(name)
    for kind in ("own", "unweighted", "untrained"):
        print(f"    {kind:10}", told(layers[2][name]["all"][kind]))

# %% [markdown]
# Compared with its controls, the share inside is not much. The same points with equal weights would have more of
# the weight inside, and so has a star that has learned nothing. (Why not 1? The tips of the star lie on the edge of
# the reference box, and the box that is found is a little different.) So the weights favour points *outside*. Which
# ones? The border tells. The last layer has more than twice as much of its weight there as
# equal weights would put there.
#
# We leave out *borrowed* here, because it could not tell us anything. A borrowed pattern lies in its new box just as
# it lay in the old one, so it brings its shares along, and the mean over all detections stays the same whatever the
# patterns are. A control must be able to come out differently.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three panels, one per decoder layer, of the share of points (grey steps) and of weight (orange) by distance from the box's centre, 0 to 1.5, with a dotted line at the border, 1. Points are most frequent between 0.3 and 0.6, and fewer towards the border. Weight in layer 0 is spread from 0.2 to 1.1, in layer 1 it peaks just below 1, in layer 2 it has two peaks, around 0.3 and around 1."}}
distances = np.array(results["distances"])
figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.5), sharey=True)
for number, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
    axis.stairs(layer["points by distance"], distances, color="0.5", lw=1.5, label="points")
    axis.stairs(layer["weight by distance"], distances, color="C4", lw=2.2, label="weight")
    axis.axvline(1, color="C0", ls=":")
    axis.set(xlim=(0, 1.5), xlabel="distance from the centre", title=f"layer {number}")
axes[0].set_ylabel("share per 0.1 of distance")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# *Figure {{n}}.11. Where the decoder's points and their weight lie. The distance is measured in half-sides of the
# found box, in x and in y, and the larger of the two counts: 0 is the centre, 1 (dotted) the border. The weight of
# layer 1 has its peak at the border. That of layer 2 has one peak in the inner half of the box, one at the border,
# and a dip between them.*
#
# So is A.6 wrong about our detector? The last layer does not read "the whole foreground instance" evenly: it reads
# the middle and the border, and less of what is between. But "only extreme points" would be wrong too. And the
# share at the border is less than it seems, because the band at the border is wide: 0.8 of the area of the box (0.36
# inside it and 0.44 outside). If weight were spread evenly over the box, 0.36 of it would lie in the band.
#
# What does this share depend on? Before you run, guess: on the head, on the level, on the size of the object, or on
# the object itself?

# %%
last = layers[2]
sizes = [last["border"][size]["own"][0] for size in ("small", "medium", "large")]
for name, shares in (
    ("head 0 1 2 3", last["border of heads"]),
    ("level 0 1 2", last["border of levels"]),
    ("  has of all weight", last["weight of levels"]),
    ("small, medium, large", sizes),
    ("layer 0 1 2", [layer["border"]["all"]["own"][0] for layer in layers]),
):
    print(f"{name:21}", [round(share, 2) for share in shares])
spread = at_border.mean(1).quantile(torch.tensor([0.05, 0.95])).tolist()
print("nine in ten detections", [round(share, 1) for share in spread])
assert spread[1] - spread[0] < 0.35 and at_border.mean(1).std() < 0.1

# %% tags=["hide-input"] mystnb={"image": {"alt": "Bars for the four heads in each of the three decoder layers: the share of each head's weight at the border of the box. In every layer some bars are high and some low; in the last layer they are 0.94, 0.21, 0.89 and 0.06."}}
figure, axis = plt.subplots(figsize=(5.4, 2.6))
for head in range(4):
    heights = [layer["border of heads"][head] for layer in layers]
    bars = axis.bar(np.arange(3) + 0.2 * head - 0.3, heights, 0.18, label=f"head {head}")
    axis.bar_label(bars, fmt="%.2f", size=7)
axis.set(xticks=range(3), xticklabels=[f"layer {n}" for n in range(3)], ylim=(0, 1.05))
axis.set_ylabel("share at the border")
axis.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
plt.show()

# %% [markdown]
# *Figure {{n}}.12. How much of each head's weight lies at the border of the box. Heads have divided the work: in
# the last layer, heads 0 and 2 read the border, heads 1 and 3 the inside.*
#
# It depends most of all on the head, then on the level (it is high on the finest map alone, which has most of the
# weight) and on the layer. It hardly depends on the size of the object. And from one object to the next it varies
# only a little: the last line gives the range that holds nine in ten of the detections in our 40 images. The
# single points do move from object to object (compare Figure {{n}}.8). But how the weight is divided between border and middle is much the same in every box,
# whatever object is in it.
#
# ## Exercise {{n}}.4  Borrow a pattern
#
# *difficulty ●●○ · 15 minutes · 3 lines*
#
# "Borrowed" will be the control that decides in the next section, so write it. Each of N queries has P points and a
# reference box.
# Query $i$ gets the points of query `lender[i]`, moved and stretched so that they lie in the box of $i$ as they
# lay in the lender's. The checks let a query borrow from itself, then from a box of another size, then from many.


# %% tags=["exercise"]
def borrow(points, boxes, lender):
    """points: (N, P, 2) as (x, y). boxes: (N, 4) xyxy, in the same units. lender: (N,) of int.

    Returns (N, P, 2).
    """
    # BEGIN SOLUTION
    low, high = boxes[:, None].split(2, -1)  # (N, 1, 2)
    within = (points - low) / (high - low)  # 0 at the left and top edge, 1 at the others
    return low + within[lender] * (high - low)
    # END SOLUTION


check("looking.4", borrow)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First write the points in units of their own box. Then exchange them. Then go back to pixels, with the box of the
# one who borrows.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `boxes[:, None].split(2, -1)` are the upper left and the lower right corners, (N, 1, 2). `within[lender]` takes
# row `lender[i]` for each i.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Borrowing from oneself changes nothing, even if you only move the points. In a box of another size they must also
# be stretched, in x by its width and in y by its height.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 Do points find edges?
#
# Perhaps the division between border and middle is the same for all objects, while the single points still adjust
# to each of them. So we ask about the picture instead of the box: do heavy points lie where the *picture* has
# edges? At each pixel take the slope of the brightness, and its rank among all pixels of that picture: 0 is the
# flattest place, 1 the steepest, 0.5 the median. Then take the mean rank of a query's points, weighted by attention.
# Here borrowed points can come out differently: they lie on another object.

# %% tags=["hide-input"]
print("decoder: own, and own minus borrowed")
for number, layer in enumerate(layers):
    ranks = layer["edge rank"]["all"]
    print(f"    layer {number}", told(ranks["own"]), " ", told(ranks["own minus borrowed"]))
print("encoder, tokens on objects: the same")
for number, layer in enumerate(encoder):
    ranks = layer["edge rank"]["all"]
    print(f"    layer {number}", told(ranks["own"]), " ", told(ranks["own minus borrowed"]))
print("all of the box", told(last["edge rank"]["all"]["all of the box"]))

# %% [markdown]
# All ranks are far above 0.5. Again that says little, because digits have edges, and whatever looks at a digit finds
# them: the last line has the mean rank over the whole box of a digit. The second column says how much the points
# adapt to *this* object. In the first layer, of the decoder as of the encoder, they hardly do; in later layers the
# difference is clearly above zero. So points do gather on edges of their object, but
# only in the later layers, and only a little.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Dots with intervals: how much higher the edge rank of a detection's own points is than that of borrowed ones, for small, medium and large objects. Decoder: layer 0 near zero, layers 1 and 2 between 0.03 and 0.08. Encoder: layer 0 at zero, layer 1 between 0.03 and 0.05, falling with size."}}
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
for axis, (part, name) in zip(axes, ((layers, "decoder"), (encoder, "encoder")), strict=True):
    for number, layer in enumerate(part):
        values = np.array(
            [layer["edge rank"][s]["own minus borrowed"] for s in ("small", "medium", "large")]
        )
        reach = np.abs(values[:, 1:] - values[:, :1]).T
        place = np.arange(3) + 0.15 * (number - (len(part) - 1) / 2)
        axis.errorbar(place, values[:, 0], reach, fmt="o", capsize=3, label=f"layer {number}")
    axis.axhline(0, color="0.5", lw=1)
    axis.set(xticks=range(3), xticklabels=["small", "medium", "large"], title=name)
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
axes[0].set_ylabel("edge rank, own minus borrowed")
plt.show()

# %% [markdown]
# *Figure {{n}}.13. Edge rank of a query's own points minus that of borrowed ones, with 95 % intervals. Above 0, a
# query's points are nearer to edges of its own object than borrowed points would be. 0 would mean that the pattern
# does not adapt to the object.*
#
# Are "the instances already separated in the encoder"? Take tokens that lie on a digit, and measure how much of
# their weight stays on it.

# %% tags=["hide-input"]
for number, layer in enumerate(encoder):
    stays = layer["stays in the object"]["all"]
    kinds = ("own", "borrowed", "untrained")
    print(f"layer {number}:", ", ".join(f"{kind} {stays[kind][0]:.3f}" for kind in kinds))
    print("         own minus borrowed", told(stays["own minus borrowed"]))
reach = encoder[1]["mean distance in pixels"]
print(
    {size: round(reach[size]["own"][0], 1) for size in ("small", "medium", "large", "background")}
)

# %% [markdown]
# Again, a little. In layer 1 slightly more of a token's weight stays on its digit than with a pattern borrowed from a
# token on another digit. So most of the gain over the untrained pattern does not depend on this digit:
# the encoder has learned to look *near*. Only the second layer adds something that depends on the digit. Nor
# does the encoder adapt to scale: on average, the weight of a token on a small digit lies about as many pixels away
# as that of a token on a large one. In the decoder, scale is built in by the reference box.
#
# ## {{n}}.6 Which pixels decide, over a thousand images
#
# For the gradients we take one detection of each image. The plane is divided into four regions: a band around the
# left and right border of the box (sides), a band around its top and bottom (ends), the middle, and everything
# beyond the band. Here the band is somewhat wider: it reaches 0.3 half-sides inward and outward from the border. For
# each of the five numbers, how much of the gradient's energy lies in each region? The last column has all that lies
# inside the box: the middle and the inner half of the band. The row `area` has each region's share of the picture.
#
# Before you run: how much of the *score's* energy is inside the box, more or less than half?

# %%
gradient = results["gradient"]["items"]
regions = ("sides", "ends", "middle", "farther")
print("      ", *(f"{name:>8}" for name in (*regions, "inside")))
for item, found in gradient.items():
    print(f"{item:7}", *(f"{found[name]['all']['own'][0]:8.3f}" for name in (*regions, "inside")))
areas = (gradient["x"][name]["all"]["area"][0] for name in (*regions, "inside"))
print(f"{'area':7}", *(f"{area:8.3f}" for area in areas))
print("score, inside the box:", told(gradient["score"]["inside"]["all"]["own"]))
for item in "xy":
    ratios = [f"{size} {found[0]:.2f}" for size, found in gradient[item]["sides to ends"].items()]
    print(f"{item}, energy per pixel, sides to ends:", ", ".join(ratios))
print("x, another image's, inside:", told(gradient["x"]["inside"]["all"]["another's"]))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Five stacked bars, for x, y, w, h and score, of the shares of gradient energy at the sides, at the ends, in the middle and farther away. x and w are half sides; y and h are half ends; score has 0.30 sides, 0.16 ends, 0.18 middle and 0.36 farther."}}
figure, axis = plt.subplots(figsize=(6.6, 2.7))
left = np.zeros(5)
for name, colour in zip(regions, ("C0", "C1", "C2", "0.75"), strict=True):
    shares = np.array([found[name]["all"]["own"][0] for found in gradient.values()])
    bars = axis.barh(list(gradient), shares, left=left, color=colour, label=name)
    text = "black" if colour == "0.75" else "white"
    axis.bar_label(bars, fmt="%.2f", label_type="center", size=8, color=text)
    left += shares
axis.set(xlabel="share of the gradient's energy", xlim=(0, 1))
axis.invert_yaxis()
axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# *Figure {{n}}.14. Where the gradient of each number lies, over one detection per image: at the left and right border of
# the box (sides), at its top and bottom (ends), in the middle, or farther away.*
#
# What A.5 says of boxes is true here, and now has numbers: per pixel, the gradient of $x$ is several times as strong
# (in energy) at the sides as at the ends, and that of $y$ at the ends. And this belongs to *this* object. As a
# control, lay another image's energy under the same box (last line): hardly more of it lies inside than the box has
# of the area.
#
# What A.5 says of the score is true only in part. The middle of the box has more than twice as much of its energy
# as for $x$. But **less than half** of the score's energy lies inside the box, for our seven too. One can imagine why: whether
# a stroke is a seven also depends on what is *not* beside it. But this is a guess, not a measurement.
#
# ## {{n}}.7 What such pictures do not say
#
# One thing is still open, since {{chapter attention_on_images}}: does a heavy point matter? It need not. The
# weight is only one factor: what is read at the point is another, and what the model makes of it afterwards is a
# third. So we take a point away: set the weight of one of the 48 points of the last layer to zero, and see how far
# the seven's box (its four numbers, in pixels) and its score move. With a batch of 49 copies of the image, one for
# each point and one untouched, that is a single forward pass.

# %%
copies = Batch.from_images([batch.images[0]] * (M * L * K + 1))
attention = model.decoder.layers[-1].cross_attention
unchanged = attention.sampling


def one_silenced(*arguments):
    """Where the layer samples, with the weight of point i set to zero in copy i + 1."""
    sampling = unchanged(*arguments)
    weights = sampling.weights.clone()
    each = torch.arange(M * L * K)
    rows = weights[1:, query].flatten(1)  # (48, 48)
    rows[each, each] = 0
    weights[1:, query] = rows.view(-1, M, L, K)
    return Sampling(sampling.locations, weights, sampling.spatial_shapes)


# %%
# NBVAL_IGNORE_OUTPUT
with mock.patch.object(attention, "sampling", one_silenced), torch.no_grad():
    silenced = model(copies)
boxes, scores = silenced.boxes[:, query] * 128, silenced.logits[:, query, label].sigmoid()
moved, changed = (boxes[1:] - boxes[0]).norm(dim=1), (scores[1:] - scores[0]).abs()
weight = points_and_weights(2, query)[1].flatten()
heaviest, most = int(weight.argmax()), int(changed.argmax())
print(f"rank correlation with weight: box {spearmanr(weight, moved)[0]:.2f}", end=", ")
print(f"score {spearmanr(weight, changed)[0]:.2f}")
for name, point in (("heaviest", heaviest), ("that matters most for the score", most)):
    print(f"the point {name}, {weight[point]:.2f}: box {moved[point]:.2f} pixels", end=", ")
    print(f"score {changed[point]:.4f}")
assert 0.5 < spearmanr(weight, changed)[0] < 0.9
assert weight[most] < 0.5 * weight.max() and moved[most] < 0.2 * moved.max()
assert changed.max() < 0.01 and int(moved.argmax()) != heaviest

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two scatter plots over the weight of each of the 48 points: how far the box moves without it, in pixels, and how much the score changes. Both rise with the weight, with a wide spread; the point that changes the score most is not the heaviest, and hardly moves the box."}}
figure, axes = plt.subplots(1, 2, figsize=(7, 2.6))
for axis, change, text in zip(axes, (moved, changed), ("box, pixels", "score"), strict=True):
    axis.plot(weight, change, "o", color="C4", mec="black", mew=0.6)
    axis.plot(weight[most], change[most], "o", ms=11, mfc="none", color="C1")
    axis.set(xlabel="weight of the point", ylabel=f"change of the {text}")
plt.show()

# %% [markdown]
# *Figure {{n}}.15. What happens to the seven's detection without one point, for each of the 48 points of the last
# layer. Circled is the point that matters most for the score: it is not the heaviest, and without it the box hardly
# moves.*
#
# Heavier points matter more, as a rule. But the rule has exceptions, and they depend on the question. The point that
# matters most for the score has less than half of the weight of the heaviest, which the eye sees first, and it hardly
# matters for the box. For models that read text, {cite}`jain2019attention` found something similar, and called their
# paper "Attention is not Explanation". Notice also how *little* any single point matters: the score never changes by
# more than 0.01.
#
# Here is what is often said of such pictures, and what we found for this detector:
#
# | often said | what we measured | verdict |
# |:--|:--|:--|
# | "most of the weight is in the box, so it has learned to look at the object" | an untrained star has more | the box does it, not the learning |
# | the decoder looks at the whole object (A.6) | two of four heads read mainly the border | no: the middle and the border |
# | points adapt to the object's shape (A.6) | edge rank, own minus borrowed | a little, and hardly in the first layer |
# | points adapt to the object's scale (A.6) | encoder: equally far on all sizes; decoder: by its reference | the reference does it |
# | the encoder separates the instances (A.6) | weight that stays on its digit, against borrowed | a little |
# | the box is decided at the extreme points (A.5) | energy per pixel, sides to ends | yes |
# | the score looks inside (A.5) | its energy inside the box | less than half of it |
# | a heavy point is an important one | rank correlation 0.5 and 0.7; for the seven's box and its score other points matter most | often |
#
# These are verdicts on *one* small detector of digits. What a detector of photographs does may differ; the method
# is the same, and a control costs little. A last warning: the pictures of some other gradient methods look just as
# convincing for a network with random weights {cite}`adebayo2018sanity`. So whenever someone shows you a heat map,
# ask for the control.
#
# ## Summary
#
# - Three hooks and one formula give every sampling point; `explain` gives them in pixels, with gradients.
# - A gradient picture is right only if finite differences agree: let the gradient follow the references.
# - Points lie in or near the box by construction; the last layer reads the middle and the border, and its heads divide this work.
# - What adapts to the single object is a small part, and comes in the later layers.
# - $x$ and $w$ are decided at the sides, $y$ and $h$ at the ends; less than half of the score is decided inside the box.
#
# > **Differs from the paper.** Figures 5 and 6 of the paper show a few images of COCO; here every statement has a
# > measure over a test split of digits, with controls. The paper does not say whether its gradients follow the
# > references.
# >
# > **Differs from the official code.** It has no code for these figures.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`, Appendices A.5 and A.6, with Figs. 5 and 6.
# - {cite}`carion2020detr`, Figs. 3 and 6: dense attention drawn, to which the paper compares.
# - {cite}`simonyan2014saliency`, {cite}`smilkov2017smoothgrad`: gradients by pixels, and their mean over noise.
# - {cite}`adebayo2018sanity`, {cite}`jain2019attention`: what such pictures do not show.
