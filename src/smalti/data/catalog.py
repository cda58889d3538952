"""Which data sets can be had: what members of this stage offer in a `DATASETS` mapping (name -> `DatasetInfo`)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smalti.core.discovery import load_member, members
from smalti.core.errors import unknown_name


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that can be prepared on this machine.

    Args:
        name: what `smalti data get` is called with.
        summary: one line on what it holds.
        licence: SPDX names of the licences of its content.
        where: package manager and packages that it comes from.
        megabytes: size of the download.
        location: says where the prepared set lies or would lie.
        prepare: makes it, with a progress bar if asked, and returns its path.
    """

    name: str
    summary: str
    licence: str
    where: str
    megabytes: int
    location: Callable[[], Path]
    prepare: Callable[[bool], Path]

    @property
    def is_ready(self) -> bool:
        """Whether the set lies at its location."""
        return self.location().exists()

    def as_json(self) -> dict[str, str | int | bool]:
        """What `smalti data --json` prints."""
        return {
            "name": self.name,
            "summary": self.summary,
            "licence": self.licence,
            "where": self.where,
            "megabytes": self.megabytes,
            "ready": self.is_ready,
            "path": str(self.location()),
        }


def datasets() -> list[DatasetInfo]:
    """All data sets, by name."""
    offered = [getattr(load_member("data", name), "DATASETS", {}) for name in members("data")]
    return sorted((info for mapping in offered for info in mapping.values()), key=lambda info: info.name)


def get(name: str, progress: bool = False) -> Path:
    """Prepares a data set and returns its path.

    Raises:
        UserError: the name is unknown (the nearest are offered), or a download fails.
    """
    known = {info.name: info for info in datasets()}
    if name not in known:
        raise unknown_name("data set", name, known)
    return known[name].prepare(progress)
