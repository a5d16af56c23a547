"""What every test shares: a fixed seed, and one thread for small tensors."""

import os

import pytest
import torch

# Triton decides when it is imported whether kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: of several processes none is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loading(monkeypatch):
    """Put back what a tool that runs in this process makes of torch.load."""
    monkeypatch.setattr(torch, 'load', torch.load)
    monkeypatch.setattr(torch.serialization, 'load', torch.serialization.load)


@pytest.fixture(autouse=True)
def threads(request):
    """One thread unless a test trains a model.

    The tensors of the others are so small that a second thread only waits, and where the machine is
    busy with something else each of its waits costs milliseconds.
    """
    count = torch.get_num_threads()
    if not any(request.node.get_closest_marker(name) for name in ('slow', 'demo')):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
