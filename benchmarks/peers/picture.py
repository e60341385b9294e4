"""Draws the speeds of a comparison as a bar chart in SVG: a group for each figure, a bar for each engine.

Every group is scaled to its own largest bar; the tokens per second stand beside the bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from peers.bars import NAMES, Bar

COLOURS = {"tensorwright": "#d9480f", "openvino": "#6b7a90", "llama.cpp": "#a5b1c2", "vllm_fp8": "#6b7a90",
           "vllm_int4": "#a5b1c2"}
WIDTH, LABELS, NUMBERS = 720, 150, 90
BAR, GAP, TOP = 16, 18, 64
INK = "#7a8290"  # readable on light and on dark pages
FONT = 'font-family="system-ui, sans-serif"'


def draw(title: str, table: Sequence[Bar]) -> str:
    """The SVG of all rows that count tokens per second."""
    groups = [bar for bar in table if bar.unit == "tok/s" and bar.values]
    body, y = [_text(0, 20, title, 16, "bold"), *_legend(groups)], float(TOP)
    for group in groups:
        names = [name for name in COLOURS if name in group.values]
        body.append(_text(0, y + len(names) * BAR / 2 + 5, group.title, 14))
        largest = max(group.values.values())
        for name in names:
            value = group.values[name]
            width = (WIDTH - LABELS - NUMBERS) * value / largest
            body.append(f'<rect x="{LABELS}" y="{y:.0f}" width="{width:.1f}" height="{BAR - 3}" rx="2" '
                        f'fill="{COLOURS[name]}"/>')
            body.append(_text(LABELS + width + 6, y + 11, f"{value:.0f}", 12))
            y += BAR
        y += GAP
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" role="img" '
            f'aria-label="{escape(title)}">\n' + "\n".join(body) + "\n</svg>\n")


def _legend(groups: Sequence[Bar]) -> list[str]:
    parts, x = [], float(LABELS)
    shown = {name for group in groups for name in group.values}
    for name, colour in ((name, colour) for name, colour in COLOURS.items() if name in shown):
        parts.append(f'<rect x="{x:.0f}" y="34" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 18, 45, NAMES[name], 13))
        x += 130
    return parts


def _text(x: float, y: float, words: str, size: int, weight: str = "normal") -> str:
    return (f'<text x="{x:.0f}" y="{y:.0f}" {FONT} font-size="{size}" font-weight="{weight}" fill="{INK}">'
            f"{escape(words)}</text>")
