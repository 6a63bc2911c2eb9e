"""Studies: tables of configurations and seeds, whose trials run side by side, resume and are marked
where they die.

    python experiments/study.py                      # all of them; takes long, says how long
    python experiments/study.py convergence members  # these; a trial that both need runs once

A trial is one configuration with one seed. It has a process and a folder of its own in
runs/studies/; what is there is not run again. Each study becomes data/results/NAME.csv, a row for
each measured value, and NAME.json, which says how it was made and what is missing.
"""

import argparse
import csv
import dataclasses
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from deformable_detr.evaluation.intervals import interval, verdict
from deformable_detr.files import first_line, write_atomically, write_json
from deformable_detr.interrupts import Interrupted
from deformable_detr.provenance import provenance
from deformable_detr.training.faults import NonFiniteLossError
from deformable_detr.training.lock import locked

ROOT = Path(__file__).parents[1]
RUNS, RESULTS = ROOT / "runs" / "studies", ROOT / "data" / "results"
HERE = Path(__file__).parent
STUDIES = tuple(p.stem for p in sorted(HERE.glob("*.py")) if "\nSTUDY = Study(" in p.read_text())
COLUMNS = ("configuration", "seed", "status", "split", "at", "metric", "value")
DONE, BUSY, STOPPED = "done", "in use", "unfinished"
CODES = {0: DONE, 3: "not finite", 4: "disk full", 5: BUSY, 6: STOPPED}

Row = dict[str, object]  # split, at (the step, or what else a trial varies), metric, value
Trial = Callable[[object, int, Path], list[Row]]


@dataclass(frozen=True)
class Study:
    """A question, and the trials that answer it.

    configurations: by name, what `trial` is given beside a seed and a folder; what `describe` makes
    of one decides which trials are the same. trial: returns the rows of a finished one; it may
    leave in its folder what it resumes from. usual: what one takes, about, in seconds of a core;
    seconds: of configurations that take another time. headline: split and metric by which each
    configuration is compared with the first. data: what trials read. runs: their folders'.
    """

    name: str
    question: str
    configurations: dict[str, object]
    seeds: tuple[int, ...]
    trial: Trial
    usual: float
    seconds: dict[str, float] = field(default_factory=dict)
    describe: Callable[[object], dict] = dataclasses.asdict
    headline: tuple[str, str] | None = None
    data: Path | None = None
    runs: Path = RUNS

    def trials(self) -> Iterator["Place"]:
        """All of them, seed by seed, so that each configuration has some repeats early."""
        for seed in self.seeds:
            for name in self.configurations:
                yield Place(self, name, seed)


@dataclass(frozen=True)
class Place:
    """A trial of a study, and its folder."""

    study: Study
    name: str
    seed: int

    @property
    def folder(self) -> Path:
        """The same for the same trial of another study."""
        described = self.study.describe(self.study.configurations[self.name])
        text = json.dumps([self.study.trial.__qualname__, described], sort_keys=True)
        return self.study.runs / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-{self.seed}"

    def status(self) -> str:
        """done, how it died, unfinished or missing."""
        if (self.folder / "done.json").exists():
            return DONE
        with suppress(FileNotFoundError):
            return json.loads((self.folder / "died.json").read_text())["status"]
        return STOPPED if self.folder.exists() else "missing"

    def result(self) -> dict:
        """Of a finished trial: its rows, and the seconds of a core that it took."""
        return json.loads((self.folder / "done.json").read_text())

    def seconds(self) -> float:
        """What the trial takes, as others of its configuration took, or as the study says."""
        for seed in self.study.seeds:
            with suppress(FileNotFoundError):
                return Place(self.study, self.name, seed).result()["cpu_seconds"]
        return self.study.seconds.get(self.name, self.study.usual)


def row(split: str, at: int | str, metric: str, value: float | None) -> Row:
    """A row of a study's table, to four decimals; a value that is None has none."""
    value = round(value, 4) if isinstance(value, float) else value
    return {"split": split, "at": at, "metric": metric, "value": value}


