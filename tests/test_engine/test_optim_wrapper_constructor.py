"""SSNOptimWrapperConstructor: every parameter group, and the clipping as the update shows it."""

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmengine.hooks import Hook
from mmengine.optim import (
    DefaultOptimWrapperConstructor,
    OneCycleLR,
    OptimWrapperDict,
    PolyLR,
    ReduceOnPlateauLR,
    build_optim_wrapper,
)
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS
from since import since
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ssn_plugin import SN, SSN, SelectedNorm, set_radius
from ssn_plugin.engine.learning_rates import keep_ratios, lost_ratios, pairs_to_watch
from ssn_plugin.engine.optim_wrapper_constructor import SSNOptimWrapperConstructor
from ssn_plugin.torch_versions import VERSION

try:
    from mmcv.ops import ModulatedDeformConv2dPack as Deformable
except ModuleNotFoundError:  # mmcv without its ops; then mmengine's constructor knows none either
    Deformable = nn.Conv2d

LR, DECAY = 0.01, 1e-4
SGD = dict(optimizer=dict(type='SGD', lr=LR, momentum=0.9, weight_decay=DECAY))
CONTROL = ('mean_weight', 'var_weight')


class Named(nn.Linear):
    """A linear layer with parameters that bear the names of control parameters."""

    def __init__(self):
        super().__init__(3, 2)
        self.mean_weight = nn.Parameter(torch.zeros(3))
        self.var_weight = nn.Parameter(torch.zeros(3))


