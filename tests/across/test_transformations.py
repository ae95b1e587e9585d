"""Every Case is traced under each transformation and setting of JAX; nothing is compiled.

A new Case inherits the table. What cannot go through a row says so in the Case, by `exempt`.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from support.comparing import same
from support.tracing import KEY, PRECISIONS, given, gradient, shapes, trace, trace_forward, training

import diffprog as dp
from diffprog.core.dtypes import cast


def rank(of, whole):
    """No operation widens an operand by axes that are not written down."""
    with jax.numpy_rank_promotion("raise"):
        (trace if whole else trace_forward)(of)


def strict(of, whole):
    """No operation casts an operand without a word."""
    with jax.numpy_dtype_promotion("strict"):
        (trace if whole else trace_forward)(of)


def vmap(of, whole):
    """Over inputs; as a whole over parameters too, and with gradients."""
    layer, *values = of.layer, of.params, of.x, of.state, KEY, of.side
    f = gradient(layer) if whole else training(layer)
    for over in (0, 1) if whole and jax.tree.leaves(of.params) else (1,):
        axes = [0 if place == over else None for place in range(len(values))]
        stacked = [shapes(value, more=(2,)) if place == over else value
                   for place, value in enumerate(values)]
        jax.eval_shape(jax.vmap(f, axes), *stacked)


# Rows, and the precision in which each is tried first: what is cast stands beside 16 bits.
ROWS = {"rank": rank, "strict": strict, "vmap": vmap}
FIRST = {"rank": "float32", "strict": "bfloat16", "vmap": "float32"}


def through(row, case, precision, whole):
    """Send a case through a row; what is exempt from it is refused in words."""
    if row in case.exempt:
        with pytest.raises(dp.LayerError):
            ROWS[row](given(case, precision), whole)
    else:
        ROWS[row](given(case, precision), whole)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_goes_through_every_row(case, row):
    """What is made of layers that have cases of their own is called; those as a whole."""
    through(row, case, FIRST[row], whole=row != "vmap" and not case.slow)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "precision"), [
    *itertools.product(("rank", "strict"), PRECISIONS), ("vmap", "float32")])
def test_every_case_goes_through_every_row_in_every_precision(row, precision):
    for case in CASES:
        through(row, case, precision, whole=True)


def test_few_cases_are_exempt():
    exempt = [(row, why) for case in CASES for row, why in case.exempt.items()]
    assert len(exempt) <= 10 and all(why for _, why in exempt)


# Tools.

def in_words():
    """Nothing is joined that is not written down."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    stack.enter_context(jax.numpy_dtype_promotion("strict"))
    return stack


IDS = jnp.ones((2, 5), jnp.int32)
REAL = jnp.ones((2, 5), bool)
NET = dp.serial(dp.linear(3), dp.batch_norm(), jnp.tanh, dp.dropout(0.5), dp.linear(3))
PLAIN = dp.linear(3) >> jnp.tanh >> dp.linear(3)
GPT = dp.models.gpt(11, length=12, width=8, depth=2, heads=2, hidden=12)
DENOISER = dp.models.dit(1, width=8, depth=1, heads=2, hidden=12, classes=3)
SCHEDULE = dp.diffusion.cosine_noise(8)


def scores(dtype, classes=7):
    return jnp.ones((2, 5, classes), dtype)


def stepped(objective, *batches, net=NET, optimizer=None):
    """Trace the beginning, a step and the measure at rest of training on each batch."""
    step = dp.make_step(net, objective, optimizer or optax.adamw(1e-3))
    for batch in batches:
        x, side = step.inputs(batch)
        state = step.init(jax.random.key(0), x, **side)
        step.apply(state, batch)
        step.evaluate(state, batch)


def played(dtype):
    score = dp.serial(generator=dp.linear(3), critic=dp.linear(1))

    def objective(net, params, state, x, *, key, train):
        y = net(params, x, state=state)
        return y.mean(), (state, {"loss": y.mean()})

    players = {name: dp.training.Player(objective, optax.adam(0.1), steps=steps)
               for name, steps in (("generator", 1), ("critic", 2))}
    game = dp.training.make_game(score, players)
    x = jnp.ones((4, 2), dtype)
    state = game.init(jax.random.key(0), x)
    game.apply(state, x)
    game.evaluate(state, x)


def curved(dtype):
    x = jnp.ones((2, 4), dtype)
    params, state = PLAIN.init(jax.random.key(0), x)
    forward = lambda params: PLAIN(params, x)  # noqa: E731
    loss = lambda y: dp.losses.cross_entropy(y, jnp.ones(2, jnp.int32))  # noqa: E731
    dp.gradients.hessian_product(lambda params: loss(forward(params)), params, params)
    dp.gradients.gauss_newton_product(forward, loss, params, params)
    for distribution in ("bernoulli", "categorical", "gaussian"):
        dp.gradients.fisher_product(forward, params, params, distribution=distribution,
                          mask=jnp.ones(2, bool))
    batch = {"x": x, "y": jnp.ones(2, jnp.int32)}
    dp.gradients.per_example_gradients(PLAIN, dp.classification(), params, state, batch)
    dp.gradients.per_example_gradient_norms(PLAIN, dp.classification(), params, state, batch,
        batch_size=2)
    dp.gradients.tangent_kernel(PLAIN, params, x)


