"""Attention by cuDNN's kernel: all derivatives, batching, and where the kernel is used.

A CPU has no cuDNN. A stand-in kernel computes the same from the same residuals, and JAX can neither
differentiate it twice nor batch it. Programs for CUDA are lowered, and their text is searched.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.extend.core import Primitive
from jax.interpreters import mlir
from support.comparing import KEY, close, drawn

import diffprog as dp
from diffprog.layers.attention import dot_product as module
from diffprog.layers.attention import fused
from diffprog.layers.attention.dot_product import Pattern, dot_product
from diffprog.training.mixing import mixes

STEPS, CAUSAL = 4, Pattern(causal=True)
RIGHT = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)


# The stand-in kernel.

def weights(query, key, lengths, causal, window):
    """The logarithms of the unnormalized weights, (B, H, T, S)."""
    scores = jnp.einsum("bthd,bshd->bhts", query, key)
    behind = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
    seen = (behind >= 0 if causal else behind == behind) & (behind < (window or 10**6))
    return jnp.where(seen & (jnp.arange(key.shape[1]) < lengths[:, None, None, None]), scores,
                     -jnp.inf)


def shared(a, heads):
    return jnp.repeat(a, heads // a.shape[2], 2)


def forward(query, key, value, lengths, **pattern):
    scores = weights(query, shared(key, query.shape[2]), lengths, **pattern)
    total = jax.nn.logsumexp(scores, -1)
    y = jnp.einsum("bhts,bshe->bthe", jnp.exp(scores - total[..., None]),
                   shared(value, query.shape[2]))
    return [y, total]


def backward(query, key, value, lengths, y, total, of_y, **pattern):
    """As in FlashAttention, from y and the log-sum-exp of the scores."""
    heads = query.shape[2]
    k, v = shared(key, heads), shared(value, heads)
    normalized = jnp.exp(weights(query, k, lengths, **pattern) - total[..., None])
    less = jnp.einsum("bthe,bthe->bht", of_y, y)[..., None]
    of_scores = normalized * (jnp.einsum("bthe,bshe->bhts", of_y, v) - less)
    grouped = lambda a: a.reshape(*key.shape[:3], -1, a.shape[-1]).sum(3)  # noqa: E731
    return [jnp.einsum("bhts,bshd->bthd", of_scores, k),
            grouped(jnp.einsum("bhts,bthd->bshd", of_scores, query)),
            grouped(jnp.einsum("bhts,bthe->bshe", normalized, of_y))]


def opaque(name, f, shapes):
    """A primitive without rules of differentiation or batching."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, mlir.lower_fun(f, multiple_results=True))
    return primitive


def like(a, *shape, dtype=None):
    return a.update(shape=shape, dtype=dtype or a.dtype, weak_type=False)


FORWARD = opaque("kernel_forward", forward, lambda q, k, v, lengths, **_: [
    like(q, *q.shape), like(q, q.shape[0], q.shape[2], q.shape[1])])
BACKWARD = opaque("kernel_backward", backward, lambda *avals, **_: list(avals[:3]))


def stand_in(query, key, value, *, scale, is_causal, key_value_seq_lengths, local_window_size,
             implementation):
    assert implementation == "cudnn" and scale == 1.0
    pattern = {"causal": is_causal, "window": local_window_size and local_window_size[0] + 1}
    lengths = key_value_seq_lengths
    if lengths is None:
        lengths = jnp.full(key.shape[0], key.shape[1])

    @jax.custom_vjp
    def run(*qkv):
        return FORWARD.bind(*qkv, lengths, **pattern)[0]

    def kept(*qkv):
        y, total = FORWARD.bind(*qkv, lengths, **pattern)
        return y, (*qkv, lengths, y, total, jnp.zeros(0, y.dtype))

    def back(kept, of_y):
        return tuple(BACKWARD.bind(*kept[:-1], of_y, **pattern))

    run.defvjp(kept, back)
    return run(query, key, value)


