"""What a checkpoint file is, told in lines."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from ssn_plugin.checkpoint.candidates import Candidates, candidate_names
from ssn_plugin.checkpoint.files import md5_of, meta_in, read_checkpoint, weights_entry, weights_in
from ssn_plugin.checkpoint.layout import backbone_of, describe, is_classifier, norm_layers, shown
from ssn_plugin.checkpoint.release import RELEASES
from ssn_plugin.checkpoint.selection import Selected, histogram, selections
from ssn_plugin.checkpoint.traits import told_candidates, told_selection


def inspect_checkpoint(path: str | os.PathLike, allow_pickle: bool = False) -> dict[str, str]:
    """Tell origin, network, norm layers, selection and contents of a checkpoint file.

    Returns:
        Headings and what is to be said under each, in order.

    Raises:
        CheckpointError: If the file cannot be read or holds no weights.
    """
    path = os.fspath(path)
    checkpoint = read_checkpoint(path, allow_pickle)
    weights = weights_in(checkpoint, path)
    md5 = md5_of(path)
    numbers = sum(value.numel() for value in weights.values())
    report = {
        'file': f'{path}, {os.path.getsize(path) / 1e6:.1f} MB, MD5 {md5}',
        'origin': _origin(path, md5, checkpoint, weights),
    }
    backbone, left_out = backbone_of(weights)
    layout = describe(backbone)
    inside = any(key.startswith('backbone.') for key in weights)
    report['network'] = (
        f'{layout}'
        if layout.depth
        else f'no ResNet known here; its keys are {shown(list(backbone))}'
    ) + " under 'backbone.'" * inside
    report['weights'] = f'{len(weights)} entries, {numbers / 1e6:.2f} million numbers'
    told = told_candidates(checkpoint)
    selected = selections(weights, told)
    collapsed = told_selection(checkpoint)
    kinds = norm_layers(weights) | _names_of(collapsed, weights)
    prefix = 'backbone.' * inside
    report['norm layers'] = _counts(kinds, lambda name: name.startswith(prefix)) or 'none'
    beside = _counts(kinds, lambda name: not name.startswith(prefix))
    if beside:
        report['norms elsewhere'] = beside
    if selected:
        report['candidates'] = _candidates(weights, selected, told)
    if collapsed or 'SSN' in kinds.values():
        report['selection'] = _by_stage(collapsed | selected)
    classifier = [key for key in weights if is_classifier(key)]
    if classifier:
        report['classifier'] = f'{weights[classifier[0]].shape[0]} classes'
    others = [key for key in left_out if key not in classifier]
    if others:
        report['other weights'] = f'{len(others)} entries: {shown(others)}'
    entry = weights_entry(checkpoint)
    if entry is not None:
        report['beside the weights'] = (
            ', '.join(str(key) for key in checkpoint if key != entry) or 'nothing'
        )
    return report


def _origin(path: str, md5: str, checkpoint: Mapping, weights: Mapping[str, Tensor]) -> str:
    release = RELEASES.get(md5)
    if release is not None:
        gpus, images = release.batch
        return (
            f'released by the authors of SSN: {gpus} GPUs x {images} images, '
            f'ImageNet top-1 {release.top1} %'
        )
    if os.path.basename(path) in {release.name for release in RELEASES.values()}:
        return 'bears the name of a released file, but has another MD5 sum'
    meta = meta_in(checkpoint)
    if 'ssn_plugin' in meta:
        return f'written by ssn_plugin {meta["ssn_plugin"]}: {meta.get("made_by", "published")}'
    if 'mmengine_version' in meta:
        iteration, epoch = meta.get('iter'), meta.get('epoch')
        # mmengine writes the commit of the current folder right behind its version.
        version = re.sub(r'([0-9a-f]{40}|unknown)$', '', str(meta['mmengine_version']))
        return f'a training of mmengine {version}: epoch {epoch}, iter {iteration}'
    kinds = set(norm_layers(weights).values())
    if 'best_prec1' in checkpoint and kinds & {'SSN', 'SN'}:
        return "in the layout of the authors' releases, but of no released MD5 sum"
    return 'unknown'


def _names_of(collapsed: Mapping[str, Selected], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of collapsed layers that hold something -> the normalizers that they are."""
    there = {key.rpartition('.')[0] for key in weights}
    return {
        name: next(iter(histogram({name: pair})))
        for name, pair in collapsed.items()
        if name in there
    }


def _counts(kinds: Mapping[str, str], wanted: Callable[[str], bool]) -> str:
    """How many norms of which kind, such as '53 BN, 4 LN/BN'."""
    counts = Counter(kind for name, kind in kinds.items() if wanted(name))
    return '; '.join(f'{count} {kind}' for kind, count in counts.most_common())


def _candidates(weights: Mapping[str, Tensor], layers: Iterable[str], told: Candidates) -> str:
    """The candidates of all layers; where they differ, each with the number of its layers."""
    counts = Counter(
        ', '.join(candidate_names(weights, layer, weights[f'{layer}.mean_weight'].numel(), told))
        for layer in layers
    )
    if len(counts) == 1:
        return next(iter(counts))
    return '; '.join(f'{names} in {count} layers' for names, count in counts.most_common())


def _by_stage(chosen: Mapping) -> str:
    """One line for all layers, and one per part of the backbone or of the whole network."""
    stages: dict[str, dict] = {}
    for name, selection in chosen.items():
        stage, inside, _ = name.removeprefix('backbone.').partition('.')
        stages.setdefault(stage if inside else 'stem', {})[name] = selection
    lines = {'all': chosen, **stages}
    width = max(7, *map(len, lines))
    return '\n'.join(
        f'{stage:{width}} '
        + ', '.join(f'{count} {pair}' for pair, count in histogram(selected).items())
        for stage, selected in lines.items()
    )
