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
# # {{n}}. Questions readers ask
#
# You will be able to
# - **find** the answer to what users of such projects ask most often, with a check that runs,
# - **tell** a fault of the data from one of the training, in a minute,
# - **name** the command or function of this library that helps,
# - **diagnose** a broken training from its log.
#
# You should know: {{chapter pixels_to_boxes}} and {{chapter matching_and_loss}}. Other chapters are linked where they
# answer a question in full.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# The code of Deformable DETR {cite}`zhu2021deformable` has been public since 2020. The threads of its repository, and of those
# that grew from it, hold hundreds of questions, and the same ones come back every year. Here are 30 of them. Where a
# thread asked the question, it is linked.
#
# | | questions |
# |:--|:--|
# | {{n}}.1 The operator | 1 it does not compile · 2 "no kernel image" · 3 half precision · 4 without a GPU |
# | {{n}}.2 Boxes and points | 5 which format? · 6 NaN · 7 points outside · 8 divided by K, times ½ |
# | {{n}}.3 Training | 9 the loss does not fall · 10 class error 100 · 11 how many queries? · 12 how many classes? · 13 learning rate on one GPU · 14 a batch of one image · 15 what is frozen? · 16 resuming · 17 other classes than the weights |
# | {{n}}.4 Data | 18 a COCO file of one's own · 19 ids · 20 images without objects |
# | {{n}}.5 Speed and export | 21 FLOPs and seconds · 22 ONNX · 23 TensorRT |
# | {{n}}.6 Understanding | 24 why no NMS? · 25 always 100 detections · 26 valid ratios · 27 the 0.5 · 28 sigmoid and detach · 29 DCN, DAT and this · 30 drawing the points |

# %% tags=["hide-input"]
import copy
import dataclasses
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from schematics import questions as draw
from torch import nn
from torchvision.ops import box_iou

from deformable_detr import (
    Batch,
    DeformableDETR,
    DeformableDETRConfig,
    MSDeformAttn,
    Target,
    backends,
    ms_deform_attn,
    postprocess,
)
from deformable_detr.boxes import cxcywh_to_xyxy, inverse_sigmoid
from deformable_detr.data.checks import check_annotations
from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.exercises import check
from deformable_detr.layers.sampling import bilinear_sample
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.training.recipe import load_recipe
from deformable_detr.weights.classes import with_classes
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)
torch.set_num_threads(1)

# %% tags=["hide-input"]
samples = Path("../data/samples")
dataset = CocoDataset(samples, samples / "annotations.json", digits_eval_transform())
model, categories = load_model("../data/checkpoints/digits.safetensors")
model.eval()
with torch.no_grad():
    outputs = [model(collate([dataset[i]])) for i in range(len(dataset))]

# %% [markdown]
# The checks use the shipped detector of digits (`model`), the 24 sample pictures (`dataset`) and the detector's outputs
# for them (`outputs`). To try a check by itself, work in the folder `chapters/` and run the two folded cells above first.
#
# ## {{n}}.1 The operator
#
# ### Q1 It does not compile, or `No module named MultiScaleDeformableAttention`
#
# The official operator is a C++ extension that everybody compiles for their own torch, and its source uses functions
# that torch has since removed
# ([issue 251](https://github.com/fundamentalvision/Deformable-DETR/issues/251),
# [transformers 35976](https://github.com/huggingface/transformers/issues/35976)). You do not need it. This library's
# kernel is compiled when it is first used, without torch's headers, and where nothing can be compiled, plain PyTorch runs.
# If another project imports the official module, `integrations.install_official_names()` puts ours under that name.
# See {{chapter making_it_fast}}.

# %%
# NBVAL_IGNORE_OUTPUT
for name, state in backends().items():
    print(f"{name:10} {state}")

# %% [markdown]
# ### Q2 "no kernel image is available for execution on the device"
#
# An extension contains machine code for the GPUs that were named when it was built. On another GPU there is none
# ([48](https://github.com/fundamentalvision/Deformable-DETR/issues/48),
# [88](https://github.com/fundamentalvision/Deformable-DETR/issues/88)), and the message appears at every call, sometimes
# without stopping the training. Rebuild on the machine that runs it, and uninstall the old build first
# ([210](https://github.com/fundamentalvision/Deformable-DETR/issues/210)). Our kernel is compiled by NVRTC for the GPU
# that is there. For this book it was compiled (not run, for want of GPUs) for these:

# %%
build = json.loads(Path("../data/results/cuda_build.json").read_text())
print("compute capability:", sorted({kernel["architecture"] / 10 for kernel in build["kernels"]}))

