"""One caption for a set of pictures on one canvas.

    [PREFIX] [LEFT] what the left panel shows [RIGHT] what the right one shows, summary

The prefix names the task, a marker begins every panel, and whoever appears in several panels has a name in angle
brackets, so that the same words stand wherever the same identity does. Markers come first and panels share what the
text encoder can read evenly: a long panel loses its last words, never the marker of the next one. Training and use
must build their captions with the same captioner.

Source: In-Context LoRA (arXiv 2410.23775), section 3.2 and the prompts of its figures; there the summary stands before
the panels, here behind them, because our encoders cut at the end.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from smalti.core.errors import UserError
from smalti.ops.canvas import PanelLayout

SIDES = {
    (1, 2): ("[LEFT]", "[RIGHT]"),
    (2, 1): ("[TOP]", "[BOTTOM]"),
    (2, 2): ("[TOP-LEFT]", "[TOP-RIGHT]", "[BOTTOM-LEFT]", "[BOTTOM-RIGHT]"),
}
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class JointCaptioner:
    """Builds captions of sets.

    Args:
        markers: one a panel, in order.
        prefix: of the task; "" = none.
        length: tokens that the text encoder can read, its special ones left out; None = no limit.
        count: tokens of a text.

    Raises:
        UserError: two markers are equal, or markers and prefix alone are too long.

    Example:
        >>> joint = JointCaptioner.for_layout(PanelLayout(1, 2), "[PAIR]")
        >>> joint(["{who} reads", "{who} sleeps"], summary="one day", names={"who": "Leo"})
        '[PAIR] [LEFT] <Leo> reads [RIGHT] <Leo> sleeps, one day'
    """

    markers: tuple[str, ...]
    prefix: str = ""
    length: int | None = None
    count: Callable[[str], int] = lambda text: len(text.split())

    def __post_init__(self):
        if len(set(self.markers)) < len(self.markers):
            raise UserError(f"got the markers {' '.join(self.markers)}; every panel needs one of its own")
        if self.length is not None and self._frame() + len(self.markers) > self.length:
            raise UserError(
                f"the prefix and {len(self.markers)} markers take {self._frame()} of {self.length} tokens; "
                "raise the text length, or choose shorter markers"
            )

    @classmethod
    def for_layout(
        cls, layout: PanelLayout, prefix: str = "", scenes: bool = False, length: int | None = None,
        count: Callable[[str], int] | None = None,
    ) -> Self:  # fmt: skip
        """Markers by place ([LEFT], [TOP-RIGHT], ...), or by number ([SCENE-1], ...) for scenes and other layouts."""
        sides = None if scenes else SIDES.get((layout.rows, layout.columns))
        markers = sides or tuple(f"[SCENE-{panel + 1}]" for panel in range(layout.count))
        return cls(markers, prefix, length) if count is None else cls(markers, prefix, length, count)

    def __call__(self, captions: Sequence[str], summary: str = "", names: Mapping[str, str] | None = None) -> str:
        """The caption of a set.

        Args:
            captions: one a panel; `{who}` in one of them stands for a name.
            summary: of the whole set; the first to be cut.
            names: by placeholder, without brackets.

        Raises:
            UserError: the number of captions does not fit, a placeholder has no name, or a name is used nowhere.
        """
        if len(captions) != len(self.markers):
            raise UserError(f"got {len(captions)} captions for {len(self.markers)} panels; give one for each")
        panels = _named(captions, names or {})
        if self.length is not None:
            panels = self._share(panels, self.length - self._frame())
        text = " ".join(filter(None, [self.prefix, *(f"{m} {p}" for m, p in zip(self.markers, panels, strict=True))]))
        if summary and self.length is not None:
            summary = self._cut(f", {summary}", self.length - self.count(text)).removeprefix(",").strip()
        return f"{text}, {summary}" if summary else text

    def _frame(self) -> int:
        """Tokens of prefix and markers."""
        return self.count(" ".join(filter(None, [self.prefix, *self.markers])))

    def _share(self, panels: list[str], budget: int) -> list[str]:
        """Panels within a budget of tokens: what short ones leave goes to the long ones."""
        order = sorted(range(len(panels)), key=lambda panel: self.count(panels[panel]))
        left = list(panels)
        for done, panel in enumerate(order):
            left[panel] = self._cut(panels[panel], budget // (len(panels) - done))
            budget -= self.count(left[panel])
        return left

    def _cut(self, text: str, budget: int) -> str:
        """The first words that fit."""
        words = text.split()
        while words and self.count(" ".join(words)) > budget:
            words.pop()
        return " ".join(words).rstrip(",;")


def _named(captions: Sequence[str], names: Mapping[str, str]) -> list[str]:
    used = {found for one in captions for found in PLACEHOLDER.findall(one)}
    for missing in sorted(used - set(names)):
        raise UserError(f"a caption speaks of {{{missing}}}, who has no name; give names={{{missing!r}: NAME}}")
    for idle in sorted(set(names) - used):
        raise UserError(f"the name {names[idle]!r} stands in no caption; write {{{idle}}} in every panel that shows it")
    return [PLACEHOLDER.sub(lambda found: f"<{names[found[1]]}>", one) for one in captions]


def describe_request(captioner: JointCaptioner) -> str:
    """What to ask a vision-language model, beside the canvas, for a caption in this form."""
    form = " ".join(filter(None, [captioner.prefix, *(f"{marker} ..." for marker in captioner.markers)]))
    return (
        f"This picture holds {len(captioner.markers)} panels. Describe each in one short clause and the whole in one "
        f"more, exactly in this form: {form}, summary. Give everybody who appears in several panels a first name in "
        "angle brackets, such as <Leo>, and use it in every panel in which they appear."
    )
