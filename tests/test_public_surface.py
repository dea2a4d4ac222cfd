"""What others may import, and how the operators are called: changing it is a decision, not an accident."""

import importlib
import inspect

import pytest

from resnet_bk.ops import bk_carry, bk_core, bk_tunnel

SURFACE = {
    "resnet_bk": {"ResNetBKConfig", "ResNetBKForCausalLM", "__version__"},
    "resnet_bk.frugal": {
        "CheckpointHandle",
        "HostActivations",
        "MicroBatches",
        "ModelInParts",
        "OffloadedAdamW",
        "Passes",
        "RecordedPasses",
        "StreamedBlocks",
        "WaitingTensors",
        "backward_by_block",
        "checkpoint_blocks",
        "half_weights",
        "split_rows",
        "stream_blocks",
    },
    "resnet_bk.planner": {"plan"},
    "resnet_bk.ops": {"bk_carry", "bk_core", "bk_tunnel"},
    "resnet_bk.ops.bk": {
        "BackendChoice",
        "available_backends",
        "bk_core",
        "bk_core_pairs",
        "bk_tunnel",
        "choose_backend",
    },
    "resnet_bk.layers": {
        "BKBlock",
        "BKMixer",
        "CausalAttention",
        "LocalAttention",
        "MixerBlock",
        "MixtureOfExperts",
        "ResolventMixer",
        "SequenceContext",
        "ShortConvolution",
    },
    "resnet_bk.models": {
        "PRESETS",
        "ResNetBKCache",
        "ResNetBKCausalLMOutput",
        "ResNetBKConfig",
        "ResNetBKForCausalLM",
        "ResNetBKModel",
        "match_total_parameters",
    },
    "resnet_bk.training.data": {
        "Corpus",
        "Document",
        "TextTokenizer",
        "TokenDataset",
        "TokenSplit",
        "evaluation_batches",
        "load_corpus",
        "prepare_dataset",
        "tokenize_all",
        "train_tokenizer",
        "training_batch",
        "unigram_entropy",
    },
}
# Names that a package has from its own imports and not to give away.
BORROWED = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "TYPE_CHECKING",
    "Any",
    "Path",
    "import_module",
    "version",
}
each_package = pytest.mark.parametrize("package", SURFACE)


@each_package
def test_the_public_names_are_these(package):
    module = importlib.import_module(package)
    assert set(module.__all__) == SURFACE[package]
    assert len(module.__all__) == len(set(module.__all__))
    visible = {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert visible - BORROWED <= SURFACE[package], "a name that is importable is public"
    assert all(hasattr(module, name) for name in module.__all__)


@each_package
def test_everything_public_says_what_it_is(package):
    module = importlib.import_module(package)
    assert module.__doc__
    for name in SURFACE[package]:
        value = getattr(module, name)
        if not (inspect.isclass(value) or callable(value)):
            continue
        # A docstring of its own: neither a base class's nor the signature that dataclass writes.
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
        if inspect.isclass(value):
            undocumented = [
                member
                for member, function in vars(value).items()
                if member[0] != "_" and inspect.isfunction(function) and not documented(value, member)
            ]
            assert undocumented == [], name


def documented(owner, member):
    """Whether a method says what it does, here or in the class it overrides."""
    inherits_meaning = {"forward", "get_input_embeddings", "set_input_embeddings", "get_output_embeddings"}
    return bool(inspect.getdoc(getattr(owner, member))) or member in inherits_meaning | {"set_output_embeddings"}


def signature(function):
    """Names, kinds and defaults, without the annotations."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]))


def test_bk_core_is_called_like_this():
    assert signature(bk_core) == (
        "(v, z, *, h0=-2.0, hopping=1.0, causal=True, grad='exact', blend=0.5, "
        "initial_state=None, output_final_state=False, backend='auto')"
    )


def test_bk_tunnel_is_called_like_this():
    assert signature(bk_tunnel) == "(w, *, starts=None, initial_state=None, output_final_state=False, backend='auto')"


def test_a_name_that_is_not_there_is_the_usual_error():
    import resnet_bk

    with pytest.raises(AttributeError, match="no attribute 'ResNetBKTransformer'"):
        _ = resnet_bk.ResNetBKTransformer


def test_bk_carry_is_called_like_this():
    assert signature(bk_carry) == (
        "(q, k, v, log_l, *, angle=None, starts=None, initial_state=None, skip=None, output_final_state=False, "
        "form='chunked', backend='auto')"
    )