class Net(nn.Module):
    """One of everything that the default constructor treats in its own way."""

    def __init__(self, norm):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = build_norm_layer(dict(type=norm), 4)[1]
        self.group_norm = nn.GroupNorm(2, 4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.dcn = Deformable(4, 4, 3)
        self.block = nn.Sequential(nn.Linear(4, 3), build_norm_layer(dict(type=norm), 3)[1])
        self.head = Named()


def groups_of(optimizer, model):
    """The parameter groups in order, parameters replaced by their names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (
            [names[id(parameter)] for parameter in group['params']],
            {key: value for key, value in group.items() if key != 'params'},
        )
        for group in optimizer.param_groups
    ]


def build(model, paramwise_cfg=None, constructor=SSNOptimWrapperConstructor, **wrapper_cfg):
    cfg = SGD | dict(type='OptimWrapper') | wrapper_cfg
    return constructor(cfg, paramwise_cfg)(model)


def plain_sgd(**kwargs):
    """Applies a gradient as it is: the update shows what the clipping did."""
    return dict(optimizer=dict(type='SGD', lr=1.0), **kwargs)


def control_of(model):
    return [
        getattr(module, name)
        for module in model.modules()
        if isinstance(module, (SSN, SN))
        for name in CONTROL
    ]


def joint_norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def update_of(model, before):
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def two_norms():
    """Two SSN layers, three candidates and two, and a linear layer; deterministic."""
    torch.manual_seed(0)
    return nn.Sequential(SSN(4), nn.Linear(4, 4), SSN(4, normalizers=('IN', 'BN')))


def gradients(model, control_norm, seed=1):
    """Random gradients for every parameter, those of the control parameters of a joint norm."""
    generator = torch.Generator().manual_seed(seed)
    grads = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    names = [name for name in grads if name.endswith(CONTROL)]
    factor = control_norm / joint_norm(grads[name] for name in names)
    for name in names:
        grads[name] *= factor
    return grads


def loss_with(model, grads):
    """A loss whose gradients are exactly these, wherever the parameters stand."""
    return sum((p * grads[name]).sum() for name, p in model.named_parameters())


def check_update(update, grads, control_lr, clipped_to):
    """All parameters moved by their gradient; control parameters by the jointly clipped one."""
    control = [grads[name] for name in grads if name.endswith(CONTROL)]
    factor = min(1.0, clipped_to / joint_norm(control))
    for name, grad in grads.items():
        expected = grad * factor * control_lr if name.endswith(CONTROL) else grad
        torch.testing.assert_close(update[name], expected, rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------- parameter groups


def test_every_group_one_by_one():
    pytest.importorskip('mmcv.ops')
    model = Net('SSN')
    paramwise_cfg = dict(
        bias_lr_mult=2.0,
        bias_decay_mult=0.5,
        norm_decay_mult=0.25,
        dwconv_decay_mult=0.1,
        dcn_offset_lr_mult=0.3,
    )
    wrapper = build(model, paramwise_cfg)
    expected = [
        ('scale', 1, 1),
        ('conv.weight', 1, 1),
        ('conv.bias', 2, 0.5),
        ('norm.weight', 1, 0.25),
        ('norm.bias', 1, 0.25),
        ('norm.mean_weight', 0.1, 0),
        ('norm.var_weight', 0.1, 0),
        ('group_norm.weight', 1, 0.25),
        ('group_norm.bias', 1, 0.25),
        ('depthwise.weight', 1, 0.1),
        ('depthwise.bias', 2, 0.5),
        ('dcn.weight', 1, 1),
        ('dcn.bias', 2, 0.5),
        ('dcn.conv_offset.weight', 0.3, 1),
        ('dcn.conv_offset.bias', 0.3, 1),
        ('block.0.weight', 1, 1),
        ('block.0.bias', 2, 0.5),
        ('block.1.weight', 1, 0.25),
        ('block.1.bias', 1, 0.25),
        ('block.1.mean_weight', 0.1, 0),
        ('block.1.var_weight', 0.1, 0),
        ('head.weight', 1, 1),
        ('head.bias', 2, 0.5),
        ('head.mean_weight', 1, 1),  # no control parameters: a Linear
        ('head.var_weight', 1, 1),
    ]
    groups = groups_of(wrapper.optimizer, model)
    by_name = {names[0]: options for names, options in groups}
    assert all(len(names) == 1 for names, _ in groups)
    assert len(groups) == len(by_name) == len(expected) == len(list(model.parameters()))
    for name, lr_mult, decay_mult in expected:
        assert by_name[name]['lr'] == pytest.approx(LR * lr_mult), name
        assert by_name[name]['weight_decay'] == pytest.approx(DECAY * decay_mult), name
        assert by_name[name]['momentum'] == 0.9, name


def test_defaults_and_other_factors():
    model = two_norms()
    for paramwise_cfg, lr, decay in (
        (None, 0.1, 0.0),
        ({}, 0.1, 0.0),
        (dict(ssn_lr_mult=0.5, ssn_decay_mult=0.25), 0.5, 0.25),
        (dict(ssn_lr_mult=1, ssn_decay_mult=1), 1, 1),
        (dict(ssn_lr_mult=0), 0, 0),
    ):
        groups = groups_of(build(model, paramwise_cfg).optimizer, model)
        assert sorted(name for names, _ in groups for name in names) == sorted(
            dict(model.named_parameters())
        )
        for (name,), options in groups:
            is_control = name.endswith(CONTROL)
            assert options['lr'] == pytest.approx(LR * (lr if is_control else 1)), name
            assert options['weight_decay'] == pytest.approx(DECAY * (decay if is_control else 1))


@pytest.mark.parametrize(
    'paramwise_cfg',
    [
        dict(norm_decay_mult=0.0),
        dict(bias_lr_mult=2.0, bias_decay_mult=0.0),
        dict(dwconv_decay_mult=0.1),
        dict(flat_decay_mult=0.3),
        dict(flat_decay_mult=0.3, norm_decay_mult=0.5),
        dict(dcn_offset_lr_mult=0.1, bias_lr_mult=3.0),
        dict(bypass_duplicate=True),
        dict(custom_keys={'norm': dict(lr_mult=0.5, decay_mult=0.2), 'block.1': dict(lr_mult=4.0)}),
        dict(
            custom_keys={'.bias': dict(decay_mult=0.0), 'conv': dict(lr_mult=0.1, momentum=0.5)},
            norm_decay_mult=0.0,
            bias_lr_mult=2.0,
            bias_decay_mult=0.5,
            dwconv_decay_mult=0.1,
            dcn_offset_lr_mult=0.01,
            flat_decay_mult=0.7,
        ),
    ],
)
def test_all_but_control_parameters_as_the_default_constructor_treats_bn(paramwise_cfg):
    ours, reference = Net('SSN'), Net('BN')
    groups = groups_of(build(ours, dict(paramwise_cfg)).optimizer, ours)
    expected = build(reference, dict(paramwise_cfg), constructor=DefaultOptimWrapperConstructor)
    control = {'norm.mean_weight', 'norm.var_weight', 'block.1.mean_weight', 'block.1.var_weight'}
    assert [group for group in groups if group[0][0] not in control] == groups_of(
        expected.optimizer, reference
    )
    assert control == {names[0] for names, _ in groups} & control


def test_custom_key_multiplies_the_learning_rate_of_control_parameters():
    model = Net('SSN')
    paramwise_cfg = dict(custom_keys={'block': dict(lr_mult=0.5, decay_mult=3.0)})
    options = {
        names[0]: options
        for names, options in groups_of(build(model, paramwise_cfg).optimizer, model)
    }
    assert options['block.1.weight']['lr'] == pytest.approx(LR * 0.5)
    assert options['block.1.weight']['weight_decay'] == pytest.approx(DECAY * 3)
    for name in CONTROL:
        assert options[f'block.1.{name}']['lr'] == pytest.approx(LR * 0.5 * 0.1)
        assert options[f'block.1.{name}']['weight_decay'] == 0
        assert options[f'norm.{name}']['lr'] == pytest.approx(LR * 0.1)


def test_no_weight_decay_on_control_parameters_whatever_the_optimizer_defaults_to():
    """AdamW decays by 0.01 where the config names no weight_decay."""
    model = two_norms()
    wrapper = build(model, optimizer=dict(type='AdamW', lr=LR))
    for (name,), options in groups_of(wrapper.optimizer, model):
        assert options['weight_decay'] == (0 if name.endswith(CONTROL) else 0.01), name


def test_learning_rate_factor_holds_for_the_optimizers_default_rate():
    """AdamW has a default learning rate, 1e-3, which a config need not name."""
    model = two_norms()
    wrapper = build(model, optimizer=dict(type='AdamW', weight_decay=DECAY))
    for (name,), options in groups_of(wrapper.optimizer, model):
        expected = 1e-4 if name.endswith(CONTROL) else 1e-3
        assert options['lr'] == pytest.approx(expected), name


def test_sn_control_parameters_follow_the_same_rules():
    model = nn.Sequential(SN(4), SN(4))
    options = [options for _, options in groups_of(build(model).optimizer, model)]
    assert [o['lr'] for o in options] == pytest.approx([LR, LR, LR * 0.1, LR * 0.1] * 2)
    assert [o['weight_decay'] for o in options] == [DECAY, DECAY, 0, 0] * 2


def test_layer_as_the_whole_model_and_without_affine_parameters():
    model = SSN(4)
    assert [names for names, _ in groups_of(build(model).optimizer, model)] == [
        ['weight'],
        ['bias'],
        ['mean_weight'],
        ['var_weight'],
    ]
    model = nn.Sequential(SSN(4, affine=False))
    assert [names for names, _ in groups_of(build(model).optimizer, model)] == [
        ['0.mean_weight'],
        ['0.var_weight'],
    ]


def test_parameters_without_gradient_are_skipped():
    model = two_norms()
    model[0].requires_grad_(False)
    model[2].mean_weight.requires_grad_(False)
    wrapper = build(model, **plain_sgd())
    names = [name for names, _ in groups_of(wrapper.optimizer, model) for name in names]
    assert names == ['1.weight', '1.bias', '2.weight', '2.bias', '2.var_weight']
    # and the joint norm is that of the trained ones alone
    model[2].var_weight.grad = torch.tensor([0.9, 0.0])
    model[0].mean_weight.grad = torch.tensor([9.0, 0.0, 0.0])
    before = snapshot(model)
    wrapper.step()
    assert update_of(model, before)['2.var_weight'].tolist() == pytest.approx([0.09, 0.0])


def test_shared_layer_needs_bypass_duplicate_as_elsewhere():
    shared = SSN(4)
    model = nn.Sequential(nn.Sequential(shared), nn.Linear(4, 4), nn.Sequential(shared))
    with pytest.raises(ValueError, match='more than one parameter group'):
        build(model)
    wrapper = build(model, dict(bypass_duplicate=True), **plain_sgd())
    assert [name for names, _ in groups_of(wrapper.optimizer, model) for name in names] == list(
        dict(model.named_parameters())
    )
    grads, before = gradients(model, control_norm=5.0), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=1.0)


def test_wrapped_model():
    model = two_norms()
    wrapper = build(nn.DataParallel(model), **plain_sgd())
    expected = build(two := two_norms(), **plain_sgd())
    assert groups_of(wrapper.optimizer, model) == groups_of(expected.optimizer, two)
    grads, before = gradients(model, control_norm=5.0), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=1.0)


def test_model_without_ssn_is_left_to_the_default_constructor():
    ours, reference = Net('BN'), Net('BN')
    wrapper = build(ours)
    expected = build(
        reference, dict(bypass_duplicate=False), constructor=DefaultOptimWrapperConstructor
    )
    assert groups_of(wrapper.optimizer, ours) == groups_of(expected.optimizer, reference)
    grads = {name: torch.full_like(p, 100.0) for name, p in ours.named_parameters()}
    before = snapshot(ours)
    build(ours, **plain_sgd()).update_params(loss_with(ours, grads))
    for name, update in update_of(ours, before).items():
        assert torch.allclose(update, grads[name]), name


def test_matched_by_type_and_not_by_name():
    model = nn.Sequential(SSN(4), Named())
    wrapper = build(model, **plain_sgd())
    grads = {n: torch.full_like(p, 10.0) for n, p in model.named_parameters()}
    before = snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    update = update_of(model, before)
    for name in CONTROL:
        assert torch.equal(update[f'1.{name}'], grads[f'1.{name}'])  # neither clipped nor slowed
    assert joint_norm([update['0.mean_weight'], update['0.var_weight']]) == pytest.approx(0.1)


def test_found_by_name_in_a_config():
    model = two_norms()
    cfg = dict(constructor='SSNOptimWrapperConstructor', paramwise_cfg=dict(ssn_lr_mult=0.2), **SGD)
    wrapper = build_optim_wrapper(model, cfg)
    rates = [
        options['lr']
        for (name,), options in groups_of(wrapper.optimizer, model)
        if name.endswith(CONTROL)
    ]
    assert rates == pytest.approx([LR * 0.2] * 4)


@pytest.mark.parametrize('name', ['ssn_lr_mult', 'ssn_decay_mult', 'ssn_clip_norm'])
@pytest.mark.parametrize('value', [-0.1, math.nan, '1', True, [1.0]])
def test_invalid_value_is_named(name, value):
    with pytest.raises(ValueError, match=name) as raised:
        SSNOptimWrapperConstructor(SGD, {name: value})
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize('name', ['ssn_lr_mult', 'ssn_decay_mult'])
def test_only_the_clipping_can_be_none(name):
    with pytest.raises(ValueError, match=f'{name}: got None'):
        SSNOptimWrapperConstructor(SGD, {name: None})


def test_paramwise_cfg_of_the_caller_is_not_changed():
    paramwise_cfg = dict(norm_decay_mult=0.0)
    build(two_norms(), paramwise_cfg)
    assert paramwise_cfg == dict(norm_decay_mult=0.0)


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize('norm', [0.3, 1.0, 7.0, 1e4])
@pytest.mark.parametrize('bound', [1.0, 0.25])
def test_joint_clip_on_the_applied_update(norm, bound):
    model = two_norms()
    wrapper = build(model, dict(ssn_clip_norm=bound), **plain_sgd())
    grads, before = gradients(model, norm), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    update = update_of(model, before)
    check_update(update, grads, control_lr=0.1, clipped_to=bound)
    applied = joint_norm(update[name] for name in update if name.endswith(CONTROL))
    assert applied == pytest.approx(0.1 * min(norm, bound), rel=1e-4)


def test_default_bound_is_one():
    model = two_norms()
    wrapper = build(model, **plain_sgd())
    grads, before = gradients(model, 50.0), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=1.0)


def test_no_clip():
    model = two_norms()
    wrapper = build(model, dict(ssn_clip_norm=None), **plain_sgd())
    grads, before = gradients(model, 50.0), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=math.inf)


def test_bound_of_zero_holds_the_control_parameters():
    model = two_norms()
    wrapper = build(model, dict(ssn_clip_norm=0), **plain_sgd())
    grads, before = gradients(model, 50.0), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=0.0)


def micro_batches(model, opposed):
    """Four gradients of norm 8 each; opposed ones nearly cancel in the mean."""
    first, second = gradients(model, 8.0, seed=1), gradients(model, 8.0, seed=2)
    if not opposed:
        return [first, second, first, second]
    negative = {name: -grad for name, grad in first.items()}
    nearly = {name: -0.9 * grad for name, grad in second.items()}
    return [first, negative, second, nearly]


def mean_of(batches):
    return {name: sum(grads[name] for grads in batches) / len(batches) for name in batches[0]}


@pytest.mark.parametrize('opposed', [False, True], ids=['large_mean', 'small_mean'])
def test_clip_once_after_accumulation(opposed):
    model = two_norms()
    wrapper = build(model, **plain_sgd(accumulative_counts=4))
    wrapper.initialize_count_status(model, 0, 8)
    batches, before = micro_batches(model, opposed), snapshot(model)
    for count, grads in enumerate(batches):
        assert all((u == 0).all() for u in update_of(model, before).values()), count
        wrapper.update_params(loss_with(model, grads))
    mean = mean_of(batches)
    control_norm = joint_norm(mean[name] for name in mean if name.endswith(CONTROL))
    assert (control_norm > 1) is not opposed  # each case means something
    check_update(update_of(model, before), mean, control_lr=0.1, clipped_to=1.0)


@pytest.mark.parametrize('max_norm', [0.5, 20.0])
def test_clip_after_the_clip_grad_of_the_wrapper(max_norm):
    model = two_norms()
    wrapper = build(model, **plain_sgd(clip_grad=dict(max_norm=max_norm)))
    grads, before = gradients(model, 50.0), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    # Control parameters first, so that their steepness does not count in the joint norm.
    control = {name: grad for name, grad in grads.items() if name.endswith(CONTROL)}
    factor = min(1, 1 / joint_norm(control.values()))
    once = {name: grad * (factor if name in control else 1) for name, grad in grads.items()}
    factor = min(1, max_norm / joint_norm(once.values()))
    clipped = {name: grad * factor for name, grad in once.items()}
    check_update(update_of(model, before), clipped, control_lr=0.1, clipped_to=1.0)


def test_a_near_tie_does_not_shrink_the_other_gradients():
    steps = []
    for gradient in (0.5, 5e3):
        model = two_norms()
        wrapper = build(model, **plain_sgd(clip_grad=dict(max_norm=10)))
        grads, before = gradients(model, 0.1), snapshot(model)
        for name in grads:
            if name.endswith(CONTROL):
                grads[name] = torch.full_like(grads[name], gradient)
        wrapper.update_params(loss_with(model, grads))
        steps.append(update_of(model, before)['0.weight'])
    torch.testing.assert_close(steps[0], steps[1])


def test_clip_beside_torch_compile():
    """Before torch 2.4 it turns off the hooks of all optimizers of the process."""
    models = [two_norms(), two_norms()]
    wrappers = [build(models[0], **plain_sgd())]
    torch.compile(torch.neg, backend='eager')(torch.ones(1))
    wrappers.append(build(models[1], **plain_sgd()))
    for model, wrapper in zip(models, wrappers, strict=True):
        LambdaLR(wrapper.optimizer, lambda step: 1.0)  # puts itself around the step
        grads, before = gradients(model, 50.0), snapshot(model)
        wrapper.update_params(loss_with(model, grads))
        check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=1.0)


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """mmengine's AmpOptimWrapper asks for a GPU; its logic needs none."""
    import mmengine.optim.optimizer.amp_optimizer_wrapper as amp

    if VERSION < (2, 3):
        pytest.skip('GradScaler of the CPU: torch 2.3 or newer')
    monkeypatch.setattr(amp, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp, 'GradScaler', partial(torch.amp.GradScaler, device='cpu'))
    return dict(type='AmpOptimWrapper', loss_scale=1024.0)


@pytest.mark.parametrize('norm', [0.3, 7.0])
@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1e6)])
def test_clip_after_unscaling_in_amp_optim_wrapper(amp_on_cpu, norm, clip_grad):
    model = two_norms()
    cfg = amp_on_cpu | dict(clip_grad=clip_grad and dict(clip_grad))
    wrapper = build(model, **plain_sgd(**cfg))
    grads, before = gradients(model, norm), snapshot(model)
    wrapper.update_params(loss_with(model, grads))
    assert wrapper.loss_scaler.get_scale() == 1024
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=1.0)


