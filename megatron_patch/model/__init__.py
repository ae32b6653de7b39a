"""The Megatron side of the model: arguments, layer spec, attention, norm, response log-probs."""
