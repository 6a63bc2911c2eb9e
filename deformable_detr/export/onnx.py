"""A detector as an ONNX file, which is compared with PyTorch before it is there."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from deformable_detr.export.check import TOLERANCE, Check, check_file
from deformable_detr.export.graph import INPUTS, DetectorGraph
from deformable_detr.export.program import DYNAMIC, make_graph, to_program
from deformable_detr.files import first_line, write_atomically
from deformable_detr.inference.detector import Detector
from deformable_detr.models import BaseDetector

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def to_onnx(
    detector: Detector | BaseDetector,
    path: Path | str,
    size: tuple[int, int] = (480, 640),
    dynamic: bool = True,
    top_k: int | None = None,
    on_step: Callable[[str], object] = lambda line: None,
) -> list[Check]:
    """Write a detector as an ONNX file that takes pixels, and say how far it is from PyTorch.

    Inputs and outputs are those of `graph.DetectorGraph`; with top_k there are detections among
    them. size: (height, width) of the images; dynamic: the file takes any batch and any size, else
    one image of this size. What a `Detector` knows besides (categories, threshold, short side) is
    in the file's metadata, as JSON. Before the file is put in place onnxruntime runs it, at other
    batches and sizes too where it is dynamic. Returns what came of that. on_step is called with a
    line before each of three steps, which take minutes. Raises ImportError without onnx, onnxscript
    and onnxruntime; ValueError, in one line, where the model cannot be exported, or where the file
    gives other numbers.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}: pip install 'deformable-detr[export]'"
        )
    model = detector.model if isinstance(detector, Detector) else detector
    graph = make_graph(model, top_k)
    on_step("1 of 3: the model as a program of torch.export")
    program = to_program(graph, size, dynamic)
    on_step("2 of 3: the program in ONNX's words")
    onnx_program = translate(program, graph, dynamic)
    onnx_program.model.metadata_props.update(describe(detector))
    checks: list[Check] = []

    def write(temporary: str) -> None:
        onnx_program.save(temporary)
        on_step("3 of 3: onnxruntime compared with PyTorch")
        checks.extend(check_file(temporary, graph, size, dynamic))
        wrong = [check for check in checks if not check.difference <= TOLERANCE]
        if wrong:
            raise ValueError(f"no file is written, it would be wrong; {wrong[0]}")

    write_atomically(path, write)
    return checks


def translate(program: ExportedProgram, graph: DetectorGraph, dynamic: bool) -> "ONNXProgram":
    """The program in ONNX's words; ValueError where it has none for an operation."""
    try:
        with quiet():
            return torch.onnx.export(
                program,
                input_names=INPUTS,
                output_names=graph.outputs,
                dynamic_shapes=DYNAMIC if dynamic else None,
                verbose=False,
            )
    except Exception as error:
        while error.__cause__:  # the exporter's own text is on how to report it
            error = error.__cause__
        raise ValueError(f"ONNX does not take this model: {first_line(error)}") from error


def describe(detector: Detector | BaseDetector) -> dict[str, str]:
    """What the file says of itself, as JSON by name."""
    model = detector.model if isinstance(detector, Detector) else detector
    facts: dict[str, object] = {"model": type(model).__name__}
    if isinstance(detector, Detector):
        facts |= {name: value for name, value in vars(detector).items() if name != "model"}
    return {name: json.dumps(value) for name, value in facts.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on its own inner works."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