@pytest.fixture
def kernel(monkeypatch):
    """The stand-in kernel is used on this CPU, for all dtypes and features."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(fused, "PLATFORM", "cpu")
    monkeypatch.setattr(module, "_cudnn_wants", lambda *_: "")
    dot_product.clear_cache()
    yield
    dot_product.clear_cache()


def by(way, pattern=CAUSAL):
    return lambda *qkv: dot_product(*qkv, pattern, implementation=way)


def inputs(features=3, value_features=5, groups=1, batch=(2,)):
    return (drawn(*batch, 2, STEPS, features), drawn(*batch, groups, STEPS, features, seed=1),
            drawn(*batch, groups, STEPS, value_features, seed=2))


def test_the_stand_in_kernel_has_one_derivative_and_no_batching():
    given = [drawn(2, STEPS, 2, 3, seed=i) for i in range(3)]
    run = lambda *qkv: stand_in(  # noqa: E731
        *qkv, scale=1.0, is_causal=True, key_value_seq_lengths=None, local_window_size=None,
        implementation="cudnn").sum()
    jax.eval_shape(jax.grad(run), *given)
    for refused in (
        lambda *qkv: jax.jvp(run, qkv, qkv), lambda *qkv: jax.linearize(run, *qkv)[1](*qkv),
        jax.hessian(run), jax.grad(lambda *qkv: jax.grad(run)(*qkv).sum()),
        lambda *qkv: jax.vmap(run)(*(a[None] for a in qkv)),
    ):
        with pytest.raises((TypeError, NotImplementedError), match=r"kernel_|forward-mode"):
            jax.jit(refused).lower(*given)


# Values and all derivatives.

PATTERNS = {
    "all": Pattern(),
    "causal": CAUSAL,
    "window": Pattern(causal=True, window=2),
    "right": Pattern(valid=RIGHT, empty=True),
    "right, causal": Pattern(causal=True, valid=RIGHT, empty=True),
    "left": Pattern(causal=True, valid=RIGHT[:, ::-1], empty=True),
    "middle": Pattern(valid=np.array([[1, 0, 1, 1], [1, 1, 1, 0]], bool), empty=True),
    "right in one row alone": Pattern(valid=np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool),
                                      empty=True),
    "no valid key in one row": Pattern(valid=np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool),
                                       empty=True),
    "all valid": Pattern(causal=True, valid=np.ones((2, STEPS), bool), empty=True),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_values_and_gradients_equal_the_formula(name, kernel):
    def both(way):
        run = lambda *qkv: jnp.sin(by(way, PATTERNS[name])(*qkv))  # noqa: E731
        return run(*given), jax.grad(lambda *qkv: run(*qkv).sum(), (0, 1, 2))(*given)

    with jax.enable_x64(True):
        given = inputs()
        close(*jax.jit(lambda: [both(way) for way in ("cudnn", "xla")])())


def along(f, given):
    """The arguments of `DERIVATIVES`: q, a direction u, (k, v), y(q), and a scalar of q."""
    q, *kv = given
    u = drawn(*q.shape, seed=7)
    total = lambda q, kv=kv: jnp.sin(f(q, *kv)).sum()  # noqa: E731
    return q, u, kv, lambda q: f(q, *kv), total


# name -> a derivative of f = softmax(q k^T) v
DERIVATIVES = {
    "jvp": lambda f, q, u, kv, y, total: jax.jvp(f, (q, *kv), (u, *kv)),
    "linearize": lambda f, q, u, kv, y, total: jax.linearize(y, q)[1](u),
    "its transpose": lambda f, q, u, kv, y, total: jax.linear_transpose(
        jax.linearize(y, q)[1], q)(y(q)),
    "the transpose of vjp": lambda f, q, u, kv, y, total: jax.linear_transpose(
        jax.vjp(y, q)[1], y(q))((u,)),
    "jacfwd": lambda f, q, u, kv, y, total: jax.jacfwd(y)(q),
    "jacrev": lambda f, q, u, kv, y, total: jax.jacrev(f, (0, 1, 2))(q, *kv),
    "forward over reverse": lambda f, q, u, kv, y, total: jax.jvp(jax.grad(total), (q,), (u,)),
    "reverse over forward": lambda f, q, u, kv, y, total: jax.grad(
        lambda q: jax.jvp(total, (q,), (u,))[1])(q),
    "reverse over reverse": lambda f, q, u, kv, y, total: jax.grad(
        lambda q, kv: (jax.grad(total)(q, kv) * u).sum(), (0, 1))(q, kv),
    "hessian": lambda f, q, u, kv, y, total: jax.hessian(total)(q),
    "third": lambda f, q, u, kv, y, total: jax.grad(lambda q: jax.jvp(
        lambda q: jax.jvp(total, (q,), (u,))[1], (q,), (u,))[1])(q),
    "a batch": lambda f, q, u, kv, y, total: jax.vmap(f)(*(jnp.stack([a, 2 * a]) for a in (
        q, *kv))),
    "a batch that shares a memory": lambda f, q, u, kv, y, total: jax.vmap(
        f, (1, None, None), 1)(jnp.stack([q, u], 1), *kv),
    "of each": lambda f, q, u, kv, y, total: jax.vmap(jax.grad(total))(jnp.stack([q, u])),
    "of a batch": lambda f, q, u, kv, y, total: jax.grad(
        lambda kv: jax.vmap(total, (0, None))(jnp.stack([q, u]), kv).sum())(kv),
    "of batches of batches": lambda f, q, u, kv, y, total: jax.grad(lambda kv: jax.vmap(
        jax.vmap(total, (0, None)), (None, 0))(jnp.stack([q, u]), kv).sum())(
            [jnp.stack([a, -a]) for a in kv]),
    "in a scan": lambda f, q, u, kv, y, total: jax.grad(lambda q: jax.lax.scan(
        lambda q, _: (q[..., :1] * y(q)[..., :3], None), q, length=3)[0].sum())(q),
    "checkpoint": lambda f, q, u, kv, y, total: jax.grad(jax.checkpoint(total))(q),
    "without jit": lambda f, q, u, kv, y, total: jax.grad(total)(q),
}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [
    "causal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("right", "left"))])
def test_every_derivative_equals_the_formula(pattern, kernel):
    """With padding on the left the formula is used."""
    with jax.enable_x64(True):
        given = inputs()
        found, wanted = jax.jit(lambda: [
            {name: f(by(way, PATTERNS[pattern]), *along(by(way, PATTERNS[pattern]), given))
             for name, f in DERIVATIVES.items()} for way in ("cudnn", "xla")])()
        for name in DERIVATIVES:
            close(found[name], wanted[name])


# Where programs call the kernel.

@pytest.fixture
def hopper(monkeypatch):
    """Functions are traced as for a Hopper with cuDNN."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(module, "_on_hopper", lambda: True)
    dot_product.clear_cache()
    yield
    dot_product.clear_cache()


