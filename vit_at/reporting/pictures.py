"""Charts and images as text, SVG and PNG, for a page without other files.

The SVG of a chart takes its colours from the page, which may be light or dark: matplotlib draws in
stand-in colours, which are then replaced by CSS variables (``--ink``, ``--grid``, and ``--c0`` ...
``--c5``, which the page sets to a palette for colour-blind readers). Its PNG has the page's light
colours. Lines also differ in dashes or markers.
"""

import base64
import dataclasses
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vit_at.reporting.run import Curve, thin
from vit_at.workdir.results import in_255ths

_SERIES = 6  # colours; a seventh line has the first colour again, with other dashes
_DASHES = ("-", "--", ":", "-.")
# Stand-ins for the page's variables: colours that are not used otherwise.
_INK, _GRID = "#010203", "#040506"
_STAND_INS = [f"#0a0b{i:02x}" for i in range(_SERIES)]
# The light colours of packaged/report.html.
_LIGHT = ("#23272b", "#dfe2e5", "#0072b2", "#d55e00", "#008061", "#b0578d", "#8a6d00", "#3a3f44")
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color")
_MOST_POINTS = 160  # of one line; more are averaged
_DECADE = 10  # a logarithmic axis, if the largest number is more times the smallest
_APART = 0.1  # of the axis, between the numbers at it


@dataclasses.dataclass(frozen=True)
class Chart:
    """draw: plots on a pair of axes; height: in inches."""

    title: str
    draw: Callable[[Any], None]
    height: float = 2.9

    def svg(self) -> str:
        """The SVG element, without size, in the page's colours."""
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        content = self._saved((_INK, _GRID, *_STAND_INS), format="svg", metadata=nothing)
        return _for_page(content.decode(), self.title)

    def png(self) -> bytes:
        """The content of a PNG file, on white."""
        return self._saved(_LIGHT, format="png", dpi=160, facecolor="white")

    def _saved(self, colours: Sequence[str], **options: Any) -> bytes:
        ink, grid, *series = colours
        style = _STYLE | dict.fromkeys((*_INKED, "ytick.color"), ink) | {"grid.color": grid}
        style |= {"axes.prop_cycle": matplotlib.cycler(color=series), "svg.hashsalt": self.title}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(4.6, self.height), layout="constrained")
            axes = figure.subplots()
            self.draw(axes)
            axes.set_title(self.title)
            file = io.BytesIO()
            look = {"bbox_inches": "tight", "pad_inches": 0.04}
            look |= {} if "facecolor" in options else {"transparent": True}
            figure.savefig(file, **look, **options)
        return file.getvalue()


def line_chart(
    title: str,
    lines: Mapping[str, Curve],
    *,
    x: str,
    percent: bool = False,
    log: bool = False,
    eps: bool = False,
    marked: bool = False,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> Chart:
    """Named lines, each (xs, ys); the name '' is not shown.

    A line's colour follows from its place in ``lines``; one without points is left out. percent:
    the values are shares, shown in per cent from 0 up. log: the x axis is logarithmic, with a tick
    at each x. eps: the xs are perturbation sizes, logarithmic if they span more than a decade; 0
    then stands left of the smallest. marked: a marker at each point, which lines of few points have
    anyway. errors: the standard error at each point, by name; such lines are not thinned.
    """
    shown = {i: (n, *line) for i, (n, line) in enumerate(lines.items()) if len(line[0])}

    def draw(axes):
        for i, (name, xs, ys) in shown.items():
            error = (errors or {}).get(name)
            xs, ys = (xs, ys) if error is not None else thin(xs, ys, _MOST_POINTS)
            scaled = 100 * np.asarray(ys) if percent else ys
            look = {"color": f"C{i % _SERIES}", "linestyle": _DASHES[i % len(_DASHES)]}
            if marked or len(xs) <= 25:
                look["marker"] = "osD^vP"[i % 6]
            if error is None:
                axes.plot(xs, scaled, label=name, **look)
            else:
                bars = 100 * np.asarray(error) if percent else error
                axes.errorbar(xs, scaled, bars, label=name, capsize=2, elinewidth=1, **look)
        axes.set(xlabel=x, ylabel="% correct" if percent else "")
        if percent:
            axes.set_ylim(0, max(5.0, 1.04 * axes.dataLim.y1))
        if log:
            places = sorted({float(v) for xs, _ in lines.values() for v in xs})
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(places, [f"{v:g}" for v in places])
        if eps:
            _eps_axis(axes, sorted({float(v) for xs, _ in lines.values() for v in xs}))
        if any(lines):
            _legend(axes, len(shown))

    return Chart(title, draw)


def _eps_axis(axes: Any, sizes: Sequence[float]) -> None:
    """The scale of eps, with numbers at as many of the sizes as there is room for."""
    positive = [size for size in sizes if size > 0]
    if positive and positive[-1] > _DECADE * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.4)
        axes.minorticks_off()
        axes.set_xlim(left=-0.3 * positive[0])
    axes.set_xlim(axes.get_xlim())
    left, right = axes.transData.transform([(x, 0) for x in axes.get_xlim()])[:, 0]
    shown: list[float] = []
    place = -np.inf
    for size in sizes:
        new = (axes.transData.transform((size, 0))[0] - left) / (right - left)
        if new - place > _APART:
            shown.append(size)
            place = new
    axes.set_xticks(shown, [in_255ths(size) for size in shown])


