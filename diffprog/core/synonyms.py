"""Names of other libraries and textbooks, and their equivalents here, for error messages.

Names are compared without case and underscores, so one entry covers `Conv2d`, `conv2d` and
`conv_2d`. A name that differs from one of this library only in these needs no entry.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

# Name -> the equivalent here, which a test resolves.
_MEANT = {
    # layers
    **dict.fromkeys(["dense", "fullyconnected", "affine", "lazylinear"], "dp.linear(features)"),
    **dict.fromkeys(["conv1d", "convolution1d"], "dp.conv(features, size, dims=1)"),
    **dict.fromkeys(["conv2d", "convolution", "convolution2d"], "dp.conv(features, size)"),
    **dict.fromkeys(["conv3d", "convolution3d"], "dp.conv(features, size, dims=3)"),
    **dict.fromkeys(["convtranspose1d", "convtranspose2d", "deconv", "conv2dtranspose"],
                    "dp.conv_transpose(features, size)"),
    **dict.fromkeys(["maxpool1d", "maxpool2d", "maxpooling2d"], "dp.max_pool(size)"),
    **dict.fromkeys(["avgpool1d", "avgpool2d", "averagepooling2d"], "dp.avg_pool(size)"),
    **dict.fromkeys(["globalaveragepooling2d", "globalavgpool2d"], "dp.global_avg_pool()"),
    **dict.fromkeys(["adaptiveavgpool1d", "adaptiveavgpool2d"], "dp.adaptive_avg_pool(size)"),
    **dict.fromkeys(["batchnorm1d", "batchnorm2d", "batchnormalization"], "dp.batch_norm()"),
    **dict.fromkeys(["layernormalization", "ln"], "dp.layer_norm()"),
    **dict.fromkeys(["instancenorm1d", "instancenorm2d"], "dp.instance_norm()"),
    **dict.fromkeys(["embed", "embedtoken", "tokenembedding", "lookup"],
                    "dp.embedding(vocabulary, features)"),
    **dict.fromkeys(["positionalencoding", "positionencoding", "sinusoidalencoding"],
                    "dp.sinusoidal_positions(), or dp.learned_positions(length)"),
    **dict.fromkeys(["positionalembedding", "positionembedding"], "dp.learned_positions(length)"),
    **dict.fromkeys(["rope", "rotaryembedding"], "dp.self_attention(heads, rotary=dp.rotary())"),
    **dict.fromkeys(["attention", "multiheadattention", "multiheaddotproductattention", "mha",
                     "scaleddotproductattention", "dotproductattention"],
                    "dp.self_attention(heads), or dp.cross_attention(heads)"),
    **dict.fromkeys(["feedforward", "mlpblock", "positionwisefeedforward"], "dp.ffn(hidden)"),
    **dict.fromkeys(["prenormresidual", "sublayer"], "dp.pre_norm(body), or dp.add_norm(body)"),
    **dict.fromkeys(["transformerblock", "transformerlayer", "transformerencoderlayer",
                     "encoderblock", "encoderlayer"],
                    "dp.models.transformer_encoder(depth=1, heads=heads, hidden=hidden)"),
    **dict.fromkeys(["transformerdecoderlayer", "decoderblock", "decoderlayer"],
                    "dp.models.transformer_decoder(depth=1, heads=heads, hidden=hidden)"),
    **dict.fromkeys(["rnn", "sequencernn", "lazyrnn"],
                    "dp.recurrent(cell), such as dp.recurrent(dp.simple_rnn(features))"),
    **dict.fromkeys(["rnncell", "simplecell", "vanillarnn"], "dp.simple_rnn(features)"),
    **dict.fromkeys(["lstmcell", "optimizedlstmcell"], "dp.lstm(features)"),
    "grucell": "dp.gru(features)",
    **{name: f"dp.recurrent(dp.{name}(features))" for name in ("lstm", "gru")},
    **dict.fromkeys(["dropout1d", "dropout2d"], "dp.spatial_dropout(rate)"),
    **dict.fromkeys(["droppath", "dropblock"], "dp.stochastic_depth(rate)"),
    **dict.fromkeys(["sequential", "chain", "compose"], "dp.serial(a, b), or a >> b"),
    **dict.fromkeys(["modulelist", "stack", "layerstack"],
                    "dp.repeat(n, layer) for copies, dp.serial(a, b) for different layers"),
    **dict.fromkeys(["scan", "vmaplayer"], "dp.repeat(n, layer), or dp.ensemble(n, layer)"),
    **dict.fromkeys(["skip", "skipconnection", "shortcut", "residualblock"],
                    "dp.residual(body)"),
    **dict.fromkeys(["concat", "cat", "faninconcat"], "dp.concatenate"),
    **dict.fromkeys(["fanout", "parallelbranches"], "dp.branch(a, b)"),
    **dict.fromkeys(["faninsum", "eltwiseadd"], "dp.add"),
    **dict.fromkeys(["bidirectional", "birnn"], "dp.recurrent(cell, bidirectional=True)"),
    "timedistributed": "the layer itself, such as dp.linear(features): leading axes stay",
    "masking": "mask=, a side input of net.apply", "metric": "dp.metrics.accuracy, for example",
    **dict.fromkeys(["input", "inputlayer"], "net.init(key, x), which reads the shape off x"),
    **dict.fromkeys(["geglu", "reglu"], "dp.swiglu(features), or dp.glu(features)"),
    "densegeneral": "dp.linear(features) >> dp.reshape(shape)",
    "einsum": "jnp.einsum in the forward of dp.stateless(init, forward)",
    **dict.fromkeys(["checkpoint", "rematerialize"],
                    "dp.remat(layer), or orbax.checkpoint to save"),
    **dict.fromkeys(["onehot", "onehotencoding"], "dp.one_hot(classes)"),
    **dict.fromkeys(["view", "unflatten"], "dp.reshape(shape)"),
    **dict.fromkeys(["module", "model"],
                    "dp.program(name=layer) over a function, or dp.serial(a, b)"),
    **dict.fromkeys(["lambda", "activation"], "a plain function, such as jax.nn.relu"),
    **dict.fromkeys(["identity", "noop"], "a plain function, lambda x: x"),
    **dict.fromkeys(["param", "parameter", "variable"], "dp.stateless(init, forward)"),
    # losses, objectives, metrics
    **dict.fromkeys(["crossentropyloss", "softmaxcrossentropy", "nllloss", "sparsecrossentropy"],
                    "dp.losses.cross_entropy, or the objective dp.classification()"),
    **dict.fromkeys(["bceloss", "bcewithlogitsloss", "sigmoidcrossentropy"],
                    "dp.losses.binary_cross_entropy, or the objective "
                    "dp.training.binary_classification()"),
    **dict.fromkeys(["mse", "mseloss", "l2loss", "meansquarederror"],
                    "dp.losses.squared_error, or the objective dp.regression()"),
    **dict.fromkeys(["mae", "l1loss", "meanabsoluteerror"],
                    "dp.losses.absolute_error, or the objective "
                    "dp.regression(dp.losses.absolute_error)"),
    **dict.fromkeys(["smoothl1loss", "huberloss"], "dp.losses.huber"),
    **dict.fromkeys(["kldiv", "kldivloss", "kl"], "dp.losses.kl_divergence"),
    "ctcloss": "dp.losses.ctc",
    **dict.fromkeys(["languagemodeling", "causallm", "lmloss"],
        "the objective dp.text.next_token()"),
    # training and writing
    **dict.fromkeys(["train", "trainer", "trainingloop"], "dp.fit"),
    **dict.fromkeys(["trainstep", "step", "update"], "dp.make_step(net, objective, optimizer)"),
    **dict.fromkeys(["dataloader", "dataset", "loader"], "dp.batches(data, batch_size)"),
    **{name: f"optax.{name}" for name in (
        "sgd", "adam", "adagrad", "adadelta", "adafactor", "rmsprop", "lamb", "lars",
        "lion", "nadam", "radam", "lbfgs")},
    **dict.fromkeys(["momentum", "optimizer", "optim"],
                    "an optimizer of optax, such as optax.sgd(0.1, momentum=0.9)"),
    **dict.fromkeys(["earlystopping", "reducelronplateau"],
                    "dp.training.Validation(data, patience=n)"),
    **dict.fromkeys(["modelcheckpoint", "checkpointmanager"],
                    "dp.fit(..., checkpoints=folder)"),
    **dict.fromkeys(["clipgradnorm", "clipbyglobalnorm"], "optax.clip_by_global_norm(norm)"),
    **dict.fromkeys(["warmup", "warmupcosinedecayschedule", "learningrate", "lrscheduler"],
                    "a schedule of optax, such as optax.warmup_cosine_decay_schedule"),
    **dict.fromkeys(["save", "load", "savecheckpoint", "loadcheckpoint", "savestate", "statedict"],
                    "orbax.checkpoint or safetensors: parameters are a pytree, whose leaves "
                    "dp.tree.paths names"),
    **dict.fromkeys(["generatetoken", "generatetokens", "decode", "greedysearch"],
        "dp.text.generate"),
    "cosineschedule": "dp.diffusion.cosine_noise, for noise",
    "linearschedule": "dp.diffusion.linear_noise, for noise",
    "attend": "dp.unembed for the product with an embedding, dp.self_attention for attention",
    **dict.fromkeys(["beam", "beamdecode"], "dp.text.beam_search"),
    **dict.fromkeys(["numparameters", "countparameters", "paramcount"], "dp.tree.count(params)"),
    **dict.fromkeys(["tabulate", "printmodel"], "dp.summary(net, x)"),
    **dict.fromkeys(["init", "initialize"], "net.init(key, x)"),
    **dict.fromkeys(["apply", "forward", "call"], "net.apply(params, state, x)"),
    **{name: f"jax.{name}" for name in ("jit", "vmap", "pmap", "grad")},
    **dict.fromkeys(["valueandgrad", "filtergrad", "filtervalueandgrad"],
                    "jax.value_and_grad over params"),
    "filterjit": "jax.jit over functions of params", "treemap": "jax.tree.map",
    **dict.fromkeys(["transform", "transformwithstate", "withoutapplyrng"],
                    "dp.program(name=layer) over a function"),
    **dict.fromkeys(["nograd", "detach"], "jax.lax.stop_gradient"),
    **dict.fromkeys(["eval", "evalmode", "inferencemode"],
                    "net.apply without train=True: inference is the default"),
    **dict.fromkeys(["prngkey", "rngs", "manualseed", "seed"], "jax.random.key(seed)"),
    # transformations
    **dict.fromkeys(["exponentialmovingaverage", "polyakaverage"], "dp.ema(layer)"),
    **dict.fromkeys(["stopgradient", "frozen"], "dp.freeze(layer)"),
    "unfreeze": "the layer itself, without dp.freeze around it",
    **dict.fromkeys(["glorotuniform", "xavieruniform"],
                    "jax.nn.initializers.glorot_uniform(), as kernel_init="),
    **dict.fromkeys(["kaimingnormal", "henormal"],
                    "jax.nn.initializers.he_normal(), as kernel_init="),
    **dict.fromkeys(["autocast", "halfprecision"], "dp.mixed(layer, jnp.bfloat16)"),
    **dict.fromkeys(["hypernetwork", "hypernet"], "dp.hyper(target, generator)"),
    **dict.fromkeys(["deq", "equilibrium", "implicit"], "dp.fixed_point(f)"),
    **dict.fromkeys(["hook", "sow", "intermediates"], "dp.tap(layer, pattern)"),
}

# Argument -> its name here.
_ARGUMENTS = {
    **dict.fromkeys(["use_bias", "with_bias"], "bias"), "use_scale": "scale", "r": "rank",
    **dict.fromkeys(["out_features", "output_size", "hidden_size", "out_channels", "embedding_dim",
                     "units"], "features"),
    **dict.fromkeys(["num_heads", "n_heads", "nhead"], "heads"),
    **dict.fromkeys(["kernel_size", "window_shape", "filter_size"], "size"),
    "strides": "stride", "kernel_dilation": "dilation", "feature_group_count": "groups",
    **dict.fromkeys(["epsilon", "norm_eps"], "eps"),
    **dict.fromkeys(["p", "drop_rate", "drop_prob"], "rate"),
    **dict.fromkeys(["num_embeddings", "vocab_size", "vocab"], "vocabulary"),
    **dict.fromkeys(["num_classes", "n_classes"], "classes"),
    **dict.fromkeys(["num_groups", "n_groups"], "groups"),
    **dict.fromkeys(["num_layers", "n_layers", "n_layer", "layers"], "depth"),
    **dict.fromkeys(["n_head", "num_attention_heads"], "heads"),
    **dict.fromkeys(["n_embd", "hidden_dim", "d_model", "embed_dim"], "width"),
    **dict.fromkeys(["dim_feedforward", "d_ff", "mlp_dim", "intermediate_size"], "hidden"),
    **dict.fromkeys(["block_size", "max_len", "max_length", "n_positions"], "length"),
    **dict.fromkeys(["scale_factor", "upscale_factor"], "factor"),
    **dict.fromkeys(["mode", "how"], "method"), "but": "exclude",
    **dict.fromkeys(["w_init", "weight_init"], "kernel_init"), "b_init": "bias_init",
    **dict.fromkeys(["is_causal", "causal_mask"], "causal"),
    **dict.fromkeys(["dropout_rate", "drop"], "dropout"),
}

_OF_INPUTS = frozenset({
    "in_features", "in_channels", "input_size", "input_dim", "num_features", "num_channels",
    "normalized_shape", "embed_dim", "d_model", "channels_in"})


# Argument -> what to do instead, in any layer.
_INSTEAD = {
    **dict.fromkeys(["activation", "act", "nonlinearity"],
                    "compose it, as in linear(8) >> jax.nn.relu"),
    **dict.fromkeys(["dtype", "param_dtype"],
                    "leave it out: a layer computes in the dtype of x, and mixed(net, dtype) says "
                    "another"),
    **dict.fromkeys(["key", "rng", "rngs", "seed"], "give it to init: net.init(key, x)"),
    "name": "name the layer where it stands, as in serial(head=linear(8))",
    **dict.fromkeys(["deterministic", "training", "train", "use_running_average", "is_training",
                     "inference"], "give train= to apply: it reaches every layer"),
    **dict.fromkeys(["affine", "elementwise_affine"], "write scale=, bias="),
    "return_sequences": "take the last step after it: net >> (lambda y: y[:, -1])",
    "padding_idx": "leave it out: mask=, a side input of apply, marks valid steps",
    **dict.fromkeys(["inplace", "device", "batch_first"], "leave it out"),
}


def unknown(module: str, name: str) -> AttributeError:
    """The error for a name that the package, or a namespace in it, does not have."""
    known = meant(name)
    return AttributeError(f"module {module!r} has no attribute {name!r}"
                          + (f"; use {known}" if known else ""),
                          name=name, obj=sys.modules[module])


def meant(name: str) -> str:
    """The public name that an unknown name may mean; "" if there is none."""
    if name.startswith("_"):
        return ""
    public = {path.rpartition(".")[2]: path for path in _public()}
    if name in public:
        return public[name]
    known = {
        **{_plain(own): f"jax.nn.{own}" for own in dir(jax.nn) if not own.startswith("_")},
        **{_plain(own): path for own, path in public.items()}, **_MEANT}
    plain = _plain(name)
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.75) if len(plain) > 3 else ()
    return known.get(plain) or (known[near[0]] if near else "")


def arguments(
    factory: str, parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:
    """The remedy for arguments that a factory does not take; "" if there is none."""
    if unknown := [other for other in kwargs if other not in parameters]:
        return "; ".join(filter(None, (argument(other, parameters) for other in unknown)))
    places = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) <= len(places) or any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return ""
    sizes = all(isinstance(a, int | tuple) for a in args) and type(args[0]) is not bool
    own = _own(factory, places, parameters, args) if sizes else None
    if own is None:
        return "name the arguments behind the star"
    remedy = f"write {factory}({', '.join(own)})"
    if len(own) == len(args) or places == ["shape"]:
        return remedy
    remedy = f"{remedy}: init reads the size of the input off x"
    if len(args) == 3 and "stride" in parameters and type(args[1]) is int:
        # The third is the stride in Keras, the size in PyTorch.
        remedy += f"; or {factory}({args[0]}, {args[1]}, stride={args[2]}), if that is the stride"
    return remedy


def _own(
    factory: str, places: list[str], parameters: Mapping[str, inspect.Parameter],
    args: Sequence[Any],
) -> list[str] | None:
    """The arguments of a factory, from the positional arguments of other libraries.

    There the input size comes first, except for group norms and layers without one.
    """
    first = places[0] if places else ""
    match first:
        case "features" if "stride" in parameters:
            own = args[0 if isinstance(args[1], tuple) else 1 :]  # a tuple is a size
            return [*map(repr, own[:2]), *_named(own[2:])]
        case "features" if type(args[1]) is int:
            return [repr(args[2 if factory == "bilinear" and len(args) > 2 else 1])]
        case "heads" if not any(isinstance(a, tuple) for a in args):
            return [repr(min(args))]  # the width is the larger one
        case "size" if "multiplier" not in parameters:
            return [repr(args[0]), *_named(args[1:])]
        case "hidden" if len(args) > 2:
            return [repr(tuple(args[1:-1])), repr(args[-1])]
        case "shape":
            return [repr(tuple(args))]
        case "groups" | "length":
            return [repr(args[0])]
        case "":
            return []
    return None


def _named(values: Sequence[Any]) -> list[str]:
    """The arguments of convolutions and pools after the size, by name."""
    pairs = zip(("stride", "padding"), values, strict=False)
    return [f"{name}={value!r}" for name, value in pairs]


def argument(name: str, taken: Iterable[str]) -> str:
    """The remedy for an unknown argument; "" if there is none."""
    names = [*taken]
    other = _ARGUMENTS.get(name, "")
    if other in names:
        return f"write {other}="
    if name in _OF_INPUTS:
        return f"leave {name} out: init reads the size of the input off x"
    if name in _INSTEAD:
        return _INSTEAD[name]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"write {near[0]}=" if near else ""


def _public() -> Iterator[str]:
    """The path of each public name, those of the namespaces first."""
    package: Any = sys.modules["diffprog"]
    for space, module in {**package._SPACES, "tree": "tree"}.items():
        for name in importlib.import_module(f"diffprog.{module}").__all__:
            yield f"dp.{space}.{name}"
    yield from (f"dp.{name}" for name in package.__all__)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
