"""Names of other libraries and of textbooks, and what stands here for them."""

import functools
import inspect
import re

import jax
import optax
import pytest
from names import by_name

import diffprog as dp
from diffprog.core import synonyms

TEXTS = sorted({*synonyms._MEANT.values()})


def said(name):
    """What is said of a name that the package does not have."""
    with pytest.raises(AttributeError, match=f"no attribute '{name}'") as caught:
        getattr(dp, name)
    return str(caught.value).partition("; use ")[2]


def resolved(text):
    """The names of this library, of JAX and optax that a text speaks of, looked up."""
    roots = {"dp": dp, "jax": jax, "optax": optax, "jnp": jax.numpy,
             "net": dp.linear(2)}
    for root, path in re.findall(r"\b(dp|jax|optax|jnp|net)((?:\.\w+)+)", text):
        yield functools.reduce(getattr, path[1:].split("."), roots[root])


@pytest.mark.parametrize("text", TEXTS)
def test_suggested_names_exist(text):
    found = list(resolved(text))
    assert found or "function" in text or "of optax" in text


def test_names_that_do_not_exist_are_found():
    with pytest.raises(AttributeError):
        list(resolved("dp.linear(features), or dp.lineal(features)"))


def test_no_entry_is_a_name_of_this_library():
    """Such a name is found before; and each is written as it is compared."""
    for name in synonyms._MEANT:
        assert name == name.lower().replace("_", "")
        assert name not in by_name() or name in ("lstm", "gru", "attention")


@pytest.mark.parametrize(("name", "use"), [
    ("Linear", "dp.linear"), ("Dense", "dp.linear"), ("conv2d", "dp.conv("), ("Conv2d", "dp.conv("),
    ("Conv", "dp.conv"), ("relu", "jax.nn.relu"), ("ReLU", "jax.nn.relu"),
    ("LeakyReLU", "jax.nn.leaky_relu"), ("GELU", "dp.gelu"), ("softmax", "jax.nn.softmax"),
    ("save", "orbax"), ("LSTM", "dp.recurrent(dp.lstm("), ("GRU", "dp.recurrent(dp.gru("),
    ("FeedForward", "dp.ffn"), ("Attention", "dp.self_attention"), ("AddNorm", "dp.add_norm"),
    ("TransformerBlock", "dp.models.transformer_encoder"), ("SequenceRNN", "dp.recurrent"),
    ("EmbedToken", "dp.embedding"), ("GenerateToken", "dp.text.generate"),
    ("multi_head_attention", "dp.self_attention"), ("MultiHeadAttention", "dp.self_attention"),
    ("positional_encoding", "dp.sinusoidal_positions"), ("sgd", "optax.sgd"),
    ("AdamW", "dp.training.adamw"), ("BatchNorm2d", "dp.batch_norm"), ("Sequential", "dp.serial"),
    ("CrossEntropyLoss", "dp.losses.cross_entropy"), ("MSELoss", "dp.losses.squared_error"),
    ("DataLoader", "dp.batches"), ("dropuot", "dp.dropout"), ("liner", "dp.linear"),
    ("self_atention", "dp.self_attention"), ("sinusoidal_position", "dp.sinusoidal_positions"),
    ("softmx", "jax.nn.softmax"), ("Sequentail", "dp.serial"),
    ("jit", "jax.jit"), ("vmap", "jax.vmap"), ("no_grad", "jax.lax.stop_gradient"),
    ("unfreeze", "the layer itself"), ("transform", "dp.program"), ("GEGLU", "dp.swiglu"),
    ("ModelCheckpoint", "dp.fit(..., checkpoints=folder)"),
    ("EarlyStopping", "dp.training.Validation(data, patience=n)"),
    ("Bidirectional", "dp.recurrent(cell, bidirectional=True)"), ("FanOut", "dp.branch"),
    ("FanInSum", "dp.add"), ("PRNGKey", "jax.random.key"), ("eval", "net.apply"),
])
def test_names_that_one_may_know(name, use):
    assert said(name).startswith(use) and list(resolved(said(name))) is not None


@pytest.mark.parametrize("name", ["xyzzy", "np", "_linear", "__wrapped__", "hot"])
def test_nothing_is_guessed(name):
    assert said(name) == ""


