"""Several preference losses from the same weights on the same pairs: what to train, which runs to trust, and what the numbers say.

    plan        the TOML file           materials   model, problems and pair stores
    trials      one training each       jobs        several at a time
    measure     numbers of a model      protocol    choice of rates, intervals, "no difference"
    report      tables                  plots       curves and accuracies
"""
