"""Where the emoji come from: captions of emojibase, drawings of five sets, each a pinned npm package.

The key of an emoji are its lower-case hexadecimal code points joined by `-`, without the presentation selector U+FE0F;
all sets agree on it. A *concept* is what remains of a key when gender, direction and skin tone are dropped: "woman
running" and "man running: facing right" are the concept of "person running". Near duplicates share a concept, so splits
are made by it.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from smalti.core.errors import UserError, unknown_name
from smalti.core.files import read_json
from smalti.data.packages import npm_package


@dataclass(frozen=True)
class Source:
    """A pinned package: npm name and version, licence (SPDX), author and home of what is taken from it."""

    package: str
    version: str
    licence: str
    author: str
    home: str

    def folder(self) -> Path:
        return npm_package(self.package, self.version)


@dataclass(frozen=True)
class Emoji:
    """One emoji without a drawing: its key, the concept it belongs to, and what emojibase says about it."""

    key: str
    concept: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


CAPTIONS = Source("emojibase-data", "17.0.0", "MIT", "Miles Johnson", "https://emojibase.dev")
NOTO = Source("emoji-datasource-google", "16.0.0", "Apache-2.0", "Google", "https://github.com/googlefonts/noto-emoji")
NOTO_VECTOR = Source("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google", "https://github.com/googlefonts/noto-emoji")
TWEMOJI = Source(
    "@discordapp/twemoji", "16.0.1", "CC-BY-4.0", "Twitter and contributors", "https://github.com/discord/twemoji"
)
FLUENT = Source("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft", "https://github.com/microsoft/fluentui-emoji")
FLUENT_FLAT = Source(
    "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft", "https://github.com/microsoft/fluentui-emoji"
)
OPENMOJI = Source("openmoji", "17.0.0", "CC-BY-SA-4.0", "OpenMoji contributors", "https://openmoji.org")

NEUTRAL = {
    **dict.fromkeys(("1f468", "1f469"), "1f9d1"),
    **dict.fromkeys(("1f466", "1f467"), "1f9d2"),
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),
}
SAME_DRAWING = {  # other keys that some set draws in the same way
    "1f1e7-1f1fb": "1f1f3-1f1f4",  # Bouvet Island, Svalbard: Norway
    "1f1f8-1f1ef": "1f1f3-1f1f4",
    "1f1ed-1f1f2": "1f1e6-1f1fa",  # Heard & McDonald Islands: Australia
    "1f1e8-1f1f5": "1f1eb-1f1f7",  # Clipperton Island, St. Martin: France
    "1f1f2-1f1eb": "1f1eb-1f1f7",
    "1f1e9-1f1ec": "1f1ee-1f1f4",  # Diego Garcia: British Indian Ocean Territory
    "1f1ea-1f1e6": "1f1ea-1f1f8",  # Ceuta & Melilla: Spain
    "1f1fa-1f1f2": "1f1fa-1f1f8",  # U.S. Outlying Islands: United States
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couples with heart, kisses
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "1f9d1-200d-1f91d-200d-1f9d1"),  # people holding hands
    "1f63a": "1f431",  # grinning cat: cat face
    "1f52f": "2721",  # dotted six-pointed star: star of David
    "26c4": "2603",  # snowman without snow: snowman
    "1f64e": "1f64d",  # pouting: frowning
}
FAMILY = re.compile(r"1f9d1(-200d-1f9d1)?(-200d-1f9d2)+")
MISDRAWN = {("noto", "1f1e8-1f1f6")}  # the package shows the flag of Saudi Arabia for Sark
COMPONENT = "component"  # emojibase's group of skin tones and hair styles, which are no pictures by themselves


def emoji_key(hexcode: str) -> str:
    """`2764-FE0F` -> `2764`."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def concept_of(key: str) -> str:
    """The concept of a key without skin tones: persons of any gender become the neutral one, directions are dropped."""
    key = re.sub(r"-200d-(2640|2642|27a1)", "", key)
    key = "-".join(NEUTRAL.get(part, part) for part in key.split("-"))
    return "1f46a" if FAMILY.fullmatch(key) else SAME_DRAWING.get(key, key)


