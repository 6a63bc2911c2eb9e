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
# # {{n}}. Your own data
#
# You will be able to
# - **bring** a folder of pictures with boxes into COCO's format, and find what is wrong with it,
# - **split** it so that the figures at the end are honest,
# - **decide** how large objects must be in the image that the detector gets, and cut tiles,
# - **fine-tune** a detector that learned something else, and say what that start was worth,
# - **sort** its mistakes, apply a remedy to each kind, and measure what it changed.
#
# You should know: {{chapter training}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# The usual case is not COCO. It is a folder of pictures, a few hundred boxes, and one class that nobody else has.
# This chapter goes once from such a folder to a detector, with the commands that you would type. The pictures have
# nothing to do with digits: they show forests in Yellowstone from the air, with boxes around the crowns of the trees.
# The detector that we start from has never seen a tree.

# %% tags=["hide-input"]
import csv
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.evaluation.intervals import verdict
from deformable_detr.evaluation.report import analyse
from deformable_detr.exercises import check
from deformable_detr.training.recipe import load_recipe
from deformable_detr.weights.published import load_pretrained

plt.style.use("book.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)

# %% tags=["hide-input"]
temporary = tempfile.TemporaryDirectory()
WORK = Path(temporary.name)
shutil.copytree("../data/trees", WORK / "photos")
shutil.copy("../data/checkpoints/digits.safetensors", WORK / "digits.safetensors")


def command(text, lines=12):
    """Run a deformable-detr command where the data are; print its first lines."""
    print("$ deformable-detr", text)
    words = [sys.executable, "-m", "deformable_detr.cli", *shlex.split(text)]
    ran = subprocess.run(words, cwd=WORK, capture_output=True, text=True)
    for line in (ran.stdout + (ran.stderr if ran.returncode else "")).splitlines()[:lines]:
        print(textwrap.fill(line, 100, subsequent_indent="    "))


# %% tags=["hide-input"] mystnb={"image": {"alt": "Eight stations in a row: pictures and boxes, convert, check and sheet, tile, doctor, train, evaluate, predict and explain. Below each stands what it is for."}}
from schematics.your_own_data import path, shrinking

path()

# %% [markdown]
# *Figure {{n}}.1. The steps of this chapter. After the first, each is a command of the same name: `deformable-detr convert`
# and so on.*
#
# ## {{n}}.1 Pictures and boxes
#
# The pictures are two aerial photographs with ten centimetres per pixel (NEON, public domain); the boxes were drawn by
# the authors of DeepForest {cite}`weinstein2019trees`. They come in the format of Pascal VOC: beside each picture lies an
# XML file with its boxes. The next cell reads one such file and draws its boxes on a part of the picture.

# %% mystnb={"image": {"alt": "Part of an aerial picture: a meadow with conifers that cast long dark shadows. Orange boxes lie around single crowns, some of which touch; bushes and fallen trunks have no box."}}
picture = Image.open(WORK / "photos/train/west_train.jpg")
xml = (WORK / "photos/train/west_train.xml").read_text()
boxes = [
    [int(n) for n in re.findall(r">(\d+)<", b)]
    for b in re.findall(r"<bndbox>.*?</bndbox>", xml, re.S)
]
figure, axis = plt.subplots(figsize=(6.5, 4))
axis.imshow(picture)
for x0, y0, x1, y1 in boxes:
    axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="C4", lw=1.2))
axis.set(xlim=(900, 1550), ylim=(1500, 1100))
axis.set_axis_off()
plt.show()
print(f"{picture.width} x {picture.height} pixels, {len(boxes)} boxes")

# %% [markdown]
# *Figure {{n}}.2. A part of the training picture. This is no easy data set: crowns touch, some trees are grey and bare, and
# bushes, which look like small crowns, have no box. Two people would hardly draw the same boxes.*
#
# The library reads one format, COCO's {cite}`lin2014coco`: one JSON file per split, with images, annotations and
# categories. A box is `[left, top, width, height]` in pixels. Images, annotations and categories have ids, which may be any
# whole numbers. One command converts all splits at once, so that each class gets the same id in all of them. (For YOLO's
# format, use the package `supervision`; `data/README.md` shows how.)

# %%
command("convert photos data")

