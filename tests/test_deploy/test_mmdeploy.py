"""Whole collapsed models through mmdeploy to ONNX Runtime: boxes, masks and pixels of torch."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from decided_models import decided_model, demo_config
from mmengine.config import Config
from network_zoo import settings_of

from ssn_plugin.jobs.collapse import collapse_checkpoint
from ssn_plugin.jobs.trained_model import build_model, load_strictly

pytest.importorskip('mmdeploy')
ort = pytest.importorskip('onnxruntime')

DEPLOY = Path(__file__).parents[2] / 'configs/_base_/deploy'
SIZES = [(128, 160), (96, 192)]  # that of the recorded example, and another


def trained(config: Config) -> torch.nn.Module:
    """A decided model whose random heads find boxes of different scores."""
    model = decided_model(config)
    spread = {'fc_cls': 0.3, 'rpn_cls': 0.3, 'retina_cls': 0.03, 'fc_reg': 0.02}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for layer, std in spread.items():
                if name.endswith(f'{layer}.weight'):
                    parameter.normal_(std=std)
    return model


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def deployed(tmp_path: Path, config: Config, deploy: str):
    """The collapsed model in torch, and in ONNX Runtime by mmdeploy."""
    from mmdeploy.apis import torch2onnx

    (tmp_path / 'net.py').write_text(config.pretty_text)
    torch.save({'state_dict': trained(config).state_dict()}, tmp_path / 'net.pth')
    cv2.imwrite(str(tmp_path / 'a.png'), picture(SIZES[0], 0))
    paths = [str(tmp_path / name) for name in ('net.py', 'net.pth', 'out.pth')]
    done = collapse_checkpoint(*paths, images=[str(tmp_path / 'a.png')])
    torch2onnx(
        str(tmp_path / 'a.png'), str(tmp_path), 'end2end.onnx', str(DEPLOY / deploy),
        str(done.config), str(done.checkpoint), device='cpu',
    )  # fmt: skip
    model = build_model(Config.fromfile(done.config), done.config).eval()
    state = torch.load(done.checkpoint, weights_only=True)['state_dict']
    load_strictly(model, state, str(done.checkpoint), str(done.config))
    path = str(tmp_path / 'end2end.onnx')
    return model, ort.InferenceSession(path, providers=['CPUExecutionProvider'])


def predictions(model, session, size):
    """What both make of one picture."""
    if hasattr(model, 'decode_head'):
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    shapes = dict.fromkeys(('ori_shape', 'img_shape', 'pad_shape', 'batch_input_shape'), size)
    sample = Sample(metainfo=dict(shapes, scale_factor=(1.0, 1.0)))
    image = torch.from_numpy(picture(size, 3)).permute(2, 0, 1)
    data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
    with torch.no_grad():
        (result,) = model.predict(data['inputs'], data['data_samples'])
    return result, [
        torch.from_numpy(y) for y in session.run(None, {'input': data['inputs'].numpy()})
    ]


def retinanet() -> Config:
    """One whose head has SSN layers, each of which serves every level of the pyramid."""
    config = settings_of('RetinaNet')
    config.model.bbox_head.norm_cfg = dict(type='SSN')
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'deploy', 'count'),
    [
        (lambda: demo_config('mmdet'), 'onnxruntime_masks.py', 20),
        (retinanet, 'onnxruntime_boxes.py', 100),
    ],
    ids=['Mask R-CNN', 'RetinaNet'],
)
def test_boxes(config, deploy, count, tmp_path):
    from mmdet.structures.bbox import bbox_overlaps

    model, session = deployed(tmp_path, config(), deploy)
    for size in SIZES:
        result, ((boxes,), (labels,), *masks) = predictions(model, session, size)
        assert [mask.shape for mask in masks] == [(1, len(boxes), 28, 28)] * len(masks)
        found = result.pred_instances
        assert len(found) == count
        # mmdet drops boxes that have no size inside the image, and goes on to the next ones.
        sized = (boxes[:, 2:4] > boxes[:, :2]).all(-1)
        boxes, labels = boxes[sized], labels[sized]
        assert len(boxes) >= 0.9 * count
        found = found[: len(boxes)]
        overlaps = bbox_overlaps(found.bboxes, boxes[:, :4])
        best = (overlaps * (found.labels[:, None] == labels)).max(1)
        assert best.values.min() > 0.9
        matched = boxes[best.indices]
        assert (matched[:, :4] - found.bboxes).abs().max() < 1e-2
        assert (matched[:, 4] - found.scores).abs().max() < 1e-4


@pytest.mark.slow
def test_pixels(tmp_path):
    model, session = deployed(tmp_path, demo_config('mmseg'), 'onnxruntime_pixels.py')
    for size in SIZES:
        result, (labels,) = predictions(model, session, size)
        assert labels.unique().numel() > 1
        assert (result.pred_sem_seg.data == labels[0]).float().mean() > 0.999
