"""The figures show what they are given: areas read back, colours counted in the picture."""

import re
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from released_files import released_state

from ssn_plugin.analysis.figures import (
    NORMALIZER_COLOURS,
    NORMALIZER_HATCHES,
    as_image,
    as_svg,
    save_figure,
)
from ssn_plugin.analysis.layer_ratios import LayerRatios, layer_ratios_of_state
from ssn_plugin.analysis.plots import comparison_figure, selection_figure, share_figure
from ssn_plugin.analysis.prediction_sheet import Prediction, plot_predictions
from ssn_plugin.analysis.selection_report import write_selection

NAMES = ('IN', 'LN', 'BN')


def count(picture: np.ndarray, colour) -> int:
    wanted = np.round(np.asarray(to_rgb(colour)) * 255)
    return int((np.abs(picture - wanted).max(-1) <= 1).sum())


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB')).astype(float)


def areas(ax, along: str = 'height') -> dict[tuple[float, str], float]:
    """(column, normalizer) -> length of its bar."""
    by_colour = {colour.lower(): name for name, colour in NORMALIZER_COLOURS.items()}
    found = {}
    for bar in (bar for container in ax.containers for bar in container):
        name = by_colour[to_hex(bar.get_facecolor())]
        assert (bar.get_hatch() or '') == NORMALIZER_HATCHES[name]
        if along == 'height':
            found[round(bar.get_x() + bar.get_width() / 2), name] = bar.get_height()
        else:
            found[round(bar.get_y() + bar.get_height() / 2), name] = bar.get_width()
    return found


def texts(figure) -> str:
    return ' '.join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, 'get_text'))
    )


def rows_of(depth: int, **kwargs) -> list[LayerRatios]:
    state = released_state(depth, 4, undecided=0.4, radius=0.5, **kwargs)
    return layer_ratios_of_state(state)