# %% [markdown]
# ## {{n}}.2 Honest splits
#
# There are three splits: *train* to learn from, *val* to choose with, *test* to report. The usual way is to deal images
# out at random. With pictures like these it would deceive you, because neighbouring pieces of one photograph show the same
# trees, in the same light, at the same hour: a detector would be tested on nearly what it was trained on. So split
# **by what will be new** when the detector is used: another place, another day, another patient. Here *train* is the western three quarters of one
# photograph, *val* is the rest of it, and *test* is another photograph, 13 km to the east.
#
# ## Exercise {{n}}.1  Split by group
#
# *difficulty ●●○ · 30 minutes · 9 lines*
#
# Write the splitter that you will want to keep. `groups` says for each image which group it belongs to (the photograph,
# the day, the patient). Return three sorted lists of **image indices**: train, val, test. Rules: all images of a group go
# to the same split; shuffle the groups with `random.Random(seed)`, starting from their sorted order; then fill *test*
# group by group until it has at least `share` of all images, then *val* in the same way, and the rest is *train*.


# %% tags=["exercise"]
def split_by_group(groups, share=0.2, seed=0):
    """groups: a name for each image. Returns (train, val, test), lists of indices."""
    # BEGIN SOLUTION
    import random

    order = sorted(set(groups))
    random.Random(seed).shuffle(order)
    parts = {"test": [], "val": [], "train": []}
    for group in order:
        images = [i for i, own in enumerate(groups) if own == group]
        wanting = [n for n in ("test", "val") if len(parts[n]) < share * len(groups)]
        parts[wanting[0] if wanting else "train"] += images
    return tuple(sorted(parts[name]) for name in ("train", "val", "test"))
    # END SOLUTION


check("your_own_data.1", split_by_group)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Go through the shuffled groups once. For each, ask which split still wants images: first test, then val.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A split is full when it has at least `share * len(groups)` images. `sorted(set(groups))` is the start of the shuffle.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You dealt out images, or counted groups instead of images: a large group fills a split at once.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 What can be wrong
#
# Annotations come from people and from scripts, and both make mistakes. `check` looks at every box and opens every picture.

# %%
command("check data")

# %% [markdown]
# It finds no fault that would stop a training (only the first twelve lines are shown). But it gives two kinds of warning.
# First, each picture has more trees than the hundred boxes per image that are kept, and that COCO's measure counts. Of 366 trees, 100 are 27 per
# cent, so the AP could not rise much above 0.27. Second, a detector finds at most one object per query, and it has fewer
# queries than the training picture has trees. Both warnings are gone once the pictures are cut into tiles, below.
#
# To see what faults look like, spoil a copy in four ways that really happen: a category with an unknown id, a box that was
# drawn from right to left, a box that was drawn twice, and a picture file that was cut short when it was copied. `check`
# calls a fault fatal if it would stop or spoil a training. Before you run: which of the four are fatal, and which one would
# only make the detector quietly worse?

# %%
spoiled = WORK / "spoiled"
shutil.copytree(WORK / "data", spoiled)
content = json.loads((spoiled / "annotations/train.json").read_text())
first, second, third, *_ = content["annotations"]
x, y, w, h = second["bbox"]
first["category_id"] = 99
second["bbox"] = [x + w, y, -w, h]  # from right to left
content["annotations"].append({**third, "id": 10_000})
(spoiled / "annotations/train.json").write_text(json.dumps(content))
broken = spoiled / "val/west_val.jpg"
broken.write_bytes(broken.read_bytes()[:2000])
faults = [f for split in ("train", "val") for f in check_dataset(*find_split(spoiled, split))]
lines = [str(fault).replace(f"{spoiled}/", "") for fault in faults]
found = [line for line in lines if "objects" not in line]  # without the warnings from above
print(*found, sep="\n")

# %% tags=["hide-input"]
assert len(found) == 4 and sum(fault.startswith("FATAL") for fault in found) == 3
print("three are fatal, and one is a warning")

# %% [markdown]
# The box that was drawn twice is the quiet one. No program stops at it; but where many boxes are there twice, a detector is
# rewarded for finding one object twice.
#
# ## Exercise {{n}}.2  Two corners or a size?
#
# *difficulty ●●○ · 15 minutes · 4 lines*
#
# A common fault is a file whose boxes are `[left, top, right, bottom]`. A single box that leaves the image may be a slip
# of the hand, but the whole file gives the format away. Return True if the boxes are more likely to be corners, that is, if
# both hold: read as sizes, at least one of them leaves the image; read as corners, none does, and all have right > left and
# bottom > top. A box that only touches the image's edge does not leave it.


# %% tags=["exercise"]
def looks_like_corners(boxes, width, height):
    """boxes: (N, 4) numbers, an array; the image's size. Returns a bool."""
    # BEGIN SOLUTION
    left, top, third, fourth = np.asarray(boxes, float).T
    as_sizes = (left + third <= width) & (top + fourth <= height)
    as_corners = (third <= width) & (fourth <= height) & (third > left) & (fourth > top)
    return bool(as_corners.all() and not as_sizes.all())
    # END SOLUTION