def read_emoji(tones: bool = False) -> list[Emoji]:
    """Every captioned emoji in emojibase's order, without components and regional indicators.

    Args:
        tones: with the skin-tone variants too; a variant has the tags and the concept of its base.
    """
    folder = CAPTIONS.folder()
    names = read_json(folder / "meta" / "groups.json")
    found: list[tuple[int, Emoji]] = []
    for entry in read_json(folder / "en" / "data.json"):
        group = names["groups"].get(str(entry.get("group")))
        if group is None or group == COMPONENT:
            continue
        subgroup = names["subgroups"][str(entry["subgroup"])]
        concept, tags = concept_of(emoji_key(entry["hexcode"])), tuple(entry.get("tags", ()))
        for variant in [entry, *(entry.get("skins", ()) if tones else ())]:
            emoji = Emoji(emoji_key(variant["hexcode"]), concept, variant["label"], tags, group, subgroup)
            found.append((variant["order"], emoji))
    return [emoji for _, emoji in sorted(found, key=lambda pair: (pair[0], pair[1].key))]


def style_source(style: str, size: int) -> Source:
    """The package that a style is drawn from at this size; raises `UserError` for an unknown style."""
    if style not in _FINDERS:
        raise unknown_name("style", style, _FINDERS)
    if style == "noto" and size > 64:
        return NOTO_VECTOR
    return {"noto": NOTO, "twemoji": TWEMOJI, "fluent-3d": FLUENT, "fluent-flat": FLUENT_FLAT, "openmoji": OPENMOJI}[
        style
    ]


def find_drawings(style: str, size: int) -> dict[str, Path | str]:
    """All drawings of a style by emoji key: the path of a picture or SVG file, or SVG text."""
    source = style_source(style, size)
    found = _vectors(source) if source is NOTO_VECTOR else _FINDERS[style](source)
    return {key: drawing for key, drawing in found.items() if (style, key) not in MISDRAWN}


def rasterise(drawing: Path | str, size: int) -> np.ndarray:
    """Draws into the middle of a square; RGBA (size, size, 4) uint8."""
    if isinstance(drawing, str) or drawing.suffix == ".svg":
        picture = _render(drawing, size)
    else:
        with Image.open(drawing) as file:
            picture = file.convert("RGBA")
    scale = size / max(picture.size)
    if scale != 1:
        fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(fitted, Image.Resampling.LANCZOS)
    if picture.size != (size, size):
        square = Image.new("RGBA", (size, size))
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        picture = square
    return np.asarray(picture)


def _render(drawing: Path | str, size: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(
            "drawing SVG needs resvg-py, which is not installed; run: pip install 'smalti[data]'"
        ) from error
    text = drawing if isinstance(drawing, str) else drawing.read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _files(folder: str, pattern: str) -> Callable[[Source], dict[str, Path | str]]:
    """Finds drawings that are files named by their code points."""

    def find(source: Source) -> dict[str, Path | str]:
        return {emoji_key(path.stem): path for path in sorted((source.folder() / folder).glob(pattern))}

    return find


def _vectors(source: Source) -> dict[str, Path | str]:
    """Finds the SVG bodies of an icon set in json, whose `chars.json` names them by code points."""
    icons, names = (read_json(source.folder() / name) for name in ("icons.json", "chars.json"))
    return {emoji_key(code): _svg(icons, name) for code, name in sorted(names.items())}


def _svg(icons: dict, name: str) -> str:
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"][alias.get("parent", name)]
    left, top, width, height = (
        icon.get(field, icons.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{body}</svg>'


_FINDERS: dict[str, Callable[[Source], dict[str, Path | str]]] = {
    "noto": _files("img/google/64", "*.png"),
    "twemoji": _files("dist/svg", "*.svg"),
    "fluent-3d": _files("assets", "*.webp"),
    "fluent-flat": _vectors,
    "openmoji": _files("color/svg", "*.svg"),
}
