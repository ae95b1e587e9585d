"""Random nets for property tests: all layers and combinators of the library, composed by chance.

Every net drawn here is legal and generic, so that the laws need no excuse. Biases are random and
norms have a large eps, because layers as they are initialized make exact zeros (of what was hidden
or dropped), and those lie on the kink of a rectifier, where no derivative exists, or let a norm
divide by nearly nothing, where finite differences are coarse. Rectifiers that may be dead stay out
of nets with side inputs, and so does the binary step: they could hide the effect.
"""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hypothesis import strategies as st

import diffprog as dp
from support.random_combinators import COMBINATORS, SPECIAL, hyper_in_mixed, with_kernel
from support.random_pieces import LEAVES, SPATIAL, WIDE, generic

BATCH, TIME = 6, 5  # so many examples that two keys hardly ever drop the same ones
KINDS = ("vector", "sequence", "stream", "image", "labels", "pair")


class Net(NamedTuple):
    """A net, the input and side inputs it is drawn for, options of `check`, and what is in it."""

    layer: Any
    x: Any
    side: dict[str, Any]
    options: dict[str, Any]
    depth: int
    parts: collections.Counter


@st.composite
def nets(draw, kind, depth=None):
    """A net of a given depth, or of one from 1 to 5, for inputs of a kind in `KINDS`."""
    d = Drawing(draw)
    depth = depth or d.pick([1, 2, 3, 4, 5])
    d.causal, d.mixing, steps = kind == "stream", d.pick([0, 0, 0, 1]), d.pick([0, 0, 0, 0, 0, 1])
    entries = (BATCH, TIME) if kind in ("sequence", "stream") else (BATCH,)
    if not steps and kind != "labels" and d.pick([True, False]):
        d.mask = entries
    d.scaling = not steps and d.pick([True, False])
    d.plain = not (d.mask or d.scaling)
    d.steps = bool(steps)
    width = d.pick([2, 3, 4])
    if kind == "labels":
        shape = (BATCH, *d.pick([(), (4,)]))
        x = jnp.arange(math.prod(shape)).reshape(shape) % width
        hot = d.pick([lambda: d.make(dp.one_hot, width), lambda: d.make(dp.embedding, width, 3)])()
        layer = dp.serial(hot, d.net(d.after(hot, x), depth))
    elif kind == "pair":
        x = floats(BATCH, width), floats(BATCH, d.pick([2, 3]))
        layer = d.joined(*x, depth)
    else:
        sides = (d.pick([3, 4, 5]), d.pick([3, 4])) if kind == "image" else ()
        x = floats(*(*entries, *sides, width))
        layer = dp.serial(d.net(x, depth))
    side = {"mask": d.mask and jnp.arange(math.prod(d.mask)).reshape(d.mask) % 3 != 1,
            "scale": jnp.linspace(1.0, 2.0, BATCH)}
    side = {name: value for name, value in side.items() if name in layer.side and name in d.given}
    options = {"causal": d.causal, "smooth": not d.parts["binary_step"]}
    if d.parts["mixed"] or kind == "labels":  # after ints everything is float32
        options["precision"] = "float32"
    return Net(layer, x, side, options, depth, d.parts)


@st.composite
def nested(draw, way):
    """A net in which combinators are put into each other in this `way` of `NESTED`."""
    d = Drawing(draw)
    x = floats(BATCH, d.pick([2, 3]))
    f = with_kernel(d, x)
    if way is hyper_in_mixed and d.plan(f, x).state:
        f = d.make(dp.linear, x.shape[-1])  # a target has none
    options = {"precision": "float32" if d.parts["mixed"] or way is hyper_in_mixed else "float64"}
    return Net(dp.serial(way(d, f, x)), x, {}, options, 3, d.parts)


