"""What objectives, penalties, data and the loop of training refuse."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support.refusing import X
from support.training_nets import KEY, NET, examples, sgd, train

import diffprog as dp
from diffprog.training.objectives import checked
from errors.composing import GROWS
from errors.given import bools, params

XS, YS = examples()
DATA = [(XS, YS)]
NORMED = sgd(dp.serial(dp.batch_norm(), NET))


@functools.cache
def state(step):
    return step.init(KEY, XS)


def asked(objective, batch, net=NET):
    """An objective of a batch."""
    own = params(net, XS)
    return lambda: jax.eval_shape(
        lambda own, batch: objective(net, own, {}, batch, key=None, train=True), own, batch)


def comparing(net, params, state, batch, *, key, train):
    return params["bias"].sum(), (state, {"loss": params["bias"].sum()})


comparing.across_examples = True
COMPARING = dp.make_step(NET, comparing, optax.sgd(0.1))
FLAT = dp.serial(NET, jnp.ravel)
LATENT = dp.branch(dp.linear(4), dp.branch(dp.linear(2), dp.linear(2)))
SEEING = dp.serial(dp.conv(2, 3), jax.nn.relu)
IMAGES = jnp.ones((12, 4, 4)), jnp.ones((2, 3, 4, 4))


def taken_folder():
    with tempfile.TemporaryDirectory() as folder:
        train(sgd(), DATA, 2, checkpoints=folder)
        train(sgd(), DATA, 2, checkpoints=folder)


def carried():
    net, x = dp.recurrent(dp.gru(3)), jnp.ones((4, 5, 2))
    step = dp.make_step(net, dp.regression(), optax.sgd(0.1), accumulate=2)
    begun = step.init(KEY, x)
    begun = begun._replace(state=net.start(begun.params, begun.state, x[:, :1], length=5))
    step.apply(begun, (x, jnp.ones((4, 5, 3))))


def patient(step, **options):
    return lambda: train(step, DATA, 1, patience=2, **options)


def growing():
    step = sgd(dp.serial(NET, GROWS))
    step.apply(step.init(KEY, XS), DATA[0])


def infinite():
    x, y = examples()
    x[3, 1] = np.inf
    train(sgd(), [(x, y)], 2)


class Words:
    """As another library's: its dtype has no name, and NumPy reads it."""

    dtype, shape = object(), (2,)

    def __array__(self, dtype=None, copy=None):
        return np.array(["a", "b"])


def worded(net, params, state, batch, *, key, train):
    return params["bias"].sum(), (state, {"kind": "good"})


def shows_batch(net, params, state, batch, *, key, train):
    return params["bias"].sum(), (state, {})


shows_batch.inputs = lambda batch: batch


def reusing():
    step = sgd()
    old = step.init(KEY, XS)
    step.apply(old, DATA[0])
    step.apply(old, DATA[0])


def breaking(steps, broken):
    """The loss of step `broken` is NaN; that of the last one is not, but its gradient."""
    def objective(net, params, state, batch, *, key, train):
        loss = params["bias"].sum() + jnp.where(batch[1].sum() == broken, jnp.nan, 0)
        root = jnp.sqrt(jnp.where(batch[1].sum() == 9, 0.0 * params["bias"][0], 1.0))
        return loss + root, (state, {"loss": loss})

    step = dp.make_step(NET, objective, optax.sgd(0.1))
    return lambda: train(step, [(XS, np.full(1, i + 1)) for i in range(steps)], steps)


def hooked(**extra):
    def update(updates, state, params, *, curvature, **more):
        return updates, state

    own = optax.GradientTransformationExtraArgs(lambda params: (), update)
    return dp.make_step(NET, dp.classification(), own)


SAM = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1))
PRIVATE = optax.contrib.differentially_private_aggregate(1.0, 0.1, 0)
STACKED = dp.make_step(dp.repeat(4, dp.linear(4)), dp.regression(), optax.stateless(
    lambda updates, params: jax.tree.map(lambda g: g.mean(0), updates)))