def calls(f, *given, platform="cuda"):
    """How often a program calls the kernel, forwards and backwards."""
    text = jax.jit(f).trace(*given).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"@__cudnn\$fmhaSoftmax(\w*)\(", text)
    return found.count(""), found.count("Backward")


def halves(features=8, value_features=8, **sizes):
    return tuple(jnp.bfloat16(a) for a in inputs(features, value_features, **sizes))


def total(pattern):
    return lambda *qkv: by(None, pattern)(*qkv).astype(jnp.float32).sum()


def slopes(pattern):
    return jax.value_and_grad(total(pattern), (0, 1, 2))


PROGRAMS = {  # name -> a function, its operands, how often it calls the kernel on CUDA
    "value": (by(None), halves(), (1, 0)),
    "gradient": (slopes(CAUSAL), halves(), (1, 1)),
    "window": (slopes(PATTERNS["window"]), halves(), (1, 1)),
    "wide heads": (slopes(CAUSAL), halves(256, 256), (1, 1)),
    "fewer features of values": (slopes(CAUSAL), halves(16, 4), (1, 1)),
    "more features of values": (slopes(CAUSAL), halves(5, 24), (1, 1)),
    "padding": (slopes(PATTERNS["right"]), halves(), (1, 1)),
    "causal and padding": (slopes(PATTERNS["right, causal"]), halves(), (1, 1)),
    "of each": (jax.vmap(slopes(CAUSAL), (0, None, None)),
                (halves()[0][None], *halves()[1:]), (1, 1)),
    "checkpoint": (jax.value_and_grad(jax.checkpoint(total(CAUSAL))), halves(), (2, 1)),
    "forward mode": (lambda *qkv: jax.jvp(by(None), qkv, qkv), halves(), (1, 0)),
    "hessian": (lambda q, k, v: (total(CAUSAL)(q, k, v), jax.hessian(total(CAUSAL))(q, k, v)),
                halves(), (1, 0)),
    "one query": (slopes(Pattern()), (halves()[0][..., :1, :], *halves()[1:]), (0, 0)),
    "float32": (slopes(CAUSAL), inputs(8, 8), (0, 0)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_kernel_is_used_for_value_and_gradient_on_cuda_only(name, hopper):
    f, given, wanted = PROGRAMS[name]
    assert calls(f, *given) == wanted
    assert calls(f, *given, platform="cpu") == (0, 0)


def test_the_settings_of_the_kernel_follow_the_pattern(hopper):
    """Mask type, window, number of operands (lengths are two of them), scale."""
    def settings(pattern):
        text = jax.jit(by(None, pattern)).trace(*halves()).lower(
            lowering_platforms=("cuda",)).as_text()
        (call,) = re.findall(r"@__cudnn\$fmhaSoftmax\(.*", text)
        operands = call.partition("(")[2].partition(")")[0].count("%")
        mask, window, scale = (re.search(rf'{name}\\22: (\\22)?([\w.]+)', call)[2] for name in (
            "mask_type", "sliding_window_length", "fmha_scale"))
        return mask, window, operands, float(scale)

    assert settings(Pattern()) == ("NO_MASK", "0", 3, 1.0)
    assert settings(CAUSAL) == ("CAUSAL", "0", 3, 1.0)
    assert settings(PATTERNS["window"]) == ("CAUSAL", "2", 3, 1.0)
    assert settings(PATTERNS["right"]) == ("PADDING", "0", 5, 1.0)
    assert settings(PATTERNS["right, causal"]) == ("PADDING_CAUSAL", "0", 5, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "wanted"), [
    (lambda net: net, (1, 1)), (lambda net: dp.repeat(3, net), (1, 1)),
    (lambda net: dp.repeat(3, dp.remat(net)), (2, 1))], ids=["once", "repeat", "remat"])
def test_layers_use_the_kernel_in_training(wrap, wanted, hopper):
    net, x = wrap(dp.self_attention(2, causal=True)), jnp.ones((2, STEPS, 16), jnp.bfloat16)
    params, _ = net.init(KEY, x)
    loss = lambda params: net(params, x).astype(jnp.float32).sum()  # noqa: E731
    assert calls(jax.grad(loss), params) == wanted
    jax.eval_shape(lambda: dp.gradients.hessian_product(loss, params, params))
    jax.eval_shape(lambda: dp.gradients.tangent_kernel(net, params, x[:1], x))


def test_each_residual_is_kept_once(hopper):
    q, k, v = halves()
    kept = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(by(None), *qkv)[1], q, k, v))
    assert sum(a.size for a in kept) == 2 * q.size + k.size + v.size + 2 * 2 * STEPS


