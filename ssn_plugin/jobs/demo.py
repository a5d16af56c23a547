"""The demo: make the data, train, evaluate, draw what was predicted and what was chosen."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

from ssn_plugin.analysis.layer_ratios import layer_ratios
from ssn_plugin.checkpoint.unpickling import refuse_code
from ssn_plugin.errors import InputError
from ssn_plugin.jobs.clone import CLONE, import_demo_data
from ssn_plugin.jobs.configs import load_config
from ssn_plugin.jobs.framework_script import framework_script
from ssn_plugin.jobs.preflight import check_work_dir
from ssn_plugin.layers.radius import undecided_layers

DATA_ROOT = Path('data/demo')
NUM_PICTURES = 8


class DemoTask(NamedTuple):
    """One of the demos.

    Attributes:
        title: What is trained.
        config: Its config file, in a clone of the repository.
        metrics: Metric names, what to call them, and the least value of a run that has learned.
    """

    title: str
    config: Path
    metrics: dict[str, tuple[str, float]]


TASKS = {
    'det': DemoTask(
        'Mask R-CNN with SSN',
        Path('configs/demo/mask-rcnn_r18_fpn_ssn-all_demo.py'),
        {'coco/bbox_mAP_50': ('box AP50', 0.5), 'coco/segm_mAP_50': ('mask AP50', 0.5)},
    ),
    'seg': DemoTask(
        'DeepLabV3+ with SSN',
        Path('configs/demo/deeplabv3plus_r18-d8_ssn-all_demo.py'),
        {'mIoU': ('mIoU (in %)', 50.0)},
    ),
}


class DemoResult(NamedTuple):
    """What a demo run gave.

    Attributes:
        metrics: Printed name -> (value, least value of a run that has learned).
        num_layers: SSN layers of the model.
        undecided: Names of those that are not one-hot.
        pictures: Files written.
        checkpoint: The trained model.
    """

    metrics: dict[str, tuple[float, float]]
    num_layers: int
    undecided: list[str]
    pictures: list[Path]
    checkpoint: Path

    @property
    def passed(self) -> bool:
        """Whether the model learned and every layer became one normalizer."""
        learned = all(value >= least for value, least in self.metrics.values())
        return learned and not self.undecided


def run_demo(task: str, work_dir: Path) -> DemoResult:
    """Train a demo config from scratch; an interrupted run goes on where it stopped.

    ``work_dir`` gets logs, checkpoint and pictures.

    Raises:
        InputError: If there is no clone of the repository, a part of the framework is missing or
            a folder cannot be written to.
    """
    refuse_code()
    demo = TASKS[task]
    try:
        demo_data = import_demo_data()
        config = load_config(str(CLONE / demo.config))
        framework_script(config, 'train.py')  # ends here with a message if the framework is missing
        check_work_dir(str(work_dir))
        demo_data.make_demo_dataset(DATA_ROOT)
    except (ImportError, OSError) as error:
        raise InputError(f'demo data: {error}') from error

    config.work_dir = str(work_dir)
    config.resume = _is_started(config, work_dir / demo.config.name)
    runner = Runner.from_cfg(config)
    if config.resume:
        runner.logger.info(f'Going on with the run in {work_dir}; delete it to start again.')
    runner.train()
    metrics = runner.test()

    pictures = [work_dir / 'predictions.png', work_dir / 'selection.png']
    _draw_predictions(runner, task, pictures[0], demo.title)
    rows = layer_ratios(runner.model)
    from ssn_plugin.analysis.figures import save_figure
    from ssn_plugin.analysis.plots import selection_figure

    title = f'{demo.title}: the normalizer each layer chose'
    save_figure(selection_figure(rows, title), pictures[1])
    return DemoResult(
        {name: (float(metrics[key]), least) for key, (name, least) in demo.metrics.items()},
        len(rows),
        undecided_layers(runner.model),
        pictures,
        Path((work_dir / 'last_checkpoint').read_text().strip()),
    )


def _is_started(config: Config, dumped: Path) -> bool:
    """Whether the work dir has a checkpoint of a run with this very config, dumped by the run."""
    if not (dumped.parent / 'last_checkpoint').is_file() or not dumped.is_file():
        return False
    before = Config.fromfile(str(dumped)).to_dict()
    now = config.to_dict()
    return all(
        before.get(key) == now.get(key) for key in ('model', 'train_cfg', 'train_dataloader')
    )


def _draw_predictions(runner: Runner, task: str, path: Path, title: str) -> None:
    from ssn_plugin.analysis.prediction_sheet import Prediction, plot_predictions

    runner.model.eval()
    dataset = runner.test_dataloader.dataset
    meta = dataset.metainfo
    sheet = []
    for index in range(min(NUM_PICTURES, len(dataset))):
        sample = dataset[index]
        image = sample['inputs'].permute(1, 2, 0).flip(-1).numpy()
        batch = {'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]}
        with torch.no_grad():
            found = runner.model.test_step(batch)[0]
        if task == 'det':
            instances = found.pred_instances
            instances = instances[instances.scores >= 0.5].cpu()
            sheet.append(
                Prediction(
                    image,
                    masks=_as_arrays(instances.masks),
                    labels=instances.labels.tolist(),
                    boxes=instances.bboxes.numpy(),
                    scores=instances.scores.tolist(),
                )
            )
        else:
            labels = found.pred_sem_seg.data[0].cpu()
            present = [label for label in labels.unique().tolist() if label != 0]
            masks = [labels == label for label in present]
            sheet.append(Prediction(image, masks=_as_arrays(masks), labels=present))
    plot_predictions(sheet, meta['classes'], meta['palette'], path, f'{title}: held-out scenes')


def _as_arrays(masks: Sequence[Tensor]) -> list:
    return [mask.numpy().astype(bool) for mask in masks]
