r"""Bayes' rule over the L values of a grid, computed in blocks that fit the cache.

With s_i = z_i/(sqrt(2) sigma) and w_k = alpha v_k/(sqrt(2) sigma),

.. math::
    r_{ik} = \operatorname{softmax}_k\bigl(-(s_i - w_k)^2\bigr), \qquad
    e_i = \sum_k r_{ik} E_k, \qquad n_k = \sum_i r_{ik},

    p_{ik}
    = \operatorname{softmax}_k\bigl(\ell_{ik} + \log(1 + c (n_k - r_{ik})) - (s_i - w_k)^2\bigr),
    \qquad \hat x_i = \sum_k p_{ik} v_k,

where l is a linear map of K features of each place. A tensor with an index k is L times as large as
the data. Autograd would store about a dozen of them for the whole batch and spend most of its time
on memory access. Here they exist for one block at a time, and the backward pass recomputes them.
The exceptions are gradients that are differentiated again, torch.func and forward mode.
With g = d loss/d x̂,

.. math::
    \frac{\partial}{\partial \ell_{ik}} = p_{ik} (v_k - \hat x_i) g_i =: a_{ik}, \qquad
    \frac{\partial}{\partial (n_k - r_{ik})} = \frac{c\, a_{ik}}{1 + c (n_k - r_{ik})} .
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd import Function

from ndm.autodiff.functorch import NOTHING, nesting
from ndm.autodiff.rules import through
from ndm.device import autocast_dtype, full_precision

_CPU_BLOCK, _GPU_BLOCK = 2**18, 2**24
"""Elements with an index k in a block. On the CPU that is 1 MB in float32, on a GPU 64 MB, and a
backward pass stores about nine such tensors.
"""


def value_posteriors(s: Tensor, w: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return e ``(B, D, M)`` and n ``(B, L)`` from s ``(B, D)``, w ``(B, L)`` and E ``(L, M)``.

    In compiled code e is rounded to the dtype of autocast.
    """
    narrow = autocast_dtype(s) if torch.compiler.is_compiling() else None
    with full_precision(s):
        if _is_eager():
            return _Summary.apply(s, w, embedding)
        return _summary(s, w, embedding.to(narrow or embedding.dtype))


