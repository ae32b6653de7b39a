"""Which modules a transformer layer is made of.

The torch spec is the default everywhere: megatron-core's own layer with our norm and our packed attention in the two places
where upstream's torch modules refuse sequence parallelism and packed sequences. Transformer Engine's spec is opt-in
(``--transformer-impl transformer_engine``).
"""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.model.packed_attention import PackedAttention
from megatron_patch.model.rms_norm import RMSNorm


def torch_layer_spec() -> ModuleSpec:
    """One decoder layer from torch modules: pre-norm, packed causal attention with QKV bias, SwiGLU."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def qwen2_block_spec(model_config: object, vp_stage: int | None = None) -> TransformerBlockSubmodules | ModuleSpec:
    """The decoder of this pipeline stage: ``transformer_layer_spec`` of the model config.

    Args:
        model_config: a ``GPTModelConfig``; its ``transformer`` says implementation, layers and pipeline layout.
        vp_stage: the virtual pipeline chunk, or None.
    """
    config: TransformerConfig = model_config.transformer  # type: ignore[attr-defined]
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec()
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[torch_layer_spec()] * layers, layer_norm=RMSNorm)