# %% [markdown]
# ### Q3 `"ms_deform_attn_forward_cuda" not implemented for 'Half'`
#
# The official kernel knows float32 and float64 only
# ([64](https://github.com/fundamentalvision/Deformable-DETR/issues/64),
# [mmcv 2011](https://github.com/open-mmlab/mmcv/issues/2011)). The usual remedy is to convert to float32 before the
# call, and back after it ([DINO 59](https://github.com/IDEA-Research/DINO/issues/59)). Ours takes 16-bit values. But
# the locations must *not* be rounded: between 0.5 and 1 the numbers of float16 lie 0.0005 apart, which on a map that is
# 134 pixels wide is 0.065 of a pixel. See {{chapter training_at_every_size}}.

# %%
shapes = [(100, 134)]
value, weights = torch.randn(1, 100 * 134, 2, 16), torch.full((1, 50, 2, 1, 4), 0.25)
locations = 0.5 + 0.5 * torch.rand(1, 50, 2, 1, 4, 2)
exact = ms_deform_attn(value, shapes, locations, weights)
for name, kinds in {
    "all but locations": (torch.float16, torch.float32),
    "all": (torch.float16,) * 2,
}.items():
    kind, of_locations = kinds
    half = ms_deform_attn(value.to(kind), shapes, locations.to(of_locations), weights.to(kind))
    print(f"float16, {name:18} largest error {(half.float() - exact).abs().max():.0e}")

# %% [markdown]
# ### Q4 Does it run without a GPU?
#
# The official operator answers "Not implemented on the CPU"
# ([166](https://github.com/fundamentalvision/Deformable-DETR/issues/166),
# [130](https://github.com/fundamentalvision/Deformable-DETR/issues/130)). Nothing about the operation needs a GPU. In
# plain PyTorch it is one `grid_sample` per level, and all that this book computes was computed on a CPU. A detector with
# ResNet-50 takes seconds per image there ({{chapter making_it_fast}} has the figures). So a laptop can train on a small data
# set, but not on COCO.

# %% [markdown]
# ## {{n}}.2 Boxes and points
#
# ### Q5 Which format do boxes have?
#
# Three formats meet. COCO files have x, y, width and height in pixels. Inside the model a box is cx, cy, w, h, divided by
# the size of *its own* image, without the padding of the batch. Detections are x0, y0, x1, y1 in pixels of the original
# image. If boxes are not learned, first look which of the three they are in. See {{chapter pixels_to_boxes}}.

# %%
x, y, w, h = 30.0, 40.0, 60.0, 20.0  # COCO: the corner, then the size
height, width = 100, 200
box = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
print("in the model:", [round(n, 3) for n in box.tolist()])
pixels = cxcywh_to_xyxy(box) * torch.tensor([width, height] * 2)
print("detection:   ", [round(n, 3) for n in pixels.tolist()])

# %% [markdown]
# ### Q6 `matrix contains invalid numeric entries`, or `assert (boxes1[:, 2:] >= boxes1[:, :2]).all()`
#
# Both messages usually have one cause: a NaN has reached the matcher
# ([transformers 42202](https://github.com/huggingface/transformers/issues/42202),
# [DETR 101](https://github.com/facebookresearch/detr/issues/101)). Comparisons with NaN are false, so the assertion
# fails, although no box is the wrong way round. The message tells where the NaN ended up, not where it was
# made. Look for its source: in the data, in a division by zero, in float16 beyond 65504, or in a learning
# rate that is too high. This library's matcher names the image, as the next cell shows, and its training
# also names the first module whose output is not finite.

# %%
batch = collate([dataset[0], dataset[1]])
batch.images[1, 0, 5, 5] = torch.nan  # one channel of one pixel
with torch.no_grad():
    broken = model(batch)
print("share of NaN in the boxes:", [boxes.isnan().float().mean().item() for boxes in broken.boxes])
try:
    SetCriterion()(broken, batch.targets)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# One pixel has spoilt all queries of its image, and none of the other image.
#
# ### Q7 Sampling points lie outside [0, 1]. Is this a bug?
#
# No ([mmcv 1973](https://github.com/open-mmlab/mmcv/issues/1973)). Offsets are not bounded, and a query near the border
# sends points over it from the first step on. What they read there is zero, so such a point only takes weight away from the
# others. {{chapter sampling}} shows what happens at the border.

# %%
attention, shapes = MSDeformAttn(32, 2, 4, 4), [(12, 20), (6, 10)]
references = torch.rand(1, 200, 2, 2)
locations = attention.sampling(torch.zeros(1, 200, 32), references, shapes).locations
outside = ((locations < 0) | (locations > 1)).any(-1).float().mean()
print(f"untrained, references anywhere: {100 * outside:.0f} % of the points are outside")
print("read there:", bilinear_sample(torch.ones(1, 12, 20), torch.tensor([-0.2, 0.5])).tolist())