@pytest.mark.parametrize('opposed', [False, True], ids=['large_mean', 'small_mean'])
def test_clip_once_after_accumulation_in_amp_optim_wrapper(amp_on_cpu, opposed):
    model = two_norms()
    wrapper = build(model, **plain_sgd(accumulative_counts=4, **amp_on_cpu))
    wrapper.initialize_count_status(model, 0, 8)
    batches, before = micro_batches(model, opposed), snapshot(model)
    for grads in batches:
        wrapper.update_params(loss_with(model, grads))
    check_update(update_of(model, before), mean_of(batches), control_lr=0.1, clipped_to=1.0)


def test_overflow_still_skips_the_step(amp_on_cpu):
    model = two_norms()
    wrapper = build(model, **plain_sgd(**amp_on_cpu))
    grads, before = gradients(model, 7.0), snapshot(model)
    grads['0.mean_weight'][1] = math.inf
    wrapper.update_params(loss_with(model, grads))
    assert all((u == 0).all() for u in update_of(model, before).values())


@since(2, 4, 'GradScaler and fused optimizers of the CPU')
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('norm', [0.3, 7.0])
def test_clip_with_a_grad_scaler(fused, norm):
    """A fused optimizer leaves the unscaling to its own step, after the clipping."""
    model = two_norms()
    wrapper = build(model, optimizer=dict(type='SGD', lr=1.0, fused=fused))
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    grads, before = gradients(model, norm), snapshot(model)
    scaler.scale(loss_with(model, grads)).backward()
    scaler.step(wrapper.optimizer)
    scaler.update()
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=1.0)
    # unscaled before the step by the caller, as for a clip_grad
    wrapper.optimizer.zero_grad()
    before = snapshot(model)
    scaler.scale(loss_with(model, grads)).backward()
    scaler.unscale_(wrapper.optimizer)
    scaler.step(wrapper.optimizer)
    scaler.update()
    check_update(update_of(model, before), grads, control_lr=0.1, clipped_to=1.0)