def run_studies(studies: list[Study], jobs: int) -> bool:
    """Run what is missing, `jobs` trials side by side, and write the tables after each; whether all
    trials are done. A trial that died is tried again, but for one whose numbers were not finite,
    which would be the same."""
    places = sorted((p for s in studies for p in s.trials()), key=lambda place: place.seed)
    left = {p.folder: p for p in places if p.status() not in (DONE, "not finite")}
    waiting, running = list(left.values()), {}
    print(forecast(len(places), waiting, jobs), flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                place = waiting.pop(0)
                print(f"{place.study.name}: {place.name}, seed {place.seed}", flush=True)
                running[start(place)] = place
            wait([process.sentinel for process in running])
            for process in [p for p in running if not p.is_alive()]:
                finish(running.pop(process), process.exitcode)
                write_tables(studies)
    except KeyboardInterrupt:
        for process in running:  # those of a terminal have had Ctrl-C themselves
            process.terminate()
        for process in running:
            process.join()
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        write_tables(studies)
    return all(place.status() == DONE for place in places)


def forecast(total: int, waiting: list[Place], jobs: int) -> str:
    """How many trials are to run, and how long that takes."""
    seconds = sum(place.seconds() for place in waiting)
    return (
        f"{len(waiting)} of {total} trials to run, about {seconds / 60:.0f} minutes of a core, "
        f"{seconds / 60 / jobs:.0f} with {jobs} side by side"
    )


def start(place: Place) -> BaseProcess:
    """A process for the trial, which finds the study by its module's name."""
    process = multiprocessing.get_context("spawn").Process(target=attempt, args=(place,))
    process.start()
    return process


def attempt(place: Place) -> None:
    """What a trial's process does; its exit code is one of CODES, or 1 for any other error."""
    folder, began = place.folder, time.process_time()
    torch.set_num_threads(1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".trial"):  # a training in it has a lock of its own
            if (folder / "done.json").exists():
                return
            rows = place.study.trial(place.study.configurations[place.name], place.seed, folder)
            spent = next((r["value"] for r in rows if r["metric"] == "cpu_seconds_in_all"), None)
            spent = time.process_time() - began if spent is None else spent
            write_json(folder / "done.json", {"cpu_seconds": round(spent, 1), "rows": rows})
    except Interrupted:
        sys.exit(6)
    except Exception as error:
        code = code_of(error)
        if code == 1:
            traceback.print_exc()
        else:
            print(first_line(error), file=sys.stderr)
        sys.exit(code)


def code_of(error: Exception) -> int:
    """The exit code of a trial that ended with this error."""
    if isinstance(error, NonFiniteLossError):
        return 3
    if isinstance(error, OSError) and "disk is full" in str(error):
        return 4
    return 5 if isinstance(error, ValueError) and "is in use by" in first_line(error) else 1


def finish(place: Place, code: int) -> None:
    """Mark how a trial's process ended, but where another process has it or it was told to stop."""
    status = CODES.get(code, f"killed by signal {-code}" if code < 0 else "failed")
    mark = place.folder / "died.json"
    if status == DONE:
        mark.unlink(missing_ok=True)
    elif status not in (BUSY, STOPPED):
        with suppress(OSError):  # of the full disk: then it counts as unfinished
            write_json(mark, {"status": status})
    if status != DONE:
        print(f"{place.study.name}: {place.name}, seed {place.seed}: {status}", file=sys.stderr)


def write_tables(studies: list[Study]) -> None:
    """NAME.csv and NAME.json of each study, as far as it has come; but not over those of more
    finished trials, whose folders are somewhere else."""
    for study in studies:
        found = about(study)
        if finished(stored(study, found)) > finished(found):
            continue
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows_of(study))
        content = text.getvalue()
        write_atomically(
            RESULTS / f"{study.name}.csv", lambda path, text=content: Path(path).write_text(text)
        )
        write_json(RESULTS / f"{study.name}.json", found)


def stored(study: Study, like: dict) -> dict:
    """What NAME.json says of the same trials; nothing where there is none."""
    like = json.loads(json.dumps(like))
    with suppress(FileNotFoundError):
        content = json.loads((RESULTS / f"{study.name}.json").read_text())
        if all(content[key] == like[key] for key in ("configurations", "seeds")):
            return content
    return {}


def finished(content: dict) -> int:
    """How many trials a NAME.json has."""
    return content["trials"] - len(content["missing"]) if content else 0


def rows_of(study: Study) -> Iterator[Row]:
    """A row for each value of each finished trial, and one for each other trial, with its status;
    no trial is without a row."""
    for name in study.configurations:
        for seed in study.seeds:
            place = Place(study, name, seed)
            first = {"configuration": name, "seed": seed, "status": place.status()}
            rows = place.result()["rows"] if first["status"] == DONE else [{}]
            yield from (first | row for row in rows)


def about(study: Study) -> dict:
    """How a study was made, and what of it is missing."""
    places = list(study.trials())
    compared = {"compared": compare(study)} if study.headline else {}
    missing = [place for place in places if place.status() != DONE]
    packages = ("torchvision", "numpy", "scipy", "pycocotools")
    command = f"python experiments/study.py {study.name}"
    return (
        provenance(command, packages, data=study.data)
        | compared
        | {
            "question": study.question,
            "configurations": {n: study.describe(c) for n, c in study.configurations.items()},
            "seeds": list(study.seeds),
            "trials": len(places),
            "finished": not missing,
            "cpu_minutes": round(
                sum(p.result()["cpu_seconds"] for p in places if p.status() == DONE) / 60, 1
            ),
            "missing": [f"{p.name}, seed {p.seed}: {p.status()}" for p in missing],
            "missing_cpu_minutes": round(sum(place.seconds() for place in missing) / 60),
        }
    )


def compare(study: Study) -> dict[str, dict]:
    """The headline of each configuration at the end of its trials, with its 95 % interval, and what
    its difference from the first configuration allows to say; of those with two repeats or more."""
    values: dict[str, list[float]] = {}
    for each in study.trials():
        if each.status() == DONE:
            rows = [r for r in each.result()["rows"] if (r["split"], r["metric"]) == study.headline]
            last = max(rows, key=lambda row: row["at"])
            values.setdefault(each.name, []).append(last["value"])
    first = next(iter(study.configurations), None)
    found = {}
    for name, repeats in values.items():
        if len(repeats) > 1:
            found[name] = {k: round(v, 4) for k, v in vars(interval(repeats)).items()}
            if name != first and len(values.get(first, [])) > 1:
                found[name]["against the first"] = verdict(repeats, values[first])
    return found


def load_study(name: str) -> Study:
    """The STUDY of experiments/NAME.py."""
    return importlib.import_module(name).STUDY


def main(names: tuple[str, ...] = STUDIES) -> None:
    """The command, for these studies unless others are named."""
    parser = argparse.ArgumentParser(description="run studies, or what is missing of them")
    parser.add_argument("names", nargs="*", default=names, help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials side by side")
    args = parser.parse_args()
    if unknown := set(args.names) - set(STUDIES):
        parser.error(f"no study {min(unknown)}; there are {', '.join(STUDIES)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the trials' processes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        whole = run_studies([load_study(name) for name in args.names], args.jobs)
    except OSError as error:  # a table that cannot be written
        raise SystemExit(first_line(error)) from None
    raise SystemExit(not whole)


if __name__ == "__main__":
    importlib.import_module("study").main()  # under the name by which studies import it
