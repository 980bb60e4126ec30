"""Small pieces that every inline picture is made of; all text is escaped on the way in."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass

from markupsafe import Markup, escape

Attribute = str | float | int | None


def element(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """Return one SVG element.

    Args:
        tag: the element's name.
        children: text, which is escaped, or elements, which are not escaped again.
        attributes: ``class_`` is written ``class``, ``stroke_width`` ``stroke-width``; None is
            left out; numbers are rounded to hundredths of a pixel.
    """
    pairs = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _number(value))
        for name, value in attributes.items()
        if value is not None
    ]
    opening = Markup("<{}{}").format(tag, Markup("").join(pairs))
    if not children:
        return opening + Markup("/>")
    return opening + Markup(">{}</{}>").format(Markup("").join(map(escape, children)), tag)


def _number(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def picture(
    width: float, height: float, label: str, *children: str, growth: float = 1, only: str = ""
) -> Markup:
    """Return a whole picture.

    Args:
        width: the width in pixels at which text has its intended size.
        height: the height in pixels.
        label: what the picture shows, for readers who cannot see it.
        children: its elements, painted in order.
        growth: how far it may grow with the page, where it also shrinks; 0 keeps its size, and
            the page scrolls where it is too wide.
        only: ``wide`` or ``narrow`` for a picture meant for such a page alone.
    """
    class_ = "fluid" if growth else "fixed"
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {_number(width)} {_number(height)}",
        width=width,
        height=height,
        class_=f"{class_} {only}".strip(),
        style=f"max-width:{_number(growth * width)}px" if growth else None,
        role="img",
        aria_label=label,
    )


def text_width(text: str, size: float = 12) -> float:
    """About how many pixels a text takes in a common sans-serif font; rather more than less.

    Args:
        text: one line.
        size: the font size in pixels.
    """
    return size * sum(map(_advance, text))


def _advance(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.05
    if character in "ijl.,:;|'! ":
        return 0.36
    if character in "mwMW@%…":
        return 1.02
    return 0.76 if character.isupper() else 0.64


def shorten(text: str, most: float, size: float = 12) -> str:
    """Cut the middle out of a long name: ends tell names of one family apart.

    Args:
        text: one line.
        most: how many pixels it may take.
        size: the font size in pixels.
    """
    if text_width(text, size) <= most:
        return text
    for kept in range(len(text) - 1, 1, -1):
        tail = kept // 2
        short = f"{text[: kept - tail]}…{text[len(text) - tail :]}"
        if text_width(short, size) <= most:
            return short
    return "…"


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose ``low`` … ``high``, about ``wanted`` of them."""
    span = high - low
    if span < 1e-12 * max(1.0, abs(low), abs(high)):
        span = abs(high) if abs(high) > 1e-12 else 1.0
    raw = span / max(1, wanted - 1)
    exponent = math.floor(math.log10(raw))
    step = next(
        factor * 10.0**exponent
        for factor in (1, 2, 2.5, 5, 10)
        if factor * 10.0**exponent >= raw * 0.999
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(position * step, 2 - exponent) for position in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A tick's number without useless digits."""
    return f"{value:.6g}"


@dataclass(frozen=True, slots=True)
class Scale:
    """A straight mapping of values to pixels.

    Attributes:
        low: the value at ``start``.
        high: the value at ``end``; may equal ``low``.
        start: a pixel position.
        end: a pixel position.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel position of a value; the middle where the scale has no extent."""
        if self.high == self.low:
            return (self.start + self.end) / 2
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)
