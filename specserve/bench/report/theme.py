"""How pictures look, on a light page and on a dark one.

A picture is drawn with one of two palettes. For the HTML file it is drawn once, and each colour is replaced by the name
under which the page's style sheet knows it, so that the page decides.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")  # the first that is there
MARKERS = ("o", "s", "^", "D", "v", "P")  # with colours, so that colour alone tells nothing
DPI = 160
LETTERS = 9  # of a title, an inch
NARROW = 4.1  # inches: letters then are as large as the page's small ones, 390 pixels being its width


@dataclass(frozen=True, slots=True)
class Palette:
    """All colours differ, since they stand for their names in the page."""

    page: str
    ink: str
    muted: str
    grid: str
    win: str
    lose: str
    series: tuple[str, ...]  # of variants, the first being what others are compared with

    def names(self) -> dict[str, str]:
        """Colour → the style sheet's variable."""
        plain = {getattr(self, name): f"var(--{name})" for name in ("page", "ink", "muted", "grid", "win", "lose")}
        return plain | {colour: f"var(--series-{place})" for place, colour in enumerate(self.series)}


LIGHT = Palette(
    "#ffffff", "#0f172a", "#5b677a", "#dfe5ee", "#15803d", "#be123c",
    ("#7a8699", "#2563eb", "#d9650b", "#7c3aed", "#0d9488", "#c026d3"),
)  # fmt: skip
DARK = Palette(
    "#0d1424", "#e6ebf4", "#93a1b8", "#243049", "#4ade80", "#fb7185",
    ("#8b98ad", "#5b9bff", "#fb923c", "#a78bfa", "#2dd4bf", "#e879f9"),
)  # fmt: skip


class Draw(Protocol):
    def __call__(self, palette: Palette, /, *, narrow: bool = False) -> Figure:
        """`narrow`: for a phone's page, no wider than NARROW; only pictures that are wide elsewhere are asked."""


@dataclass(frozen=True, slots=True)
class Picture:
    """`draw` is called once for each palette, and for a page once for each width."""

    name: str  # of its files
    title: str
    caption: str
    draw: Draw
    wide: bool = False  # it takes a row of its own


def canvas(
    palette: Palette, title: str, width: float = 7.2, height: float = 4.0, across: int = 1, down: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure, and its axes row by row; inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=palette.page)
    lines = textwrap.wrap(title, int(LETTERS * width))
    figure.suptitle("\n".join(lines), x=0.008, ha="left", color=palette.ink, fontweight="bold", fontsize=12)
    found: list[Axes] = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in found:
        _quiet(axes, palette)
    return figure, found


def legend(axes: Axes, palette: Palette, columns: int = 3) -> None:
    """Above the axes, where no line is."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, labelcolor=palette.ink,
        fontsize=9, handlelength=1.6, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def file_part(variant: str) -> str:
    """Of a picture's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in variant.lower())


def save_pngs(picture: Picture, folder: Path, name: str) -> list[Path]:
    """name.png for light pages and name-dark.png for dark ones."""
    paths = [folder / f"{name}.png", folder / f"{name}-dark.png"]
    for palette, path in zip((LIGHT, DARK), paths, strict=True):
        with _looks(picture.name):
            picture.draw(palette).savefig(path, dpi=DPI, facecolor=palette.page, metadata={"Software": None})
    return paths


def inline_svg(picture: Picture, *, narrow: bool = False) -> str:
    """An <svg> element for a page whose style sheet has the palette's names; its ids are its own on the page."""
    file, own = io.StringIO(), f"{picture.name}-narrow" if narrow else picture.name
    with _looks(own):
        picture.draw(LIGHT, narrow=narrow).savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in LIGHT.names().items():
        text = text.replace(colour, name)
    text = re.sub(r'\bid="', f'id="{own}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}-", text)
    label = picture.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(
        r'<svg\b[^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )


@contextmanager
def _looks(name: str) -> Iterator[None]:
    known = set(font_manager.get_font_names())
    font = next((one for one in FONTS if one in known), "DejaVu Sans")
    settings = {
        "svg.hashsalt": name, "svg.fonttype": "none", "font.family": [font], "font.size": 9,
        "axes.titlesize": 9.5, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    }  # fmt: skip
    with rc_context(settings):  # type: ignore[arg-type]
        yield


def _quiet(axes: Axes, palette: Palette) -> None:
    """A light grid, no frame: what was measured stands out."""
    axes.patch.set_alpha(0.0)
    axes.set_axisbelow(True)
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.tick_params(colors=palette.muted, length=0, pad=5)
    axes.xaxis.label.set_color(palette.muted)
    axes.yaxis.label.set_color(palette.muted)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.muted)
        spine.set_linewidth(0.8)
