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
# - **write** your boxes in COCO's format, with your own category ids,
# - **check** them, and read what a fault would have done,
# - **test** data and model together before hours are spent,
# - **fine-tune** a detector that learned other classes, and say what was kept,
# - **look** at its errors by kind, and decide what to do next.
#
# You should know: {{chapter training}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# The usual case is not COCO. It is a folder of images, a few hundred boxes, and classes that nobody
# else has. This chapter goes that way once, from folder to detector, on a small set: pictures with
# digits, but not the ten classes that the shipped detector knows. Somebody wants to know whether a
# digit is *round* (0, 6, 8, 9), *pointed* (1, 4, 7) or *open* (2, 3, 5).

# %%
import dataclasses
import json
import shutil
import tempfile
import warnings
from pathlib import Path

# a library asks for ipywidgets, which this chapter does without
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import numpy as np
import torch

from deformable_detr.data.checks import check_dataset
from deformable_detr.data.coco import CocoDataset, find_split
from deformable_detr.data.transforms import digits_eval_transform, digits_train_transform
from deformable_detr.evaluation.coco import evaluate
from deformable_detr.evaluation.report import analyse
from deformable_detr.evaluation.report_page import write_html
from deformable_detr.exercises import check
from deformable_detr.models.deformable_detr import DeformableDETR
from deformable_detr.training.doctor import doctor
from deformable_detr.training.loop import train
from deformable_detr.training.recipe import load_recipe
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## {{n}}.1 Boxes in COCO's format
#
# One JSON file a split: images, annotations, categories {cite}`lin2014coco`. A box is `[left, top,
# width, height]` in pixels. Ids are names: any numbers, with gaps, in any order. Ours are 40, 7 and 12.

# %%
KINDS = {"round": (40, (0, 6, 8, 9)), "pointed": (7, (1, 4, 7)), "open": (12, (2, 3, 5))}
new_id = {digit + 1: number for number, digits in KINDS.values() for digit in digits}


def small_split(source, target, split, images):
    """The first images of a split of the digits, with the new categories."""
    content = json.loads((source / "annotations" / f"{split}.json").read_text())
    kept = content["images"][:images]
    ids = {image["id"] for image in kept}
    boxes = [a for a in content["annotations"] if a["image_id"] in ids]
    boxes = [{**a, "category_id": new_id[a["category_id"]]} for a in boxes]
    categories = [{"id": number, "name": name} for name, (number, _) in KINDS.items()]
    (target / split).mkdir(parents=True)
    (target / "annotations").mkdir(exist_ok=True)
    for image in kept:
        shutil.copy(source / split / image["file_name"], target / split)
    parts = {
        "info": content["info"],
        "images": kept,
        "annotations": boxes,
        "categories": categories,
    }
    (target / "annotations" / f"{split}.json").write_text(json.dumps(parts))
    return parts


temporary = tempfile.TemporaryDirectory()
data = Path(temporary.name) / "kinds"
train_content = small_split(Path("../data/digits"), data, "train", 240)
val_content = small_split(Path("../data/digits"), data, "val", 100)
for split, content in (("train", train_content), ("val", val_content)):
    print(split, len(content["images"]), "images,", len(content["annotations"]), "boxes")

# %% [markdown]
# Data in other formats need not be typed anew. `deformable-detr convert VOC DATA` reads the XML files
# of Pascal VOC, and the package `supervision` reads YOLO; `data/README.md` has the lines. Convert all
# splits together: classes get numbers, and each split must give a class the same one.
#
# ## {{n}}.2 What can be wrong, and is
#
# Annotations come from people and from scripts, and both slip. Let us spoil a copy the way it really
# happens: a box drawn from right to left, a category that was renamed, a box drawn twice, a file that
# broke on its way.

