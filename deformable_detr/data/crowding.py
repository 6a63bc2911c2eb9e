"""Images with more objects than a model, or COCO's metrics, can deal with.
Chapter your_own_data."""

from collections import Counter
from collections.abc import Iterator

from deformable_detr.data.names import printable

QUERIES = 300  # of Deformable DETR, where the model is not known
TOP_K = 100  # detections of an image that are kept, where nothing else is said
COCO_DETECTIONS = 100  # of a class in an image, that COCO's metrics count


def crowding(content: dict, num_queries: int = QUERIES, top_k: int = TOP_K) -> list[str]:
    """A sentence for each limit that some image of an annotation file's content exceeds, with
    numbers: the model's queries, the detections that are kept, and those that COCO counts.

    num_queries: `config.num_queries`, each of which finds an object. top_k: detections kept of an
    image.
    """
    return list(_sentences(content, num_queries, top_k))


def _sentences(content: dict, num_queries: int, top_k: int) -> Iterator[str]:
    objects, by_image, of_class = count_objects(content), Counter(), Counter()
    for (image_id, _), count in objects.items():
        by_image[image_id] += count
        of_class[image_id] = max(of_class[image_id], count)
    if above := _above(by_image, num_queries):
        text = f"more than the {num_queries} queries of the model (model.num_queries)"
        yield f"{above} objects, {text}: the rest cannot be found"
    elif above := _above(by_image, top_k):
        text = f"more than the {top_k} detections that are kept of an image (--top-k)"
        yield f"{above} objects, {text}: the rest are missed"
    if above := _above(of_class, COCO_DETECTIONS):
        yield (
            f"{above} objects of one class: COCO's metrics count {COCO_DETECTIONS} detections of a "
            f"class in an image, so that AP is {highest_ap(content):.3f} at most, even where all "
            "are found"
        )


def highest_ap(content: dict) -> float:
    """The AP of a detector that finds everything, of which COCO's metrics count COCO_DETECTIONS of
    each class in an image; NaN without objects."""
    all_of, counted = Counter(), Counter()
    for (_, category_id), count in count_objects(content).items():
        all_of[category_id] += count
        counted[category_id] += min(count, COCO_DETECTIONS)
    # precision is read at the recalls 0, 0.01 ... 1, as far as recall comes
    reached = [(100 * counted[key] // all_of[key] + 1) / 101 for key in all_of]
    return sum(reached) / len(reached) if reached else float("nan")


def count_objects(content: dict) -> Counter:
    """How many objects, crowds left out, there are by (image id, category id)."""
    return Counter(
        (a["image_id"], a["category_id"]) for a in content["annotations"] if not a.get("iscrowd")
    )


def _above(counts: Counter, limit: int) -> str:
    """The images that have more than that, as a sentence begins; "" for none."""
    if not (above := [key for key, count in counts.items() if count > limit]):
        return ""
    most = max(above, key=counts.get)
    if len(above) == 1:
        return f"image {printable(most)} has {counts[most]}"
    return (
        f"{len(above)} images, of which {printable(most)} is the fullest, have up to {counts[most]}"
    )