check("your_own_data.2", looks_like_corners)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Read as a size, a box ends at left + third and top + fourth. Read as corners, at third and fourth.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `np.asarray(boxes).T` gives four columns. Combine with `&`, and ask `.all()`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A file of small boxes near the top left fits both readings. Then it is not a fault: sizes are what the format says.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.4 How large is an object for the detector?
#
# A detector does not get your picture. It gets the picture after it was resized, and then its backbone divides both sides
# by 8, 16 and 32. So ask: how many pixels wide is an object in *that* image? If an object has $s$ pixels in a picture whose
# short side has $S$, and the recipe resizes the short side to $R$, then the detector gets an object of $s \cdot R / S$ pixels.
# The next cell computes this for the crown of median size in the training picture (size is the square root of the box's area),
# and for the recipe `photos`, where $R = 240$.

# %%
train_content = json.loads((WORK / "data/annotations/train.json").read_text())
sizes = np.array([math.sqrt(a["bbox"][2] * a["bbox"][3]) for a in train_content["annotations"]])
crown, side = float(np.median(sizes)), min(picture.size)
print(f"a crown has {crown:.0f} pixels of {side}, and {crown * 240 / side:.1f} of 240")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, a large square with a tiny crown in it and a small orange frame, the tile, around that. Middle, 48 pixels of the picture when it was resized to 240: the crown is smaller than one cell of stride 8. Right, 48 pixels of the tile: the crown is five such cells wide and high."}}
shrinking(side, round(crown), 240, 128)

# %% [markdown]
# *Figure {{n}}.3. The same crown in two images that the detector may get, each drawn 48 pixels wide, on the cells of strides 8
# (thin lines) and 16. When the whole picture is resized, the crown is smaller than one cell; in a tile it is five cells wide.*
#
# Six pixels are less than one cell of the finest map, and a tree is hard to tell from a bush in them. There are two
# remedies. Larger images cost time and memory in proportion to their pixels. **Tiles** cost the time but not the memory: cut
# the picture into pieces, each of which shows its objects at full size and goes through the detector alone. Neighbouring tiles
# overlap by at least a quarter of their side, here 32 pixels. So an object smaller than that is always whole in some tile. A
# larger one may be cut in all of them; where at least half of it lies in a tile, it is an object there, with its box cut at the
# edge. The same command works for any set of large pictures.

# %%
command("tile data --output tiles --side 128")

# %% [markdown]
# The 366 trees have become 641 boxes, because a tree in the overlap of two tiles is counted in both.
#
# Then look at the tiles. If every box were drawn around the tree next to the one that is meant, no check of the file would
# notice, but your eyes would in ten seconds. `deformable-detr sheet tiles` writes pages of thumbnails; here are eight
# tiles, drawn directly.

# %% mystnb={"image": {"alt": "Eight tiles of forest with orange boxes around whole crowns and grey boxes around parts of crowns at the edges."}}
tiles = json.loads((WORK / "tiles/annotations/train.json").read_text())
known = {}
for annotation in tiles["annotations"]:
    known.setdefault(annotation["image_id"], []).append(annotation)
chosen = [image for image in tiles["images"] if len(known.get(image["id"], [])) >= 4][::9][:8]
figure, axes = plt.subplots(2, 4, figsize=(8, 4.2))
for axis, image in zip(axes.flat, chosen, strict=True):
    axis.imshow(plt.imread(WORK / "tiles/train" / image["file_name"]))
    for annotation in known[image["id"]]:
        x, y, w, h = annotation["bbox"]
        colour = "0.6" if annotation["iscrowd"] else "C4"
        axis.add_patch(plt.Rectangle((x, y), w, h, fill=False, ec=colour, lw=1.4))
    axis.set_axis_off()
plt.show()

# %% [markdown]
# *Figure {{n}}.4. Training tiles. Grey boxes are crowns of which less than half lies in the tile. They are neither objects nor
# background: neither training nor evaluation counts them. (COCO's format marks such boxes as crowds.)*
#
# ## {{n}}.5 Start from what others learned
#
# Five hundred tiles are few if a detector has to learn from nothing what an edge is, and how queries share the objects
# among themselves. So one starts from a detector that knows this already: from published weights of COCO if there is an
# Internet connection (`--init SenseTime/deformable-detr`), or else from any detector at hand. Here it is the detector of
# digits, and whether it helps is measured below. The next cell loads it for one class and for 100 queries, as many as
# `photos` uses, and prints which of its tensors were kept. (The digits' detector has 30 queries. Its first stage picks
# them, so a hundred of them take no new tensors. On the command line this is `--set model.num_queries=100`.)

