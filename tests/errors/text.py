"""Errors of text objectives, generation and beam search."""

import jax
import jax.numpy as jnp
from support.refusing import KEY

import diffprog as dp
from errors.given import params

IDS = jnp.ones((2, 7), int)
PROMPTS = [[3, 1, 4], [5], [2, 6, 0, 1]]
GPT = dp.models.gpt(7, length=12, width=8, depth=1, heads=2, hidden=8)
TRANSLATOR = dp.models.seq2seq(5, 7, width=6)
PLAIN = dp.serial(table=dp.embedding(7, 4), head=dp.linear(7))
TURNING = dp.embedding(7, 8) >> dp.self_attention(2, causal=True, rotary=dp.rotary())
RAW = dp.embedding(7, 7)
ONE = dp.stateless(None, lambda params, x: x, name="one")
SCALAR = dp.stateless(None, lambda params, x: x * 1.0, name="scalar")
LAST = dp.stateless(None, lambda params, x: jnp.ones((len(x), 7)), name="last")
NEVER = dp.serial(embed=dp.embedding(7, 4), look=dp.self_attention(2), head=dp.linear(7))


class Penalty:
    __hash__ = None

    def __call__(self, logits, text):
        return logits


def drawn(net, **side):
    return params(net, IDS, **side)


def ask(prompts=PROMPTS, net=GPT, own=None, steps=5, **options):
    """Generate from prompts."""
    return lambda: dp.text.generate(
        net, drawn(GPT) if own is None else own, prompts, steps, **options)


def search(**options):
    return lambda: dp.text.beam_search(GPT, drawn(GPT), PROMPTS, 5, **options)


def learn(objective, batch, net=PLAIN, own=None):
    """Evaluate an objective on a batch."""
    own = drawn(net) if own is None else own
    return lambda: jax.eval_shape(
        lambda own, batch: objective(net, own, {}, batch, key=None, train=True), own, batch)


def chunks(*paths):
    return learn(dp.text.chunked_next_token(*paths), IDS)


def mask(ids=IDS, mask_token=1, **more):
    return lambda: dp.text.mask_tokens(KEY, ids, vocabulary=5, mask_token=mask_token, **more)


def pairs(documents, length=8):
    return lambda: dp.text.sentence_pairs(documents, length, start_token=1, separator_token=2,
                                          seed=0)


def expanded():
    net = dp.linearize(dp.serial(table=dp.embedding(7, 4), head=dp.linear(7)))
    own, state = net.init(KEY, IDS)
    dp.text.chunked_next_token("table", "head/kernel")(net, own, state, IDS, key=None, train=True)


