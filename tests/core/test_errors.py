"""Every error message is collected, with a call that is answered with it, and read by a grammar."""

import re

import jax.numpy as jnp
import pytest
from errors import aloud
from support.refusing import GRAMMAR

import diffprog as dp

RAW = dp.embedding(7, 7)
WIDE = dp.serial(dp.one_hot(2), *[dp.linear(2, bias=False)] * 99)
PATH = re.compile(r"([\w~]+(?:/[\w~]+)*) \(.*?\): wants", re.DOTALL)


def faults(error):
    """What is wrong with the wording of an error."""
    wants, got, remedy = error.wants, error.got, error.remedy.split("\n")[0]
    yield from (f"{part!r} ends with a stop" for part in (wants, got, remedy)
                if part.endswith((".", ";")))
    if not re.match(r"[a-z0-9]", wants):
        yield f"{wants!r} begins with no small letter"
    if "; " in wants + got:
        yield "a semicolon before the remedy"
    if len(str(error).split("\n")[0]) > 400:
        yield "too long to read"
    if "Array(" in str(error) or "Traced" in str(error):
        yield "a value where dtype and shape would do"
    if "; " in remedy:
        yield f"{remedy!r} has two parts; a colon gives the reason"


def fits(error, message):
    """Is this the message? Its remedy may be left open, and digits after ``...``."""
    if message.endswith("..."):
        return str(error).startswith(message[:-3])
    return str(error) == (message if "; " in message else f"{message}; {error.remedy}")


@pytest.mark.parametrize(("name", "message"), [
    (name, message) for name in aloud.FILES for message in aloud.examples(name)])
def test_messages_are_these_and_of_one_grammar(name, message):
    error = dict(aloud.answers(name))[message]
    assert type(error) is dp.LayerError
    assert fits(error, message)
    assert GRAMMAR.fullmatch(str(error)) and error.remedy
    assert not list(faults(error))
    found = PATH.match(message)
    assert error.path == (found[1] if found else message.split(": wants")[0] * (
        not error.layer and ": wants" in message))


def test_every_message_has_an_example():
    heard = {error.site for name in aloud.FILES for _, error in aloud.answers(name)}
    assert heard <= aloud.sites().keys()
    silent = {f"{file}:{line} {wants}" for (file, line), wants in aloud.sites().items()
              if (file, line) not in heard}
    assert not silent, "give each an example in tests/errors"


@pytest.mark.parametrize("call", [
    lambda: dp.batches([[0.0] * 999] * 9, 3),
    lambda: dp.text.generate(RAW, {"embedding": jnp.ones((7, 7))}, [[0.5] * 999], 1),
    lambda: dp.text.generate(RAW, {"embedding": jnp.ones((7, 7))}, [[1] * i for i in range(1, 99)],
        1),
    lambda: dp.replace(dp.serial(*[dp.linear(2)] * 99), "none", jnp.tanh),
    lambda: dp.text.chunked_next_token("linear_0", "none")(
        WIDE, {f"linear_{i}": {"kernel": jnp.ones((2, 2))} for i in range(99)}, {},
        jnp.ones((2, 3), int), key=None, train=True),
])
def test_large_inputs_and_nets_do_not_flood_the_message(call):
    assert len(str(aloud.answer(call))) < 400


# Each check can fail.

def test_sites_are_found_in_any_form():
    source = """
def f(x):
    raise LayerError("a", "b", "c")
def g(x):
    error = errors.LayerError(
        f"{x} d", "e")
    return error or LayerError("g")
"""
    assert aloud.constructions(source) == [(3, 3, '"a"'), (5, 6, 'f"{x} d"'), (7, 7, '"g"')]


def test_an_answer_knows_where_it_was_made():
    plain = dp.LayerError.__init__
    file, line = aloud.answer(lambda: dp.linear(0)).site
    assert (file, line) in aloud.sites()
    assert aloud.answer(lambda: dp.linear(1)) is None
    assert dp.LayerError.__init__ is plain


@pytest.mark.parametrize("words", [
    ("Three axes", "one", "add them"), ("three axes.", "one", "add them"),
    ("three axes", "one.", "add them"),
    ("three axes", "one", "add two; one is there"), ("three axes; two", "one", "add them"),
    ("three axes", "Array([1.])", "add them"), ("three axes", "one " * 100, "add them"),
], ids=str)
def test_the_grammar_detects_wrong_words(words):
    assert list(faults(dp.LayerError(*words)))
    assert not list(faults(dp.LayerError("three axes", "one", "add them: a matrix has two")))


@pytest.mark.parametrize(("message", "fitting"), [
    ("wants three axes, got one; add them", True), ("wants three axes, got one", True),
    ("wants three axes, got ...", True), ("wants three axes, got two", False),
    ("wants three axes, got one; pick", False), ("wants three", False), ("wants two ...", False)])
def test_a_message_that_differs_does_not_fit(message, fitting):
    assert fits(dp.LayerError("three axes", "one", "add them"), message) == fitting