# %%
import logging

logging.getLogger("deformable_detr").setLevel(logging.ERROR)  # the report is printed here
start = load_pretrained(WORK / "digits.safetensors", num_classes=1, num_queries=100)
print(*str(start.report).splitlines()[:9], sep="\n")
bias = start.model.class_heads[0].bias.sigmoid()
assert torch.allclose(bias, torch.tensor(0.01))
print(f"the score with which a new head begins: {bias.item():.2f}")

# %% [markdown]
# Everything was kept but the class heads, which know ten digits and no tree. (The first stage's head keeps one row, because
# that row says "some object", whatever its class.) The new heads start at the prior, a score of 0.01, because nearly all queries
# are background. A detector that began with a score of one half for every query would spend its first steps unlearning that
# ({{chapter recipe}}).
#
# ## Exercise {{n}}.3  What may move
#
# *difficulty ●●○ · 15 minutes · 4 lines*
#
# With very few images one may train only the part that is new: the decoder's class heads (`class_heads`), and with
# `boxes=True` its box heads too (`box_heads`). Set `requires_grad` of every parameter of the model accordingly, True or False,
# and return the sorted names of those that still learn. The head of the first stage stays frozen.


# %% tags=["exercise"]
def train_heads_only(model, boxes=False):
    """Freezes all else; returns a sorted list of names."""
    # BEGIN SOLUTION
    wanted = ("class_heads", "box_heads") if boxes else ("class_heads",)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)
    # END SOLUTION


check("your_own_data.3", train_heads_only)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `model.named_parameters()` gives names such as `class_heads.0.bias`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `str.startswith` takes a tuple. `parameter.requires_grad_(True or False)` sets it.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Called a second time with boxes=True, it must also switch parameters on again.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.6 The doctor
#
# Before a run of hours, spend half a minute on one question: can this model learn four of these images by heart? If it cannot,
# a night of training will not help either. The doctor also compares where boxes and pixels end up after the transforms, and
# looks for parts of the model that get no gradient. (`--short-side 128` leaves the tiles at their size.)

# %%
# NBVAL_IGNORE_OUTPUT
command(
    "doctor tiles --recipe photos --short-side 128 --init digits.safetensors"
    " --set model.num_queries=100 --steps 60",
    lines=30,
)

# %% [markdown]
# All is well. (Its estimate of the time is for the recipe's 30 epochs; we shall train for 5.) There is one thing that the
# doctor cannot find: labels that have nothing to do with the pictures, because four images can be learned by heart all the
# same. Your eyes may find it on the sheet; otherwise only the validation split will show it.
#
# ## {{n}}.7 Train, and measure what each decision was worth
#
# This is the whole training, as one command. It takes a few minutes on one core.
#
# ```
# deformable-detr train tiles --recipe photos --short-side 128 --batch-size 8 --epochs 5 --output runs/trees
# ```
#
# It starts from random weights ("from nothing"). It was run, and so were five variants:
# - **from the digits' detector**: the same, with `--init digits.safetensors --set model.num_queries=100`,
# - **a quarter of the tiles, as many steps**: also from the digits' detector, on 117 of the 468 tiles for 20 epochs,
# - **other colours**: from nothing, with the transforms of the recipe `digits`, which change the colours,
# - **three times as long**: from nothing, for 15 epochs,
# - **three times as long, other colours**: both.
#
# (`python experiments/trees.py` runs them all.) What was each decision worth? The next cell reads the results: the mean AP50
# on the forest nearby (*val*) and on the one 13 km away (*test*), with the number of seeds in brackets. In a project of your
# own, choose by *val* and look at *test* once, at the end. Here we look at both in every row, because the difference between
# them is the subject.
#
# Before you run: which of the six will be the best in the far forest?

# %%
text = Path("../data/results/trees.csv").read_text()
rows = list(csv.DictReader(text.splitlines()))
finished = [row for row in rows if row["status"] == "done" and row["metric"] == "ap50"]
table = {}
for row in finished:
    table.setdefault(row["configuration"], {}).setdefault(row["split"], []).append(
        float(row["value"])
    )
for name, splits in table.items():
    shown = ", ".join(f"{split} {np.mean(v):.2f} ({len(v)})" for split, v in splits.items())
    print(f"{name:38} {shown}")