@pytest.mark.slow
def test_on_a_cpu_next_to_a_hopper_the_formula_is_used(hopper, monkeypatch):
    given = halves()
    f = jax.jit(lambda *qkv: (slopes(CAUSAL)(*qkv), jax.hessian(total(CAUSAL))(*qkv)))
    traced = f.trace(*given)
    assert "fused_attention" in str(traced.jaxpr)
    found = traced.lower(lowering_platforms=("cpu",)).compile()(*given)
    monkeypatch.setattr(module, "_on_hopper", lambda: False)
    dot_product.clear_cache()
    plain = jax.jit(lambda *qkv: (slopes(CAUSAL)(*qkv), jax.hessian(total(CAUSAL))(*qkv)))
    close(*jax.tree.map(np.float32, (found, plain(*given))))


def test_one_export_to_several_platforms(hopper):
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{way}")
              for way in ("", "Backward")]
    exported = jax.export.export(
        jax.jit(slopes(CAUSAL)), platforms=("cpu", "cuda"), disabled_checks=checks)(*halves())
    assert exported.mlir_module().count("@__cudnn$fmha") == 2


@pytest.mark.slow
def test_it_runs_on_a_mesh(kernel):
    """In `shard_map` each device has its examples and their padding."""
    given, axes = halves(), jax.sharding.PartitionSpec("data")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(q, k, v, valid):
        return jax.grad(lambda *qkv: dot_product(
            *qkv, Pattern(valid=valid, empty=True), implementation="cudnn").astype(
                jnp.float32).sum(), (0, 1, 2))(q, k, v)

    parted = jax.shard_map(run, mesh=mesh, in_specs=(axes,) * 4, out_specs=(axes,) * 3)
    found, wanted = jax.jit(lambda *given: (parted(*given), run(*given)))(*given, RIGHT)
    close(*jax.tree.map(np.float32, (found, wanted)))


@pytest.mark.parametrize("pattern", [CAUSAL, PATTERNS["right"]], ids=["causal", "right"])
def test_mixes_sees_that_examples_are_independent(hopper, pattern):
    """`mixes` inspects the program inside the primitives."""
    y = by(None, pattern)
    assert mixes(y, 2, (0, 0, 0), *halves()) is False
    assert mixes(lambda *qkv: y(*qkv).mean(0), 2, (0, 0, 0), *halves()) is True
