"""The parts of federated averaging, without communication: what is computed of, and from, clients' updates.

    clients       each client's own data set; `skew` deals one data set out to clients by label
    sampling      a round's clients, and those lost: functions of (seed, round)
    aggregation   updates -> one update: means, and what stands liars
    masking       words -> masked words -> their exact sum: secure aggregation
    privacy       clipping, noise, and the budget of epsilon

Below them: `fixed_point` (numbers as words), `neighbours` (who masks with whom), `sharing` (secrets in shares),
`stream` (random words from a secret), `extra` (libraries of the extra samestep[privacy]).
"""
