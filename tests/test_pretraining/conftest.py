"""The images to pre-train on: the user's folder of class folders, or one made for the occasion."""

import os
from pathlib import Path

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def _leave_no_default_scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    """What SSN_IMAGEFOLDER names, or class folders made of scikit-image's photographs."""
    given = os.environ.get('SSN_IMAGEFOLDER')
    if given:
        return Path(given).resolve()
    pytest.importorskip('skimage')
    from demo_data import make_image_folder

    folder = tmp_path_factory.mktemp('images') / 'imagefolder'
    make_image_folder(folder)
    return folder
