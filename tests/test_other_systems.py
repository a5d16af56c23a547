"""What Windows, macOS and MPS lack, simulated: none of them was at hand."""

import ast
import errno
import os
from pathlib import Path

import pytest
import torch
from on_mps import OnMPS, moved
from on_mps import run_cases as run_cases_on_mps
from processes import run_processes
from random_state import randomize_affine_and_running
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import ssn_plugin
from ssn_plugin import SN, SSN2d, collapse_ssn, find_foldable, fold_batch_norms, set_radius
from ssn_plugin.checkpoint.files import read_checkpoint, write_checkpoint

FILES = sorted(Path(ssn_plugin.__file__).parent.rglob('*.py'))


# ---- Windows


def names_in(file: Path) -> set[str]:
    """Modules that a file imports, and names it takes out of modules, such as 'os.fork'."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f'{node.value.id}.{node.attr}')
    return found


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_nothing_of_posix_alone(file):
    modules = {'fcntl', 'grp', 'posix', 'pwd', 'pty', 'resource', 'syslog', 'termios'}
    functions = {'fork', 'getuid', 'geteuid', 'mkfifo', 'sysconf', 'uname', 'O_DIRECTORY', 'killpg'}
    functions |= {'sched_getaffinity', 'sync', 'symlink', 'register_at_fork', 'setsid', 'nice'}
    assert not names_in(file) & (modules | {f'os.{name}' for name in functions})


def test_the_scan_sees_them(tmp_path):
    file = tmp_path / 'posix_only.py'
    file.write_text('import os, fcntl\nfrom os import fork\nos.sysconf("SC_PAGE_SIZE")\n')
    assert names_in(file) == {'os', 'fcntl', 'os.fork', 'os.sysconf'}


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_no_path_is_taken_apart_at_slashes(file):
    taking_apart = {'split', 'rsplit', 'partition', 'rpartition'}
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if node.func.attr in taking_apart and '/' in given:
                # The one exception: a metric's name in TensorBoard, such as coco/bbox_mAP.
                assert file.name == 'run_report.py', (file, node.lineno)


@pytest.mark.parametrize('prefix', ['', 'bn2ssn://', 'named_bn://', 'named_bn://bn2ssn://'])
@pytest.mark.parametrize('path', ['C:\\runs\\bn.pth', '\\\\server\\runs\\bn.pth'])
def test_windows_names_of_weights(prefix, path, tmp_path, monkeypatch):
    """On Linux such a name is that of a file in the working directory."""
    from mmengine.runner import CheckpointLoader

    monkeypatch.chdir(tmp_path)
    layer = nn.BatchNorm2d(4).state_dict() | {'weight': torch.randn(4)}
    state = {'conv1.weight': torch.randn(4, 4, 3, 3)}
    with open(path, 'wb') as file:  # torch would look for the folder
        torch.save(state | {f'bn1.{key}': value for key, value in layer.items()}, file)
    found = CheckpointLoader.load_checkpoint(prefix + path)
    name = 'sn1' if prefix == 'bn2ssn://' else 'bn1'
    found = found.get('state_dict', found)
    assert torch.equal(found[f'{name}.weight'].flatten(), layer['weight'])
    assert torch.equal(read_checkpoint(path)['bn1.weight'], layer['weight'])


def test_a_checkpoint_where_no_folder_can_be_opened(tmp_path, monkeypatch):
    really = os.open

    def refuse_folders(path, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return really(path, *arguments, **options)

    monkeypatch.setattr(os, 'open', refuse_folders)
    write_checkpoint({'state_dict': {'weight': torch.ones(2)}}, tmp_path / 'net.pth')
    assert read_checkpoint(tmp_path / 'net.pth')['state_dict']['weight'].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ['net.pth']


# ---- MPS


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def test_the_simulation_refuses_float64():
    x = images().as_subclass(OnMPS)
    for ask in (lambda: x.double(), lambda: x.to(torch.float64), lambda: x.sum(dtype=torch.double)):
        with pytest.raises(TypeError, match='float64'):
            ask()
    assert x.cpu().double().dtype == torch.float64


class NoFloat64(TorchDispatchMode):
    """Refuses what comes out in float64 on a device that has values only for itself."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for each in tree_flatten(result)[0]:
            if isinstance(each, Tensor) and each.is_meta and each.dtype == torch.float64:
                raise TypeError(f'{function}: Cannot convert a MPS Tensor to float64 dtype')
        return result


@pytest.mark.parametrize('kind', [SSN2d, SN])
@pytest.mark.parametrize('mode', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('radius', [0.0, 0.6, 1.0])
def test_a_layer_asks_for_no_float64(kind, mode, radius):
    """On the meta device, because the way of a float32 tensor on the CPU is another one."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), kind(6)).train(mode)
    set_radius(model, radius)
    model.to('meta')
    with NoFloat64():
        with pytest.raises(TypeError, match='float64'):
            images().to('meta').double()
        model(images().to('meta')).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_processes_share_statistics_over_the_cpu(tmp_path):
    for process in run_processes(run_cases_on_mps, 2, tmp_path, seconds=300):
        assert len(process) > 20
        for name, (on_cpu, on_mps) in process.items():
            assert on_cpu.keys() == on_mps.keys()
            for key, tensor in on_cpu.items():
                assert torch.allclose(on_mps[key], tensor, rtol=1e-4, atol=1e-5), (name, key)


def test_collapsing_and_folding_without_float64():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), SSN2d(6)).eval()
    with torch.no_grad():
        for weight in (model[1].mean_weight, model[1].var_weight):
            weight.copy_(torch.tensor([0.0, 0.0, 3.0]))
    set_radius(model, 1.0)
    model = collapse_ssn(model)
    randomize_affine_and_running(model[1])
    x = images()
    expected = model(x)
    pairs = find_foldable(model, lambda model: model(x))
    assert len(pairs) == 1
    fold_batch_norms(moved(model), pairs)
    found = model(x.as_subclass(OnMPS)).detach().as_subclass(Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
