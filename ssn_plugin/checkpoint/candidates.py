"""Names of the candidates of a layer in a state dict, which holds their number alone."""

import ast
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from ssn_plugin.checkpoint.files import bare_name
from ssn_plugin.layers.switchable import UNNAMED_CANDIDATES
from ssn_plugin.ops.switchable_norm.statistics import NORMALIZERS

_LAYER_TYPE = re.compile(r'^([\w.]+\.)?(Sync)?SS?N([123]d)?$')


class Candidates(NamedTuple):
    """The candidates of layers, as far as something tells them.

    Attributes:
        backbone: Those of the backbone's layers, ``()`` where nothing tells.
        configured: Those of all layers by their number, of :func:`configured_candidates`.
        layers: Those of single layers by their names, which is more than the others tell.
    """

    backbone: tuple[str, ...] = ()
    configured: Mapping[int, tuple[str, ...]] = {}
    layers: Mapping[str, tuple[str, ...]] = {}

    def of(self, layer: str, count: int, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of one layer, ``()`` where they are not known.

        Without anything told, they are taken to be IN, LN, BN and GN, as many as there are.

        ``keys`` are those of the state dict: where some begin with ``backbone.``, others are of no
        backbone.
        """
        if len(self.layers.get(layer, ())) == count:
            return self.layers[layer]
        if not (self.backbone or self.configured):
            return UNNAMED_CANDIDATES.get(count, ())
        if len(self.backbone) == count and (
            not self.configured
            or layer.startswith('backbone.')
            or not any(key.startswith('backbone.') for key in keys)
        ):
            return self.backbone
        return self.configured.get(count, ())


def candidate_names(
    state: Mapping[str, Tensor], layer: str, count: int, told: Candidates | None = None
) -> tuple[str, ...]:
    """Names of the candidates of a layer; numbers where they cannot be known.

    Without ``told``, they are taken to be IN, LN, BN and GN, as many as there are ratios, unless
    the running statistics show that they are not.
    """
    names = (told or Candidates()).of(layer, count, state)
    # Only BN has running statistics, so these names cannot be right.
    if ('BN' in names) < (f'{layer}.running_mean' in state) or not names:
        return tuple(map(str, range(count)))
    return names


def recorded_candidates(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Name of a layer -> its candidates, as the layers themselves record them in a state dict.

    A state dict that was copied by hand has lost the record.

    Example:
        >>> from torch import nn
        >>> from ssn_plugin import SSN
        >>> from ssn_plugin.checkpoint.candidates import recorded_candidates
        >>> model = nn.Sequential(SSN(8), SSN(8, normalizers=('LN', 'GN', 'BN')))
        >>> recorded_candidates(model.state_dict())
        {'0': ('IN', 'LN', 'BN'), '1': ('LN', 'GN', 'BN')}
    """
    record = getattr(state, '_metadata', None) or {}
    return {
        bare_name(name): tuple(entry['normalizers'])
        for name, entry in record.items()
        if are_candidates(entry.get('normalizers'))
    }


def record_candidates(state: Mapping[str, Tensor], told: Candidates) -> Mapping[str, Tensor]:
    """The state dict of an old file, with the candidates of its layers as new files record them.

    Layers compare the record with their own candidates while they load. What nothing tells stays
    without a record.
    """
    known = recorded_candidates(state)
    layers = [key.removesuffix('.mean_weight') for key in state if key.endswith('.mean_weight')]
    names = {
        layer: told.of(layer, state[f'{layer}.mean_weight'].numel(), state)
        for layer in layers
        if bare_name(layer) not in known
    }
    if not (told.configured and any(names.values())):
        return state
    recorded = OrderedDict(state)
    recorded._metadata = OrderedDict(getattr(state, '_metadata', {}))
    for layer, candidates in names.items():
        if candidates:
            record = dict(recorded._metadata.get(layer, {}), normalizers=candidates)
            # mmengine takes this prefix off the keys, and leaves the record as it is.
            recorded._metadata[layer.removeprefix('module.')] = record
    return recorded


def are_candidates(names: object) -> bool:
    """Whether something read from a file names normalizers."""
    return isinstance(names, list | tuple) and all(name in NORMALIZERS for name in names)


def configured_candidates(config: str) -> dict[int, tuple[str, ...]]:
    """The candidates that the layers of a config have, by their number.

    A number of which the config has different candidates maps to nothing: ``()``.

    The text is that of a config as mmengine keeps it in its checkpoints. It is not run.

    Example:
        >>> from ssn_plugin.checkpoint.candidates import configured_candidates
        >>> configured_candidates("norm_cfg = dict(type='SSN', normalizers=['IN', 'BN'])")
        {2: ('IN', 'BN')}
        >>> configured_candidates("norm_cfg = dict(type='SSN')")
        {3: ('IN', 'LN', 'BN')}
    """
    try:
        tree = ast.parse(config)
    except SyntaxError:
        return {}
    found: dict[int, set[tuple[str, ...]]] = {}
    for entries in _dicts(tree):
        if isinstance(entries.get('type'), str) and _LAYER_TYPE.match(entries['type']):
            names = tuple(entries.get('normalizers') or UNNAMED_CANDIDATES[3])
            found.setdefault(len(names), set()).add(names)
    return {count: names.pop() if len(names) == 1 else () for count, names in found.items()}


def _dicts(tree: ast.AST) -> Iterator[dict]:
    """The literal entries of every ``dict(...)`` and ``{...}``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict':
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = [
                (key.value, value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            ]
        else:
            continue
        entries = {}
        for key, value in pairs:
            if key in ('type', 'normalizers'):
                try:
                    entries[key] = ast.literal_eval(value)
                except ValueError:
                    continue
        yield entries