def written(dtype):
    params = cast(GPT.init(jax.random.key(0), IDS)[0], dtype)
    prompts = [[1, 2, 3], [4]]
    dp.text.generate(GPT, params, prompts, 3, stop_tokens=[0])
    dp.text.generate(GPT, params, prompts, 3, key=jax.random.key(0), temperature=0.5, top_k=4,
        top_p=0.9)
    dp.text.beam_search(GPT, params, prompts, 3, beams=2, length_penalty=0.6, stop_tokens=[0])
    dp.text.sample(jax.random.key(0), scores(dtype), temperature=0.5, top_k=3, top_p=0.9)


def dreamed(dtype):
    x, labels = jnp.ones((2, 4, 4, 1), dtype), jnp.ones(2, jnp.int32)
    side = {"time": labels, "condition": labels}
    params, _ = DENOISER.init(jax.random.key(0), x, **side)
    key = jax.random.key(0)
    dp.diffusion.add_noise(x, x, SCHEDULE, labels)
    for walk in (dp.diffusion.ddpm, functools.partial(dp.diffusion.ddim, eta=0.5)):
        walk(DENOISER, params, x, SCHEDULE, key=key, steps=2, guidance_scale=2.0, null_class=3,
             condition=labels)
        walk(DENOISER, params, x, SCHEDULE, key=key, predict="velocity", condition=labels)
    stepped(dp.diffusion.denoising(SCHEDULE, null_class=3), {"x": x, "condition": labels},
        net=DENOISER)
    stepped(dp.diffusion.denoising(SCHEDULE, predict="velocity"), x, net=DENOISER)


def compared(dtype):
    """Every loss, by every reduction."""
    logits, labels, soft = scores(dtype), IDS, scores(dtype) / 7
    weights = jnp.ones(7)
    for options in ({"reduction": "mean"}, {"reduction": "sum", "mask": REAL[:, 0]},
                    {"reduction": "none", "mask": REAL}):
        dp.losses.cross_entropy(logits, labels, label_smoothing=0.1, class_weights=weights,
            ignore_index=-100,
                         **options)
        dp.losses.cross_entropy(logits, soft, label_smoothing=0.1, class_weights=weights, **options)
        dp.losses.linear_cross_entropy(scores(dtype, 3), jnp.ones((3, 7)), labels, bias=weights,
            chunk=3,
                                ignore_index=-100, **options)
        for loss in (dp.losses.binary_cross_entropy, dp.losses.squared_error,
            dp.losses.absolute_error, dp.losses.huber,
                     dp.losses.kl_divergence):
            loss(logits, soft, **options)
            loss(logits, soft.astype(jnp.float32), **options)
        dp.losses.gaussian_kl(logits, logits, **options)
    dp.losses.binary_cross_entropy(logits, IDS[..., None] * jnp.ones((1, 1, 7), jnp.int32))
    dp.losses.ctc(logits, labels[:, :2])
    dp.losses.ctc(logits, labels[:, :2], mask=REAL, label_mask=REAL[:, :2], reduction="none")


def measured(dtype):
    logits, labels = scores(dtype), IDS
    for options in ({}, {"mask": REAL, "ignore_index": -100}):
        dp.metrics.accuracy(logits, labels, **options)
        dp.metrics.top_k_accuracy(logits, labels, k=3, **options)
        dp.metrics.confusion_matrix(logits, labels, **options)


def trained(dtype):
    """Every objective, in a step."""
    x, y = jnp.ones((4, 5), dtype), jnp.ones(4, jnp.int32)
    penalized = dp.training.penalized(dp.classification(), lambda params: 1e-4
        * dp.losses.l2(params)
                             + 1e-4 * dp.losses.l1(params))
    stepped(dp.classification(label_smoothing=0.1, class_weights=jnp.ones(3), ignore_index=-100,
        top_k=2),
            (x, y), {"x": x, "y": y, "target_mask": y > 0})
    stepped(penalized, (x, y), net=dp.mixed(NET, jnp.bfloat16))
    stepped(dp.classification(), (x, jnp.ones((4, 3)) / 3), net=dp.freeze(NET, "linear_0/**"))
    stepped(dp.training.binary_classification(), (x, jnp.ones((4, 3), jnp.int32)))
    stepped(dp.regression(dp.losses.huber), (x, jnp.ones((4, 3))), optimizer=optax.adam(0.1))
    latent = dp.branch(dp.linear(2), dp.linear(2))
    stepped(dp.training.elbo(), (x, x), net=dp.models.vae(latent, dp.linear(5)))