# %%
spoiled = Path(temporary.name) / "spoiled"
shutil.copytree(data, spoiled)
content = json.loads((spoiled / "annotations" / "train.json").read_text())
first, second, third, *_ = content["annotations"]
x, y, w, h = second["bbox"]
first["category_id"] = 99
second["bbox"] = [x + w, y, -w, h]  # from right to left
content["annotations"].append({**third, "id": 10_000})
broken = spoiled / "train" / content["images"][5]["file_name"]
broken.write_bytes(broken.read_bytes()[:200])
_ = (spoiled / "annotations" / "train.json").write_text(json.dumps(content))

# %% [markdown]
# Before you run: which of the four would have stopped a training, and which would only have made it
# quietly worse?

# %%
faults = check_dataset(*find_split(spoiled, "train"))
for fault in faults:
    print(str(fault).replace(f"{spoiled}/", ""))
assert len(faults) == 4
assert check_dataset(*find_split(data, "train")) == []

# %% [markdown]
# `deformable-detr check DATA` prints the same, and `deformable-detr train` refuses to start on fatal
# faults, and says which. From Python, `CocoDataset` refuses the unknown category, the broken file stops
# the epoch that reads it, and the box drawn from right to left is dropped without a word: check first.
# The box drawn twice is quiet in any case.
#
# ## Exercise {{n}}.1  Two corners or a size?
#
# *difficulty ●●○ · 15 minutes · 4 lines*
#
# The commonest fault is a file whose boxes are `[left, top, right, bottom]`. No single box gives it
# away, the whole file does. Return True where boxes are more likely corners: read as sizes, some
# leave the image; read as corners, none does and all have right > left and bottom > top.


# %% tags=["exercise"]
def looks_like_corners(boxes, width, height):
    """boxes: (N, 4) numbers, an array; the image's size. Returns a bool."""
    # BEGIN SOLUTION
    left, top, third, fourth = np.asarray(boxes, float).T
    as_sizes = (left + third <= width) & (top + fourth <= height)
    as_corners = (third <= width) & (fourth <= height) & (third > left) & (fourth > top)
    return bool(as_corners.all() and not as_sizes.all())
    # END SOLUTION


check("your_own_data.1", looks_like_corners)

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
# A file of small boxes near the top left fits both readings. Then it is not a fault: sizes are what
# the format says.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.3 Look at it
#
# No check sees that every box belongs to the next object over. Eyes do, in ten seconds.

# %%
names = [
    category["name"] for category in sorted(train_content["categories"], key=lambda c: c["id"])
]
train_set = CocoDataset(*find_split(data, "train"), digits_train_transform())
val_set = CocoDataset(*find_split(data, "val"), digits_eval_transform())
print([category["id"] for category in train_set.categories], names)
counts = np.bincount([int(label) for i in range(len(val_set)) for label in val_set[i][1].labels])
print(dict(zip(names, counts.tolist(), strict=True)))

# %% mystnb={"image": {"alt": "Eight small pictures with digits on photographs and on noise. Each digit has a box in the colour of its class, round, pointed or open, and the boxes fit."}}
figure, axes = plt.subplots(2, 4, figsize=(8, 4.2))
for axis, image in zip(axes.flat, train_content["images"][:8], strict=True):
    axis.imshow(plt.imread(data / "train" / image["file_name"]))
    for annotation in train_content["annotations"]:
        if annotation["image_id"] == image["id"]:
            x, y, w, h = annotation["bbox"]
            colour = {7: "C1", 12: "C2", 40: "C4"}[annotation["category_id"]]
            axis.add_patch(plt.Rectangle((x, y), w, h, fill=False, color=colour, linewidth=1.5))
    axis.set_axis_off()
plt.show()

# %% [markdown]
# *Figure {{n}}.1. Training images with their boxes; round in yellow, pointed in orange, open in green.*
#
# ## {{n}}.4 Start from what others learned
#
# The shipped detector knows ten digits. Its backbone, encoder and decoder know what ink looks like
# and where it ends; only the class heads speak of other classes. One of them, the first stage's, scores
# tokens, and its row 0 means "some object" (10.4), whatever the classes are: that row stays. Keep all that
# fits, make the rest anew:

