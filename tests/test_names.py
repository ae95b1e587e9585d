"""Names and what is said of them, by rules: `names.py` prints the list that they are read in."""

import inspect
import itertools
import types

import pytest
from names import Name, public

import diffprog as dp

NAMES = public()

# One concept has one word: ours, and those that are not used for it.
WORDS = {
    "activation": "act act_fn nonlinearity",
    "batch_size": "chunk_size minibatch",
    "bias": "use_bias with_bias",
    "class_weights": "weights",
    "exclude": "but except",
    "guidance_scale": "guidance cfg_scale",
    "ignore_index": "ignore",
    "label_smoothing": "smoothing",
    "log_every": "every",
    "method": "how mode",
    "stop_tokens": "stop",
    "classes": "num_classes n_classes",
    "depth": "num_layers n_layers",
    "dilation": "rhs_dilation kernel_dilation dilation_rate",
    "dims": "ndim num_spatial_dims",
    "dropout": "dropout_rate drop drop_rate",
    "eps": "epsilon",
    "features": "units channels dim out_features out_channels output_size",
    "groups": "num_groups feature_group_count",
    "heads": "num_heads n_heads",
    "hidden": "hidden_size mlp_dim dim_feedforward intermediate_size",
    "key": "rng rngs",
    "labels": "label",
    "length": "max_length max_len maxlen",
    "mask": "padding_mask paddings",
    "n": "num number count",
    "net": "model network module",
    "objective": "loss_fn criterion",
    "params": "variables weight",
    "predictions": "prediction outputs y_pred",
    "rate": "share probability prob p",
    "size": "kernel_size window_size window_shape",
    "max_tokens": "max_new_tokens max_length_tokens num_tokens",
    "steps": "iterations num_steps",
    "stride": "strides window_strides",
    "targets": "y_true",
    "vocabulary": "vocab vocab_size num_embeddings",
    "width": "d_model embed_dim hidden_dim",
}

# What stands first, and in this order, where it is given by position.
ORDER = ["key", "net", "layer", "step", "params", "state", "x", "logits", "predictions",
         "log_predictions", "labels", "targets", "data"]

# Pairs that stand in either order, and why.
EITHER = {
    ("bias", "scale"): "leaves of a norm; in attention scale is a number, after what makes scores",
    ("factor", "original_length"): "longrope has a factor for each pair, the whole may be left out",
    ("state", "step"): "TrainState counts steps; `evaluate` takes the step that `make_step` gives",
}

# One name, several kinds: each of these is the field's word for both.
KINDS = {
    "bias": "whether there is one; `linear_cross_entropy` takes it itself",
    "decay": "the rate of an average, the last phase of a schedule, the leaves that decay",
    "mask": "of entries or pairs; `adamw` takes patterns",
    "hidden": "the size of one hidden axis; `mlp` has several",
    "loss": "a number, and what `regression` makes it with",
    "pattern": "of one path; where leaves are computed, also several",
    "scale": "whether a norm has one; in attention the factor of the scores",
    "state": "of a net, and of training",
}
ALIASES = {"Activation": "Callable", "Reduction": "Literal", "Temperature": "float"}

def each(*titles):
    """One test for each name, of some groups or of all."""
    names = [name for name in NAMES if not titles or name.group in titles]
    return pytest.mark.parametrize("name", names, ids=lambda name: name.path)


