"""The squares that every heat map is made of: colours by value, numbers on them, names beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from treelora_cli.report.ramp import STEPS, level
from treelora_cli.report.svg import element, shorten, text_width
from treelora_cli.report.words import NOT_MEASURED

HEAD = 40
"""Pixels above the first row, for the numbers of the columns."""
LEGEND = 46
"""Pixels below the last row, for the legend."""

_NAME = 124.0


@dataclass(frozen=True, slots=True)
class Size:
    """Pixels of one square and of the names before it, and the digits that fit behind the point."""

    width: int
    height: int
    digits: int
    label: float


def label_width(names: Sequence[str]) -> float:
    """Pixels that the longest of the names takes, with a number behind it."""
    return max(74.0, 32 + max(text_width(shorten(name, _NAME)) for name in names))


def row_label(name: str, y: float, size: Size, number: int | None = None) -> Markup:
    """The name of a row whose squares begin at ``y``, and the number of its task."""
    parts: list[str] = [element("title", name), shorten(name, _NAME)]
    if number is not None:
        parts.append(element("tspan", f" {number}", class_="head"))
    middle = y + size.height / 2 + 4
    return element("text", *parts, x=size.label - 10, y=middle, class_="label end")


def column_head(name: str, number: int, x: float, size: Size) -> Markup:
    """The number of a column's task above the squares that begin at ``x``."""
    head = (element("title", name), str(number))
    return element("text", *head, x=x + size.width / 2, y=HEAD - 8, class_="head mid")


def square(x: float, y: float, size: Size, text: str, tip: str, value: float) -> Markup:
    """A square with a number in it.

    Args:
        x: its left edge.
        y: its upper edge.
        size: of the picture's squares.
        text: the number as printed.
        tip: what is shown where a reader points at it.
        value: decides the colour, from 0 to 1.
    """
    step = level(value)
    small = "small " if size.width < 28 else ""
    box = element("rect", **_inside(x, y, size), class_=f"h{step}")
    ink = _ink(text, x, y, size, f"{small}cell mid i{step}")
    return element("g", element("title", tip), box, ink)


def hole(x: float, y: float, size: Size, tip: str) -> Markup:
    """A square whose number is wanted and missing."""
    box = element("rect", **_inside(x, y, size), class_="hole")
    return element("g", element("title", tip), box, _ink(NOT_MEASURED, x, y, size, "muted mid"))


def dot(x: float, y: float, size: Size) -> Markup:
    """A square that stays empty."""
    return element("circle", cx=x + size.width / 2, cy=y + size.height / 2, r=1.2, class_="dot")


def frame(x: float, y: float, size: Size) -> Markup:
    """A frame around a square; painted last, so that no neighbour paints over it."""
    place = {"x": x, "y": y, "width": size.width, "height": size.height, "rx": 4}
    return element("rect", **place, class_="frame")


def legend(x: float, y: float, low: str = "0", high: str = "100") -> Markup:
    """The ramp of colours with what its ends stand for."""
    width = 6
    swatches = [
        element("rect", x=x + step * width, y=y, width=width, height=8, class_=f"crisp h{step}")
        for step in range(STEPS + 1)
    ]
    end = x + (STEPS + 1) * width
    return element(
        "g",
        element("text", low, x=x - 8, y=y + 9, class_="axis end"),
        *swatches,
        element("text", high, x=end + 6, y=y + 9, class_="axis"),
    )


def _inside(x: float, y: float, size: Size) -> dict[str, float]:
    return {"x": x + 1, "y": y + 1, "width": size.width - 2, "height": size.height - 2, "rx": 3}


def _ink(text: str, x: float, y: float, size: Size, class_: str) -> Markup:
    return element("text", text, x=x + size.width / 2, y=y + size.height / 2 + 4, class_=class_)
