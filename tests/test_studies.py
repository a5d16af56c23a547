"""The studies: runs are neither lost nor repeated, and the tables are those of the rows."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where `python -m studies...` finds them

from studies import ledger, tables  # noqa: E402
from studies.defaults import analyze as defaults  # noqa: E402
from studies.defaults import recipe as defaults_recipe  # noqa: E402
from studies.defaults import run as defaults_run  # noqa: E402
from studies.remedies import analyze as remedies  # noqa: E402
from studies.remedies import recipe as remedies_recipe  # noqa: E402
from studies.remedies import run as remedies_run  # noqa: E402
from studies.selection import analyze as selection  # noqa: E402
from studies.small_batches import analyze as small_batches  # noqa: E402
from studies.small_batches import run as small_batches_run  # noqa: E402
from studies.sparsity import analyze as sparsity  # noqa: E402
from studies.transfer import analyze as transfer  # noqa: E402
from studies.transfer import recipe  # noqa: E402
from studies.transfer import run as transfer_run  # noqa: E402

FOREVER = ledger.Budget(float('inf'))


def plan(count: int) -> list[dict]:
    return [dict(norm='SSN', batch=2, seed=seed) for seed in range(count)]


def work(folder: Path, count: int) -> None:
    """Work through a plan; every execution leaves a line."""

    def execute(run, work_dir):
        with open(folder / 'executed', 'a') as file:
            file.write(f'{run["seed"]}\n')
        time.sleep(0.01)
        return dict(top1=run['seed'] + 0.5)

    ledger.work_through(plan(count), folder / 'work', folder / 'results.csv', FOREVER, execute)


def test_processes_that_share_a_plan_execute_each_run_once(tmp_path):
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=work, args=(tmp_path, 30)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    executed = (tmp_path / 'executed').read_text().split()
    assert sorted(map(int, executed)) == list(range(30))
    rows = ledger.read(tmp_path / 'results.csv')
    assert sorted(int(row['seed']) for row in rows) == list(range(30))
    assert all(float(row['top1']) == int(row['seed']) + 0.5 for row in rows)
    # No lock or temporary file stays behind.
    assert {path.name for path in tmp_path.iterdir()} == {'executed', 'work', 'results.csv'}
    before = (tmp_path / 'results.csv').read_bytes()
    work(tmp_path, 30)
    assert (tmp_path / 'results.csv').read_bytes() == before
    assert len((tmp_path / 'executed').read_text().split()) == 30


def test_a_killed_run_has_no_row_and_is_free_again(tmp_path):
    def execute(run, work_dir):
        if run['seed'] == 1:
            (tmp_path / 'reached').touch()
            time.sleep(60)
        return dict(top1=1)

    def start():
        ledger.work_through(plan(2), tmp_path / 'work', tmp_path / 'results.csv', FOREVER, execute)

    process = multiprocessing.get_context('fork').Process(target=start)
    process.start()
    while not (tmp_path / 'reached').exists():
        assert process.is_alive()
        time.sleep(0.01)
    # While it runs, nobody else takes its run.
    with ledger.claimed(tmp_path / 'work' / ledger.name_of(plan(2)[1])) as mine:
        assert not mine
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [row['seed'] for row in ledger.read(tmp_path / 'results.csv')] == ['0']
    work(tmp_path, 2)
    assert [row['seed'] for row in ledger.read(tmp_path / 'results.csv')] == ['0', '1']
    assert (tmp_path / 'executed').read_text().split() == ['1']


def test_an_error_of_the_work_itself_comes_through(tmp_path):
    with pytest.raises(BlockingIOError, match='a pipe is full'), ledger.claimed(tmp_path / 'work'):
        raise BlockingIOError('a pipe is full')
    with ledger.claimed(tmp_path / 'work') as mine:  # and the claim has ended
        assert mine


def test_an_error_within_a_claim_comes_out_as_it_is(tmp_path):
    def work_on_a_claim():
        with ledger.claimed(tmp_path / 'run') as mine:
            assert mine
            raise BlockingIOError

    with pytest.raises(BlockingIOError):
        work_on_a_claim()
    with ledger.claimed(tmp_path / 'run') as mine:
        assert mine


def test_budget(tmp_path):
    def never(run, work_dir):
        raise AssertionError

    results = tmp_path / 'results.csv'
    ledger.work_through(plan(2), tmp_path / 'work', results, ledger.Budget(0), never)
    assert not results.exists()
    executed = []

    def ends_early(run, work_dir):
        executed.append(run['seed'])

    ledger.work_through(plan(2), tmp_path / 'work', results, FOREVER, ends_early)
    # The second run is not begun, as the budget ended within the first.
    assert executed == [0]
    assert not results.exists()


def test_rows_of_a_run_take_the_place_of_its_earlier_ones(tmp_path):
    path = tmp_path / 'new' / 'selections.csv'
    keys = plan(2)
    for key in keys:
        ledger.record(path, key, [{**key, 'layer': f'sn{i}', 'BN': i / 4} for i in range(3)])
    ledger.record(path, keys[0], [{**keys[0], 'layer': 'sn1', 'BN': 1}])
    assert [(row['seed'], row['layer'], row['BN']) for row in ledger.read(path)] == [
        ('1', 'sn0', '0.0'),
        ('1', 'sn1', '0.25'),
        ('1', 'sn2', '0.5'),
        ('0', 'sn1', '1'),
    ]
    before = path.read_bytes()
    with pytest.raises(ValueError, match='got the fields'):
        ledger.record(path, keys[0], [{**keys[0], 'layer': 'sn1'}])
    assert path.read_bytes() == before


def test_verdict():
    assert tables.verdict([30, 34], [20, 26], 3) == 'higher'
    assert tables.verdict([20, 26], [30, 34], 3) == 'lower'
    assert tables.verdict([30, 34], [20, 31], 3) == 'no difference seen'  # they overlap
    assert tables.verdict([30, 31], [28, 29], 3) == 'no difference seen'  # too little
    assert tables.verdict([30], [20, 21], 3) == 'one seed'
    assert tables.verdict([], [20, 21], 3) == 'not yet run'


SYNTHETIC = {
    ('BN', 32): (40.0, 42.0),
    ('BN', 2): (20.0, 22.0),
    ('SSN', 32): (41.0, 43.0),
    ('SSN', 2): (38.0, 39.5),
    ('SN', 32): (44.0,),
}


@pytest.fixture
def results(tmp_path) -> Path:
    for (norm, batch), values in SYNTHETIC.items():
        for seed, top1 in enumerate(values):
            key = dict(size='cpu', norm=norm, batch=batch, seed=seed)
            row = {**key, 'epochs': 8, 'top1': top1, 'train_loss': 2.0 + seed}
            ledger.record(tmp_path / 'results.csv', key, [row])
    return tmp_path


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_tables_of_small_batches(results):
    found = small_batches.Results(ledger.read(results / 'results.csv'), 'cpu')
    table = cells(small_batches.accuracy_table(found))
    assert table['BN'] == ['41.0 (40.0-42.0)', 'not yet run', '21.0 (20.0-22.0)', '2 / 0 / 2']
    assert table['SN'] == ['44.0', 'not yet run', 'not yet run', '1 / 0 / 0']
    judged = cells(small_batches.verdict_table(found))
    assert judged['SSN against BN'] == ['no difference seen', 'not yet run', 'higher']
    assert judged['SSN against SN'] == ['one seed', 'not yet run', 'not yet run']


def test_seeds_are_paired_by_their_number(tmp_path):
    top1 = {'SSN': {0: 40.0, 1: 50.0, 2: 60.0}, 'SN': {1: 48.0, 2: 61.0, 3: 10.0}}
    for norm, values in top1.items():
        for seed, value in values.items():
            key = dict(size='cpu', norm=norm, batch=32, seed=seed)
            ledger.record(tmp_path / 'results.csv', key, [{**key, 'top1': value}])
    found = small_batches.Results(ledger.read(tmp_path / 'results.csv'), 'cpu')
    assert sparsity.differences(found, 'SN', 32) == [2, -1]
    assert sparsity.differences(found, 'SN', 8) == []


@pytest.mark.parametrize('study', ['small_batches', 'selection', 'sparsity'])
def test_analyze_prints_and_draws(study, results, tmp_path):
    for norm, batch in SYNTHETIC:
        for seed in range(2):
            key = dict(size='cpu', norm=norm, batch=batch, seed=seed)
            if norm != 'BN':
                ratios = dict(layer='sn1', statistic='mean', IN=0.25, LN=0.25, BN=0.5)
                ledger.record(results / 'selections.csv', key, [{**key, **ratios}])
    option = '--trained-results' if study == 'sparsity' else '--results'
    out = tmp_path / 'figures'
    out.mkdir()
    command = [sys.executable, '-m', f'studies.{study}.analyze', option, results, '--out', out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '| SSN' in done.stdout or '| SN |' in done.stdout
    (png,), (svg,) = out.glob('*.png'), out.glob('*.svg')
    assert png.read_bytes()[:4] == b'\x89PNG'
    assert 'size cpu' in svg.read_text()


PAGES = {
    'small_batches': (small_batches.report, ['small_batches/results.csv']),
    'sparsity': (sparsity.report, ['sparsity/results.csv', 'small_batches/results.csv']),
    'selection': (selection.report, ['small_batches/selections.csv']),
    'transfer': (transfer.report, ['transfer/results.csv']),
    'remedies': (remedies.report, ['remedies/results.csv', 'transfer/results.csv']),
    'defaults': (
        defaults.report,
        ['defaults/results.csv', 'small_batches/results.csv', 'transfer/results.csv'],
    ),
}


@pytest.mark.parametrize('study', PAGES)
def test_the_tables_of_the_pages_are_those_of_the_rows(study):
    """Run `python -m studies.STUDY.analyze` if this fails."""
    report, files = PAGES[study]
    expected = report(*(ledger.read(ROOT / 'studies' / file) for file in files))
    page = (ROOT / 'studies' / study / 'README.md').read_text()
    _, _, rest = page.partition(tables.BEGIN)
    shown, end, _ = rest.partition(tables.END)
    assert end
    assert shown.strip() == expected


def test_the_page_of_results_quotes_the_rows():
    page = (ROOT / 'docs' / 'results.md').read_text()
    rows = ledger.read(ROOT / 'studies' / 'small_batches' / 'results.csv')
    found = small_batches.Results(rows, 'cpu')
    for batch, norms in ((32, ('BN', 'GN', 'SN', 'SSN')), (2, ('BN', 'GN', 'SSN'))):
        for norm in norms:
            values = found.values('top1', norm, batch)
            assert f'{sum(values) / len(values):.1f}' in page, (norm, batch)
    choices = ledger.read(ROOT / 'studies' / 'small_batches' / 'selections.csv')
    for norm in ('SN', 'SSN'):
        shares = []
        for batch in small_batches.BATCHES:
            seeds = selection.of_run(choices, norm, batch).values()
            mean = sum(selection.share(seed, 'BN') for seed in seeds) / len(seeds)
            shares.append(f'{mean:.2f}'.removeprefix('0'))
        assert ' / '.join(shares) in page, norm
    rows = ledger.read(ROOT / 'studies' / 'transfer' / 'results.csv')
    for task in ('det', 'seg'):
        comparison = transfer.Comparison(rows, 'demo', task)
        for norm in recipe.NORMS:
            means = [
                f'{sum(values) / len(values):.1f}' if values else 'refused by torch'
                for values in (comparison.scores(norm, batch) for batch in recipe.BATCHES)
            ]
            assert f'{norm} {" / ".join(means)}' in page, (task, norm)
    rows = remedies.joined(ledger.read(ROOT / 'studies' / 'remedies' / 'results.csv'), rows)
    for task, score in (('det', 'box AP50'), ('seg', 'mIoU')):
        comparison = transfer.Comparison(rows, 'demo', task)
        names = ('SSN', 'norm_eval+no-BN', 'GN')
        before, after, other = (
            f'{sum(values) / len(values):.1f}'
            for values in (comparison.scores(name, 1) for name in names)
        )
        assert f'{score} {before} -> {after} (GN {other})' in page


def confirmed() -> tuple[defaults.Confirmed, str]:
    """The published rows of the study on defaults and of those beside it, and the best rule."""
    rows, small, transferred = (
        ledger.read(ROOT / 'studies' / study / 'results.csv')
        for study in ('defaults', 'small_batches', 'transfer')
    )
    return (
        defaults.Confirmed(rows, list(defaults.published(small, transferred))),
        defaults.best_so_far('cpu', rows),
    )


def test_the_readme_quotes_the_rows():
    found, best = confirmed()
    _, _, text = (ROOT / 'README.md').read_text().partition('## When to use it\n')
    lines = [line.strip('| ').split(' | ') for line in text.split('\n## ')[0].split('\n')]
    tasks = {'classification': 'cls', 'segmentation': 'seg', 'detection': 'det'}
    cells = [(tasks.get(line[0].split(',')[0]), *line[1:5]) for line in lines if len(line) == 6]
    cells = [cell for cell in cells if cell[0]]
    assert len(cells) >= 3
    for task, batch, *shown in cells:
        for name, value in zip(('BN', 'GN', best), shown, strict=True):
            values = (
                defaults.ours(found, best, task, int(batch))
                if name == best
                else found.values(name, task, int(batch))
            )
            mean = f'{sum(values) / len(values):.1f}' if values else 'refused'
            assert value == mean, (task, batch, name)


def test_the_page_of_results_quotes_the_study_on_defaults():
    found, best = confirmed()
    page = (ROOT / 'docs' / 'results.md').read_text()
    _, _, claim = page.partition('(ours) With the candidates LN, GN and BN')
    for task, batches in defaults_recipe.BATCHES.items():
        for name in ('SSN', *defaults_recipe.NORMS):
            means = []
            for batch in batches:
                values = (
                    defaults.ours(found, best, task, batch)
                    if name == 'SSN'
                    else found.values(name, task, batch)
                )
                means.append(f'{sum(values) / len(values):.1f}' if values else 'refused')
            assert f'{name} {" / ".join(means)}' in claim.split('\n')[0], (task, name)


def test_tables_are_put_between_the_marks_alone(tmp_path):
    page = tmp_path / 'README.md'
    tables.put_into(page, 'new')
    assert not page.exists()
    page.write_text('no marks')
    tables.put_into(page, 'new')
    assert page.read_text() == 'no marks'
    page.write_text(f'before {tables.BEGIN} old {tables.END} after')
    tables.put_into(page, 'new')
    tables.put_into(page, 'newer')
    assert page.read_text() == f'before {tables.BEGIN}\n\nnewer\n\n{tables.END} after'


def choices(picks: str, seed: str) -> list[dict[str, str]]:
    names = {'i': 'IN', 'l': 'LN', 'b': 'BN'}
    rows = []
    for index, pick in enumerate(picks):
        ratios = {name: str(float(name == names[pick])) for name in selection.CANDIDATES}
        row = dict(size='cpu', norm='SSN', batch='32', seed=seed, layer=f'layer1.{index}.sn1')
        rows.append({**row, 'statistic': 'mean', **ratios})
    return rows


def test_agreement_of_seeds_against_chance():
    same = 'iillbbbbilb' * 2
    (pair,) = selection.agreements({'0': choices(same, '0'), '1': choices(same, '1')})
    counts = [same.count(letter) / len(same) for letter in 'ilb']
    assert pair.equal == 1
    # In random places two such seeds agree in the sum of the squared shares.
    assert pair.chance == pytest.approx(sum(c * c for c in counts), abs=0.01)
    assert pair.chance < pair.bound < 1
    (other,) = selection.agreements({'0': choices('iilb', '0'), '1': choices('blii', '1')})
    assert other.equal == 0


def test_shares():
    rows = choices('iilb', '0')
    assert [selection.share(rows, n) for n in selection.CANDIDATES] == [0.5, 0.25, 0.25]
    assert cells(selection.depth_table(rows))['layer1'] == ['0.50 / 0.25 / 0.25', '', '']


@pytest.fixture
def image_folder(tmp_path) -> Path:
    for split in ('train', 'val'):
        for name in ('a', 'b', 'c'):
            folder = tmp_path / 'images' / split / name
            folder.mkdir(parents=True)
            for index in range(32):
                (folder / f'{index}.png').touch()
    return tmp_path / 'images'


@pytest.mark.parametrize('batch', small_batches_run.BATCHES)
@pytest.mark.parametrize('norm', small_batches_run.NORMS)
def test_config_of_a_run(norm, batch, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('SSN_IMAGEFOLDER', '')  # set by the run, put back behind the test
    run = dict(size='cpu', norm=norm, batch=batch, seed=1)
    config = small_batches_run.config_of(run, image_folder, tmp_path / 'work')
    assert config.model.head.num_classes == 3
    assert config.model.backbone.norm_cfg.type == norm.split('-')[0]
    assert config.optim_wrapper.optimizer.lr == pytest.approx(0.05 * batch / 32)
    assert config.train_dataloader.batch_size == batch
    assert config.train_cfg.max_epochs == config.param_scheduler[1].end
    assert config.train_cfg.val_begin > config.train_cfg.max_epochs
    hooks = {hook.type: hook for hook in config.custom_hooks}
    assert ('SSNRadiusHook' in hooks) == norm.startswith('SSN')
    if norm.startswith('SSN'):
        assert hooks['SSNRadiusHook'].end_radius == (0 if norm == 'SSN-radius0' else 1)
    rules = config.optim_wrapper.get('paramwise_cfg')
    wanted = {'SN': 1.0, 'SSN': 0.1, 'SSN-radius0': 0.1}
    assert (rules and rules.ssn_lr_mult) == wanted.get(norm)


def test_plan_completes_a_seed_before_the_next():
    runs = small_batches_run.plan('cpu')
    assert len({ledger.name_of(run) for run in runs}) == len(runs) == 45
    assert [run['seed'] for run in runs] == [0] * 15 + [1] * 15 + [2] * 15


def test_missing_data_is_one_line(tmp_path):
    command = [sys.executable, '-m', 'studies.small_batches.run', '--data', tmp_path / 'nowhere']
    done = subprocess.run(
        [*command, '--work-dir', tmp_path, '--out', tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'run.py: train_dataloader.dataset: no such file or folder' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'results.csv').exists()


# ---------------------------------------------------------------- transfer


def test_plan_of_transfer():
    runs = recipe.plan('cpu', ['coco', 'demo', 'cityscapes'])
    assert len({ledger.name_of(run) for run in runs}) == len(runs)
    # 4 norms at 3 batches for each of 4 comparisons, but BN at one image in the two of DeepLabV3+.
    assert [run['seed'] for run in runs] == [0] * 46 + [1] * 46
    assert list(dict.fromkeys((run['data'], run['task']) for run in runs)) == [
        ('demo', 'det'),
        ('demo', 'seg'),
        ('cityscapes', 'seg'),
        ('coco', 'det'),
    ]
    refused = [run for run in runs if (run['task'], run['norm'], run['batch']) == ('seg', 'BN', 1)]
    assert not refused
    assert {run['data'] for run in recipe.plan('gpu', ['coco'])} == {'coco'}


@pytest.fixture
def fine_tuning(tmp_path):
    """The config of a run of transfer."""

    def config_of(data='demo', task='det', norm='SSN', batch=2, size='cpu'):
        pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[task])
        run = dict(size=size, data=data, task=task, norm=norm, batch=batch, seed=1)
        return recipe.config_of(run, {data: tmp_path / 'data'}, 'r18.pth', tmp_path / 'work')

    return config_of


@pytest.mark.parametrize(
    ('task', 'norm', 'size'),
    [
        ('det', 'BN', 'cpu'),
        ('det', 'SN', 'cpu'),
        ('det', 'GN', 'gpu'),
        ('seg', 'SSN', 'cpu'),
        ('seg', 'GN', 'gpu'),
    ],
)
def test_network_of_transfer_has_one_norm_throughout(task, norm, size, fine_tuning):
    from mmengine.registry import MODELS, init_default_scope

    from ssn_plugin.engine.start_check import check_norms_asked_for

    config = fine_tuning(task=task, norm=norm, size=size)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)  # init_cfg is not used before init_weights()
    kinds = {'BN': 'BatchNorm2d', 'GN': 'GroupNorm', 'SN': 'SN', 'SSN': 'SSN'}
    found = [type(m).__name__ for m in model.modules() if type(m).__name__ in kinds.values()]
    assert set(found) == {kinds[norm]}
    assert len(found) > 20  # those of the backbone, and of the heads
    width = recipe.SIZES[size]['channels']
    assert model.backbone.conv1.out_channels == width
    assert model.backbone.norm_eval == (norm == 'BN')
    hooks = [hook.type for hook in config.custom_hooks]
    assert ('SSNRadiusHook' in hooks) == (norm == 'SSN')
    assert 'SSNResumeHook' in hooks
    check_norms_asked_for(model, config.to_dict())  # as the start of a run does


@pytest.mark.parametrize(('task', 'batch'), [('det', 4), ('seg', 1)])
def test_every_run_of_transfer_sees_as_many_images(task, batch, fine_tuning):
    config = fine_tuning('demo', task, 'SSN', batch)
    loader = config.train_dataloader
    assert loader.batch_size == batch
    images = recipe.SIZES['cpu']['images']['demo']
    assert config.train_cfg.max_iters * batch == images
    assert config.param_scheduler[1].end == config.train_cfg.max_iters
    assert config.optim_wrapper.optimizer.lr == pytest.approx(recipe.LR[task] * batch / 4)
    for sizes in recipe.SIZES.values():
        assert all(
            images % other == 0 for images in sizes['images'].values() for other in (1, 2, 4)
        )


def test_data_of_transfer(fine_tuning):
    det = fine_tuning('coco')
    heads = det.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == 1
    assert det.train_dataloader.dataset.metainfo.classes == ('person',)
    for loader in (det.train_dataloader, det.val_dataloader):
        scales = [s['scale'] for s in loader.dataset.pipeline if s['type'] == 'Resize']
        assert scales == [(224, 160)]
    assert det.val_evaluator.ann_file.endswith('/data/annotations/instances_val2017.json')
    seg = fine_tuning('cityscapes', 'seg')
    assert seg.train_dataloader.dataset.type == 'CityscapesDataset'
    assert seg.model.decode_head.num_classes == seg.model.auxiliary_head.num_classes == 19
    crop = next(s for s in seg.train_dataloader.dataset.pipeline if s['type'] == 'RandomCrop')
    assert crop['crop_size'] == seg.model.data_preprocessor.size == (128, 192)


def test_bn_refuses_the_image_pooling_of_one_image(fine_tuning):
    """Why the plan lacks that run."""
    from mmengine.registry import MODELS, init_default_scope

    config = fine_tuning('demo', 'seg', 'BN', 1)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model.decode_head(model.backbone(torch.rand(1, 3, 96, 128)))


@pytest.fixture
def tiny_scenes(tmp_path, monkeypatch) -> Path:
    """Demo data of 4 + 2 images in the layout of Cityscapes, of which a run sees 8."""
    import mmcv

    random = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        for index in range(count):
            for kind, shape, suffix, values in (
                ('leftImg8bit', (96, 128, 3), 'leftImg8bit', 256),
                ('gtFine', (96, 128), 'gtFine_labelTrainIds', 5),
            ):
                path = tmp_path / 'demo/cityscapes' / kind / split / f'{index}_{suffix}.png'
                mmcv.imwrite(random.integers(values, size=shape, dtype=np.uint8), str(path))
    images = dict(recipe.SIZES['cpu']['images'], demo=8)
    monkeypatch.setitem(recipe.SIZES, 'cpu', dict(recipe.SIZES['cpu'], images=images))
    return tmp_path / 'demo'


@pytest.fixture
def trained_backbones(tmp_path) -> Path:
    """What the study on small batches leaves of SSN, seed 1, at 32 and at 2 images."""
    pytest.importorskip('mmseg')
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmseg')
    backbone = dict(type='SSNResNet', depth=18, base_channels=16, stem_channels=16)
    for batch in (32, 2):
        trained = MODELS.build(backbone).state_dict()
        folder = tmp_path / 'trained' / f'cpu_SSN_batch{batch}_seed1'
        folder.mkdir(parents=True)
        checkpoint = {'state_dict': {f'backbone.{key}': value for key, value in trained.items()}}
        torch.save(checkpoint, folder / 'epoch_8.pth')
    return tmp_path / 'trained'


def test_a_run_of_transfer_in_pieces(tmp_path, tiny_scenes, trained_backbones):
    """Backbone published, fine-tuned, interrupted by the budget, gone on with, evaluated."""

    def work(minutes):
        run = dict(size='cpu', data='demo', task='seg', norm='SSN', batch=4, seed=1)
        budget = ledger.Budget(minutes)
        data = {'demo': tiny_scenes}
        arguments = (data, trained_backbones, tmp_path / 'work' / 'run', budget, 'cpu')
        return transfer_run.run_one(run, *arguments)

    assert work(0) is None
    row = work(10)
    assert (row['iterations'], row['pieces'], row['undecided']) == (2, 2, 0)
    assert 0 <= float(row['miou']) <= 100
    assert float(row['mean_IN']) + float(row['mean_LN']) + float(row['mean_BN']) == pytest.approx(
        1, abs=1e-3
    )
    assert (tmp_path / 'work' / 'backbones' / row['backbone']).is_file()


TRANSFERRED = {
    ('det', 'BN', 2): (30.0, 32.0),
    ('det', 'SSN', 2): (41.0, 43.0),
    ('det', 'SN', 2): (44.0,),
    ('seg', 'SSN', 1): (3.0, 2.0),
}


def test_tables_of_transfer(tmp_path):
    for (task, norm, batch), values in TRANSFERRED.items():
        for seed, score in enumerate(values):
            key = dict(size='cpu', data='demo', task=task, norm=norm, batch=batch, seed=seed)
            own, other = (score, '') if task == 'det' else ('', score)
            columns = dict(box_ap50=own, mask_ap50=own, miou=other, pixel_accuracy=other)
            ledger.record(tmp_path / 'results.csv', key, [{**key, **columns, 'train_loss': 1.0}])
    rows = ledger.read(tmp_path / 'results.csv')
    det, seg = (transfer.Comparison(rows, 'demo', task) for task in ('det', 'seg'))
    table = cells(transfer.score_table(det, 'box_ap50'))
    assert table['SSN'] == ['not yet run', '42.0 (41.0-43.0)', 'not yet run', '0 / 2 / 0']
    judged = cells(transfer.verdict_table(det))
    assert judged['SSN against BN'] == ['not yet run', 'higher', 'not yet run']
    assert judged['SSN against SN'] == ['not yet run', 'one seed', 'not yet run']
    assert cells(transfer.score_table(seg, 'miou'))['BN'][2] == 'refused by torch'
    assert cells(transfer.verdict_table(seg))['SSN against BN'][2] == 'not comparable'
    assert det.learned
    assert not seg.learned
    text = transfer.report(rows)
    assert 'No run got above 5 %' in text
    assert '`coco`, Mask R-CNN: not yet run.' in text
    from matplotlib.figure import Figure

    assert isinstance(transfer.transfer_figure(rows, 'title'), Figure)


def test_scores_in_percent():
    found = transfer_run.scores('det', {'coco/bbox_mAP_50': 0.123, 'coco/segm_mAP_50': 0.1})
    assert found == dict(box_ap50='12.30', mask_ap50='10.00', miou='', pixel_accuracy='')
    found = transfer_run.scores('seg', {'mIoU': 45.6, 'aAcc': 90.0})
    assert found == dict(box_ap50='', mask_ap50='', miou='45.60', pixel_accuracy='90.00')


@pytest.mark.parametrize(
    ('arguments', 'code', 'said'),
    [
        (['--data', 'demo'], 2, 'got demo, expected NAME=FOLDER'),
        (['--data', 'demo=nowhere'], 1, 'no such file or folder'),
    ],
)
def test_bad_input_of_transfer_is_one_line(arguments, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, 'argv', ['run.py', *arguments, '--work-dir', str(tmp_path), '--out', str(tmp_path)]
    )
    with pytest.raises(SystemExit) as caught:
        transfer_run.main()
    # A text is printed, and the status is 1.
    assert (2 if caught.value.code == 2 else 1) == code
    assert said in capsys.readouterr().err + str(caught.value.code)
    assert not (tmp_path / 'results.csv').exists()


# ---------------------------------------------------------------- remedies


def test_plan_of_remedies():
    runs = remedies_recipe.plan('cpu')
    assert len({ledger.name_of(run) for run in runs}) == len(runs) == 40
    assert [run['seed'] for run in runs] == [0] * 20 + [1] * 20
    # What each is compared with is a run of the other study.
    others = recipe.plan('cpu', ['demo'])
    assert all(remedies_recipe.of_transfer(run) in others for run in runs)


def differences(ours, theirs, place=''):
    """Places where two configs differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from differences(ours.get(key), theirs.get(key), f'{place}.{key}')
    elif ours != theirs:
        yield place.lstrip('.')


