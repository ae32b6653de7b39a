"""Preference losses, their log-probs and their metrics: torch only, no collectives."""