def test_step_without_gradients_of_control_parameters():
    model = two_norms()
    wrapper = build(model, **plain_sgd())
    model[1].weight.grad = torch.ones(4, 4)
    before = snapshot(model)
    wrapper.step()
    update = update_of(model, before)
    assert torch.allclose(update.pop('1.weight'), torch.ones(4, 4))
    assert all((u == 0).all() for u in update.values())


def test_steps_leave_what_is_decided():
    model = two_norms()
    wrapper = build(model, dict(ssn_decay_mult=1.0), **SGD)
    for _ in range(3):  # momentum to carry on with
        wrapper.update_params(loss_with(model, gradients(model, 5.0)))
    set_radius(model, 1.0)
    decided = [(layer.selected, layer.state_dict()) for layer in (model[0], model[2])]
    for _ in range(3):
        wrapper.update_params(model(torch.randn(5, 4)).square().sum())
    for layer, (selected, state) in zip((model[0], model[2]), decided, strict=True):
        assert layer.selected == selected
        assert None not in selected
        for name in ('mean_weight', 'var_weight'):
            assert sorted(layer.state_dict()[name].tolist())[-2:] == [0.0, 1.0]
            assert torch.equal(layer.state_dict()[name], state[name])


# ---------------------------------------------------------------- gradients that are lost


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('clip', [1.0, None])
@pytest.mark.parametrize('clip_all', [None, dict(max_norm=1e9)])
def test_one_lost_gradient_leaves_control_parameters_alone(value, clip, clip_all, caplog):
    model = two_norms()
    settings = plain_sgd() if clip_all is None else plain_sgd() | dict(clip_grad=clip_all)
    wrapper = build(model, dict(ssn_clip_norm=clip), **settings)
    before = snapshot(model)
    for _ in range(2):
        wrapper.zero_grad()
        loss_with(model, gradients(model, 0.5)).backward()
        model[2].var_weight.grad[0] = value
        wrapper.step()
    update = update_of(model, before)
    for name, moved in update.items():
        assert moved.isfinite().all(), name
        assert bool((moved == 0).all()) == ('mean_weight' in name or 'var_weight' in name), name
    wrapper.update_params(loss_with(model, gradients(model, 0.5)))
    assert all((moved != 0).any() for moved in update_of(model, before).values())


