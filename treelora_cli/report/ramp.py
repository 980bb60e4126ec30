"""The heat-map's colours: lightness rises or falls steadily, so no reader needs to see hue."""

from __future__ import annotations

STEPS = 20
"""The ramp has STEPS + 1 colours, for 0, 5, 10 … 100 percent."""

LIGHT = ("#f6f3ea", "#cfe3d8", "#86c0bf", "#3c88a9", "#153f72")
DARK = ("#1a212b", "#1d4058", "#276f88", "#5fb0a6", "#e2f2c6")

_BLACK, _WHITE = "#000000", "#ffffff"


def level(score: float) -> int:
    """The colour number of a score of 0-1; scores outside are held at the ends."""
    return round(min(1.0, max(0.0, score)) * STEPS)


def colours(anchors: tuple[str, ...]) -> list[tuple[str, str]]:
    """The ramp through evenly spaced anchors: pairs of a cell colour and the ink on it."""
    found = []
    for step in range(STEPS + 1):
        place = step / STEPS * (len(anchors) - 1)
        left = min(int(place), len(anchors) - 2)
        cell = _mix(anchors[left], anchors[left + 1], place - left)
        ink = max((_BLACK, _WHITE), key=lambda ink: contrast(cell, ink))
        found.append((cell, ink))
    return found


def stylesheet() -> str:
    """CSS classes ``h0`` … ``h20`` (cell) and ``i0`` … ``i20`` (ink) for both colour schemes."""
    return f"{_rules(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_rules(DARK)}\n}}"


def _rules(anchors: tuple[str, ...]) -> str:
    return "\n".join(
        f".h{step} {{ fill: {cell} }} .i{step} {{ fill: {ink} }}"
        for step, (cell, ink) in enumerate(colours(anchors))
    )


def contrast(first: str, second: str) -> float:
    """The WCAG contrast ratio of two colours, 1-21."""
    brighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _mix(first: str, second: str, share: float) -> str:
    pairs = zip(_channels(first), _channels(second), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _channels(colour: str) -> tuple[int, int, int]:
    value = int(colour[1:], 16)
    return value >> 16, value >> 8 & 255, value & 255
