"""Checkers of the book's exercises, importable in a notebook as `deformable_detr.exercises`.

A chapter's checkers stand in a module with the chapter's name, one generator per exercise:

    @checks("sampling.1")
    def check_blend(blend):
        yield "a corner gives back its own value"
        expect(blend(values, 0.0, 0.0), values[0, 0], hint="fx = 0 means: stay on the left")
        yield "x runs along the columns"
        ...

A `yield` names the check whose assertions follow it. The checks of an exercise are a ladder: the
first one that fails ends it, since a later one would only fail for the same reason.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Verdict", "check", "checks", "expect", "verdicts"]

Checker = Callable[..., Iterator[str]]
CHECKERS: dict[str, Checker] = {}
STUB = re.compile(r"\d+ lines?")


@dataclass(frozen=True)
class Verdict:
    """What one named check of an exercise found; `message` says why it failed."""

    name: str
    passed: bool
    message: str = ""

    def __str__(self) -> str:
        return f"passed: {self.name}" if self.passed else f"FAILED: {self.name} ({self.message})"


def checks(exercise: str) -> Callable[[Checker], Checker]:
    """Register the decorated generator as the checker of `exercise`, for example "sampling.1"."""

    def register(checker: Checker) -> Checker:
        if exercise in CHECKERS:
            raise ValueError(f"exercise {exercise} has two checkers")
        CHECKERS[exercise] = checker
        return checker

    return register


def expect(
    given: Any, expected: Any, hint: str = "", rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    """Assert that two numbers, tensors or plain values agree; `hint` names the likely mistake.

    Tensors, arrays and numbers must have the same shape and be equal within
    `atol + rtol * |expected|`, whatever their dtype; anything else must be equal.

    Raises:
        AssertionError: they differ. Its message says what was expected and what was given.
    """
    numbers = (int, float, np.number, np.bool_, np.ndarray, torch.Tensor)
    if not isinstance(expected, numbers):
        agree = bool(given == expected)
    elif not isinstance(given, numbers):
        raise AssertionError(_message(_show(expected), type(given).__name__, hint))
    else:
        left = torch.as_tensor(given).detach().double()
        right = torch.as_tensor(expected).detach().double()
        if left.shape != right.shape:
            shapes = (f"shape {tuple(tensor.shape)}" for tensor in (right, left))
            raise AssertionError(_message(*shapes, hint))
        agree = torch.allclose(left, right, rtol=rtol, atol=atol, equal_nan=True)
    if not agree:
        raise AssertionError(_message(_show(expected), _show(given), hint))


def verdicts(exercise: str, *answers: Any) -> list[Verdict]:
    """Run the checker of `exercise` on the reader's answers, up to the first check that fails.

    The checks run from a fixed random state, and the caller's random state is left as it was.

    Raises:
        KeyError: no checker has this name.
        NotImplementedError: the answer is still the stub.
    """
    importlib.import_module(f"{__name__}.{exercise.split('.')[0]}")
    found: list[Verdict] = []
    name = "it runs"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            for number, following in enumerate(CHECKERS[exercise](*answers)):
                if number:
                    found.append(Verdict(name, True))
                name = following
            found.append(Verdict(name, True))
        except AssertionError as error:
            found.append(Verdict(name, False, str(error) or "not so"))
        except Exception as error:
            if isinstance(error, NotImplementedError) and STUB.fullmatch(str(error)):
                raise
            reason = (str(error).splitlines() or [""])[0]
            found.append(Verdict(name, False, f"it raised {type(error).__name__}: {reason}"))
    return found


def check(exercise: str, *answers: Any) -> None:
    """Print what the checks of `exercise` say about the reader's answers; never raise for them."""
    try:
        print(f"Exercise {exercise}", *verdicts(exercise, *answers), sep="\n")
    except NotImplementedError:
        print(f"Exercise {exercise}: not written yet")


def _message(expected: str, given: str, hint: str) -> str:
    return f"expected {expected}, got {given}" + (f": {hint}" if hint else "")


def _show(value: Any) -> str:
    """A short text of a value: small tensors in full, large ones by shape and mean."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, np.number | np.ndarray):
        value = torch.as_tensor(value)
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() > 12:
        return f"a tensor {tuple(value.shape)} of mean {value.detach().double().mean():.5g}"
    return _rounded(value.detach().tolist())


def _rounded(nested: Any) -> str:
    if isinstance(nested, list):
        return "[" + ", ".join(map(_rounded, nested)) + "]"
    return f"{nested:.5g}" if isinstance(nested, float) else str(nested)
