"""A run's figures for TensorBoard: `tensorboard --logdir FOLDER` shows them. Chapter
training_at_every_size.

torch's SummaryWriter writes in a thread of its own, which on a full disk, or after Ctrl-C, prints a
traceback beside ours; a few figures for each step need none.
"""

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from deformable_detr.files import writing


class Board:
    """An event file in a folder. What earlier ones say of steps from first_step on no longer
    counts."""

    def __init__(self, folder: Path, first_step: int) -> None:
        place = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / f"events.out.tfevents.{place}"
        with writing(self.path):
            self.file = open(self.path, "xb", buffering=0)  # noqa: SIM115
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step, by name."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in figures.items()]
        self._write(step=step, summary=Summary(value=values))

    def close(self) -> None:
        """No more comes."""
        self.file.close()

    def _write(self, **content: object) -> None:
        with writing(self.path):
            event = Event(wall_time=time.time(), **content)
            self.records.write(event.SerializeToString())