@pytest.mark.parametrize('task', remedies_recipe.TASKS)
@pytest.mark.parametrize('remedy', remedies_recipe.REMEDIES)
def test_a_remedy_changes_one_thing(remedy, task, tmp_path, fine_tuning):
    pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[task])  # its config names it
    run = dict(size='cpu', task=task, remedy=remedy, batch=2, seed=1)
    config = remedies_recipe.config_of(run, tmp_path / 'data', 'r18.pth', tmp_path / 'work')
    changed = set(differences(config.to_dict(), fine_tuning(task=task).to_dict()))
    heads = {
        'det': ('neck', 'roi_head.bbox_head', 'roi_head.mask_head'),
        'seg': ('decode_head', 'auxiliary_head'),
    }[task]
    without_bn = {f'model.{h}.norm_cfg.{a}' for h in heads for a in ('normalizers', 'num_groups')}
    expected = {
        'norm_eval': {'model.backbone.norm_eval'},
        'no-BN': without_bn,
        'norm_eval+no-BN': {'model.backbone.norm_eval', *without_bn},
        'PreciseStatsHook': {'custom_hooks'},
        'chosen-at-2': set(),  # another file of weights
    }
    assert changed == expected[remedy]
    assert ('PreciseStatsHook' in {hook['type'] for hook in config.custom_hooks}) == (
        remedy == 'PreciseStatsHook'
    )


