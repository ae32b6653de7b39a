"""The preference-data stages: normalise, candidates (or perturb), select, build_pairs, reference_logps."""