# %% [markdown]
# ### Q8 Why are offsets divided by the number of points, and multiplied by ½?
#
# With boxes as references an offset is $\Delta p / K \cdot wh \cdot ½$
# ([38](https://github.com/fundamentalvision/Deformable-DETR/issues/38),
# [mmdetection 7686](https://github.com/open-mmlab/mmdetection/issues/7686)). Before training, the $K$ points of a head have
# offsets of length 1, 2, ..., $K$. Divided by $K$, the longest is 1; and half of the box's size leads from its centre to its
# edge. So in an untrained model the outermost points lie exactly on the edge of the box, whatever $K$ is. See
# {{chapter many_scales}}.

# %%
attention, shapes = MSDeformAttn(32, 2, 4, 4), [(12, 20), (6, 10)]
boxes = torch.tensor([0.5, 0.5, 0.4, 0.2]).expand(1, 1, 2, 4)
first = attention.sampling(torch.zeros(1, 1, 32), boxes, shapes).locations[0, 0, 0, 0]  # head 0
print("x of the four points of head 0:", [round(x, 2) for x in first[:, 0].tolist()])
print("right edge of the box:", 0.5 + 0.4 / 2)

# %% [markdown]
# ## {{n}}.3 Training
#
# ### Q9 The loss does not fall. What now?
#
# This is asked in many threads
# ([DETR 460](https://github.com/facebookresearch/detr/issues/460),
# [387](https://github.com/facebookresearch/detr/issues/387)), and nobody can answer it from afar. Ask these three questions,
# in this order. `deformable-detr doctor DATA` asks them for you: it has a detector learn one batch by heart.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A flow chart of three questions. Is the loss finite? If not: NaN in the data, float16, or too high a learning rate. Does it fall on one batch? If not: learning rate, frozen parts, a missing gradient. Are classes and boxes right? If not: ids of classes or the format of boxes. After three times yes it is sound, and what is missing is more images, longer training, or pretrained weights."}}
draw.where_to_look_first()

# %% [markdown]
# *Figure {{n}}.1. Three questions, and where each "no" points. Training longer helps only after three times "yes".*
#
# To see what the answers look like, we break a training on purpose. A very small detector learns two pictures by heart
# in 60 steps, four times: as it should be; with labels that are drawn anew in each step; with boxes given as corners; and
# with a learning rate of 0.3.


# %%
SIZES = dict(num_classes=10, num_queries=12, backbone="small", num_levels=2, embed_dim=32)
LAYERS = dict(num_heads=4, num_points=2, encoder_layers=1, decoder_layers=2, ffn_dim=64)
criterion, two = SetCriterion(), collate([dataset[9], dataset[0]])


