"""Draw docs/path.svg from the catalog of a demo: `python docs/picture.py gradstore-demo/store`."""

import sys
from pathlib import Path

from gradstore.store import Store

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 300, 64, 52
COLOURS = {"applied": "#0a7f5a", "raw": "#c2410c"}
NAMES = {"applied": "gradstore (applied)", "raw": "first-epoch ascent (raw)"}


def main(store: Path) -> None:
    """Plot what stays against what is forgotten, along both paths."""
    points = Store.open(store).table(
        """SELECT direction, target, forget_loss AS x, chosen,
                  retained_loss - min(retained_loss) OVER (PARTITION BY request_id) AS y
           FROM paths JOIN requests USING (request_id)
           WHERE forget_loss < target * 1.1 ORDER BY direction, paths.dose"""
    )
    right, top = max(p["target"] for p in points) * 1.1, max(p["y"] for p in points) * 1.15

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = WIDTH - LEFT - 24, HEIGHT - BOTTOM - 30
        return LEFT + x / right * across, HEIGHT - BOTTOM - y / top * up

    def text(x: float, y: float, said: str, more: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{said}</text>'

    floor, edge, target = place(0, 0), place(right, 0), place(points[0]["target"], 0)
    drawn = [
        f'<line x1="{floor[0]}" y1="{floor[1]}" x2="{edge[0]}" y2="{edge[1]}" stroke="#888"/>',
        f'<line x1="{floor[0]}" y1="{floor[1]}" x2="{floor[0]}" y2="20" stroke="#888"/>',
        f'<line x1="{target[0]:.0f}" y1="{target[1]}" x2="{target[0]:.0f}" y2="30" '
        'stroke="#888" stroke-dasharray="4 4"/>',
        text(target[0] + 20, 24, "if never trained on (estimate)", 'text-anchor="end"'),
        text(WIDTH / 2, HEIGHT - 10, "loss of the forgotten person (nats per token)",
             'text-anchor="middle"'),
        text(12, 14, "rise of the other people's loss"),
    ]  # fmt: skip
    for tick in range(1, int(right / 0.5) + 1):
        x = place(tick * 0.5, 0)[0]
        drawn.append(text(x, floor[1] + 18, f"{tick * 0.5:.1f}", 'text-anchor="middle"'))
    for tick in range(1, int(top / 0.05) + 1):
        y = place(0, tick * 0.05)[1]
        drawn.append(text(LEFT - 8, y + 4, f"+{tick * 0.05:.2f}", 'text-anchor="end"'))
    for direction, colour in COLOURS.items():
        of = [p for p in points if p["direction"] == direction]
        path = [(*place(p["x"], p["y"]), p["chosen"]) for p in of]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in path)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, chosen in path:
            radius = 6 if chosen else 2.5
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')
        x, y, _ = path[-1]
        at = (x - 10, y - 12, 'text-anchor="end"') if x > WIDTH / 2 else (x + 12, y + 4, "")
        drawn.append(text(at[0], at[1], NAMES[direction], f'{at[2]} style="fill:{colour}"'))
    body = "\n".join(drawn)
    Path(__file__).with_name("path.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">\n'
        "<style>text{font:13px system-ui,sans-serif;fill:#777}</style>\n"
        f"{body}\n</svg>\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
