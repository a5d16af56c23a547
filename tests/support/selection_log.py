"""A hook with which every process of a training writes down what its layers choose."""

import hashlib
import json
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ssn_plugin import SSN


@HOOKS.register_module()
class SelectionLog(Hook):
    """One line per iteration in ``rank0.jsonl``, ``rank1.jsonl``, ... of a folder."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f'rank{get_rank()}.jsonl'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        layers = {n: m for n, m in runner.model.named_modules() if isinstance(m, SSN)}
        record = dict(
            iteration=runner.iter,
            images=[sample.img_id for sample in data_batch['data_samples']],
            selected={name: layer.selected for name, layer in layers.items()},
            fixed={n: (int(m.mean_fixed), int(m.var_fixed)) for n, m in layers.items()},
            control=digest([p for m in layers.values() for p in (m.mean_weight, m.var_weight)]),
            parameters=digest(runner.model.parameters()),
            buffers={
                kind: digest(
                    b for m in layers.values() if type(m).__name__ == kind for b in m.buffers()
                )
                for kind in ('SSN', 'SyncSSN')
            },
            unused=runner.model.find_unused_parameters,
        )
        with self.path.open('a') as file:
            file.write(json.dumps(record) + '\n')


def digest(tensors) -> str:
    """The same for the same bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