@pytest.mark.parametrize(
    ('remedy', 'source', 'groups'),
    [('norm_eval+no-BN', 32, True), ('PreciseStatsHook', 32, False), ('chosen-at-2', 2, False)],
)
def test_a_run_of_remedies(remedy, source, groups, tmp_path, tiny_scenes, trained_backbones):
    run = dict(size='cpu', task='seg', remedy=remedy, batch=1, seed=1)
    budget = ledger.Budget(10)
    arguments = (tiny_scenes, trained_backbones, tmp_path / 'work' / 'run', budget, 'cpu')
    row = remedies_run.run_one(run, *arguments)
    assert (row['iterations'], row['undecided']) == (8, 0)
    assert row['backbone'].startswith(f'cpu_SSN_batch{source}_seed1-')
    for statistic in ('mean', 'var'):
        shares = [float(row[f'{statistic}_{name}']) for name in ('IN', 'LN', 'BN', 'GN')]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert (float(row['mean_GN']) + float(row['var_GN']) > 0) == groups


def test_tables_of_remedies():
    def rows(name, values, **key):
        for seed, score in enumerate(values):
            scores = dict(box_ap50=f'{score}') if key['task'] == 'det' else dict(miou=f'{score}')
            yield {**key, name[0]: name[1], 'size': 'cpu', 'seed': str(seed), **scores}

    others = [
        *rows(('norm', 'SSN'), (40, 42), data='demo', task='det', batch='1'),
        *rows(('norm', 'GN'), (60, 62), data='demo', task='det', batch='1'),
        *rows(('norm', 'GN'), (1, 2), data='coco', task='det', batch='1'),
    ]
    own = [
        *rows(('remedy', 'norm_eval'), (50, 52), task='det', batch='1'),
        *rows(('remedy', 'no-BN'), (59, 63), task='det', batch='1'),
    ]
    det = transfer.Comparison(remedies.joined(own, others), 'demo', 'det')
    scores = cells(remedies.score_table(det))
    assert scores['SSN as it is'] == ['not yet run', '41.0 (40.0-42.0)', '0 / 2']
    assert scores['GN'] == ['not yet run', '61.0 (60.0-62.0)', '0 / 2']
    judged = cells(remedies.verdict_table(det))
    assert judged['norm_eval'] == ['not yet run', 'higher', 'not yet run', 'lower']
    assert judged['no-BN'] == ['not yet run', 'higher', 'not yet run', 'no difference seen']
    report = remedies.report(own, others)
    assert 'Mask R-CNN:' in report
    assert '59.0-63.0' in report
    figure = remedies.remedies_figure(remedies.joined(own, others), 'title')
    drawn = [
        sorted(float(x) for marks in ax.collections for x, _ in marks.get_offsets())
        for ax in figure.axes
    ]
    assert drawn == [[], [40, 42, 50, 52, 59, 60, 62, 63], [], []]  # those of COCO are not of it


