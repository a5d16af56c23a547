"""Figures of a training: what is drawn is read back and compared with the history."""

import math

import numpy as np
import pytest
from PIL import Image

from ssn_plugin.analysis.figures import as_image
from ssn_plugin.analysis.history import History, HistoryError
from ssn_plugin.analysis.history_plots import (
    has_triples,
    run_figure,
    simplex_figure,
    write_history_figures,
)
from ssn_plugin.functional import sparsestmax

NAMES = ['IN', 'LN', 'BN']


def history(layers=4, records=12, names=NAMES) -> History:
    """Control parameters that stay, under a circle that grows: every path goes outwards."""
    import torch

    control = torch.randn(layers, 2, len(names), generator=torch.Generator().manual_seed(0))
    control *= 0.1
    lines = []
    for record in range(records):
        radius = 0.9 * record / (records - 1)
        ratios = sparsestmax(control, radius).tolist()
        one_hot = [[max(values) == 1 for values in layer] for layer in ratios]
        lines.append(
            dict(
                iter=10 * (record + 1),
                radius=radius,
                decided=sum(map(all, one_hot)),
                loss=2.0 / (record + 1) if record != 3 else None,
                mean=[layer[0] for layer in ratios],
                var=[layer[1] for layer in ratios],
                mean_fixed=[int(layer[0]) for layer in one_hot],
                var_fixed=[int(layer[1]) for layer in one_hot],
            )
        )
    places = ['backbone.sn1', 'backbone.layer1.0.sn1', 'neck.0.sn', 'bbox_head.0.sn']
    described = [
        dict(layer=places[i % 4], normalizers=names, channels=8, sparse=True) for i in range(layers)
    ]
    return History(described, {'max_iters': 120, 'versions': {}}, lines)


def texts(figure) -> str:
    return ' '.join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, 'get_text'))
    )


def paths_of(ax) -> list[np.ndarray]:
    return [line.get_xydata() for line in ax.lines if line.get_marker() in (None, 'None')]


@pytest.mark.parametrize('records', [12, 6, 1])
def test_paths_lie_where_the_ratios_say(records):
    recorded = history()._replace(lines=history().lines[:records])
    figure = simplex_figure(recorded, 'A run')
    line = recorded.lines[-1]
    assert f'iteration {line["iter"]}, radius {line["radius"]:.3f}' in texts(figure)
    for ax, statistic in zip(figure.axes, ('mean', 'var'), strict=True):
        triangle = ax.patches[0].get_xy()[:3]
        circle = ax.patches[-1]
        assert circle.get_radius() == pytest.approx(line['radius'])
        for column, path in enumerate(paths_of(ax)):
            points = np.array([other[statistic][column] for other in recorded.lines])
            assert path == pytest.approx(points @ triangle)
            # True to scale: outside or on the circle, whose radius is one in ratio space.
            reached = np.linalg.norm(path - np.array(circle.get_center()), axis=1)
            expected = np.linalg.norm(points - 1 / 3, axis=1)
            assert reached == pytest.approx(expected, abs=1e-6)
        chosen = [ratios.index(1) for ratios in line[statistic] if 1 in ratios]
        for k, name in enumerate(NAMES):
            assert f'{name}: {chosen.count(k)} of 4' in [t.get_text() for t in ax.texts]


def test_corners_are_as_far_apart_as_one_hot_vectors():
    corners = simplex_figure(history(), 'A run').axes[0].patches[0].get_xy()[:3]
    for a, b in ((0, 1), (1, 2), (2, 0)):
        assert math.dist(corners[a], corners[b]) == pytest.approx(math.sqrt(2))


def test_run_figure_shows_loss_counts_and_shares():
    recorded = history(layers=5)
    figure = run_figure(recorded, 'A run')
    loss, decided, shares, radius = figure.axes
    iterations = [line['iter'] for line in recorded.lines]
    drawn = dict(loss.lines[0].get_xydata())
    assert drawn == {x['iter']: x['loss'] for x in recorded.lines if x['loss'] is not None}
    counts = {line.get_label(): line.get_ydata()[:-1] for line in decided.lines}
    assert counts['decided: both'].tolist() == [line['decided'] for line in recorded.lines]
    assert counts['decided: mean'].tolist() == [sum(x['mean_fixed']) for x in recorded.lines]
    assert counts['decided: variance'].tolist() == [sum(x['var_fixed']) for x in recorded.lines]
    assert counts['decided: both'][-1] == 5
    curve = radius.lines[0].get_xydata()
    assert curve[:, 0].tolist() == iterations
    assert curve[:, 1] == pytest.approx([line['radius'] for line in recorded.lines])
    # The uppermost area ends at one; the lowest is the share of IN at the last record.
    last = recorded.lines[-1]
    share = np.mean([ratios[0] for key in ('mean', 'var') for ratios in last[key]])
    outline = shares.collections[0].get_paths()[0].vertices
    assert outline[outline[:, 0] == iterations[-1]][:, 1].max() == pytest.approx(share)
    assert '5 of 5 layers are one normalizer' in texts(figure)


