"""Training objectives: which batch fields they need and their loss from log-probs."""
