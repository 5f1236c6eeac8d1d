"""Which operation made a number that is not finite: a traced function evaluated one operation at a time.

In: a jaxpr and its arguments. Out: for each result, where its first infinity or NaN came from, with the module and the
source line, in the forward or the backward pass.

This is what ``jax_debug_nans`` does in a function that is not compiled, and more: infinities count, whose NaN may come
much later; what a ``where`` masks away does not, since each value carries its own origin along; what happens inside a
scan of layers or in the backward pass has a line and a module, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from sslx.runtime import display

# Frames inside these packages are not what the reader has written.
LIBRARIES = re.compile(r"site-packages/(jax|flax|optax|jaxlib)/")
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters of operations that hold others


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value stopped being finite.

    Attributes:
      operation: The name of the primitive; ``argument`` if it was given so.
      value: ``inf``, ``-inf`` or ``nan``, what it gave first.
      module: ``encoder/transformer/block/attention``, as far as it is known.
      backward: In the gradient's pass.
      place: ``file.py:12 (function)``, or "".
      repeats: Which repetitions of a scan, the outer one first: layers, micro-batches.
      order: How early.
      nan: Where it turned to NaN, if it was an infinity first.
    """

    operation: str
    value: str
    module: str = ""
    backward: bool = False
    place: str = ""
    repeats: tuple[int, ...] = ()
    order: int = -1
    nan: Origin | None = None

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        passed = " (backward pass)" if self.backward else ""
        repeats = "".join(f", repetition {number} of a scan (from 0)" for number in self.repeats)
        return f"{self.operation} gives {self.value}{where}{passed}{repeats}{f', {self.place}' if self.place else ''}"


@dataclasses.dataclass(frozen=True)
class _Value:
    array: Any
    origin: Origin | None = None


@dataclasses.dataclass(frozen=True)
class _Around:
    """What an operation lies in."""

    stack: str = ""
    place: str = ""  # of the call of a jitted function, whose own operations remember the first call of all
    repeats: tuple[int, ...] = ()


def origins(jaxpr: ClosedJaxpr, arguments: Sequence[Any], names: Sequence[str]) -> list[Origin | None]:
    """Where each result's first value that is not finite came from; None for one that is finite.

    Args:
      jaxpr: What to evaluate.
      arguments: Arrays.
      names: Of the arguments, in place of a module.
    """
    given = [
        _Value(array, None if (value := _broken(array)) is None else Origin("argument", value, name))
        for array, name in zip(arguments, names, strict=True)
    ]
    results = _evaluate(jaxpr.jaxpr, [_Value(const) for const in jaxpr.consts], given, _Around(), itertools.count())
    return [result.origin for result in results]


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[_Value], given: Sequence[_Value], around: _Around, clock: Iterator[int]
) -> list[_Value]:
    known: dict[Any, _Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))
    last = {}  # where each value is needed for the last time: without it, all activations would stay
    for index, equation in enumerate(jaxpr.eqns):
        last |= {variable: index for variable in equation.invars if not isinstance(variable, Literal)}
    results = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}

    def read(variable: Any) -> _Value:
        return _Value(variable.val) if isinstance(variable, Literal) else known[variable]

    for index, equation in enumerate(jaxpr.eqns):
        inputs = [read(variable) for variable in equation.invars]
        outputs = _operate(equation, inputs, around, clock)
        known |= zip(equation.outvars, outputs, strict=True)
        for variable in equation.invars:
            if not isinstance(variable, Literal) and last[variable] == index and variable not in results:
                known.pop(variable, None)
    return [read(variable) for variable in jaxpr.outvars]


def _operate(equation: JaxprEqn, inputs: list[_Value], around: _Around, clock: Iterator[int]) -> list[_Value]:
    primitive = equation.primitive
    with equation.ctx.manager:
        made = primitive.bind(*(value.array for value in inputs), **primitive.get_bind_params(equation.params))
    arrays, order = list(made) if primitive.multiple_results else [made], next(clock)
    values = [_broken(array) for array in arrays]
    if all(value is None for value in values):
        return [_Value(array) for array in arrays]
    # Of all that led here, what happened first.
    led = min((value.origin for value in inputs if value.origin), key=lambda origin: origin.order, default=None)
    inner = _inside(equation, inputs, around, clock)
    outputs = []
    for number, (array, value) in enumerate(zip(arrays, values, strict=True)):
        origin = None
        if value is not None:
            origin = inner[number] if inner and inner[number] else None
            origin = origin or _origin(equation, value, around, order, led, inputs)
        outputs.append(_Value(array, origin))
    return outputs


