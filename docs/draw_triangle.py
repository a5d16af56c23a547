"""Draw docs/images/triangle.png: how SparsestMax moves importance ratios into a corner.

Every point of the picture is computed by ``ssn_plugin.sparsestmax``.

Example:
    python docs/draw_triangle.py
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssn_plugin import sparsestmax
from ssn_plugin.analysis.figures import NORMALIZER_COLOURS
from ssn_plugin.ops.sparsestmax import circumradius

NAMES = ('IN', 'LN', 'BN')
CIRCUMRADIUS = circumradius(len(NAMES))
INRADIUS = 1 / math.sqrt(6)
RADII = (0.2, INRADIUS, 0.6, CIRCUMRADIUS)
# Control parameters of three layers: one that leans to IN, one to LN, one to BN.
CONTROLS = ((0.52, 0.20, 0.28), (0.30, 0.43, 0.27), (0.24, 0.36, 0.40))
# In the plane in which distances are those of the ratios: an equilateral triangle of side sqrt(2).
CORNERS = torch.tensor(
    [[-math.sqrt(0.5), 0.0], [math.sqrt(0.5), 0.0], [0.0, math.sqrt(1.5)]], dtype=torch.float64
)
CENTRE = CORNERS.mean(0)


def path_of(control: tuple[float, ...], radii: torch.Tensor) -> torch.Tensor:
    """Importance ratios of one layer at each radius, (len(radii), 3)."""
    z = torch.tensor(control, dtype=torch.float64)
    return torch.stack([sparsestmax(z, radius) for radius in radii])


def draw_simplex(ax: Axes, radii: torch.Tensor) -> None:
    """The triangle, the circle at some radii, and the paths of the layers."""
    triangle = CORNERS[[0, 1, 2, 0]]
    ax.plot(*triangle.T, color='black', linewidth=1.2)
    (shape,) = ax.fill(*triangle.T, color='none')
    angles = torch.linspace(0, 2 * math.pi, 400)
    directions = torch.stack((angles.cos(), angles.sin()), -1)
    for radius in RADII:
        (outside,) = ax.plot(*(CENTRE + radius * directions).T, color='0.85', linewidth=1)
        (inside,) = ax.plot(*(CENTRE + radius * directions).T, color='0.45', linewidth=1)
        outside.set_zorder(0)
        inside.set_clip_path(shape)
    for radius, angle in zip(RADII, (270, 232, 242, 250), strict=True):
        place = CENTRE + radius * torch.tensor(
            [math.cos(math.radians(angle)), math.sin(math.radians(angle))]
        )
        ax.annotate(
            f'r = {radius:.2f}',
            place.tolist(),
            ha='center',
            va='center',
            fontsize=8,
            color='0.3',
            bbox=dict(boxstyle='round,pad=0.15', facecolor='white', edgecolor='none'),
        )
    for control in CONTROLS:
        ratios = path_of(control, radii)
        colour = NORMALIZER_COLOURS[NAMES[int(ratios[-1].argmax())]]
        points = ratios @ CORNERS
        ax.plot(*points.T, color=colour, linewidth=2.5, solid_capstyle='round')
        ax.plot(*points[0], 'o', color='white', markeredgecolor=colour, markersize=7)
        ax.plot(*points[-1], 'o', color=colour, markersize=9)
    ax.plot(*CENTRE, '+', color='black', markersize=8)
    for name, corner in zip(NAMES, CORNERS, strict=True):
        place = CENTRE + 1.13 * (corner - CENTRE)
        ax.text(*place, name, ha='center', va='center', fontsize=13, color='black')
    ax.set_title('The circle grows and pushes the ratios into a corner', fontsize=11, pad=18)
    ax.set_aspect('equal')
    ax.axis('off')


def draw_ratios(ax: Axes, radii: torch.Tensor) -> None:
    """The three ratios of the layer that chooses LN, over the radius."""
    ratios = path_of(CONTROLS[1], radii)
    for name, line, share in zip(NAMES, ('--', '-', '-.'), ratios.T, strict=True):
        ax.plot(radii, share, line, color=NORMALIZER_COLOURS[name], linewidth=2.5, label=name)
    for radius, top, text in (
        (INRADIUS, 0.99, 'circle meets the edges'),
        (CIRCUMRADIUS, 0.7, 'one normalizer'),
    ):
        ax.axvline(radius, color='0.6', linewidth=1, linestyle=':')
        ax.annotate(
            text,
            (radius, top),
            (-3, 0),
            textcoords='offset points',
            rotation=90,
            ha='right',
            va='top',
            fontsize=8,
            color='0.3',
        )
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel('radius = progress of the training')
    ax.set_ylabel('importance ratios')
    ax.set_title('The same for the layer that chooses LN', fontsize=11, pad=18)
    ax.spines[['top', 'right']].set_visible(False)
    ax.legend(loc='upper left', frameon=False)


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / 'images' / 'triangle.png'
    parser.add_argument('out', nargs='?', type=Path, default=default, help='PNG or SVG')
    out = parser.parse_args().out
    radii = torch.linspace(0, 1, 501, dtype=torch.float64)
    figure = Figure(figsize=(10, 5), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    draw_simplex(left, radii)
    draw_ratios(right, radii)
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == '__main__':
    main()