class Drawing:
    """One net being drawn: whom to ask, what it may contain, and what it contains already."""

    causal = False  # time is axis 1, and nothing may look ahead
    mixing = False  # `mixed` may be drawn, and nothing compared to more than float32
    steps = False  # the binary step may be drawn, and no gradients compared
    scaling = False  # programs may take the side input `scale`
    plain = True  # no side inputs are given
    mask = None  # its shape

    def __init__(self, draw):
        self.draw, self.parts = draw, collections.Counter()

    @property
    def given(self):
        """The side inputs, in shapes."""
        mask = {"mask": jax.ShapeDtypeStruct(self.mask, bool)} if self.mask else {}
        return mask | ({"scale": floats(BATCH)} if self.scaling else {})

    def pick(self, options):
        """One of them. It asks for bits, because integers favour the numbers in our source files,
        and any edit there would draw other nets.
        """
        bits = [self.draw(st.booleans()) for _ in range(8)]
        return options[sum(bit << i for i, bit in enumerate(bits)) % len(options)]

    def make(self, maker, *args, **kwargs):
        self.parts[maker.__name__] += 1
        return maker(*args, **kwargs)

    def function(self, f):
        self.parts[f.__name__] += 1
        return f

    def program(self, function, **children):
        self.parts["program"] += 1
        self.parts[function.__name__] += 1
        return dp.program(**children)(function)

    def plan(self, layer, x):
        layer = dp.serial(layer)
        return layer.plan(x, **{n: v for n, v in self.given.items() if n in layer.side})

    def after(self, layer, x):
        return self.plan(layer, x).y

    def real_only(self, x):
        """Does the mask speak of x? Then what stands in the padding may still be anything."""
        n = len(self.mask or ())
        return 0 < n < x.ndim and x.shape[:n] == self.mask

    def masks_steps(self, x):
        """Does the mask say of each step of a sequence whether it is real?"""
        return self.real_only(x) and len(self.mask) == x.ndim - 1

    def takes_mask(self, x):
        return not self.mask or self.real_only(x)

    def clean(self, x):
        """What comes before a layer that mixes positions and takes no mask."""
        return [self.make(dp.hide)] if self.real_only(x) and len(self.mask) > 1 else []

    def leaf(self, x):
        make = self.pick(WIDE) if x.shape[-1] > 8 else self.either(SPATIAL, LEAVES, x)
        return make(self, x)

    def net(self, x, depth):
        if depth <= 1:
            return self.leaf(x)
        return self.either(COMBINATORS, SPECIAL, x)(self, x, depth - 1)

    def either(self, usual, rare, x):
        """What fits x: twice as often out of the usual ones, where there are any."""
        usual, rare = ([f for f, fits in some.items() if fits(self, x)] for some in (usual, rare))
        return self.pick(self.pick([some for some in (usual, usual, rare) if some]))

    def fit(self, have, want):
        """Layers that bring one shape to the other."""
        linear = lambda n: self.make(dp.linear, n, bias_init=generic)  # noqa: E731
        if have.shape[:-1] == want.shape[:-1]:
            return [linear(want.shape[-1])]
        return [*self.clean(have), self.make(dp.flatten), linear(math.prod(want.shape[1:])),
                self.make(dp.reshape, want.shape[1:])]

    def to(self, layer, x, want):
        """The layer, with layers after it that give x the wanted shape."""
        have = self.after(layer, x)
        same = (have.shape, have.dtype) == (want.shape, want.dtype)
        return layer if same else self.make(dp.serial, layer, *self.fit(have, want))

    def kept(self, x, depth):
        """A net that keeps the shape of x."""
        return self.to(self.net(x, depth), x, x)

    def joined(self, a, b, depth):
        """A layer for the pair (a, b) that gives one array."""
        f = self.net(a, depth)
        y = self.after(f, a)
        g = self.to(self.leaf(b), b, y)
        return dp.serial(self.make(dp.parallel, f, g), self.merge(bilinear=True))

    def merge(self, bilinear=False):
        """A function of a tuple of arrays of one shape."""
        if bilinear and self.pick([False, False, True]):
            return self.make(dp.bilinear, 3, bias_init=generic)
        return self.function(self.pick([dp.add, dp.concatenate]))


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)
