"""What second-order products, gradients of examples, tangent kernels and `linearize` refuse."""

import functools

import jax.numpy as jnp
from support.refusing import KEY, X
from support.training_nets import NET, examples

import diffprog as dp
from errors.given import at, params, zeros

XS, YS = examples()
PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
NORMED = dp.serial(dp.batch_norm(), NET)
EXPANDED = dp.linearize(NET)


def hessian(vector, loss=lambda p: p["bias"].sum(), point=PARAMS):
    return lambda: dp.gradients.hessian_product(loss, point, vector)


def fisher(forward, distribution="categorical", mask=None):
    return lambda: dp.gradients.fisher_product(forward, X, X, distribution=distribution, mask=mask)


def each(net=NET, batch=(XS, YS), **options):
    own, state = zeros(lambda: net.init(KEY, XS))
    return lambda: dp.gradients.per_example_gradients(
        net, dp.classification(), own, state, batch, **options)


def norms(batch_size):
    return lambda: dp.gradients.per_example_gradient_norms(
        NET, dp.classification(), PARAMS, {}, (XS, YS), batch_size=batch_size)


def of_averages():
    net = dp.ema(NET)
    own, state = net.init(KEY, XS)
    dp.gradients.tangent_kernel(functools.partial(net, state=state), own, XS)


def first(params, x):
    return x[:1]


def pair(params, x):
    return x, x


def expanded(**state):
    return lambda: EXPANDED.apply(PARAMS, state, XS)


def stream():
    net = dp.linearize(dp.serial(dp.conv(2, 2, dims=1, padding="CAUSAL")))
    series = jnp.ones((2, 5, 4))
    own, state = zeros(lambda: net.init(KEY, series))
    dp.serial(at=net).start({"at": own}, {"at": state}, series, length=5)


EXAMPLES = {
    # Products.
    "wants vector with bias, got kernel; make it like params, as jax.tree.map(jnp.zeros_like, "
    "params) is":
        hessian({"kernel": jnp.ones((4, 3))}),
    "wants vector without scale, got bias, kernel, scale":
        hessian(PARAMS | {"scale": jnp.ones(3)}),
    "wants vector bias as float32[3], got float32[4]":
        hessian(PARAMS | {"bias": jnp.ones(4)}),
    "wants vector bias as float32[3], got bfloat16[3]":
        hessian(PARAMS | {"bias": jnp.ones(3, jnp.bfloat16)}),
    "wants vector as float32[2,4], got float32[8]":
        hessian(X.ravel(), jnp.sum, X),
    "wants arrays or jax.ShapeDtypeStructs, got 1.0; use jnp.asarray":
        hessian(1.0, jnp.sin, 1.0),
    "wants a loss that is one floating-point number, got float32[3]; take its mean, or of a pair "
    "(loss, rest) the first: f(params)[0]":
        hessian(PARAMS, lambda p: p["bias"]),
    "wants a loss that is one floating-point number, got (float32[], {}); take its mean, or of a "
    "pair (loss, rest) the first: f(params)[0]":
        hessian(PARAMS, lambda p: (p["bias"].sum(), {})),
    "wants vector as float32[2,4], got float32[2]":
        lambda: dp.gradients.gauss_newton_product(jnp.sin, jnp.sum, X, X[:, 0]),
    "wants a loss that is one floating-point number, got float32[2,4]":
        lambda: dp.gradients.gauss_newton_product(jnp.sin, jnp.square, X, X),
    "wants distribution out of bernoulli, categorical, gaussian, got 'normal'; choose one of them":
        fisher(jnp.sin, "normal"),
    "wants at least 1 axis, got float32[]; add the missing axes":
        fisher(jnp.sum),
    "wants one array, got (float32[2,4], float32[2,4]); pick one part of it with a lambda":
        fisher(lambda p: (p, p)),
    "wants a mask of the leading axes of (2,), got bool[2,4]":
        fisher(jnp.sin, mask=X > 0),
    # Examples.
    "wants arrays of one length along the first axis, got (float32[12,4], int32[3]); cut them to "
    "one length":
        each(batch=(XS, YS[:3])),
    "wants train=False for a net with batch statistics, got train=True and batch_norm_0/mean, "
    "batch_norm_0/var; leave train out: batch statistics mix the examples of a batch":
        each(NORMED, train=True),
    "wants a net that uses running statistics, got batch_norm_0/mean, batch_norm_0/var pinned "
    "to training; leave pin out: batch statistics mix the examples of a batch":
        each(dp.pin(NORMED, train=True)),
    "wants batch_size as an int of at least 1, got 0; pass 1 or more":
        norms(0),
    "wants parameters that have a gradient at inference, got averages in place of "
    "linear_0/bias, linear_0/kernel; pass train=True, or the plain net with the trees of "
    "dp.tree.merge(net, params, state), which inference uses":
        each(dp.ema(dp.serial(NET))),
    "wants a net with something to train, got freeze(linear(3)), which is frozen; freeze less "
    "of it: exclude= names what trains":
        each(dp.freeze(NET)),
    # Kernels.
    "wants batch_size as an int of at least 1, got None; pass a Python int":
        lambda: dp.gradients.tangent_kernel(NET, PARAMS, XS, batch_size=None),
    "wants one output per example, 12 in all, got float32[1,4]; keep the first axis of x":
        lambda: dp.gradients.tangent_kernel(first, PARAMS, XS),
    "wants one array, got (float32[12,4], float32[12,4]); pick one part of it with a lambda":
        lambda: dp.gradients.tangent_kernel(pair, PARAMS, XS),
    "linear(3): wants params kernel as float32[2,3], got float32[4,3]; pass what init returned "
    "on input of this shape":
        lambda: dp.gradients.tangent_kernel(NET, PARAMS, XS, XS[:, :2]),
    "wants parameters that have a gradient at inference, got averages in place of bias, "
    "kernel; pass the plain net with the trees of dp.tree.merge(net, params, state), which "
    "inference uses":
        of_averages,
    "wants something that depends on the parameters, got a derivative of zero; make the loss "
    "train=True, or differentiate the plain net at dp.tree.merge(net, params, state): ema uses "
    "averages in inference, and frozen parameters have no gradient":
        hessian(PARAMS, lambda p: jnp.ones(())),
    # Expansions.
    "at (linearize(serial(origin=batch_norm()))): wants a layer without origin in its state, got "
    "origin; rename the child, or linearize only once: twice is the same":
        at(dp.linearize(dp.serial(origin=dp.batch_norm())), X),
    "linearize(linearize(linear(3))): wants a layer without origin in its state, got origin; "
    "rename the child, or linearize only once: twice is the same":
        functools.partial(params, dp.linearize(EXPANDED), X),
    "linearize(linear(3)): wants state origin, got none; pass state=, as init returned it":
        expanded(),
    "linearize(linear(3)): wants origin kernel as float32[4,3], got float32[5,3]; put the "
    "parameters to expand around into the state":
        expanded(origin=PARAMS | {"kernel": jnp.ones((5, 3))}),
    "at (linearize(serial(conv(2, 2, dims=1, padding='CAUSAL')))): wants the whole input at "
    "once, got a streaming call; call it without start: its caches would have no derivative":
        stream,
}