EXAMPLES = {
    # Next token.
    "wants ids as ints (batch, time + 1), at least two tokens, got int32[2,1]; give at least two "
    "tokens to each row: the targets are all but the first":
        learn(dp.text.next_token(), IDS[:, :1]),
    "wants ids as ints (batch, time + 1), at least two tokens, got float32[2,3]; give at least "
    "two tokens to each row: the targets are all but the first":
        learn(dp.text.next_token(), jnp.ones((2, 3))),
    "wants ids with an open size of the form t + 1, got int32[2,t]; write "
    'jax.export.symbolic_shape("b, t + 1"): t of them are inputs':
        lambda: jax.eval_shape(lambda ids: learn(dp.text.next_token(), ids)(), jax.ShapeDtypeStruct(
            (2, *jax.export.symbolic_shape("t")), jnp.int32)),
    "wants a batch with x and side inputs of the net (none), got x, y; rename or remove the rest: "
    "x holds inputs and targets":
        learn(dp.text.next_token(), {"x": IDS, "y": IDS}),
    "wants a batch with x and side inputs of the net (none), got segments, x; rename or remove "
    "the rest: x holds inputs and targets":
        learn(dp.text.next_token(), {"x": IDS, "segments": IDS}),
    "wants positions of the shape of x, (2, 7), got int32[2,6]; give one to each token, the last "
    "one too":
        learn(dp.text.next_token(), {"x": IDS, "positions": IDS[:, 1:]}, TURNING),
    "wants a net that returns logits (batch, time, vocabulary) for int32[2,6], got float32[2,7]; "
    "return next-token logits at each step":
        learn(dp.text.next_token(), IDS, LAST),
    "wants the path of a matrix as table (head/bias, head/kernel, table/embedding), got 'head'; "
    "write embed/embedding or head/kernel, for example":
        chunks("table", "head"),
    "wants a trunk and a table whose product is the logits float32[2,6,7], got (float32[2,6,7], "
    "float32[4,7]); name the last layer before the logits, and the kernel that its output is "
    "multiplied by":
        chunks("head", "table/embedding"),
    "tap(serial(table=embedding(7, 4), head=linear(7)), 'body'): wants a pattern that matches a "
    "layer (head, table), got 'body'; correct it: * is one level, ** any number":
        chunks("body", "head/kernel"),
    "wants the path of one layer as trunk, got head, table; name one alone":
        chunks("*", "head/kernel"),
    "wants chunk as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.text.chunked_next_token("table", "head/kernel", chunk=0),
    "wants logits that are one product, got linearize(serial(table=embedding(7, 4), head=linear(7)"
    ")); use next_token: linearize turns a product into a sum of two":
        expanded,
    "wants characters as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.metrics.bits_per_character(1.0, 1, 0),
    # Masked tokens, pairs of sentences.
    "wants y as a pair (token labels, follows), got int32[2,7]; use "
    "classification(ignore_index=-100) for tokens alone":
        learn(dp.text.masked_language(), {"x": IDS, "y": IDS}, ONE),
    "wants a net that returns a pair of logits, of tokens and of follows, got int32[2,7]; use "
    "bert_pretraining, for example":
        learn(dp.text.masked_language(), {"x": IDS, "y": (IDS, IDS[:, 0])}, ONE),
    "wants a net that takes mask, got one that takes none; leave the mask out: tokens "
    "without a loss have the label -100":
        learn(dp.text.masked_language(), {"x": IDS, "y": (IDS, IDS[:, 0]), "mask": IDS > 0}, ONE),
    "wants mask_token and special_tokens in [0, 5), got 5 and (); pass ids of the vocabulary":
        mask(mask_token=5),
    "wants mask_token and special_tokens in [0, 5), got 1 and (-1,); pass ids of the vocabulary":
        mask(special_tokens=[-1]),
    "wants ids as ints (batch, time), got float32[2,7]; give one row to each text":
        mask(IDS.astype(float)),
    "wants rate in [0, 1), got 15; pass a fraction, not a percentage":
        mask(rate=15),
    "wants at least two documents without empty sentences, got 1, 0 with empty ones; "
    "add documents, and leave empty sentences out":
        pairs([[[1], [2]]]),
    "wants at least two documents without empty sentences, got 2, 1 with empty ones; "
    "add documents, and leave empty sentences out":
        pairs([[[1], []], [[2]]]),
    "wants length as an int of at least 5, got 4; pass 5 or more":
        pairs([[[1]], [[2]]], 4),
    # Prompts.
    "wants at least one token in each prompt, got an empty prompt, number 1; begin with the id "
    "of the start token":
        ask([[1], []]),
    "wants prompts as ints (batch, time) or a list of lists of ints, got [1, 2]; pass a single "
    "prompt as a batch of one: [prompt]":
        ask([1, 2]),
    "wants prompts as ints (batch, time) or a list of lists of ints, got []; pass a single "
    "prompt as a batch of one: [prompt]":
        ask([]),
    "wants prompts of ids, ints from 0 to 2**31 - 1, got [[0.5]]; encode the text first":
        ask([[0.5]]),
    "wants prompts of ids, ints from 0 to 2**31 - 1, got [[-1]]; encode the text first":
        ask([[-1]]),
    "positions (learned_positions(12)): wants at most 12 steps, got 13; learn more positions, or "
    "cut x":
        ask([[1] * 9]),
    # Options.
    "wants temperature as 0 or a number of at least 1e-30, got -0.1; choose 0 for greedy "
    "decoding, 1 for the probabilities of the net":
        ask(temperature=-0.1),
    "wants temperature as 0 or a number of at least 1e-30, got nan; choose 0 for greedy "
    "decoding, 1 for the probabilities of the net":
        ask(temperature=float("nan")),
    "wants a key at a temperature above 0, got none; pass key=jax.random.key(seed), or "
    "temperature=0.0 for greedy decoding":
        ask(temperature=1.0),
    "wants top_p in (0, 1], got 0.0; pass a probability, or None to leave it out":
        ask(top_p=0.0),
    "wants top_p in (0, 1], got 1.1; pass a probability, or None to leave it out":
        ask(top_p=1.1),
    "wants top_p in (0, 1], got float32[3]; pass a probability, or None to leave it out":
        ask(top_p=jnp.full(3, 0.5)),
    "wants only side inputs that it takes (attention_bias, attention_mask, mask, positions, "
    "segments), got callback; leave it out, or add a layer that takes it":
        search(callback=print),
    "wants top_k as an int of at least 1, got 0; pass 1 or more":
        ask(top_k=0),
    "wants top_k of at most 7, the vocabulary, got 8; lower it":
        ask(top_k=8),
    "wants stop_tokens in [0, 7), got 7; leave it out: the net never generates it":
        ask(stop_tokens=[7]),
    "wants stop_tokens in [0, 7), got -1; leave it out: the net never generates it":
        ask(stop_tokens=[-1]),
    "wants stop_tokens as a sequence of ids, got 3; pass stop_tokens=[0], for example":
        ask(stop_tokens=3),
    "wants stop_tokens of ids, or of sequences of ids, got []; pass stop_tokens=[0, [4, 2]], "
    "for example":
        ask(stop_tokens=[1, []]),
    "wants stop_tokens of ids, or of sequences of ids, got 'a'; pass stop_tokens=[0, [4, 2]], "
    "for example":
        ask(stop_tokens=["a"]),
    "wants stop_tokens in [0, 7), got 8; leave it out: the net never generates it":
        ask(stop_tokens=[[1, 8]]),
    "wants a key, or one for each row, (3,), got uint32[3]; pass jax.random.key(seed), or "
    "jax.random.split(key, rows)":
        ask(temperature=1.0, key=jnp.ones(3, jnp.uint32)),
    "wants one temperature, or one for each row, (3,), got float32[2]; pass a number, or an array "
    "of this shape":
        ask(temperature=jnp.ones(2), key=KEY),
    "wants adjust to return logits float32[3,7], got float32[3,1]; return one number for each "
    "token of each row":
        ask(adjust=lambda logits, text: logits[:, :1]),
    "wants top_k of at most 3, the vocabulary, got 4; lower it":
        lambda: dp.text.sample(KEY, jnp.ones((2, 3)), top_k=4),
    "wants max_tokens as an int of at least 1, got 0; pass 1 or more":
        ask(steps=0),
    "wants side inputs without a time axis, got mask; give prompts of different lengths as a "
    "list of lists: they are padded and masked here":
        ask(mask=jnp.ones((3, 4), bool)),
    "wants beams as an int of at least 1, got 0; pass 1 or more":
        search(beams=0),
    "wants length_penalty in [0, 10], got -1.0; choose 0 to compare "
    "log-probabilities, 1 to compare means over tokens":
        search(length_penalty=-1.0),
    "wants stop_tokens in [0, 7), got 9; leave it out: the net never generates it":
        search(stop_tokens=[9]),
    # Nets that cannot generate.
    "look (self_attention(2)): wants causal=True for a stream, got causal=False; set it: "
    "otherwise each step attends to later ones":
        ask(net=NEVER, own=drawn(NEVER)),
    "wants prompts of concrete ids, got int32[1,2]; call it outside of jax.jit: it is one compiled "
    "program already, and an export is one of net.start and net.apply":
        lambda: jax.eval_shape(lambda ids: ask(ids)(), jnp.ones((1, 2), jnp.int32)),
    "wants prompts of one length for a net without mask, got lengths [3, 1, 4]; pass one prompt "
    "at a time":
        ask(net=RAW, own=drawn(RAW)),
    "wants a net that returns logits (batch, time, vocabulary) for int32[1,1], got float32[1,1]; "
    "return next-token logits at each step":
        ask([[1]], SCALAR, {}),
    "decoder/attend (cross_attention(1)): wants the side input memory, got none; pass memory=, the "
    "encoder output, in each call: only a stream keeps it":
        ask([[1]], TRANSLATOR, drawn(TRANSLATOR, source=IDS)),
    "wants memory in place of source, got int32[1,2]; encode it once: "
    'memory=net.children["encoder"](params["encoder"], source, mask=source_mask), '
    "memory_mask=source_mask":
        ask([[1]], TRANSLATOR, drawn(TRANSLATOR, source=IDS), source=jnp.ones((1, 2), int)),
    "wants adjust as a function (logits, text), got 1.2; pass lambda logits, text: logits / 2, for "
    "example":
        ask(adjust=1.2),
    "wants a hashable function as adjust, got <Penalty>; write @dataclass(frozen=True), or pass a "
    "plain function: compiled programs are cached by it":
        search(adjust=Penalty()),
    "wants callback as a function (step, tokens), got 3; pass lambda step, tokens: print(tokens), "
    "for example":
        ask(callback=3),
    "wants logits that are not NaN, got NaN for prompt 0; look for ids outside the vocabulary, "
    "for an adjust that leaves no token, and for NaN in the parameters by tree.nonfinite(params)":
        ask([[1]], RAW, {"embedding": jnp.full((7, 7), jnp.nan)}),
}
