"""What random nets are made of: how `random_nets.py` draws each layer and combinator.

Each takes the drawing d and the shape of its input x.
"""

import math

import jax
import jax.numpy as jnp
from names import by_name

import diffprog as dp

# Plain functions and programs, by the names that `repr` shows.


def generic(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


def mean_of_all(y):
    return y.mean(0)


def both(pair):
    y, seen = pair
    return sum(seen.values(), y)


def last_copy(pair):
    y, seen = pair
    return sum((activation[-1] for activation in seen.values()), y)


def halved(key, leaf):
    return {"half": leaf / 2}


def doubled(tree):
    return 2 * tree["half"]


def twice(layers, x):
    return layers.f(jnp.tanh(layers.f(x))) + x


def scaled(layers, x, *, scale=None):
    y = layers.f(x)
    return x + (y if scale is None else y * scale.reshape(-1, *(1,) * (y.ndim - 1)))


def trained(layers, x, *, train):
    y = layers.f(x)
    return layers.noise(y) if train else y


def tied(layers, x):
    code = jnp.tanh(layers.code(x))
    return layers.f(code @ layers.code.params["kernel"].T.astype(x.dtype))


def resampled(layers, x, *, mask=None):
    y = layers.pool(x, mask=mask)
    return layers.rest(y, mask=mask if mask is None or mask.ndim == 1 else mask[:, ::2])


def asked(layers, x, *, mask=None):
    return layers.ask(x, memory=layers.code(x), memory_mask=mask)


def told(layers, x):
    """Each example by its first feature, which is known when a stream begins."""
    return layers.f(x, condition=x.reshape(len(x), -1)[:, :1])


def told_alike(layers, x):
    return layers.f(x, condition=jnp.ones(2, x.dtype))


def settling(layers, pair):
    z, x = pair
    return jnp.tanh(layers.f(x) + layers.back(z))


PROGRAMS = (twice, scaled, trained, tied, resampled, asked, told, told_alike, settling)


def namespace():
    """The names in the code that `repr` shows; a program is shown as a call of its function."""
    names = {"jax": jax, "jnp": jnp, **by_name()}
    names |= {f.__name__: f for f in (
        generic, mean_of_all, both, last_copy, halved, doubled)}
    made = lambda f: lambda **children: dp.program(**children)(f)  # noqa: E731
    return names | {f.__name__: made(f) for f in PROGRAMS}


# Leaves: how each is drawn for x, and where it may stand.


def _linear(d, x):
    features, bias = d.pick([2, 3, 4]), d.pick([True, True, False])
    return d.make(dp.linear, features, bias=bias, bias_init=generic)


def _gated(d, x):
    return d.make(d.pick([dp.glu, dp.swiglu]), d.pick([2, 3]), bias_init=generic)


def _norm(d, x):
    maker = d.pick([dp.layer_norm, dp.rms_norm])
    return d.make(maker, eps=0.1, **({} if maker is dp.rms_norm else {"bias_init": generic}))


def _batch_norm(d, x):
    return d.make(dp.batch_norm, momentum=d.pick([0.9, 0.5]), eps=0.1, bias_init=generic)


def _spatial_norm(d, x):
    dims, norm = x.ndim - 2, {"eps": 0.1, "bias_init": generic}
    if d.pick([True, False]):
        return d.make(dp.instance_norm, dims=dims, **norm)
    return d.make(dp.group_norm, d.pick(divisors(x.shape[-1])), dims=dims, **norm)


def _group_norm_of_features(d, x):
    groups = d.pick([n for n in divisors(x.shape[-1]) if n < x.shape[-1]])
    return d.make(dp.group_norm, groups, dims=0, eps=0.1, bias_init=generic)


def _activation(d, x):
    smooth = [jnp.tanh, jnp.sin, jax.nn.silu, jax.nn.softplus, dp.gelu, jax.nn.leaky_relu]
    return d.function(d.pick(smooth + d.plain * [jax.nn.relu]))


def _prelu(d, x):
    return d.make(dp.prelu, shared=d.pick([True, False]))


def _binary_step(d, x):
    return d.function(dp.binary_step)


def dropout(d, x):
    if x.ndim > 2 and d.pick([True, False]):
        return d.make(dp.spatial_dropout, 0.5, dims=x.ndim - 2)
    return d.make(d.pick([dp.dropout, dp.stochastic_depth]), 0.5)


def _gaussian_sample(d, x):
    features = d.pick([2, 3])
    pair = d.make(dp.branch, *(d.make(dp.linear, features) for _ in range(2)))
    return dp.serial(pair, d.make(dp.estimators.gaussian_sample))


def _gumbel_softmax(d, x):
    return d.make(dp.estimators.gumbel_softmax, temperature=d.pick([0.5, 1.0]))


def _hide(d, x):
    return d.make(dp.hide)


def _conv(d, x):
    dims, least = x.ndim - 2, min(x.shape[1:-1])
    size = d.pick([1, 2, 3][:least])
    where = d.pick([
        {}, {"stride": 2}, {"padding": "VALID"}, {"padding": size - 1},
        {"padding_mode": "circular"}, {"padding_mode": "replicate", "stride": 2},
        {"dilation": 2 if least > 2 else 1}])
    if d.masks_steps(x):  # which may not depend on how many there are
        where.pop("padding_mode", None)
        where |= {"padding": size - 1} if "stride" in where else {}
    return _some_conv(d, x, size, dims, where)


def _causal_conv(d, x):
    return _some_conv(d, x, d.pick([2, 3]), 1, {"padding": "CAUSAL", "dilation": d.pick([1, 2])})


def _some_conv(d, x, size, dims, where):
    if d.pick([True, False, False]):
        return d.make(dp.depthwise_conv, size, dims=dims, bias_init=generic, **where,
                      multiplier=d.pick([1, 2]))
    groups = d.pick([n for n in divisors(x.shape[-1]) if n < 3])
    return d.make(dp.conv, 2 * d.pick([1, 2]), size, dims=dims, groups=groups, bias_init=generic,
                  **where)


def _conv_transpose(d, x):
    return d.make(dp.conv_transpose, d.pick([2, 3]), d.pick([2, 3]), dims=x.ndim - 2,
                  stride=d.pick([1, 2]), padding=d.pick(["SAME", "VALID"]), bias_init=generic)


def _pool(d, x):
    dims, least, maker = x.ndim - 2, min(x.shape[1:-1]), d.pick([dp.max_pool, dp.avg_pool])
    where = d.pick([{"padding": "SAME"}, {"padding": 1, "stride": 1}] + (least > 1) * [
        {}, {"stride": 1}])
    if maker is dp.avg_pool and d.pick([True, False]):
        where["count_padding"] = True
    elif maker is dp.max_pool and least > 2:
        where["dilation"] = d.pick([1, 2])
    if d.masks_steps(x) and where.get("padding") == "SAME":
        where["stride"] = 1
    return d.make(maker, 2, dims=dims, **where)


def _global_pool(d, x):
    return d.make(d.pick([dp.global_avg_pool, dp.global_max_pool]), dims=x.ndim - 2)


def _adaptive_pool(d, x):
    maker = d.pick([dp.adaptive_avg_pool, dp.adaptive_max_pool])
    return d.make(maker, d.pick([1, 2, 3]), dims=x.ndim - 2)


def _upsample(d, x):
    dims, method = x.ndim - 2, d.pick(["nearest", "linear", "cubic"])
    to = d.pick([{"factor": 2}, {"size": tuple(side + 1 for side in x.shape[1:-1])}])
    if d.masks_steps(x):
        to = {"factor": 2}
    return d.make(dp.upsample, dims=dims, method=method, **to)


def _pixel_shuffle(d, x):
    return dp.serial(d.make(dp.conv, 8, 1, bias_init=generic), d.make(dp.pixel_shuffle, 2))


def _patches(d, x):
    size = tuple(d.pick([n for n in divisors(side) if n < 3]) for side in x.shape[1:-1])
    return d.make(dp.patches, size)


def _flatten(d, x):
    return dp.serial(*d.clean(x), d.make(dp.flatten))


def _reshape(d, x):
    shape = d.pick([(3, 2), (2, 2, 2), (4, 4, 2)])
    entries, want = math.prod(x.shape[1:]), math.prod(shape)
    if entries % want == 0:
        return dp.serial(*d.clean(x), d.make(dp.reshape, (*shape[:-1], -1)))
    linear = d.make(dp.linear, want, bias_init=generic)
    return dp.serial(*d.clean(x), d.make(dp.flatten), linear, d.make(dp.reshape, shape))


def _ffn(d, x):
    return d.make(dp.ffn, 3, d.pick([jnp.tanh, dp.gelu]), bias_init=generic,
                  dropout=d.pick([0.0, 0.5]))


def _self_attention(d, x):
    heads = d.pick([n for n in divisors(x.shape[-1]) if n < 4])
    causal = d.causal or d.pick([True, False])
    where = {"window": d.pick([None, 2, 3])} if causal else {}
    if x.shape[-1] // heads % 2 == 0:
        where["rotary"] = d.pick([None, dp.rotary()])
    return d.make(dp.self_attention, heads, causal=causal, kv_heads=d.pick([1, heads]),
                  value_dim=d.pick([None, 3]), dropout=d.pick([0.0, 0.0, 0.5]),
                  implementation=d.pick([None, "blocks"]), bias_init=generic, **where)


def _attention_head(d, x):
    head = d.make(dp.attention_head, 2, d.pick([None, 3]), causal=d.causal, bias_init=generic)
    return d.make(dp.heads, 2, head)


def _cross_attention(d, x):
    code = d.make(dp.linear, 3, bias_init=generic)
    ask = d.make(dp.cross_attention, d.pick(divisors(x.shape[-1])), bias_init=generic)
    return d.program(asked, ask=ask, code=code)


def _positions(d, x):
    if x.shape[-1] % 2 or d.pick([True, False]):
        return d.make(dp.learned_positions, x.shape[-2] + 1)
    return d.make(dp.sinusoidal_positions)


def _recurrent(d, x):
    cell = d.make(d.pick([dp.simple_rnn, dp.lstm, dp.gru]), d.pick([2, 3]), bias_init=generic)
    cell = d.pick([cell, dp.heads(2, cell), dp.serial(dp.linear(2, bias_init=generic), cell)])
    way = d.pick([{}, *(() if d.causal else ({"reverse": True}, {"bidirectional": True}))])
    return d.make(dp.recurrent, cell, **way)


def _collapse(d, x):
    return d.make(dp.collapse, d.pick(["first", "last", "mean", "max", "attention"]))


def _features_apart(d, x):
    """Each step's features as a matrix and back, which does not mix the steps."""
    apart = d.make(dp.reshape, (d.pick(divisors(x.shape[-1])), -1), keep=2)
    return dp.serial(apart, d.make(dp.flatten, keep=2))


def divisors(n):
    return [k for k in range(1, n + 1) if n % k == 0]


def anywhere(d, x):
    return True


def over_space(d, x):
    return not d.causal and x.ndim > 2 and d.takes_mask(x)


def _in_time(d, x):
    """The time of a mask is that of x: the axis before the features."""
    return x.ndim > 2 and d.takes_mask(x) and (x.ndim == 3 or not d.causal)


def _enlarging(d, x):
    return not d.causal and x.ndim > 2 and d.takes_mask(x) and max(x.shape[1:-1]) < 5 + (x.ndim < 4)


WIDE = [_linear, _gated]  # where there are many features, these make them few
LEAVES = {
    _linear: anywhere, _gated: anywhere, _norm: anywhere, _activation: anywhere,
    _prelu: anywhere, dropout: anywhere, _group_norm_of_features: anywhere,
    _batch_norm: lambda d, x: d.takes_mask(x),
    _binary_step: lambda d, x: d.steps,
    _gaussian_sample: anywhere,
    _gumbel_softmax: lambda d, x: x.shape[-1] > 1,  # of one class there is nothing to draw
    _hide: lambda d, x: d.real_only(x),
    _reshape: lambda d, x: not d.causal,
    _ffn: anywhere,
}
SPATIAL = {
    _conv: over_space, _pool: over_space, _global_pool: over_space, _patches: over_space,
    _adaptive_pool: over_space, _conv_transpose: _enlarging, _upsample: _enlarging,
    _spatial_norm: lambda d, x: over_space(d, x) and math.prod(x.shape[1:-1]) > 1,
    _pixel_shuffle: lambda d, x: x.ndim == 4 and _enlarging(d, x),
    _flatten: lambda d, x: not d.causal and x.ndim > 2,
    _causal_conv: lambda d, x: d.causal,
    _self_attention: _in_time, _attention_head: _in_time, _recurrent: _in_time,
    _positions: _in_time,
    _cross_attention: lambda d, x: not d.causal and x.ndim == 3 and d.takes_mask(x),
    _collapse: lambda d, x: not d.causal and x.ndim == 3 and d.takes_mask(x),
    _features_apart: lambda d, x: d.causal,
}
