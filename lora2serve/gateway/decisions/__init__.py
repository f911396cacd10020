"""Decisions on live traffic: whether a challenger is worse or better than the champion, valid at every look.

``decision_rules``   what gateway.yaml says of it
``betting``          the e-process: a bet on each observation, whose wealth is the evidence
``rule_test``        one rule: observations of two arms become bets
``trial``            one champion against one challenger, by all rules of a route; its state as a file has it
``verdicts``         what a verdict does: one registry transaction, a webhook, a line in the log
"""