def _origin(
    equation: JaxprEqn, value: str, around: _Around, order: int, led: Origin | None, inputs: list[_Value]
) -> Origin:
    if led is not None and (led.value == "nan" or led.nan or value != "nan"):
        return led
    stack = "/".join(filter(None, (around.stack, str(equation.source_info.name_stack))))
    here = Origin(
        operation=equation.primitive.name,
        value=value,
        module=module_of(stack),
        backward="transpose(" in stack,
        place=around.place or _place(equation),
        repeats=around.repeats,
        order=order,
    )
    return here if led is None else dataclasses.replace(led, nan=here)


def _inside(
    equation: JaxprEqn, inputs: list[_Value], around: _Around, clock: Iterator[int]
) -> list[Origin | None] | None:
    """Origins of the results of an operation that is made of others; None for one that is not, or not known here."""
    name, params = equation.primitive.name, equation.params
    stack = "/".join(filter(None, (around.stack, str(equation.source_info.name_stack))))
    within = dataclasses.replace(around, stack=stack)
    if name == "jit":
        within = dataclasses.replace(within, place=around.place or _place(equation))
    if name == "scan":
        return _scan(params, inputs, within, clock)
    if name == "cond":
        which = int(jnp.clip(inputs[0].array, 0, len(params["branches"]) - 1))
        inner, inputs = params["branches"][which], inputs[1:]
    else:
        inner = next((params[key] for key in _INNER if key in params), None)
    jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
    if not isinstance(jaxpr, Jaxpr) or len(jaxpr.invars) != len(inputs) or len(jaxpr.constvars) != len(consts):
        return None
    return [value.origin for value in _evaluate(jaxpr, [_Value(const) for const in consts], inputs, within, clock)]


def _scan(params: dict[str, Any], inputs: list[_Value], around: _Around, clock: Iterator[int]) -> list[Origin | None]:
    """Origins of a scan's results: those of the first repetition that gives any."""
    body, carries = params["jaxpr"], params["num_carry"]
    shared, scanned = inputs[: params["num_consts"]], inputs[params["num_consts"] + carries :]
    carry = inputs[params["num_consts"] : params["num_consts"] + carries]
    consts = [_Value(const) for const in body.consts]
    length = params["length"]
    found: list[Origin | None] = [None] * (len(body.jaxpr.outvars))
    for number in reversed(range(length)) if params["reverse"] else range(length):
        rows = [_slice(value, number) for value in scanned]
        within = dataclasses.replace(around, repeats=(*around.repeats, number))
        results = _evaluate(body.jaxpr, consts, [*shared, *carry, *rows], within, clock)
        carry = results[:carries]
        for place, result in enumerate(results):
            # A carry counts as it is at the end, a stacked result if any of its rows does.
            found[place] = result.origin if place < carries else found[place] or result.origin
    return found


def _slice(value: _Value, number: int) -> _Value:
    array = value.array[number]
    return _Value(array, value.origin if _broken(array) is not None else None)


def _broken(array: Any) -> str | None:
    """What of an array is not finite, NaN before infinities; None if all of it is."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.inexact):  # keys have a type, too
        return None
    array = np.asarray(array)  # by NumPy: every shape would be one more program to compile
    if np.isfinite(array).all():
        return None
    if np.isnan(array).any():
        return "nan"
    return "inf" if (array > 0).all(where=~np.isfinite(array)) else "-inf"


def module_of(stack: str) -> str:
    """The module's path in a name stack such as ``transpose(jvp(BertForPretraining))/encoder/transformer``."""
    names = [re.sub(r"^(\w+\()+|\)+$", "", part) for part in stack.split("/")]
    # A method that is not __call__ stands as "module.method" behind its module.
    return "/".join(name for name in names if name and "." not in name and "->" not in name)


def _place(equation: JaxprEqn) -> str:
    """``file.py:12 (function)`` of the innermost frame that is no library's."""
    said = source_info_util.summarize(equation.source_info, num_frames=64).splitlines()
    frames = [line for line in said if not LIBRARIES.search(line)] or said
    if not frames:
        return ""
    file, line, function = re.fullmatch(r"(.*?):(\d+)(?::\d+)? \((.*)\)", frames[-1]).groups()
    return f"{display(file)}:{line} ({function.replace('.<locals>', '')})"
