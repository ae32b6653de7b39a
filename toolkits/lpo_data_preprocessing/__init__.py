"""The preference-data stages: normalise, candidates, select, build_pairs, reference_logps; and inspect, to look at what they made."""
