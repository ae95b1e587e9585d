"""Does a net mix its examples? It is read off its program, of which nothing is run.

Of each array in the program is known along which axis the examples lie, from the input on, and what
joins places along that axis mixes examples: a sum over it, a product, a window, a loop that carries
something on. What is not understood is unknown, and unknown is never refused. Of ints and booleans
nothing is claimed, since counts and conditions may well be of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.jaxprs import scan_sizes

Tags = list[Any]


class Lie(NamedTuple):
    """Examples lie along an axis; so many neighbours there are of one example.

    0 neighbours: the examples at the places of the axis are several, in an order that is not known.
    """

    axis: int
    inner: int


FREE = "free"  # of no example
ONE = "one"  # inside a loop over examples: of the one whose turn it is
MIXED = "mixed"  # of several examples
UNKNOWN = "unknown"

_ELEMENTWISE = frozenset("""
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
    is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or polygamma
    population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeta
""".split())
_REDUCTIONS = frozenset({"argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
                         "reduce_prod", "reduce_sum", "reduce_xor"})
_CUMULATIVE = frozenset({"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"})
_WINDOWS = frozenset({"reduce_window", "reduce_window_max", "reduce_window_min",
                      "reduce_window_sum"})


def mixes(run: Callable[..., Any], count: int, axes: Any, *given: Any) -> Any:
    """Of each leaf of ``run(*given)``: is it of several examples, for sure?

    Args:
        run: a pure function.
        count: how many examples there are, at least 2.
        axes: like `given`, the axis of examples of each leaf, or -1.
        given: arrays, of which shapes and dtypes are read.
    """
    program, y = jax.make_jaxpr(run, return_shape=True)(*given)
    tags = [FREE if axis < 0 else _begun(leaf.shape[axis], axis, count) for axis, leaf in zip(
        jax.tree.leaves(axes), jax.tree.leaves(given), strict=True)]
    found = _Reader(count).read(program, tags)
    return jax.tree.unflatten(jax.tree.structure(y), [tag == MIXED for tag in found])


def _begun(length: int, axis: int, count: int) -> Any:
    return UNKNOWN if length % count else Lie(axis, length // count)


class _Reader:
    """Follows the tags of arrays through a program of `count` examples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def read(self, program: Any, given: Tags) -> Tags:
        """The tags of the outputs of a program."""
        program = getattr(program, "jaxpr", program)
        known = dict(zip(program.invars, given, strict=True))

        def tag(var: Any) -> Any:
            return FREE if hasattr(var, "val") else known.get(var, FREE)

        for equation in program.eqns:
            before = [tag(var) for var in equation.invars]
            after = self.step(equation, before)
            for var, found in zip(equation.outvars, after, strict=True):
                floating = jnp.issubdtype(getattr(var.aval, "dtype", bool), jnp.inexact)
                known[var] = UNKNOWN if found == MIXED and not floating else found
        return [tag(var) for var in program.outvars]

    def step(self, equation: Any, given: Tags) -> Tags:
        """The tags that an equation gives."""
        name, made = equation.primitive.name, len(equation.outvars)
        if all(tag == FREE for tag in given):
            return [FREE] * made
        if name in ("scan", "while", "cond"):
            return getattr(self, f"in_{name}")(equation.params, given)
        if name == "optimization_barrier":
            return given
        for inner in ("jaxpr", "call_jaxpr"):
            program = equation.params.get(inner)
            program = getattr(program, "jaxpr", program)
            if program is not None and len(getattr(program, "invars", ())) == len(given):
                return self.read(program, given)
        lying = [tag for tag in given if isinstance(tag, Lie)]
        if MIXED in given:
            return [MIXED] * made
        if UNKNOWN in given and not (name == "concatenate" and lying):
            return [UNKNOWN] * made
        if not lying:
            return [ONE] * made
        if ONE in given:
            return [UNKNOWN] * made
        if name in _ELEMENTWISE:
            return [_together(lying)] * made
        rule = getattr(self, f"of_{_family(name)}", None)
        return [UNKNOWN if rule is None else rule(equation, given)] * made

    # Programs inside a program.

    def in_cond(self, params: dict[str, Any], given: Tags) -> Tags:
        """Branches, of which each platform or value takes one; what one mixes is mixed."""
        found = [self.read(branch, given[1:]) for branch in params["branches"]]
        if given[0] != FREE:
            return [UNKNOWN] * len(found[0])
        return [_either([tag for tag in tags if tag != UNKNOWN] or [UNKNOWN])
                for tags in zip(*found, strict=True)]

    def in_while(self, params: dict[str, Any], given: Tags) -> Tags:
        """A loop whose length may depend on anything: what is done in it is not more mixed."""
        skipped, consts = params["cond_nconsts"], params["body_nconsts"]
        closed, carry = given[skipped : skipped + consts], given[skipped + consts :]
        return self.carried(lambda carry: self.read(params["body_jaxpr"], closed + carry), carry)

    def in_scan(self, params: dict[str, Any], given: Tags) -> Tags:
        """A loop along first axes; along that of examples, what is carried on is mixed."""
        (consts, carries), program = scan_sizes(params), params["jaxpr"]
        closed, carry = given[:consts], given[consts : consts + carries]
        turns = [_turn(tag) for tag in given[consts + carries :]]
        passed = MIXED if turns != given[consts + carries :] and ONE in turns else ONE
        carry = self.carried(
            lambda carry: self.read(program, closed + carry + turns)[:carries], carry, passed)
        made = self.read(program, closed + carry + turns)[carries:]
        return carry + [_stacked(tag) if passed == MIXED or tag != ONE else tag for tag in made]

    def carried(self, body: Callable[[Tags], Tags], carry: Tags, passed: str = ONE) -> Tags:
        """The tags of what goes round a loop until they stay; `passed` is what ONE becomes."""
        while True:
            after = [passed if tag == ONE else tag for tag in body(carry)]
            new = [_either([old, tag]) for old, tag in zip(carry, after, strict=True)]
            if new == carry:
                return carry
            carry = new

    # Single operations, of arrays along which examples lie, and of free ones.

    def of_reshape(self, equation: Any, given: Tags) -> Any:
        """Row-major order stays: so does how far apart one example begins after another."""
        tag, old, new = given[0], _shape(equation.invars[0]), _shape(equation.outvars[0])
        order = equation.params["dimensions"] if equation.primitive.name == "reshape" else None
        if order is not None:  # it transposes first
            tag, old = tag._replace(axis=order.index(tag.axis)), [old[axis] for axis in order]
        behind = math.prod(old[tag.axis + 1 :])
        if not tag.inner:
            return next((Lie(axis, 0) for axis in range(len(new)) if new[axis] == old[tag.axis]
                         and math.prod(new[axis + 1 :]) == behind), UNKNOWN)
        apart = tag.inner * behind
        for axis, length in enumerate(new):
            rest = math.prod(new[axis + 1 :])
            if rest <= apart < rest * length and not apart % rest:
                inner = apart // rest
                return UNKNOWN if length % (inner * self.count) else Lie(axis, inner)
        return UNKNOWN

    of_squeeze = of_reshape

    def of_broadcast_in_dim(self, equation: Any, given: Tags) -> Any:
        axis = equation.params["broadcast_dimensions"][given[0].axis]
        return given[0]._replace(axis=axis)

    def of_transpose(self, equation: Any, given: Tags) -> Any:
        return given[0]._replace(axis=equation.params["permutation"].index(given[0].axis))

    def of_reduction(self, equation: Any, given: Tags) -> Any:
        """A largest of all entries is often subtracted, and changes nothing: it is not judged."""
        axes, tag = equation.params["axes"], _together([t for t in given if t != FREE])
        if not isinstance(tag, Lie):
            return tag
        if tag.axis in axes:
            scale = equation.primitive.name in ("reduce_max", "reduce_min")
            return UNKNOWN if scale and not _shape(equation.outvars[0]) else MIXED
        return tag._replace(axis=tag.axis - sum(axis < tag.axis for axis in axes))

    def of_cumulation(self, equation: Any, given: Tags) -> Any:
        return MIXED if equation.params["axis"] == given[0].axis else given[0]

    def of_dot_general(self, equation: Any, given: Tags) -> Any:
        contracted, batched = equation.params["dimension_numbers"]
        found, first = [], len(batched[0])
        for tag, var, sums, batch in zip(given, equation.invars, contracted, batched, strict=True):
            free = [i for i in range(len(_shape(var))) if i not in (*sums, *batch)]
            if tag == FREE:
                pass
            elif tag.axis in sums:
                found.append(MIXED)
            elif tag.axis in batch:
                found.append(tag._replace(axis=list(batch).index(tag.axis)))
            else:
                found.append(tag._replace(axis=first + free.index(tag.axis)))
            first += len(free)
        return MIXED if MIXED in found else _together(found)

    def of_conv_general_dilated(self, equation: Any, given: Tags) -> Any:
        params, (tag, kernel) = equation.params, given
        if kernel != FREE or params["batch_group_count"] != 1:
            return UNKNOWN
        numbers = params["dimension_numbers"]
        at = numbers.lhs_spec.index(tag.axis)
        kept = tag._replace(axis=numbers.out_spec[at])
        if at == 0:
            return kept
        if at == 1:
            return MIXED if params["feature_group_count"] == 1 else UNKNOWN
        size = _shape(equation.invars[1])[numbers.rhs_spec[at]]
        return _slid(kept, size, *(params[name][at - 2] for name in (
            "window_strides", "padding", "lhs_dilation")))

    def of_window(self, equation: Any, given: Tags) -> Any:
        tag = _together([t for t in given if t != FREE])
        if not isinstance(tag, Lie):
            return tag
        return _slid(tag, *(equation.params[name][tag.axis] for name in (
            "window_dimensions", "window_strides", "padding", "base_dilation")))

    def of_gather(self, equation: Any, given: Tags) -> Any:
        numbers, (table, ids) = equation.params["dimension_numbers"], given
        shape = _shape(equation.invars[0])
        looped = [i for i in range(len(_shape(equation.outvars[0])))
                  if i not in numbers.offset_dims]
        sliced = [i for i in range(len(shape))
                  if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
        found = []
        if ids != FREE and ids.axis == len(looped):
            return UNKNOWN  # an index made of several examples
        if ids != FREE:
            found.append(ids._replace(axis=looped[ids.axis]))
        if table != FREE and table.axis in numbers.operand_batching_dims:
            own = list(numbers.operand_batching_dims).index(table.axis)
            found.append(table._replace(axis=looped[numbers.start_indices_batching_dims[own]]))
        elif table != FREE:
            if (table.axis not in sliced
                    or equation.params["slice_sizes"][table.axis] != shape[table.axis]):
                return UNKNOWN
            found.append(table._replace(axis=numbers.offset_dims[sliced.index(table.axis)]))
        return _together(found)

    def of_dynamic_slice(self, equation: Any, given: Tags) -> Any:
        return self.part(equation, given, equation.params["slice_sizes"])

    def of_dynamic_update_slice(self, equation: Any, given: Tags) -> Any:
        whole = {tag for tag in given[:2] if tag != FREE}
        if len(whole) != 1:
            return UNKNOWN
        return self.part(equation, [*whole, *given[2:]], _shape(equation.invars[1]))

    def part(self, equation: Any, given: Tags, sizes: Sequence[int]) -> Any:
        """A part at a place that is the same for all: the examples must be in it as a whole."""
        tag = given[0]
        if tag == FREE or any(at != FREE for at in given[1:]):
            return UNKNOWN
        return tag if sizes[tag.axis] == _shape(equation.invars[0])[tag.axis] else UNKNOWN

    def of_concatenate(self, equation: Any, given: Tags) -> Any:
        along, lying = equation.params["dimension"], [tag for tag in given if tag != FREE]
        for tag in lying if UNKNOWN in lying else ():
            if isinstance(tag, Lie) and tag.axis == along:
                return _several(tag)  # whatever stands beside all of them
        if any(tag != lying[0] for tag in lying):
            return UNKNOWN
        if lying[0].axis != along or (lying[0].inner and FREE not in given):
            return lying[0]
        return _several(lying[0])

    def of_stack(self, equation: Any, given: Tags) -> Any:
        tag = _together([t for t in given if t != FREE])
        if not isinstance(tag, Lie):
            return UNKNOWN
        return tag._replace(axis=tag.axis + (equation.params["axis"] <= tag.axis))

    def of_tile(self, equation: Any, given: Tags) -> Any:
        del equation  # whole axes one after the other: their examples come round again
        return given[0]

    def of_pad(self, equation: Any, given: Tags) -> Any:
        tag, value = given
        if tag == FREE or value != FREE:
            return UNKNOWN
        low, high, between = equation.params["padding_config"][tag.axis]
        if low == high == between == 0:
            return tag
        return _several(tag) if min(low, high) >= 0 else UNKNOWN

    def of_slice(self, equation: Any, given: Tags) -> Any:
        tag, params = given[0], equation.params
        first, last = params["start_indices"][tag.axis], params["limit_indices"][tag.axis]
        stride = 1 if params["strides"] is None else params["strides"][tag.axis]
        if stride == 1 and last - first == _shape(equation.invars[0])[tag.axis]:
            return tag
        return _several(tag) if stride == 1 and last - first > 1 and tag.inner else UNKNOWN

    def of_rev(self, equation: Any, given: Tags) -> Any:
        return _several(given[0]) if given[0].axis in equation.params["dimensions"] else given[0]

    def of_split(self, equation: Any, given: Tags) -> Any:
        return UNKNOWN if given[0].axis == equation.params["axis"] else given[0]

    def of_sort(self, equation: Any, given: Tags) -> Any:
        tag = _together([t for t in given if t != FREE])
        kept = isinstance(tag, Lie) and tag.axis != equation.params["dimension"]
        return tag if kept else UNKNOWN

    def of_top_k(self, equation: Any, given: Tags) -> Any:
        return UNKNOWN if given[0].axis == equation.params["axis"] else given[0]

    def of_fft(self, equation: Any, given: Tags) -> Any:
        first = len(_shape(equation.invars[0])) - len(equation.params["fft_lengths"])
        return MIXED if given[0].axis >= first else given[0]


def _family(name: str) -> str:
    if name in _WINDOWS:
        return "window"
    if name in _CUMULATIVE:
        return "cumulation"
    return "reduction" if name in _REDUCTIONS else name


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _together(tags: Tags) -> Any:
    """What entry by entry is made of arrays along which examples lie: pairs of them, if unlike."""
    if all(tag == tags[0] and tag.inner for tag in tags):
        return tags[0]
    if len(tags) == 1:
        return tags[0]
    return MIXED if all(tag.inner for tag in tags) else UNKNOWN


def _either(tags: Tags) -> Any:
    """What is one of these, and which is not known."""
    tags = [tag for tag in tags if tag != FREE] or [FREE]
    if MIXED in tags:
        return MIXED
    return tags[0] if all(tag == tags[0] for tag in tags) else UNKNOWN


def _several(tag: Lie) -> Any:
    """What is left of the order where not all places of the axis are there, or more of them."""
    return UNKNOWN if tag.inner > 1 else Lie(tag.axis, 0)


def _slid(tag: Lie, size: int, stride: int, padding: Any, dilation: int) -> Any:
    """What a window makes that slides along the axis of examples."""
    if size > 1:
        return MIXED if tag.inner < 2 else UNKNOWN
    return tag if (stride, tuple(padding), dilation) == (1, (0, 0), 1) else UNKNOWN


def _turn(tag: Any) -> Any:
    """What a loop along the first axis sees at a time."""
    if not isinstance(tag, Lie):
        return tag
    if tag.axis:
        return tag._replace(axis=tag.axis - 1)
    return ONE if tag.inner < 2 else UNKNOWN


def _stacked(tag: Any) -> Any:
    """What a loop along a new first axis collects."""
    if tag == ONE:
        return Lie(0, 1)
    return tag._replace(axis=tag.axis + 1) if isinstance(tag, Lie) else tag