# %% mystnb={"image": {"alt": "Points for each seed and a bar for their mean, for each way to train, on val and on test."}}
figure, axis = plt.subplots(figsize=(7, 2.8))
for row, splits in enumerate(table.values()):
    for split, colour, shift in (("val", "C4", -0.15), ("test", "C0", 0.15)):
        values = splits[split]
        axis.plot(values, [row + shift] * len(values), "o", color=colour, ms=5, alpha=0.7)
        axis.plot(
            [np.mean(values)] * 2, [row + shift - 0.12, row + shift + 0.12], color=colour, lw=2.5
        )
axis.plot([], [], "o", color="C4", label="val: the same forest")
axis.plot([], [], "o", color="C0", label="test: 13 km away")
axis.set(yticks=range(len(table)), yticklabels=table, xlabel="AP50", xlim=(0, None))
axis.invert_yaxis()
axis.legend(ncol=2, loc="lower left", bbox_to_anchor=(0, 1))
plt.show()

# %% [markdown]
# *Figure {{n}}.5. What each decision is worth: one point per seed, a bar for their mean.*

# %% tags=["hide-input"]
means = {name: {split: np.mean(v) for split, v in splits.items()} for name, splits in table.items()}
assert all(mean["test"] < 0.5 * mean["val"] for mean in means.values())
assert means["three times as long"]["test"] < means["from nothing"]["test"]
best = max(means, key=lambda name: means[name]["val"])
assert best == "three times as long, other colours" and means[best]["test"] < 0.02
assert all(means[name]["test"] > means[best]["test"] - 0.005 for name in means)
few, all_tiles = (means[n]["test"] for n in list(means)[2:0:-1])
assert few > all_tiles  # a quarter of the tiles, and all of them
worst = max(mean["test"] / mean["val"] for mean in means.values())
print(f"test is at most {worst:.2f} of val, in every row")

# %% [markdown]
# Five things can be read from this figure, and none of them is what one hopes for.
#
# **Another forest is another task.** Every one of these detectors finds far less 13 km away than next door. Had the tiles been
# dealt out at random, test would have shown the same forest as train. Its AP would then have been near that of val, or above
# it, and you would have gone into the field with that number.
#
# **Val can mislead as well.** The way to train that is best on val, with other colours and three times as long, is nearly the worst on
# test. A likely reason is that the detector learned *this* forest, its light and its kind of tree. Val can only choose well for places
# that resemble it.
#
# **The start was worth little.** What the digits' detector knows of digits helps hardly at all with crowns. Published
# weights of COCO, which were trained on photographs, should be a better start, but that was not run here.
#
# **More of the same is not more.** A quarter of the tiles did no worse than all of them (compare the second and third rows,
# which start alike). So what is missing is probably not tiles but places: however many tiles are cut from it, one forest is
# only one example of what forests look like.
#
# **A remedy can make it worse.** Changing the colours was meant to stand in for other light, and in both pairs of rows it
# made the far forest worse. So a remedy is a guess until it is measured.
#
# There are two seeds per row, and they differ as much as most rows do. So read these as observations and not as laws. They still say
# more than the one number that a random split would have given.
#
# ## {{n}}.8 What it gets wrong
#
# One number says how good a detector is, but not what to do next. Mistakes have kinds {cite}`bolya2020tide`: the class is wrong,
# the place is wrong, an object is found twice, background is taken for an object, an object is missed. The next cell takes the
# weights of the run "three times as long" (`data/checkpoints/trees.safetensors`), whose AP50 on val is 0.25, and sorts its
# mistakes on the tiles of val. Remedies are chosen on val as well, because test has to stay new.

# %%
# NBVAL_IGNORE_OUTPUT
trees = load_pretrained("../data/checkpoints/trees.safetensors").model
val_set = CocoDataset(
    *find_split(WORK / "tiles", "val"), load_recipe("photos").at_short_side(128).eval_transform()
)
report = analyse(trees, val_set, threshold=None, progress=False)  # at the score of the best F1
print(report.table())

