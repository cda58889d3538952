"""What methods did to a model: counts, memory, and what was left off."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MethodReport:
    """One method.

    Args:
        method: with its settings.
        events: how often something happened, by the method's name for it; empty if it never engaged.
        hooked: sites at which it could act.
        left_off: sites that it never reached.
        kept: most bytes of tensors that it held after a model call.
    """

    method: str
    events: dict[str, int]
    hooked: int
    left_off: tuple[str, ...]
    kept: int


@dataclass(frozen=True)
class Report:
    """All methods of a handle.

    Args:
        model: class of the transformer.
        calls: model calls so far, every branch counted.
        runs: runs begun.
        methods: in the order in which they act, outermost first.
    """

    model: str
    calls: int
    runs: int
    methods: tuple[MethodReport, ...]

    def as_json(self) -> dict[str, Any]:
        """The report in json types."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.calls} calls in {self.runs} runs"]
        for one in self.methods:
            events = ", ".join(f"{name} {count}" for name, count in one.events.items()) or "never engaged"
            lines.append(f"  {one.method}: {events}; {one.hooked} sites hooked; kept {one.kept / 2**20:.1f} MiB")
            if one.left_off:
                shown = ", ".join(one.left_off[:3]) + (", ..." if len(one.left_off) > 3 else "")
                lines.append(f"    left off {len(one.left_off)}: {shown}")
        return "\n".join(lines)
