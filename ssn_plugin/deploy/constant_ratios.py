"""What is still a mixture, with its present importance ratios as constants: for recorders."""

from torch import Tensor, nn

from ssn_plugin.layers.convert import replace_layers
from ssn_plugin.layers.switchable import SwitchableNorm
from ssn_plugin.ops.switchable_norm.exportable import switchable_norm
from ssn_plugin.ops.switchable_norm.statistics import Moments, Settings


class ConstantRatioNorm(nn.Module):
    """The evaluation pass of an SSN or SN with the ratios that it has now, in plain operators.

    Parameters and running statistics are those of the layer, shared.
    """

    def __init__(self, layer: SwitchableNorm) -> None:
        super().__init__()
        self.mean_ratios = layer.mean_ratios.tolist()
        self.var_ratios = layer.var_ratios.tolist()
        self.settings = Settings(layer.normalizers, layer.num_groups, layer.correction, layer.eps)
        self.weight = layer.weight
        self.bias = layer.bias
        self.register_buffer('running_mean', layer.running_mean)
        self.register_buffer('running_var', layer.running_var)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, ...)."""
        return switchable_norm(
            x,
            self.mean_ratios,
            self.var_ratios,
            self.weight,
            self.bias,
            None if self.running_mean is None else Moments(self.running_mean, self.running_var),
            self.settings,
        )


def hold_ratios(model: nn.Module) -> nn.Module:
    """Replace every SSN and SN by its evaluation pass with the present ratios as constants.

    A recorder (``torch.export``, ``torch.jit.trace``, ONNX) sees a few plain operators then, and
    what it records holds for every size of input. The new layers have no other use: they ignore
    training, and their state dict lacks the control parameters. :func:`ssn_plugin.collapse_ssn`
    comes first, so that decided layers become layers of torch.

    Args:
        model: Any module, in evaluation; changed in place.

    Returns:
        The model; a new layer if the model itself is an SSN or SN.

    Raises:
        ValueError: If such a layer is in training. It is named, and nothing was changed.

    Example:
        >>> import torch
        >>> from ssn_plugin import SSN2d, collapse_ssn, hold_ratios
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SSN2d(8)).eval()
        >>> model = hold_ratios(collapse_ssn(model, keep_undecided=True))
        >>> auto = torch.export.Dim.AUTO
        >>> program = torch.export.export(
        ...     model, (torch.randn(2, 3, 9, 8),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
        ... )
        >>> program.module()(torch.randn(1, 3, 20, 30)).shape
        torch.Size([1, 8, 18, 28])
    """
    switchable = {n: m for n, m in model.named_modules() if isinstance(m, SwitchableNorm)}
    training = [name or 'the model itself' for name, layer in switchable.items() if layer.training]
    if training:
        raise ValueError(f'model: got training mode, expected model.eval(): {", ".join(training)}')
    made = {layer: ConstantRatioNorm(layer).eval() for layer in switchable.values()}
    return replace_layers(model, made)