# %% [markdown]
# The counts include only detections whose score reaches the printed threshold, but "AP50 if mended" is over all scores, as AP
# is. So the two columns can disagree. Over two hundred trees count as missed, and yet mending them would gain almost nothing,
# because nearly all of them are found with lower scores. Mend first what would gain most: here these are boxes in the wrong place
# and duplicates, each worth about 0.1. This is what each kind calls for:
#
# | kind | what it usually means | remedy |
# |:--|:--|:--|
# | class | two classes look alike, or are annotated by two rules | more images of both; one rule |
# | place | boxes are loose | longer training; several views of each image; one rule for those who draw boxes |
# | duplicate | queries have not learned to leave an object to one of them | longer training; non-maximum suppression |
# | background | the detector has not seen enough of what is not an object | images without objects; a higher threshold |
# | missed | objects are smaller or darker than most, or there are too few queries | larger images; more of such images; `num_queries` |
#
# These are guesses until they are measured, and section {{n}}.9 measures one for each kind.
# `deformable-detr evaluate --report report.html` writes all of this into one page, with the images on which it was worst.
#
# And what does it find? Here is the far forest, which it has never seen: `predict --tiles` looks at a large picture tile by tile,
# and puts the pieces together. `--json` writes the boxes to a file, which the cell after it draws. (`--output found` would save the
# pictures with their boxes.)

# %%
shutil.copy("../data/checkpoints/trees.safetensors", WORK)
command(
    "predict data/test/east_test.jpg --model trees.safetensors --tiles 128 --json found.json",
    lines=6,
)

# %% mystnb={"image": {"alt": "Part of the far forest. Most boxes lie along a road that crosses it; only a few lie on crowns."}}
# NBVAL_IGNORE_OUTPUT
figure, axis = plt.subplots(figsize=(7, 4.4))
axis.imshow(Image.open(WORK / "data/test/east_test.jpg"))
for detection in json.loads((WORK / "found.json").read_text()):
    x, y, w, h = detection["bbox"]
    axis.add_patch(plt.Rectangle((x, y), w, h, fill=False, ec="C4", lw=1.4))
axis.set(xlim=(0, 800), ylim=(500, 0))
axis.set_axis_off()
plt.show()

# %% [markdown]
# *Figure {{n}}.6. What the detector finds 13 km from where it learned, in one corner of the picture. It takes the road for a row of
# trees, and passes over most crowns.*
#
# The figure shows what the number could not. There is no road in the training picture, so nothing ever taught the detector that a
# road is not a tree. These are mistakes of the kind *background*, and the table names their remedy: pictures of roads, and of
# anything else that the detector will meet, without a single box. The missed crowns call for pictures from other places. (Having
# looked at test in order to choose a remedy, we would now need a third forest to report on.)
#
# ## Exercise {{n}}.4  The kind of a mistake
#
# *difficulty ●●● · 20 minutes · 9 lines*
#
# Given one detection's overlaps (IoU) with all objects of its image, return the first of these that holds:
# - "found": an overlap of at least 0.5 with an object of the detection's class,
# - "class": an overlap of at least 0.5 with an object of another class,
# - "place": an overlap of at least 0.1 with an object of its own class,
# - "background": none of these. An image may have no objects.
#
# (The report's rules are finer: they ask for place before class, and they know duplicates.)


# %% tags=["exercise"]
def kind_of_error(overlaps, label, labels):
    """overlaps: (T,) with each object; label: the detection's; labels: (T,) the objects'."""
    # BEGIN SOLUTION
    overlaps, labels = np.asarray(overlaps, float), np.asarray(labels)
    same, other = overlaps[labels == label], overlaps[labels != label]
    if (same >= 0.5).any():
        return "found"
    if (other >= 0.5).any():
        return "class"
    if (same >= 0.1).any():
        return "place"
    return "background"
    # END SOLUTION


check("your_own_data.4", kind_of_error)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Split the overlaps: with objects of the same class, and with the others.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Test the conditions in the order of the text, and return at the first that holds. `.any()` of nothing is False.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The object that overlaps most need not be the one of the right class: look at all.
#
# </details>
#
# {{solution}}

# %% tags=["hide-input"]
temporary.cleanup()

# %% [markdown]
# ## {{n}}.9 One remedy for each kind, measured
#
# Which remedies of the table hold what they promise? The detector is that of the second row of Figure {{n}}.5, which started from the
# digits' and trained for 5 epochs. (With one class, errors of the kinds *class* and *both* cannot happen.) Most remedies need no
# training at all, because they only change how the trained detector is asked:
#
# | kind | remedy | before | how |
# |:--|:--|:--|:--|
# | duplicate | NMS: of two boxes with an IoU above 0.5 the better stays | none, as the paper | `predict --nms 0.5` |
# | place | several views: three sizes, each also mirrored, boxes averaged | one view | `evaluate --tta`, `predict --tta` |
# | place | twice as long | 5 epochs | `train --epochs 10` |
# | background | tiles without trees | training without them, as many steps | `tile` keeps them |
# | background | a higher threshold | as many boxes as trees | `--threshold`: half as many boxes |
# | missed | each tile enlarged to 192 pixels | 128 pixels | `--tta --tta-scales 1.5` |
# | missed | several views again, counted by this kind | one view | `--tta` |
#
# A detector that shows fewer boxes makes fewer errors of most kinds. So that this decides nothing, each detector's threshold is the
# score at which it shows as many boxes on val as val has trees (for "a higher threshold", half as many), and the same threshold is
# used on test. Errors are given per 100 trees of the split, and AP50 is over all scores, as before. A verdict is about the *change*, seed by seed, and names a direction only
# if the 95 % interval of the changes leaves out zero. (`python experiments/study.py tree_errors` runs it, in half an hour of a core.)

