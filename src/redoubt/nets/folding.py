"""BatchNorm of evaluation mode as part of the convolution before it: what an attack passes through is shorter."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Folding:
    """The convolutions of a net whose output goes into a BatchNorm and nowhere else.

    They are found by watching one forward, so that it does not matter how the net is written. A convolution or
    BatchNorm that is called twice, or is of a class with a forward of its own, is left as it is.

    Args:
        net: The net.
        forward: One forward of it in evaluation mode, with nothing to differentiate.
    """

    def __init__(self, net: nn.Module, forward: Callable[[], Any]) -> None:
        with _Watch(net) as watch:
            out = forward()
        returned = {id(leaf) for leaf in tree_leaves(out)}
        calls = Counter(map(id, (*watch.convolved, *(bn for found in watch.normalised.values() for bn in found))))
        self.pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
        for conv, tensor in watch.outputs:
            found = watch.normalised[id(tensor)]
            once = len(found) == 1 and calls[id(conv)] == calls[id(found[0])] == 1
            if once and not watch.others[id(tensor)] and id(tensor) not in returned:
                self.pairs.append((conv, found[0]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, these convolutions do their BatchNorm's work, in autocast's precision where it is on.

        The weights are those at the time of entering; no gradient reaches them. A BatchNorm in training mode, and what
        somebody watches by a hook, stays as it is.
        """
        with ExitStack() as stack:
            for conv, bn in self.pairs:
                if not (bn.training or "forward" in vars(conv) or _watched(conv) or _watched(bn)):
                    conv.forward = functools.partial(_convolve, conv, *folded(conv, bn))  # type: ignore[method-assign]
                    stack.callback(vars(conv).pop, "forward")
                    bn.forward = _same  # type: ignore[method-assign, assignment]
                    stack.callback(vars(bn).pop, "forward")
            yield


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [C_out, C_in / groups, k, k] and bias [C_out] of the one convolution that equals both when evaluated."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    device = conv.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else conv.weight.dtype
    with torch.no_grad(), torch.autocast(device, enabled=False):
        scale = torch.rsqrt(bn.running_var + bn.eps)
        scale = scale if bn.weight is None else scale * bn.weight
        shift = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
        bias = shift * scale if bn.bias is None else shift * scale + bn.bias
        return (conv.weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)


def _watched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _convolve(conv: nn.Conv2d, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _same(x: Tensor) -> Tensor:
    return x


class _Watch(TorchFunctionMode):
    """Notes what convolutions put out, and where it goes: into a BatchNorm, or into any other function."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.inside = net, False
        self.outputs: list[tuple[nn.Conv2d, Tensor]] = []  # holds the tensors, so that their ids stay theirs
        self.convolved: list[nn.Conv2d] = []
        self.normalised: dict[int, list[nn.BatchNorm2d]] = {}
        self.others: Counter[int] = Counter()

    def __enter__(self) -> _Watch:
        self.handles = []
        for module in self.net.modules():
            if type(module) is nn.Conv2d and module.padding_mode == "zeros":
                self.handles.append(module.register_forward_hook(self._convolved))
            elif type(module) is nn.BatchNorm2d and module.track_running_stats:
                self.handles.append(module.register_forward_pre_hook(self._entered))
                self.handles.append(module.register_forward_hook(self._left))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.others.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))

    def _convolved(self, conv: nn.Conv2d, args: Any, out: Tensor) -> None:
        self.convolved.append(conv)
        self.outputs.append((conv, out))
        self.normalised[id(out)] = []
        self.others[id(out)] = 0

    def _entered(self, bn: nn.BatchNorm2d, args: Any) -> None:
        self.inside = True
        self.normalised.setdefault(id(args[0]), []).append(bn)

    def _left(self, bn: nn.BatchNorm2d, args: Any, out: Tensor) -> None:
        self.inside = False
