"""Persons as sets: one identity in several clothes and moods, and try-on triples, drawn by python-avatars.

An identity is skin, hair, its colour, facial hair and glasses; clothes and mood change from panel to panel. A triple is
the person without the garment, the garment alone, and the person who wears it: the middle panel of its SVG keeps the
group of the clothing alone. Avatars are drawn when they are asked for; a seed names a person on every machine.
"""

import io
import random
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.seeds import derive_seed
from smalti.data.emoji import on_white
from smalti.data.panels import PanelSet

HAIRS = (
    "BOB",
    "BUN",
    "CURLY",
    "DREADS",
    "FRO",
    "LONG_NOT_TOO_LONG",
    "SHORT_FLAT",
    "SHORT_WAVED",
    "STRAIGHT_1",
    "SHAVED_SIDES",
)
SKINS = ("LIGHT", "PALE", "TANNED", "BROWN", "DARK_BROWN", "BLACK")
HAIR_COLOURS = ("BLACK", "BROWN_DARK", "BLONDE", "RED", "PLATINUM")
GLASSES = ("NONE", "ROUND", "PRESCRIPTION_2")
CLOTHES = ("HOODIE", "SHIRT_CREW_NECK", "SHIRT_V_NECK", "OVERALL", "COLLAR_SWEATER")
CLOTH_COLOURS = {
    "RED": "red",
    "BLUE_01": "blue",
    "BLACK": "black",
    "WHITE": "white",
    "PASTEL_GREEN": "green",
    "PINK": "pink",
}
MOODS = {"SMILE": "smiling", "SAD": "sad", "SERIOUS": "serious", "TONGUE": "cheeky"}  # fmt: skip
NAMES = ("Leo", "Mia", "Ben", "Ana", "Tom", "Zoe", "Max", "Eva")
ONLY_CLOTHES = "transparent_Clothing"


def avatar_sets(count: int, panels: int = 2, size: int = 64, seed: int = 0) -> list[PanelSet]:
    """One person a set, in other clothes and another mood in every panel; captions call it `{who}`.

    Args:
        count: of the sets.
        panels: P, 2 to 4.
        size: of a panel in pixels.
        seed: of persons and clothes.

    Raises:
        UserError: an extra is not installed, or a number is out of range.
    """
    if count < 1 or not 2 <= panels <= 4:
        raise UserError(f"got {count} sets of {panels} panels; choose at least 1 set and 2 to 4 panels")
    found = []
    for number in range(count):
        draw = random.Random(derive_seed("avatar", seed, number))
        person, clothes, moods = _person(draw), draw.sample(CLOTHES, panels), draw.sample(sorted(MOODS), panels)
        colours = draw.sample(sorted(CLOTH_COLOURS), panels)
        pictures = [
            _render(person | _worn(cloth, colour) | {"mouth": ("MouthType", mood)}, size)
            for cloth, colour, mood in zip(clothes, colours, moods)
        ]
        captions = tuple(
            f"{{who}} {MOODS[mood]} in a {CLOTH_COLOURS[colour]} {_words(cloth)}"
            for cloth, colour, mood in zip(clothes, colours, moods)
        )
        found.append(PanelSet(torch.cat(pictures), captions, (_identity(person),) * panels, _look(person)))
    return found


def try_on_sets(count: int, size: int = 64, seed: int = 0) -> list[PanelSet]:
    """Triples of a person, a garment, and the person in it; identities and garments as in `avatar_sets`."""
    found = []
    for number in range(count):
        draw = random.Random(derive_seed("try-on", seed, number))
        person, cloth, colour = _person(draw), draw.choice(CLOTHES), draw.choice(sorted(CLOTH_COLOURS))
        worn = person | _worn(cloth, colour)
        pictures = [
            _render(person | {"clothing": ("ClothingType", "NONE")}, size),
            _render(worn, size, keep=ONLY_CLOTHES),
            _render(worn, size),
        ]
        garment = f"a {CLOTH_COLOURS[colour]} {_words(cloth)}"
        captions = ("{who}", garment, f"{{who}} in {garment}")
        found.append(PanelSet(torch.cat(pictures), captions, (_identity(person),) * 3, _look(person)))
    return found


def name_of(one: PanelSet) -> str:
    """A first name for the person of a set, always the same for the same identity."""
    return NAMES[derive_seed("name", one.shared[0]) % len(NAMES)]


def _person(draw: random.Random) -> dict[str, tuple[str, str]]:
    return {
        "top": ("HairType", draw.choice(HAIRS)),
        "skin_color": ("SkinColor", draw.choice(SKINS)),
        "hair_color": ("HairColor", draw.choice(HAIR_COLOURS)),
        "accessory": ("AccessoryType", draw.choice(GLASSES)),
        "facial_hair": ("FacialHairType", draw.choice(("NONE", "NONE", "BEARD_LIGHT"))),
    }


def _worn(cloth: str, colour: str) -> dict[str, tuple[str, str]]:
    return {"clothing": ("ClothingType", cloth), "clothing_color": ("ClothingColor", colour)}


def _identity(person: dict[str, tuple[str, str]]) -> str:
    return " ".join(value for _, value in person.values())


def _look(person: dict[str, tuple[str, str]]) -> str:
    return f"{_words(person['hair_color'][1])} {_words(person['top'][1])} hair"


def _words(name: str) -> str:
    return re.sub(r"_\d+$", "", name).replace("_", " ").lower()


def _render(attributes: dict[str, tuple[str, str]], size: int, keep: str | None = None) -> Tensor:
    """One picture (1, 3, S, S) on white."""
    try:
        import python_avatars
        import resvg_py
    except ImportError as error:
        raise UserError("avatars need an extra; run: pip install 'smalti[data]'") from error
    library: Any = python_avatars
    # The library draws what is not given at random: everything is given.
    plain = {
        "style": ("AvatarStyle", "TRANSPARENT"), "eyes": ("EyeType", "DEFAULT"), "eyebrows": ("EyebrowType", "DEFAULT"),
        "nose": ("NoseType", "DEFAULT"), "mouth": ("MouthType", "SMILE"), "shirt_graphic": ("ClothingGraphic", "BAT"),
        "clothing": ("ClothingType", "HOODIE"), "clothing_color": ("ClothingColor", "BLACK"),
    }  # fmt: skip
    given = {key: getattr(getattr(library, kind), value) for key, (kind, value) in (plain | attributes).items()}
    svg = library.Avatar(**given).render()
    if keep is not None:
        svg = _only(svg, keep)
    png = resvg_py.svg_to_bytes(svg_string=svg, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as file:
        picture = file.convert("RGBA")
    square = Image.new("RGBA", (size, size))
    square.paste(picture, ((size - picture.width) // 2, size - picture.height))
    return on_white(torch.from_numpy(np.asarray(square).copy())[None])


def _only(svg: str, group: str) -> str:
    """The SVG with this group, what holds it, and definitions alone."""
    from xml.etree import ElementTree

    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)

    def prune(node: ElementTree.Element) -> bool:
        """Whether the node is kept."""
        if node.get("id") == group or node.tag.rpartition("}")[2] in ("defs", "mask"):
            return True
        kept = [child for child in node if prune(child)]
        has_group = any(child.tag.rpartition("}")[2] not in ("defs", "mask") for child in kept)
        for child in list(node):
            if child not in kept:
                node.remove(child)
        return has_group

    prune(root)
    return ElementTree.tostring(root, encoding="unicode")
