"""A net as attacks pass through it: many times while its weights stand still, so what these decide is done once.

BatchNorm in evaluation mode becomes part of the convolution before it, weights are cast to autocast's precision once
and not in every pass, and on a CPU large ones are brought into oneDNN's own layout once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

#: Packing pays where a convolution has few pixels for its weights: up to so many in a batch's output.
FEW_PIXELS = 1024


class Folding:
    """The convolutions of a net, and which of them are followed by a BatchNorm and by nothing else.

    They are found by watching one forward, whatever the net is made of; a net whose forward takes other ways later, or
    keeps a convolution's output aside for later use, is not to be folded. A convolution of a class of its own is left
    as it is; a pair of which one is called twice stays two.

    Args:
        net: The net.
        forward: One forward of it in evaluation mode, with nothing to differentiate.
    """

    def __init__(self, net: nn.Module, forward: Callable[[], Any]) -> None:
        with _Watch(net) as watch:
            out = forward()
        returned = {id(leaf) for leaf in tree_leaves(out)}
        convolved = [conv for conv, _ in watch.outputs]
        calls = Counter([*convolved, *(bn for found in watch.normalised.values() for bn in found)])
        self.net, self.modules = net, list(net.modules())
        self.convolutions = list(dict.fromkeys(convolved))
        self.norms: dict[nn.Conv2d, nn.BatchNorm2d] = {}
        for conv, tensor in watch.outputs:
            found = watch.normalised[id(tensor)]
            once = len(found) == 1 and calls[conv] == calls[found[0]] == 1
            if once and not watch.others[id(tensor)] and id(tensor) not in returned:
                self.norms[conv] = found[0]

    @property
    def stale(self) -> bool:
        """Whether the net's modules are others than those that were watched."""
        return list(self.net.modules()) != self.modules  # modules are equal where they are the same one

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, forwards take the weights as they were on entering; no gradient reaches them.

        A BatchNorm in training mode, and what somebody watches by a hook, stays as it is.
        """
        with ExitStack() as stack:
            for conv in self.convolutions:
                if "forward" in vars(conv) or _watched(conv):
                    continue
                bn = self.norms.get(conv)
                if bn is not None and (bn.training or _watched(bn)):
                    bn = None
                conv.forward = Standing(conv, bn)  # type: ignore[method-assign, assignment]
                stack.callback(vars(conv).pop, "forward")
                if bn is not None:
                    bn.forward = _same  # type: ignore[method-assign, assignment]
                    stack.callback(vars(bn).pop, "forward")
            yield


class Standing:
    """A convolution whose weights stand still, with the BatchNorm behind it where there is one.

    Attributes:
        whole: Weight [C_out, C_in / groups, k, k], and bias [C_out] or None, in the net's own precision.
        weight, bias: In that of autocast where it is on.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> None:
        device = conv.weight.device.type
        casts = _autocasts(device)
        dtype = torch.get_autocast_dtype(device) if casts else conv.weight.dtype
        with torch.no_grad(), torch.autocast(device, enabled=False) if casts else nullcontext():
            weight, bias = (conv.weight, conv.bias) if bn is None else folded(conv, bn)
            self.whole = weight.detach(), None if bias is None else bias.detach()
            self.weight, self.bias = self.whole[0].to(dtype), None if bias is None else bias.detach().to(dtype)
        self.conv, self.passes = conv, 0
        self.packed: tuple[Tensor, Tensor] | None = None
        self.packs = False
        if PACKS and device == "cpu" and dtype in (torch.float32, torch.bfloat16) and not isinstance(conv.padding, str):
            self.padding = list(conv.padding)
            self.padding_back = [k - 1 - p for k, p in zip(conv.kernel_size, self.padding, strict=True)]
            self.packs = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and min(self.padding_back) >= 0

    def __call__(self, x: Tensor) -> Tensor:
        c = self.conv
        self.passes += 1
        few = x.dim() == 4 and len(x) * x.shape[2] * x.shape[3] <= FEW_PIXELS and x.dtype == self.weight.dtype
        if self.passes > 1 and self.packs and few and x.is_contiguous(memory_format=torch.channels_last):
            if self.packed is None:
                self.packed = self.pack(list(x.shape))
            return cast(Tensor, _Packed.apply(x, self))
        # A net may switch autocast off for a part of itself.
        apart = x.dtype == self.whole[0].dtype and not _autocasts(x.device.type)
        weight, bias = self.whole if apart else (self.weight, self.bias)
        return F.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)

    def pack(self, shape: list[int]) -> tuple[Tensor, Tensor]:
        """The weights in oneDNN's layout, for the forward and, turned round, for the gradient of x [B, C_in, H, W]."""
        one, reorder = [1, 1], torch.ops.mkldnn._reorder_convolution_weight
        sizes = (n + p - q for n, p, q in zip(shape[2:], self.padding, self.padding_back, strict=True))
        there = reorder(self.weight, self.padding, one, one, 1, shape)
        turned = self.weight.flip(2, 3).transpose(0, 1)
        return there, reorder(turned, self.padding_back, one, one, 1, [shape[0], len(self.weight), *sizes])


class _Packed(torch.autograd.Function):
    """A convolution of stride 1 by packed weights: the gradient of its input is a convolution as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Standing) -> Tensor:
        ctx.layer = layer
        assert layer.packed is not None
        return _convolve(x, layer.packed[0], layer.bias, layer.padding)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        g = g.contiguous(memory_format=torch.channels_last)
        return _convolve(g, layer.packed[1], None, layer.padding_back), None


#: Whether this torch has the operations that inductor uses on a CPU.
PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")


def _convolve(x: Tensor, packed: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    convolution = torch.ops.mkldnn._convolution_pointwise
    return cast(Tensor, convolution(x, packed, bias, padding, [1, 1], [1, 1], 1, "none", [], ""))


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals both in evaluation mode."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = torch.rsqrt(bn.running_var + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight
    shift = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
    bias = shift * scale if bn.bias is None else shift * scale + bn.bias
    return conv.weight * scale[:, None, None, None], bias


def _autocasts(device: str) -> bool:
    """Whether autocast is on; the meta device, which has none, may not be asked."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _watched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _same(x: Tensor) -> Tensor:
    return x


class _Watch(TorchFunctionMode):
    """Notes what convolutions put out, and where it goes: into a BatchNorm, or into any other function."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.inside = net, False
        self.outputs: list[tuple[nn.Conv2d, Tensor]] = []  # holds the tensors, so that their ids stay theirs
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
        self.outputs.append((conv, out))
        self.normalised[id(out)] = []
        self.others[id(out)] = 0

    def _entered(self, bn: nn.BatchNorm2d, args: Any) -> None:
        self.inside = True
        self.normalised.setdefault(id(args[0]), []).append(bn)

    def _left(self, bn: nn.BatchNorm2d, args: Any, out: Tensor) -> None:
        self.inside = False
