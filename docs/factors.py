"""Draw docs/factors.svg, a gradient as two thin products: `python docs/factors.py`."""

from pathlib import Path

VOCABULARY, WIDTH, POSITIONS, TOP_K = 50_257, 768, 128, 64  # GPT-2 small, --top-k
BFLOAT16, FLOAT16, FLOAT32, TOKEN_ID = 2, 2, 4, 2  # bytes
BYTES = {
    "ids": POSITIONS * TOKEN_ID,
    "thin": POSITIONS * WIDTH * BFLOAT16,
    "R": POSITIONS * (TOP_K * TOKEN_ID + (TOP_K + 2) * FLOAT16),
    "dense": VOCABULARY * WIDTH * FLOAT32,
}
TALL, THIN, WIDE, TOP = 200, 62, 92, 66  # how V, t and d are drawn
GREEN, ORANGE, BLUE, GREY = "#0a8f66", "#d4540f", "#3b7dd8", "#888"
READ = (3, 11, 7, 16, 11, 1, 14, 5)  # rows of the tokens that are read, of 20
ROWS = 20


def kilobytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def box(x: float, width: float, height: float, colour: str, shade: float) -> str:
    return (
        f'<rect x="{x}" y="{TOP}" width="{width}" height="{height}" fill="{colour}" '
        f'fill-opacity="{shade}" stroke="{colour}" stroke-width="1.5"/>'
    )


def cell(x: float, row: float, width: float, colour: str, shade: float = 0.9) -> str:
    y, height = TOP + row * TALL / ROWS, TALL / ROWS
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}" fill-opacity="{shade}"/>'
    )


def words(x: float, y: float, said: str, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y}" text-anchor="middle" {more}>{said}</text>'


def captions(x: float, y: float, name: str, *lines: str) -> list[str]:
    said = [words(x, y, name, 'style="font-weight:600"')]
    return said + [words(x, y + 18 * (n + 1), line) for n, line in enumerate(lines)]


def drawing() -> str:
    """One sample's gradient of a tied embedding, with shapes and bytes."""
    one_hot, D, R, H, whole = 52, 150, 306, 404, 580  # noqa: N806
    step, below, beside = THIN / len(READ), TOP + TALL + 22, TOP + THIN + 22
    drawn = [words((one_hot + D + WIDE) / 2, 24, "input side", f'style="fill:{GREEN}"')]
    drawn += [words((one_hot + D + WIDE) / 2, 43, "what was read")]
    drawn += [words((R + H + WIDE) / 2, 24, "output side", f'style="fill:{ORANGE}"')]
    drawn += [words((R + H + WIDE) / 2, 43, "what was predicted")]
    drawn += [words(whole + WIDE / 2, 43, "the gradient")]

    drawn += [box(one_hot, THIN, TALL, GREEN, 0), box(D, WIDE, THIN, GREEN, 0.35)]
    drawn += [cell(one_hot + n * step, row, step, GREEN) for n, row in enumerate(READ)]
    drawn += [box(R, THIN, TALL, ORANGE, 0.12), box(H, WIDE, THIN, ORANGE, 0.35)]
    for n, label in enumerate((*READ[1:], 9)):  # a position predicts the token that is read next
        drawn += [
            cell(R + n * step, (label + k * (n + 2)) % ROWS, step, ORANGE, 0.45) for k in (2, 3)
        ]
        drawn.append(cell(R + n * step, label, step, BLUE))
    drawn += [box(whole, WIDE, TALL, ORANGE, 0.12)]
    drawn += [cell(whole, row, WIDE, GREEN, 0.5) for row in sorted(set(READ))]

    for x, sign in (
        ((one_hot + THIN + D) / 2, "·"),
        ((D + WIDE + R) / 2, "+"),
        ((R + THIN + H) / 2, "·"),
        ((H + WIDE + whole) / 2, "="),
    ):
        drawn.append(words(x, TOP + THIN / 2 + 8, sign, 'style="font-size:24px"'))

    tied = ("V × t", f"kept: t ids, {BYTES['ids']} bytes")
    drawn += captions(one_hot + THIN / 2, below, "one-hot(tokens)ᵀ", *tied)
    drawn += captions(D + WIDE / 2, beside, "D", "t × d", kilobytes(BYTES["thin"]))
    kept = (
        "V × t",
        f"kept: label (blue), {TOP_K} largest",
        f"and the rest's sum, {kilobytes(BYTES['R'])}",
    )
    drawn += captions(R + THIN / 2, below, "Rᵀ = (softmax − one-hot)ᵀ", *kept)
    drawn += captions(H + WIDE / 2, beside, "H", "t × d", kilobytes(BYTES["thin"]))
    drawn += captions(whole + WIDE / 2, below, "V × d", f"never built: {kilobytes(BYTES['dense'])}")

    held = BYTES["ids"] + 2 * BYTES["thin"] + BYTES["R"]
    sizes = f"V = {VOCABULARY:,}, d = {WIDTH}, t = {POSITIONS}"
    said = f"GPT-2 small, {sizes}: {held / 1e3:.0f} kB stand for {kilobytes(BYTES['dense'])}"
    drawn.append(words(353, below + 88, said))
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 706 {below + 108}">\n'
        "<style>text{font:13px system-ui,sans-serif;fill:#777}</style>\n"
        f"{body}\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("factors.svg").write_text(drawing())
