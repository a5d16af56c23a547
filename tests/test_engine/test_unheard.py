"""norm_eval and partial_bn of other codebases: what they do nothing to is said."""

import pytest
from torch import nn

from ssn_plugin import SN, SSN
from ssn_plugin.engine.unheard import unheard_settings


class Backbone(nn.Sequential):
    """As in OpenMMLab: its train mode leaves what it knows in evaluation."""

    def __init__(self, heard=(), **settings):
        super().__init__(nn.Conv2d(3, 4, 1), SSN(4), nn.BatchNorm2d(4), SN(4))
        self.heard = heard
        vars(self).update(settings)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, self.heard):
                module.eval()
        return self


@pytest.mark.parametrize('setting', ['norm_eval', 'partial_bn'])
def test_a_setting_that_reaches_batch_norm_alone(setting):
    model = nn.ModuleDict({'backbone': Backbone(nn.BatchNorm2d, **{setting: True})}).eval()
    assert list(unheard_settings(model)) == [('backbone', setting, 2)]


def test_settings_that_are_off_heard_or_about_other_layers():
    everything = (nn.BatchNorm2d, SSN, SN)
    for model in (
        Backbone(norm_eval=False),
        Backbone(norm_eval=None),
        Backbone(everything, norm_eval=True),
        nn.Sequential(nn.BatchNorm2d(4)),
    ):
        assert list(unheard_settings(model)) == []


def test_the_hook_says_so(make_runner, caplog):
    runner = make_runner(hooks=[dict(type='SSNStartHook')])
    runner.logger.addHandler(caplog.handler)
    runner.model.norm_eval = True
    runner.train()
    (told,) = (text for text in caplog.messages if 'norm_eval' in text)
    assert 'norm_eval=True of the model reaches BatchNorm alone, so 2 SSN layers' in told
