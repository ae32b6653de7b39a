"""The loss functions, by what they look at: the margin, the two sides apart, the likelihood, or the lpo family's distances."""