def test_a_lost_gradient_is_said_once_with_its_layer(monkeypatch):
    said = []
    monkeypatch.setattr(
        'ssn_plugin.engine.optim_wrapper_constructor.print_log', lambda text, **_: said.append(text)
    )
    model = two_norms()
    wrapper = build(model, **plain_sgd())
    wrapper.message_hub.update_info('iter', 16)
    for _ in range(3):
        loss_with(model, gradients(model, 0.5)).backward()
        model[2].var_weight.grad[0] = math.nan
        wrapper.step()
    (text,) = said
    assert '2.var_weight is NaN or infinite in iteration 17, of 1 of 4 control parameters' in text


def test_an_overflow_under_a_scaler_is_no_lost_gradient(monkeypatch):
    """GradScaler begins with a factor that overflows, and leaves such steps out itself."""
    said = []
    monkeypatch.setattr(
        'ssn_plugin.engine.optim_wrapper_constructor.print_log', lambda text, **_: said.append(text)
    )
    model = two_norms()
    fused = dict(fused=True) if VERSION >= (2, 4) else {}  # earlier there is none of the CPU
    sgd = dict(type='SGD', lr=1.0, **fused)
    wrapper = build(model, optimizer=sgd, clip_grad=dict(max_norm=1.0))
    wrapper.loss_scaler = object()
    loss_with(model, gradients(model, 0.5)).backward()
    model[0].mean_weight.grad[0] = math.inf
    wrapper._clip_grad()
    del wrapper.loss_scaler
    wrapper.optimizer.found_inf = torch.ones(())  # as a scaler says it to a fused optimizer
    model[0].mean_weight.grad = torch.full((3,), math.inf)
    wrapper.optimizer.step()
    assert said == []