def test_a_missing_backbone_is_one_line_before_any_run(tmp_path, tiny_scenes, trained_backbones):
    command = [sys.executable, '-m', 'studies.remedies.run', '--data', tiny_scenes]
    folders = ['--trained', trained_backbones, '--work-dir', tmp_path / 'w', '--out', tmp_path]
    done = subprocess.run(
        [*command, *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert 'run.py: --trained: ' in done.stderr
    assert 'cpu_SSN_batch2_seed0' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'w').exists()


# ---------------------------------------------------------------- defaults


def rows_of(runs, scores) -> list[dict[str, str]]:
    """A row per run, as a file has it."""
    rows = []
    for run, score in zip(runs, scores, strict=True):
        columns = dict.fromkeys(('top1', 'miou', 'box_ap50', 'part'), '')
        columns[defaults_recipe.SCORES[run['task']]] = score
        row = {**run, **columns, 'train_loss': 1.0}
        rows.append({name: str(value) for name, value in row.items()})
    return rows


def screening(best: str) -> list[dict[str, str]]:
    runs = [
        defaults_recipe.run_of('cpu', rule, cell, 10)
        for cell in defaults_recipe.SCREENING_CELLS
        for rule in defaults_recipe.RULES
    ]
    return rows_of(runs, [30 + (run['rule'] == best) for run in runs])


def test_plan_of_defaults_confirms_what_the_screening_found():
    first, best = defaults_recipe.RULES[:2]
    rows = screening(best)
    before = defaults_recipe.plan('cpu', rows[:-1])
    # Until the winner is known, the first rule stands for it.
    assert all(any(ledger.matches(row, run) for run in before) for row in rows)
    assert {run['rule'] for run in before if run['seed'] == 0 and run['batch'] == 4} == {first}
    runs = defaults_recipe.plan('cpu', rows)
    assert len({ledger.name_of(run) for run in runs}) == len(runs)
    assert {run['seed'] for run in runs[:9]} == {10}
    assert {run['rule'] for run in runs[9:20]} == {best}
    recipe_rate = [run for run in runs if run['lr_factor'] == 1]
    own = [run for run in recipe_rate if run['rule'] == best and run['seed'] != 10]
    assert {(run['task'], run['batch'], run['seed']) for run in own} == {
        (task, batch, seed)
        for task, batches in defaults_recipe.BATCHES.items()
        for batch in batches
        for seed in (0, 1, 2)
    }
    # Each fine-tuning comes behind the pre-training that it starts from.
    for place, run in enumerate(runs):
        if run['task'] != 'cls':
            assert defaults_recipe.pretraining_of(run) in runs[:place]


def test_a_norm_gets_other_seeds_at_its_best_learning_rate():
    best = defaults_recipe.RULES[0]
    rows = screening(best)
    tried = [
        defaults_recipe.run_of('cpu', 'GN', ('seg', 1), 10, lr_factor=factor)
        for factor in defaults_recipe.LR_FACTORS
    ]
    wanted = [{**tried[2], 'seed': seed} for seed in (0, 1, 2)]
    before = defaults_recipe.plan('cpu', [*rows, *rows_of(tried[:2], [30, 20])])
    assert not any(run in before for run in wanted)
    after = defaults_recipe.plan('cpu', [*rows, *rows_of(tried, [30, 20, 31])])
    assert [run for run in after if run in wanted] == wanted
    for run in wanted:  # behind the pre-training that it starts from
        assert defaults_recipe.pretraining_of(run) in after[: after.index(run)]
    assert ('seg', 'BN', 1) not in {(run['task'], run['rule'], run['batch']) for run in after}


def test_a_lever_changes_one_thing(tmp_path):
    pytest.importorskip('mmseg')
    plain, *levers = (
        defaults_recipe.config_of(
            defaults_recipe.run_of('cpu', rule, ('seg', 2), 0), tmp_path, 'r18.pth', tmp_path / 'w'
        )
        for rule in (defaults_recipe.RULES[0], *defaults_recipe.LEVER_RULES)
    )
    full_rate, late_begin, more_bn, renorm = levers
    assert plain.optim_wrapper.paramwise_cfg.ssn_lr_mult == 0.1
    assert full_rate.optim_wrapper.paramwise_cfg.ssn_lr_mult == 1.0
    begins = [
        hook['begin']
        for config in (plain, late_begin)
        for hook in config.custom_hooks
        if hook['type'] == 'SSNRadiusHook'
    ]
    assert begins == [0.0, 0.1]
    assert more_bn.custom_hooks[-1]['ratios'] == [0.25, 0.25, 0.5]
    assert len(more_bn.custom_hooks) == len(plain.custom_hooks) + 1
    for config in levers[:3]:
        assert config.model == plain.model
    changed = renorm.model.decode_head.norm_cfg
    assert (changed.pop('type'), changed.pop('warm_up')) == ('BatchRenormSSN', 40)
    assert changed == {k: v for k, v in plain.model.decode_head.norm_cfg.items() if k != 'type'}


def test_batch_renormalisation_has_the_gradients_of_its_paper():
    from studies.defaults.batch_renorm import BatchRenormSSN

    torch.manual_seed(0)
    layer = BatchRenormSSN(4, warm_up=10, normalizers=('LN', 'GN', 'BN')).double()
    layer.select('BN', 'BN')
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.05, 3)
    layer.running_var[0] = 9.0  # beyond the limit of a ratio
    layer.num_batches_tracked.fill_(4)  # the next one is half way
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
    dy = torch.randn_like(x)
    running_mean, running_std = layer.running_mean.clone(), (layer.running_var + layer.eps).sqrt()
    y = layer(x)
    dx, dweight = torch.autograd.grad(y, (x, layer.weight), dy)

    rows, dout = (t.detach().transpose(0, 1).flatten(1) for t in (x, dy))
    m = rows.shape[1]
    mean, std = rows.mean(1), (rows.var(1, correction=0) + layer.eps).sqrt()
    r = (std / running_std).clamp(1 / 2, 2)
    d = ((mean - running_mean) / running_std).clamp(-2.5, 2.5)
    centred = rows - mean[:, None]
    normalised = centred / std[:, None] * r[:, None] + d[:, None]
    weight = layer.weight.detach()
    dnormalised = dout * weight[:, None]
    dstd = (dnormalised * centred).sum(1) * -r / std**2
    dmean = dnormalised.sum(1) * -r / std
    wanted = (
        dnormalised * (r / std)[:, None]
        + dstd[:, None] * centred / (m * std)[:, None]
        + dmean[:, None] / m
    )
    assert not torch.allclose(r, std / running_std)  # at least one is at its limit

    def by_channel(tensor):
        return tensor.detach().transpose(0, 1).flatten(1)

    torch.testing.assert_close(by_channel(y), normalised * weight[:, None])
    torch.testing.assert_close(by_channel(dx), wanted)
    torch.testing.assert_close(dweight, (dout * normalised).sum(1))
    torch.testing.assert_close(layer.running_mean, running_mean * 0.9 + mean * 0.1)


