"""What all figures share: colours, hatches, stages, and how they are written.

Importing this module imports matplotlib.
"""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from ssn_plugin.checkpoint.whole_file import whole_file

STATISTIC_NAMES = {'mean': 'mean', 'var': 'variance'}
# Okabe and Ito's palette, which stays distinct with every colour vision; the hatches tell the
# normalizers apart without any colour.
NORMALIZER_COLOURS = {'IN': '#E69F00', 'LN': '#56B4E9', 'BN': '#009E73', 'GN': '#CC79A7'}
NORMALIZER_HATCHES = {'IN': '', 'LN': '///', 'BN': '...', 'GN': 'xxx'}
# Names that stand for candidates of a file that does not name them.
_NUMBERED = ('#F2F2F2', '#BFBFBF', '#8C8C8C', '#595959')
_STYLE = {
    'font.family': 'sans-serif',
    'hatch.linewidth': 0.5,
    'svg.fonttype': 'none',  # text stays text: searchable, and a tenth of the size
    'svg.hashsalt': 'ssn_plugin',  # the same figure gives the same file
}
_DPI = 130


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sized in inches, that makes room for what stands outside its axes."""
    figure = Figure(figsize=(width, height), layout='constrained')
    figure.get_layout_engine().set(hspace=0.03)
    return figure


def plain(text: str) -> str:
    """A text that matplotlib shows as it is, were it a file name with dollar signs."""
    return text.replace('$', r'\$')


def in_lines(text: str, width: int) -> str:
    """A text in lines of about that many letters, which end at spaces and within names at marks.

    Example:
        >>> from ssn_plugin.analysis.figures import in_lines
        >>> in_lines('work_dirs/mask-rcnn_r18_fpn', 10).split()
        ['work_dirs/', 'mask-rcnn_', 'r18_fpn']
    """
    lines = ['']
    for piece in re.findall(r'[^\s/_.:-]*[\s/_.:-]?', text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append('')
        lines[-1] += piece
    return '\n'.join(line.rstrip() for line in lines)


def write_title(figure: Figure, title: str) -> None:
    """Write a title between the borders and the legend, in more lines where it is too long."""
    # The legend takes one inch, and a centred title loses it on both sides; an inch holds
    # about 9.5 letters.
    wide = max(int(9.5 * (figure.get_size_inches()[0] - 2)), 20)
    figure.suptitle('\n'.join(plain(in_lines(line, wide)) for line in title.split('\n')))


def normalizer_style(name: str) -> dict:
    """Colour and hatch of the area of a normalizer.

    Args:
        name: 'IN', 'LN', 'BN', 'GN', or the number of a candidate without a name.
    """
    colour = NORMALIZER_COLOURS.get(name)
    if colour is None:
        colour = _NUMBERED[int(name) % len(_NUMBERED)] if name.isdigit() else _NUMBERED[1]
    hatch = NORMALIZER_HATCHES.get(name, '')
    return dict(facecolor=colour, hatch=hatch, edgecolor='#00000066', linewidth=0)


def normalizer_legend(figure: Figure, names: Iterable[str]) -> None:
    """A legend of normalizers at the right of a figure."""
    handles = [Patch(label=name, **normalizer_style(name)) for name in names]
    figure.legend(handles=handles, loc='outside right upper', handlelength=2.2, handleheight=1.6)


def used_normalizers(candidates: Iterable[Sequence[str]]) -> list[str]:
    """All names of some layers' candidates, those known in the order of the palette.

    Example:
        >>> from ssn_plugin.analysis.figures import used_normalizers
        >>> used_normalizers([('BN', 'IN'), ('LN', 'GN')])
        ['IN', 'LN', 'BN', 'GN']
    """
    found = dict.fromkeys(name for names in candidates for name in names)
    known = [name for name in NORMALIZER_COLOURS if name in found]
    return known + sorted(name for name in found if name not in known)


def mark_stages(axes: Sequence[Axes], stages: Sequence[str], first: int = 0) -> None:
    """Part the stages of columns, shade every other one, and write names above the first axes.

    Args:
        axes: Axes above each other, of one column per layer.
        stages: Stage of each column.
        first: Number of the first stage, which tells whether it is shaded.
    """
    start = 0
    number = first
    above = axes[0].get_xaxis_transform() + ScaledTranslation(
        0, 9.5 / 72, axes[0].figure.dpi_scale_trans
    )
    for column in range(1, len(stages) + 1):
        if column < len(stages) and stages[column] == stages[start]:
            continue
        for ax in axes:
            if number % 2:
                ax.axvspan(start - 0.5, column - 0.5, color='#00000014', linewidth=0, zorder=0)
            if start:
                ax.axvline(start - 0.5, color='#000000aa', linewidth=1.2, zorder=0)
        axes[0].plot(
            (start - 0.4, column - 0.6),
            (1, 1),
            transform=above,
            color='#555555',
            linewidth=1,
            clip_on=False,
        )
        # The name of a narrow stage is written upwards.
        narrow = column - start < 0.35 * len(stages[start])
        axes[0].annotate(
            stages[start],
            ((start + column - 1) / 2, 1),
            (0, 12),
            xycoords=('data', 'axes fraction'),
            textcoords='offset points',
            ha='center',
            va='bottom',
            fontsize=9,
            rotation=90 if narrow else 0,
        )
        start = column
        number += 1


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the name of the file."""
    metadata = {'Date': None} if Path(path).suffix == '.svg' else None
    with matplotlib.rc_context(_STYLE), whole_file(path) as temporary:
        kind = Path(path).suffix[1:]
        figure.savefig(temporary, format=kind, dpi=_DPI, metadata=metadata, facecolor='white')


def save_both(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and as SVG into a folder, and return the files."""
    paths = [folder / f'{name}{suffix}' for suffix in ('.png', '.svg')]
    for path in paths:
        save_figure(figure, path)
    return paths


def as_svg(figure: Figure) -> str:
    """A figure as the text of an SVG element."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format='svg', metadata={'Date': None}, facecolor='white')
    text = buffer.getvalue()
    return text[text.index('<svg') :]


def as_image(figure: Figure, dpi: int = _DPI) -> np.ndarray:
    """A figure as an RGB image, uint8, (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    with matplotlib.rc_context(_STYLE):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