# ---------------------------------------------------------------- other layers, other rules


def test_selected_norm_is_a_norm_layer():
    model = nn.Sequential(SelectedNorm(4, 'LN', 'BN'), nn.Linear(4, 4), nn.BatchNorm1d(4))
    wrapper = build(model, dict(norm_decay_mult=0.0, bias_decay_mult=0.5), **SGD)
    decays = {}
    for group in wrapper.optimizer.param_groups:
        (parameter,) = group['params']
        (name,) = (n for n, p in model.named_parameters() if p is parameter)
        decays[name] = group['weight_decay']
    base = DECAY
    assert decays == {
        '0.weight': 0, '0.bias': 0, '1.weight': base, '1.bias': base / 2, '2.weight': 0, '2.bias': 0
    }  # fmt: skip


@pytest.mark.parametrize('ssn_decay_mult', [0.0, 2.0])
def test_their_weight_decay_replaces_any_other(ssn_decay_mult):
    rules = dict(
        norm_decay_mult=0.5,
        custom_keys={'0.mean_weight': dict(decay_mult=3.0), '2': dict(decay_mult=7.0)},
        ssn_decay_mult=ssn_decay_mult,
    )
    model = two_norms()
    wrapper = build(model, rules, **SGD)
    for group in wrapper.optimizer.param_groups:
        if any(group['params'][0] is parameter for parameter in control_of(model)):
            assert group['weight_decay'] == pytest.approx(DECAY * ssn_decay_mult)