# %% tags=["hide-input"]
REMEDIES = {  # kind and remedy: how it was before, and after, each a training and a way to look
    ("duplicate", "NMS"): (("five epochs", "as it is"), ("five epochs", "nms")),
    ("place", "several views"): (("five epochs", "as it is"), ("five epochs", "several views")),
    ("place", "twice as long"): (("five epochs", "as it is"), ("ten epochs", "as it is")),
    ("background", "tiles without trees"): (
        ("without empty tiles", "as it is"),
        ("five epochs", "as it is"),
    ),
    ("background", "a higher threshold"): (
        ("five epochs", "as it is"),
        ("five epochs", "half the boxes"),
    ),
    ("missed", "enlarged tiles"): (("five epochs", "as it is"), ("five epochs", "larger")),
    ("missed", "several views"): (("five epochs", "as it is"), ("five epochs", "several views")),
}
errors = {}  # training, way, split, metric: values by seed
for each in csv.DictReader(Path("../data/results/tree_errors.csv").read_text().splitlines()):
    if each["status"] == "done":
        key = each["configuration"], each["at"], each["split"], each["metric"]
        errors.setdefault(key, {})[each["seed"]] = float(each["value"])


def pairs_of(remedy, split, metric):
    """Before and after, (seeds, 2): kinds per 100 trees, AP50 as it is; seeds that have both."""
    before, after = (errors.get((*way, split, metric), {}) for way in REMEDIES[remedy])
    trees = errors["five epochs", "as it is", split, "objects"]["0"]
    scale = 1 if metric == "ap50" else 100 / trees
    both = sorted(before.keys() & after.keys())
    return scale * np.array([(before[seed], after[seed]) for seed in both]).reshape(-1, 2)


# %% tags=["hide-input"]
def judged(pairs, digits, better):
    """What the changes allow to say."""
    if len(pairs) < 2:
        return "one seed: no verdict"
    changes = better * (pairs[:, 1] - pairs[:, 0])
    return verdict(changes, np.zeros(len(changes)), digits)


def show(metric_of, digits, better):
    """A line for each remedy and split."""
    for kind, name in REMEDIES:
        for split in ("val", "test"):
            pairs = pairs_of((kind, name), split, metric_of(kind))
            change = "not in the table yet"
            if len(pairs):
                before, after = pairs.mean(0)
                change = f"{before:5.{digits}f} to {after:5.{digits}f} ({len(pairs)})"
                change += f"  {judged(pairs, digits, better)}"
            print(f"{kind:10} {name:19} {split:4} {change}")


# %% [markdown]
# Before you run: two of the six remedies help a great deal, on val and in the far forest. Which?

# %%
print("errors of the kind per 100 trees: before to after (seeds), verdict")
show(lambda kind: kind, 1, better=-1)
print("\nAP50: before to after (seeds), verdict")
show(lambda kind: "ap50", 2, better=1)

# %% mystnb={"image": {"alt": "Two panels with a row for each remedy. Left, errors of its kind per 100 trees, right, AP50, each on val and on test: lines from before, a small grey point, to after, a coloured point, one line per seed."}}
figure, (left, middle) = plt.subplots(1, 2, figsize=(7.6, 3.2), sharey=True)
for row, (kind, name) in enumerate(REMEDIES):
    for axis, metric in ((left, kind), (middle, "ap50")):
        for split, colour, shift in (("val", "C4", -0.16), ("test", "C0", 0.16)):
            for k, (before, after) in enumerate(pairs_of((kind, name), split, metric)):
                y = row + shift + 0.07 * (k - 1)
                axis.plot([before, after], [y, y], color=colour, lw=1.2)
                axis.plot(before, y, "o", color="0.6", ms=3.5)
                axis.plot(after, y, "o", color=colour, ms=5)
