"""Two kinds of plots as SVG, written by hand: lines over a doubling axis, and named points."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 40, 50
COLORS = ("#1b6ca8", "#c8452d", "#3a8f4d", "#8a4fb0", "#c88a1a", "#2aa5a0", "#a33a6a", "#5d6b7a", "#7a5c33", "#111111")
Point = tuple[float, float]
TICKS = 5
CLOSE = 12


def lines(title: str, across: str, up: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Lines through points, the axis across doubling from tick to tick; their names are on the right."""
    xs = sorted({x for points in series.values() for x, _ in points})
    top = nice(max(y for points in series.values() for _, y in points))
    low, high = math.log2(xs[0]), math.log2(xs[-1])

    def place(x: float, y: float) -> Point:
        return _across((math.log2(x) - low) / (high - low or 1)), _up(y / top)

    body = [_axes(title, across, up, [(f"{x:g}", place(x, 0)[0]) for x in xs], _ticks(0, top))]
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        # A second round of colors is dashed.
        dashes = ' stroke-dasharray="6 4"' if number >= len(COLORS) else ""
        places = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        at = TOP + 10 + 18 * number
        body.append(f'<line x1="{WIDTH - RIGHT + 12}" x2="{WIDTH - RIGHT + 36}" y1="{at}" y2="{at}" ')
        body.append(f'stroke="{color}" stroke-width="2"{dashes}/>')
        body.append(_text(WIDTH - RIGHT + 42, at + 4, name))
    return _page(body)


def points(title: str, across: str, up: str, named: Mapping[str, Point]) -> str:
    """Points with numbers beside them, and what the numbers stand for on the right."""
    right = nice(max(x for x, _ in named.values()))
    values = [y for _, y in named.values()]
    margin = (max(values) - min(values)) * 0.1 or 1.0
    low, high = min(values) - margin, max(values) + margin

    ticks = [(f"{right * n / TICKS:,.4g}", _across(n / TICKS)) for n in range(TICKS + 1)]
    body = [_axes(title, across, up, ticks, _ticks(low, high))]
    labels: dict[Point, list[int]] = {}
    for number, (name, (x, y)) in enumerate(named.items()):
        color = COLORS[number % len(COLORS)]
        cx, cy = _across(x / right), _up((y - low) / (high - low))
        body.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{color}"/>')
        # Points that are close share a label.
        place = next((at for at in labels if abs(at[0] - cx) < CLOSE and abs(at[1] - cy) < CLOSE), (cx, cy))
        labels.setdefault(place, []).append(number + 1)
        at = TOP + 10 + 18 * number
        body.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{at}" r="4" fill="{color}"/>')
        body.append(_text(WIDTH - RIGHT + 32, at + 4, f"{number + 1}  {name}"))
    body += [_text(x + 6, y - 5, ", ".join(map(str, numbers))) for (x, y), numbers in labels.items()]
    return _page(body)


def nice(value: float) -> float:
    """The least round number that is not below ``value``."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value)


def _across(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _up(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _ticks(low: float, high: float) -> list[tuple[str, float]]:
    return [(f"{low + (high - low) * n / TICKS:,.4g}", _up(n / TICKS)) for n in range(TICKS + 1)]


def _axes(title: str, across: str, up: str, xs: Sequence[tuple[str, float]], ys: Sequence[tuple[str, float]]) -> str:
    left, right, bottom = _across(0), _across(1), _up(0)
    parts = [_text(left, 22, title, size=15)]
    for label, y in ys:
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d8dde2"/>')
        parts.append(_text(left - 8, y + 4, label, anchor="end"))
    for label, x in xs:
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#555"/>')
        parts.append(_text(x, bottom + 20, label, anchor="middle"))
    parts.append(f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#555"/>')
    parts.append(_text((left + right) / 2, HEIGHT - 10, across, anchor="middle"))
    turned = f'transform="rotate(-90 16 {(TOP + bottom) / 2})"'
    parts.append(_text(16, (TOP + bottom) / 2, up, anchor="middle", more=turned))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _page(body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" fill="#222">'
    )
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, ground, *body, "</svg>", ""])