def heat_map(
    title: str,
    names: Sequence[str],
    shares: np.ndarray,
    errors: np.ndarray,
    *,
    rows: str,
    columns: str,
) -> Chart:
    """A square of shares [R, R] in per cent, each with its number and standard error.

    names: of the rows and of the columns. rows, columns: what they are.
    """

    def draw(axes):
        colours = matplotlib.colormaps["cividis"]
        edges = np.arange(len(names) + 1) - 0.5
        axes.pcolormesh(edges, edges, 100 * shares, cmap=colours, vmin=0, vmax=100)
        for place in np.ndindex(*shares.shape):
            share, error = 100 * shares[place], 100 * errors[place]
            text = f"{share:.1f}\n± {error:.1f}" if np.isfinite(share) else "-"
            colour = "#ffffff" if share < 55 else "#101010"
            look = {"ha": "center", "va": "center", "fontsize": 9, "color": colour}
            axes.text(place[1], place[0], text, **look)
        turned = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 9 else {}
        axes.set_xticks(range(len(names)), names, **turned)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set(xlabel=columns, ylabel=rows)

    return Chart(title, draw, 1.4 + 0.55 * len(names))


def bar_chart(
    title: str,
    bars: Mapping[str, Mapping[str, Sequence[float]]],
    errors: Mapping[str, float] | None = None,
) -> Chart:
    """Horizontal bars of shares, in per cent: {row: {series: values}}.

    A bar is as long as the mean of its values; if it has several, each is a circle. A single
    series is named at the axis, several in a legend. errors: the standard error of a row.
    """
    rows, series = list(bars), list(dict.fromkeys(s for row in bars.values() for s in row))
    thick = 0.8 / max(len(series), 1)

    def draw(axes):
        for i, name in enumerate(series):
            _bars(axes, i, name, thick, (i - (len(series) - 1) / 2) * thick, bars, errors or {})
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        only = f" ({series[0]})" if len(series) == 1 and series[0] else ""
        axes.set(xlabel=f"% correct{only}", xlim=(0, 116))
        axes.set_xticks(range(0, 101, 20))
        axes.grid(visible=False, axis="y")
        if len(series) > 1:
            _legend(axes, len(series))

    return Chart(title, draw, 1.1 + 0.17 * len(rows) * max(len(series), 1.6))


def _bars(axes, index, name, thick, offset, bars, errors) -> None:
    """The bars of one series, with its own colour and hatch, and the means beside them."""
    hatch = ("", "///", "...")[index % 3]
    colour = f"C{index % _SERIES}"
    ink = matplotlib.rcParams["text.color"]
    look = {"facecolor": "none" if hatch else colour, "edgecolor": colour}
    label = name
    for place, (title, row) in enumerate(bars.items()):
        if name not in row:
            continue
        values = 100 * np.asarray(row[name])
        mean, place = values.mean(), place + offset
        axes.barh(place, mean, 0.9 * thick, label=label, linewidth=1, hatch=hatch, **look)
        label = None  # once is enough for the legend
        end = mean
        if len(values) > 1:
            ring = {"facecolors": "none", "edgecolors": ink, "linewidths": 0.8, "zorder": 3}
            axes.scatter(values, np.full(len(values), place), s=14, **ring)
            end = max(values)
        elif title in errors:
            error = 100 * errors[title]
            axes.errorbar(mean, place, xerr=error, color=ink, elinewidth=1, capsize=2)
            end = mean + error
        axes.text(end + 3, place, f"{mean:.1f}", va="center", fontsize=8)


def _legend(axes: Any, entries: int) -> None:
    """Below the axes; the figure grows by its height."""
    columns = 2 if max(len(t) for t in axes.get_legend_handles_labels()[1]) < 30 else 1
    columns = min(columns, entries)
    axes.figure.legend(loc="outside lower left", ncols=columns)
    rows = -(-entries // columns)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.2 * rows)


def _for_page(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z]\w*_\d+"', "", svg)  # of groups: not used, and not unique in a page
    head, _, rest = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    variables = {_INK: "var(--ink)", _GRID: "var(--grid)"}
    variables |= {stand_in: f"var(--c{i})" for i, stand_in in enumerate(_STAND_INS)}
    for stand_in, variable in variables.items():
        rest = rest.replace(stand_in, variable)
    rest = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", rest)
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'


def png(pixels: np.ndarray, scale: int = 1) -> str:
    """A data URI of pixels [H, W], [H, W, 1] or [H, W, 3] in [0, 1], enlarged without smoothing."""
    values = np.clip(np.asarray(pixels) * 255 + 0.5, 0, 255).astype(np.uint8)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    values = values.repeat(scale, 0).repeat(scale, 1)
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def heat(weights: np.ndarray, image: np.ndarray) -> np.ndarray:
    """[H, W, 3]: an image [H, W, C], grey, under a heat map [h, w] whose maximum is full colour."""
    grey = np.asarray(image).mean(-1)
    rows, columns = (n // m for n, m in zip(grey.shape, weights.shape, strict=True))
    spread = np.asarray(weights) / max(float(np.max(weights)), 1e-12)
    spread = spread.repeat(rows, 0).repeat(columns, 1)
    colours = matplotlib.colormaps["cividis"](spread)[..., :3]
    return 0.65 * colours + 0.35 * grey[..., None]


def masked(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """[H, W, 3]: an image [H, W, C] whose dropped patches, keep [h, w] False, are crossed out."""
    pixels = np.asarray(image)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy()
    rows, columns = (n // m for n, m in zip(pixels.shape, keep.shape, strict=False))
    dropped = ~np.asarray(keep).repeat(rows, 0).repeat(columns, 1)
    pixels[dropped] = 0.25 * pixels[dropped] + 0.75 * np.array([0.84, 0.37, 0.0])
    return pixels
