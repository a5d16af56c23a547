"""What differs between the runs: their plan, and the config of each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from ssn_plugin.jobs.configs import load_config
from studies.ledger import Row
from studies.rules import set_rules

NORMS = ('BN', 'GN', 'SN', 'SSN')
BATCHES = (4, 2, 1)
SEEDS = (0, 1)
# What --data may name, and the tasks that it is for; a complete comparison comes first.
TASKS = {'demo': ('det', 'seg'), 'cityscapes': ('seg',), 'coco': ('det',)}
# torch's BatchNorm refuses to train on one value per channel, which is what the image pooling of
# DeepLabV3+ has of one image.
IMPOSSIBLE = ('seg', 'BN', 1)
# `images` a run sees by data set, a multiple of every batch. Channels of stem and stages as the
# backbones have them; those of necks and heads grow with them.
SIZES = {
    'cpu': dict(channels=16, groups=8, images=dict(demo=800, cityscapes=480, coco=480)),
    'gpu': dict(channels=64, groups=32, images=dict(demo=6400, cityscapes=4800, coco=4800)),
}
# Learning rates of the demos, each for 4 images.
LR = {'det': 0.02, 'seg': 0.01}
LR_BATCH = 4
PERSON = dict(classes=('person',), palette=[(220, 20, 60)])


def plan(size: str, data: Sequence[str]) -> list[Row]:
    """The runs, in their order: a seed is complete before the next one begins.

    Args:
        size: 'cpu' or 'gpu'.
        data: Names of the data sets at hand.
    """
    return [
        dict(size=size, data=name, task=task, norm=norm, batch=batch, seed=seed)
        for seed in SEEDS
        for name, tasks in TASKS.items()
        if name in data
        for task in tasks
        for batch in BATCHES
        for norm in NORMS
        if (task, norm, batch) != IMPOSSIBLE
    ]


def config_of(run: Row, folders: Mapping[str, Path], backbone: str, work_dir: Path) -> Config:
    """The config of one run.

    Args:
        run: An entry of the plan.
        folders: Name of each data set -> its folder.
        backbone: File of published weights.
        work_dir: For logs and checkpoints.
    """
    task, norm, batch = run['task'], run['norm'], run['batch']
    size = SIZES[run['size']]
    config = load_config(str(Path(__file__).with_name(f'config_{task}.py')))
    iterations = size['images'][run['data']] // batch
    interval = warm_up = max(iterations // 8, 1)
    set_rules(config, norm, interval)
    norm_cfg = dict(type=norm, num_groups=size['groups']) if norm == 'GN' else dict(type=norm)
    _set_network(config, task, size['channels'], norm_cfg)
    config.norm_cfg = norm_cfg  # the demo's variable would ask for SSN in every run
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=backbone)
    # As mmdet does. SN and SSN keep their statistics live, as SN's authors fine-tune.
    config.model.backbone.norm_eval = norm == 'BN'
    _SET_DATA[run['data']](config, task, folders[run['data']], run['size'])
    config.merge_from_dict(
        {
            'optim_wrapper.optimizer.lr': LR[task] * batch / LR_BATCH,
            'param_scheduler.0.end': warm_up,
            'param_scheduler.1.begin': warm_up,
            'param_scheduler.1.end': iterations,
            'train_cfg.max_iters': iterations,
            'train_cfg.val_interval': iterations,
            'train_cfg.val_begin': iterations + 1,  # run_one() evaluates, once, at the end
            'train_dataloader.batch_size': batch,
            'default_hooks.checkpoint.interval': interval,
            'randomness.seed': run['seed'],
        }
    )
    config.work_dir = str(work_dir)
    config.experiment_name = work_dir.name
    config.resume = True  # from the last checkpoint of the work dir, if there is one
    # Formatting the config takes seconds, and with each checkpoint again.
    return Config(config.to_dict(), filename=config.filename, format_python_code=False)


def _set_network(config: Config, task: str, channels: int, norm_cfg: dict) -> None:
    """Width and norm throughout; the demos' heads are for stages of 32 to 256 channels."""
    model = config.model
    model.backbone.update(base_channels=channels, stem_channels=channels)
    for part in (model.backbone, *new_parts(model)):
        part.norm_cfg = norm_cfg  # update() would leave what the norm of the demo has besides
    stages = [channels * 2**stage for stage in range(4)]
    wide = 4 * channels
    if task == 'seg':
        model.decode_head.update(
            in_channels=stages[3],
            channels=wide,
            c1_in_channels=stages[0],
            c1_channels=channels,
        )
        model.auxiliary_head.update(in_channels=stages[2], channels=2 * channels)
        return
    model.neck.update(in_channels=stages, out_channels=wide)
    model.rpn_head.update(in_channels=wide, feat_channels=wide)
    heads = model.roi_head
    heads.bbox_roi_extractor.out_channels = heads.mask_roi_extractor.out_channels = wide
    heads.bbox_head.update(in_channels=wide, conv_out_channels=wide, fc_out_channels=4 * wide)
    heads.mask_head.update(in_channels=wide, conv_out_channels=wide)


