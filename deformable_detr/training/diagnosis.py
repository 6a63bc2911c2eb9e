"""What a self-test found, line by line, and its verdict. Chapter your_own_data."""

from collections import Counter
from dataclasses import dataclass, field

from deformable_detr.data.names import counted


@dataclass
class Finding:
    """One line of a diagnosis. level: "ok", "warning" or "fatal". count: of the faults it is on."""

    level: str
    text: str
    count: int = 1


@dataclass
class Diagnosis:
    """What `doctor` found. losses: of each step on the batch. ap: on the batch at the end.
    step_seconds: that one of its steps took."""

    findings: list[Finding] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    ap: float = float("nan")
    step_seconds: float = float("nan")

    @property
    def healthy(self) -> bool:
        """Whether nothing fatal was found."""
        return all(finding.level != "fatal" for finding in self.findings)

    def table(self) -> str:
        """All findings, a line each, and a verdict."""
        lines = [f"{finding.level:8} {finding.text}" for finding in self.findings]
        count: Counter = Counter()
        for finding in self.findings:
            count[finding.level] += finding.count
        verdict = "ready to train" if self.healthy else "do not train yet"
        return "\n".join(
            [*lines, f"{verdict}: {count['fatal']} fatal, {counted(count['warning'], 'warning')}"]
        )

    def add(self, bad: str, text: str, good: bool = False, count: int = 1) -> None:
        """A finding that is "ok" if good, else of the level `bad`, on so many faults."""
        self.findings.append(Finding("ok" if good else bad, text, count))