# %%
source, _ = load_model("../data/checkpoints/digits.safetensors")
config = dataclasses.replace(source.config, num_classes=3)
model = DeformableDETR(config)
published, own = source.state_dict(), model.state_dict()
fitting = {k: v for k, v in published.items() if v.shape == own[k].shape}
for kind in ("weight", "bias"):  # of the first stage's head
    name = f"first_stage.class_head.{kind}"
    own[name][0] = published[name][0]
model.load_state_dict(own | fitting)
renewed = sorted(set(own) - set(fitting))
print(len(fitting), "tensors kept,", len(renewed), "made anew, such as", renewed[0])
assert all("class_head" in name for name in renewed)

# %% [markdown]
# `DeformableDETR.from_pretrained(path, num_classes=3)` does this with a line for each tensor, also for
# the weights that others published ({{chapter published_weights}}). The new bias is not zero but the **prior**,
# $-\ln 99$: a score of 0.01. Nearly all queries are background, and a detector that begins with 0.5
# for everything spends its first steps unlearning that.

# %%
bias = model.class_heads[0].bias
print([round(x, 2) for x in bias.sigmoid().tolist()])
assert torch.allclose(bias.sigmoid(), torch.tensor(0.01))

# %% [markdown]
# ## {{n}}.5 The doctor
#
# Before a long run: one batch, a minute. Can this model learn these few images by heart? If not, no
# night of training will help.

# %%
# NBVAL_IGNORE_OUTPUT
diagnosis = doctor(model, train_set, steps=80, progress=False, seconds=30)
print(diagnosis.table())

# %%
assert diagnosis.healthy and diagnosis.ap > 0.5  # below 100 steps the doctor only warns of AP

# %% [markdown]
# What it cannot find: labels that have nothing to do with the pictures. A batch can be learned by
# heart all the same; validation will show it. The doctor finds what is broken, not what is meaningless.
#
# ## {{n}}.6 Fine-tune, and start from nothing
#
# Two epochs of 240 images, at half the usual rate. Beside it the same from random weights, to
# see what the start was worth.

# %%
recipe = load_recipe("digits").train
recipe = dataclasses.replace(recipe, epochs=2, lr=5e-4, backbone_lr=5e-4, warmup_steps=10)
runs = {}
for name, start in (("fine-tuned", model), ("from nothing", DeformableDETR(config))):
    losses = []
    train(
        start,
        train_set,
        None,
        Path(temporary.name) / name,
        recipe,
        on_step=lambda step, terms, kept=losses: kept.append(terms),
        progress=False,
    )
    runs[name] = start, losses
metrics = {name: evaluate(trained, val_set, progress=False) for name, (trained, _) in runs.items()}

# %%
# NBVAL_IGNORE_OUTPUT
for name, found in metrics.items():
    print(f"{name:>12}: AP {found.ap:.2f}, AP50 {found.ap50:.2f}")

# %%
assert metrics["fine-tuned"].ap > 0.35 > 0.1 > metrics["from nothing"].ap

# %% mystnb={"image": {"alt": "Two losses over 60 training steps. Left, one minus GIoU: fine-tuned it starts low, and stays low; from nothing it starts far higher, near one, and comes down little. Right, the loss of the classes: both fall, the fine-tuned one lower in the end."}}
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
for axis, term, weight, label in zip(
    axes, ("loss_giou", "loss_class"), (2, 2), ("1 - GIoU", "class loss"), strict=True
):
    for name, (_, losses) in runs.items():
        axis.plot([terms[term] / weight for terms in losses], label=name)
    axis.set(xlabel="step", ylabel=f"{label}, last layer", ylim=(0, None))
axes[0].legend()
plt.show()
tuned = [terms["loss_class"] for terms in runs["fine-tuned"][1]]
assert sum(tuned[-10:]) < 0.5 * sum(tuned[:10])