def new_parts(model: ConfigDict) -> Iterator[ConfigDict]:
    """What a backbone's weights do not reach."""
    heads = model.get('roi_head', {})
    parts = (
        model.get('neck'),
        heads.get('bbox_head'),
        heads.get('mask_head'),
        model.get('decode_head'),
        model.get('auxiliary_head'),
    )
    return (part for part in parts if part is not None)


def _set_demo(config: Config, task: str, folder: Path, size: str) -> None:
    _set_root(config, folder / {'det': 'coco', 'seg': 'cityscapes'}[task])


def _set_coco(config: Config, task: str, folder: Path, size: str) -> None:
    """People alone: the one class of which a piece of COCO has enough."""
    _set_root(config, folder)
    scale = {'cpu': (224, 160), 'gpu': (640, 480)}[size]
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.metainfo = PERSON
        _set_resize(loader.dataset.pipeline, dict(scale=scale, keep_ratio=True))
    config.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
    config.model.roi_head.bbox_head.num_classes = config.model.roi_head.mask_head.num_classes = 1


def _set_cityscapes(config: Config, task: str, folder: Path, size: str) -> None:
    """The 19 classes, images of a quarter of their size (half in the size gpu), crops of them."""
    _set_root(config, folder)
    scale = {'cpu': (512, 256), 'gpu': (1024, 512)}[size]
    crop = {'cpu': (128, 192), 'gpu': (384, 384)}[size]
    config.model.data_preprocessor.size = crop
    config.model.decode_head.num_classes = config.model.auxiliary_head.num_classes = 19
    for loader in (config.train_dataloader, config.val_dataloader):
        dataset = loader.dataset
        dataset.type = 'CityscapesDataset'
        del dataset.metainfo
        dataset.seg_map_suffix = '_gtFine_labelTrainIds.png'
        _set_resize(dataset.pipeline, dict(scale=scale, keep_ratio=True))
        for step in dataset.pipeline:
            if step['type'] == 'RandomCrop':
                step.crop_size = crop


def _set_root(config: Config, folder: Path) -> None:
    root = f'{folder}/'
    for name in ('train_dataloader', 'val_dataloader'):
        config[name].dataset.data_root = root
    if 'ann_file' in config.val_evaluator:
        annotations = config.val_dataloader.dataset.ann_file
        config.val_evaluator.ann_file = f'{root}{annotations}'


def _set_resize(pipeline: list, options: dict) -> None:
    """Set the Resize of a pipeline; the training of the demos has none: behind the annotations."""
    for step in pipeline:
        if step['type'] == 'Resize':
            step.update(options)
            return
    position = next(i for i, step in enumerate(pipeline) if step['type'] == 'LoadAnnotations') + 1
    pipeline.insert(position, dict(type='Resize', **options))


_SET_DATA = {'demo': _set_demo, 'coco': _set_coco, 'cityscapes': _set_cityscapes}
