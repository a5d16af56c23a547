"""The report of a training as one HTML page that needs nothing but itself.

Importing this module imports jinja2.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from ssn_plugin.analysis.config_summary import Section
from ssn_plugin.analysis.layer_ratios import STATISTICS, LayerRatios


class Picture(NamedTuple):
    """A figure of the page.

    Attributes:
        heading: Short title.
        caption: What is to be seen.
        svg: The figure, of :func:`ssn_plugin.analysis.figures.as_svg`.
    """

    heading: str
    caption: str
    svg: str


class Page(NamedTuple):
    """What the page says.

    Attributes:
        title: Of the run.
        status: One line: how far it is, and what came out.
        headlines: Names and values that stand first.
        sections: Facts of the config.
        pictures: Figures.
        rows: What each layer chose.
        config: Text of the whole config.
        versions: Names and versions.
    """

    title: str
    status: str
    headlines: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    pictures: Sequence[Picture]
    rows: Sequence[LayerRatios]
    config: str
    versions: Mapping[str, str]


def render_page(page: Page) -> str:
    """HTML of a page."""
    environment = Environment(
        loader=PackageLoader('ssn_plugin.analysis', 'templates'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [
        picture._replace(svg=_embeddable(picture, f'figure{number}'))
        for number, picture in enumerate(page.pictures, 1)
    ]
    layers = [
        dict(
            depth=depth,
            name=row.layer,
            place=row.place,
            channels=row.channels,
            choices=[
                dict(
                    selected=selected,
                    ratios=row.ratios(statistic),
                    fixed=getattr(row, f'{statistic}_fixed'),
                )
                for statistic, selected in zip(STATISTICS, row.selected, strict=True)
            ],
        )
        for depth, row in enumerate(page.rows, 1)
    ]
    template = environment.get_template('report.html.j2')
    return template.render(page=page, pictures=pictures, layers=layers)


def _embeddable(picture: Picture, prefix: str) -> str:
    """An SVG whose ids do not meet those of another one on the page, with its name for readers."""
    svg = re.sub(r'<metadata>.*?</metadata>', '', picture.svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace('url(#', f'url(#{prefix}-')
    label = picture.heading.replace('&', '&amp;').replace('"', '&quot;').replace('<', '&lt;')
    # Any smaller, the text could not be read; the box around the figure scrolls instead.
    width = 0.85 * float(re.search(r'\bwidth="([\d.]+)pt"', svg)[1])
    attributes = f'role="img" aria-label="{label}" style="min-width: {width:.0f}px"'
    return svg.replace('<svg', f'<svg {attributes}', 1)
