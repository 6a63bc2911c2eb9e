"""Trials that take no time, for the tests of studies; processes import them by name."""

import json
import os
import signal
import time

from deformable_detr.training.faults import NonFiniteLossError


def describe(configuration):
    return {"what": configuration}


def trial(configuration, seed, folder):
    """Does as its configuration says, and leaves in its folder how often it was begun."""
    count = folder / "begun.json"
    begun = json.loads(count.read_text()) + 1 if count.exists() else 1
    count.write_text(str(begun))
    if configuration == "is killed once" and begun == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if configuration == "is always killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if configuration == "is not finite":
        raise NonFiniteLossError("the loss is not finite at step 3")
    if configuration == "fills the disk":
        raise OSError("cannot write checkpoint.pt: the disk is full")
    if configuration == "has a fault":
        raise KeyError("no such thing")
    if configuration == "takes long":
        time.sleep(600)
    value = {"split": "test", "at": 1, "metric": "ap", "value": 0.5 + seed / 10}
    return [value, value | {"metric": "begun", "value": begun}]
