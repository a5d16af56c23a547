"""How a layer notices that gradient checkpointing computes it again."""

import torch

from ssn_plugin.torch_versions import is_compiling


def recomputes() -> bool:
    """Whether gradient checkpointing runs a forward pass of this step once more.

    It does so inside the backward pass. A compiled graph cannot ask.
    """
    return not is_compiling() and torch._C._current_graph_task_id() != -1
