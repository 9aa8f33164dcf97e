"""Lines over a common axis, as SVG: no library for one picture."""

from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BELOW, MARGIN = 800, 360, 60, 40, 20
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
TICKS = 5

Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], x_name: str, y_name: str) -> str:
    """One line for each name, from zero on."""
    right = max((x for points in series.values() for x, _ in points), default=1) or 1
    top = 1.1 * max((y for points in series.values() for _, y in points), default=1) or 1
    width, height = WIDTH - LEFT - MARGIN, HEIGHT - BELOW - MARGIN

    def at(x: float, y: float) -> str:
        return f"{LEFT + width * x / right:.1f},{MARGIN + height * (1 - y / top):.1f}"

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for i in range(TICKS + 1):
        x, y = right * i / TICKS, top * i / TICKS
        parts.append(f'<polyline points="{at(0, y)} {at(right, y)}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, MARGIN + height * (1 - y / top) + 4, f"{y:.0f}", "end"))
        parts.append(_text(LEFT + width * x / right, HEIGHT - BELOW + 16, f"{x:,.0f}", "middle"))
    parts.append(_text(LEFT + width / 2, HEIGHT - 6, x_name, "middle"))
    parts.append(_text(LEFT, MARGIN - 6, y_name, "start"))
    for i, (name, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(_text(LEFT + 90 + 110 * i, MARGIN - 6 + 16, name, "start", colour))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