GATHERED = dp.make_step(NET, dp.classification(), optax.MultiSteps(
    optax.lookahead(optax.sgd(0.1), 2, 0.5), 2))
ASKING = dp.make_step(NET, dp.classification(), optax.lookahead(optax.polyak_sgd(), 2, 0.5))
MASKED = dp.make_step(NET, dp.classification(), optax.masked(
    optax.lbfgs(), lambda params: jax.tree.map(lambda a: a.ndim > 1, params)))
AVERAGED = dp.make_step(NET, dp.classification(), optax.lookahead(
    optax.contrib.schedule_free_sgd(0.1), 2, 0.5))
COUNTED = dp.make_step(NET, lambda net, params, state, batch, *, key, train: (
    params["bias"].sum(), (state, {"loss": params["bias"].sum(), "each": params["bias"]})),
    optax.sgd(0.1))

def answering(answer):
    """A step of an objective of one's own that returns something else."""
    def own(net, params, state, batch, *, key, train):
        return answer(params["bias"].sum(), state)

    step = dp.make_step(NET, own, optax.sgd(0.1))
    return lambda: jax.eval_shape(step.apply, jax.eval_shape(step.init, KEY, XS), DATA[0])


def maskless(output, target):
    return ((output - target) ** 2).mean()


def meaned(output, target, *, mask):
    return ((output - target) ** 2).mean()


GAME = dp.serial(one=NET, other=dp.batch_norm())
PLAYER = dp.training.Player(dp.classification(), optax.sgd(0.1))
FORM = ("return them: the new state of the net, and metrics by name, means over metrics['count'] "
        "entries, or over the examples without a count")


def forgetful(net, params, state, batch, *, key, train):
    return 0.0 * params["one"]["bias"].sum(), ({}, {})


def played(players, batch=DATA[0]):
    step = dp.training.make_game(GAME, players, inputs=lambda batch: batch[0])
    return lambda: jax.eval_shape(step.apply, jax.eval_shape(step.init, KEY, XS), batch)