def train(spoil=lambda targets: targets, lr=2e-3, steps=60):
    """Returns the detector and its losses; `spoil` changes the targets that it is given."""
    torch.manual_seed(0)
    detector = DeformableDETR(DeformableDETRConfig(**SIZES, **LAYERS, dropout=0.0, refine=True))
    optimizer, losses = torch.optim.AdamW(detector.parameters(), lr=lr), []
    for _ in range(steps):
        loss = sum(criterion(detector(two), spoil(two.targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return detector, losses


# %%
@torch.no_grad()
def matched(detector):
    """Of matched queries: class error in per cent, and mean IoU of their boxes."""
    output, wrong, overlaps = detector(two), [], []
    for i, (queries, objects) in enumerate(HungarianMatcher()(output, two.targets)):
        target = two.targets[i]
        wrong += (output.logits[i, queries].argmax(-1) != target.labels[objects]).tolist()
        pairs = output.boxes[i, queries], target.boxes[objects]
        overlaps += box_iou(*map(cxcywh_to_xyxy, pairs)).diagonal().tolist()
    return 100 * sum(wrong) / len(wrong), sum(overlaps) / len(overlaps)


def random_labels(targets):
    return [dataclasses.replace(t, labels=torch.randint(10, t.labels.shape)) for t in targets]


def corners(targets):
    return [dataclasses.replace(t, boxes=cxcywh_to_xyxy(t.boxes)) for t in targets]


# %% [markdown]
# Before you run: in which of the four will the loss fall?

# %%
faults_made = {
    "as it should be": {},
    "random labels": {"spoil": random_labels},
    "corners for boxes": {"spoil": corners},
    "rate of 0.3": {"lr": 0.3},
}
logs = {}
for name, fault in faults_made.items():
    detector, losses = train(**fault)
    error, iou = matched(detector)
    logs[name] = {"loss": losses, "class_error": error, "iou": iou}
    print(
        f"{name:18} loss falls: {losses[-1] < 0.9 * losses[0]!s:6} class right: {error < 50!s:6}",
        end="",
    )
    print("boxes right:", iou > 0.5)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left, four losses over 60 steps: three fall, that with a rate of 0.3 rises and stays high. Right, IoU against class error: the sound training is at the upper left, random labels at the upper right, corners at the lower left, the rate of 0.3 at the lower right."}}
draw.four_trainings(logs)

# %% [markdown]
# *Figure {{n}}.2. In three of the four the loss falls, so a falling loss alone says little. But compare the matched queries with
# the true targets: class error and IoU tell the four apart, and each has a corner of its own (right).*
#
# ## Exercise {{n}}.1  Diagnose
#
# *difficulty ●●○ · 20 minutes · 8 lines*
#
# Turn the two figures into a function. A log has the losses of all steps, and class error (in per cent) and IoU at the end. Return
# - "not finite" if any loss is NaN or infinite; otherwise
# - "does not fall" if the last loss is more than 0.9 times the first; otherwise
# - "labels" if the class error is 50 or more, "boxes" if the IoU is below 0.5, "too early" if both, and "sound" if neither.


# %% tags=["exercise"]
def diagnose(log):
    """log: {"loss": list of numbers, "class_error": per cent, "iou": 0 to 1}. Returns a word."""
    # BEGIN SOLUTION
    losses = log["loss"]
    if not all(math.isfinite(loss) for loss in losses):
        return "not finite"
    if losses[-1] > 0.9 * losses[0]:
        return "does not fall"
    wrong = log["class_error"] >= 50, log["iou"] < 0.5
    words = {(False, False): "sound", (True, True): "too early", (True, False): "labels"}
    return words.get(wrong, "boxes")
    # END SOLUTION


check("questions.1", diagnose)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The order of the questions matters: a NaN is neither larger nor smaller than 0.9 times the first loss.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `math.isfinite` is false for NaN and for infinity. For the last step, make two booleans and look at their four cases.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# Look at all losses for NaN, but compare only the last one with the first. A loss that has been low once may be high again.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ### Q10 The class error is 100, and stays there
#
# Early in training this is normal ([DETR 41](https://github.com/facebookresearch/detr/issues/41)). The figure is the
# share of *matched* queries whose highest class is wrong, in *one* batch. With two objects in the batch it can only be 0, 50 or
# 100. If it stays at 100 while boxes become right, the labels are wrong: ids are shifted by one, for example, or train and val
# have their classes in another order ([258](https://github.com/facebookresearch/detr/issues/258)). Better judges are AP on val,
# and AP without classes (`evaluate --class-agnostic`). If the second is good and the first is not, the classes are at fault.
#
# ### Q11 How many queries do I need, and why 300?
#
# More than any image has objects, with some to spare, because a query answers for one object at most
# ([DETR 126](https://github.com/facebookresearch/detr/issues/126)). DETR has 100, since images of COCO have up to about 70
# objects ([9](https://github.com/facebookresearch/detr/issues/9)). The paper takes 300 together with the focal loss, and
# no table changes the number alone. `deformable-detr check` names images with more objects than queries ("crowded"). In a
# two-stage model the number can be changed without training, because its queries are not learned: they are the best proposals.

# %%
print("most objects in one sample picture:", max(len(dataset[i][1].labels) for i in range(24)))
few, _ = with_classes(model, categories, categories, 8)
with torch.no_grad():
    fewer = few.eval()(collate([dataset[9]]))
same = torch.allclose(fewer.boxes, outputs[9].boxes[:, :8], atol=0.05)
print(f"with 8 queries instead of 30: {fewer.boxes.shape[1]} boxes, as before: {same}")

# %% [markdown]
# (They differ a little, because queries attend to each other.) Learned queries are rows of a table. More of them means rows
# that were never trained, and fewer means losing what those rows had specialised in.
#
# ### Q12 How many classes, and where did "no object" go?
#
# As many as there are ([78](https://github.com/fundamentalvision/Deformable-DETR/issues/78),
# [152](https://github.com/fundamentalvision/Deformable-DETR/issues/152)). DETR has a softmax, whose numbers must sum to one,
# so it needs a class for "nothing" and has $n + 1$ outputs. Deformable DETR has a sigmoid for each class, and "nothing" means
# that all of them are low. COCO's 80 classes become 91 outputs in the official code, because their highest id is 90 and the ids
# have gaps ([57](https://github.com/fundamentalvision/Deformable-DETR/issues/57)). This library counts the classes from the data.
# See {{chapter matching_and_loss}}.

# %%
scores = outputs[9].logits[0].sigmoid()  # the picture of the seven
print("outputs:", scores.shape[-1], "for", len(categories), "classes")
order = scores.amax(1).argsort(descending=True)
print(
    f"sum of the best query's scores {scores[order[0]].sum():.2f}, of the last's {scores[order[-1]].sum():.2f}"
)

# %% [markdown]
# The sums are not one: each class is judged by itself.
#
# ### Q13 Which learning rate on one GPU?
#
# The published rate of $2 \cdot 10^{-4}$ goes with 32 images per step. With far fewer images it can be too high: a user with
# two GPUs and one image on each had an AP near 0, and got it right with a tenth of the rate
# ([55](https://github.com/fundamentalvision/Deformable-DETR/issues/55)). The safest way is to keep 32 images per step and
# to collect them from small batches: `--accumulate 16` with batches of 2. If you change the number of images per step instead,
# try several rates and measure. For Adam there is no simple rule: the authors say that naive linear scaling does not carry over
# ([14](https://github.com/fundamentalvision/Deformable-DETR/issues/14)). See {{chapter training_at_every_size}}.

# %%
paper = load_recipe("paper").train
for processes in (1, 2, 8, 16):
    accumulate = 32 // (processes * paper.batch_size)
    print(
        f"{processes:2} GPU(s): --batch-size {paper.batch_size} --accumulate {accumulate} --lr {paper.lr:g}"
    )

# %% [markdown]
# ### Q14 May a batch have one image?
#
# With a ResNet, yes. Its batch norms are frozen (in this library they are called `FoldedNorm`), and the rest has group norm and
# layer norm, which look at one image or one token at a time. So a model computes the same for an image alone and in a batch.
# (Our *small* backbone starts from random weights and trains with ordinary batch norm, so its recipe has eight images per batch.
# Once trained, it too computes the same for one.) What a small batch changes is the noise of the gradient: see Q13.

# %%
with torch.device("meta"):  # no memory, no numbers
    base = DeformableDETR(DeformableDETRConfig())
print(
    "norms with ResNet-50:",
    sorted({type(m).__name__ for m in base.modules() if "Norm" in type(m).__name__}),
)
with torch.no_grad():
    together = model(collate([dataset[0], dataset[1]]))
alone = torch.cat([outputs[0].boxes, outputs[1].boxes])
print("same boxes alone and together:", torch.allclose(together.boxes, alone, atol=1e-4))

# %% [markdown]
# ### Q15 What is frozen, and should I freeze more?
#
# In the official model the first convolution, the first stage, and all batch norms of the ResNet are frozen. Freezing more saves
# memory and time, because no gradient is computed there. Whether it helps AP depends on how much your images look like those that
# the backbone has learned from, so measure it. `--frozen conv1 layer1 layer2` freezes one stage more, and `--frozen` without names
# freezes nothing but the batch norms. See {{chapter recipe}}.

# %%
with torch.device("meta"):
    base = DeformableDETR(DeformableDETRConfig())
every = sum(p.numel() for p in base.parameters())
learning = sum(p.numel() for p in base.parameters() if p.requires_grad)
print(f"parameters: {every:,}, of which learn {learning:,}")

# %% [markdown]
# ### Q16 How do I resume?
#
# Give the same command again. A run's folder holds model, optimiser, averages and random states, and the training goes on at
# the step where it stopped, as if nothing had happened. `--fresh` starts anew instead. With a larger `--epochs` a finished run
# goes on, too. (In the official code `--resume` loads the weights with missing and unexpected names allowed, and it takes
# the learning rate from the *new* command.) To start another training from these weights, use `--init`.
#
# ### Q17 `size mismatch for class_embed.0.weight` when I load weights for my own classes
#
# A class head has one row per class, and your classes are not those of the weights
# ([pull request 181](https://github.com/fundamentalvision/Deformable-DETR/pull/181)). Everything else fits, so load
# everything else. Rows of classes that both know by name can be kept, too. Do not load the optimiser's state: it belongs to
# the old tensors. Here, `load_pretrained(name, categories=...)` or `train --init` does all this and says what was kept. See
# {{chapter published_weights}}.

# %%
mine = [{"id": 1, "name": "seven"}, {"id": 2, "name": "eight"}, {"id": 5, "name": "dog"}]
adapted, report = with_classes(model, categories, mine)
print(f"{len(report.kept)} tensors kept, {len(report.fresh)} changed")
print(report.classes())

# %% [markdown]
# ## {{n}}.4 Data
#
# ### Q18 How do I train on a COCO file of my own?
#
# In this order: `deformable-detr check`, `sheet`, `doctor`, `train`, `evaluate`, `predict` ({{chapter your_own_data}} goes the
# whole way). Do not leave out the first two. A check finds what is impossible; a box around the wrong thing is possible, and only
# your eyes find it. The next cell shows what the check says if boxes were written as corners:

# %%
content = json.loads((samples / "annotations.json").read_text(encoding="utf-8"))
print("as shipped:", [str(fault) for fault in check_annotations(content)])
spoilt = copy.deepcopy(content)
for annotation in spoilt["annotations"]:
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x, y, x + w, y + h]
print(next(str(fault) for fault in check_annotations(spoilt) if fault.fatal))

# %% [markdown]
# ### Q19 My ids start from 1, or have holes
#
# Both are fine in the file, but such ids must not reach the loss. A class head with $n$ rows has the labels 0 to $n - 1$. If ids
# are used as labels, the head needs as many rows as the highest id plus one (DETR's advice:
# [108](https://github.com/facebookresearch/detr/issues/108)). Otherwise an index is out of range, which a GPU reports as a
# "device-side assert" in some later operation. So turn each id into its place in the list of categories, and back again only when
# you write results.
#
# ## Exercise {{n}}.2  Labels from ids
#
# *difficulty ●○○ · 8 minutes · 2 lines*
#
# Return the label of each annotation: the place of its `category_id` among the ids of *all* categories, in their order as
# numbers.


# %% tags=["exercise"]
def labels_of(annotations, categories):
    """annotations: dicts with category_id. categories: dicts with id. Returns a list of labels."""
    # BEGIN SOLUTION
    place = {each: i for i, each in enumerate(sorted(c["id"] for c in categories))}
    return [place[annotation["category_id"]] for annotation in annotations]
    # END SOLUTION


check("questions.2", labels_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First make a dictionary from id to place.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `enumerate(sorted(ids))` gives place and id.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The categories come from the file's list, not from the annotations. A class that no annotation has still takes its place,
# or train and val would disagree.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ### Q20 May an image have no object?
#
# Yes, and such images should be in the training if they will be met later. The image's boxes are a tensor of shape (0, 4)
# ([DETR 82](https://github.com/facebookresearch/detr/issues/82),
# [335](https://github.com/facebookresearch/detr/issues/335)), its box losses are zero, and its class loss teaches all
# queries to give low scores. Two places need care: the mean number of boxes, by which the loss is divided, must be at least 1, and in
# training on several GPUs a denoising branch without objects may leave parameters unused.

# %%
nothing = Target(0, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), (128, 128))
losses = SetCriterion()(outputs[9], [nothing])
print({name: round(losses[name].item(), 2) for name in ("loss_class", "loss_box", "loss_giou")})

# %% [markdown]
# The picture does have a seven. We told the loss that it has none, so the detector's high score for it is punished: the class loss is
# not zero.
#
# ## Exercise {{n}}.3  Sound targets
#
# *difficulty ●●○ · 15 minutes · 10 lines*
#
# Write the check that catches most faults of targets before they reach the loss. Return the sorted names of what is
# wrong: "not finite" (a NaN or infinite number in a box), "in pixels" (a number above 1), "no size" (a width or height
# that is not above 0), "label" (one below 0, or not below `num_classes`). An image without objects is sound.


# %% tags=["exercise"]
def faults(labels, boxes, num_classes):
    """labels: (N,) int64. boxes: (N, 4), should be normalised cxcywh. Returns a list of names."""
    # BEGIN SOLUTION
    found = []
    if not boxes.isfinite().all():
        found.append("not finite")
    if (boxes > 1).any():
        found.append("in pixels")
    if (boxes[:, 2:] <= 0).any():
        found.append("no size")
    if ((labels < 0) | (labels >= num_classes)).any():
        found.append("label")
    return sorted(found)
    # END SOLUTION


check("questions.3", faults)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One `if` per fault, each with `.any()` or `.all()` over the whole tensor.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `.all()` of an empty tensor is true, `.any()` is false, so an image without objects needs no case of its own.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A label equal to `num_classes` is already too large. NaN is neither above 1 nor below 0; ask `isfinite`.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 Speed and export
#
# ### Q21 Equal FLOPs, but slower. Why?
#
# Because FLOPs count arithmetic, and moving numbers takes time as well
# ([DETR 304](https://github.com/facebookresearch/detr/issues/304),
# [99](https://github.com/fundamentalvision/Deformable-DETR/issues/99)). A convolution reads neighbouring numbers again and
# again. Deformable attention reads four pixels per sample at places that are not known beforehand, and does little with each.
# In the official README, Deformable DETR has 173 GFLOPs and makes 15.0 images per second; Faster R-CNN has 180 GFLOPs and makes 25.6.
# `deformable-detr info` shows FLOPs and seconds for your model and machine. See {{chapter linear_really}} and
# {{chapter making_it_fast}}.

# %%
reads = 4 * 17_821 * 8 * 16  # four pixels, tokens of an 800 x 1066 image, heads, points
products = 5 * 17_821 * 8 * 16 * 32  # appendix A.1: five multiply-adds per sample and channel
print(
    f"one encoder layer: {reads / 1e6:.0f} million rows of 32 channels read, at places that queries choose,"
)
print(
    f"for {products / 1e9:.2f} G multiply-adds: {products / (reads * 32):.2f} per number that is read"
)

# %% [markdown]
# ### Q22 Can I export it to ONNX?
#
# Yes, since deformable attention can be written in plain operations that ONNX has. `deformable-detr export MODEL --output
# model.onnx` writes the file, runs it with onnxruntime at several sizes, and puts it in place only if its numbers are those of
# PyTorch. Only the official CUDA extension cannot be exported. See {{chapter out_of_the_notebook}}.
#
# ### Q23 ONNX is right, but TensorRT gives wrong boxes
#
# Then the operation GridSample is the first suspect. Version 20 of ONNX's operations renamed its mode `bilinear` to `linear`.
# TensorRT versions that do not know the new name read the nearest pixel instead, without any message
# ([4646](https://github.com/NVIDIA/TensorRT/issues/4646), and its repair,
# [onnx-tensorrt 1060](https://github.com/onnx/onnx-tensorrt/pull/1060)). Our files have version 20. There is a report of a whole
# detector, too ([4813](https://github.com/NVIDIA/TensorRT/issues/4813)), and one project now exports gathers and products in place
# of GridSample ([lightly-train 917](https://github.com/lightly-ai/lightly-train/pull/917)). You can do the same:
#
# ```
# DEFORMABLE_DETR_BACKEND=gather deformable-detr export MODEL --output model.onnx
# ```
#
# We have no TensorRT here and have not run any of this in it. So after every build, compare the engine's outputs with those of
# onnxruntime on a real picture. In PyTorch, the two forms agree:

# %%
shapes = [(6, 10), (3, 5)]
value, where = torch.randn(1, 75, 2, 8), torch.rand(1, 9, 2, 2, 4, 2) * 1.4 - 0.2
share = torch.full((1, 9, 2, 2, 4), 1 / 8)
results = [ms_deform_attn(value, shapes, where, share, backend=b) for b in ("reference", "gather")]
print("GridSample and gathers agree:", torch.allclose(*results, atol=1e-5))

# %% [markdown]
# ## {{n}}.6 Understanding
#
# ### Q24 Why is there no NMS?
#
# Because duplicates are punished in training. The matching gives each object to one query, and every other query that claims
# it is a false alarm ([100](https://github.com/fundamentalvision/Deformable-DETR/issues/100),
# [DETR 72](https://github.com/facebookresearch/detr/issues/72)). Queries can settle who takes which object, since in each decoder
# layer they first attend to each other. But this is learned, not guaranteed. After too little training duplicates remain
# ([139](https://github.com/fundamentalvision/Deformable-DETR/issues/139)), and at low scores they are the rule:

# %%
for threshold in (0.5, 0.05):
    shown = duplicates = 0
    for output in outputs:
        (found,) = postprocess(output, [(128, 128)], threshold=threshold)
        alike = found.labels[:, None] == found.labels
        overlap = box_iou(found.boxes, found.boxes).triu(1) > 0.5
        shown, duplicates = shown + len(found.boxes), duplicates + int((alike & overlap).sum())
    print(
        f"scores above {threshold}: {shown} detections, {duplicates} pairs of one class with IoU > 0.5"
    )

# %% [markdown]
# If you need low thresholds, `predict --nms 0.5` removes such pairs. See {{chapter matching_and_loss}}.
#
# ### Q25 It always returns 100 detections
#
# It returns the 100 highest of all scores, however low they are, because AP is computed from ranked lists and is never hurt by
# more entries at their end ([149](https://github.com/fundamentalvision/Deformable-DETR/issues/149)). For anything that is
# looked at, choose a threshold. Scores trained with focal loss are often low, which says nothing about how good the ranking is
# ([mmdetection 8849](https://github.com/open-mmlab/mmdetection/issues/8849)). So do not take 0.7 because DETR did; let
# `evaluate --keep-threshold` choose the threshold on val.
#
# ### Q26 What are `valid_ratios`?
#
# Images of one batch are padded to one size. A valid ratio is the part of the padded width and height that is image, for
# each image and level ([36](https://github.com/fundamentalvision/Deformable-DETR/issues/36),
# [197](https://github.com/fundamentalvision/Deformable-DETR/issues/197),
# [mmdetection 8656](https://github.com/open-mmlab/mmdetection/issues/8656)). Boxes and references are relative to
# the image, and sampling locations to the padded map, so a reference is multiplied by the ratio to become a location. For the
# encoder's references the official code divides by the ratio of the token's own level and then multiplies by that of each level. On
# the token's own level this changes nothing, which looks like a bug. It is none: on the *other* levels the rounded ratios differ.
# See {{chapter many_scales}}.

# %%
sizes = [(96, 128), (128, 64)]  # (H, W)
tokens = model.tokens(Batch.from_images([torch.zeros(3, *size) for size in sizes]))
ratios = tokens.valid_ratios[:, 0].tolist()  # of level 0, as (x, y)
print("valid ratios (x, y):", ratios)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two grey squares, the padded frames. In the left one a green image fills the full width and three quarters of the height, in the right one half of the width and the full height. A cross marks each image's centre; the titles give it in coordinates of the batch."}}
draw.padded_batch(sizes, ratios)

# %% [markdown]
# *Figure {{n}}.3. Images (green) in the frame that both are padded to. The centre of an image (cross) has other
# coordinates in the batch. The ratio converts between the two.*
#
# ### Q27 What is the 0.5 (or −0.5) doing everywhere?
#
# A pixel is a square, and its centre lies half a pixel from its corner. So pixel $i$ of $n$ has its centre at $(i + 0.5)/n$, and the other
# way round a location $x$ in $[0, 1]$ lies at $x \cdot n - 0.5$, counted in pixels. The position encoding counts pixels from 1 and
# subtracts 0.5 for the same reason. (DETR does not subtract it, so its positions are the far edges of the pixels.) A missing 0.5 moves
# everything by half a pixel, which at stride 32 is 16 pixels of the image. See {{chapter sampling}}.

# %%
ramp = torch.arange(5.0).expand(1, 1, 5)  # one row, whose pixels have the values 0 to 4
for text, x in (("(i + 0.5) / n", 2.5 / 5), ("i / n", 2 / 5)):
    print(f"pixel 2 read at {text:13}: {bilinear_sample(ramp, torch.tensor([x, 0.5])).item():.1f}")

# %% [markdown]
# ### Q28 Why the inverse sigmoid, and why `detach`?
#
# A box's numbers must stay between 0 and 1. With a correction added to them they could leave that range. So the correction is added
# *before* the sigmoid, to the inverse sigmoid of the old number
# ([DAB-DETR 68](https://github.com/IDEA-Research/DAB-DETR/issues/68)). The reference for the next layer is detached "to
# stabilize training", says the paper: without it each loss would also pull at all earlier heads
# ([54](https://github.com/fundamentalvision/Deformable-DETR/issues/54),
# [DAB-DETR 46](https://github.com/IDEA-Research/DAB-DETR/issues/46)). {{chapter refinement}} runs it with and without.

# %%
old, correction = torch.tensor([0.02, 0.5, 0.98]), torch.tensor(1.0)
print("added after: ", [round(x, 2) for x in (old + correction).tolist()])
print(
    "added before:", [round(x, 2) for x in (inverse_sigmoid(old) + correction).sigmoid().tolist()]
)

# %% [markdown]
# ### Q29 Deformable convolution, Deformable DETR, DAT: what is the difference?
#
# All three read a map at learned places. They differ in who chooses the places, and what weighs the samples.
#
# | | places chosen by | one set per | weights | keys |
# |:--|:--|:--|:--|:--|
# | deformable convolution {cite}`dai2017deformable` | the map, at the output's pixel | pixel and tap | learned, the same everywhere (v2: times a number per place) | none |
# | Deformable DETR {cite}`zhu2021deformable` | the query | query, head and level | softmax of a linear layer on the query | none |
# | DAT {cite}`xia2022dat` | the map, by a small network | group of heads, for *all* queries | softmax of query times key | at the moved places |
#
# So in Deformable DETR each query looks where it wants to, which suits a detector whose queries look for different things. In DAT all
# queries of an image share their places, and so they can afford keys there, which suits a backbone. {{chapter deformable_convolution}},
# {{chapter deformable_attention}} and {{chapter dat}} build the three.
#
# ### Q30 How do I draw the sampling points?
#
# This has been asked again and again since 2021 ([109](https://github.com/fundamentalvision/Deformable-DETR/issues/109),
# [194](https://github.com/fundamentalvision/Deformable-DETR/issues/194),
# [249](https://github.com/fundamentalvision/Deformable-DETR/issues/249)). `deformable-detr explain IMAGE --output explained.html` draws
# them for the best detections, and {{chapter looking}} shows how it is done.

# %% [markdown]
# ## Summary
#
# - Many faults of training are faults of data: the format of boxes, the ids of classes. A falling loss does not exclude them.
# - Ask in this order: is the loss finite, does it fall on one batch, are classes and boxes of the matched queries right?
# - The operator needs neither a build of your own nor a GPU. Keep its locations in float32.
# - A learning rate belongs to a number of images per step.
# - No NMS, 100 detections, low scores, points outside: none of these is a bug.
#
# > **Differs from the paper.** The paper says nothing about most of these questions, because they concern its code.
# >
# > **Differs from the official code.** Labels are places in the list of categories instead of raw ids; a resumed run keeps
# > its own learning rate; a loss that is not finite ends the training and names the module.
#
# ## Further reading
#
# - {cite}`carion2020detr`, section 3 and the appendix: where matching and the set loss come from.
# - The threads that are linked above, above all [DETR 9](https://github.com/facebookresearch/detr/issues/9), the longest on
#   training with data of one's own.
# - {cite}`goyal2017onehour`: rates and batches, for SGD.
