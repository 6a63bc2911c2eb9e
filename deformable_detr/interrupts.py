"""Signals that end a program: a training that ends after its step, workers that leave that to the
main process, commands that end without a traceback. Chapter training_at_every_size."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

# of a terminal's Ctrl-C, of a scheduler that wants the machine back, of a connection that is lost
ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
TEMPORARY: set[str] = set()  # files that are being written, and are not to stay
ECHO = 1.0  # seconds: a terminal and a launcher may both pass the same Ctrl-C on


class Interrupted(KeyboardInterrupt):
    """A training was told to end, by the signal `number`; the checkpoint is written."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class CatchInterrupt:
    """While open, the first signal of ENDING is only noted, in `happened`, and said to be; a second
    one, more than ECHO seconds later, does what it did before.

    Signals that are ignored stay so, as SIGHUP under nohup. Outside the main thread, which alone
    gets signals, it does nothing.
    """

    def __enter__(self) -> "CatchInterrupt":
        self.happened = 0  # the signal's number
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in ENDING}
            self.previous = {n: h for n, h in before.items() if h not in (None, signal.SIG_IGN)}
        for number in self.previous:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: object) -> None:
        if not self.happened:
            self.happened, self.time = number, time.monotonic()
            with suppress(OSError):  # of a terminal that is lost
                os.write(2, b"\nends when this step is saved; a second signal ends at once\n")
        elif time.monotonic() - self.time > ECHO:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def ignore_interrupt(worker: int) -> None:
    """A DataLoader's worker_init_fn: the batch that the main process waits for must still come.

    A signal to a whole group of processes reaches the workers too. Of SIGTERM only the main
    process' own counts, by which Python ends workers that are left.
    """
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows do not say whose it is
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def end_at_once() -> None:
    """From now on Ctrl-C ends the program with one word and code 130, wherever it is: as an
    exception it would be printed by threads and destructors, and taken for other errors by what is
    just being imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_by_exception() -> None:
    """After `end_at_once`, Ctrl-C is a KeyboardInterrupt again: for what has something to write
    then."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, _: object) -> None:
    for path in list(TEMPORARY):
        with suppress(OSError):
            os.unlink(path)
    with suppress(Exception):  # it may have struck within another flush
        sys.stdout.flush()
    os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    os._exit(128 + number)
