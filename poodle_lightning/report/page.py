"""HTML of the report: one file, nothing loaded from elsewhere, readable on a phone and in the dark."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from poodle_lightning.draw.canvas import DARK, LIGHT, Theme, figure_png, fit, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST = 640


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: heading.
        sentence: what it shows, in one sentence.
        body: HTML.
    """

    title: str
    sentence: str
    body: str

    @property
    def anchor(self) -> str:
        """Identifier of the heading."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def data_url(data: bytes) -> str:
    """A PNG inside an address."""
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def picture(image: Tensor, caption: str, widest: int = WIDEST) -> str:
    """A picture ``(3 or 4, H, W)`` in [0, 1] with its caption; larger ones are averaged down."""
    small = fit(image[None], widest)[0] if image.shape[-1] > widest else image
    kind = " class=pixels" if small.shape[-1] <= 64 else ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img{kind} alt="{escape(caption)}" src="{data_url(png(small))}">{text}</figure>'


def plot(draw: Callable[[Theme], Figure], caption: str) -> str:
    """A plot in the colours of day and of night; the reader's system chooses."""
    day, night = (data_url(figure_png(draw(theme))) for theme in (LIGHT, DARK))
    image = f'<img class=plot alt="{escape(caption)}" src="{day}">'
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{night}">{image}</picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def grid(figures: Iterable[str], columns: int, narrow: int) -> str:
    """Figures in rows of ``columns``, of ``narrow`` on a small screen."""
    return f'<div class=grid style="--wide:{columns};--narrow:{narrow}">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def facts(numbers: Mapping[str, str]) -> str:
    """Large numbers under small words."""
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in numbers.items())
    return f"<dl>{cells}</dl>"


def chips(colours: Mapping[str, Sequence[float]]) -> str:
    """A key: names with their RGB colours in [0, 1]."""
    entries = []
    for name, shade in colours.items():
        red, green, blue = (round(255 * c) for c in shade)
        entries.append(f'<li><i style="background:rgb({red} {green} {blue})"></i>{escape(name)}</li>')
    return f"<ul class=chips>{''.join(entries)}</ul>"


def beside(image: str, text: str) -> str:
    """A small picture with a sentence at its side."""
    return f"<div class=beside>{image}<p>{escape(text)}</p></div>"


def notice(text: str) -> str:
    """A sentence that must not be overlooked."""
    return f'<p class=notice role="alert">{escape(text)}</p>'


def folded(summary: str, text: str) -> str:
    """Preformatted text behind a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def page(title: str, top: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    parts = "".join(
        f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2><p>{escape(s.sentence)}</p>{s.body}</section>'
        for s in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><header><h1>{escape(title)}</h1>{top}<nav>{links}</nav></header><main>{parts}</main></body></html>\n"
    )


_STYLE = f"""
:root {{ color-scheme: light dark; --ground: {LIGHT.ground}; --text: {LIGHT.text}; --muted: {LIGHT.muted};
  --line: {LIGHT.grid}; --notice: #fff1e0; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: {DARK.ground}; --text: {DARK.text};
  --muted: {DARK.muted}; --line: {DARK.grid}; --notice: #4a2d10; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem;
  background: var(--ground); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 0 0 .25rem; }}
section {{ margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }}
section > p {{ margin: 0 0 1rem; color: var(--muted); max-width: 46rem; }}
section > p.notice, p.notice {{ background: var(--notice); color: var(--text); padding: .6rem .9rem;
  border-radius: .5rem; }}
nav {{ display: flex; flex-wrap: wrap; gap: .25rem 1rem; }}
nav a {{ color: var(--muted); }}
dl {{ display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 0 0 1rem; }}
dt {{ color: var(--muted); font-size: .8rem; }}
dd {{ margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }}
.grid {{ display: grid; grid-template-columns: repeat(var(--wide), 1fr); gap: .75rem; align-items: start;
  max-width: calc(var(--wide) * 26rem); margin-bottom: 1rem; }}
@media (max-width: 44rem) {{ .grid {{ grid-template-columns: repeat(var(--narrow), 1fr); gap: .5rem; }} }}
.beside {{ display: flex; gap: 1rem; align-items: center; color: var(--muted); }}
.beside figure {{ flex: 0 0 5rem; }}
.chips {{ display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; font-size: .8rem;
  color: var(--muted); }}
.chips i {{ display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .35rem; }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: auto; border-radius: .35rem; }}
img.pixels {{ image-rendering: pixelated; }}
figcaption {{ color: var(--muted); font-size: .8rem; margin-top: .25rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }}
th {{ color: var(--muted); font-weight: 500; }}
pre {{ overflow-x: auto; font-size: .8rem; line-height: 1.4; }}
summary {{ cursor: pointer; }}
"""