def test_initial_ratios_are_those_of_undecided_layers():
    from torch import nn

    from ssn_plugin import SSN

    model = nn.Sequential(SSN(8, normalizers=('LN', 'GN', 'BN')), nn.Conv2d(8, 8, 1), SSN(8))
    model[2].select('BN', 'BN')
    kept = model[2].mean_weight.detach().clone()
    hook = defaults_recipe.InitialRatiosHook([0.25, 0.25, 0.5])
    hook.before_train(SimpleNamespace(iter=0, model=model))
    for ratios in (model[0].mean_ratios, model[0].var_ratios):
        assert ratios.tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert torch.equal(model[2].mean_weight, kept)


@pytest.mark.parametrize(
    ('backbone', 'in_backbone', 'stored'),
    [
        ('stored', ('LN', 'GN', 'BN'), True),
        ('live', ('LN', 'GN', 'BN'), False),
        ('released', ('IN', 'LN', 'BN'), True),
    ],
)
def test_a_rule_reaches_every_layer(backbone, in_backbone, stored, tmp_path):
    pytest.importorskip('mmseg')
    from mmengine.registry import MODELS, init_default_scope

    from ssn_plugin import SSN

    run = defaults_recipe.run_of('cpu', 'LN-GN-BN@0.3', ('seg', 2), 0, backbone, lr_factor=0.5)
    config = defaults_recipe.config_of(run, tmp_path, 'r18.pth', tmp_path / 'work')
    init_default_scope('mmseg')
    model = MODELS.build(config.model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SSN)}
    for name, layer in layers.items():
        expected = in_backbone if name.startswith('backbone.') else ('LN', 'GN', 'BN')
        assert layer.normalizers == expected, name
    assert len(layers) > 20
    assert model.backbone.norm_eval == stored
    (hook,) = (h for h in config.custom_hooks if h['type'] == 'SSNRadiusHook')
    assert (hook['end'], hook['end_radius']) == (0.3, 1)
    assert config.optim_wrapper.optimizer.lr == pytest.approx(0.01 * 2 / 4 * 0.5)


