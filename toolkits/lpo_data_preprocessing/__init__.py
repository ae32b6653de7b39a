"""The preference-data stages: normalise, candidates, select, build_pairs, reference_logps; and inspect, to look at what they made."""

import sys

from toolkits.lpo_data_preprocessing.preemption import end_at_once

if sys.argv[:1] == ["-m"]:  # "python -m" a stage, which begins with seconds of imports
    end_at_once()