def test_the_last_jump_is_seen():
    """The state of the last record goes on to the edge of the axes, which is behind it."""
    recorded = history(layers=5, records=3)
    assert recorded.lines[-1]['decided'] > recorded.lines[-2]['decided']
    _, decided, shares, _ = run_figure(recorded, 'A run').axes
    last, end = recorded.lines[-1]['iter'], shares.get_xlim()[1]
    assert end > last
    x, y = decided.lines[0].get_data()
    assert list(x[-2:]) == [last, end]
    assert list(y[-2:]) == [recorded.lines[-1]['decided']] * 2


def test_triangles_name_their_layers():
    recorded = history(layers=3)
    recorded.layers[2]['normalizers'] = ['LN', 'GN', 'BN']
    titles = [ax.get_title() for ax in simplex_figure(recorded, 'A run').axes]
    assert titles == [
        'ratios of the mean\n2 layers: stem, layer1',
        'ratios of the variance\n2 layers: stem, layer1',
        'ratios of the mean\n1 layers: neck',
        'ratios of the variance\n1 layers: neck',
    ]


def test_files_and_frames(tmp_path):
    recorded = history()
    seen = []

    def progress(frames):
        seen.extend(frames)
        return frames

    written = write_history_figures(recorded, 'A run', tmp_path, gif=True, progress=progress)
    names = {'history.png', 'history.svg', 'simplex.png', 'simplex.svg', 'simplex.gif'}
    assert {path.name for path in written} == names == {path.name for path in tmp_path.iterdir()}
    with Image.open(tmp_path / 'simplex.gif') as gif:
        assert gif.n_frames == len(seen) == 12
        first = np.asarray(gif.convert('RGB')).astype(int)
        gif.seek(11)
        last = np.asarray(gif.convert('RGB')).astype(int)
    # Nothing but the drawing moves: the legend at the right stays as it is.
    assert (abs(first - last).max(-1) > 40).mean() > 0.01
    width = first.shape[1]
    legend = slice(int(0.9 * width), width)
    assert (abs(first - last)[80:, legend].max(-1) > 8).mean() == 0


def test_two_and_four_candidates_have_no_triangle(tmp_path):
    for names in (['IN', 'BN'], ['IN', 'LN', 'BN', 'GN']):
        recorded = history(names=names)
        assert not has_triples(recorded)
        with pytest.raises(HistoryError, match='three candidates'):
            simplex_figure(recorded, 'A run')
        written = write_history_figures(recorded, 'A run', tmp_path, gif=True)
        assert [path.name for path in written] == ['history.png', 'history.svg']


def test_layers_without_a_triangle_are_told():
    recorded, other = history(layers=2), history(layers=1, names=['IN', 'BN'])
    both = History(
        recorded.layers + other.layers,
        {},
        [
            dict(a, **{key: a[key] + b[key] for key in ('mean', 'var', 'mean_fixed', 'var_fixed')})
            for a, b in zip(recorded.lines, other.lines, strict=True)
        ],
    )
    figure = simplex_figure(both, 'A run')
    assert '1 layers without three candidates' in texts(figure).replace('\n', ' ')
    assert len(paths_of(figure.axes[0])) == 2


def test_one_record_and_none():
    for draw in (run_figure, simplex_figure):
        assert as_image(draw(history(records=2), 'Begun')).std() > 10
        with pytest.raises(HistoryError, match='no record yet'):
            draw(history()._replace(lines=[]), 'None')
    single = history()
    single = single._replace(lines=single.lines[:1])
    assert as_image(run_figure(single, 'One')).std() > 10
    assert as_image(simplex_figure(single, 'One')).std() > 10


def test_long_trainings_are_thinned():
    recorded = history(layers=2, records=3000)
    thin = recorded.thinned(600)
    assert len(thin.lines) == 600
    assert (thin.lines[0], thin.lines[-1]) == (recorded.lines[0], recorded.lines[-1])
    gaps = {b['iter'] - a['iter'] for a, b in zip(thin.lines, thin.lines[1:], strict=False)}
    assert gaps <= {50, 60}
    paths = paths_of(simplex_figure(recorded, 'Long').axes[0])
    assert [len(path) for path in paths] == [120, 120]
    assert 'iteration 30000' in texts(simplex_figure(recorded, 'Long'))
    curve = run_figure(recorded, 'Long').axes[0].lines[0].get_xydata()
    assert 590 < len(curve) <= 600
    assert curve[-1, 0] == 30000