def test_a_fine_tuning_of_defaults(tmp_path, tiny_scenes):
    pytest.importorskip('mmseg')
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmseg')
    run = defaults_recipe.run_of('cpu', 'LN-GN-BN@0.3', ('seg', 4), 0)
    norm_cfg = dict(type='SSN', normalizers=('LN', 'GN', 'BN'), num_groups=8)
    widths = dict(base_channels=16, stem_channels=16)
    trained = MODELS.build(dict(type='SSNResNet', depth=18, norm_cfg=norm_cfg, **widths))
    folder = tmp_path / 'work' / ledger.name_of(defaults_recipe.pretraining_of(run))
    folder.mkdir(parents=True)
    state = {f'backbone.{key}': value for key, value in trained.state_dict().items()}
    torch.save({'state_dict': state}, folder / 'epoch_8.pth')
    row = defaults_run.run_one(
        run, tiny_scenes, tmp_path / 'work' / 'run', ledger.Budget(10), 'cpu'
    )
    assert (row['iterations'], row['undecided'], row['part']) == (2, 0, 'confirmation')
    assert row['backbone'] == 'stored'
    assert row['weights'].startswith('cpu_cls_LN-GN-BN@0.3_none_batch32_seed0')
    shares = {name: float(row[f'mean_{name}']) for name in defaults_recipe.CANDIDATES}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares['IN'] == 0


