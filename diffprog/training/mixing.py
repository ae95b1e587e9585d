"""Whether a net mixes its examples, read off its jaxpr; nothing is run.

For each array in the jaxpr, the reader tracks the axis along which the examples lie, starting from
the inputs. An operation that combines positions along that axis mixes examples: a sum, a product, a
window, a loop with a carry. An operation without a rule gives UNKNOWN, which never raises. Ints and
booleans are never MIXED, since counts and conditions may depend on the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from diffprog.core.dtypes import is_inexact
from diffprog.core.jaxprs import scan_sizes

Tags = list[Any]


class Along(NamedTuple):
    """Examples lie along an axis, each at `inner` consecutive positions.

    With `inner` 0 each position belongs to one example, in an unknown order.
    """

    axis: int
    inner: int


FREE = "free"  # depends on no example
ONE = "one"  # inside a loop over examples: depends on the current one
MIXED = "mixed"  # depends on several examples
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
    """For each leaf of ``run(*given)``, whether it certainly mixes examples.

    Args:
        run: a pure function.
        count: number of examples, at least 2.
        axes: a tree like `given`: the batch axis of each leaf, or -1.
        given: arrays, of which only shapes and dtypes matter.
    """
    program, y = jax.make_jaxpr(run, return_shape=True)(*given)
    tags = [_input_tag(leaf.shape, axis, count) for axis, leaf in zip(
        jax.tree.leaves(axes), jax.tree.leaves(given), strict=True)]
    found = _Reader(count).read(program, tags)
    return jax.tree.unflatten(jax.tree.structure(y), [tag == MIXED for tag in found])


def _input_tag(shape: tuple[int, ...], axis: int, count: int) -> Any:
    if axis < 0:
        return FREE
    return UNKNOWN if shape[axis] % count else Along(axis, shape[axis] // count)


class _Reader:
    """Propagates the tags of arrays through a jaxpr with `count` examples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def read(self, program: Any, given: Tags) -> Tags:
        """The tags of the outputs of a jaxpr."""
        program = getattr(program, "jaxpr", program)
        known = dict(zip(program.invars, given, strict=True))

        def tag(var: Any) -> Any:
            return FREE if hasattr(var, "val") else known.get(var, FREE)

        for equation in program.eqns:
            before = [tag(var) for var in equation.invars]
            after = self.step(equation, before)
            for var, found in zip(equation.outvars, after, strict=True):
                known[var] = UNKNOWN if found == MIXED and not is_inexact(var.aval) else found
        return [tag(var) for var in program.outvars]

    def step(self, equation: Any, given: Tags) -> Tags:
        """The tags of the outputs of an equation."""
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
        along = [tag for tag in given if isinstance(tag, Along)]
        if MIXED in given:
            return [MIXED] * made
        if UNKNOWN in given and not (name == "concatenate" and along):
            return [UNKNOWN] * made
        if not along:
            return [ONE] * made
        if ONE in given:
            return [UNKNOWN] * made
        if name in _ELEMENTWISE:
            return [_elementwise(along)] * made
        rule = getattr(self, f"of_{_family(name)}", None)
        return [UNKNOWN if rule is None else rule(equation, given)] * made

    # Control flow.

    def in_cond(self, params: dict[str, Any], given: Tags) -> Tags:
        """Branches, of which one runs; an output that any branch mixes is mixed."""
        found = [self.read(branch, given[1:]) for branch in params["branches"]]
        if given[0] != FREE:
            return [UNKNOWN] * len(found[0])
        return [_one_of([tag for tag in tags if tag != UNKNOWN] or [UNKNOWN])
                for tags in zip(*found, strict=True)]

    def in_while(self, params: dict[str, Any], given: Tags) -> Tags:
        """A loop; the number of its iterations may depend on anything and mixes nothing."""
        skipped, consts = params["cond_nconsts"], params["body_nconsts"]
        closed, carry = given[skipped : skipped + consts], given[skipped + consts :]
        return self.carried(lambda carry: self.read(params["body_jaxpr"], closed + carry), carry)

    def in_scan(self, params: dict[str, Any], given: Tags) -> Tags:
        """A loop along first axes; if that is the batch axis, the carry is mixed."""
        (consts, carries), program = scan_sizes(params), params["jaxpr"]
        closed, carry = given[:consts], given[consts : consts + carries]
        rows = [_row(tag) for tag in given[consts + carries :]]
        over_examples = rows != given[consts + carries :] and ONE in rows
        carried = MIXED if over_examples else ONE
        carry = self.carried(
            lambda carry: self.read(program, closed + carry + rows)[:carries], carry, carried)
        made = self.read(program, closed + carry + rows)[carries:]
        return carry + [_stacked(tag) if over_examples or tag != ONE else tag for tag in made]

    def carried(self, body: Callable[[Tags], Tags], carry: Tags, one_becomes: str = ONE) -> Tags:
        """The tags of a carry at the fixed point of the loop body."""
        while True:
            after = [one_becomes if tag == ONE else tag for tag in body(carry)]
            new = [_one_of([old, tag]) for old, tag in zip(carry, after, strict=True)]
            if new == carry:
                return carry
            carry = new

    # Single operations; each tag is an `Along` or FREE.

    def of_reshape(self, equation: Any, given: Tags) -> Any:
        """Row-major order, and so the distance between the starts of two examples, is kept."""
        tag, old, new = given[0], _shape(equation.invars[0]), _shape(equation.outvars[0])
        order = equation.params["dimensions"] if equation.primitive.name == "reshape" else None
        if order is not None:  # a transpose before the reshape
            tag, old = tag._replace(axis=order.index(tag.axis)), [old[axis] for axis in order]
        old_stride = math.prod(old[tag.axis + 1 :])
        if not tag.inner:
            for axis, length in enumerate(new):
                if length == old[tag.axis] and math.prod(new[axis + 1 :]) == old_stride:
                    return Along(axis, 0)
            return UNKNOWN
        distance = tag.inner * old_stride
        for axis, length in enumerate(new):
            stride = math.prod(new[axis + 1 :])
            if stride <= distance < stride * length and not distance % stride:
                inner = distance // stride
                return UNKNOWN if length % (inner * self.count) else Along(axis, inner)
        return UNKNOWN

    of_squeeze = of_reshape

    def of_broadcast_in_dim(self, equation: Any, given: Tags) -> Any:
        axis = equation.params["broadcast_dimensions"][given[0].axis]
        return given[0]._replace(axis=axis)

    def of_transpose(self, equation: Any, given: Tags) -> Any:
        return given[0]._replace(axis=equation.params["permutation"].index(given[0].axis))

    def of_reduction(self, equation: Any, given: Tags) -> Any:
        """A maximum over all entries is UNKNOWN: it is often subtracted for numerical stability."""
        axes, tag = equation.params["axes"], _elementwise([t for t in given if t != FREE])
        if not isinstance(tag, Along):
            return tag
        if tag.axis in axes:
            extreme = equation.primitive.name in ("reduce_max", "reduce_min")
            return UNKNOWN if extreme and not _shape(equation.outvars[0]) else MIXED
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
        return MIXED if MIXED in found else _elementwise(found)

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
        return _windowed(kept, size, *(params[name][at - 2] for name in (
            "window_strides", "padding", "lhs_dilation")))

    def of_window(self, equation: Any, given: Tags) -> Any:
        tag = _elementwise([t for t in given if t != FREE])
        if not isinstance(tag, Along):
            return tag
        return _windowed(tag, *(equation.params[name][tag.axis] for name in (
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
            return UNKNOWN  # one index depends on several examples
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
        return _elementwise(found)

    def of_dynamic_slice(self, equation: Any, given: Tags) -> Any:
        return self.part(equation, given, equation.params["slice_sizes"])

    def of_dynamic_update_slice(self, equation: Any, given: Tags) -> Any:
        whole = {tag for tag in given[:2] if tag != FREE}
        if len(whole) != 1:
            return UNKNOWN
        return self.part(equation, [*whole, *given[2:]], _shape(equation.invars[1]))

    def part(self, equation: Any, given: Tags, sizes: Sequence[int]) -> Any:
        """A slice at a position common to all examples; it must contain the whole batch axis."""
        tag = given[0]
        if tag == FREE or any(at != FREE for at in given[1:]):
            return UNKNOWN
        return tag if sizes[tag.axis] == _shape(equation.invars[0])[tag.axis] else UNKNOWN

    def of_concatenate(self, equation: Any, given: Tags) -> Any:
        dimension, tags = equation.params["dimension"], [tag for tag in given if tag != FREE]
        if UNKNOWN in tags:
            for tag in tags:
                if isinstance(tag, Along) and tag.axis == dimension:
                    return _shuffled(tag)
        if any(tag != tags[0] for tag in tags):
            return UNKNOWN
        if tags[0].axis != dimension or (tags[0].inner and FREE not in given):
            return tags[0]
        return _shuffled(tags[0])

    def of_stack(self, equation: Any, given: Tags) -> Any:
        tag = _elementwise([t for t in given if t != FREE])
        if not isinstance(tag, Along):
            return UNKNOWN
        return tag._replace(axis=tag.axis + (equation.params["axis"] <= tag.axis))

    def of_tile(self, equation: Any, given: Tags) -> Any:
        del equation  # copies of whole axes: the examples repeat in the same order
        return given[0]

    def of_pad(self, equation: Any, given: Tags) -> Any:
        tag, value = given
        if tag == FREE or value != FREE:
            return UNKNOWN
        low, high, between = equation.params["padding_config"][tag.axis]
        if low == high == between == 0:
            return tag
        return _shuffled(tag) if min(low, high) >= 0 else UNKNOWN

    def of_slice(self, equation: Any, given: Tags) -> Any:
        tag, params = given[0], equation.params
        first, last = params["start_indices"][tag.axis], params["limit_indices"][tag.axis]
        stride = 1 if params["strides"] is None else params["strides"][tag.axis]
        if stride == 1 and last - first == _shape(equation.invars[0])[tag.axis]:
            return tag
        return _shuffled(tag) if stride == 1 and last - first > 1 and tag.inner else UNKNOWN

    def of_rev(self, equation: Any, given: Tags) -> Any:
        return _shuffled(given[0]) if given[0].axis in equation.params["dimensions"] else given[0]

    def of_split(self, equation: Any, given: Tags) -> Any:
        return UNKNOWN if given[0].axis == equation.params["axis"] else given[0]

    def of_sort(self, equation: Any, given: Tags) -> Any:
        tag = _elementwise([t for t in given if t != FREE])
        kept = isinstance(tag, Along) and tag.axis != equation.params["dimension"]
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


def _elementwise(tags: Tags) -> Any:
    """The tag of an elementwise operation; arrays with different tags mix pairs of examples."""
    if len(tags) == 1 or all(tag == tags[0] and tag.inner for tag in tags):
        return tags[0]
    return MIXED if all(tag.inner for tag in tags) else UNKNOWN


def _one_of(tags: Tags) -> Any:
    """The tag of an array that has one of these tags."""
    tags = [tag for tag in tags if tag != FREE] or [FREE]
    if MIXED in tags:
        return MIXED
    return tags[0] if all(tag == tags[0] for tag in tags) else UNKNOWN


def _shuffled(tag: Along) -> Any:
    """The tag after positions of the batch axis were removed, added or reordered."""
    return UNKNOWN if tag.inner > 1 else Along(tag.axis, 0)


def _windowed(tag: Along, size: int, stride: int, padding: Any, dilation: int) -> Any:
    """The tag after a window slid along the batch axis."""
    if size > 1:
        return MIXED if tag.inner < 2 else UNKNOWN
    return tag if (stride, tuple(padding), dilation) == (1, (0, 0), 1) else UNKNOWN


def _row(tag: Any) -> Any:
    """The tag of one row in a loop along the first axis."""
    if not isinstance(tag, Along):
        return tag
    if tag.axis:
        return tag._replace(axis=tag.axis - 1)
    return ONE if tag.inner < 2 else UNKNOWN


def _stacked(tag: Any) -> Any:
    """The tag of rows stacked along a new first axis."""
    if tag == ONE:
        return Along(0, 1)
    return tag._replace(axis=tag.axis + 1) if isinstance(tag, Along) else tag
