"""Train, measure, collect, again: the rounds, where new rows come from, picking them, writing them."""