names = [f"{kind}: {name}" for kind, name in REMEDIES]
left.set(yticks=range(len(names)), yticklabels=names, xlabel="errors of the kind per 100 trees")
middle.set(xlabel="AP50", xlim=(0, None))
middle.plot([], [], "o", color="C4", label="after, val")
middle.plot([], [], "o", color="C0", label="after, test")
middle.plot([], [], "o", color="0.6", ms=3.5, label="before")
middle.legend(ncol=3, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)
left.invert_yaxis()
plt.show()

# %% [markdown]
# *Figure {{n}}.7. From before (grey) to after, one line per seed. Left, fewer is better; right, more is better.*

# %% tags=["hide-input"]
for split in ("val", "test"):
    for remedy in (("duplicate", "NMS"), ("place", "several views")):
        before, after = pairs_of(remedy, split, "ap50").T
        assert (after > before).all(), (split, remedy)
    before, after = pairs_of(("duplicate", "NMS"), split, "duplicate").T
    assert (after < 0.2 * before).all()
    before, after = pairs_of(("missed", "several views"), split, "missed").T
    assert (after < before).all()
before, after = pairs_of(("missed", "enlarged tiles"), "val", "ap50").T
assert after.mean() < before.mean()
print(
    "NMS and several views raise AP50 in both forests, for every seed; enlarged tiles lower it on val"
)

# %% [markdown]
# **The two that help most need no training.** NMS removes nearly all duplicates, as it must, and the AP50 rises with it in every seed, near and
# far. A DETR should not need it, and the digits' detector does not. But leaving each object to one query is learned late, and these
# detectors trained for minutes. Looking in several views helps still more. A box that only one view shows is given a low score, the
# boxes of all views are averaged, and the duplicates within a view are merged as well. It costs six looks instead of one.
#
# **A remedy need not keep to its kind.** Several views were chosen for loose boxes, because an average of boxes should be more exact.
# Yet what fell most is the number of missed trees: where fewer of the boxes are duplicates, more trees have a box at all, if often a
# loose one (see both rows of several views). So look at the other kinds and at the AP as well. A threshold is the opposite
# case. It removes errors of every kind, and correct boxes with them, and the AP50, which is over all scores, cannot change at all: it is a
# choice, not a remedy.
#
# **Larger was worse.** Enlarged tiles were to show small trees better. But this detector has never seen crowns of that size, and its AP50
# fell, near and far. What helps a detector that was trained on enlarged tiles from the start need not help one that was not.
#
# For the two remedies that cost training, twice as long and tiles without trees, read the verdicts in their rows: where one says
# "no difference larger than", the seeds differ more than the remedy changed, and so few seeds cannot say more. (Tiles without trees
# take the place of tiles with trees when the number of steps is the same, so they may also cost something.) None of the six makes
# the far forest as easy as the one next door. For that there is no remedy in the table but pictures from there.

# %% [markdown]
# ## {{n}}.10 Which recipe, which transforms?
#
# | your data | recipe | add |
# |:--|:--|:--|
# | photographs, an Internet connection, a GPU or patience | `--recipe small-data --init SenseTime/deformable-detr` | |
# | photographs, no connection, a CPU | `--recipe photos` | `--init` with any detector at hand; `--short-side` as large as the objects need |
# | small images of signs or letters, which must not be mirrored | `--recipe digits` | |
# | pictures many times larger than the recipe's images | any | `tile` first, `predict --tiles` afterwards |
# | COCO itself, many GPUs | `--recipe paper` | {{chapter training_at_every_size}} |
#
# The transforms of `photos` mirror left and right, resize and crop; those of `digits` zoom and change colours and never mirror.
# Ask of each transform: could the changed picture have been taken? If not, it teaches something false. A forest seen from the
# air may be mirrored, for example, but a mirrored b is a d.
#
# ## Summary
#
# - Split by what must be new: another place, another day. Here AP50 was less than half as high 13 km away.
# - Check the file, look at the pictures, let the doctor overfit four images: that takes minutes and can save hours.
# - Count an object's pixels in the image that the detector gets. If they are few, cut tiles.
# - Keep every tensor that fits; new class heads start at the prior.
# - Mistakes have kinds. Try free remedies first: NMS and several views helped here, larger tiles did not. Choose on val, report on test.
#
# > **Differs from the paper.** The paper trains on COCO only, at 800 pixels on the short side. **Differs from the official code.** There, another number
# > of classes means editing the checkpoint by hand.
#
# ## Further reading
#
# - {cite}`weinstein2019trees`: the pictures' source, and what thousands of noisy boxes can do.
# - {cite}`lin2014coco`: the format and the measure.
# - {cite}`bolya2020tide`: kinds of mistakes.