# ---------------------------------------------------------------- schedulers

SCHEDULERS = [
    dict(type='PolyLR', eta_min=0.02, power=0.9, begin=0, end=12, by_epoch=False),
    dict(type='CosineAnnealingLR', eta_min=0.02, begin=0, end=12, by_epoch=False),
    dict(
        type='CosineRestartLR',
        eta_min=0.02,
        periods=[4, 8],
        restart_weights=[1, 0.8],
        by_epoch=False,
    ),
    dict(type='OneCycleLR', eta_max=0.05, total_steps=12, by_epoch=False),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.4, begin=0, end=12, by_epoch=False),
    dict(type='LinearLR', start_factor=0.1, end=6, by_epoch=False),
]


class Rates(Hook):
    """The learning rate of every kind of parameter, in every iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        control = control_of(runner.model)
        rates = {True: set(), False: set()}
        for group in runner.optim_wrapper.optimizer.param_groups:
            rates[any(group['params'][0] is p for p in control)].add(group['lr'])
        self.seen.append(rates)


@pytest.mark.parametrize('scheduler', SCHEDULERS, ids=lambda s: '-'.join([s['type'], list(s)[1]]))
@pytest.mark.parametrize('warm_up', [False, True])
def test_every_scheduler_keeps_the_ratio(make_runner, scheduler, warm_up):
    if warm_up and scheduler['type'] == 'OneCycleLR':
        pytest.skip('has a warm-up of its own')
    schedulers = [dict(scheduler)]
    if warm_up:
        schedulers.insert(0, dict(type='LinearLR', start_factor=0.5, end=3, by_epoch=False))
    wrapper = dict(
        optimizer=dict(type='SGD', lr=0.05, weight_decay=1e-3),
        constructor='SSNOptimWrapperConstructor',
        paramwise_cfg=dict(ssn_lr_mult=0.1, norm_decay_mult=0.0),
    )
    settings = dict(optim_wrapper=wrapper)
    runs, seen = [], []
    for constructor in ('SSNOptimWrapperConstructor', 'DefaultOptimWrapperConstructor'):
        rules = wrapper['paramwise_cfg'] if constructor.startswith('SSN') else {}
        settings['optim_wrapper'] = wrapper | dict(
            constructor=constructor, paramwise_cfg=dict(rules)
        )
        runs.append(
            make_runner(param_scheduler=[dict(s) for s in schedulers], **copy.deepcopy(settings))
        )
        runs[-1].register_hook(rates := Rates())
        runs[-1].train()
        seen.append(rates.seen)
    assert len(seen[0]) == 12
    assert ' beside one of ' not in next(Path(runs[0].work_dir).glob('*/*.log')).read_text()
    for ours, theirs in zip(*seen, strict=True):
        (other,) = {round(rate, 12) for rate in ours[False]}
        (control,) = {round(rate, 12) for rate in ours[True]}
        assert control == pytest.approx(other / 10, rel=1e-6)
        assert other == pytest.approx(next(iter(theirs[False])), rel=1e-6)  # and theirs is theirs
    # A resumed run goes on with it.
    settings['optim_wrapper'] = wrapper
    resumed = make_runner(
        param_scheduler=[dict(s) for s in schedulers],
        load_from=f'{runs[0].work_dir}/iter_7.pth',
        resume=True,
        **settings,
    )
    resumed.register_hook(rates := Rates())
    resumed.train()
    for ours, theirs in zip(rates.seen, seen[0][7:], strict=True):
        assert ours == theirs


class Same(_ParamScheduler):
    """A scheduler of a user's own, which sets one learning rate for all from iteration 3 on."""

    def __init__(self, optimizer, *args, own=False, **kwargs):
        self.own = own
        super().__init__(optimizer, 'lr', *args, **kwargs)

    def _get_value(self):
        groups = self.optimizer.param_groups
        if self.last_step < 3 or self.own:  # or one for each group
            return [group['initial_lr'] * 0.5 for group in groups]
        return [0.02 for _ in groups]


