"""Errors of computed parameters."""


import jax.numpy as jnp
import optax
from support.refusing import KEY, X

import diffprog as dp

LINEAR = dp.linear(3)
LORA = dp.lora(LINEAR, 2)
EMA = dp.ema(dp.serial(LINEAR))
PARAMS, STATE = LORA.init(KEY, X)
PLAIN, _ = dp.tree.merge(LORA, PARAMS)


def scaled(key, kernel):
    return {"half": kernel / 2}


def forgotten(tree):
    return tree["half"][:2]


def renamed(layer):
    """The layer in a record that says nothing of what is computed."""
    return dp.Layer(layer.init, layer.apply, name="renamed")


def expanded_around(wrap):
    return lambda: dp.linearize(wrap(LINEAR)).init(KEY, X)


def with_memory(wrap):
    net = wrap(dp.models.transformer(5, 5, width=4, depth=1, heads=1, hidden=4))
    ids = jnp.ones((1, 2), int)
    params, state = net.init(KEY, ids, source=ids)
    return lambda: dp.text.generate(net, params, ids, 2, state=state, source=ids)


def child_of(net):
    params, _ = net.init(KEY, X)
    return lambda: net.children["linear_0"](params["linear_0"], X)


EXAMPLES = {
    "wants one path for each leaf, got two leaves at a/b; rename one of them: / separates "
    "levels":
        lambda: dp.tree.paths({"a/b": 1, "a": {"b": 2}}),
    # By which parameters.
    "linear(3): wants a call of the whole net, which computes the parameters of its children, "
    "got a call of one child, whose own parameters are not computed yet; take its output by "
    "tap(net, path), or call the child of the net without the wrapper on merge(net, params, "
    "state)":
        child_of(EMA),
    # Which leaves.
    "lora(linear(3), 2, pattern='kernels'): wants a pattern that matches a path (bias, kernel), "
    "got 'kernels'; correct it: * is one level, ** any number":
        lambda: dp.lora(LINEAR, 2, "kernels").init(KEY, X),
    "freeze(linear(3), exclude='**'): wants a leaf that is not excluded, got exclude='**', "
    "which excludes all; exclude fewer":
        lambda: dp.freeze(LINEAR, exclude="**").init(KEY, X),
    "lora(linear(3), 2, pattern='bias'): wants kernels (..., in, out) of at least 2 by 2, got "
    "float32[3]; choose a smaller rank, or a pattern that matches larger ones":
        lambda: dp.lora(LINEAR, 2, "bias").init(KEY, X),
    "lora(linear(3), 4): wants kernels (..., in, out) of at least 4 by 4, got float32[4,3]; "
    "choose a smaller rank, or a pattern that matches larger ones":
        lambda: dp.lora(LINEAR, 4).init(KEY, X),
    "weight_norm(linear(3), pattern='**'): wants kernels (..., in, out), got float32[3]; choose a "
    "pattern that matches no vectors":
        lambda: dp.weight_norm(LINEAR, "**").init(KEY, X),
    "lora(freeze(linear(3)), 2): wants kernel as a trainable leaf, got one that is frozen "
    "inside; freeze outside: freeze(lora(...), exclude=('**/down', '**/up'))":
        lambda: dp.lora(dp.freeze(LINEAR), 2).init(KEY, X),
    "ema(renamed): wants a layer without #ema in its state, got #ema; make the inner wrapper by "
    "dataclasses.replace, which keeps the field computed":
        lambda: dp.ema(renamed(dp.ema(LINEAR))).init(KEY, X),
    "linearize(ema(linear(3))): wants a layer that uses its parameters in inference, got one "
    "that averages bias, kernel; write ema(linearize(layer)): average outside":
        expanded_around(dp.ema),
    "wants memory in place of source, got int32[1,2]; encode it once: memory=dp.tap(net, "
    "\"encoder\")(params, ids, state=state, source=source, source_mask=source_mask)[1]"
    "[\"encoder\"], memory_mask=source_mask":
        with_memory(dp.ema),
    # How they are computed.
    "reparam(linear(3), scaled, forgotten): wants params kernel as float32[4,3], got "
    "float32[2,3]; pass what init returned on input of this shape":
        lambda: dp.reparam(LINEAR, scaled, forgotten).init(KEY, X),
    "lora(linear(3), 0): wants rank as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.lora(LINEAR, 0),
    "quantize(linear(3), bits=1): wants bits from 2 to 16, got 1; choose 8, for example":
        lambda: dp.quantize(LINEAR, 1),
    "ema(linear(3), decay=1.0): wants decay in [0, 1), got 1.0; pass a fraction, not a "
    "percentage":
        lambda: dp.ema(LINEAR, 1.0),
    # Trees with them and without.
    "lora(linear(3), 2): wants kernel with base, down, up, got float32[4,3]; pass the "
    "parameters of the reparametrized net: these are already merged, or belong to another net":
        lambda: LORA(PLAIN, X),
    "wants kernel with base, down, up, got float32[4,3]; pass the parameters of the "
    "reparametrized net: these are already merged, or belong to another net":
        lambda: dp.tree.merge(LORA, PLAIN),
    "ema(serial(linear(3))): wants state with #ema/linear_0/bias, got none; pass state=, as "
    "init returned it":
        lambda: EMA(EMA.init(KEY, X)[0], X),
    "wants state with #ema/linear_0/bias, got none; pass state=, as init returned it":
        lambda: dp.tree.merge(EMA, EMA.init(KEY, X)[0]),
    "wants a net with computed parameters, got linear(3); pass the net made by reparam, lora "
    "or the like: parameters of other nets are plain already":
        lambda: dp.tree.merge(LINEAR, PLAIN),
    "wants a pattern that matches a path (bias), got '**/kernel'; correct it: * is one level, ** "
    "any number":
        lambda: dp.tree.unmerge(LORA, {"bias": PLAIN["bias"]}, key=KEY),
    "wants a net with something to train, got freeze(linear(3)), which is frozen; freeze less of "
    "it: name what trains by exclude=":
        lambda: dp.make_step(dp.freeze(LINEAR), dp.classification(), optax.sgd(0.1)).init(KEY, X),
}
