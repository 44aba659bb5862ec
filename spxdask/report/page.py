"""The report as one HTML page, which needs neither a network nor scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from spxdask.report import figures
from spxdask.report.collect import Drawing
from spxdask.report.frames import STATES
from spxdask.report.svg import Plot, format_date, show
from spxdask.text import format_count, format_duration

__all__ = ["render_page"]

MAX_IDS_SHOWN = 1000
MAX_NAMES_SHOWN = 5
MAX_WARNINGS_SHOWN = 20

# Nothing is loaded, and nothing is run, whatever is in the texts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SECTIONS = (
    ("sky", "Sky and epochs"),
    ("coverage", "Spectral coverage"),
    ("frames", "Frames"),
    ("detectors", "Detectors"),
    ("astrometry", "Astrometry"),
    ("rows", "Rows and flags"),
    ("errors", "Errors"),
    ("fluxes", "Fluxes"),
    ("spectra", "Spectra"),
    ("missing", "Sources without a row"),
    ("made", "How it was made"),
)


def render_page(numbers: dict[str, Any], drawing: Drawing) -> str:
    """Return the report.

    Parameters
    ----------
    numbers : dict
        As from `collect_numbers`.
    drawing : Drawing
        Of the same.

    Returns
    -------
    str
        One whole HTML page, the same for the same numbers.
    """
    body = {
        "sky": _render_sky(numbers, drawing),
        "coverage": _render_coverage(numbers),
        "frames": _render_frames(numbers),
        "detectors": _render_detectors(numbers, drawing),
        "astrometry": _render_astrometry(numbers, drawing),
        "rows": _render_rows(numbers),
        "errors": _render_errors(numbers, drawing),
        "fluxes": _render_fluxes(numbers, drawing),
        "spectra": _render_spectra(drawing),
        "missing": _render_missing(numbers),
        "made": _render_making(numbers),
    }
    sections = "".join(
        f'<section id="{key}"><h2>{title}</h2>{body[key]}</section>' for key, title in SECTIONS
    )
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in SECTIONS)
    title = f"spxdask: {_name_field(numbers['run'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{show(title)}</title><style>{_read_style()}</style></head>\n<body>"
        f"{_render_header(numbers)}<main><nav>{links}</nav>{sections}</main>"
        f"<footer>spxdask {show(numbers['run']['versions']['spxdask'])}. The same numbers are in "
        "report.json.</footer></body></html>\n"
    )


def _read_style() -> str:
    return resources.files("spxdask.report").joinpath("style.css").read_text("utf-8")


def _name_field(run: dict[str, Any]) -> str:
    region = run["region"]
    if region.get("mode") == "target":
        return str(run["target"])
    if region.get("center_ra") is not None and region.get("mode") == "circle":
        return (
            f"{region['radius_deg']:g} deg about {region['center_ra']:.4f}, "
            f"{region['center_dec']:+.4f}"
        )
    return f"the sky of {format_count(run['n_sources'], 'source')}"


def _render_header(numbers: dict[str, Any]) -> str:
    run, frames, rows = numbers["run"], numbers["frames"], numbers["rows"]
    origin = run["catalogue"] or run["target"] or ""
    dates = ""
    if run["first_mjd"] is not None:
        dates = f", observed {format_date(run['first_mjd'])} to {format_date(run['last_mjd'])}"
    releases = ", ".join(r["release"].upper() for r in frames["by_release"])
    lead = (
        f"{format_count(run['n_sources'], 'source')} of {origin}{dates}"
        + (f", {releases}" if releases else "")
        + (f". Archive asked {_show_time(run['query_time'])}" if run["query_time"] else "")
        + (f", last frame ended {_show_time(run['last_outcome'])}." if run["last_outcome"] else ".")
    )
    counts = frames["by_state"]
    facts = [
        (f"{counts['measured']:,}", f"of {format_count(frames['found'], 'frame')} measured"),
        (f"{counts['failed']:,}", "failed"),
        (f"{rows['total']:,}", "rows"),
        (_percent(rows["good"], rows["total"]), "of them good"),
        (f"{run['n_sources'] - numbers['missing_sources']['n']:,}", "sources with a row"),
        (f"{numbers['coverage']['covered_channels']}", "of 102 channels covered"),
    ]
    verdict = "".join(
        f'<li class="{sentence["level"]}">{show(sentence["text"])}</li>'
        for sentence in numbers["verdict"]
    )
    cells = "".join(f"<div><b>{value}</b><span>{show(name)}</span></div>" for value, name in facts)
    return (
        f"<header><h1>{show(_capitalise(_name_field(run)))}</h1>"
        f'<p class="lead">{show(lead)}</p><div class="facts">{cells}</div>'
        f'<ul class="verdict">{verdict}</ul></header>'
    )


def _show_time(time: str) -> str:
    """Return a time in ISO 8601 as people write it."""
    return time.replace("T", " ").replace("+00:00", " UTC")


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _render_sky(numbers: dict[str, Any], drawing: Drawing) -> str:
    """Return the map, and what there is a source, beside it or below."""
    plot, caption = figures.plot_sky(drawing)
    table = _table(
        ("band", "sources", "rows", "median rows a source", "most"),
        [
            (
                b["band"],
                f"{b['sources']:,}",
                f"{b['rows']:,}",
                f"{b['median_rows_per_source']:g}",
                f"{b['max_rows_per_source']:,}",
            )
            for b in numbers["coverage"]["bands"]
        ],
    )
    epochs = _figure(figures.plot_rows_per_source(numbers), "All bands together.")
    sky = _figure(plot, caption)
    if plot.width > 600:
        return f'{sky}<div class="pair">{epochs}<div>{table}</div></div>'
    return f'<div class="pair">{sky}<div>{epochs}{table}</div></div>'


def _render_coverage(numbers: dict[str, Any]) -> str:
    caption = "Dark: good rows. 17 channels a band."
    return _figure(figures.plot_channels(numbers), caption)


def _render_frames(numbers: dict[str, Any]) -> str:
    frames = numbers["frames"]
    states = [s for s in STATES if s == "measured" or frames["by_state"][s]]
    tables = []
    for column in ("band", "release"):
        lines = [
            (
                r[column].upper() or "-",
                f"{r['found']:,}",
                *(f"{r[s]:,}" for s in states),
                f"{r['rows']:,}",
                f"{r['bytes'] / 1e9:.3g}",
            )
            for r in frames[f"by_{column}"]
        ]
        tables.append(f"<div>{_table((column, 'found', *states, 'rows', 'GB'), lines)}</div>")
    out = [f'<div class="pair">{"".join(tables)}</div>']
    if frames["failures"]:
        lines = [
            (
                f"{f['n']:,}",
                f["stage"],
                f["reason"],
                ", ".join(f["filenames"][:MAX_NAMES_SHOWN])
                + (f" and {f['n'] - MAX_NAMES_SHOWN:,} more" if f["n"] > MAX_NAMES_SHOWN else ""),
            )
            for f in frames["failures"]
        ]
        out.append("<h3>Failures by reason</h3>")
        out.append(_table(("frames", "stage", "reason", "files"), lines, text=(1, 2, 3)))
        out.append("<p>This command tries the failed frames again, and nothing else:</p>")
        out.append(f"<pre>{show(frames['retry_command'])}</pre>")
    if frames["warnings"]:
        ranked = sorted(frames["warnings"].items(), key=lambda item: (-item[1], item[0]))
        lines = [(f"{n:,}", text) for text, n in ranked[:MAX_WARNINGS_SHOWN]]
        out += ["<h3>Warnings</h3>", _table(("frames", "warning"), lines, text=(1,))]
        if len(ranked) > MAX_WARNINGS_SHOWN:
            out.append(f"<p>{len(ranked) - MAX_WARNINGS_SHOWN:,} more are in report.json.</p>")
    return "".join(out)


def _render_detectors(numbers: dict[str, Any], drawing: Drawing) -> str:
    plots = (
        ("zodi_scale", "Scale of the zodiacal model", "scale"),
        ("background", "Local background", "uJy / arcsec^2"),
        ("aperture_radius", "Aperture radius", "pixels"),
    )
    drawn = "".join(_figure(figures.plot_time(drawing, *plot)) for plot in plots)

    def pair(d: dict[str, Any], name: str, digits: int) -> str:
        value, scatter = d[name], d[f"{name}_scatter"]
        return "-" if value is None else f"{value:.{digits}f} ± {scatter:.{digits}f}"

    lines = [
        (
            d["band"],
            f"{d['frames']:,}",
            f"{d['zodi_not_fitted']:,}",
            pair(d, "zodi_scale", 3),
            pair(d, "background", 4),
            pair(d, "aperture_radius", 3),
        )
        for d in numbers["frames"]["detectors"]
    ]
    names = ("band", "frames", "zodi not fitted", "zodi scale", "background", "aperture radius")
    table = _table(names, lines)
    return (
        f'<div class="pair">{drawn}<div>{table}<p class="muted">Medians over frames, and half the '
        "range of the middle 68 %.</p></div></div>"
    )


def _render_astrometry(numbers: dict[str, Any], drawing: Drawing) -> str:
    found = numbers["frames"]["astrometry"]
    limit = f"{found['max_offset']:g} pixels"
    text = (
        "<p>Where the light of bright isolated sources is, by a fit of the PSF, minus where the "
        "WCS of the frame puts the position in the catalogue. x and y are those of the detector; a "
        "pixel has 6.15 arcsec.</p>"
    )
    if not found["detectors"]:
        return f"{text}<p>No frame has such a source.</p>"

    def pair(value: float, scatter: float) -> str:
        # Without a zero below zero.
        return f"{round(value, 4) + 0.0:+.4f} ± {scatter:.4f}"

    lines = [
        (
            d["band"],
            f"{d['stars']:,}",
            pair(d["dx"], d["dx_scatter"]),
            pair(d["dy"], d["dy_scatter"]),
            "-" if d["scatter"] is None else f"{d['scatter']:.4f}",
            f"{d['error']:.4f}",
        )
        for d in found["detectors"]
    ]
    names = ("band", "offsets", "dx", "dy", "scatter", "error")
    drawn, is_limit_drawn = figures.plot_astrometry(numbers, drawing)
    place = "Dashed" if is_limit_drawn else "Outside of the figure"
    plot = _figure(
        drawn,
        "Small: the median of each frame. Large: that of each detector. "
        f"{place}: {limit}, which take about one percent from a flux.",
    )
    note = (
        '<p class="muted">Medians, and half the range of the middle 68 % of the frames, each of '
        "which counts by its offsets; scatter of single sources within a frame along one axis, and "
        "their error from VARIANCE. More scatter than that is of the catalogue (errors, proper "
        "motions, extended sources) or of the PSF.</p>"
    )
    off = ""
    if found["frames_off"]:
        ranked = sorted(found["frames_off"], key=lambda f: (-f["offset"], f["filename"]))
        rows = [(f["filename"], f"{f['offset']:.3f}") for f in ranked[:MAX_WARNINGS_SHOWN]]
        off = f"<h3>Frames with more than {limit}</h3>" + _table(("file", "offset"), rows)
        if len(ranked) > MAX_WARNINGS_SHOWN:
            off += f"<p>{len(ranked) - MAX_WARNINGS_SHOWN:,} more are in report.json.</p>"
    return f'{text}<div class="pair">{plot}<div>{_table(names, lines)}{note}{off}</div></div>'


def _render_rows(numbers: dict[str, Any]) -> str:
    rows, frames = numbers["rows"], numbers["frames"]
    lines = [
        (
            flag["name"],
            "yes" if flag["rejects"] else "",
            f"{flag['rows']:,}",
            _percent(flag["rows"], rows["total"]),
            _Raw(
                f'<span class="share" style="width:{120 * (flag["fraction"] or 0):.0f}px"></span>'
            ),
            flag["meaning"],
        )
        for flag in rows["flags"]
        if flag["rows"]
    ]
    clean = ", ".join(flag["name"] for flag in rows["flags"] if not flag["rows"])
    names = ("flag", "speaks against", "rows", "share", "", "meaning")
    out = [
        f"<p>{format_count(rows['total'], 'row')} in {format_count(rows['tables'], 'table')}: "
        f"{rows['with_flux']:,} with a flux, {rows['with_psf_flux']:,} with a PSF flux, "
        f"{rows['good']:,} good. {rows['rejected_by_flags']:,} have a flag that speaks against "
        "them in their aperture.</p>",
        _table(names, lines, text=(0, 4, 5)),
    ]
    if clean:
        out.append(f'<p class="muted">In no aperture: {show(clean)}.</p>')
    counted = (
        ("Sources on a frame without a row there", "measurements", rows["sources_left_out"]),
        ("Rows without psf_flux", "rows", frames["rows_without_psf_flux"]),
        ("Tables that could not be read", "tables", rows["tables_not_read"]),
    )
    for title, unit, counts in counted:
        if counts:
            reasons = [(f"{n:,}", reason) for reason, n in counts.items()]
            out += [f"<h3>{title}</h3>", _table((unit, "reason"), reasons, text=(1,))]
    return "".join(out)


def _render_errors(numbers: dict[str, Any], drawing: Drawing) -> str:
    checks = numbers["checks"]
    drawn = any(values.shape[1] for values in drawing.triplets.values())
    sample = ""
    if checks["every_nth_source"] > 1:
        sample = f" One in {checks['every_nth_source']:,} sources of the catalogue was looked at."
    text = (
        "<p>Each total flux of a good row is compared with the straight line through its two "
        "neighbours in wavelength, of the same source, band and release, where the three lie "
        "within one spectral channel. A constant source scatters about that line by its errors and "
        "nothing else: chi^2 is 1 where they are honest. Sources are isolated: neighbours in the "
        f"catalogue put less than 1 % of their light into the aperture.{sample}</p>"
    )
    if not drawn:
        return f"{text}<p>No source has three such fluxes yet: more epochs are needed.</p>"
    plots = _figure(
        figures.plot_rms(numbers, drawing),
        "A point a source. Lines: scatter of the middle 68 %, and dashed the errors quoted.",
    ) + _figure(figures.plot_chi2(numbers, drawing), "Lines: of the middle 68 % of the fluxes.")
    tables = []
    for found in checks["errors"].values():
        lines = [
            _describe_bin(f"{b['magnitude'][0]:g} to {b['magnitude'][1]:g}", b)
            for b in found["by_magnitude"]
        ]
        if found["bright"]["fluxes"]:
            lines.append(_describe_bin("S/N > 20", found["bright"]))
        names = ("mag AB", "sources", "fluxes", "rms, %", "quoted, %", "chi^2", "mean chi^2")
        table = _table(names, lines)
        tables.append(f"<div><h3>{show(found['flux'])}</h3>{table}</div>")
    return f'{text}<div class="pair">{plots}{"".join(tables)}</div>'


def _describe_bin(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{found['sources']:,}",
        f"{found['fluxes']:,}",
        f"{100 * found['rms']:.2f}" if found["rms"] is not None else "",
        f"{100 * found['error']:.2f}",
        f"{found['chi2']:.2f}",
        f"{found['mean_chi2']:.2f}",
    )


def _render_fluxes(numbers: dict[str, Any], drawing: Drawing) -> str:
    checks = numbers["checks"]
    cells = []
    if drawing.measures is not None and len(drawing.measures.ratio):
        plot = figures.plot_measures(drawing.measures)
        table = _table_of_ratios(checks["psf_over_aperture"])
        cells.append(
            f"<div>{_figure(plot, 'Isolated sources, S/N above 20. Line: median.')}{table}</div>"
        )
    for name, ratios in drawing.releases.items():
        plot = figures.plot_releases(name.upper(), ratios)
        caption = (
            "Fluxes of one over those of the other, interpolated in wavelength. Black: medians."
        )
        table = _table_of_ratios(checks["releases"][name])
        cells.append(f"<div>{_figure(plot, caption)}{table}</div>")
    if not cells:
        return "<p>There is nothing to compare: no PSF fluxes, and one release.</p>"
    return f'<div class="pair">{"".join(cells)}</div>'


def _table_of_ratios(bands: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            b["band"],
            f"{b['n']:,}",
            f"{b['median']:.4f} ± {b['error']:.4f}",
            f"{100 * b['scatter']:.2f}",
        )
        for b in bands
    ]
    return _table(("band", "ratios", "median", "scatter, %"), lines)


def _render_spectra(drawing: Drawing) -> str:
    if not drawing.spectra:
        return "<p>No source has good rows yet.</p>"
    plots = "".join(_figure(figures.plot_spectrum(s)) for s in drawing.spectra)
    measure = drawing.spectra[0].measure
    name = "psf_flux" if measure == "psf" else "flux x aperture_correction"
    return (
        f"<p>Well covered isolated sources, from bright to faint: {name} of all good rows, not "
        f'binned, with its errors.</p><div class="triple">{plots}</div>'
    )


def _render_missing(numbers: dict[str, Any]) -> str:
    missing = numbers["missing_sources"]
    if not missing["n"]:
        return "<p>None.</p>"
    shown = missing["ids"][:MAX_IDS_SHOWN]
    more = ""
    if missing["n"] > len(shown):
        more = f"<p>And {missing['n'] - len(shown):,} more, see report.json.</p>"
    names = "<br>".join(map(show, shown))
    total = format_count(numbers["run"]["n_sources"], "source")
    return f'<p>{missing["n"]:,} of {total}.</p><div class="ids">{names}</div>{more}'


def _render_making(numbers: dict[str, Any]) -> str:
    calibration, timings, run = numbers["calibration"], numbers["timings"], numbers["run"]
    lines = [(token, "") for token in calibration["used"]]
    lines += [(family, f"not used: {why}") for family, why in calibration["missing"].items()]
    tokens = _table(("product", ""), lines, text=(0, 1)) if lines else "<p>None.</p>"
    times = [
        ("download", f"{format_duration(timings['download_seconds'])} in tasks"),
        ("extract", f"{format_duration(timings['extract_seconds'])} in tasks"),
    ]
    if timings["aggregate_seconds"]:
        times.append(("aggregate", format_duration(timings["aggregate_seconds"])))
    times += [
        ("fetched", f"{timings['bytes_fetched'] / 1e9:.3g} GB"),
        ("tables", f"{timings['bytes_of_tables'] / 1e6:.3g} MB"),
        ("first frame ended", _show_time(run["first_outcome"] or "-")),
        ("last frame ended", _show_time(run["last_outcome"] or "-")),
    ]
    versions = [(name, version) for name, version in run["versions"].items()]
    options = dict(numbers["configuration"])
    measuring = options.pop("photometry", {}) or {}
    options |= {f"photometry.{name}": value for name, value in measuring.items()}
    config = _table(
        ("option", "value"), [(k, _as_text(v)) for k, v in options.items()], text=(0, 1)
    )
    links = ", ".join(
        f'<a href="{show(url)}">{name.upper()}</a>'
        for name, url in numbers["citation"].items()
        if url.startswith("https://")
    )
    psf = ", ".join(calibration["psf"]) or "none"
    return (
        f'<div class="pair"><div><h3>Calibration products</h3>{tokens}'
        f'<p class="muted">PSF: {show(psf)}.</p></div>'
        f"<div><h3>Time and bytes</h3>{_table(('', ''), times, text=(0, 1))}"
        f"<h3>Versions</h3>{_table(('', ''), versions, text=(0, 1))}</div></div>"
        f"<details><summary>Configuration: {len(options)} options</summary>{config}</details>"
        f"<h3>Citation</h3><p>{show(numbers['citation']['acknowledgment'])}</p>"
        f"<p>Cite the release as well: {links}; and spxdask by its CITATION.cff.</p>"
    )


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_as_text(v)}" for k, v in value.items()) or "none"
    return "-" if value is None else str(value)


_BAR = '<span class="share" style="width:{:.0f}px"></span>'


class _Raw(str):
    """Markup of our own, which is not escaped."""


def _table(names: Sequence[str], lines: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """Return a table; columns that are text are given by number, the others are numbers."""

    def cell(kind: str, i: int, value: str) -> str:
        style = ' class="t"' if i in text else ""
        return f"<{kind}{style}>{value if isinstance(value, _Raw) else show(value)}</{kind}>"

    rows = "".join(
        f"<tr>{''.join(cell('td', i, v) for i, v in enumerate(line))}</tr>" for line in lines
    )
    head = ""
    if any(names):
        head = "".join(cell("th", i, name) for i, name in enumerate(names))
        head = f"<thead><tr>{head}</tr></thead>"
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def _figure(plot: Plot, caption: str = "") -> str:
    words = f"<figcaption>{show(caption)}</figcaption>" if caption else ""
    return f"<figure>{plot.render()}{words}</figure>"


def _percent(part: int, whole: int) -> str:
    if not whole:
        return "-"
    percent = 100 * part / whole
    return (
        "100 %"
        if part == whole
        else f"{min(percent, 99.9):.1f} %"
        if percent >= 1
        else f"{percent:.2f} %"
    )
