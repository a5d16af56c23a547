"""What static int8 quantisation of a segmenter's ONNX file costs and saves.

    python tools/export_onnx.py CONFIG CKPT net.onnx
    python benchmarks/quantization.py CONFIG net.onnx

ONNX Runtime calibrates on training images and quantises weights and activations. The mIoU is that
of the config's validation data, time that of one image on the CPU, interleaved.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmseg.evaluation import IoUMetric
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from timing import interleaved, seconds, spread

METHODS = {'min and max': CalibrationMethod.MinMax, 'entropy': CalibrationMethod.Entropy}


class Images(CalibrationDataReader):
    """Training images one by one, as the network gets them."""

    def __init__(self, inputs: list[np.ndarray]) -> None:
        self.left = iter(inputs)

    def get_next(self) -> dict | None:
        x = next(self.left, None)
        return None if x is None else {'input': x}


def samples(config: Config, loader: dict, count: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and their labels."""
    dataset = DATASETS.build(dict(loader.dataset, pipeline=config.test_pipeline))
    preprocess = MODELS.build(config.model.data_preprocessor).eval()
    found = []
    for index in range(min(count or len(dataset), len(dataset))):
        batch = preprocess(pseudo_collate([dataset[index]]), False)
        labels = batch['data_samples'][0].gt_sem_seg.data[0].numpy()
        found.append((batch['inputs'].numpy(), labels))
    return found


def session(path: Path) -> onnxruntime.InferenceSession:
    """A file in ONNX Runtime, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def mean_iou(network: onnxruntime.InferenceSession, data: list, classes: int) -> float:
    """Of all pixels that have a label, in percent."""
    areas = torch.zeros(2, classes, dtype=torch.float64)
    for x, labels in data:
        (logits,) = network.run(None, {'input': x})
        found = logits[0].argmax(0)[: labels.shape[0], : labels.shape[1]]
        pair = torch.from_numpy(found), torch.from_numpy(labels)
        areas += torch.stack(IoUMetric.intersect_and_union(*pair, classes, 255)[:2])
    shared, union = areas
    return float(100 * (shared / union)[union > 0].mean())


def times_of(sessions: dict, x: np.ndarray, rounds: int = 50) -> dict[str, list[float]]:
    """Seconds of each network in every round."""
    cpu = torch.device('cpu')
    steps = {
        name: lambda network=network: seconds(lambda: network.run(None, {'input': x}), cpu)
        for name, network in sessions.items()
    }
    times = defaultdict(list)
    for name, took in interleaved(steps, rounds, budget=120):
        times[name].append(took)
    return times


def main() -> None:
    """Parse, quantise, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('onnx', type=Path)
    parser.add_argument('--calibration-images', type=int, default=100)
    args = parser.parse_args()
    config = Config.fromfile(args.config)
    init_default_scope('mmseg')
    import mmseg.datasets
    import mmseg.models  # noqa: F401

    classes = config.model.decode_head.num_classes
    training = samples(config, config.train_dataloader, args.calibration_images)
    validation = samples(config, config.val_dataloader, None)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / 'prepared.onnx'
        quant_pre_process(str(args.onnx), str(prepared), skip_symbolic_shape=True)
        files = {'float32': args.onnx}
        for name, method in METHODS.items():
            for kind, operators in (('all operators', None), ('convolutions', ['Conv'])):
                path = files[f'int8, {name}, {kind}'] = Path(folder) / f'{name}{kind}.onnx'
                quantize_static(
                    str(prepared),
                    str(path),
                    Images([x for x, _ in training]),
                    per_channel=True,
                    calibrate_method=method,
                    op_types_to_quantize=operators,
                )
        sessions = {name: session(path) for name, path in files.items()}
        times = times_of(sessions, validation[0][0])
        for name, path in files.items():
            miou = mean_iou(sessions[name], validation, classes)
            ratio = spread([a / b for a, b in zip(times[name], times['float32'], strict=True)])
            print(
                f'{name}: mIoU {miou:.2f} %, {path.stat().st_size / 1e6:.1f} MB, '
                f'{1e3 * spread(times[name]).median:.1f} ms, to float32 {ratio.median:.2f} '
                f'({ratio.p20:.2f} to {ratio.p80:.2f})'
            )


if __name__ == '__main__':
    main()
