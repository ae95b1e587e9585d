"""What losses, metrics, derivatives and the laws of a layer refuse."""

import dataclasses

import jax
import jax.numpy as jnp
from support.refusing import KEY, X

import diffprog as dp
from diffprog.laws.laws import LAWS
from diffprog.laws.trial import Options, Trial
from errors.given import bools, floats, ints, traced

LOGITS, LABELS, ROW = floats(2, 3), ints(2), floats(2, 4)
SERIES, KERNEL = floats(2, 4, 3), floats(4, 3)
MASK = {"mask": jnp.array([[True, True, False], [True, False, False]])}


@jax.custom_jvp
def bent(x):
    return jnp.sin(x)


bent.defjvp(lambda primals, tangents: (bent(*primals), 2 * tangents[0]))


def faulty(law, forward, init=None, x=None, **side):
    """A layer that breaks a law."""
    def call():
        layer = forward if isinstance(forward, dp.Layer) else dp.stateless(init, forward)
        with jax.enable_x64(True):
            given = jnp.ones((2, 3, 2)) if x is None else x
            LAWS[law](Trial.of(layer, given, KEY, side, Options(causal=True)))

    return call


def half(key, x):
    return {"scale": jnp.ones(x.shape[-1], jnp.bfloat16)}


def takes_mask(params, x, *, mask=None):
    return x


def own_batch(params, x):
    return x - x.mean(0)


def narrow(params, x):
    return x.astype(jnp.bfloat16)


def forgets(params, state, x, **_):
    return x, {"count": state["count"].astype(jnp.float32)}


def whole(key, x):
    return {"scale": jnp.ones(x.shape[-1])}


def noisy(draw):
    """A layer that adds noise in training."""
    return dp.Layer(lambda key, x: ({}, {}), lambda p, s, x, *, key=None, train=False: (
        x + draw(key, x).astype(x.dtype) if train else x, s), random=True)


COUNTING = dp.Layer(lambda key, x: ({}, {"count": jnp.zeros((), int)}), forgets)
CHANGING = dataclasses.replace(dp.linear(2), rebuild=lambda children: dp.linear(3))
DRAWS = dp.Layer(lambda key, x: ({}, {}), lambda p, s, x, *, key=None, **_: (
    x if key is None else x + jax.random.normal(key, x.shape, x.dtype), s))
DEAF = dp.Layer(lambda key, x: ({}, {}), lambda p, s, x, **_: (x, s), random=True)