def posterior_mean(
    s: Tensor,
    w: Tensor,
    n: Tensor,
    c: Tensor,
    v: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Return x̂ ``(B, D)``.

    Features may have another precision than the rest; their product with the weight is then
    computed in it.

    Args:
        s: ``(B, D)``.
        w: ``(B, L)``.
        n: ``(B, L)``.
        c: ``()``.
        v: ``(L,)``.
        features: of each place, ``(B, D, K)``.
        weight: of the linear map to logits, ``(L, K)``.
        bias: of the linear map to logits, ``(L,)``.
    """
    inputs = (s, w, n, c, v, features, weight, bias)
    return _PosteriorMean.apply(*inputs) if _is_eager() else _mean(*inputs)


def _is_eager() -> bool:
    """Whether no compiler, transform of torch.func or forward mode is active."""
    return not torch.compiler.is_compiling() and nesting() == NOTHING


def _summary(s: Tensor, w: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.softmax(-(s[..., None] - w[:, None]).square(), dim=-1)
    return r.to(embedding.dtype) @ embedding, r.sum(1)


def _mean(
    s: Tensor,
    w: Tensor,
    n: Tensor,
    c: Tensor,
    v: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    square = (s[..., None] - w[:, None]).square()
    r = torch.softmax(-square, dim=-1)
    others = (n[:, None] - r).clamp(min=0)  # n may have been summed in another order
    logits = nnf.linear(features, weight.to(features.dtype)).to(s.dtype) + bias
    return (torch.softmax(logits + torch.log1p(c * others) - square, dim=-1) * v).sum(-1)


def _blocks(s: Tensor, w: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of the batch: some places of one example, or all places of several examples."""
    most = (_CPU_BLOCK if s.device.type == "cpu" else _GPU_BLOCK) // w.shape[1]
    places = max(1, min(s.shape[1], most))
    examples = max(1, most // max(1, s.shape[1]))
    for first in range(0, len(s), examples):
        for start in range(0, s.shape[1], places):
            yield slice(first, first + examples), slice(start, start + places)


def _softmax(x: Tensor) -> Tensor:
    """Return the softmax over k, with weights below eps^2 of the largest set to zero.

    CPUs are many times slower on denormal numbers.
    """
    smallest = 2 * math.log(torch.finfo(x.dtype).eps)
    weights = torch.threshold_(x - x.amax(-1, keepdim=True), smallest, -math.inf).exp_()
    return weights.mul_(weights.sum(-1, keepdim=True).reciprocal_())


class _Block:
    """s - w, -(s - w)², r and values derived from them in a block, each ``(b, d, L)``."""

    def __init__(self, s: Tensor, w: Tensor):
        self.difference = s[..., None] - w[:, None]
        self.exponent = self.difference.square().neg_()
        self.r = _softmax(self.exponent)

    def weigh(self, n: Tensor, c: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return p, and set self.others = n - r and self.odds = 1 + c (n - r)."""
        self.others = (n[:, None] - self.r).clamp_(min=0)  # n may be summed in another order
        self.odds = (self.others * c).add_(1)
        logits = nnf.linear(features, weight).to(self.r.dtype).add_(bias)
        return _softmax(logits.add_(self.odds.log()).add_(self.exponent))

    def add_slopes(self, gradient: Tensor, ds: Tensor, dw: Tensor) -> None:
        """Add to ds and dw their share of ``gradient``, that of the exponent (overwritten)."""
        moved = gradient.mul_(self.difference)
        ds.sub_(moved.sum(2), alpha=2)
        dw.add_(moved.sum(1), alpha=2)


def _through_softmax(gradient: Tensor, value: Tensor) -> Tensor:
    return torch._softmax_backward_data(gradient, value, -1, value.dtype)


class _Summary(Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, w: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(s, w, embedding)
        e, n = s.new_empty(*s.shape, embedding.shape[1]), torch.zeros_like(w)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(n)
        for b, d in _blocks(s, w):
            r = _Block(s[b, d], w[b]).r
            e[b, d] = r @ embedding
            n[b] += r.sum(1)
        return e, n

    @staticmethod
    def backward(ctx: Any, de: Tensor, dn: Tensor) -> tuple[Any, ...]:
        inputs = s, w, embedding = ctx.saved_tensors
        with full_precision(s):
            if torch.is_grad_enabled():  # the gradient will be differentiated
                return tuple(through(_summary, inputs, (de, dn)))
            ds, dw, dembedding = (torch.zeros_like(value) for value in inputs)
            for b, d in _blocks(s, w):
                block = _Block(s[b, d], w[b])
                dembedding.addmm_(block.r.flatten(0, 1).T, de[b, d].flatten(0, 1))
                if any(ctx.needs_input_grad[:2]):
                    dr = (de[b, d] @ embedding.T).add_(dn[b, None])
                    block.add_slopes(_through_softmax(dr, block.r), ds[b, d], dw[b])
            return ds, dw, dembedding


class _PosteriorMean(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        s, w, n, c, v, features, weight, bias = inputs
        x, narrow = torch.empty_like(s), weight.to(features.dtype)
        for b, d in _blocks(s, w):
            x[b, d] = _Block(s[b, d], w[b]).weigh(n[b], c, features[b, d], narrow, bias) @ v
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs = s, w, n, c, v, features, weight, bias = ctx.saved_tensors
        with full_precision(s):
            if torch.is_grad_enabled():  # the gradient will be differentiated
                return tuple(through(_mean, inputs, gradient))
            ds, dw, dn, dc, _, dfeatures, dweight, dbias = (
                torch.zeros_like(value) for value in inputs
            )
            narrow = weight.to(features.dtype)
            for b, d in _blocks(s, w):
                block = _Block(s[b, d], w[b])
                p = block.weigh(n[b], c, features[b, d], narrow, bias)
                a = _through_softmax(gradient[b, d, None] * v, p)
                low = a.to(features.dtype).flatten(0, 1)
                dfeatures[b, d] = (low @ narrow).view_as(features[b, d])
                dweight += low.T @ features[b, d].flatten(0, 1)
                dbias += a.sum((0, 1))
                relative = torch.div(a, block.odds, out=block.odds)
                dc += torch.dot(relative.flatten(), block.others.flatten())
                if any(ctx.needs_input_grad[:3]):
                    dn[b] += relative.mul_(c).sum(1)
                    block.add_slopes(a.sub_(_through_softmax(relative, block.r)), ds[b, d], dw[b])
            return ds, dw, dn, dc, None, dfeatures, dweight, dbias
