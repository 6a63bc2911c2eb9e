"""Ctrl-C: a training that ends after its step, and workers that leave it to the main process."""

import signal
from contextlib import suppress


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; the checkpoint is written."""


class CatchInterrupt:
    """While open, the first Ctrl-C is only noted in `happened`; a second one interrupts as usual.

    Outside the main thread, which alone gets signals, it does nothing.
    """

    def __enter__(self) -> "CatchInterrupt":
        self.happened = False
        self.previous = None
        with suppress(ValueError):  # raised outside the main thread
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.happened = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


def ignore_interrupt(worker: int) -> None:
    """A DataLoader's worker_init_fn: the batch that the main process waits for must still come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