# %% [markdown]
# *Figure {{n}}.2. The losses of boxes and classes. Fine-tuned, the detector knows from the first step where
# digits are; what falls is the loss of the names. From nothing that falls
# too, while scores take their right size, and stops higher. (The fine-tuned one was trained on these images
# before, with other names. The AP above is of images that it has never seen.)*
#
# ## Exercise {{n}}.2  What may move
#
# *difficulty ●●○ · 15 minutes · 4 lines*
#
# With very few images one may train only the part that is new. Return the names of the parameters
# that should learn: those of the decoder's class heads, and, with `boxes=True`, of its box heads too. Set
# `requires_grad` accordingly.


# %% tags=["exercise"]
def train_heads_only(model, boxes=False):
    """Freezes all else; returns a sorted list of names."""
    # BEGIN SOLUTION
    wanted = ("class_heads", "box_heads") if boxes else ("class_heads",)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)
    # END SOLUTION


check("your_own_data.2", train_heads_only)

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
# ## {{n}}.7 What it gets wrong
#
# One number says how good, not what to do. Errors have kinds {cite}`bolya2020tide`: the class is
# wrong, the place is wrong, both are, an object is found twice, background is taken for an object, an
# object is missed.

# %%
trained, _ = runs["fine-tuned"]
report = analyse(trained, val_set, threshold=None, progress=False)  # at the score of the best F1

# %%
# NBVAL_IGNORE_OUTPUT
print(report.table())

# %%
assert report.errors.counts["correct"] > 100

# %% [markdown]
# Counts are of detections from the printed score on; "AP50 if mended" is of all scores, as AP is. So an
# error may count 0 and still cost something, and an object missed at this score may be found at a lower
# one. A confusion counts each object once, so these are fewer than the detections of kind *class*. Mend first what gains most. What each kind calls for: *class*, more images of the confused classes; *place*, longer training, or
# clearer rules for those who draw boxes; *both*, both; *duplicate*, longer training, in which queries
# learn to leave an object to one of them; *background*, images without objects; *missed*, more small or
# covered ones. `deformable-detr evaluate --report report.html` writes all of it with pictures of
# the worst images into one file.

# %%
page = Path(temporary.name) / "report.html"
write_html(report, page)
text = page.read_text()
links, pictures = "http://" in text or "https://" in text, text.count("<img") > 0
print("links to other hosts:", links, "and pictures inside:", pictures)
assert "<script src" not in text

# %% [markdown]
# ## Exercise {{n}}.3  The kind of an error
#
# *difficulty ●●● · 20 minutes · 9 lines*
#
# One detection, all objects of its image. Return "found" at an overlap of at least 0.5 with an object
# of its class; else "class" at 0.5 with an object of another; else "place" at 0.1 with one of its
# class; else "background". (Simpler than the report's rules, which ask for place before class, and know
# duplicates and "both".)


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


check("your_own_data.3", kind_of_error)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Split the overlaps: with objects of the same class, and with the others.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Ask in the order of the text, and return at the first yes. `.any()` of nothing is False.
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

# %%
temporary.cleanup()

# %% [markdown]
# ## {{n}}.8 The same from the command line
#
# ```
# deformable-detr check DATA
# deformable-detr sheet DATA
# deformable-detr doctor DATA --recipe small-data --init WEIGHTS
# deformable-detr train DATA --recipe small-data --init WEIGHTS --output runs/mine
# deformable-detr evaluate DATA --model runs/mine/best.safetensors --split test --report report.html
# deformable-detr predict photo.jpg --model runs/mine/best.safetensors --output found/
# ```
#
# ## Summary
#
# - COCO's format takes any category ids; inside they are 0, 1, 2, and come back on the way out.
# - Check the file, look at the pictures, let the doctor overfit one batch: minutes, before hours.
# - Keep every tensor that fits; new class heads start at the prior.
# - Fine-tuned, boxes are right at once, and what is learned are names.
# - Errors have kinds, and each kind has its remedy.
#
# > **Differs from the paper.** It trains on COCO only. **Differs from the official code.** There a
# > different number of classes means editing the checkpoint by hand.
#
# ## Further reading
#
# - {cite}`lin2014coco`: the format and the metrics.
# - {cite}`bolya2020tide`: kinds of errors.
