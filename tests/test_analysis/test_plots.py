"""The figures show what they are given: colours counted in the picture that was written."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from ssn_plugin.analysis.importance_ratios import LayerRatios
from ssn_plugin.analysis.plots import NORMALIZER_COLOURS, plot_selection
from ssn_plugin.analysis.prediction_sheet import Prediction, plot_predictions


def count(picture: np.ndarray, colour) -> int:
    wanted = np.round(np.asarray(to_rgb(colour)) * 255)
    return int((np.abs(picture - wanted).max(-1) <= 1).sum())


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB')).astype(float)


def test_bars_have_the_area_of_their_ratios(tmp_path):
    names = ('IN', 'LN', 'BN')
    rows = [LayerRatios('sn1', names, (0.5, 0.5, 0.0), (1.0, 0.0, 0.0))]
    path = tmp_path / 'selection.png'
    plot_selection(rows, path, 'A title')
    picture = read(path)
    instance, layer, batch = (count(picture, NORMALIZER_COLOURS[name]) for name in names)
    # Bars of 1.5 and 0.5; the legend adds one small swatch to each.
    assert instance / layer == pytest.approx(3, rel=0.1)
    assert 0 < batch < layer / 20


def test_many_layers_and_mixed_candidates(tmp_path):
    rows = [LayerRatios(f'layer{i}', ('IN', 'GN'), (0.5, 0.5), (0.0, 1.0)) for i in range(101)]
    plot_selection(rows, tmp_path / 'many.svg', 'Many')
    assert 'layer100' in (tmp_path / 'many.svg').read_text()


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match='rows'):
        plot_selection([], tmp_path / 'none.png', 'None')


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
