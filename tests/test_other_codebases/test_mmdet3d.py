"""mmdet3d: PointPillars, trained, decided and collapsed.

It needs mmdet3d 1.4.0 beside the original packages; how to install it stands in
docs/other-codebases.md.
"""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from other_codebases import check_collapse, train

from ssn_plugin import SSN

mmdet3d = pytest.importorskip('mmdet3d')
pytest.importorskip('mmdet3d.models')
create_detector_inputs = pytest.importorskip('mmdet3d.testing').create_detector_inputs

RANGE = [0, -10.24, -3, 20.48, 10.24, 1]  # 128 x 128 pillars


@pytest.fixture(autouse=True)
def _scope(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    init_default_scope('mmdet3d')


def test_pillars_are_trained_decided_and_collapsed():
    configs = Path(mmdet3d.__file__).parent / '.mim/configs/pointpillars'
    cfg = Config.fromfile(configs / 'pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py').model
    cfg.data_preprocessor.voxel_layer.update(point_cloud_range=RANGE, max_voxels=(500, 500))
    cfg.voxel_encoder.update(
        point_cloud_range=RANGE, norm_cfg=dict(type='SSN1d', normalizers=('LN', 'BN'))
    )
    cfg.middle_encoder.output_shape = [128, 128]
    cfg.backbone.update(out_channels=[16, 32, 64], layer_nums=[1, 1, 1], norm_cfg=dict(type='SSN'))
    cfg.neck.update(in_channels=[16, 32, 64], out_channels=[16] * 3, norm_cfg=dict(type='SSN'))
    cfg.bbox_head.update(in_channels=48, feat_channels=48)
    model = MODELS.build(cfg)
    model.init_weights()
    assert len([module for module in model.modules() if isinstance(module, SSN)]) == 10
    batch = create_detector_inputs(
        with_points=True, num_points=2000, points_feat_dim=4, gt_bboxes_dim=7, num_classes=3
    )
    train(model, batch, 4)
    check_collapse(model, batch)
