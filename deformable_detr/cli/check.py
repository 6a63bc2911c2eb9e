"""deformable-detr check"""

import argparse

from deformable_detr.cli.arguments import DATA_HELP, add_command, add_data


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "check",
        run,
        "list every fault of a data set, by annotation, and count its objects",
        "data/digits",
        DATA_HELP,
        "Exit code 1 if a fault is fatal, that is, would stop or spoil a training.",
    )
    add_data(command)
    command.add_argument("--split", nargs="+", help="default: those of train, val, test it has")


def run(args: argparse.Namespace) -> int:
    """Print all faults of a data set, what it holds, and the boxes of each category."""
    from deformable_detr.data.annotations import read_annotations
    from deformable_detr.data.checks import check_dataset, check_splits, label_histogram, summary
    from deformable_detr.data.coco import find_split, has_split

    splits = args.split or [s for s in ("train", "val", "test") if has_split(args.data, s)]
    if not splits:
        find_split(args.data, "train")  # says what was expected
    places = {split: find_split(args.data, split) for split in splits}
    fatal = 0
    for split, place in places.items():
        faults = check_dataset(*place)
        for fault in faults:
            print(f"{split}: {fault}")
        fatal += sum(fault.fatal for fault in faults)
        print(f"{split}: {len(faults)} faults, {sum(f.fatal for f in faults)} of them fatal")
        content = read_annotations(place[1])
        print(f"{split}: {summary(place[0], content)}")
        counts = label_histogram(content)
        print(f"{split}: boxes: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    for fault in check_splits(places):
        print(fault)
    return 1 if fatal else 0
