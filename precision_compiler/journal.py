"""What each pass did, to what and why. Reports read only this and the plan."""

from dataclasses import dataclass, field

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid")
"""Records read from files have no unknown keys."""


@dataclass(frozen=True)
class JournalEntry:
    """One line of the journal.

    Attributes:
        step: name of the pass, or of the stage outside any pass.
        message: a sentence for people.
        seconds: wall-clock time the step took, 0 for a remark inside a step.
        nodes_before: nodes of the graph before the step.
        nodes_after: nodes of the graph after the step.
    """

    __pydantic_config__ = STRICT

    step: str
    message: str
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0


@dataclass
class Journal:
    """The growing list of entries of one compilation."""

    entries: list[JournalEntry] = field(default_factory=list)

    def note(self, step: str, message: str) -> None:
        """Add a remark of ``step``."""
        self.entries.append(JournalEntry(step, message))

    def add(self, entry: JournalEntry) -> None:
        """Add a finished entry."""
        self.entries.append(entry)

    def copy(self) -> "Journal":
        """A journal with the same entries, to be continued apart."""
        return Journal(list(self.entries))