@pytest.mark.parametrize(('depth', 'lines'), [(18, 1), (50, 1), (101, 2)])
def test_every_ratio_of_every_layer_is_drawn(depth, lines):
    rows = rows_of(depth)
    figure = selection_figure(rows, 'A title')
    assert len(figure.axes) == 2 * lines
    assert 'A title' in texts(figure)
    assert 'radius 0.500' in texts(figure)
    assert f'{sum(row.decided for row in rows)} of {len(rows)} layers' in texts(figure)
    per_line = -(-len(rows) // lines)
    for number, statistic in enumerate(('mean', 'var')):
        drawn = {}
        for line in range(lines):
            for (column, name), height in areas(figure.axes[2 * line + number]).items():
                drawn[column + line * per_line, name] = height
        expected = {
            (column, name): ratio
            for column, row in enumerate(rows)
            for name, ratio in row.ratios(statistic).items()
            if ratio > 0
        }
        assert drawn == pytest.approx(expected)
    labels = [t.get_text() for ax in figure.axes for t in ax.get_xticklabels()]
    assert len(labels) == len(rows)
    assert labels.count('0 shortcut') == sum('downsample' in row.layer for row in rows)
    assert {'stem', 'layer1', 'layer2', 'layer3', 'layer4'} <= set(texts(figure).split())


@pytest.mark.parametrize('depth', [50, 101])
def test_labels_do_not_touch_each_other(depth):
    figure = selection_figure(rows_of(depth), 'A title')
    as_image(figure)
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes:
        boxes = [label.get_window_extent(renderer) for label in ax.get_xticklabels()]
        boxes += [text.get_window_extent(renderer) for text in ax.texts if text.get_text()]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1


def test_titles_of_any_length_leave_the_legend_alone():
    name = '/a_folder/with_a_long_name/' * 6 + 'mask-rcnn_r50_fpn_ssn-all_2x_coco.pth'
    rows = rows_of(18)
    two = {name: rows, f'{name}2': [row._replace(radius=0.25) for row in rows]}
    for figure in (
        selection_figure(rows, name),
        share_figure(rows, name),
        comparison_figure(two, ' and '.join(two)),
    ):
        as_image(figure)
        renderer = figure.canvas.get_renderer()
        title, legend = figure._suptitle, figure.legends[0]
        box = title.get_window_extent(renderer)
        assert not box.overlaps(legend.get_window_extent(renderer))
        assert box.x0 >= 0
        assert 'radius 0.500' in title.get_text()
        assert name in title.get_text().replace('\n', '')
    assert 'radius 0.250' in title.get_text()
    labels = [ax.yaxis.label.get_window_extent(renderer) for ax in figure.axes]
    for upper, lower in pairwise(labels):
        assert not upper.overlaps(lower)


def test_picture_has_the_area_of_the_ratios(tmp_path):
    counts = []
    for share in (0.25, 0.5, 1.0):
        row = LayerRatios('sn1', ('IN', 'BN'), (share, 1 - share), (share, 1 - share))
        save_figure(selection_figure([row], 'A title'), tmp_path / 'selection.png')
        counts.append(count(read(tmp_path / 'selection.png'), NORMALIZER_COLOURS['IN']))
    # The legend adds the same swatch to each.
    assert (counts[2] - counts[1]) / (counts[1] - counts[0]) == pytest.approx(2, rel=0.05)
    assert counts[0] > 1000


def test_mixed_and_unnamed_candidates(tmp_path):
    rows = [LayerRatios(f'layer1.{i}.sn1', ('IN', 'GN'), (0.5, 0.5), (0.0, 1.0)) for i in range(9)]
    rows.append(LayerRatios('x', ('0', '1'), (0.5, 0.5), (0.0, 1.0)))
    path = tmp_path / 'mixed.svg'
    figure = selection_figure(rows, 'Mixed')
    assert 'no radius (SN)' in texts(figure).replace('\n', ' ')
    save_figure(figure, path)
    assert '8.sn1' in path.read_text()
    for name in ('IN', 'GN', '0', '1'):
        assert f'>{name}</text>' in path.read_text()


def test_no_rows():
    for draw in (selection_figure, share_figure):
        with pytest.raises(ValueError, match='rows'):
            draw([], 'None')
    with pytest.raises(ValueError, match='sources: got 1'):
        comparison_figure({'a': rows_of(18)}, 'One')


def test_shares_are_means_over_stages_and_kinds():
    rows = rows_of(18)
    figure = share_figure(rows, 'Shares')
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == [
        'all layers (20)',
        *('stem (1)', 'layer1 (4)', 'layer2 (5)', 'layer3 (5)', 'layer4 (5)'),
        *('stem (1)', 'residual (16)', 'shortcut (3)'),
    ]
    positions = [round(value) for value in figure.axes[0].get_yticks()]
    for ax, statistic in zip(figure.axes, ('mean', 'var'), strict=True):
        drawn = areas(ax, 'width')
        for label, position in zip(labels, positions, strict=True):
            group = label.split(' (')[0]
            own = [r for r in rows if group in ('all layers', r.place.stage, r.place.kind)]
            for name in NAMES:
                expected = np.mean([row.ratios(statistic)[name] for row in own])
                assert drawn.get((position, name), 0) == pytest.approx(expected)


def test_comparison_marks_what_differs():
    before = rows_of(18)
    changed = before[3]._replace(mean_ratios=tuple(np.roll(before[3].mean_ratios, 1).tolist()))
    after = [*before[:3], changed, *before[4:]]
    after = [row._replace(layer=f'backbone.{row.layer}') for row in after]
    after.append(LayerRatios('neck.sn', NAMES, (1.0, 0, 0), (0, 0, 1.0), 0.5))
    figure = comparison_figure({'before': before, 'after': after}, 'Compared')
    assert '1 of 20 common layers prefer another normalizer' in texts(figure)
    marks = [[line.get_xdata()[0] for line in ax.lines if line.get_marker() == 'v']
             for ax in figure.axes]  # fmt: skip
    assert marks == [[3], [], [], []]
    for ax, rows, statistic in zip(
        figure.axes, (before, after) * 2, ('mean', 'mean', 'var', 'var'), strict=True
    ):
        drawn = areas(ax)
        for column, row in enumerate(rows):
            for name, ratio in row.ratios(statistic).items():
                assert drawn.get((column, name), 0) == pytest.approx(ratio)
        assert len({column for column, _ in drawn}) == len(rows)


def test_written_files(tmp_path):
    sources = {'before': rows_of(18), 'after': rows_of(18, seed=1)}
    seen = []

    def progress(jobs):
        seen.append(len(jobs))
        return jobs

    written = write_selection(sources, tmp_path, progress)
    figures = ('selection-1', 'shares-1', 'selection-2', 'shares-2', 'comparison')
    names = {f'{name}.{suffix}' for name in figures for suffix in ('png', 'svg')}
    names |= {'selection.csv', 'selection.json', 'comparison.csv'}
    assert {path.name for path in written} == names == {path.name for path in tmp_path.iterdir()}
    assert seen == [5]
    for path in tmp_path.glob('*.png'):
        assert min(Image.open(path).size) > 500
    lines = (tmp_path / 'comparison.csv').read_text().splitlines()
    assert lines[0] == 'layer,statistic,before,after,differs,distance'
    assert len(lines) == 41


def test_names_are_shown_as_they_are(tmp_path):
    name = r'a$\nothing_of$ <TeX> & _.pth'
    sources = {name: rows_of(18), 'other': rows_of(18)}
    for figure in (selection_figure(sources[name], name), comparison_figure(sources, name)):
        assert name.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;') in as_svg(
            figure
        )


def test_svg_is_the_same_each_time_and_needs_no_network():
    rows = rows_of(18)
    first, second = (as_svg(selection_figure(rows, 'Same')) for _ in range(2))
    assert first == second
    assert first.startswith('<svg')
    assert not re.findall(r'(?:href|src)="(?!#)', first)


def test_predictions_are_drawn_where_they_are(tmp_path):
    image = np.zeros((64, 80, 3), np.uint8)
    mask = np.zeros((64, 80), bool)
    mask[8:40, 8:40] = True
    sheet = [
        Prediction(image, [mask], [0], np.array([[8, 8, 40, 40]]), [0.9]),
        Prediction(image, [], [], np.zeros((0, 4)), []),
    ]
    plot_predictions(sheet, ('coin',), [(255, 0, 0)], tmp_path / 'p.png', 'Sheet', columns=2)
    picture = read(tmp_path / 'p.png')
    red = (picture[..., 0] > 90) & (picture[..., 1] < 40) & (picture[..., 2] < 40)
    left, right = np.array_split(red, 2, axis=1)
    assert left.sum() > 1000
    assert right.sum() == 0


def test_no_predictions(tmp_path):
    with pytest.raises(ValueError, match='predictions'):
        plot_predictions([], (), [], tmp_path / 'p.png', 'Nothing')
