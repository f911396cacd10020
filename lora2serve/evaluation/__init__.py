"""What a model scores, and whether the score of another one differs: suites, scorers, statistics, reports."""
