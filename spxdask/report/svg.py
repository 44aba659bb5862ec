"""Plots as SVG: small, without scripts, the same bytes for the same numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["Axis", "Plot", "format_date", "show"]

INK, MUTED, GRID = "#26303a", "#66727f", "#e4e8ec"
FONT_SIZE = 12
# Where the plot is within the figure, pixels.
RIGHT, TOP, BOTTOM = 14, 30, 44
CHARACTER_WIDTH = 6.6
MJD_OF_1970 = 40587


def show(text: object) -> str:
    """Return text for HTML and SVG: escaped, with what does not print written out.

    Parameters
    ----------
    text : object
        Anything; it may come from outside.

    Returns
    -------
    str
        Without markup.
    """
    plain = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in str(text)
    )
    return html.escape(plain)


def format_date(mjd: float) -> str:
    """Return the day of a time.

    Parameters
    ----------
    mjd : float
        Modified Julian date, UTC.

    Returns
    -------
    str
        Such as ``2025-12-18``.
    """
    return str(np.datetime64(math.floor(mjd) - MJD_OF_1970, "D"))


def _format_places(x: np.ndarray, y: np.ndarray) -> list[str]:
    return [f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]


class Axis:
    """One axis of a plot.

    Parameters
    ----------
    low, high : float
        Numbers at its ends; `low` may be the larger.
    label : str
        What it is, with its unit.
    is_log : bool
        Whether its steps are logarithmic.
    ticks : sequence of float, optional
        Where its ticks are; by default round numbers.
    is_time : bool
        Whether it is a date, MJD.
    """

    def __init__(
        self,
        low: float,
        high: float,
        label: str = "",
        *,
        is_log: bool = False,
        ticks: Sequence[float] | None = None,
        is_time: bool = False,
    ) -> None:
        if not (math.isfinite(low) and math.isfinite(high)):
            low, high = 1.0, 10.0
        if low == high:
            width = abs(low) * 0.1 or 1.0
            low, high = (low / 1.5, high * 1.5) if is_log else (low - width, high + width)
        self.low, self.high, self.label, self.is_log, self.is_time = (
            low,
            high,
            label,
            is_log,
            is_time,
        )
        inside = sorted((low, high))
        chosen = ticks if ticks is not None else self._choose_ticks(*inside)
        slack = 1e-9 * (inside[1] - inside[0])
        self.ticks = [t for t in chosen if inside[0] - slack <= t <= inside[1] + slack]

    @classmethod
    def around(cls, values: np.ndarray, label: str = "", margin: float = 0.05, **how) -> Axis:
        """Return the axis that holds some numbers.

        Parameters
        ----------
        values : float array
            What it is to hold; those that are not finite, or not positive on a logarithmic axis,
            do not count.
        label : str
            What it is.
        margin : float
            Room at each end, as a share of its length.
        **how
            As for the axis.

        Returns
        -------
        Axis
        """
        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        if how.get("is_log"):
            values = values[values > 0]
        if not len(values):
            return cls(0.1, 1.0, label, **how)
        low, high = float(values.min()), float(values.max())
        if how.get("is_log"):
            room = (high / low) ** margin
            return cls(low / room, high * room, label, **how)
        room = (high - low) * margin
        return cls(low - room, high + room, label, **how)

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Return where numbers are on the axis.

        Parameters
        ----------
        values : float array or float
            The numbers.

        Returns
        -------
        float array
            0 at its beginning, 1 at its end; NaN for what has no place.
        """
        values = np.asarray(values, np.float64)
        if not self.is_log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(invalid="ignore", divide="ignore"):
            logs = np.where(values > 0, np.log(np.where(values > 0, values, 1.0)), np.nan)
        return (logs - math.log(self.low)) / math.log(self.high / self.low)

    def name(self, tick: float) -> str:
        """Return the text at a tick.

        Parameters
        ----------
        tick : float
            Where it is.

        Returns
        -------
        str
        """
        if self.is_time:
            return format_date(tick)
        if self.is_log and (tick >= 1e5 or tick < 1e-3):
            return f"1e{round(math.log10(tick))}"
        text = f"{tick:.10g}" if abs(tick) < 1e5 else f"{tick:.3g}"
        return f"{tick:,.0f}" if abs(tick) >= 1000 and tick == round(tick) else text

    def _choose_ticks(self, low: float, high: float) -> list[float]:
        if self.is_log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            leading = [1] if len(decades) > 3 else [1, 2, 5]
            return [first * 10.0**decade for decade in decades for first in leading]
        rough = (high - low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(s for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
        if self.is_time:
            days = (1, 2, 5, 10, 20, 30, 60, 90, 180, 365, 730)
            step = next((s for s in days if (high - low) / s <= 5), round(step) or 1)
        first = math.ceil(low / step - 1e-9)
        n = math.floor(high / step + 1e-9) - first + 1
        # Rounded, as 3 x 0.1 is not 0.3.
        return [round((first + i) * step, 12) for i in range(max(n, 0))]


class Plot:
    """A plot with two axes; what is drawn later lies above.

    Parameters
    ----------
    x, y : Axis
        Its axes.
    title : str
        Above it.
    width, height : int
        Of the whole, pixels.
    """

    def __init__(
        self, x: Axis, y: Axis, title: str = "", *, width: int = 560, height: int = 300
    ) -> None:
        self.x, self.y, self.title, self.width, self.height = x, y, title, width, height
        # Room for the texts at the ticks, and for the label beside them.
        longest = max((len(y.name(tick)) for tick in y.ticks), default=0)
        self._left = round(34 + CHARACTER_WIDTH * longest) if y.label or longest else 20
        self._parts: list[str] = []
        self._legend: list[tuple[str, str, str]] = []

    def _to_pixels(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, right = self._left, self.width - RIGHT
        top, bottom = TOP, self.height - BOTTOM
        return (
            left + self.x.place(x) * (right - left),
            bottom - self.y.place(y) * (bottom - top),
        )

    def draw_points(
        self,
        x: np.ndarray,
        y: np.ndarray,
        color: str,
        *,
        size: float = 3.0,
        opacity: float = 0.8,
        label: str = "",
    ) -> None:
        """Draw points; those outside of the axes are drawn at their edge.

        Parameters
        ----------
        x, y : (n,) float array
            Where; what is not finite is left out.
        color : str
            Of CSS.
        size : float
            Their diameter, pixels.
        opacity : float
            0 to 1.
        label : str
            Their name in the legend, if any.
        """
        px, py = self._inside(x, y)
        if len(px):
            # A line without length has round ends: a point in ten characters.
            path = "".join(
                f"M{a:.1f} {b:.1f}h0" for a, b in zip(px.tolist(), py.tolist(), strict=True)
            )
            self._parts.append(
                f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{size:g}" '
                f'stroke-linecap="round" stroke-opacity="{opacity:g}"/>'
            )
            self._add_label(label, color, "point")

    def draw_errors(
        self, x: np.ndarray, y: np.ndarray, error: np.ndarray, color: str, opacity: float = 0.5
    ) -> None:
        """Draw vertical bars from ``y - error`` to ``y + error``.

        Parameters
        ----------
        x, y, error : (n,) float array
            Where, and half the length.
        color : str
            Of CSS.
        opacity : float
            0 to 1.
        """
        px, low = self._inside(x, y - error)
        _, high = self._inside(x, y + error)
        if len(low) != len(high):
            return
        path = "".join(
            f"M{a:.1f} {b:.1f}V{c:.1f}"
            for a, b, c in zip(px.tolist(), low.tolist(), high.tolist(), strict=True)
            if b != c
        )
        if path:
            self._parts.append(
                f'<path d="{path}" fill="none" stroke="{color}" stroke-opacity="{opacity:g}"/>'
            )

    def draw_line(
        self,
        x: np.ndarray,
        y: np.ndarray,
        color: str,
        *,
        width: float = 2.0,
        dashes: str = "",
        label: str = "",
    ) -> None:
        """Draw a line through points.

        Parameters
        ----------
        x, y : (n,) float array
            The points, in order.
        color : str
            Of CSS.
        width : float
            In pixels.
        dashes : str
            As ``stroke-dasharray``; none by default.
        label : str
            Its name in the legend, if any.
        """
        px, py = self._inside(x, y)
        if len(px) > 1:
            path = "M" + "L".join(
                f"{a:.1f} {b:.1f}" for a, b in zip(px.tolist(), py.tolist(), strict=True)
            )
            dash = f' stroke-dasharray="{dashes}"' if dashes else ""
            self._parts.append(
                f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dash} '
                'stroke-linejoin="round"/>'
            )
            self._add_label(label, color, "dash" if dashes else "line")

    def draw_level(self, y: float, color: str = MUTED, dashes: str = "4 3") -> None:
        """Draw a horizontal line from edge to edge.

        Parameters
        ----------
        y : float
            Where.
        color : str
            Of CSS.
        dashes : str
            As ``stroke-dasharray``.
        """
        self.draw_line(
            np.array([self.x.low, self.x.high]), np.array([y, y]), color, width=1, dashes=dashes
        )

    def draw_bars(
        self,
        left: np.ndarray,
        right: np.ndarray,
        top: np.ndarray,
        color: str,
        *,
        opacity: float = 1.0,
        label: str = "",
    ) -> None:
        """Draw bars from the lower edge.

        Parameters
        ----------
        left, right, top : (n,) float array
            Their edges.
        color : str
            Of CSS.
        opacity : float
            0 to 1.
        label : str
            Their name in the legend, if any.
        """
        a, top_y = self._to_pixels(left, top)
        b, _ = self._to_pixels(right, top)
        bottom = self.height - BOTTOM
        path = "".join(
            f"M{p:.1f} {bottom}V{min(max(t, TOP), bottom):.1f}H{q:.1f}V{bottom}z"
            for p, q, t in zip(a.tolist(), b.tolist(), top_y.tolist(), strict=True)
            if math.isfinite(t) and t < bottom
        )
        if path:
            self._parts.append(f'<path d="{path}" fill="{color}" fill-opacity="{opacity:g}"/>')
            self._add_label(label, color, "bar")

    def draw_polygons(
        self,
        polygons: Iterable[np.ndarray],
        color: str,
        *,
        fill_opacity: float = 0.04,
        label: str = "",
    ) -> None:
        """Draw closed outlines.

        Parameters
        ----------
        polygons : iterable of (k, 2) float array
            The corners of each.
        color : str
            Of CSS.
        fill_opacity : float
            Of their inside.
        label : str
            Their name in the legend, if any.
        """
        pieces = []
        for corners in polygons:
            px, py = self._to_pixels(corners[:, 0], corners[:, 1])
            if np.isfinite(px).all() and np.isfinite(py).all():
                pieces.append(f"M{'L'.join(_format_places(px, py))}z")
        # One path each, so that overlaps are darker.
        self._parts += [
            f'<path d="{piece}" fill="{color}" fill-opacity="{fill_opacity:g}" stroke="{color}" '
            'stroke-opacity=".35" stroke-width=".8"/>'
            for piece in pieces
        ]
        if pieces:
            self._add_label(label, color, "bar")

    def draw_density(
        self, x: np.ndarray, y: np.ndarray, color: str, *, cell: int = 6, label: str = ""
    ) -> None:
        """Draw how many points there are, in squares: the more, the darker.

        Parameters
        ----------
        x, y : (n,) float array
            Where they are.
        color : str
            Of CSS.
        cell : int
            Side of a square, pixels.
        label : str
            Their name in the legend, if any.
        """
        px, py = self._to_pixels(x, y)
        kept = np.isfinite(px) & np.isfinite(py)
        key, counts = np.unique(
            (px[kept] // cell).astype(np.int64) * 100_000 + (py[kept] // cell).astype(np.int64),
            return_counts=True,
        )
        if not len(key):
            return
        level = np.ceil(6 * np.log1p(counts) / np.log1p(counts.max())).astype(int)
        for one in np.unique(level):
            corners = key[level == one]
            path = "".join(
                f"M{cell * (k // 100_000)} {cell * (k % 100_000)}h{cell}v{cell}h-{cell}z"
                for k in corners.tolist()
            )
            self._parts.append(f'<path d="{path}" fill="{color}" fill-opacity="{0.13 * one:.2f}"/>')
        self._add_label(label, color, "bar")

    def write(
        self, x: float, y: float, text: str, color: str = MUTED, anchor: str = "middle"
    ) -> None:
        """Write text into the plot.

        Parameters
        ----------
        x, y : float
            Where.
        text : str
            Any; it is escaped.
        color : str
            Of CSS.
        anchor : str
            ``start``, ``middle`` or ``end``.
        """
        px, py = self._to_pixels(np.array([x]), np.array([y]))
        self._parts.append(
            f'<text x="{px[0]:.1f}" y="{py[0]:.1f}" text-anchor="{anchor}" '
            f'fill="{color}">{show(text)}</text>'
        )

    def _inside(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels of points, moved to the edge of the plot where they are outside."""
        px, py = self._to_pixels(np.asarray(x), np.asarray(y))
        kept = np.isfinite(px) & np.isfinite(py)
        return (
            np.clip(px[kept], self._left, self.width - RIGHT),
            np.clip(py[kept], TOP, self.height - BOTTOM),
        )

    def _add_label(self, label: str, color: str, kind: str) -> None:
        if label:
            self._legend.append((label, color, kind))

    def render(self) -> str:
        """Return the figure.

        Returns
        -------
        str
            An ``svg`` element.
        """
        left, right, top, bottom = self._left, self.width - RIGHT, TOP, self.height - BOTTOM
        out = [
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" font-size="{FONT_SIZE}" '
            f'fill="{INK}"><title>{show(self.title)}</title>',
            f'<text x="{left}" y="16" font-weight="600">{show(self.title)}</text>',
        ]
        for tick in self.x.ticks:
            px = left + float(self.x.place(tick)) * (right - left)
            out.append(f'<path d="M{px:.1f} {top}V{bottom}" stroke="{GRID}"/>')
            out.append(
                f'<text x="{px:.1f}" y="{bottom + 16}" text-anchor="middle" fill="{MUTED}">'
                f"{show(self.x.name(tick))}</text>"
            )
        for tick in self.y.ticks:
            py = bottom - float(self.y.place(tick)) * (bottom - top)
            out.append(f'<path d="M{left} {py:.1f}H{right}" stroke="{GRID}"/>')
            out.append(
                f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end" fill="{MUTED}">'
                f"{show(self.y.name(tick))}</text>"
            )
        out += self._parts
        out.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#9aa5b0"/>')
        middle = (left + right) / 2
        out.append(
            f'<text x="{middle:g}" y="{self.height - 8}" text-anchor="middle">'
            f"{show(self.x.label)}</text>"
        )
        middle = (top + bottom) / 2
        out.append(
            f'<text transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">'
            f"{show(self.y.label)}</text>"
        )
        out += self._render_legend(right)
        out.append("</svg>")
        return "".join(out)

    def _render_legend(self, right: float) -> list[str]:
        """Return the legend: one line at the right of the title."""
        out: list[str] = []
        x = right - sum(22 + CHARACTER_WIDTH * len(label) for label, _, _ in self._legend)
        for label, color, kind in self._legend:
            if kind in ("line", "dash"):
                dash = ' stroke-dasharray="4 3"' if kind == "dash" else ""
                mark = f'<path d="M{x:.1f} 12h12" stroke="{color}" stroke-width="2"{dash}/>'
            elif kind == "bar":
                place = f'x="{x + 2:.1f}" y="7" width="9" height="9"'
                mark = f'<rect {place} fill="{color}" fill-opacity=".7"/>'
            else:
                mark = f'<circle cx="{x + 7:.1f}" cy="12" r="3.5" fill="{color}"/>'
            out.append(f'{mark}<text x="{x + 15:.1f}" y="16" fill="{MUTED}">{show(label)}</text>')
            x += 22 + CHARACTER_WIDTH * len(label)
        return out