def test_tables_of_defaults():
    best = defaults_recipe.RULES[0]
    shipped = defaults_recipe.SHIPPED
    seeds = [defaults_recipe.run_of('cpu', shipped, ('seg', 1), seed) for seed in (0, 1)]
    rows = [*screening(best), *rows_of(seeds, [40, 42])]
    theirs = [('GN', 0, 50), ('GN', 1, 49), ('SN', 0, 41), ('SN', 1, 30), ('SSN', 0, 9)]
    transferred = [
        dict(size='cpu', data='demo', task='seg', norm=norm, batch='1', seed=str(seed), miou=miou)
        for norm, seed, miou in theirs
    ]
    transferred.append({**transferred[0], 'data': 'cityscapes', 'miou': 1})
    others = list(defaults.published([], transferred))
    found = defaults.Confirmed(rows, others)
    assert found.values(best, 'seg', 1) == []  # not the screening's
    assert defaults.ours(found, best, 'seg', 1) == [40, 42]
    assert found.values('GN', 'seg', 1) == [50, 49]
    judged = cells(defaults.verdict_table(found, best))
    assert judged['seg, 1 image'] == [
        'not comparable',
        'lower',
        'no difference seen',
        'one seed',
        'no difference seen',  # SN is the second best
        'missed',
    ]
    assert judged['cls, 32 images'][-2:] == ['not yet run', 'open']
    shown = cells(defaults.screening_table('cpu', rows))
    assert shown[best] == ['31.0', '31.0', '31.0', '31.0', '-']


