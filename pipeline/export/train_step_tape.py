"""A small set of tensor operators with reverse-mode differentiation, for graphs that are written once and run anywhere.

A tape is a list of nodes in the order of execution; building it computes nothing. Each differentiable operator has
its vector-Jacobian product in the same set of operators, so a tape with its gradients is again an ordinary inference
graph. A size is a number, or a name where the runtime decides (the batch, the rank of an adapter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Size = int | str
Shape = tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """The result of one node; ``kind`` is float32 or int32."""

    name: str
    shape: Shape
    kind: str = "float32"


@dataclass(frozen=True, slots=True)
class Node:
    """One operator; ``operator`` is the name of the ``Tape`` method that made it."""

    operator: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    attributes: Mapping[str, Any]


@dataclass(slots=True)
class Tape:
    """Nodes under construction."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def source(self, name: str, shape: Shape, kind: str = "float32") -> Tensor:
        """What the caller feeds."""
        return self._append("source", (), shape, kind, name)

    def parameter(self, name: str, size: int) -> Tensor:
        """A frozen vector of the checkpoint, by its name there."""
        return self._append("parameter", (), (size,), name=name)

    def constant(self, name: str, value: NDArray[np.generic]) -> Tensor:
        """A small constant that does not come from the checkpoint; the first value of a name stays."""
        if name not in self.constants:
            self.constants[name] = value
            return self._append("constant", (), value.shape, str(value.dtype), name)
        return next(node.output for node in self.nodes if node.output.name == name)

    def causal(self, tokens: int, hidden: float) -> Tensor:
        """(T, T): ``hidden`` above the diagonal, 0 elsewhere."""
        return self._append("causal", (), (tokens, tokens), hidden=hidden)

    def next_tokens(self, tokens: Tensor) -> Tensor:
        """(B, T) ids moved one to the left; the last column is the first."""
        return self._append("next_tokens", (tokens,), tokens.shape, tokens.kind)

    def embed(self, ids: Tensor, weight: str, columns: int) -> Tensor:
        """Rows of a frozen matrix: (B, T) -> (B, T, columns)."""
        return self._append("embed", (ids,), (*ids.shape, columns), weight=weight)

    def linear(self, x: Tensor, weight: str, rows: int, bias: str | None = None) -> Tensor:
        """x W^T + bias with a frozen W (rows, columns): (M, columns) -> (M, rows)."""
        return self._append("linear", (x,), (x.shape[0], rows), weight=weight, bias=bias)

    def linear_back(self, dy: Tensor, weight: str, columns: int) -> Tensor:
        """dy W with the W of ``linear``: (M, rows) -> (M, columns)."""
        return self._append("linear_back", (dy,), (dy.shape[0], columns), weight=weight)

    def matmul(self, a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
        """Product over the last two axes; the axes in front are equal."""
        rows = a.shape[-1] if transpose_a else a.shape[-2]
        columns = b.shape[-2] if transpose_b else b.shape[-1]
        shape = (*a.shape[:-2], rows, columns)
        return self._append("matmul", (a, b), shape, transpose_a=transpose_a, transpose_b=transpose_b)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, broadcast."""
        return self._append("add", (a, b), _broadcast(a.shape, b.shape))

    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        """a - b, broadcast."""
        return self._append("subtract", (a, b), _broadcast(a.shape, b.shape))

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a * b, broadcast."""
        return self._append("multiply", (a, b), _broadcast(a.shape, b.shape))

    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        """a / b, broadcast."""
        return self._append("divide", (a, b), _broadcast(a.shape, b.shape))

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """x * factor."""
        return self._append("scale", (x,), x.shape, factor=factor)

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + exp(-x))."""
        return self._append("sigmoid", (x,), x.shape)

    def exp(self, x: Tensor) -> Tensor:
        """e^x."""
        return self._append("exp", (x,), x.shape)

    def log(self, x: Tensor) -> Tensor:
        """Natural logarithm."""
        return self._append("log", (x,), x.shape)

    def softmax(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        return self._append("softmax", (x,), x.shape)

    def inverse_rms(self, x: Tensor, epsilon: float) -> Tensor:
        """1 / sqrt(mean(x^2) + epsilon) over the last axis, which stays with size 1."""
        return self._append("inverse_rms", (x,), (*x.shape[:-1], 1), epsilon=epsilon)

    def largest(self, x: Tensor) -> Tensor:
        """Maximum over the last axis, which stays with size 1; a constant to ``differentiate``."""
        return self._append("largest", (x,), (*x.shape[:-1], 1))

    def total(self, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        """Sum over ``axes``, which stay with size 1; over everything to a scalar () without them."""
        if axes is None:
            return self._append("total", (x,), (), axes=None)
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        return self._append("total", (x,), shape, axes=tuple(axes))

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """The same numbers; at most one size of ``shape`` is a name."""
        return x if shape == x.shape else self._append("reshape", (x,), shape)

    def transpose(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        """Axes in another order."""
        return self._append("transpose", (x,), tuple(x.shape[axis] for axis in order), order=order)

    def swap_halves(self, x: Tensor) -> Tensor:
        """Second half of the last axis in front of the first."""
        return self._append("swap_halves", (x,), x.shape)

    def _append(
        self, operator: str, inputs: tuple[Tensor, ...], shape: Shape, kind: str = "float32", name: str = "",
        **attributes: Any,
    ) -> Tensor:  # fmt: skip
        output = Tensor(name or f"t{len(self.nodes)}", shape, kind)
        self.nodes.append(Node(operator, inputs, output, attributes))
        return output


def differentiate(tape: Tape, loss: Tensor, sources: Sequence[Tensor]) -> dict[str, Tensor]:
    """Append the gradients of a scalar by ``sources`` to the tape, and return them by the source's name.

    Only nodes between a source and the loss are visited: nothing flows into frozen weights, nor below the first
    use of a source.
    """
    forward = list(tape.nodes)
    active = {source.name for source in sources}
    for node in forward:
        if node.operator != "largest" and any(tensor.name in active for tensor in node.inputs):
            active.add(node.output.name)
    one = tape.constant("one", np.ones((), np.float32))
    gradients: dict[str, Tensor] = {loss.name: one}
    for node in reversed(forward):
        if node.output.name not in active or node.output.name not in gradients or not node.inputs:
            continue
        products = _PRODUCTS[node.operator](tape, node, gradients[node.output.name])
        for tensor, product in zip(node.inputs, products, strict=True):
            if tensor.name in active:
                found = product()
                known = gradients.get(tensor.name)
                gradients[tensor.name] = found if known is None else tape.add(known, found)
    if wrong := [source.name for source in sources if gradients[source.name].shape != source.shape]:
        raise ValueError(f"{wrong[0]}: its gradient has another shape")
    return {source.name: gradients[source.name] for source in sources}


_Product = Callable[[], Tensor]


def _matmul_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    a, b = node.inputs
    ta, tb = node.attributes["transpose_a"], node.attributes["transpose_b"]
    if ta:
        raise NotImplementedError("no forward product here transposes its first factor")
    return (
        lambda: tape.matmul(dy, b, transpose_b=not tb),
        lambda: tape.matmul(dy, a, transpose_a=True) if tb else tape.matmul(a, dy, transpose_a=True),
    )


def _linear_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    columns = node.inputs[0].shape[1]
    assert isinstance(columns, int)
    return (lambda: tape.linear_back(dy, node.attributes["weight"], columns),)


def _inverse_rms_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    """d/dx (mean(x^2) + e)^(-1/2) = -x r^3 / K."""
    (x,), r = node.inputs, node.output
    columns = x.shape[-1]
    assert isinstance(columns, int)

    def product() -> Tensor:
        cubed = tape.multiply(tape.multiply(r, r), r)
        return tape.multiply(x, tape.scale(tape.multiply(dy, cubed), -1 / columns))

    return (product,)


def _softmax_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    y = node.output

    def product() -> Tensor:
        mean = tape.total(tape.multiply(dy, y), (len(y.shape) - 1,))
        return tape.multiply(y, tape.subtract(dy, mean))

    return (product,)


def _sigmoid_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    y = node.output
    return (lambda: tape.multiply(dy, tape.subtract(y, tape.multiply(y, y))),)


def _multiply_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    a, b = node.inputs
    return (
        lambda: _reduced(tape, tape.multiply(dy, b), a.shape),
        lambda: _reduced(tape, tape.multiply(dy, a), b.shape),
    )


def _add_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    a, b = node.inputs
    return (lambda: _reduced(tape, dy, a.shape), lambda: _reduced(tape, dy, b.shape))


def _subtract_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    a, b = node.inputs
    return (lambda: _reduced(tape, dy, a.shape), lambda: _reduced(tape, tape.scale(dy, -1.0), b.shape))


def _total_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    """The gradient of a sum is the same everywhere; who multiplies by it next broadcasts it for free."""
    (x,) = node.inputs
    if node.attributes["axes"] is None:
        return (lambda: tape.reshape(dy, (1,) * len(x.shape)),)
    return (lambda: dy,)


def _transpose_products(tape: Tape, node: Node, dy: Tensor) -> tuple[_Product, ...]:
    order = node.attributes["order"]
    inverse = tuple(sorted(range(len(order)), key=order.__getitem__))
    return (lambda: tape.transpose(dy, inverse),)


_PRODUCTS: dict[str, Callable[[Tape, Node, Tensor], tuple[_Product, ...]]] = {
    "matmul": _matmul_products,
    "linear": _linear_products,
    "add": _add_products,
    "subtract": _subtract_products,
    "multiply": _multiply_products,
    "scale": lambda tape, node, dy: (lambda: tape.scale(dy, node.attributes["factor"]),),
    "sigmoid": _sigmoid_products,
    "exp": lambda tape, node, dy: (lambda: tape.multiply(dy, node.output),),
    "log": lambda tape, node, dy: (lambda: tape.divide(dy, node.inputs[0]),),
    "softmax": _softmax_products,
    "inverse_rms": _inverse_rms_products,
    "total": _total_products,
    "reshape": lambda tape, node, dy: (lambda: tape.reshape(dy, node.inputs[0].shape),),
    "transpose": _transpose_products,
    "swap_halves": lambda tape, node, dy: (lambda: tape.swap_halves(dy),),
}


def _reduced(tape: Tape, gradient: Tensor, shape: Shape) -> Tensor:
    """Sum over the axes along which ``shape`` was broadcast (it has as many axes, or is the larger one)."""
    if len(shape) != len(gradient.shape):
        raise NotImplementedError(f"gradient of shape {gradient.shape} for {shape}")
    axes = [axis for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis] != 1]
    return tape.total(gradient, axes) if axes else gradient


def _broadcast(a: Shape, b: Shape) -> Shape:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    shorter = (1,) * (len(longer) - len(shorter)) + shorter
    if any(x != y and 1 not in (x, y) for x, y in zip(longer, shorter, strict=True)):
        raise ValueError(f"shapes {a} and {b} do not broadcast")
    return tuple(y if x == 1 else x for x, y in zip(longer, shorter, strict=True))
