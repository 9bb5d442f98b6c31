"""The few pieces of HTML a report is made of. Nothing is loaded from anywhere: style and pictures are in the page."""

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of figures that follow the page's theme: what matplotlib writes -> a variable of _STYLE.
_THEMED = {
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.BLUE: "--blue",
    style.VERMILION: "--vermilion",
    style.PANEL: "--panel",
}

_STYLE = """
:root { --page: #ffffff; --ink: #1b1f24; --muted: #57606a; --panel: #f2f4f7; --line: #d8dde3; --blue: #0072b2;
  --vermilion: #c25400; --good: #d9ecf7; --bad: #fbe3d3; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --muted: #9aa4ae; --panel: #1f2429;
  --line: #39414a; --blue: #3d8bd0; --vermilion: #f0883e; --good: #173646; --bad: #4a2a14; } }
body { background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; max-width: 1280px;
  margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; } p { margin: .3rem 0; } .muted { color: var(--muted); }
nav a { margin-right: 1rem; } a { color: var(--blue); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--muted); white-space: nowrap; } td.n, th.n { text-align: right; }
.tight td { white-space: nowrap; }
.good { background: var(--good); } .bad { background: var(--bad); } .ended { color: var(--vermilion); font-weight: 600; }
figure { margin: .5rem 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; }
pre { background: var(--panel); padding: .6rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8rem; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .2rem 0; } details { margin: .2rem 0; }
@page { size: A4 landscape; margin: 12mm; }
@media print { :root { --page: #ffffff; --ink: #000000; --muted: #444444; --panel: #ffffff; --line: #bbbbbb;
  --blue: #0072b2; --vermilion: #c25400; --good: #e4f0f8; --bad: #fbe3d3; }
  body { max-width: none; padding: 0; font-size: 10px; } * { print-color-adjust: exact; } nav { display: none; }
  .wide, figure { overflow: visible; } table { font-size: 8px; } th, td, thead th, .tight td { padding: 1px 4px;
  white-space: normal; overflow-wrap: anywhere; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  details.printed::details-content { content-visibility: visible; height: auto; } }
"""


def page(title: str, sections: list[tuple[str, str]], head: str) -> str:
    """A whole document: `head`, links to the sections, the sections (title, body)."""
    names = [(re.sub(r"[^a-z]+", "-", name.lower()).strip("-"), name, body) for name, body in sections]
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in names)
    bodies = "\n".join(f'<section id="{key}"><h2>{escape(name)}</h2>\n{body}</section>' for key, name, body in names)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{head}"
        f"<nav>{links}</nav>\n{bodies}\n</body></html>\n"
    )


def table(header: list[str], rows: list[list[Any]], numbers: frozenset[int] = frozenset(), css: str = "") -> str:
    """Cells are text, or (text, class). `numbers` are the columns that are set to the right."""

    def cell(tag: str, at: int, value: Any) -> str:
        text, css = value if isinstance(value, tuple) else (value, "")
        names = " ".join(filter(None, ["n" if at in numbers else "", css]))
        return _element(tag, text, names)

    top = "".join(cell("th", i, name) for i, name in enumerate(header))
    body = "\n".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide {css}"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'


def folded(summary: str, body: str, css: str = "", printed: bool = False, shown: bool = False) -> str:
    """A part of the page that opens when asked to; on paper it is open if `printed`, from the start if `shown`."""
    named = (' class="printed"' if printed else "") + (" open" if shown else "")
    return f"<details{named}>{_element('summary', summary, css)}{body}</details>\n"


def code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>\n"


def paragraph(text: str, css: str = "") -> str:
    return _element("p", text, css) + "\n"


def _element(tag: str, text: Any, css: str) -> str:
    named = f' class="{css}"' if css else ""
    return f"<{tag}{named}>{escape(str(text))}</{tag}>"


def picture(figure: "Figure", name: str, alternative: str) -> str:
    """The figure as SVG in the page, its text as text, its inks those of the theme."""
    import matplotlib

    out = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "hatch.linewidth": 0.8}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _THEMED.items():
        svg = svg.replace(colour, f"var({variable})")
    # Ids are unique within a figure only.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alternative, quote=True)}"', 1)
    return f"<figure>{svg}</figure>\n"