EXAMPLES = {
    # Losses.
    "wants integer labels, or probabilities as float32[2,3] without ignore_index, got "
    "float32[2] and ignore_index=None; make class numbers integers, or leave soft labels out by "
    "a mask":
        traced(dp.losses.cross_entropy, LOGITS, floats(2)),
    "wants integer labels, or probabilities as float32[2,3] without ignore_index, got "
    "float32[2,3] and ignore_index=-100; make class numbers integers, or leave soft labels out by "
    "a mask":
        traced(dp.losses.cross_entropy, LOGITS, LOGITS, ignore_index=-100),
    "wants labels as ints, got bool[2]; convert them: labels.astype(jnp.int32)":
        traced(dp.losses.cross_entropy, LOGITS, bools(2)),
    "wants labels of the logits' leading shape (2,), got int32[2,1]; pass one class index "
    "per entry":
        traced(dp.losses.cross_entropy, LOGITS, ints(2, 1)),
    "wants at least 1 axis (..., classes), got float32[]; add the missing axes":
        traced(dp.losses.cross_entropy, floats(), ints()),
    "wants floating-point input, got int32[2,3]; convert it: x.astype(jnp.float32)":
        traced(dp.losses.cross_entropy, ints(2, 3), LABELS),
    "wants a mask of booleans, got float32[2]":
        traced(dp.losses.cross_entropy, LOGITS, LABELS, mask=floats(2)),
    "wants a mask of the leading axes of (2,), got bool[2,1]":
        traced(dp.losses.cross_entropy, LOGITS, LABELS, mask=bools(2, 1)),
    "wants label_smoothing in [0, 1), got 10; pass a fraction, not a percentage":
        traced(dp.losses.cross_entropy, LOGITS, LABELS, label_smoothing=10),
    "wants one weight for each of 3 classes, got float32[2]; pass an array of shape (classes,)":
        traced(dp.losses.cross_entropy, LOGITS, LABELS, class_weights=floats(2)),
    "wants reduction out of mean, none, sum, got 'average'; choose one of them":
        traced(dp.losses.cross_entropy, LOGITS, LABELS, reduction="average"),
    "wants a kernel of shape (4, classes), got float32[3,4]; pass embedding.T for a tied embedding":
        traced(dp.losses.linear_cross_entropy, ROW, floats(3, 4), LABELS),
    "wants a bias of shape (3,), got float32[4]; give one number to each class":
        traced(dp.losses.linear_cross_entropy, ROW, KERNEL, LABELS, bias=floats(4)),
    "wants a target of the prediction's shape (3, 1), got float32[3]; drop the prediction's last "
    "axis: y[..., 0]":
        traced(dp.losses.squared_error, floats(3, 1), floats(3)),
    "wants a target of the prediction's shape (3, 2), got float32[2,3]; give both one shape: "
    "broadcasting would compare every pair":
        traced(dp.losses.squared_error, floats(3, 2), floats(2, 3)),
    "wants one array, got (float32[2,4], float32[2,4]); pick one part of it with a lambda":
        traced(dp.losses.squared_error, (ROW, ROW), ROW),
    "wants delta as a positive number, got 0.0; pass an error in units of the target":
        traced(dp.losses.huber, ROW, ROW, delta=0),
    "wants logits (batch, time, classes) and integer labels (batch, n), got (float32[4,3], "
    "int32[2,2]); give each example one row of labels":
        traced(dp.losses.ctc, KERNEL, ints(2, 2)),
    "wants blank in [0, 3), got 3; pass the number of a class":
        traced(dp.losses.ctc, SERIES, ints(2, 2), blank=3),
    # Metrics.
    "wants labels as ints, got float32[2,6]; convert them: labels.astype(jnp.int32)":
        traced(dp.metrics.accuracy, LOGITS, floats(2, 6)),
    "wants labels of the logits' leading shape (2,), got int32[3]; pass one class index per "
    "entry":
        traced(dp.metrics.confusion_matrix, LOGITS, ints(3)),
    "wants k of at most 3, the number of classes, got 5; lower it":
        traced(dp.metrics.top_k_accuracy, LOGITS, LABELS),
    "wants k as an int of at least 1, got 1.0; pass a Python int":
        traced(dp.metrics.top_k_accuracy, LOGITS, LABELS, k=1.0),
    # Derivatives.
    "wants at least one floating-point argument, got (int32[3]); convert one: "
    "x.astype(jnp.float32)":
        lambda: dp.gradients.check_gradients(lambda x: x, jnp.arange(3)),
    "wants a function that returns floating-point numbers, got none; return what is to be "
    "differentiated":
        lambda: dp.gradients.check_gradients(lambda x: x.astype(int), X),
    "wants a function that computes in float64, got [float32[2,4]]; pass it the arrays that it "
    "closes over as arguments":
        lambda: dp.gradients.check_gradients(lambda x: x.astype(jnp.float32), X),
    "wants derivatives that agree to 1e-06, got the argument: reverse ...":
        lambda: dp.gradients.check_gradients(bent, jnp.zeros(2)),
    # Laws.
    "centered: wants every law of a layer to hold, got 1 broken; correct these:\n  examples do not "
    "mix: LayerError: wants no difference ...":
        lambda: dp.check(dp.stateless(None, own_batch, name="centered"), floats(2, 4)),
    "wants symmetry out of equivariant, invariant, or None, got 'permuted'; say what permuted "
    "steps do to the output":
        lambda: dp.check(dp.linear(3), floats(2, 4), symmetry="permuted"),
    "wants other results from another key, got the same; draw with the key of the call, or leave "
    "random out":
        faulty("keys matter in training", DEAF),
    "wants the same results from any key for a layer without random=True, got others; make it with "
    "Layer(..., random=True)":
        faulty("keys matter in training", DRAWS),
    "wants a key for each draw, got 2 draws from 1 keys; split the key, or fold in what tells the "
    "draws apart":
        faulty("no two draws share a key", noisy(lambda key, x: jax.random.normal(
            key, x.shape) + jax.random.uniform(key, x.shape))),
    "wants other noise for each example, got the same for all; draw an array with the batch "
    "axis":
        faulty("no two draws share a key", noisy(lambda key, x: jax.random.normal(
            key, x.shape[1:]))),
    "wants noise of mean zero, got a mean ...":
        faulty("noise keeps the mean", noisy(lambda key, x: jax.random.uniform(key, x.shape))),
    "wants the gradient of float32 in scale, got ...":
        faulty("sums are accurate in 16 bits",
               lambda params, x: x * params["scale"].astype(x.dtype), whole),
    "wants finite gradients with train=False, got NaN in x; keep roots, logarithms and "
    "quotients away from zero":
        faulty("gradients are finite", lambda params, x: jnp.sqrt(x * 0)),
    "wants parameters and statistics in float32, got bfloat16 for float32[2,3,2]; make them in "
    "float32, whatever x is":
        faulty("dtypes are kept", lambda params, x: x * params["scale"].astype(x.dtype), half),
    "wants an output in float32 for float32[2,3,2], got bfloat16; return y.astype(x.dtype)":
        faulty("dtypes are kept", narrow),
    "wants a rebuild that returns linear(2), got linear(3); let it pass on all settings, and the "
    "children by their names":
        faulty("rebuild gives the same layer", CHANGING),
    "wants an effect of mask, got the same output for another one; pass it on, or leave it out of "
    "the signature":
        faulty("side inputs have an effect", takes_mask, **MASK),
    "wants the state in inference as {count: int64[]}, got {count: float32[]}; let both have one "
    "structure, and equal shapes and dtypes":
        faulty("state keeps its structure", COUNTING),
    "wants no difference at the output for steps before 1, after changing the later ones, got one "
    "of 4.6e-01; look for what the two compute differently":
        faulty("nothing depends on the future", lambda params, x: x - x.mean(1, keepdims=True)),
}
