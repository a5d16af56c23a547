"""The recipes of docs/without-mmengine.md, as they stand there: they run, stop and resume."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

from ssn_plugin import SSN, copy_selection, set_radius, undecided_layers

PAGE = Path(__file__).parents[1] / 'docs' / 'without-mmengine.md'


def code(heading: str) -> str:
    """The code under a heading."""
    section = PAGE.read_text().split(f'\n## {heading}\n')[1].split('\n## ')[0]
    (text,) = re.findall(r'^```python\n(.*?)^```', section, re.DOTALL | re.MULTILINE)
    return text


def recipe(heading: str, folder: Path) -> Path:
    path = folder / 'recipe.py'
    path.write_text(code(heading))
    return path


def load(heading: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location('recipe', recipe(heading, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: object, cwd: Path) -> list[str]:
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


class PowerCutError(Exception):
    """What stops a run."""


class Samples(torch.utils.data.Dataset):
    """Samples of a data set, until the power is cut within an epoch."""

    def __init__(self, dataset: torch.utils.data.Dataset, epochs: float) -> None:
        self.dataset, self.left = dataset, int(epochs * len(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.left -= 1
        if self.left < 0:
            raise PowerCutError
        return self.dataset[index]


def in_order(loader: DataLoader, epochs: float = 100) -> DataLoader:
    """A loader of the same batches in every run."""
    return DataLoader(Samples(loader.dataset, epochs), batch_size=loader.batch_size)


def check_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Two runs ended with one model, and it is decided."""
    assert undecided_layers(ours) == []
    for (name, value), (_, other) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert torch.equal(value, other), name


def test_plain(tmp_path):
    lines = run(recipe('Plain PyTorch', tmp_path), cwd=tmp_path)
    first, last = (float(re.search(r'loss ([\d.]+)', line).group(1)) for line in lines[0::9])
    assert last < first / 2
    assert lines[0].endswith("undecided ['1', '4']")
    assert lines[9].endswith('undecided []')
    assert 'None' not in lines[10]


def test_plain_resumes(tmp_path):
    module = load('Plain PyTorch', tmp_path)
    loader, start = module.stripes(), module.network()

    def model() -> nn.Module:
        model = module.network()
        model.load_state_dict(start.state_dict())
        return model

    whole = module.train(model(), in_order(loader), tmp_path / 'whole.pth')
    parts = tmp_path / 'parts.pth'
    for epochs in (4.5, 5.5):  # before the layers decide, and after
        with pytest.raises(PowerCutError):
            module.train(model(), in_order(loader, epochs), parts)
    resumed = module.train(module.network(), in_order(loader), parts)
    check_same(resumed, whole)
    trained = module.network()
    trained.load_state_dict(torch.load(parts, weights_only=True)['model'])
    selected = [
        (a.selected, b.selected)
        for a, b in zip(resumed, trained, strict=True)
        if isinstance(a, SSN)
    ]
    assert [ours for ours, _ in selected] == [theirs for _, theirs in selected]


def lightning_run(module: ModuleType, folder: Path, **options) -> nn.Module:
    torch.manual_seed(0)
    silent = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    return module.train(accelerator='cpu', default_root_dir=folder, **silent, **options)


def test_lightning(tmp_path):
    pytest.importorskip('lightning')
    lines = run(recipe('Lightning', tmp_path), cwd=tmp_path)
    assert 'undecided: []' in lines
    assert 'None' not in lines[-1]


def test_lightning_resumes(tmp_path, monkeypatch):
    pytest.importorskip('lightning')
    module = load('Lightning', tmp_path)
    loader = module.stripes()

    def run_until(epochs: float, folder: str, resume: str | None = None) -> nn.Module:
        monkeypatch.setattr(module, 'stripes', lambda: in_order(loader, epochs))
        file = resume and tmp_path / folder / 'checkpoints' / resume
        return lightning_run(module, tmp_path / folder, resume=file)

    whole = run_until(100, 'whole')
    with pytest.raises(PowerCutError):
        run_until(4.5, 'parts')
    with pytest.raises(PowerCutError):
        run_until(5.5, 'parts', 'epoch=3-step=16.ckpt')  # decided by then
    check_same(run_until(100, 'parts', 'epoch=8-step=36.ckpt'), whole)


def test_accelerate(tmp_path):
    pytest.importorskip('accelerate')
    lines = run(recipe('accelerate', tmp_path), cwd=tmp_path)
    assert lines[9].endswith('undecided []')
    assert 'None' not in lines[10]


def test_accelerate_resumes(tmp_path):
    pytest.importorskip('accelerate')
    module = load('accelerate', tmp_path)
    loader, start = module.stripes(), module.network()

    def model() -> nn.Module:
        model = module.network()
        model.load_state_dict(start.state_dict())
        return model

    whole = module.train(model(), in_order(loader), tmp_path / 'whole')
    for epochs in (4.5, 5.5):
        with pytest.raises(PowerCutError):
            module.train(model(), in_order(loader, epochs), tmp_path / 'parts')
    check_same(module.train(model(), in_order(loader), tmp_path / 'parts'), whole)


@pytest.mark.slow
def test_accelerate_in_two_processes(tmp_path):
    pytest.importorskip('accelerate')
    path = recipe('accelerate', tmp_path)
    launch = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2)
    lines = [line for line in run(*launch, path, cwd=tmp_path) if line.startswith('[(')]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert 'None' not in lines[0]


@pytest.mark.parametrize('use_buffers', [False, True])
def test_an_average_is_decided_as_the_model_is(use_buffers):
    """What the page says of averaged models."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SSN(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.99), use_buffers=use_buffers)
    for step in range(12):
        set_radius(model, step / 10)
        y = model(torch.randn(4, 3, 9, 9))
        optimizer.zero_grad()
        (y * torch.randn_like(y)).sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    if use_buffers:
        assert undecided_layers(averaged) == ['module.1']
        copy_selection(model, averaged.module)
    assert None not in model[1].selected
    assert averaged.module[1].selected == model[1].selected


def test_an_average_gets_running_statistics_of_its_own():
    """As the page writes it; torch's ``update_bn`` leaves SSN as it is."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SSN(8))
    averaged = AveragedModel(model)
    loader = [(torch.randn(4, 3, 9, 9), torch.zeros(4)) for _ in range(5)]
    exec(code('Averaged models'), dict(averaged=averaged, loader=loader))
    with torch.no_grad():
        means = [model[0](images).mean((0, 2, 3)) for images, _ in loader]
    torch.testing.assert_close(averaged.module[1].running_mean, torch.stack(means).mean(0))
    assert not model[1].running_mean.any()