def positional(name):
    return [p.name for p in name.arguments.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


def keywords(name):
    return [p.name for p in name.arguments.values() if p.kind is p.KEYWORD_ONLY]


def kind(annotation):
    """An annotation as it is compared: its first alternative, without what is inside."""
    first = next(part for part in annotation.split(" | ") if part != "None").partition("[")[0]
    return ALIASES.get(first, first)


def test_docstrings_are_read():
    def f(x, size, rate, *, eps=1e-5):
        """One line, ``y = x``.

        Shapes:
            x: (..., D); not a name: (...).

        Args:
            size, rate: of one thing
                and two: of another.
            epsilon: of the norms.

        Raises:
            LayerError: never.
        """

    name = Name("layers", "dp.f", f)
    assert name.first == "One line, ``y = x``."
    assert name.documented("Args") == ["size", "rate", "epsilon"]
    assert name.documented("Shapes") == ["x"] and name.documented("Attributes") == []
    assert str(name).startswith("dp.f(x, size, rate, *, eps=1e-05)\n")


def test_all_of_them_are_read():
    spaces = {name for name in dp.__all__ if isinstance(getattr(dp, name), types.ModuleType)}
    assert {name.path for name in NAMES} == {
        *(f"dp.{name}" for name in set(dp.__all__) - spaces),
        *(f"dp.{space}.{name}" for space in spaces for name in getattr(dp, space).__all__)}
    assert len(NAMES) == len({name.path for name in NAMES})


@each()
def test_the_first_line_is_one_sentence(name):
    assert name.first[-1] in ".?" and len(name.first) <= 100
    assert not name.doc.partition("\n")[2] or name.doc.splitlines()[1] == ""
    assert name.first.count("``") % 2 == 0


@each("transforms", "layers", "models")
def test_the_first_line_of_a_layer_holds_its_formula(name):
    assert "``" in name.first


@each()
def test_the_arguments_are_those_of_the_docstring(name):
    unknown = set(name.documented("Args")) - name.arguments.keys()
    assert not unknown, f"{unknown} are documented and not taken"
    said = {*name.documented("Args"), *name.documented("Attributes"), *name.documented("Shapes")}
    missing = [argument for argument in name.arguments if argument not in said]
    if missing in (["x"], ["xs"], ["tree"]):
        missing = []  # the first line says what a function of one thing does
    assert not missing, f"{missing} are taken and not documented"


def test_arguments_come_in_one_order():
    """Of two names that stand beside each other in several signatures the same one comes first."""
    seen = {}
    for name in NAMES:
        for arguments in (positional(name), keywords(name)):
            for pair in itertools.combinations(arguments, 2):
                seen.setdefault(pair, []).append(name.path)
    turned = {tuple(sorted(pair)) for pair in seen if pair[::-1] in seen}
    assert turned == EITHER.keys(), {pair: (seen[pair], seen[pair[::-1]]) for pair in turned}


@each()
def test_required_arguments_come_first(name):
    if inspect.isclass(name.value):
        return
    given = [argument for argument in positional(name) if argument in ORDER]
    assert given == sorted(given, key=ORDER.index)
    if name.path != "dp.attention":  # whose key is that of a query
        assert "key" not in positional(name)[1:], "it comes first, as in jax.random, or by keyword"
    last = keywords(name)
    initial = [argument for argument in last if argument.endswith("_init")
               and argument != "zero_init"]  # of resnet: whether branches begin at zero
    assert last[len(last) - len(initial) :] == initial, "initializers come last"
    leaves = [leaf for leaf in ("scale_init", "kernel_init", "out_init", "hidden_init",
                                  "bias_init") if leaf in initial]
    assert leaves == [leaf for leaf in initial if leaf != "embedding_init"]


def test_one_argument_means_one_kind():
    kinds = {}
    for name in NAMES:
        for parameter in () if inspect.isclass(name.value) else name.arguments.values():
            found = kind(parameter.annotation)
            if found != "Any":
                kinds.setdefault(parameter.name, {}).setdefault(found, []).append(name.path)
    several = {argument: found for argument, found in kinds.items() if len(found) > 1}
    assert several.keys() == KINDS.keys(), several


@pytest.mark.parametrize(("ours", "theirs"), WORDS.items(), ids=WORDS)
def test_one_concept_has_one_word(ours, theirs):
    given = {argument: name.path for name in NAMES for argument in name.arguments}
    assert ours in given, f"{ours} is no argument any more"
    for word in theirs.split():
        assert word not in given, f"{given.get(word)} takes {word}: elsewhere it is {ours}"
