"""One small demo data set, made once and shared by the tests of this folder."""

import pytest

from demo_data import make_demo_dataset

NUM_TRAIN, NUM_VAL = 6, 3


@pytest.fixture(scope='session')
def demo_root(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo') / 'set'
    assert make_demo_dataset(out, num_train=NUM_TRAIN, num_val=NUM_VAL)
    return out


@pytest.fixture(scope='session')
def num_scenes():
    return {'train': NUM_TRAIN, 'val': NUM_VAL}
