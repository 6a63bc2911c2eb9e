"""What went wrong, as one line that a user can do something about. Chapter your_own_data."""

import sys

from deformable_detr.files import first_line

LESS = "fewer images at once (--batch-size) or smaller ones (--short-side) need less"
NO_MEMORY = "can't allocate memory", "out of memory"  # torch's, on a CPU and on a device


def one_line(error: Exception) -> str:
    """An error in one line; "" for one of the program itself."""
    text, runtime = inner_text(error), isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or (runtime and any(x in str(error) for x in NO_MEMORY)):
        return f"out of memory{': ' * bool(text)}{text}; {LESS}"
    if runtime and text.startswith("DataLoader worker"):
        return (
            f"a process that loads images has ended, as where memory runs out ({text}); fewer of "
            "them (--num-workers) need less"
        )
    if isinstance(error, (ValueError, OSError, *_ours())):
        return text or type(error).__name__
    return ""


def inner_text(error: Exception) -> str:
    """What an error says, in one line; one that came from a process which loads images brings that
    one's traceback along, of which the last line counts."""
    text = str(error).strip()
    if " in DataLoader worker process" in text and "\n" in text:
        return text.splitlines()[-1].partition(": ")[2]
    return first_line(error) if text else ""


def _ours() -> tuple[type, ...]:
    """Errors of ours that are neither ValueError nor OSError, if their files are imported."""
    places = (("ops.errors", "BackendError"), ("training.faults", "NonFiniteLossError"))
    modules = ((sys.modules.get(f"deformable_detr.{place}"), name) for place, name in places)
    return tuple(getattr(module, name) for module, name in modules if module)
