"""How random nets are composed: how `random_nets.py` draws each combinator.

Each takes the drawing d, the shape of its input x, and the depth that is left.
"""

import jax
import jax.numpy as jnp

import diffprog as dp
from support.random_pieces import (
    anywhere,
    both,
    doubled,
    dropout,
    generic,
    halved,
    last_copy,
    mean_of_all,
    over_space,
    resampled,
    scaled,
    settling,
    tied,
    told,
    told_alike,
    trained,
    twice,
)

# Combinators: each draws one child of the depth that is left, and the others as leaves.


def _serial(d, x, depth):
    if d.pick([True, False]):
        first = d.leaf(x)
        second = d.net(d.after(first, x), depth)
    else:
        first = d.net(x, depth)
        second = d.leaf(d.after(first, x))
    how = d.pick(["unnamed", "named", ">>"])
    d.parts[f"serial, {how}"] += 1
    d.parts["serial"] += 1
    if how == ">>":
        return dp.serial(first) >> second >> jnp.tanh
    return dp.serial(first, second) if how == "unnamed" else dp.serial(first, then=second)


def _power(d, x, depth):
    d.parts["**"] += 1
    return dp.serial(d.kept(x, depth)) ** 2


def _residual(d, x, depth):
    if d.pick([True, False]):
        return d.make(dp.residual, d.kept(x, depth))
    body = d.net(x, depth)
    d.parts["residual with a shortcut"] += 1
    return d.make(dp.residual, body, d.to(d.leaf(x), x, d.after(body, x)))


def _normed(d, x, depth):
    generous = dp.layer_norm(eps=0.1, bias_init=generic)
    norm = d.pick([None, generous])
    if x.shape[-1] < 3:
        norm = generous  # two features may be as good as equal, and the default eps is small
    return d.make(d.pick([dp.add_norm, dp.pre_norm]), d.kept(x, depth), norm,
                  dropout=d.pick([0.0, 0.5]))


def _branch(d, x, depth):
    f = d.net(x, depth)
    y = d.after(f, x)
    g = d.to(d.leaf(x), x, y)
    if d.pick([True, False]):
        return d.make(dp.branch, f, other=g, merge=d.merge())
    return dp.serial(d.make(dp.branch, f, g), d.joined(y, y, 1))


def _repeat(d, x, depth):
    remat = d.pick([False, False, True, "dots_saveable"])
    return d.make(dp.repeat, 2, d.kept(x, depth), unroll=d.pick([1, 2]), remat=remat)


def _heads(d, x, depth):
    return d.make(dp.heads, 2, d.net(x, depth))


def _ensemble(d, x, depth):
    return dp.serial(d.make(dp.ensemble, 2, d.net(x, depth)), mean_of_all)


def _remat(d, x, depth):
    return d.make(dp.remat, d.net(x, depth), policy=d.pick(["nothing_saveable", "dots_saveable"]))


def _mixed(d, x, depth):
    return d.make(dp.mixed, d.net(x, depth), jnp.float32)


def _linearize(d, x, depth):
    f = dp.serial(f=d.net(x, depth))
    averages = any("#ema" in path for path in dp.tree.paths(d.plan(f, x).state))
    return f if averages else d.make(dp.linearize, f)  # averages go around


def _replace(d, x, depth):
    d.parts["replace"] += 1
    net = dp.serial(d.net(x, depth), act=jnp.tanh)
    way = d.pick(["act", "*", "**"])
    return dp.replace(net, way, dp.remat if way != "act" else lambda old: jax.nn.silu)


def _tap(d, x, depth):
    if d.pick([True, False]):
        seen = d.net(x, depth)
        y = d.after(seen, x)
        return dp.serial(d.make(dp.tap, dp.serial(seen=seen, then=d.kept(y, 1)), "seen"), both)
    copies = dp.repeat(2, dp.serial(seen=d.kept(x, depth), then=jnp.tanh))
    return dp.serial(d.make(dp.tap, copies, "seen"), last_copy)


def _computed(d, x, depth):
    f = dp.serial(d.net(x, depth))
    params = dp.tree.paths(d.plan(f, x).params)
    if not params:
        return f
    kernels = [path for path in params if path.endswith("/kernel")]
    make = d.pick([dp.ema, *([dp.freeze, dp.lora, dp.weight_norm, dp.spectral_norm, dp.reparam]
                             + 5 * d.steps * [dp.quantize]) * (2 * bool(kernels))])
    if make is dp.reparam:
        return d.make(make, f, halved, doubled)
    if make is dp.freeze:
        return d.make(make, f, exclude=d.pick([(), "**/kernel"]))
    return d.make(make, f, **({"rank": 1} if make is dp.lora else {}))