def told(dtype):
    """Objectives of text."""
    net = GPT if dtype == jnp.float32 else dp.mixed(GPT, dtype)
    batch = {"x": IDS, "mask": REAL, "segments": IDS, "asked": REAL}
    for objective in (dp.text.next_token(label_smoothing=0.1),
                      dp.text.chunked_next_token("trunk", "embed/embedding", chunk=4)):
        stepped(objective, batch, net=net)
    bert = dp.models.bert_pretraining(11, length=8, width=8, depth=1, heads=2, hidden=12)
    key = jax.random.key(0)
    x, y = dp.text.mask_tokens(key, IDS, vocabulary=11, mask_token=9, special_tokens=[0], mask=REAL)
    stepped(dp.text.masked_language(), {"x": x, "y": (y, IDS[:, 0]), "mask": REAL},
            net=bert if dtype == jnp.float32 else dp.mixed(bert, dtype))


def reached(dtype):
    x = jnp.ones((2, 4), dtype)
    net = dp.linearize(dp.lora(PLAIN, 1))
    dp.tree.merge(net, *net.init(jax.random.key(0), x))


USES = {"losses": compared, "metrics": measured, "objectives": trained, "text": told,
        "games": played, "curvature": curved, "generation": written, "diffusion": dreamed,
        "merging": reached}


@pytest.mark.parametrize("dtype", [
    jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)], ids=lambda t: t.__name__)
@pytest.mark.parametrize("use", [
    pytest.param(use, marks=[pytest.mark.slow] * (use in ("text", "objectives", "diffusion")))
    for use in USES])
def test_every_tool_joins_shapes_and_dtypes_in_words(use, dtype):
    with in_words():
        jax.eval_shape(functools.partial(USES[use], dtype))


@pytest.mark.parametrize("use", [
    pytest.param(use, marks=[pytest.mark.slow] * (use not in ("metrics", "losses", "merging")))
    for use in USES])
@pytest.mark.parametrize("dtype", [
    jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.slow)], ids=lambda t: t.__name__)
def test_every_tool_counts_in_words_where_64_bits_are_allowed(use, dtype):
    """What is counted is of 64 bits there, unless it is said, and ids are of 32."""
    with in_words(), jax.enable_x64(True):
        jax.eval_shape(functools.partial(USES[use], dtype))


@pytest.mark.parametrize("name", [
    "batch_norm, masked", "self_attention, streaming",
    pytest.param(None, id="all", marks=pytest.mark.slow)])
def test_cases_count_in_words_where_64_bits_are_allowed(name):
    with jax.enable_x64(True):
        for case in CASES:
            if name in (None, case.name):
                strict(given(case), whole=not case.slow)


# Values.

COMPILED = ["cells", "recurrent with segments", "self_attention, window", "repeat with state",
            "hyper", "fixed_point", "weight_norm", "gpt", "unet", "transformer", "seq2seq"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("name", COMPILED)
def test_values_are_those_of_the_default(name, precision):
    case = next(case for case in CASES if case.name == name)
    layer, key = given(case, precision).layer, jax.random.key(0)
    x = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jax.random.normal(
        key, a.shape, a.dtype), case.x)

    def found():
        params, state = layer.init(key, x, **case.side)
        y, _ = jax.jit(layer.apply)(params, state, x, **case.side)
        return y, jax.jit(gradient(layer))(params, x, state, key, case.side)

    with in_words():
        strict = found()
    same(*jax.tree.map(np.asarray, (strict, found())))


@pytest.mark.slow
def test_tools_give_the_values_of_the_default():
    def found():
        x, y = np.sin(np.arange(24.0, dtype=np.float32)).reshape(6, 4), np.arange(6) % 3
        step = dp.make_step(NET, dp.classification(), optax.adamw(1e-2))
        fit = dp.fit(step, dp.batches((x, y), 3, seed=0), key=jax.random.key(0), steps=4,
                     validation=dp.batches((x, y), 4), progress=False)
        params, state = fit.state.params, fit.state.state
        flow = dp.inspection.gradient_flow(NET, dp.classification(), params, (x, y), state=state,
                                key=jax.random.key(1))
        dp.gradients.check_gradients(lambda x: dp.losses.squared_error(x, 2 * x), x)
        dp.check(PLAIN, jnp.asarray(x))
        dp.summary(NET, x)
        dp.inspection.diagram(NET, x)
        ids = GPT.init(jax.random.key(0), IDS)[0]
        written = dp.text.generate(GPT, ids, [[1, 2, 3], [4]], 3, stop_tokens=[0])
        return (params, dp.evaluate(step, fit.state, [(x, y)]),
                dp.predict(NET, params, x, state=state, batch_size=4),
                [row.gradient for row in flow.rows], written)

    with in_words():
        strict = found()
    same(*jax.tree.map(np.asarray, (strict, found())))