EXAMPLES = {
    "wants a number of steps or of epochs, got neither; pass one of them":
        lambda: dp.fit(sgd(), DATA, key=KEY, progress=False),
    "wants non_finite out of None, raise, skip, got 'stop'; choose one of them":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1), non_finite="stop"),
    "wants non_finite=\"skip\" or None with loss_scale, got 'raise'; leave it out: a scale is "
    "found by steps that overflow":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1), non_finite="raise",
                             loss_scale=dp.training.LossScale()),
    "wants loss_scale as a LossScale, got 1024; pass dp.training.LossScale(), for example":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1), loss_scale=1024),
    "wants initial as a power of two from 1 to 2**64, got 1000.0; pass 2.0**15: other scales round "
    "the gradients":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1),
                             loss_scale=dp.training.LossScale(1000.0)),
    "wants period as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1),
                             loss_scale=dp.training.LossScale(period=0)),
    "wants a scale of the loss, to report it, got a step without one; pass "
    "loss_scale=dp.training.LossScale()":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1),
                             report=["loss_scale"]).init(KEY, XS),
    "wants a finite loss and gradient, got a non-finite loss and non-finite gradients of bias, "
    "kernel in step 1; lower the learning rate, check the data for NaN and ids out of range, or "
    'pass make_step(non_finite="skip")':
        lambda: train(sgd(non_finite="raise"), [(np.full_like(XS, np.nan), YS)], 1),
    "wants data with a length, for epochs, got <list_iterator...":
        lambda: dp.fit(sgd(), iter(DATA), epochs=1, key=KEY, progress=False),
    "wants checkpoints up to step 0, got one of step 2 in ...": taken_folder,
    "wants checkpoints as a folder or dp.runtime.Checkpoints, got 3; write "
    'checkpoints="run", for example':
        lambda: train(sgd(), DATA, 1, checkpoints=3),
    "wants arrays of one length, or a dict with x, for accumulate, got (float32[12,4], ...":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1), accumulate=2).apply(
            state(sgd()), (XS, YS, YS[:4])),
    "wants checkpoints to resume from, got none; name their folder: "
    'checkpoints="run"':
        lambda: train(sgd(), DATA, 1, resume=True),
    "wants data whose position can be saved, to resume, got <list>...":
        lambda: train(sgd(), DATA, 1, resume=True, checkpoints="never-made"),
    "wants a log as a path, log(step, metrics) or an observer (step, state, metrics), got 3; pass "
    'log="run.jsonl", or a list of such':
        lambda: train(sgd(), DATA, 1, log=3),
    "wants an objective of single examples for accumulate, got one that compares the examples of a "
    "batch; leave accumulate out: a part lacks the examples of the others":
        lambda: dp.make_step(NET, comparing, optax.sgd(0.1), accumulate=2).apply(
            state(sgd()), (XS, YS)),
    "wants a state without a stream for accumulate, got {...": carried,
    "wants an optimizer that keeps its learning rate, to report it, got one that does not; write "
    "optax.inject_hyperparams(optax.adam)(learning_rate=schedule)":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1),
                             report=["learning_rate"]).init(KEY, XS),
    "wants report as a list of names among gradient_norm, learning_rate, loss_scale, total_loss, "
    'got [\'lr\']; write report=["gradient_norm"], for example':
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1), report=["lr"]),
    "wants steps_per_call=1 for a net with convolutions on CPU, got more; leave it out: XLA's "
    "gradient of a convolution is many times slower in a loop":
        lambda: train(dp.make_step(SEEING, dp.regression(), optax.sgd(0.1), steps_per_call=2),
                      [(jnp.ones((2, 4, 4, 1)), jnp.ones((2, 4, 4, 2)))], 2, log_every=2),
    "wants log_every as a multiple of 4 steps per call, got 50; pass log_every=200, for example":
        lambda: train(dp.make_step(NET, dp.classification(), optax.sgd(0.1), steps_per_call=4),
                      DATA, 1),
    "wants a batch that can be cut into accumulate=2 equal parts, got one of 3 examples, ...":
        lambda: dp.make_step(NET, dp.classification(), optax.sgd(0.1), accumulate=2).apply(
            state(sgd()), (XS[:3], YS[:3])),
    # Objectives.
    "wants reduction out of mean, sum, got 'none'; choose one of them":
        lambda: dp.classification(reduction="none"),
    "wants label_smoothing in [0, 1), got 1.0; pass a fraction, not a percentage":
        lambda: dp.classification(label_smoothing=1.0),
    "wants top_k as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.classification(top_k=0),
    "wants k of at most 3, the number of classes, got 4; lower it":
        asked(dp.classification(top_k=4), DATA[0]),
    "wants a batch with x, y, mask, target_mask, sample_weight and side inputs of the net (none), "
    "got weight, x, y; rename or remove the rest":
        asked(dp.classification(), {"x": XS, "y": YS, "weight": X}),
    "wants a batch with x, y, mask, target_mask, sample_weight and side inputs of the net (none), "
    "got x; add y":
        asked(dp.classification(), {"x": XS}),
    "wants a batch with targets, got (float32[12,4], None); pass (x, y), y for the "
    "targets":
        asked(dp.classification(), (XS, None)),
    "wants a target of the prediction's shape (12, 3), got int32[12]; give both one shape: "
    "broadcasting would compare every pair":
        asked(dp.training.binary_classification(), DATA[0]),
    "wants metrics that are one number each, as kind, got 'good'; leave out the others":
        asked(checked(worded), DATA[0]),
    "wants objective.inputs as a function (net, batch), got <lambda training.py:93>; write "
    "lambda net, batch: (x, {}), with the input x of the net, and its side inputs in the dict":
        lambda: dp.make_step(NET, shows_batch, optax.sgd(0.1)),
    "wants a batch (x, y), or a dict with x and y, got (float32[2,4]); pass one of them":
        asked(dp.classification(), (X,)),
    "wants a mask of axes of x that the net keeps, got bool[12,5]; name it target_mask if it marks "
    "the valid targets: the net takes no mask":
        asked(dp.classification(), {"x": XS, "y": YS, "mask": bools(12, 5)}),
    "wants a mask of axes of x, which the net takes, got bool[12,3]; name it target_mask: it marks "
    "the valid targets":
        asked(dp.regression(), {"x": XS, "y": jnp.ones((12, 3)), "mask": bools(12, 3)},
              dp.hide() >> NET),
    "wants one array, got (float32[12,3], float32[12,3]); pick one part of it with a lambda":
        asked(dp.classification(), DATA[0], dp.branch(NET, NET)),
    "wants a target of the prediction's shape (12, 1), got int32[12]; drop the prediction's last "
    "axis: y[..., 0]":
        asked(dp.regression(), (XS, YS), dp.linear(1)),
    "wants a penalty as a function of params, got 0.1; write lambda params: rate * "
    "dp.losses.l2(params)":
        lambda: dp.training.penalized(dp.classification(), 0.1),
    "wants params of a net, got 0.1; write lambda params: rate * dp.losses.l2(params) for a "
    "penalty with a rate":
        lambda: dp.losses.l2(0.1),
    "wants a penalty that is one number, got float32[3]; sum it":
        asked(dp.training.penalized(dp.classification(), lambda p: p["bias"]), DATA[0]),
    "wants a pattern that matches a path (head/kernel), got '**/kernels'":
        lambda: dp.losses.l2({"head": {"kernel": X}}, "**/kernels"),
    "wants beta as a number of at least 0, got -1.0; pass 1.0 for the bound":
        lambda: dp.training.elbo(beta=-1.0),
    "wants a pair, the prediction and (mean, log_variance), got float32[12,3]; make the net by "
    "vae(encoder, decoder)":
        asked(dp.training.elbo(), (XS, XS)),
    "wants a pair (mean, log_variance) beside the prediction, got float32[12,3]; make the net by "
    "vae(encoder, decoder)":
        asked(dp.training.elbo(), (XS, XS), dp.branch(NET, NET)),
    "wants a log_variance of the shape of mean, (2, 4), got float32[2,1]; pass one "
    "variance per mean":
        lambda: dp.losses.gaussian_kl(X, X[:, :1]),
    "wants a sample_weight of the leading axes of (12,), got float32[2,4]; pass one number per "
    "example, or per entry":
        asked(dp.classification(), {"x": XS, "y": YS, "sample_weight": X}),
    "wants a sample_weight of the 12 examples, got float32[12,4]; pass one number per example: the "
    "entries of one have one loss":
        asked(dp.training.elbo(), {"x": XS, "y": XS, "sample_weight": XS}, LATENT),
    "wants a loss (output, target, *, mask), got maskless; let it take mask=None, True where "
    "valid, and return a number":
        lambda: dp.regression(maskless),
    "wants a loss as a function, got 'mse'; pass dp.losses.absolute_error, for example":
        lambda: dp.regression("mse"),
    "wants a net that returns logits, got one that ends in jax.nn.softmax; leave it out: the loss "
    "applies it, and predictions are jax.nn.softmax(net(params, x))":
        asked(dp.classification(), DATA[0], dp.serial(NET, jax.nn.softmax)),
    "wants labels as one array, got [0, 1]; convert them: jnp.asarray(labels)":
        lambda: dp.metrics.accuracy(jnp.ones((2, 3)), [0, 1]),
    "wants targets y as one array, got (int32[], int32[], int32[]); convert them: np.asarray(y)":
        asked(dp.classification(), (XS[:3], (0, 1, 2))),
    "wants labels as ints, got float32[12]; convert them: labels.astype(jnp.int32)":
        asked(dp.classification(), (XS, YS.astype(jnp.float32))),
    'wants a loss that returns one number per entry, (12, 3), with reduction="none", got '
    'meaned; let it take reduction="mean", and return the values before the mean if it is "none"':
        asked(dp.regression(meaned), {"x": XS, "y": jnp.ones((12, 3)), "sample_weight": YS}),
    # Objectives of one's own.
    f"wants an objective that returns loss, (state, metrics), got (float32[], {{}}); {FORM}":
        answering(lambda loss, state: (loss, state)),
    "wants a loss that is one float, got float32[3]; take its mean":
        answering(lambda loss, state: (loss * jnp.ones(3), (state, {}))),
    "wants a batch (x, y), a dict with x and y, or an objective with inputs, got a dict with z; "
    "set objective.inputs = lambda net, batch: (x, {}), with the input x of the net, and its side "
    "inputs in the dict":
        lambda: train(COMPARING, [{"z": XS}], 1),
    # Data.
    "wants data as an iterable of batches, got {x: float32[12,4], y: int32[12]}; pass "
    "batches(data, batch_size), or [batch] for a single one":
        lambda: train(sgd(), {"x": XS, "y": YS}, 1),
    "wants validation data as an iterable of batches, got 3; pass batches(data, batch_size), "
    "or [batch] for a single one":
        lambda: train(sgd(), DATA, 1, validation=3),
    "wants a key, got 0; pass jax.random.key(seed), and map over several by vmap":
        lambda: dp.fit(sgd(), DATA, key=0, steps=1),
    "wants a TrainState, got {bias: float32[3], kernel: float32[4,3]}; pass fit.state, or the "
    "result of step.init":
        lambda: train(sgd(), DATA, 1, state=state(sgd()).params),
    "wants the state of this optimizer, got that of another one; begin again: step.init(key, "
    "x)._replace(params=state.params, state=state.state)":
        lambda: train(dp.make_step(NET, dp.classification(), optax.adam(0.1)), DATA, 1,
                      state=state(sgd())),
    "wants arrays of one length along the first axis, got (float64[3], float64[4]); cut them to "
    "one length":
        lambda: dp.batches((np.ones(3), np.ones(4)), 2),
    "wants arrays with a batch axis, got [[1.0, 2.0], [3.0, 4.0]]; convert it: "
    "np.asarray(x)":
        lambda: dp.batches([[1.0, 2.0], [3.0, 4.0]], 1),
    "wants batch_size as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.batches(np.ones(3), 0),
    # The loop.
    "wants a key to begin with or a state to go on from, got neither; pass one of them":
        lambda: dp.fit(sgd(), DATA, steps=1, progress=False),
    "wants a key to begin with or a state to go on from, got both; pass one of them":
        lambda: dp.fit(sgd(), DATA, key=KEY, state=state(sgd()), steps=1, progress=False),
    "wants steps as an int of at least 1, got 2.0; pass a Python int":
        lambda: dp.fit(sgd(), DATA, key=KEY, steps=2.0, progress=False),
    "wants params kernel as float32[4,3], got float32[5,3]":
        lambda: train(sgd(), DATA, 1, state=sgd().init(KEY, jnp.ones((2, 5)))),
    "wants params with bias, got other":
        lambda: train(sgd(), DATA, 1, state=state(sgd())._replace(params={"other": X})),
    "wants state with batch_norm_0/mean, got none":
        lambda: train(NORMED, DATA, 1, state=state(NORMED)._replace(state={})),
    "wants at least one batch, got none; pass an iterable that can be iterated again, such as "
    "batches(...)":
        lambda: dp.evaluate(sgd(), state(sgd()), []),
    "wants a batch for every step, got data that ended; pass an iterable that can be iterated "
    "again, such as batches(...)":
        lambda: train(sgd(), iter(DATA * 2), 3),
    "wants patience as an int of at least 1, got 0; pass 1 or more":
        lambda: train(sgd(), DATA, 1, patience=0, validation=DATA),
    "wants validation data for patience, got none; pass Validation(batches(...), patience=...)":
        patient(sgd()),
    "wants a metric named loss for patience, got one/accuracy, one/loss; return it from "
    "the objective, or name another: Validation(metric=)":
        patient(dp.training.make_game(dp.serial(one=NET), {"one": PLAYER},
            inputs=lambda batch: batch[0]),
                validation=DATA),
    "wants a finite loss, got nan by step 1, with finite parameters; look for NaN and for labels "
    "outside their range in the data":
        lambda: train(sgd(), [(XS, YS + 1)], 1),
    "wants a finite loss, got nan by step 2, at first in step 1, with non-finite bias, kernel; "
    "lower the learning rate, check the data for NaN and ids out of range, or name the "
    'gradients that broke by make_step(non_finite="raise")':
        infinite,
    "grows_0 (grows): wants a state of unchanged structure, {some: float32[]}, got {some: "
    "float32[], more: float32[]}; let apply return the given state, with new values":
        growing,
    "wants an optax transformation as optimizer, got adam; pass optax.adam(1e-3), for example":
        lambda: dp.make_step(NET, dp.classification(), optax.adam),
    "wants an objective (net, params, state, batch, *, key, train), got classification; pass "
    "dp.classification(), for example":
        lambda: dp.make_step(NET, dp.classification, optax.sgd(0.1)),
    "wants a TrainState, got {}; pass fit.state, or the result of step.init":
        lambda: dp.evaluate(sgd(), {}, DATA),
    "wants batches of one size, 5, for an objective across examples, got one of 2; leave the last "
    "examples out, or choose a batch_size that divides them":
        lambda: dp.evaluate(COMPARING, state(COMPARING), dp.batches(DATA[0], 5)),
    "wants arrays of one length along the first axis, got (float32[12,4], int32[3]); give each a "
    "batch axis":
        lambda: dp.predict(NET, params(NET, XS), (XS, YS[:3])),
    "wants outputs with an axis of the 5 examples, got float32[15]; keep examples apart from other "
    "axes":
        lambda: dp.predict(FLAT, params(FLAT, XS), XS, batch_size=5),
    "conv_0 (conv(2, 3)): wants examples along axis 0, unmixed in inference, got "
    "float32[12,4,4]; give x a batch axis, and grey images a channel axis, x[..., None], or pass "
    "check_axes=False if axis 0 may be mixed":
        lambda: dp.predict(SEEING, params(SEEING, IMAGES[0]), IMAGES[0]),
    "conv_0 (conv(2, 3)): wants images with channels last, (batch, height, width, channels), got "
    "float32[2,3,4,4]; write jnp.moveaxis(x, 1, -1), or pass check_axes=False if axis 1 is the "
    "height":
        lambda: dp.predict(SEEING, params(SEEING, IMAGES[1]), IMAGES[1]),
    "wants an optimizer of one gradient a step, got optax.contrib.sam, whose intermediate steps "
    "leave the parameters; write your own step with two gradients: the second at params moved by "
    "the first":
        lambda: dp.make_step(NET, dp.classification(), SAM).init(KEY, XS),
    "wants an optimizer of one gradient a step, got "
    "optax.contrib.differentially_private_aggregate, which takes one per example; write your own "
    "step: optimizer.update(dp.gradients.per_example_gradients(...), opt_state)":
        lambda: dp.make_step(NET, dp.classification(), PRIVATE).init(KEY, XS),
    "wants an optimizer whose extra arguments are value, grad and value_fn, got one that raises "
    "\"...": lambda: hooked().apply(state(hooked()), DATA[0]),
    "wants an update of bias of its shape, float32[4,4], got float32[4]; write your own step with "
    "per_example_gradients, if the optimizer takes axis 0 for the batch axis":
        lambda: jax.eval_shape(STACKED.apply, state(STACKED), (XS, XS)),
    "wants lookahead around all other optimizers, got one around it or beside it; write "
    "optax.lookahead(optax.chain(...), ...), with accumulation, skipping and decay inside":
        lambda: jax.eval_shape(GATHERED.apply, state(GATHERED), DATA[0]),
    "wants an optimizer in lookahead that takes the gradient alone, got one that raises \"...":
        lambda: jax.eval_shape(ASKING.apply, state(ASKING), DATA[0]),
    "wants one slow average, got those of lookahead and of schedule_free; leave out one of them: "
    "inference uses one set of parameters":
        lambda: state(AVERAGED),
    "wants a gradient masked as the updates are, got masked or partition around a line search, "
    "which compares both; pass mask_compatible_extra_args=True to it":
        lambda: jax.eval_shape(MASKED.apply, state(MASKED), DATA[0]),
    "wants a state that was not donated, got one that was donated to a later step; keep a "
    "copy, jax.tree.map(jnp.copy, state), or continue from the state that the step returned: "
    "make_step(..., donate=False) keeps all states":
        reusing,
    "wants a Step, got linear(3); pass make_step(net, objective, optimizer)":
        lambda: dp.evaluate(NET, state(sgd()), DATA),
    "wants a net to predict by, got a Step; write predict(step.net, step.eval_params(state), x, "
    "state=state.state)":
        lambda: dp.predict(sgd(), state(sgd()), XS),
    "wants metrics that are one number each, as each, got float32[3]; take its mean, or return its "
    "entries under names of their own":
        lambda: train(COUNTED, DATA, 1),
    "wants data as an iterable of batches, got (float32[12,4], int32[12]); pass "
    "batches(data, batch_size), or [batch] for a single one":
        lambda: train(sgd(), DATA[0], 1),
    "wants validation data as an iterable of batches, got <lambda training.py...":
        lambda: train(sgd(), DATA, 1, validation=lambda: DATA),
    "wants a net, as in predict(net, params, x), got {}; pass the layer whose init made the "
    "parameters":
        lambda: dp.predict({}, NET, XS),
    "wants a key, got float32[12,4]; pass jax.random.key(seed), and map over several by vmap":
        lambda: sgd().init(XS, KEY),
    "wants validation data that ends, got endless batches(..., seed=...); write "
    "batches(..., epochs=1)":
        lambda: train(sgd(), DATA, 1, validation=dp.batches(DATA[0], 4, seed=0)),
    "wants epochs as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.batches(XS, 4, epochs=0),
    "wants a batch of arrays of numbers, got str32[2]; convert it by np.asarray, and strings to "
    "numbers":
        lambda: train(sgd(), [(XS, Words())], 1),
    "wants finite parameters, got non-finite bias after step 9; lower the learning rate, check "
    "the data for NaN and ids out of range, or name the gradients that broke by "
    'make_step(non_finite="raise")':
        breaking(9, 10),
    "wants a finite loss, got nan by step 5, at first in step 3, with finite parameters; look for "
    "NaN and for labels outside their range in the data":
        breaking(5, 3),
    "wants a metric named f1 for best, got accuracy, loss; return it from the objective, or "
    "name another: Validation(metric=)":
        lambda: train(sgd(), DATA, 1, validation=DATA, metric="f1"),
    "wants a history with the reading of best, of step 0, got one of steps none; pass the Fit "
    "unchanged, or Fit(state, None, []) to search for the best again":
        lambda: train(sgd(), DATA, 1, state=dp.training.Fit(state(sgd()), state(sgd()), [])),
    # Games.
    "wants at least one player, got none; name a child of the net and its Player":
        lambda: dp.training.make_game(GAME, {}),
    "wants children that are frozen, pinned or reparametrized one by one, got "
    "freeze(serial(one=linear(2))); put freeze, pin or lora around a child: objectives call the "
    "children":
        lambda: dp.training.make_game(dp.freeze(dp.serial(one=dp.linear(2))), {"one": PLAYER}),
    "wants players among the children (one, other), got 'ones'; correct the name, or name the "
    "child: serial(generator=...)":
        lambda: dp.training.make_game(GAME, {"ones": PLAYER}),
    "wants a Player for one, got classification; pass Player(objective, optimizer)":
        lambda: dp.training.make_game(GAME, {"one": dp.classification}),
    "wants steps as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.training.make_game(GAME, {"one": PLAYER._replace(steps=0)}),
    "wants a player for every child with parameters, got none for other; add it to players, or "
    "keep parameters without one in an objective":
        played({"one": PLAYER}),
    "wants a batch of 5 equal parts, the largest steps= of a player, got float32[12,4]; choose "
    "another batch_size":
        played({"one": PLAYER._replace(steps=5), "other": PLAYER}),
    "wants a state of unchanged structure for other, {mean: float32[3], var: float32[3]}, got "
    "{}; return the same structure with new values":
        played({"one": PLAYER, "other": dp.training.Player(forgetful, optax.sgd(0.1))}),
}