def _fixed_point(d, x, depth):
    f = d.kept(x, depth)
    if d.plan(f, x).state:
        return f
    back = d.make(dp.linear, x.shape[-1], bias=False, kernel_init="normal")  # so small: it settles
    return d.make(dp.fixed_point, d.program(settling, f=f, back=back))


def lora_in_repeat(d, f, x):
    return d.make(dp.repeat, 2, d.make(dp.lora, f, 1))


def remat_of_repeat(d, f, x):
    return d.make(dp.remat, d.make(dp.repeat, 2, f))


def ensemble_of_repeat(d, f, x):
    return dp.serial(d.make(dp.ensemble, 2, d.make(dp.repeat, 2, f)), mean_of_all)


def tap_of_repeat_of_lora(d, f, x):
    copies = d.make(dp.repeat, 2, d.make(dp.lora, dp.serial(seen=f, then=jnp.tanh), 1))
    return dp.serial(d.make(dp.tap, copies, "seen"), last_copy)


def heads_in_repeat_in_program(d, f, x):
    side_by_side = d.make(dp.heads, 2, f) >> d.make(dp.linear, x.shape[-1])
    return d.program(twice, f=d.make(dp.repeat, 2, side_by_side))


def hyper_in_mixed(d, f, x):
    written = d.make(dp.hyper, d.make(dp.repeat, 2, f), d.make(dp.linear, 2, bias_init=generic))
    return d.make(dp.mixed, d.program(told, f=written), jnp.float32)


NESTED = [lora_in_repeat, remat_of_repeat, ensemble_of_repeat, tap_of_repeat_of_lora,
          heads_in_repeat_in_program, hyper_in_mixed]


def with_kernel(d, x):
    """A layer that keeps the shape of x and has a kernel for certain."""
    return dp.serial(d.kept(x, 1), last=d.make(dp.linear, x.shape[-1], bias_init=generic))


def _nested(d, x, depth):
    """What users put into each other, which chance alone would seldom do."""
    f = with_kernel(d, x)
    fits = [way for way in NESTED if way is not hyper_in_mixed or (
        d.mixing and not d.mask and not d.plan(f, x).state)]
    return d.function(d.pick(fits))(d, f, x)


def _twice(d, x, depth):
    return d.program(twice, f=d.kept(x, depth))


def _scaled(d, x, depth):
    return d.program(scaled, f=d.kept(x, depth))


def _trained(d, x, depth):
    f = d.net(x, depth)
    y = d.after(f, x)
    noise = d.pick([dropout, lambda d, y: d.make(dp.linear, y.shape[-1], bias_init=generic)])
    return d.program(trained, f=f, noise=noise(d, y))


def _tied(d, x, depth):
    return d.program(tied, code=d.make(dp.linear, 3), f=d.net(x, depth))


def _resampled(d, x, depth):
    pool = d.make(d.pick([dp.max_pool, dp.avg_pool]), 2, dims=1, padding="SAME")
    y, mask = d.after(pool, x), d.mask
    d.mask = mask and y.shape[: len(mask)]
    rest = dp.serial(d.make(dp.hide), d.net(y, depth))
    d.mask = mask
    return d.program(resampled, pool=pool, rest=rest)


def _hyper(d, x, depth):
    f = d.net(x, depth)
    plan = d.plan(f, x)
    if plan.state or not plan.params:
        return f
    # The first feature may be padding.
    tell = d.pick([told_alike] if d.mask else [told, told_alike])
    return d.program(tell, f=d.make(dp.hyper, f, d.make(dp.linear, 2, bias_init=generic)))


COMBINATORS = dict.fromkeys([
    _serial, _power, _residual, _normed, _branch, _repeat, _heads, _ensemble, _remat, _replace,
    _tap, _computed, _hyper, _nested, _twice, _trained, _tied], anywhere)
SPECIAL = {
    _mixed: lambda d, x: d.mixing,
    _fixed_point: lambda d, x: not d.mixing,  # in float32 two ways end further apart
    _linearize: lambda d, x: not d.mixing and not d.causal,  # it does not stream
    _scaled: lambda d, x: d.scaling,
    _resampled: lambda d, x: x.ndim == 3 and over_space(d, x),
}