def test_each_norm_is_judged_at_its_best_learning_rate():
    best, shipped = defaults_recipe.RULES[0], defaults_recipe.SHIPPED

    def runs(name, seeds, factors):
        return [
            defaults_recipe.run_of('cpu', name, ('seg', 1), seed, lr_factor=factor)
            for factor in factors
            for seed in seeds
        ]

    rows = [
        *screening(best),
        *rows_of(runs(shipped, [10], [1.0, 0.5, 2.0]), [31, 20, 20]),
        *rows_of(runs('GN', [10], [1.0, 0.5, 2.0]), [30, 20, 40]),
        *rows_of(runs(shipped, [0, 1], [1.0, 2.0]), [30, 32, 5, 6]),
        *rows_of(runs('GN', [0, 1], [1.0, 2.0]), [10, 11, 40, 44]),
        *rows_of(runs('SN', [10], [1.0, 0.5, 2.0]), [20, 20, 25]),
        *rows_of(runs('SN', [0, 1], [2.0]), [20, 21]),
    ]
    shown = cells(defaults.best_rate_table('cpu', best, rows, defaults.Confirmed(rows, [])))
    assert shown['seg, 1 image'] == [
        'x 1: 31.0 (30.0-32.0)',
        'refused by torch',
        'x 2: 42.0 (40.0-44.0)',
        'x 2: 20.5 (20.0-21.0)',
        'higher',  # SN is the second best
        'missed',
    ]


def test_the_lever_that_scores_above_the_rule_is_confirmed_in_detection():
    best, lever = defaults_recipe.RULES[0], defaults_recipe.LEVER_RULES[3]
    levers = [
        defaults_recipe.run_of('cpu', rule, cell, 10)
        for cell in defaults_recipe.SCREENING_CELLS
        for rule in defaults_recipe.LEVER_RULES
    ]

    def confirmed(score):
        scores = [score if run['rule'] == lever else 20 for run in levers]
        plan = defaults_recipe.plan('cpu', [*screening(best), *rows_of(levers, scores)])
        return {(r['task'], r['batch'], r['seed']) for r in plan if r['rule'] == lever} - {
            (*cell, 10) for cell in (*defaults_recipe.SCREENING_CELLS, defaults_recipe.LATER_CELL)
        }

    assert not confirmed(30)
    cells_of_it = [('cls', 32), ('det', 4), ('det', 2), ('det', 1)]
    assert confirmed(40) == {(*cell, seed) for cell in cells_of_it for seed in (0, 1, 2)}