@pytest.mark.parametrize(("call", "write"), [
    (lambda: dp.linear(784, 10), "linear(10)"), (lambda: dp.linear(784, 10, True), "linear(10)"),
    (lambda: dp.conv(3, 16, 3, 1, 1), "conv(16, 3, stride=1, padding=1)"),
    (lambda: dp.self_attention(8, 64), "self_attention(8)"),
    (lambda: dp.bilinear(4, 4, 8), "bilinear(8)"), (lambda: dp.layer_norm((8,)), "layer_norm()"),
    (lambda: dp.learned_positions(512, 64), "learned_positions(512)"),
    (lambda: dp.models.mlp(784, 256, 10), "mlp((256,), 10)"),
    (lambda: dp.batch_norm(64), "batch_norm()"), (lambda: dp.lstm(10, 20), "lstm(20)"),
    (lambda: dp.self_attention(512, 8), "self_attention(8)"),
    (lambda: dp.group_norm(8, 64), "group_norm(8)"),
    (lambda: dp.linear(784, 10, bias=False), "linear(10)"),
])
def test_the_size_of_the_input_is_no_argument(call, write):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).endswith(f"; write {write}: init reads the size of the input off x")
    eval(write, dict(by_name()))  # it is what it says


@pytest.mark.parametrize(("call", "write"), [
    (lambda: dp.max_pool(3, 2), "max_pool(3, stride=2)"),
    (lambda: dp.max_pool(3, 2, 1), "max_pool(3, stride=2, padding=1)"),
    (lambda: dp.reshape(-1, 8), "reshape((-1, 8))"),
    (lambda: dp.conv(64, (3, 3), 2), "conv(64, (3, 3), stride=2)"),
])
def test_keyword_arguments_passed_by_position_are_named(call, write):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).endswith(f"; write {write}")
    eval(write, dict(by_name()))


def test_a_third_number_of_a_convolution_may_be_its_size_or_its_stride():
    with pytest.raises(TypeError, match=r"takes features, size, \*, dims.*write conv\(16, 3\): .*"
                       r"; or conv\(3, 16, stride=3\), if that is the stride$"):
        dp.conv(3, 16, 3)


@pytest.mark.parametrize(("call", "remedy"), [
    (lambda: dp.linear(3, use_bias=False), "write bias="),
    (lambda: dp.dropout(p=0.5), "write rate="), (lambda: dp.conv(3, kernel_size=3), "write size="),
    (lambda: dp.self_attention(num_heads=3), "write heads="),
    (lambda: dp.linear(3, kernelinit="zeros"), "write kernel_init="),
    (lambda: dp.linear(in_features=3, out_features=4),
     "leave in_features out: init reads the size of the input off x; write features="),
    (lambda: dp.batch_norm(num_features=3),
     "leave num_features out: init reads the size of the input off x"),
    (lambda: dp.linear(3, True), "name the arguments behind the star"),
    (lambda: dp.embedding(9, 4, 0), "name the arguments behind the star"),
    (lambda: dp.linear(8, activation="relu"), "compose it, as in linear(8) >> jax.nn.relu"),
    (lambda: dp.self_attention(embed_dim=8, num_heads=2),
     "leave embed_dim out: init reads the size of the input off x; write heads="),
    (lambda: dp.models.gpt(vocab_size=9, n_embd=8), "write vocabulary=; write width="),
    (lambda: dp.models.transformer_encoder(d_model=8),
     "leave d_model out: init reads the size of the input off x"),
    (lambda: dp.linear(8, name="head"),
     "name the layer where it stands, as in serial(head=linear(8))"),
])
def test_arguments_that_one_may_know(call, remedy):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).endswith(f"; {remedy}")


def test_an_unknown_argument_is_no_guess():
    with pytest.raises(TypeError, match=r"argument 'foo'$"):
        dp.linear(3, foo=3)


def test_arguments_of_other_names_lead_to_some_that_exist():
    known = {name for made in by_name().values() if callable(made)
             for name in inspect.signature(made).parameters}
    assert set(synonyms._ARGUMENTS.values()) <= known