@pytest.mark.parametrize(('own', 'mult'), [(False, 0.1), (True, 0.1), (False, 1.0), (False, 0.0)])
def test_what_loses_the_ratio_is_said_once(make_runner, own, mult):
    PARAM_SCHEDULERS.register_module(module=Same, force=True)
    try:
        runner = make_runner(
            param_scheduler=dict(type='Same', by_epoch=False, own=own),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.05),
                constructor='SSNOptimWrapperConstructor',
                paramwise_cfg=dict(ssn_lr_mult=mult, custom_keys=dict(norm1=dict(lr_mult=0.5))),
            ),
        )
        runner.train()
    finally:
        PARAM_SCHEDULERS.module_dict.pop('Same')
    text = next(Path(runner.work_dir).glob('*/*.log')).read_text()
    lost = [line for line in text.splitlines() if ' beside one of ' in line]
    assert len(lost) == (not own and mult != 1)
    if lost:
        assert 'in iteration 4 ' in lost[0]
        assert f'ssn_lr_mult={mult:g} asks for {0.02 * mult:.3g}' in lost[0]


def test_each_of_several_optimizers_keeps_the_ratio():
    models = {name: two_norms() for name in ('first', 'second')}
    wrappers = OptimWrapperDict(**{name: build(model, **SGD) for name, model in models.items()})
    first = OneCycleLR(wrappers['first'], eta_max=0.1, total_steps=9, by_epoch=False)
    second = PolyLR(wrappers['second'], eta_min=0.004, end=9, by_epoch=False)
    schedulers = dict(first=[first], second=[second])
    keep_ratios(wrappers, schedulers)
    pairs = pairs_to_watch(wrappers)
    assert {id(pair[0]) for pair in pairs} == {id(w.optimizer) for w in wrappers.values()}
    for _ in range(8):
        for name, model in models.items():
            wrappers[name].step()
            schedulers[name][0].step()
            control = control_of(model)
            rates = {
                any(group['params'][0] is p for p in control): group['lr']
                for group in wrappers[name].param_groups
            }
            assert rates[True] == pytest.approx(rates[False] / 10)
        assert not list(lost_ratios(pairs))


def test_a_plateau_keeps_the_ratio():
    model = two_norms()
    wrapper = build(model, **SGD)
    scheduler = ReduceOnPlateauLR(wrapper, monitor='loss', factor=0.01, patience=0, min_value=0.004)
    for _ in range(2):  # a resumed run does it once more
        keep_ratios(wrapper, [scheduler])
    for _ in range(8):
        scheduler.step(dict(loss=1.0))
    rates = {
        any(group['params'][0] is p for p in control_of(model)): group['lr']
        for group in wrapper.optimizer.param_groups
    }
    assert rates == pytest.approx({False: 0.004, True: 0.0004})


# ---------------------------------------------------------------- a whole run


@pytest.mark.parametrize(
    ('scheduler', 'expected'),
    [
        (
            dict(type='MultiStepLR', milestones=[4, 8], gamma=0.1, by_epoch=False),
            [0.05] * 4 + [0.005] * 4 + [0.0005] * 4,
        ),
        (
            [
                dict(type='LinearLR', start_factor=0.1, begin=0, end=5, by_epoch=False),
                dict(type='MultiStepLR', milestones=[8], gamma=0.1, by_epoch=False),
            ],
            [0.005, 0.01625, 0.0275, 0.03875] + [0.05] * 4 + [0.005] * 4,
        ),
    ],
    ids=['MultiStepLR', 'LinearLR_warmup'],
)
def test_schedulers_keep_the_factor(make_runner, scheduler, expected):
    rates, control_rates = [], []

    class Spy(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            for (name,), options in groups_of(runner.optim_wrapper.optimizer, runner.model):
                is_control = name.startswith('norm') and name.endswith(CONTROL)
                (control_rates if is_control else rates).append(options['lr'])

    runner = make_runner(
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.05, weight_decay=DECAY),
            constructor='SSNOptimWrapperConstructor',
        ),
        param_scheduler=scheduler,
    )
    runner.register_hook(Spy())
    runner.train()
    # conv1, conv2, head.weight, head.bias, and weight and bias of two norms; four control vectors
    assert rates == pytest.approx([rate for rate in expected for _ in range(8)])
    assert control_rates == pytest.approx([rate * 0.1 for rate in expected for _ in range(4)])
    assert None not in runner.model.norm1.selected + runner.model.norm2.selected
