"""deformable-detr check"""

import argparse

from deformable_detr.cli.arguments import DATA_HELP, add_command, add_data


def add(commands: argparse.Action) -> None:
    """Its arguments."""
    command = add_command(
        commands,
        "check",
        run,
        "list the faults of a data set, of annotations, images and splits, and count its objects",
        "data/digits",
        DATA_HELP,
        "Exit code 1 if a fault is fatal, that is, would stop or spoil a training.",
    )
    add_data(command)
    command.add_argument("--split", nargs="+", help="default: those of train, val, test it has")
    command.add_argument(
        "--all", action="store_true", help="list each fault, also where many are of one kind"
    )


def run(args: argparse.Namespace) -> int:
    """Print the faults of a data set, what it holds, and the boxes of each category."""
    from deformable_detr.data.places import all_splits, find_split
    from deformable_detr.data.split_checks import BETWEEN, check_data, missing_splits

    if args.split:
        splits = {split: find_split(args.data, split) for split in args.split}
    else:
        splits = all_splits(args.data)
    fatal = 0
    for split, faults in check_data(splits):
        if split == BETWEEN and not args.split:
            faults = [*missing_splits(args.data), *faults]
        fatal += print_faults(split, faults, args.all)
        if split in splits:
            print_content(split, *splits[split])
    return 1 if fatal else 0


def print_faults(split: str, faults: list, every: bool) -> int:
    """A line for each fault, or for each kind; the number of fatal ones."""
    from deformable_detr.data.faults import told
    from deformable_detr.data.names import counted

    for line in map(str, faults) if every else told(faults):
        print(f"{split}: {line}")
    fatal = sum(fault.fatal for fault in faults)
    print(f"{split}: {counted(len(faults), 'fault')}, {fatal} of them fatal")
    return fatal


def print_content(split: str, images_dir: object, annotation_file: object) -> None:
    """How many images, boxes and crowds a split has, and how many boxes of each category."""
    from deformable_detr.data.annotations import read_annotations
    from deformable_detr.data.checks import label_histogram, summary
    from deformable_detr.data.names import printable

    content = read_annotations(annotation_file)
    print(f"{split}: {summary(images_dir, content)}")
    counts = label_histogram(content).items()
    print(f"{split}: boxes: {', '.join(f'{n} {printable(name)}' for name, n in counts)}")
