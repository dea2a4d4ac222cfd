"""The language model: configuration, presets, and the Hugging Face model.

Importing this package makes the model known to ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from resnet_bk.models.cache import ResNetBKCache as ResNetBKCache
from resnet_bk.models.configuration import ResNetBKConfig as ResNetBKConfig
from resnet_bk.models.matching import match_total_parameters as match_total_parameters
from resnet_bk.models.modeling import ResNetBKCausalLMOutput as ResNetBKCausalLMOutput
from resnet_bk.models.modeling import ResNetBKForCausalLM as ResNetBKForCausalLM
from resnet_bk.models.modeling import ResNetBKModel as ResNetBKModel
from resnet_bk.models.presets import PRESETS as PRESETS

AutoConfig.register(ResNetBKConfig.model_type, ResNetBKConfig, exist_ok=True)
AutoModel.register(ResNetBKConfig, ResNetBKModel, exist_ok=True)
AutoModelForCausalLM.register(ResNetBKConfig, ResNetBKForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "ResNetBKCache",
    "ResNetBKCausalLMOutput",
    "ResNetBKConfig",
    "ResNetBKForCausalLM",
    "ResNetBKModel",
    "match_total_parameters",
]
