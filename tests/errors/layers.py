"""Errors of layers of features: linear, embedding, norms, dropout, feed-forward, one-hot."""

import functools

import jax.numpy as jnp
from support.refusing import KEY, X, halve

import diffprog as dp
from errors.given import at, bools, floats, ints, params, traced

EMBED, TABLE = dp.embedding(11, 3), {"embedding": jnp.ones((11, 3))}
ROWS, NORM = floats(2, 3, 4), dp.batch_norm()


@functools.cache
def single():
    """Parameters of `ffn` with a bias of 1 feature instead of 4, which would broadcast."""
    own = params(dp.ffn(4), ROWS)
    return own | {"up": own["up"] | {"bias": jnp.zeros(1)}}


EXAMPLES = {
    # Linear maps.
    "linear(3): wants params of 3 features, got {bias: float32[1], kernel: float32[4,3]}; pass "
    "what init returned":
        lambda: dp.linear(3)(params(dp.linear(3), X) | {"bias": jnp.ones(1)}, X),
    "at (bilinear(3)): wants a pair of inputs (a, b), got float32[2,4]; put branch or parallel "
    "before it":
        at(dp.bilinear(3), X),
    "at (bilinear(3)): wants a pair of inputs (a, b), got (float32[2,4]); put branch or parallel "
    "before it":
        at(dp.bilinear(3), (X,)),
    "at (bilinear(3)): wants two inputs of equal leading axes and dtype, got (float32[2,4], "
    "float32[3,4]); bring them to one shape and dtype":
        at(dp.bilinear(3), (X, floats(3, 4))),
    "at (bilinear(3)): wants two inputs of equal leading axes and dtype, got (float32[2,4], "
    "bfloat16[2,4]); bring them to one shape and dtype":
        at(dp.bilinear(3), (X, X.astype(jnp.bfloat16))),
    "at (bilinear(3)): wants floating-point input, got int32[2,4]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.bilinear(3), (X, ints(2, 4))),
    "bilinear(3): wants 4 features on the last axis, as init saw, got float32[2,1]; initialize "
    "again on input of this shape, or change the layer before":
        lambda: dp.bilinear(3)(params(dp.bilinear(3), (X, X)), (X, X[:, :1])),
    "bilinear(2): wants params of 2 features, got {bias: float32[3], kernel: float32[4,4,3]}; "
    "pass what init returned":
        lambda: dp.bilinear(2)(params(dp.bilinear(3), (X, X)), (X, X)),
    "bilinear(True): wants features as an int of at least 1, got True; pass a Python int":
        lambda: dp.bilinear(True),
    # Embedding, classes.
    "embedding(0, 3): wants vocabulary as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.embedding(0, 3),
    "embedding(4, 2.0): wants features as an int of at least 1, got 2.0; pass a Python int":
        lambda: dp.embedding(4, 2.0),
    "at (embedding(11, 3)): wants ids as ints, got float32[2,5]; convert them: "
    "ids.astype(jnp.int32)":
        at(EMBED, floats(2, 5)),
    "embedding(11, 3): wants ids as ints, got bool[2]; convert them: ids.astype(jnp.int32)":
        lambda: EMBED(TABLE, jnp.ones(2, bool)),
    "embedding(11, 3): wants params of 11 ids and 3 features, got {embedding: float32[12,3]}; "
    "pass what init returned":
        lambda: EMBED({"embedding": jnp.ones((12, 3))}, jnp.array([1])),
    "wants 3 features on the last axis, as init saw, got float32[2,4]; initialize again on "
    "input of this shape, or change the layer before":
        lambda: dp.unembed(TABLE, jnp.ones((2, 4))),
    "wants the params of an embedding, got {kernel: float32[3,4]}; pass layers.embed.params, for "
    "example, after a call of layers.embed":
        lambda: dp.unembed({"kernel": jnp.ones((3, 4))}, jnp.ones((2, 3))),
    "wants floating-point input, got int32[2,3]; convert it: x.astype(jnp.float32)":
        lambda: dp.unembed(TABLE, jnp.ones((2, 3), int)),
    "one_hot(2.0): wants classes as an int of at least 1, got 2.0; pass a Python int":
        lambda: dp.one_hot(2.0),
    "at (one_hot(2)): wants labels as ints, got float32[3]; convert them: labels.astype(jnp.int32)":
        at(dp.one_hot(2), floats(3)),
    # Normalization.
    "layer_norm(eps=0.0): wants eps as a positive float, got 0.0; pass 1e-5, for example":
        lambda: dp.layer_norm(eps=0.0),
    "rms_norm(eps=1): wants eps as a positive float, got 1; pass 1e-5, for example":
        lambda: dp.rms_norm(eps=1),
    "rms_norm(): wants 1 feature on the last axis, as init saw, got float32[2,4]; initialize "
    "again on input of this shape, or change the layer before":
        lambda: dp.rms_norm()(params(dp.rms_norm(), X[:, :1]), X),
    "at (layer_norm()): wants several features, got float32[2,1]; leave it out: a single number "
    "minus its mean is always 0":
        at(dp.layer_norm(), floats(2, 1)),
    "at (instance_norm()): wants several numbers in a group, got float32[2,1,1,3]; choose fewer "
    "groups, or leave it out: a single number minus its mean is always 0":
        at(dp.instance_norm(), floats(2, 1, 1, 3)),
    "prelu(): wants params of 1 feature, got {scale: float32[4]}; pass what init returned":
        lambda: dp.prelu()(params(dp.prelu(), X), X[:, :1]),
    "batch_norm(): wants several values per channel in training, got float32[1,4]; take a larger "
    "batch: a variance needs two":
        lambda: NORM.apply(*NORM.init(KEY, X), X[:1], train=True),
    "at (batch_norm()): wants a mask of booleans, got float32[4,3]":
        at(dp.batch_norm(), floats(4, 3, 2), mask=floats(4, 3)),
    "at (batch_norm()): wants a mask of the leading axes of (4, 3, 2), got bool[3]; give it a "
    "batch axis, as by jnp.broadcast_to(mask, (4, 3))":
        at(dp.batch_norm(), floats(4, 3, 2), mask=bools(3)),
    "group_norm(True): wants groups as an int of at least 1, got True; pass a Python int":
        lambda: dp.group_norm(True),
    "group_norm(2, dims=4): wants dims of at most 3, got 4; use the first axes as batch axes":
        lambda: dp.group_norm(2, dims=4),
    "instance_norm(dims=0): wants dims as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.instance_norm(dims=0),
    "at (group_norm(4)): wants channels divisible by groups=4, got 6 in float32[2,3,3,6]; "
    "choose groups that divide the channels":
        at(dp.group_norm(4), floats(2, 3, 3, 6)),
    "at (group_norm(2)): wants at least 3 axes (..., height, width, channels), got float32[3,4]; "
    "add the missing axes":
        at(dp.group_norm(2), floats(3, 4)),
    "at (instance_norm(dims=1)): wants at least 2 axes (..., length, channels), got float32[4]; "
    "add the missing axes":
        at(dp.instance_norm(dims=1), floats(4)),
    "serial(at=group_norm(2)): wants only side inputs that it takes (segments), got mask; leave it "
    "out, or add a layer that takes it":
        at(dp.group_norm(2), floats(2, 3, 3, 4), mask=bools(2)),
    # Dropout, masking.
    "spatial_dropout(0.5, dims=0): wants dims as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.spatial_dropout(0.5, dims=0),
    "at (spatial_dropout(0.5)): wants at least 3 axes (..., height, width, channels), got "
    "float32[2,3]; add the missing axes":
        at(dp.spatial_dropout(0.5), floats(2, 3)),
    "at (stochastic_depth(0.5)): wants at least 1 axis (examples, ...), got float32[]; add the "
    "missing axes":
        at(dp.stochastic_depth(0.5), floats()),
    "at (hide()): wants a mask of booleans, got float32[2]":
        at(dp.hide(), X, mask=floats(2)),
    "at (hide()): wants a mask of the leading axes of (2, 4), got bool[2,1]":
        at(dp.hide(), X, mask=bools(2, 1)),
    "at (hide()): wants one array, got (float32[2], float32[2]); pick one part of it with a lambda":
        at(dp.hide(), (floats(2), floats(2)), mask=bools(2)),
    # Samples.
    "at (gaussian_sample()): wants a pair (mean, log_variance), got float32[2,4]; put "
    "branch(linear(n), linear(n)) before it, for example":
        at(dp.estimators.gaussian_sample(), X),
    "at (gaussian_sample()): wants a mean and a log_variance of one shape and dtype, got "
    "(float32[2,4], float32[2,1]); give each entry of the mean its own log_variance":
        at(dp.estimators.gaussian_sample(), (X, floats(2, 1))),
    "gumbel_softmax(temperature=0.0): wants temperature as a positive number, got 0.0; pass 1.0, "
    "for example":
        lambda: dp.estimators.gumbel_softmax(temperature=0.0),
    "at (gumbel_softmax()): wants at least 1 axis (..., classes), got float32[]; add the missing "
    "axes":
        at(dp.estimators.gumbel_softmax(), floats()),
    "wants values and surrogate of one shape and dtype, got (int32[2], float32[2]); bring them to "
    "one shape and dtype":
        traced(dp.estimators.straight_through, ints(2), floats(2)),
    "wants log_probabilities of the shape of values, (5,), got float32[5,2]; give one for each "
    "sample: sum over the parts of a sample":
        traced(dp.estimators.score_function, floats(5), floats(5, 2)),
    "wants floating-point input, got int32[5]; convert it: x.astype(jnp.float32)":
        traced(dp.estimators.score_function, ints(5), floats(5)),
    "wants a baseline that is one number or of the shape (5,), got float32[5,1]; give one for each "
    "sample":
        traced(dp.estimators.score_function, floats(5), floats(5), baseline=floats(5, 1)),
    "wants a baseline that is an array or leave_one_out, got 'mean'; pass one of them":
        traced(dp.estimators.score_function, floats(5), floats(5), baseline="mean"),
    "wants at least two samples for leave_one_out, got float32[1]; draw more samples, or pass an "
    "array as baseline":
        traced(dp.estimators.score_function, floats(1), floats(1), baseline="leave_one_out"),
    # Feed-forward net and residual blocks.
    "ffn(0): wants hidden as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.ffn(0),
    "ffn(4, activation=prelu()): wants an activation that is a function of an array, got prelu(); "
    "write linear(...) >> layer >> linear(...) for a layer with parameters":
        lambda: dp.ffn(4, dp.prelu()),
    "ffn(4, activation='relu'): wants an activation that is a function of an array, got 'relu'; "
    "pass jax.nn.relu, for example":
        lambda: dp.ffn(4, "relu"),
    "ffn(8, activation=32): wants an activation that is a function of an array, got 32; write "
    "ffn(32): init reads the size of the input off x":
        lambda: dp.ffn(8, 32),
    "ffn(4, dropout=1): wants dropout in [0, 1), got 1; pass a fraction, not a percentage":
        lambda: dp.ffn(4, dropout=1),
    "add_norm(ffn(4), dropout=10): wants dropout in [0, 1), got 10; pass a fraction, not a "
    "percentage":
        lambda: dp.add_norm(dp.ffn(4), dropout=10),
    "at (ffn(4, activation=jnp.sum)): wants an activation that keeps shape and dtype, "
    "float32[6,4], got float32[]; pass an elementwise function, or write swiglu(hidden) >> "
    "linear(width)":
        at(dp.ffn(4, jnp.sum), ROWS),
    "at (ffn(4)): wants floating-point input, got int32[2,4]; convert it: x.astype(jnp.float32)":
        at(dp.ffn(4), ints(2, 4)),
    "at (add_norm(linear(5))): wants a body that keeps the shape of x, float32[2,3,4], got "
    "float32[2,3,5]; give it the number of features and the dtype of x":
        at(dp.add_norm(dp.linear(5)), ROWS),
    "at (pre_norm(halve)): wants a body that keeps the shape of x, float32[2,3,4], got "
    "bfloat16[2,3,4]; give it the number of features and the dtype of x":
        at(dp.pre_norm(halve), ROWS),
    "at/body (residual(linear(5))): wants a body that keeps the shape of x, float32[2,3,4], got "
    "float32[2,3,5]; give it as many features, or a shortcut of the same shape":
        at(dp.pre_norm(dp.residual(dp.linear(5))), ROWS),
    "ffn(4): wants params of 4 features, got {bias: float32[1], kernel: float32[4,4]}; pass "
    "what init returned":
        lambda: dp.ffn(4)(single(), jnp.ones((2, 3, 4))),
    "linear(2.0, bias=False): wants features as an int of at least 1, got 2.0; pass a Python int":
        lambda: dp.swiglu(2.0),
    "at/gate (linear(3, bias=False)): wants floating-point input, got int32[2,4]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.swiglu(3), ints(2, 4)),
}
