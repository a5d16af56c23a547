"""What a state dict says its layers chose is what the layers built from it say."""

import pytest
import torch
from backbones import build
from released_files import released_state

from ssn_plugin import SN, SSN, set_radius
from ssn_plugin.checkpoint.selection import Selected, histogram, selections


def of_the_model(state, normalizers=('IN', 'LN', 'BN')):
    model = build('mmdet', norm_cfg=dict(type='SSN', normalizers=normalizers, num_groups=2))
    model.load_state_dict(state, strict=False)
    return {n: tuple(m.selected) for n, m in model.named_modules() if isinstance(m, SSN)}


@pytest.mark.parametrize('undecided', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('radius', [0.0, 0.4, 0.7, 0.8164, 0.8166, 1.0])
def test_released_files(undecided, radius):
    state = released_state(undecided=undecided, radius=radius, seed=int(10 * radius))
    found = selections(state)
    assert len(found) == 20
    assert found == of_the_model(state)
    decided = [None not in selection for selection in found.values()]
    if undecided == 0 or radius > 0.8165:
        assert all(decided)
    elif undecided == 1 and radius < 0.7:
        assert not all(decided)


@pytest.mark.parametrize('radius', [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    'normalizers', [('IN', 'LN'), ('IN', 'LN', 'BN'), ('IN', 'LN', 'BN', 'GN')]
)
def test_own_files(normalizers, radius):
    model = build('mmdet', norm_cfg=dict(type='SSN', normalizers=normalizers, num_groups=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(('mean_weight', 'var_weight')):
                parameter.normal_(std=0.6)
    set_radius(model, radius)
    expected = {n: m.selected for n, m in model.named_modules() if isinstance(m, SSN)}
    found = selections(model.state_dict())
    assert found == expected
    if radius == 1:
        assert {name for pair in found.values() for name in pair} == set(normalizers)


def test_two_candidates_that_are_not_those_of_the_release_are_numbered():
    """A file does not name them; running statistics tell that BN is one, not which."""
    layer = SSN(4, normalizers=('BN', 'IN'))
    set_radius(layer, 1.0)
    state = {f'sn1.{key}': value for key, value in layer.state_dict().items()}
    assert layer.selected == ('IN', 'IN')
    assert selections(state) == {'sn1': Selected('1', '1')}


def test_sn_is_never_decided_and_batch_norm_is_no_choice():
    state = {f'sn1.{key}': value for key, value in SN(4).state_dict().items()}
    state |= {f'bn2.{k}': value for k, value in torch.nn.BatchNorm2d(4).state_dict().items()}
    state['sn1.mean_weight'] = torch.tensor([100.0, 0.0, 0.0])
    assert selections(state) == {'sn1': Selected(None, None)}


def test_histogram():
    chosen = {
        'a': Selected('LN', 'LN'),
        'b': Selected('IN', 'BN'),
        'c': Selected('LN', 'LN'),
        'd': Selected(None, 'BN'),
        'e': Selected(None, None),
        'f': Selected('LN', 'LN'),
    }
    assert histogram(chosen) == {'LN': 3, 'undecided': 2, 'IN/BN': 1}
    assert list(histogram(chosen)) == ['LN', 'undecided', 'IN/BN']
    assert histogram({}) == {}
